"""One step of the loop that every train worker runs equals one step of TRL 1.16: loss to 1e-5, gradient to 1e-4, fp32."""

import pytest
import torch

from app.config import TrainSection
from app.ledger import Ledger
from app.models import ensure_sft, load_model
from app.storage import Home
from app.training.engine import Replicated, SingleWorker
from app.training.judgements import divide, for_unit, with_strangers
from app.training.loop import optimise
from app.training.objectives import load_objective
from app.training.policy import build_policy, precomputed, trainable
from app.training.scoring import ScoringModel, with_reference_logps
from app.training.tokenization import Group, Label, Preference
from tests.bench.trl_steps import OBJECTIVES, trl_step


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model):
    """A home whose policy is some way off its reference, and groups of pairs and lone judgements."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("policy") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    home = Home.at(tmp_path_factory.mktemp("steps") / "home")
    ledger = Ledger.open(home.ledger_url)
    ids = [ensure_sft(home, ledger, str(path)).model_id for path in (folder, tiny_model)]
    ledger.close()
    return home, *ids


def groups_of(*, prompt_tokens: int | None) -> list[Group]:
    generator = torch.Generator().manual_seed(9)
    draw = lambda n: tuple(torch.randint(2, 258, (n,), generator=generator).tolist())  # noqa: E731
    groups = []
    for i in range(8):
        responses = tuple(draw(2 + (i + k) % 6) for k in range(2 + i % 2))
        pairs = tuple(Preference(0, k, 1.0, f"p{i}-{k}", "x") for k in range(1, len(responses)))
        groups.append(Group(f"g{i}", f"c{i}", "train", draw(prompt_tokens or 2 + i % 5), responses, pairs))
    for i in range(8, 12):
        label = Label(0, i % 3 == 0, 1.0, f"l{i}", "x")
        groups.append(Group(f"g{i}", f"c{i}", "train", draw(prompt_tokens or 3), (draw(4),), labels=(label,)))
    return groups


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_has_the_loss_and_the_gradient_of_trl(stage, tmp_path, name):
    home, policy_id, reference_id = stage
    objective_name, options = name.split()[0], OBJECTIVES[name]
    section = TrainSection(
        objective=objective_name, options=options, adapter="full", dtype="float32", max_grad_norm=1e9
    )
    objective = load_objective(section.objective, section.options)
    # TRL's ORPO counts the prompt's likelihood too, of which one token has none.
    groups, _ = for_unit(groups_of(prompt_tokens=1 if objective_name == "orpo" else None), objective.unit)
    if "kl" in objective.needs:
        groups = with_strangers(groups, max_length=64, seed=0)
    reference = ScoringModel(load_model(home, reference_id, dtype="float32").model)
    groups = with_reference_logps(groups, lambda batch: reference(batch).logps, token_budget=64)
    policy = build_policy(
        load_model(home, policy_id, dtype="float32"), section, agreement="agreement" in objective.needs
    )
    parameters = trainable(policy)
    still = torch.optim.SGD(parameters.values(), lr=0.0)
    (report,) = optimise(
        Replicated(policy, learning_rate=0.0, max_grad_norm=1e9, workers=SingleWorker(), optimizer=still),
        [groups],
        objective=objective,
        reference=precomputed,
        section=section,
        learning_rate=0.0,
        total_steps=1,
        workers=SingleWorker(),
    )
    divided = [divide(group) for group in groups]
    rival = load_model(home, policy_id, dtype="float32")
    loss, gradients = trl_step(
        objective_name,
        section.options,
        policy=rival.model.requires_grad_(requires_grad=True),
        reference=load_model(home, reference_id, dtype="float32").model,
        tokenizer=rival.tokenizer,
        groups=[own for own, _ in divided],
        strangers=[others for _, others in divided if others is not None],
        folder=tmp_path,
    )
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert {name.removeprefix("model.") for name in parameters} == {*gradients}
    ours = torch.cat([parameters[f"model.{name}"].grad.flatten() for name in sorted(gradients)])
    theirs = torch.cat([gradients[name].flatten() for name in sorted(gradients)])
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert float(theirs.norm()) > 1e-3, "a gradient of nothing proves nothing"
