"""Objectives: golden values, properties, and that no sign in them can change unnoticed."""

import ast
import inspect
import math
from dataclasses import replace
from functools import wraps
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.config import OBJECTIVE_OPTIONS, REFERENCE_FREE, TAKES_LONE_ANSWERS, parse_recipe
from app.errors import RecipeError
from app.training import certify, objectives
from app.training.objectives import Losses, Scored, couples_rows, dpo, load_objective

CHOSEN, REJECTED = torch.tensor([0, 1]), torch.tensor([2, 3])
COUNTS = torch.tensor([5, 1, 2, 4])
POLICY = torch.tensor([-2.8, -2.1, -4.4, -3.0], dtype=torch.float64)
REFERENCE = torch.tensor([-3.2, -2.2, -3.7, -2.8], dtype=torch.float64)
LOGPS = st.lists(st.floats(-500, 0), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))
UNPAIRED = ("kto", "apo_zero_unpaired")
PAIRED = [name for name in OBJECTIVE_OPTIONS if name not in ("sft", *UNPAIRED)]


def scored(policy=POLICY, reference=REFERENCE, **changes) -> Scored:
    given = {
        "policy_logps": policy,
        "reference_logps": reference,
        "token_counts": COUNTS,
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "responses": torch.arange(4),
        "desirable": torch.tensor([True, True, False, False]),
        "mean_tokens": 3.0,
        "agreement": torch.tensor([-0.1, -0.4, -0.3, -0.2], dtype=torch.float64),
        "kl": torch.tensor(0.075, dtype=torch.float64),
    }
    return Scored(**{**given, **changes})


def shipped(name: str, **options):
    if name in UNPAIRED:
        options = {"desirable_weight": 1.0, "undesirable_weight": 1.0, **options}
    section = parse_recipe({"name": "x", "train": {"objective": name, "options": options}}, place="x").train
    return load_objective(section.objective, section.options)


def test_every_golden_case_holds_and_every_objective_has_one():
    verdicts = certify.certify()
    assert [v.line() for v in verdicts if not v.passed] == []
    assert {v.objective for v in verdicts} == set(OBJECTIVE_OPTIONS)


def signs(name: str) -> int:
    tree = ast.parse(inspect.getsource(getattr(objectives, name)))
    return sum(map(is_sign, ast.walk(tree)))


def is_sign(node: ast.AST) -> bool:
    return (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    )


def with_sign_changed(name: str, number: int):
    tree = ast.parse(inspect.getsource(getattr(objectives, name)))
    node = [n for n in ast.walk(tree) if is_sign(n)][number]
    if isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    else:
        node.op = ast.Add() if isinstance(node.op, ast.Sub) else ast.Sub()
    scope = dict(vars(objectives))
    exec(compile(ast.fix_missing_locations(tree), f"{name} with sign {number} changed", "exec"), scope)
    return scope[name]


@pytest.mark.parametrize(
    ("name", "number"),
    [(n, i) for n in (*OBJECTIVE_OPTIONS, "_log_odds") for i in range(signs(n))],
)
def test_certify_notices_a_changed_sign(name, number, monkeypatch):
    monkeypatch.setattr(objectives, name, with_sign_changed(name, number))
    assert not all(verdict.passed for verdict in certify.certify())


@pytest.mark.parametrize("name", OBJECTIVE_OPTIONS)
def test_the_options_of_a_recipe_are_those_of_the_function_with_its_defaults(name):
    parameters = inspect.signature(getattr(objectives, name)).parameters.values()
    taken = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    found = OBJECTIVE_OPTIONS[name]().model_dump(by_alias=False)
    if "desirable_weight" in taken:  # no default: a recipe may leave them to the data
        taken |= {"desirable_weight": None, "undesirable_weight": None}
    assert found == taken
    objective = shipped(name)
    assert (name in REFERENCE_FREE) == (not objective.has_reference)
    assert (name in TAKES_LONE_ANSWERS) == (objective.unit != "pairs")


@pytest.mark.parametrize("name", ["dpo", "robust", "dpo_norm", "dpop"])
def test_equal_models_cost_ln_2_per_pair(name):
    losses = shipped(name)(scored(POLICY, POLICY)).losses
    assert torch.allclose(losses, torch.full((2,), math.log(2), dtype=torch.float64))


def test_dpo_pushes_equal_models_by_half_of_beta():
    policy = POLICY.clone().requires_grad_()
    shipped("dpo", beta=0.3)(scored(policy, POLICY)).losses.sum().backward()
    assert torch.allclose(policy.grad, torch.tensor([-0.15, -0.15, 0.15, 0.15], dtype=torch.float64))


