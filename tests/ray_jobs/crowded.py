"""DPO's loss by a function of one's own under which a worker's disk is full from some step on, once in a run."""

import itertools
import tempfile
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from app.training.objectives import Losses, dpo

_CALLS = 12
"""Micro-batches before the disk is full: some steps, and a checkpoint."""
_calls = itertools.count(1)


def crowded(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    mean_tokens: float,
    *,
    disk: str,
    marker: str,
) -> Losses:
    """Score as `dpo` does; the first rank's temporary files go to the small `disk` later on, unless the marker is there."""
    if policy_logps.requires_grad and next(_calls) == _CALLS and dist.get_rank() == 0 and not Path(marker).exists():
        Path(marker).touch()
        tempfile.tempdir = disk
    return dpo(policy_logps, reference_logps, chosen, rejected, token_counts, mean_tokens)
