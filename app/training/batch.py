"""The packed batch: `[prompt | response_1 | ... | response_K]` for each group, one row of tokens, no padding.

    tokens     P0 P1 P2 | A0 A1 A2 | B0 B1 || Q0 Q1 | C0 ...
    positions   0  1  2 |  3  4  5 |  3  4 ||  0  1 |  2 ...

Positions of each response restart at the prompt's length and no response sees another, so the scores are those of the
plain rows `P A`, `P B`, `Q C` while every prompt is computed once. The row that predicts the first token of a response
is the last row of the prompt. This module knows layout and planning, not models or losses.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from app.errors import DataError
from app.training.tokenization import Group

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one group lies in a packed row: its prompt starts at `start`, its responses follow."""

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch. T tokens, N responses, R tokens of responses, P pairs, L labels.

    Floating-point fields stay outside of the forward: sharding wrappers may cast them.
    """

    input_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64."""
    segments: tuple[Segment, ...]
    predictor_rows: Tensor
    """[R] int64: the token row whose output predicts each response token."""
    target_ids: Tensor
    """[R] int64: the response tokens."""
    response_of_target: Tensor
    """[R] int64: the response each target belongs to."""
    token_counts: Tensor
    """[N] int64: tokens of each response."""
    chosen: Tensor
    """[P] int64: index of each pair's chosen response."""
    rejected: Tensor
    """[P] int64: index of each pair's rejected response."""
    weights: Tensor
    """[P] float32."""
    responses: Tensor
    """[L] int64: index of each judged response."""
    desirable: Tensor
    """[L] bool: its label."""
    label_weights: Tensor
    """[L] float32."""
    reference_logps: Tensor | None
    """[N] float64, where the snapshot has them."""
    pair_ids: tuple[str, ...]
    clusters: tuple[str, ...]
    """Prompt cluster of each pair."""
    label_ids: tuple[str, ...]
    label_clusters: tuple[str, ...]
    """Prompt cluster of each label."""

    @property
    def num_responses(self) -> int:
        """N."""
        return len(self.token_counts)

    @classmethod
    def pack(cls, groups: Sequence[Group]) -> Self:
        """Lay groups out one after the other; raises DataError for a response without a token or an empty prompt."""
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        rows: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        counts: list[int] = []
        chosen: list[int] = []
        rejected: list[int] = []
        weights: list[float] = []
        responses: list[int] = []
        desirable: list[bool] = []
        label_weights: list[float] = []
        references: list[float] = []
        pair_ids: list[str] = []
        clusters: list[str] = []
        label_ids: list[str] = []
        label_clusters: list[str] = []
        for group in groups:
            if not group.prompt_ids or not all(group.responses):
                msg = f"group `{group.group_id}` has an empty prompt or response, which nothing can predict"
                raise DataError(msg)
            start, length, first = len(ids), len(group.prompt_ids), len(counts)
            ids += group.prompt_ids
            positions += range(length)
            for response in group.responses:
                offset = len(ids)
                rows += [start + length - 1, *range(offset, offset + len(response) - 1)]
                targets += response
                owners += [len(counts)] * len(response)
                counts.append(len(response))
                ids += response
                positions += range(length, length + len(response))
            segments.append(Segment(start, length, tuple(map(len, group.responses))))
            for pair in group.pairs:
                chosen.append(first + pair.chosen)
                rejected.append(first + pair.rejected)
                weights.append(pair.weight)
                pair_ids.append(pair.pair_id)
                clusters.append(group.cluster)
            for label in group.labels:
                responses.append(first + label.response)
                desirable.append(label.label)
                label_weights.append(label.weight)
                label_ids.append(label.pair_id)
                label_clusters.append(group.cluster)
            references += group.reference_logps or ()
        return cls(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            segments=tuple(segments),
            predictor_rows=torch.tensor(rows),
            target_ids=torch.tensor(targets),
            response_of_target=torch.tensor(owners),
            token_counts=torch.tensor(counts),
            chosen=torch.tensor(chosen, dtype=torch.int64),
            rejected=torch.tensor(rejected, dtype=torch.int64),
            weights=torch.tensor(weights),
            responses=torch.tensor(responses, dtype=torch.int64),
            desirable=torch.tensor(desirable, dtype=torch.bool),
            label_weights=torch.tensor(label_weights),
            reference_logps=torch.tensor(references, dtype=torch.float64) if len(references) == len(counts) else None,
            pair_ids=tuple(pair_ids),
            clusters=tuple(clusters),
            label_ids=tuple(label_ids),
            label_clusters=tuple(label_clusters),
        )

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def token_bins(groups: Sequence[Group], token_budget: int) -> list[list[Group]]:
    """Divide groups into bins of at most `token_budget` tokens, longest first; a longer group is a bin of its own."""
    bins: list[list[Group]] = []
    used: list[int] = []
    for group in sorted(groups, key=lambda g: (-g.num_tokens, g.group_id)):
        fitting = (i for i, tokens in enumerate(used) if tokens + group.num_tokens <= token_budget)
        index = next(fitting, None)
        if index is None:
            bins.append([group])
            used.append(group.num_tokens)
        else:
            bins[index].append(group)
            used[index] += group.num_tokens
    return bins


def micro_batches(groups: Sequence[Group], token_budget: int) -> list[PackedBatch]:
    """Pack groups into micro-batches of at most `token_budget` tokens."""
    return [PackedBatch.pack(members) for members in token_bins(groups, token_budget)]


def filler(groups: Sequence[Group]) -> PackedBatch:
    """Pack the smallest group, for a rank that has nothing left where the others make another forward.

    Nothing of it counts; a reference that another rank has scored is taken for 0.
    """
    batch = PackedBatch.pack([min(groups, key=lambda group: (group.num_tokens, group.group_id))])
    if batch.reference_logps is not None:
        return batch
    return replace(batch, reference_logps=torch.zeros(batch.num_responses, dtype=torch.float64))


def cut_steps(items: Iterable[Item], num_pairs: Callable[[Item], int], batch_pairs: int) -> Iterator[list[Item]]:
    """Cut a stream into optimizer steps of at least `batch_pairs` pairs (or labels); the last may have fewer.

    Items without pairs at the end belong to no step.
    An item (a group) is never divided, so a step may exceed `batch_pairs` by the pairs of its last item less one.
    """
    step: list[Item] = []
    pairs = 0
    for item in items:
        step.append(item)
        pairs += num_pairs(item)
        if pairs >= batch_pairs:
            yield step
            step, pairs = [], 0
    if pairs:
        yield step


def step_groups(groups: Iterable[Group], batch_pairs: int) -> Iterator[list[Group]]:
    """Cut a stream of groups into optimizer steps, see `cut_steps`."""
    return cut_steps(groups, lambda group: len(group.judgements), batch_pairs)


def rank_share(groups: Sequence[Group], *, rank: int, world_size: int) -> list[Group]:
    """Return the groups of one rank, balanced by tokens; the union over ranks is the step, whatever the world size."""
    loads = [0] * world_size
    share: list[Group] = []
    for group in sorted(groups, key=lambda g: (-g.num_tokens, g.group_id)):
        lightest = loads.index(min(loads))
        loads[lightest] += group.num_tokens
        if lightest == rank:
            share.append(group)
    return share
