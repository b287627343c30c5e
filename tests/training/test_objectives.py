"""DPO against hand-derived numbers and properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.training.objectives import dpo

CHOSEN, REJECTED = torch.tensor([0, 1]), torch.tensor([2, 3])
TOKENS = 3.0
COUNTS = torch.tensor([5, 1, 2, 4])
POLICY = torch.tensor([-2.8, -2.1, -4.4, -3.0], dtype=torch.float64)
REFERENCE = torch.tensor([-3.2, -2.2, -3.7, -2.8], dtype=torch.float64)
LOGPS = st.lists(st.floats(-500, 0), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))


def mean_loss(**options) -> float:
    return dpo(POLICY, REFERENCE, CHOSEN, REJECTED, COUNTS, TOKENS, **options).losses.mean().item()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 0.1}, 0.6589592975),
        ({"beta": 0.5}, 0.5382247646),
        ({"beta": 0.1, "label_smoothing": 0.1}, 0.6659592974819357),
        # 0.2 times the chosen answers' 4.9 nats over their 6 tokens.
        ({"beta": 0.1, "sft_weight": 0.2}, 0.8222926308),
        # 0.05 for 3 tokens more and for 3 tokens less: margins 0.11 + 0.15 and 0.03 - 0.15.
        ({"beta": 0.1, "length_weight": 0.05}, (math.log1p(math.exp(-0.26)) + math.log1p(math.exp(0.12))) / 2),
    ],
)
def test_losses_are_those_of_trl_1_16_and_of_the_closed_form(options, expected):
    """Margins are (0.4 + 0.7) and (0.1 + 0.2) nats; -log sigmoid of beta times them, averaged."""
    assert mean_loss(**options) == pytest.approx(expected, rel=1e-9)


def test_equal_models_cost_ln_2_per_pair_and_push_by_half_of_beta():
    policy = POLICY.clone().requires_grad_()
    result = dpo(policy, POLICY, CHOSEN, REJECTED, COUNTS, TOKENS, beta=0.3)
    result.losses.sum().backward()
    assert torch.allclose(result.losses, torch.full((2,), math.log(2), dtype=torch.float64))
    assert torch.allclose(policy.grad, torch.tensor([-0.15, -0.15, 0.15, 0.15], dtype=torch.float64))


@given(policy=LOGPS, reference=LOGPS, shift=st.floats(-50, 50))
def test_a_shift_of_all_policy_scores_changes_nothing(policy, reference, shift):
    before = dpo(policy, reference, CHOSEN, REJECTED, COUNTS, TOKENS, beta=0.1).losses
    after = dpo(policy + shift, reference, CHOSEN, REJECTED, COUNTS, TOKENS, beta=0.1).losses
    assert torch.allclose(before, after, atol=1e-9)


@given(policy=LOGPS, reference=LOGPS)
def test_swapping_a_pair_negates_its_margin(policy, reference):
    one = dpo(policy, reference, CHOSEN, REJECTED, COUNTS, TOKENS, beta=0.1)
    other = dpo(policy, reference, REJECTED, CHOSEN, COUNTS, TOKENS, beta=0.1)
    assert torch.equal(one.chosen_rewards - one.rejected_rewards, -(other.chosen_rewards - other.rejected_rewards))


def test_the_gradient_passes_a_finite_difference_check():
    policy = POLICY.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: dpo(p, REFERENCE, CHOSEN, REJECTED, COUNTS, TOKENS, beta=0.7, label_smoothing=0.2).losses, (policy,)
    )


def test_with_a_length_weight_a_longer_chosen_answer_is_pushed_less_than_a_shorter_one():
    policy = POLICY.clone().requires_grad_()
    result = dpo(policy, POLICY, CHOSEN, REJECTED, COUNTS, TOKENS, beta=0.1, length_weight=0.1)
    result.losses.sum().backward()
    longer, shorter = policy.grad[CHOSEN].abs().tolist()
    assert longer == pytest.approx(0.1 / (1 + math.exp(0.3)))
    assert shorter == pytest.approx(0.1 / (1 + math.exp(-0.3)))
    assert result.chosen_rewards.tolist() == [0.0, 0.0]
