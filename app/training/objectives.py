"""Objectives: pure functions from log-probabilities to losses. Torch and nothing else.

Every objective returns one loss for each pair; the caller weighs them and divides by the global sum of weights, so
that accumulation, packing and the number of workers do not change the gradient.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class PairLosses:
    """Per pair [P]: the loss and the implicit rewards beta * (policy logp - reference logp), detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    mean_chosen_tokens: float,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    length_weight: float = 0.0,
) -> PairLosses:
    """Score pairs by Direct Preference Optimization, equation 7 of https://arxiv.org/abs/2305.18290.

    With `label_smoothing` e it is conservative DPO (https://ericmitchell.ai/cdpo.pdf, equation 3), which assumes that
    a share e of the labels is flipped. With `sft_weight` a it is RPO (https://arxiv.org/abs/2404.19733, equation 1, and
    https://arxiv.org/abs/2405.16436): a times the negative log-likelihood of the chosen responses is added, averaged
    over all their tokens as TRL's `loss_type=["sigmoid", "sft"]` does. With `length_weight` a it is R-DPO
    (https://arxiv.org/abs/2403.19159): a for each token that the chosen response is longer is added to the
    margin, so a pair that length alone explains teaches little, and one against its length teaches more. The rewards
    do not hold it.

    Args:
        policy_logps: [N] summed log-probabilities of the responses under the policy.
        reference_logps: [N] the same under the reference.
        chosen: [P] index of each pair's chosen response.
        rejected: [P] index of each pair's rejected response.
        token_counts: [N] tokens of the responses.
        mean_chosen_tokens: mean length of the chosen responses of the whole step, weighted like its pairs.
        beta: strength of the pull to the reference.
        label_smoothing: e, in [0, 0.5).
        sft_weight: a, at least 0.
        length_weight: a, at least 0, in nats for a token.
    """
    rewards = beta * (policy_logps - reference_logps)
    margins = rewards[chosen] - rewards[rejected]
    if length_weight:
        margins = margins + length_weight * (token_counts[chosen] - token_counts[rejected]).to(margins.dtype)
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    if sft_weight:
        losses = losses - sft_weight * policy_logps[chosen] / mean_chosen_tokens
    return PairLosses(losses, rewards[chosen].detach(), rewards[rejected].detach())