@given(policy=LOGPS, reference=LOGPS, shift=st.floats(-50, 50))
def test_a_shift_of_all_policy_scores_changes_no_dpo_loss(policy, reference, shift):
    before = shipped("dpo")(scored(policy, reference)).losses
    after = shipped("dpo")(scored(policy + shift, reference)).losses
    assert torch.allclose(before, after, atol=1e-9)


@pytest.mark.parametrize("name", PAIRED)
@given(policy=LOGPS, reference=LOGPS)
def test_rewards_do_not_depend_on_which_answer_was_chosen(name, policy, reference):
    one = shipped(name)(scored(policy, reference))
    other = shipped(name)(scored(policy, reference, chosen=REJECTED, rejected=CHOSEN))
    assert torch.equal(one.rewards, other.rewards)


@pytest.mark.parametrize("name", OBJECTIVE_OPTIONS)
def test_a_likelier_chosen_and_a_less_likely_rejected_answer_never_cost_more(name):
    """At a start where nothing is saturated; APO-down wants both to fall, so only its margin counts."""
    policy = (REFERENCE - 0.01).clone().requires_grad_()
    shipped(name)(scored(policy, REFERENCE)).losses.sum().backward()
    chosen, rejected = policy.grad[CHOSEN], policy.grad[REJECTED]
    if name == "apo_down":
        assert (chosen < rejected).all()
    elif name == "sft":
        assert (policy.grad < 0).all()
    else:
        assert (chosen < 0).all()
        assert (rejected > 0).all()


@pytest.mark.parametrize("name", OBJECTIVE_OPTIONS)
def test_gradients_pass_a_finite_difference_check(name):
    options = {"dpo": {"beta": 0.7, "label_smoothing": 0.2, "sft_weight": 0.3, "length_weight": 0.05, "wpo": True}}
    objective = shipped(name, **options.get(name, {}))
    policy = POLICY.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: objective(scored(p)).losses, (policy,))


def test_with_a_length_weight_a_longer_chosen_answer_is_pushed_less_than_a_shorter_one():
    policy = POLICY.clone().requires_grad_()
    result = shipped("dpo", length_weight=0.1)(scored(policy, POLICY))
    result.losses.sum().backward()
    longer, shorter = policy.grad[CHOSEN].abs().tolist()
    assert longer == pytest.approx(0.1 / (1 + math.exp(0.3)))
    assert shorter == pytest.approx(0.1 / (1 + math.exp(-0.3)))
    assert result.rewards.tolist() == [0.0] * 4


def test_orpo_is_finite_for_an_answer_that_is_certain():
    policy = torch.tensor([0.0, -2.1, -4.4, 0.0], requires_grad=True)
    losses = shipped("orpo")(scored(policy, None)).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy.grad.isfinite().all()


def own(policy_logps, chosen, rejected, *, pull: float = 1.0) -> Losses:
    return Losses(pull * (policy_logps[rejected] - policy_logps[chosen]), policy_logps.detach())


def sorted_by_reward(policy_logps, reference_logps, chosen, rejected) -> Losses:
    """AOT, https://arxiv.org/abs/2406.05882: the margins of sorted rewards."""
    rewards = policy_logps - reference_logps
    margins = rewards[chosen].sort().values - rewards[rejected].sort().values
    return Losses(-torch.nn.functional.logsigmoid(margins), rewards.detach())


def centred(policy_logps, responses, desirable) -> Losses:
    return Losses(policy_logps[responses] - policy_logps.mean(), policy_logps.detach())


def strange(policy_logps, chosen, rejected, temperature) -> Losses:
    raise NotImplementedError


def needy(policy_logps, chosen, rejected, *, strength: float) -> Losses:
    raise NotImplementedError


def adrift(policy_logps, chosen, rejected, kl) -> Losses:
    raise NotImplementedError


def unwritten(policy_logps, chosen, rejected) -> Losses:
    raise NotImplementedError


def half(policy_logps, chosen) -> Losses:
    raise NotImplementedError


def test_a_function_of_ones_own_gets_what_it_asks_for():
    objective = load_objective(f"{__name__}:own", {"pull": 2.0})
    assert (objective.unit, objective.has_reference) == ("pairs", False)
    assert torch.allclose(objective(scored()).losses, torch.tensor([-3.2, -1.8], dtype=torch.float64))


@pytest.mark.parametrize("name", OBJECTIVE_OPTIONS)
def test_what_ships_gives_a_row_its_loss_whatever_is_beside_it(name):
    assert not couples_rows(shipped(name))


@pytest.mark.parametrize("function", [sorted_by_reward, centred])
def test_a_function_whose_loss_of_a_row_depends_on_other_rows_is_known_as_such(function):
    assert load_objective(f"{__name__}:{function.__name__}", {}).coupled
    assert not load_objective(f"{__name__}:own", {"pull": 2.0}).coupled


