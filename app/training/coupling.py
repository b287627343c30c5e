"""Objectives whose loss of a row depends on other rows, exact over the whole step.

    every micro-batch of every rank, scored without gradients -> one step of rows -> losses, differentiated by the
    log-probabilities -> for each micro-batch its losses and these derivatives

The caller scores again with gradients and multiplies: sum of dL/dS_i times S_i has the gradient of L. So packing, token
budget and the number of workers change nothing, for a second forward; what is random in a forward must be the same in
both. Judgements stand in the order of their ids, the liked one of two first.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.training.batch import PackedBatch
from app.training.engine import Workers
from app.training.objectives import Losses, Objective, Scored


@dataclass(frozen=True, slots=True)
class Share:
    """What a whole step makes of one micro-batch."""

    scored: Scored
    """Without gradients."""
    result: Losses
    slopes: Tensor
    """[N]: derivative of the step's loss by the log-probability of each response."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One scored micro-batch, on the CPU, as ranks send it to one another."""

    rank: int
    scored: Scored
    order: tuple[tuple[str, bool], ...]
    """By which its judgements stand among all others: id, and whether the answer is disliked."""
    weights: Tensor


def couple(
    score: Callable[[PackedBatch], Scored],
    batches: Sequence[PackedBatch],
    *,
    objective: Objective,
    weight: float,
    workers: Workers,
    device: torch.device,
    idle: Sequence[PackedBatch] = (),
) -> list[Share]:
    """Return the shares of this rank's micro-batches in the loss of the whole step; every rank calls it.

    Args:
        score: scores a batch; it is asked without gradients.
        batches: this rank's micro-batches, on the CPU.
        objective: asked once, for all rows of all ranks.
        weight: of all judgements of the step.
        workers: the ranks.
        device: where batches are scored.
        idle: scored, too, and counted nowhere: forwards that the others make.
    """
    with torch.no_grad():
        scored = [score(batch.to(device)) for batch in (*batches, *idle)][: len(batches)]
    in_pairs, on_cpu = objective.unit == "pairs", torch.device("cpu")
    own = [
        _Part(workers.rank, part.to(on_cpu), tuple((name, False) for name in batch.pair_ids), batch.weights)
        if in_pairs
        else _Part(
            workers.rank,
            part.to(on_cpu),
            tuple(zip(batch.label_ids, (~batch.desirable).tolist(), strict=True)),
            batch.label_weights,
        )
        for part, batch in zip(scored, batches, strict=True)
    ]
    parts = workers.gather(own)
    if not own:
        return []
    firsts = [0, *itertools.accumulate(len(part.scored.policy_logps) for part in parts)]
    keys = [key for part in parts for key in part.order]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    whole = _whole([part.scored for part in parts], firsts, order, in_pairs=in_pairs)
    with torch.enable_grad():
        logps = whole.policy_logps.requires_grad_()
        result = objective(whole)
        weights = torch.cat([part.weights for part in parts])[order]
        (slopes,) = torch.autograd.grad((result.losses * weights).sum() / weight, logps)
    # Back from the order of ids to that of the parts.
    losses = torch.empty_like(result.losses.detach()).index_copy_(0, order, result.losses.detach())
    judged = [0, *itertools.accumulate(len(part.order) for part in parts)]
    return [
        Share(
            part.scored.to(device),
            Losses(losses[begin:end].to(device), result.rewards[first:last].to(device)),
            slopes[first:last].to(device),
        )
        for part, (begin, end), (first, last) in zip(
            parts, itertools.pairwise(judged), itertools.pairwise(firsts), strict=True
        )
        if part.rank == workers.rank
    ]


def _whole(parts: Sequence[Scored], firsts: Sequence[int], order: Tensor, *, in_pairs: bool) -> Scored:
    """Put scored micro-batches together, with judgements in a given order."""

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        # All of them have it, or none.
        return torch.cat(known) if (known := [tensor for tensor in tensors if tensor is not None]) else None

    def indices(name: str, *, judged: bool) -> Tensor:
        found = torch.cat([getattr(part, name) + first for part, first in zip(parts, firsts, strict=False)])
        return found[order] if judged else found

    desirable = torch.cat([part.desirable for part in parts])
    return Scored(
        policy_logps=torch.cat([part.policy_logps for part in parts]),
        token_counts=torch.cat([part.token_counts for part in parts]),
        chosen=indices("chosen", judged=in_pairs),
        rejected=indices("rejected", judged=in_pairs),
        responses=indices("responses", judged=not in_pairs),
        desirable=desirable if in_pairs else desirable[order],
        mean_tokens=parts[0].mean_tokens,
        reference_logps=joined([part.reference_logps for part in parts]),
        agreement=joined([part.agreement for part in parts]),
        kl=parts[0].kl,
    )
