"""Small runs on the tiny model: what the tests of the loop and of checkpoints share."""

import threading

import torch

from app.config import LoraSection, TrainSection
from app.training.batch import step_groups
from app.training.engine import Replicated, SingleWorker
from app.training.loop import optimise
from app.training.objectives import load_objective
from app.training.policy import adapter_off, build_policy, precomputed
from app.training.tokenization import Group, Preference

SECTION = TrainSection(
    dtype="float32",
    learning_rate=1e-3,
    batch_pairs=4,
    micro_batch_tokens=64,
    reference="adapter_off",
    lora=LoraSection(r=4, alpha=8),
)
OBJECTIVE = load_objective("dpo", {"beta": 0.1})


def make_groups(count: int) -> list[Group]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: tuple(torch.randint(2, 258, (n,), generator=generator).tolist())  # noqa: E731
    groups = []
    for i in range(count):
        responses = tuple(draw(3 + (i + k) % 5) + (1,) for k in range(2 + i % 2))
        pairs = tuple(Preference(0, k, 0.5 + 0.25 * k, f"{i}-{k}", "import") for k in range(1, len(responses)))
        groups.append(Group(f"g{i}", f"c{i}", "train", draw(4 + i % 7), responses, pairs))
    return groups


def engine_of(policy, section, *, optimizer=None, workers=None):
    return Replicated(
        policy,
        learning_rate=section.learning_rate,
        max_grad_norm=section.max_grad_norm,
        workers=workers or SingleWorker(),
        optimizer=optimizer,
    )


def run(start, section, groups, *, optimizer=None, steps=None, objective=OBJECTIVE):
    policy = build_policy(start(), section)
    reports = list(
        optimise(
            engine_of(policy, section, optimizer=optimizer(policy) if optimizer else None),
            steps or list(step_groups(groups, section.batch_pairs)),
            objective=objective,
            reference=reference_of(policy, section),
            section=section,
            learning_rate=section.learning_rate,
            total_steps=20,
            workers=SingleWorker(),
        )
    )
    return policy, reports


def reference_of(policy, section):
    return precomputed if section.reference == "precomputed" else adapter_off(policy, section.dtype)


class Threads:
    """Ranks that are threads: what `Workers` promises, without a cluster."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list = [None] * size

    def rank(self, number: int) -> "Rank":
        return Rank(self, number)

    def exchange(self, rank: int, value):
        self.slots[rank] = value
        self.barrier.wait()
        every = list(self.slots)
        self.barrier.wait()
        return every


class Rank:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = threads, rank, threads.size

    def sum_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self.threads.exchange(self.rank, tensor.clone())))

    def gather(self, rows: list) -> list:
        return [row for part in self.threads.exchange(self.rank, rows) for row in part]

    def rounds(self, batches):
        return batches