def balanced_in_batch(policy_logps, responses, desirable) -> Losses:
    share = desirable.float().mean()
    return Losses(torch.where(desirable, 1 - share, share) * -policy_logps[responses], policy_logps.detach())


@wraps(dpo)
def wrapped(**asked) -> Losses:
    found = dpo(**asked)
    return Losses(found.losses - found.losses.detach().mean(), found.rewards)


def told_apart_by_rewards(policy_logps, chosen, rejected) -> Losses:
    return Losses(policy_logps[rejected] - policy_logps[chosen], policy_logps.detach() - policy_logps.detach().mean())


@pytest.mark.parametrize("name", ["balanced_in_batch", "wrapped", "told_apart_by_rewards"])
def test_however_rows_are_coupled_it_is_known(name):
    objective = load_objective(f"{__name__}:{name}", {})
    assert objective.coupled
    assert objective.source


_calls = count()


def running(policy_logps, chosen, rejected) -> Losses:
    return Losses(policy_logps[rejected] - policy_logps[chosen] + next(_calls), policy_logps.detach())


def drawn(policy_logps, chosen, rejected) -> Losses:
    margins = policy_logps[chosen] - policy_logps[rejected]
    return Losses(-margins * torch.rand_like(margins), policy_logps.detach())


@pytest.mark.parametrize("function", [running, drawn])
def test_a_function_that_keeps_something_or_draws_at_random_is_refused(function):
    with pytest.raises(RecipeError, match="gives the same rows another loss each time it is asked"):
        load_objective(f"{__name__}:{function.__name__}", {})


def test_a_function_that_gives_no_loss_is_refused_with_its_options_before_anything_is_scored():
    with pytest.raises(RecipeError, match=r"gives made-up rows no loss, with the options pull='5e-2': TypeError: "):
        load_objective(f"{__name__}:own", {"pull": "5e-2"})
    with pytest.raises(RecipeError, match=r"with the options \(none\): NotImplementedError"):
        load_objective(f"{__name__}:unwritten", {})


def test_weights_that_are_to_be_balanced_are_tried_as_one():
    assert not couples_rows(load_objective("app.training.objectives:kto", {"beta": 0.1}))


def test_only_a_function_of_ones_own_has_a_source():
    assert shipped("dpo").source == ""
    assert load_objective(f"{__name__}:own", {"pull": 2.0}).source.startswith(
        "def own(policy_logps, chosen, rejected, *, pull: float=1.0)"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("app.nowhere:f", {}, "no objective `app.nowhere:f`: No module named 'app.nowhere'"),
        (f"{__name__}:nothing", {}, "has no attribute 'nothing'"),
        (f"{__name__}:own", {"pul": 1}, "has no option `pul`\n\nHint: did you mean `pull`? Its options are pull."),
        (f"{__name__}:own", {"beta": 1}, "has no option `beta`\n\nHint: its options are pull."),
        (f"{__name__}:strange", {}, "asks for `temperature`\n\nHint: it can have policy_logps"),
        ("app.training.objectives:robust", {"beta": 1, "smoothing": 2}, "has no option `smoothing`"),
        (f"{__name__}:needy", {}, "needs the option `strength`, which has no default"),
        (f"{__name__}:adrift", {}, "asks for `kl`, which is estimated for judged answers only"),
        ("this.is.not:there", {}, "no objective `this.is.not:there`"),
        (f"{__name__}:half", {}, "must ask for `chosen` and `rejected`, or for `responses`"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_with_the_reason(name, options, message):
    with pytest.raises(RecipeError) as refused:
        load_objective(name, options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (
            lambda made: Losses(made.losses.mean(), made.rewards),
            r"`losses` .* shape \[2\], found torch.float64 of shape \[\]",
        ),
        (
            lambda made: Losses(made.losses[:, None], made.rewards),
            r"`losses` .* shape \[2\], found torch.float64 of shape \[2, 1\]",
        ),
        (lambda made: Losses(made.losses.isfinite(), made.rewards), r"`losses` as floats .* found torch.bool"),
        (
            lambda made: Losses(made.losses, made.rewards[:2]),
            r"`rewards` .* shape \[4\], found torch.float64 of shape \[2\]",
        ),
        (lambda made: made.losses, r"`losses` .* found `None`"),
    ],
)
def test_what_would_be_broadcast_into_another_loss_is_refused(spoil, found):
    dpo = load_objective("dpo", {})
    own = replace(dpo, name="mine:own", function=lambda **given: spoil(dpo.function(**given)))
    with pytest.raises(RecipeError, match=f"objective `mine:own` must return {found}"):
        own(scored())
