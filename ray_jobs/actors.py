"""Actors of Ray Data that hold a model: how they are run, and what is said when they die.

What they compute is theirs (`ray_jobs.prepare`, `ray_jobs.answers`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.data
from ray.exceptions import RayActorError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from app.errors import OutOfMemory, ServiceError

_NO_PROGRESS_S = 6 * 3600.0


def mortal() -> dict[str, Any]:
    """Return how often Ray Data starts an actor again: by default for ever, whatever kills it, as a model that does not fit."""
    return {"max_restarts": 2, "max_task_retries": 2}


def settle_ray_data(*, in_order: bool) -> None:
    """Settle how Ray Data runs actors that hold models; `in_order`: their rows come as they were given."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = in_order
    # By default an execution ends where no block moved for half an hour, which an actor with a block of work on slow
    # processors, or one that waits for CPUs of other jobs, takes too.
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    # It warns that no memory was reserved for the model, after a minute; the number of workers bounds what they take.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    # Goes in Ray 2.64, and so does the only other way to say how often an actor starts again; 2.60 has no third one.
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated", category=RayDeprecationWarning)


@contextmanager
def told_of_dead_actors(which: str, actors: int) -> Iterator[None]:
    """Raise ServiceError, with the reason that Ray knows, where one of so many actors of Ray Data died for good.

    And OutOfMemory where one says that: Ray Data passes on the text of an error alone.
    """
    try:
        yield
    except RayTaskError as error:
        if f"{OutOfMemory.__module__}.{OutOfMemory.__name__}: " not in str(error):
            raise
        msg = f"the memory of an actor {which} did not hold a quarter of train.micro_batch_tokens\n\nHint: lower prepare.max_length, or take fewer workers.workers where {actors} of them share a machine."
        raise OutOfMemory(msg) from None
    except RayActorError as error:
        told = str(error).strip().splitlines()
        msg = f"an actor {which} died more than twice: {told[0] if told else 'no reason is known'}\n\nHint: was there memory for {actors} of them? Lower workers.workers, or raise workers.cpus_per_worker; the same command goes on."
        raise ServiceError(msg) from None
