"""A small run with a checkpoint at each step, and ways to be killed in it: what a process of its own does."""

import hashlib
import itertools
import os
import signal
import threading
from collections.abc import Callable

import torch

from app.models import LoadedModel
from app.storage import Home
from app.training.batch import step_groups
from app.training.checkpoints import Checkpoints, RunIdentity
from app.training.engine import SingleWorker
from app.training.loop import optimise
from app.training.policy import build_policy, trainable
from tests.training.tiny_runs import OBJECTIVE, SECTION, engine_of, make_groups, reference_of

IDENTITY = RunIdentity("run", "snapshot", "digest", "recipe", "reference")
STEPS = list(step_groups(make_groups(10), 4))


def train(start, home: Home, *, until: int = len(STEPS)) -> tuple[str, list[int]]:
    """Go on from the newest checkpoint, one checkpoint a step; return the digest of all weights and the steps done."""
    policy = build_policy(start(), SECTION)
    engine, workers = engine_of(policy, SECTION), SingleWorker()
    kept = Checkpoints(home, IDENTITY, workers)
    done = kept.load_newest(engine).step
    numbers = []
    for report in optimise(
        engine,
        STEPS[done:until],
        objective=OBJECTIVE,
        reference=reference_of(policy, SECTION),
        section=SECTION,
        learning_rate=SECTION.learning_rate,
        total_steps=len(STEPS),
        done_steps=done,
        workers=workers,
    ):
        numbers.append(report.step)
        kept.save(engine, step=report.step, reports=[{"step": report.step}])
    kept.finish()
    digest = hashlib.sha256()
    for name, parameter in trainable(policy).items():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
        for value in engine.optimizer.state[parameter].values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest(), numbers


CALLS = ("fsync", "replace", "unlink", "rmdir")


def die_at(number: int, *, before: bool) -> None:
    """Let this process be killed around the number-th call that makes something of a checkpoint lasting."""
    counter = itertools.count(1)

    def deadly(call):
        def called(*arguments, **options):
            hit = next(counter) == number
            if hit and before:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **options)
            finally:
                if hit:
                    os.kill(os.getpid(), signal.SIGKILL)

        return called

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def killed_around(threads: int, start: Callable[[], LoadedModel], home: Home, number: int, before: bool) -> None:
    """Train until the number-th call that makes something of a checkpoint lasting."""
    torch.set_num_threads(threads)
    die_at(number, before=before)
    train(start, home)


def killed_after(threads: int, start: Callable[[], LoadedModel], home: Home, seconds: float) -> None:
    """Train for so many seconds."""
    torch.set_num_threads(threads)
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    train(start, home)
