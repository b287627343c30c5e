"""A train function that reads the stream as `ray_jobs.worker` does and computes nothing; rank 0 notes what it saw."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from app.training.engine import SingleWorker
from ray_jobs.worker import DistributedWorkers, SharedSteps, TrainTask

_EVERY = 20
"""Steps between two looks at memory."""
LONG_STEP_S = 8.0
_LONG_STEP = 50


def step_line(names: Sequence[str]) -> bytes:
    """What goes into the digest of a step."""
    return (",".join(names) + "\n").encode()


def read_stream(settings: dict[str, Any]) -> None:
    """Walk all steps; write seconds of waiting and resident memory of every `_EVERY`th, rows and their digest."""
    task: TrainTask = settings["task"]
    several = dist.is_initialized() and dist.get_world_size() > 1
    workers = DistributedWorkers(torch.device("cpu"), sharded=False) if several else SingleWorker()
    rows, waits, memory, digest = 0, [], [], hashlib.sha256()
    process, steps = psutil.Process(), iter(SharedSteps(task, workers, skip=0))
    for number in range(task.total_steps):
        asked = time.perf_counter()
        groups = next(steps)
        waits.append(time.perf_counter() - asked)
        if number == _LONG_STEP:
            time.sleep(LONG_STEP_S)
        rows += len(groups)
        digest.update(step_line([group.group_id for group in groups]))
        if number % _EVERY == 0:
            memory.append(process.memory_info().rss)
    found = {"rows": rows, "waits": waits, "memory": memory, "digest": digest.hexdigest()}
    Path(settings["into"], f"rank-{workers.rank}.json").write_text(json.dumps(found))
