"""DPO's loss by a function of one's own that kills its worker, once in a run, at a named point of the train job.

What is looked up where the job calls it is replaced in that one process; the process is killed by the system, so nothing
unwinds and nothing is flushed.
"""

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from torch import Tensor

from app.training import checkpoints
from app.training.objectives import Losses, dpo
from ray_jobs import worker

POINTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "before a report": (ray.train, "report", 6, True, 1),
    "after a report": (ray.train, "report", 6, False, 0),
    "before a checkpoint is begun": (worker.Checkpoints, "save", 2, True, 1),
    "while a checkpoint is written": (checkpoints, "file_digest", 2, True, 0),
    "after a checkpoint was begun": (worker.Checkpoints, "save", 2, False, 1),
    "before a checkpoint is signed": (worker.Checkpoints, "complete", 2, True, 0),
    "before the model is written": (worker, "_export", 1, True, 0),
    "between the model and what it measured": (worker, "write_atomically", 1, True, 0),
    "after what it measured": (worker, "write_atomically", 1, False, 0),
}
"""Where the function is looked up, its name, at which call, before or after it, and on which rank."""
_armed: list[str] = []


def deadly(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    mean_tokens: float,
    *,
    point: str,
    marker: str,
) -> Losses:
    """Score as `dpo` does; the first call of a step arms the process."""
    if policy_logps.requires_grad and not _armed:
        _armed.append(point)
        *call, rank = POINTS[point]
        if dist.get_rank() == rank:
            arm(*call, Path(marker))
    return dpo(policy_logps, reference_logps, chosen, rejected, token_counts, mean_tokens)


def arm(place: Any, name: str, number: int, before: bool, marker: Path) -> None:
    """Have this process killed before or after a call of a function, unless the marker says that it was before."""
    counter, call = itertools.count(1), getattr(place, name)

    def kill() -> None:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return  # it was killed here before
        os.kill(os.getpid(), signal.SIGKILL)

    def called(*arguments: Any, **options: Any) -> Any:
        hit = next(counter) == number
        if hit and before:
            kill()
        found = call(*arguments, **options)
        if hit and not before:
            kill()
        return found

    setattr(place, name, called)


def stuck(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    mean_tokens: float,
    *,
    marker: str,
) -> Losses:
    """Score as `dpo` does; the second worker goes to sleep for good in the fifth of its steps, once in a run."""
    if policy_logps.requires_grad and dist.get_rank() == 1:
        _armed.append("")
        if len(_armed) == 5 and not Path(marker).exists():
            Path(marker).touch()
            time.sleep(3600)
    return dpo(policy_logps, reference_logps, chosen, rejected, token_counts, mean_tokens)
