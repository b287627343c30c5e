"""`prefloop bench ablate`: take one technique away at a time from our own step and see what it was worth.

Each variant scores the same pairs by the same model and runs backward; reference log-probabilities are given, so nothing
else is in the time. A variant is the layout of a batch, so its numbers stay those of the full step:

    all            as the train job does it
    no packing     one group to a forward
    no sharing     every answer brings its own prompt
    all rows       the head on every token, prompts among them
    none           one group to a forward, a prompt before each answer, the head on every token
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.bench.arms import section_of, this_device
from app.bench.work import Work
from app.models import load_model
from app.storage import Home
from app.training.batch import PackedBatch, token_bins
from app.training.policy import autocast, build_policy, trainable
from app.training.scoring import ScoringModel
from app.training.tokenization import Group

Layout = Callable[[Sequence[Group], int], list[PackedBatch]]


@dataclass(frozen=True)
class Ablation:
    """One variant: seconds of the whole work in each round."""

    name: str
    seconds: tuple[float, ...]
    slower: float
    """Its median over that of the full step."""
    tokens: int
    """Through the backbone."""
    head_rows: int

    def line(self) -> str:
        """Say it in one line."""
        return f"{self.name:<12} {self.slower:5.2f}x as long  {statistics.median(self.seconds):7.2f} s  [{min(self.seconds):.2f}, {max(self.seconds):.2f}]  {self.tokens} tokens, {self.head_rows} rows of the head"


def ablate(work: Work, *, rounds: int, say: Callable[[str], None]) -> list[Ablation]:
    """Time forward and backward of the work in every layout, one after the other in each round."""
    torch.set_num_threads(work.threads)
    section = section_of(work)
    dtype = "float32" if work.adapter == "full" else work.dtype
    device = this_device()
    policy = build_policy(load_model(Home.at(work.home_uri), work.model_id, dtype=dtype, device=device), section)
    policy.to(device)
    layouts = {
        name: [batch.to(device) for batch in make(work.groups, work.micro_batch_tokens)] for name, make in LAYOUTS
    }
    warm = next(iter(layouts.values()))[:1]
    _run(policy, warm, section.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for number in range(rounds):
        for name, batches in layouts.items():
            began = time.perf_counter()
            _run(policy, batches, section.dtype)
            seconds[name].append(time.perf_counter() - began)
            say(f"round {number + 1} of {rounds}: {name}: {seconds[name][-1]:.1f} s")
    full = statistics.median(seconds["all"])
    return [
        Ablation(
            name,
            tuple(seconds[name]),
            statistics.median(seconds[name]) / full,
            sum(batch.input_ids.numel() for batch in batches),
            sum(len(batch.target_ids) for batch in batches),
        )
        for name, batches in layouts.items()
    ]


def _run(policy: ScoringModel, batches: Sequence[PackedBatch], dtype: str) -> None:
    policy.train()
    for parameter in trainable(policy).values():
        parameter.grad = None
    for batch in batches:
        with autocast(batch.input_ids.device, dtype):
            logps: Tensor = policy(batch).logps
        margins = logps[batch.chosen] - logps[batch.rejected]
        (-torch.nn.functional.logsigmoid(0.1 * margins)).sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _packed(groups: Sequence[Group], budget: int) -> list[PackedBatch]:
    return [PackedBatch.pack(members) for members in token_bins(groups, budget)]


def _one_by_one(groups: Sequence[Group], budget: int) -> list[PackedBatch]:  # noqa: ARG001
    return [PackedBatch.pack([group]) for group in groups]


def unshared(members: Sequence[Group]) -> PackedBatch:
    """Lay groups out with the prompt before each answer; indices of answers are those of the shared layout."""
    shared = PackedBatch.pack(members)
    alone = PackedBatch.pack(
        [replace(g, responses=(r,), pairs=(), labels=(), reference_logps=None) for g in members for r in g.responses]
    )
    return replace(alone, chosen=shared.chosen, rejected=shared.rejected, weights=shared.weights)


def _unshared(groups: Sequence[Group], budget: int) -> list[PackedBatch]:
    # What fits together is decided by the tokens that there are without sharing.
    doubled = {g.group_id: replace(g, prompt_ids=g.prompt_ids * len(g.responses)) for g in groups}
    by_id = {g.group_id: g for g in groups}
    bins = token_bins(list(doubled.values()), budget)
    return [unshared([by_id[g.group_id] for g in members]) for members in bins]


def on_all_rows(batch: PackedBatch) -> PackedBatch:
    """Let the head take every token: those of prompts are scored as one more answer, which no pair names."""
    total = batch.input_ids.numel()
    known = torch.zeros(total, dtype=torch.bool)
    known[batch.predictor_rows] = True
    others = torch.nonzero(~known).flatten()
    return replace(
        batch,
        predictor_rows=torch.cat([batch.predictor_rows, others]),
        target_ids=torch.cat([batch.target_ids, batch.input_ids[0, others]]),
        response_of_target=torch.cat([batch.response_of_target, torch.full_like(others, batch.num_responses)]),
        token_counts=torch.cat([batch.token_counts, torch.tensor([max(1, len(others))])]),
    )


def _all_rows(groups: Sequence[Group], budget: int) -> list[PackedBatch]:
    return [on_all_rows(batch) for batch in _packed(groups, budget)]


def _nothing(groups: Sequence[Group], budget: int) -> list[PackedBatch]:  # noqa: ARG001
    return [on_all_rows(unshared([group])) for group in groups]


LAYOUTS: Sequence[tuple[str, Layout]] = (
    ("all", _packed),
    ("no packing", _one_by_one),
    ("no sharing", _unshared),
    ("all rows", _all_rows),
    ("none", _nothing),
)
