"""Imitation with a tether: an objective of one's own that has a reference and no judged answers but good ones."""

from torch import Tensor

from app.training.objectives import Losses


def tethered(
    policy_logps: Tensor, reference_logps: Tensor, responses: Tensor, mean_tokens: float, *, pull: float
) -> Losses:
    """Score the negative log-likelihood, and the square of how far it went from the reference."""
    moved = policy_logps - reference_logps
    losses = (-policy_logps[responses] + pull * moved[responses] ** 2) / mean_tokens
    return Losses(losses, moved.detach())
