"""DPO's loss by a function of one's own that needs memory for many tokens at once: more than any machine has, beyond a limit."""

import torch
from torch import Tensor

from app.training.objectives import Losses, dpo

_FITS = 60
"""Tokens of answers in a micro-batch."""
_NOBODY_HAS = 1 << 60
"""Bytes; PyTorch's allocator asks the system for them and is refused, as in earnest."""


def hungry(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    mean_tokens: float,
) -> Losses:
    """Score as `dpo` does where it fits."""
    if int(token_counts.sum()) > _FITS:
        torch.empty(_NOBODY_HAS, dtype=torch.uint8)
    return dpo(policy_logps, reference_logps, chosen, rejected, token_counts, mean_tokens)
