"""The loop: what must not change the numbers does not, and what must stop it does."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from app.config import OBJECTIVE_OPTIONS, LoraSection
from app.errors import ModelError, TrainingError
from app.generation import GenerationRequest, generate
from app.training import loop, scoring
from app.training.batch import PackedBatch, token_bins
from app.training.engine import SingleWorker, make_optimizer
from app.training.held_out import measure, measure_exported
from app.training.judgements import divide, for_unit, with_strangers
from app.training.loop import learning_rate_factor, optimise
from app.training.objectives import Losses, Objective, load_objective
from app.training.policy import adapter_off, autocast, build_policy, frozen, merged, precomputed, trainable
from app.training.proofs import check_packing, check_step_zero
from app.training.scoring import ScoringModel, generating, plain_logps
from app.training.tokenization import Group, Label
from tests.training.tiny_runs import OBJECTIVE, SECTION, Threads, engine_of, make_groups, reference_of, run


def sgd(policy):
    return torch.optim.SGD(trainable(policy).values(), lr=1e-2)


def test_the_first_loss_is_ln_2(start):
    _, reports = run(start, SECTION, make_groups(4))
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert reports[0].reward_ties == 1.0
    assert reports[0].chosen_fell == 0.0, "not one is less likely than itself"
    assert reports[0].learning_rate == 1e-3 / 2, "half way up"


def test_training_raises_the_margin_of_what_it_trains_on(start):
    groups = make_groups(3)
    section = SECTION.model_copy(update={"learning_rate": 2e-2, "warmup_ratio": 0.0})
    _, reports = run(start, section, groups, steps=[groups] * 20)
    assert reports[-1].loss < 0.6 < reports[0].loss
    assert reports[-1].reward_accuracy == 1.0


OPTIONS = {
    "dpo": {"beta": 0.1, "sft_weight": 0.5, "length_weight": 0.01, "wpo": True},
    "kto": {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.5},
    "apo_zero_unpaired": {"desirable_weight": 1.0, "undesirable_weight": 1.5},
}


def groups_for(objective: Objective, count: int) -> list[Group]:
    groups, _ = for_unit(make_groups(count), objective.unit)
    return with_strangers(groups, max_length=64, seed=0) if "kl" in objective.needs else groups


@pytest.fixture
def grown(start, home, tmp_path):
    """A policy that has moved away from its reference, so that no term of a loss is zero by chance."""

    def build(section, objective):
        policy = build_policy(start(), section, agreement="agreement" in objective.needs)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in trainable(policy).items():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return policy.double()

    return build


def one_step(policy, groups, *, section, objective, workers, reference=None):
    (report,) = optimise(
        engine_of(policy, section, optimizer=sgd(policy), workers=workers),
        [groups],
        objective=objective,
        reference=reference or reference_of(policy, section),
        section=section,
        learning_rate=section.learning_rate,
        total_steps=20,
        workers=workers,
    )
    return report, {name: p.grad.clone() for name, p in trainable(policy).items()}


def packed_backwards(groups, token_budget) -> list[PackedBatch]:
    return [PackedBatch.pack(members[::-1]) for members in token_bins(groups, token_budget)[::-1]]


COUPLED = ("tests.training.coupled:aot", "tests.training.coupled:against_the_liked")


@pytest.mark.parametrize("name", [*OBJECTIVE_OPTIONS, *COUPLED])
def test_token_budget_order_and_workers_change_neither_loss_nor_gradient(grown, name, monkeypatch):
    """KTO's KL is that of the whole step, whatever the ranks and micro-batches; so is a loss that couples its rows."""
    objective = load_objective(name, OPTIONS.get(name, {}))
    groups = groups_for(objective, 6)
    common = {"objective": objective}
    whole, expected = one_step(grown(SECTION, objective), groups, section=SECTION, workers=SingleWorker(), **common)
    small = SECTION.model_copy(update={"micro_batch_tokens": 16})
    found = [one_step(grown(small, objective), groups, section=small, workers=SingleWorker(), **common)]
    with monkeypatch.context() as patch:
        patch.setattr("app.training.loop.micro_batches", packed_backwards)
        found += [
            one_step(grown(section, objective), groups, section=section, workers=SingleWorker(), **common)
            for section in (SECTION, small)
        ]
    threads, policies = Threads(2), [grown(small, objective) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found += pool.map(
            lambda rank: one_step(policies[rank], groups, section=small, workers=threads.rank(rank), **common), range(2)
        )
    assert math.isfinite(whole.loss)
    for report, gradients in found:
        assert report.loss == pytest.approx(whole.loss, rel=1e-6)
        assert report.kl == (whole.kl if whole.kl is None else pytest.approx(whole.kl, rel=1e-6))
        assert (report.pairs, report.labels) == (whole.pairs, whole.labels)
        for parameter, gradient in gradients.items():
            apart = (gradient - expected[parameter]).norm()
            assert apart <= 1e-6 * expected[parameter].norm(), parameter


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_its_rows_is_that_of_all_rows_of_the_step(grown, name):
    objective = load_objective(name, {})
    assert objective.coupled
    section = SECTION.model_copy(update={"micro_batch_tokens": 16, "reference": "precomputed", "max_grad_norm": 1e9})
    groups = [
        replace(group, reference_logps=tuple(-3.0 - 0.1 * i for i in range(len(group.responses))))
        for group in groups_for(objective, 6)
    ]
    policy = grown(section, objective)
    batch = PackedBatch.pack(groups)
    logps = policy(batch).logps
    asked = {"policy_logps": logps, "reference_logps": batch.reference_logps}
    ids, judged, weights = (
        (batch.pair_ids, ("chosen", "rejected"), batch.weights)
        if objective.unit == "pairs"
        else (batch.label_ids, ("responses", "desirable"), batch.label_weights)
    )
    order = sorted(range(len(ids)), key=ids.__getitem__)
    asked |= {name: getattr(batch, name)[order] for name in judged}
    losses = objective.function(**{name: asked[name] for name in objective.needs}).losses
    weights = weights[order].double()
    expected = (losses * weights).sum() / weights.sum()
    expected.backward()
    direct = {name: parameter.grad.clone() for name, parameter in trainable(policy).items()}
    policy.zero_grad()
    report, gradients = one_step(policy, groups, section=section, objective=objective, workers=SingleWorker())
    assert report.loss == pytest.approx(float(expected), rel=1e-6)
    for parameter, gradient in gradients.items():
        assert (gradient - direct[parameter]).norm() <= 1e-6 * direct[parameter].norm(), parameter
    held = [
        measure(policy, groups, objective=objective, reference=precomputed, section=small, workers=SingleWorker())
        for small in (section, section.model_copy(update={"micro_batch_tokens": 4096}))
    ]
    rows = [[row.loss for row in (found.pairs if objective.unit == "pairs" else found.answers)] for found in held]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    assert len(set(rows[0])) > 1


def test_how_many_chosen_answers_fell_is_a_share_of_the_steps_pairs(grown):
    section = SECTION.model_copy(update={"reference": "precomputed"})
    groups = [
        replace(group, reference_logps=(0.0 if number == 0 else -1e3,) * len(group.responses))
        for number, group in enumerate(make_groups(4))
    ]
    report, _ = one_step(
        grown(section, OBJECTIVE), groups, section=section, objective=OBJECTIVE, workers=SingleWorker()
    )
    assert report.chosen_fell == len(groups[0].pairs) / report.pairs


def test_a_pair_counts_by_its_weight(grown):
    beta, sft_weight = 0.5, 0.3
    objective = load_objective("dpo", {"beta": beta, "sft_weight": sft_weight})
    groups = [replace(group, reference_logps=(-9.0,) * len(group.responses)) for group in make_groups(4)]
    section = SECTION.model_copy(update={"reference": "precomputed"})
    policy = grown(section, objective)
    with torch.no_grad():
        logps = {g.group_id: plain_logps(policy.model, [g]) for g in groups}
    pairs = [
        (pair.weight, *(logps[g.group_id][i] for i in (pair.chosen, pair.rejected)), len(g.responses[pair.chosen]))
        for g in groups
        for pair in g.pairs
    ]
    assert len({weight for weight, *_ in pairs}) > 1
    tokens = sum(weight * count for weight, _, _, count in pairs)
    expected = sum(
        -weight
        * (torch.nn.functional.logsigmoid(beta * (good - bad)) / sum(w for w, *_ in pairs) + sft_weight * good / tokens)
        for weight, good, bad, _ in pairs
    )
    report, _ = one_step(policy, groups, section=section, objective=objective, workers=SingleWorker())
    assert report.loss == pytest.approx(float(expected), rel=1e-6)


def steep(policy_logps, chosen, rejected) -> Losses:
    """Zero, and its derivative is not a number: inf * 0."""
    return Losses(((policy_logps[chosen] - policy_logps[rejected]) * 0.0).sqrt(), policy_logps.detach())


def test_a_finite_loss_with_a_gradient_that_is_not_makes_no_update(start):
    objective = load_objective(f"{__name__}:steep", {})
    policy, groups = build_policy(start(), SECTION), make_groups(3)
    before = {name: parameter.detach().clone() for name, parameter in trainable(policy).items()}
    report, _ = one_step(policy, groups, section=SECTION, objective=objective, workers=SingleWorker())
    assert (report.loss, report.grad_norm) == (0.0, None)
    assert set(report.skipped) == {pair.pair_id for group in groups for pair in group.pairs}
    assert all(torch.equal(before[name], parameter) for name, parameter in trainable(policy).items())


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5))


