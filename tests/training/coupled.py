"""Objectives of one's own whose loss of a row depends on the other rows of the step."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from app.training.objectives import Losses


def aot(
    policy_logps: Tensor, reference_logps: Tensor, chosen: Tensor, rejected: Tensor, *, beta: float = 0.3
) -> Losses:
    """Alignment by optimal transport (https://arxiv.org/abs/2406.05882), TRL's `aot`: margins of all pairs, sorted."""
    margins = policy_logps[chosen] - policy_logps[rejected]
    order = margins.argsort()
    before = (reference_logps[chosen] - reference_logps[rejected]).sort().values.to(margins.dtype)
    losses = torch.empty_like(margins)
    losses[order] = -logsigmoid(beta * (margins[order] - before))
    return Losses(losses, (beta * (policy_logps - reference_logps)).detach())


def against_the_mean(policy_logps: Tensor, responses: Tensor) -> Losses:
    """Each good answer against the mean of them."""
    scores = policy_logps[responses]
    return Losses((scores - scores.mean()).square(), policy_logps.detach())


def against_the_liked(policy_logps: Tensor, responses: Tensor, desirable: Tensor) -> Losses:
    """Each judged answer against the mean of the liked ones, in the order in which they are given."""
    scores = policy_logps[responses]
    gaps = scores - scores[desirable].mean()
    rising = torch.arange(1.0, len(gaps) + 1, dtype=gaps.dtype)
    return Losses(rising * torch.where(desirable, -scores, gaps.square()), policy_logps.detach())