def opt() -> PreTrainedModel:
    """Its layers drop out by a function, in whatever mode they are themselves."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    return OPTForCausalLM(
        OPTConfig(vocab_size=258, num_attention_heads=4, max_position_embeddings=64, dropout=0.5, **sizes)
    )


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("made", [gpt2, opt])
def test_dropout_acts_where_answers_are_imitated_and_not_where_they_are_compared(start, made, recomputed):
    torch.manual_seed(0)
    model = made()
    section = SECTION.model_copy(
        update={"adapter": "full", "reference": "precomputed", "activation_checkpointing": recomputed}
    )
    policy = build_policy(replace(start(), model=model.eval()), section)
    assert policy.plain_because is not None
    groups = make_groups(3)
    with torch.no_grad():
        scored = [
            replace(group, reference_logps=tuple(plain_logps(policy.model, [group]).tolist())) for group in groups
        ]
    report, _ = one_step(policy, scored, section=section, objective=OBJECTIVE, workers=SingleWorker())
    assert report.loss == pytest.approx(math.log(2), abs=1e-5)
    imitation = load_objective("sft", {})
    good, _ = for_unit(groups, imitation.unit)
    losses = []
    for seed in (0, 1):
        section = section.model_copy(update={"seed": seed, "learning_rate": 0.0})
        losses.append(one_step(policy, good, section=section, objective=imitation, workers=SingleWorker())[0].loss)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_rows_of_one_id_stand_in_one_order_however_they_are_packed(grown):
    """A pair's liked and disliked answers have one id, and may lie in different rows of its prompt."""
    objective = load_objective("tests.training.coupled:against_the_liked", {})
    section = SECTION.model_copy(update={"micro_batch_tokens": 16})
    (group,) = make_groups(1)
    rows = [
        replace(group, group_id=name, pairs=(), responses=(answer[-3:],), labels=(Label(0, liked, 1.0, "one", "x"),))
        for name, answer, liked in zip("ab", group.responses, (True, False), strict=True)
    ]
    losses = [
        one_step(
            grown(section, objective),
            [replace(r, group_id=n) for r, n in zip(rows, names, strict=True)],
            section=section,
            objective=objective,
            workers=SingleWorker(),
        )[0].loss
        for names in ("ab", "ba")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_dropout_is_the_same_in_both_forwards_of_a_loss_that_couples_its_rows(start, monkeypatch):
    scores, score = [], loop.score_batch

    def heard(*given, **named):
        scored = score(*given, **named)
        scores.append(scored.policy_logps.detach())
        return scored

    monkeypatch.setattr(loop, "score_batch", heard)
    section = SECTION.model_copy(update={"adapter": "full", "micro_batch_tokens": 16})
    policy = build_policy(replace(start(), model=gpt2()), section)
    objective = load_objective("tests.training.coupled:against_the_mean", {})
    groups, _ = for_unit(make_groups(4), objective.unit)
    one_step(policy, groups, section=section, objective=objective, workers=SingleWorker(), reference=precomputed)
    half = len(scores) // 2
    assert half > 1
    assert torch.equal(torch.cat(scores[:half]), torch.cat(scores[half:]))


def test_a_gradient_is_clipped_to_the_norm_of_the_recipe_and_reported_as_it_was(grown):
    found = []
    for most in (1e6, 0.01):
        section = SECTION.model_copy(update={"max_grad_norm": most, "warmup_ratio": 0.0})
        report, gradients = one_step(
            grown(section, OBJECTIVE), make_groups(4), section=section, objective=OBJECTIVE, workers=SingleWorker()
        )
        found.append((report.grad_norm, torch.stack([g.norm() for g in gradients.values()]).norm().item()))
    (norm, whole), (reported, clipped) = found
    assert norm == reported == pytest.approx(whole)
    assert norm > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_recomputed_activations_change_no_gradient(start, adapter):
    reference = "adapter_off" if adapter == "lora" else "precomputed"
    groups = [replace(group, reference_logps=(-9.0,) * len(group.responses)) for group in make_groups(4)]
    gradients, computed = [], []
    for recomputed in (False, True):
        section = SECTION.model_copy(
            update={"adapter": adapter, "reference": reference, "activation_checkpointing": recomputed}
        )
        policy, calls = build_policy(start(), section), []
        layer = next(module for name, module in policy.named_modules() if name.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        _, found = one_step(
            policy, groups, section=section, objective=OBJECTIVE, workers=SingleWorker(), reference=precomputed
        )
        gradients.append(found)
        computed.append(len(calls))
    assert computed[1] == 2 * computed[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-7), name


def test_a_step_without_answers_to_other_prompts_has_no_kl_rather_than_one_of_zero(grown):
    objective = load_objective("kto", OPTIONS["kto"])
    groups, _ = for_unit(make_groups(3), objective.unit)
    report, _ = one_step(
        grown(SECTION, objective), groups, section=SECTION, objective=objective, workers=SingleWorker()
    )
    assert report.kl is None
    assert math.isfinite(report.loss)


def test_the_kl_of_kto_is_measured_on_answers_to_other_prompts_and_they_are_not_trained_on(grown):
    objective = load_objective("kto", {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0})
    groups = groups_for(objective, 4)
    policy = grown(SECTION, objective)
    divided = [divide(group) for group in groups]
    with torch.no_grad():
        own, strangers = (PackedBatch.pack([d[side] for d in divided]) for side in (0, 1))
        ratios = [policy(batch).logps - adapter_off(policy, SECTION.dtype)(batch) for batch in (own, strangers)]
    gains = 0.5 * (ratios[0][own.responses] - ratios[1].mean().clamp(min=0))
    expected = torch.where(own.desirable, 1 - gains.sigmoid(), 1 - (-gains).sigmoid())
    report, _ = one_step(policy, groups, section=SECTION, objective=objective, workers=SingleWorker())
    assert report.kl == pytest.approx(float(ratios[1].mean()), rel=1e-4)
    assert report.loss == pytest.approx(float((expected * own.label_weights).sum() / own.label_weights.sum()), rel=1e-5)
    assert report.labels == len(own.responses)
    assert report.pairs == 0
    assert report.reward_accuracy is None


def test_imitation_costs_the_likelihood_of_the_good_answers_tokens(start):
    objective = load_objective("sft", {})
    groups = groups_for(objective, 3)
    section = SECTION.model_copy(update={"learning_rate": 2e-2, "warmup_ratio": 0.0})
    policy, reports = run(start, section, groups, steps=[groups] * 10, objective=objective)
    assert reports[-1].loss < reports[0].loss
    weights = torch.tensor([x.weight for g in groups for x in g.labels])
    tokens = torch.tensor([len(g.responses[x.response]) for g in groups for x in g.labels])
    nats = -(plain_logps(start().model, groups) * weights).sum() / (tokens * weights).sum()
    assert reports[0].loss == pytest.approx(float(nats), rel=1e-4)
    measured = measure(
        policy,
        groups,
        objective=objective,
        reference=precomputed,
        section=section,
        workers=SingleWorker(),
    )
    assert measured.pairs == []
    assert len(measured.answers) == reports[0].labels


def test_agreement_weighs_by_how_likely_the_policy_gives_the_answers_itself(start):
    policy = build_policy(start(), SECTION, agreement=True)
    batch = PackedBatch.pack(make_groups(2))
    with torch.no_grad():
        found = policy(batch).agreement
        rows = []
        for group in make_groups(2):
            for response in group.responses:
                ids = torch.tensor([group.prompt_ids + response])
                logits = start().model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
                own = logits.gather(1, torch.tensor(response)[:, None])[:, 0]
                rows.append((own - logits.exp().square().sum(-1).log()).mean())
    assert torch.allclose(found, torch.stack(rows), atol=1e-4)


def test_three_ways_to_a_reference_train_the_same(start, grown):
    """Read from the snapshot, the policy's own base, or a frozen model beside it."""
    groups = make_groups(6)
    with torch.no_grad():
        logps = plain_logps(start().model, groups).double().tolist()
    scored = []
    for group in groups:
        count = len(group.responses)
        scored.append(replace(group, reference_logps=tuple(logps[:count])))
        logps = logps[count:]
    beside = frozen(ScoringModel(start().model), SECTION.dtype)
    common = {"section": SECTION, "objective": OBJECTIVE, "workers": SingleWorker()}
    policies = [grown(SECTION, OBJECTIVE) for _ in range(3)]
    ways = [precomputed, adapter_off(policies[1], SECTION.dtype), beside]
    (first, expected), *others = (
        one_step(policy, scored, reference=way, **common) for policy, way in zip(policies, ways, strict=True)
    )
    assert first.loss != pytest.approx(math.log(2), abs=1e-3)
    for report, gradients in others:
        assert report.loss == pytest.approx(first.loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


def test_rows_that_are_not_finite_are_named_and_skipped_and_three_steps_of_them_end_the_run(start, claim):
    groups = [replace(g, reference_logps=(-5.0,) * len(g.responses)) for g in make_groups(4)]
    bad = replace(groups[1], reference_logps=(math.nan,) * len(groups[1].responses))
    section = SECTION.model_copy(update={"reference": "precomputed"})
    policy = build_policy(start(), section)
    common = {"objective": OBJECTIVE, "learning_rate": section.learning_rate, "section": section}
    common |= {"total_steps": 9, "workers": SingleWorker(), "reference": precomputed}
    before = {n: p.detach().clone() for n, p in trainable(policy).items()}
    with_bad = [groups[0], bad]
    reports = optimise(engine_of(policy, section), [with_bad, groups, with_bad, with_bad, with_bad], **common)
    skipped = next(reports)
    done = [skipped]
    assert (skipped.loss, skipped.grad_norm) == (None, None)
    assert skipped.skipped == tuple(p.pair_id for p in bad.pairs)
    assert all(torch.equal(before[n], p) for n, p in trainable(policy).items())
    done.append(next(reports))
    assert done[-1].skipped == ()
    after = {n: p.detach().clone() for n, p in trainable(policy).items()}
    assert any(not torch.equal(before[n], after[n]) for n in after)
    done += [next(reports), next(reports)]
    assert [report.step for report in done] == [1, 2, 3, 4]
    with pytest.raises(
        TrainingError, match=r"3 steps in a row, up to step 5, .* no update was made. Rows of the last: 1-1"
    ):
        next(reports)
    assert all(torch.equal(after[n], p) for n, p in trainable(policy).items())
    claim(
        "a row that is not finite: no update, the row named, and the third such step in a row ends the run",
        figure=f"{sum(bool(report.skipped) for report in done)} of {len(done)} steps skipped, then the end",
    )


def test_a_row_that_is_not_finite_on_one_rank_stops_the_update_of_all(start, claim):
    groups = [replace(g, reference_logps=(-5.0,) * len(g.responses)) for g in make_groups(4)]
    groups[1] = replace(groups[1], reference_logps=(math.inf,) * len(groups[1].responses))
    section = SECTION.model_copy(update={"reference": "precomputed"})
    policies, threads = [build_policy(start(), section) for _ in range(2)], Threads(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(
                lambda rank: (
                    one_step(policies[rank], groups, section=section, objective=OBJECTIVE, workers=threads.rank(rank))[
                        0
                    ].skipped
                ),
                range(2),
            )
        )
    assert found == [tuple(p.pair_id for p in groups[1].pairs)] * 2
    claim("a row that is not finite on one rank stops the update of all", figure=f"{len(found)} ranks")


def test_reference_scores_of_another_model_are_refused_before_the_first_step(start):
    groups = [replace(g, reference_logps=(-1.0,) * len(g.responses)) for g in make_groups(2)]
    section = SECTION.model_copy(update={"reference": "precomputed"})
    with pytest.raises(TrainingError, match="not the same model"):
        check_step_zero(build_policy(start(), section), groups, reference=precomputed, section=section)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_packed_and_plain_rows_are_compared_before_the_first_step(start, dtype, noise):
    section = SECTION.model_copy(update={"dtype": dtype})
    policy = build_policy(start(), section)
    for name, weight in policy.model.named_parameters():
        if "lora" not in name and weight.ndim > 1:
            weight.data *= 12  # random weights barely attend to anything; a trained model does
    policy.model.to(getattr(torch, dtype))
    settings = {"section": section, "workers": SingleWorker()}
    engine = engine_of(policy, section)
    assert check_packing(engine, make_groups(4), **settings) < noise
    policy.model.set_attn_implementation("sdpa")  # sees the other rows of the pack
    with pytest.raises(TrainingError, match="packed rows and plain rows of this model differ"):
        check_packing(engine, make_groups(4), **settings)


def test_the_comparison_with_plain_rows_takes_no_more_memory_than_training_where_activations_are_recomputed(start):
    computed = []
    for recomputed in (False, True):
        section = SECTION.model_copy(update={"adapter": "full", "activation_checkpointing": recomputed})
        policy, calls = build_policy(start(), section), []
        layer = next(module for name, module in policy.named_modules() if name.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        check_packing(engine_of(policy, section), make_groups(4), section=section, workers=SingleWorker())
        computed.append(len(calls))
    assert computed[1] == 2 * computed[0], "what is not computed again was kept"


def test_right_scores_with_wrong_gradients_are_refused_too(start, monkeypatch):
    backward = scoring._TargetLogps.backward
    monkeypatch.setattr(scoring._TargetLogps, "backward", staticmethod(lambda ctx, g: backward(ctx, 2 * g)))
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    with pytest.raises(TrainingError, match=r"differ by 0\.0000 nats .* and by 100\.\d\d% of their gradient"):
        check_packing(engine, make_groups(4), section=SECTION, workers=SingleWorker())


def test_a_policy_that_is_lent_to_generate_answers_with_its_adapters_and_trains_on_as_before(grown, start):
    objective = load_objective("dpo", {})
    groups = groups_for(objective, 2)
    policy, untouched = grown(SECTION, objective), grown(SECTION, objective)
    request = GenerationRequest(groups[0].prompt_ids, temperature=0.0, top_p=1.0, max_tokens=9)
    with generating(policy) as model:
        (found,) = generate(replace(start(), model=model), [request])
    plain = merged(grown(SECTION, objective)).model
    plain.set_attn_implementation("sdpa")
    (expected,) = generate(replace(start(), model=plain), [request])
    (base,) = generate(start(), [request])
    assert found.token_ids == expected.token_ids
    assert found.logps == pytest.approx(expected.logps, abs=1e-3)
    assert found.logps != pytest.approx(base.logps, abs=1e-3)
    common = {"section": SECTION, "objective": objective, "workers": SingleWorker()}
    (one, ours), (other, theirs) = (one_step(p, groups, **common) for p in (policy, untouched))
    assert one.loss == other.loss
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_policy_in_bf16_with_its_fp32_adapters_can_be_lent_too(start):
    section = SECTION.model_copy(update={"dtype": "bfloat16"})
    policy = build_policy(start(dtype="bfloat16"), section)
    request = GenerationRequest(make_groups(1)[0].prompt_ids, temperature=0.0, top_p=1.0, max_tokens=5)
    with generating(policy) as model, autocast(model.device, "bfloat16"):
        (found,) = generate(replace(start(), model=model), [request])
    (expected,) = generate(start(dtype="bfloat16"), [request])
    assert found.logps == pytest.approx(expected.logps, abs=0.1)


def test_a_target_module_that_fits_nothing_is_refused_though_others_fit(start):
    section = SECTION.model_copy(update={"lora": LoraSection(target_modules=("q_proj", "qkv_proj"))})
    with pytest.raises(ModelError, match=r"no layer `qkv_proj` .*\n\n.*q_proj"):
        build_policy(start(), section)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_embeddings_get_no_adapter_because_input_and_output_may_share_their_weights(start, name):
    section = SECTION.model_copy(update={"lora": LoraSection(target_modules=("q_proj", name))})
    with pytest.raises(ModelError, match=f"no layer `{name}` that can take an adapter"):
        build_policy(start(), section)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_the_merged_model_scores_like_the_policy(start, variant):
    groups = make_groups(4)
    lora = LoraSection(r=4, alpha=8, variant=variant)
    section = SECTION.model_copy(update={"learning_rate": 1e-2, "warmup_ratio": 0.0, "lora": lora})
    policy, reports = run(start, section, groups, steps=[groups] * 5)
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert any("lora_magnitude_vector" in name for name in trainable(policy)) == (variant == "dora")
    layer = next(m for m in policy.modules() if isinstance(m, LoraLayer))
    assert layer.scaling["default"] == (4.0 if variant == "rslora" else 2.0)
    with torch.no_grad():
        expected = policy(PackedBatch.pack(groups)).logps
        base = plain_logps(start().model, groups)
        alone = plain_logps(merged(policy).model, groups)
    assert torch.allclose(alone, expected, atol=1e-4)
    assert (expected - base).abs().max() > 0.1


def test_an_untrained_dora_adapter_merges_into_the_very_base(start):
    section = SECTION.model_copy(update={"dtype": "bfloat16", "lora": LoraSection(r=4, alpha=8, variant="dora")})
    plain = merged(build_policy(start(dtype="bfloat16"), section)).model
    base = start(dtype="bfloat16").model.state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in plain.state_dict().items())


@pytest.mark.parametrize("reference", ["adapter_off", "precomputed"])
def test_held_out_pairs_are_measured_with_the_weights_that_leave_the_run(start, reference):
    groups = make_groups(5)
    section = SECTION.model_copy(update={"learning_rate": 1e-2, "warmup_ratio": 0.0, "dtype": "bfloat16"})
    policy = build_policy(start(dtype="bfloat16"), section)
    with torch.no_grad():
        for name, parameter in trainable(policy).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 1.0)
        base = plain_logps(start(dtype="bfloat16").model, groups).double().tolist()
    scored = []
    for group in groups:
        count = len(group.responses)
        scored.append(replace(group, reference_logps=tuple(base[:count])))
        base = base[count:]
    section = section.model_copy(update={"reference": reference})
    settings = {"objective": OBJECTIVE, "section": section, "workers": SingleWorker()}
    settings["reference"] = reference_of(policy, section)
    before = measure(policy, scored, **settings)
    exported, measures = measure_exported(policy, scored, **settings)
    logps = plain_logps(exported.model, groups)
    margins, offset = {}, 0
    for group in scored:
        rewards = 0.1 * (logps[offset : offset + len(group.responses)].double() - torch.tensor(group.reference_logps))
        margins |= {p.pair_id: float(rewards[p.chosen] - rewards[p.rejected]) for p in group.pairs}
        offset += len(group.responses)
    # Against plain rows of the exported weights and of the base: what is left is noise, and less than rounding made.
    wrong, left = (
        sum(abs(row.margin - margins[row.pair_id]) for row in rows) for rows in (before.pairs, measures.pairs)
    )
    assert left < wrong / 2
    assert max(abs(m.margin) for m in measures.pairs) > 0.08


@pytest.mark.parametrize("reference", ["adapter_off", "precomputed"])
def test_two_ranks_measure_the_exported_weights_like_one(start, reference):
    groups = [replace(group, reference_logps=(-5.0,) * len(group.responses)) for group in make_groups(7)]
    section = SECTION.model_copy(update={"reference": reference})

    def measures(rank: int, size: int):
        workers = SingleWorker()
        workers.rank, workers.size = rank, size
        policy = build_policy(start(), section)
        with torch.no_grad():
            for name, parameter in trainable(policy).items():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        _, rows = measure_exported(
            policy,
            groups,
            objective=OBJECTIVE,
            reference=reference_of(policy, section),
            section=section,
            workers=workers,
        )
        return rows.pairs

    one, shares = measures(0, 1), [measures(rank, 2) for rank in (0, 1)]
    both = sorted([row for share in shares for row in share], key=lambda row: row.pair_id)
    assert all(shares)
    assert [row.pair_id for row in both] == [row.pair_id for row in one]
    assert [row.margin for row in both] == pytest.approx([row.margin for row in one], abs=1e-5)
    assert max(abs(row.margin) for row in one) > 0.05


def test_full_fine_tuning_leaves_its_fp32_weights(start):
    section = SECTION.model_copy(
        update={"adapter": "full", "dtype": "bfloat16", "reference": "precomputed", "learning_rate": 1e-6}
    )
    groups = [replace(group, reference_logps=(0.0,) * len(group.responses)) for group in make_groups(4)]
    policy, _ = run(start, section, groups, steps=[groups] * 3)
    exported, _ = measure_exported(
        policy, groups, objective=OBJECTIVE, reference=precomputed, section=section, workers=SingleWorker()
    )
    before, after = start().model.state_dict(), exported.model.state_dict()
    changed = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
    survive = [n for n in changed if not torch.equal(after[n].bfloat16().float(), after[n])]
    assert changed
    assert survive == changed


def test_held_out_pairs_are_all_measured(start):
    groups = make_groups(5)
    policy = build_policy(start(), SECTION)
    rows = measure(
        policy,
        groups,
        objective=OBJECTIVE,
        reference=reference_of(policy, SECTION),
        section=SECTION,
        workers=SingleWorker(),
    ).pairs
    assert sorted(r.pair_id for r in rows) == sorted(p.pair_id for g in groups for p in g.pairs)
    assert all(r.margin == 0 for r in rows)


def test_norms_and_biases_do_not_decay(start):
    policy = build_policy(start(), SECTION.model_copy(update={"adapter": "full", "reference": "precomputed"}))
    optimizer = make_optimizer(list(trainable(policy).values()), 0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in trainable(policy).items()}
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in trainable(policy).items():
        assert torch.allclose(parameter, before[name] * (0.95 if parameter.ndim > 1 else 1.0)), name


def test_the_learning_rate_rises_then_falls_to_zero():
    factor = partial(learning_rate_factor, total_steps=10, warmup_ratio=0.2, schedule="linear")
    assert [factor(i) for i in range(3)] == [0.5, 1.0, 1.0]
    assert factor(9) == pytest.approx(1 / 8)
    assert learning_rate_factor(6, total_steps=10, warmup_ratio=0.2, schedule="cosine") == pytest.approx(0.5)


def test_bf16_on_a_cpu_scores_and_learns_like_fp32(start):
    """The path of the recipes: bf16 base, fp32 adapters, autocast, attention in fp32."""
    groups = make_groups(8)
    weights = torch.linspace(-1, 1, sum(len(g.responses) for g in groups))
    found = []
    for dtype in ("float32", "bfloat16"):
        policy = build_policy(start(dtype=dtype), SECTION)
        with torch.no_grad():
            for name, parameter in trainable(policy).items():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        with autocast(torch.device("cpu"), dtype):
            logps = policy(PackedBatch.pack(groups)).logps
            plain = plain_logps(policy.model, groups).detach()
        (logps * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in trainable(policy).values()])
        found.append((logps.detach(), plain, gradient))
    (logps, plain, gradient), (half_logps, half_plain, half_gradient) = found
    assert torch.allclose(logps, plain, atol=1e-4)
    assert torch.allclose(half_logps, logps, rtol=5e-3)
    assert torch.allclose(half_plain, logps, rtol=5e-3)
    assert half_gradient.dtype == torch.float32
    assert torch.cosine_similarity(half_gradient, gradient, dim=0) > 0.995
