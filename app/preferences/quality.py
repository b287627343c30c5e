"""Which candidates train: each once, none against another, not too many of one prompt, on one side of the split.

    resolve        exact duplicates, contradictions (by trust in the source), cap for each prompt
    assign_splits  near-duplicate prompts share a cluster, and the hash of the cluster decides the side

Results do not depend on the order of the candidates. This module does not know where they come from.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from app.near_duplicates import cluster_texts
from app.preferences.candidates import Candidate, Rejection, answer_key
from app.schemas import Pair, Source, Split, canonical_json, prompt_key

_TRUST: Final = {source.value: rank for rank, source in enumerate(Source)}

HELD_OUT = 0.15
"""Share of prompt clusters: always the same for feedback, whose rounds are of any size, so that a prompt never changes sides."""


def resolve(
    candidates: Iterable[Candidate], *, max_pairs_per_prompt: int | None = None
) -> tuple[list[Pair], list[Rejection]]:
    """Settle duplicates, contradictions and caps; the kept rows and the rejections are together all candidates.

    Candidates with the same prompt and answers are one row, of the most trusted source, with the events of all. Where
    sources contradict (edit > comparison > thumbs > judge > import), the most trusted one is kept; equally trusted
    ones are all rejected, because nothing tells which is right.

    Args:
        candidates: rows that may train.
        max_pairs_per_prompt: pairs of one prompt that stay, the most trusted first; None keeps all.

    Returns:
        The rows that stay, sorted by pair id, and a rejection for each other candidate.
    """
    groups: dict[tuple[object, ...], list[_Entry]] = defaultdict(list)
    for candidate in candidates:
        entry = _Entry.of(candidate)
        groups[entry.question].append(entry)
    kept: list[_Entry] = []
    rejections: list[Rejection] = []
    for group in groups.values():
        kept += _settle(group, rejections)
    if max_pairs_per_prompt is not None:
        kept = _cap(kept, max_pairs_per_prompt, rejections)
    assert len(kept) + len(rejections) == sum(map(len, groups.values())), "rows were lost"  # noqa: S101
    return [e.candidate.pair for e in sorted(kept, key=lambda e: e.pair_id)], rejections


def assign_splits(pairs: Sequence[Pair], *, threshold: float, held_out_fraction: float | None) -> list[Pair]:
    """Return the pairs with cluster and split, in the same order.

    Args:
        pairs: rows without cluster.
        threshold: Jaccard similarity that joins prompts.
        held_out_fraction: expected share of clusters that is held out; None: see `usual_held_out`.
    """
    # System prompts are shared by many conversations and would make them all alike.
    spoken = [[m for m in pair.prompt if m.role not in ("system", "developer")] for pair in pairs]
    clusters = cluster_texts(["\n".join(m.content or "" for m in said) for said in spoken], threshold=threshold)
    share = usual_held_out(len(set(clusters))) if held_out_fraction is None else held_out_fraction
    return [
        replace(pair, cluster=cluster, split=split_of(cluster, share).value)
        for pair, cluster in zip(pairs, clusters, strict=True)
    ]


def usual_held_out(clusters: int) -> float:
    """Return the share of an import that is held out where nothing else is said.

    A hundred clusters if that is a third of them at most, and never less than 15 %: an interval of reward accuracy from
    a hundred is some 10 points to either side, from thirty 17. It only falls as clusters are added, so in a file that
    grows a cluster moves from held out to train and never back.
    """
    return max(HELD_OUT, min(1 / 3, 100 / clusters))


def split_of(cluster: str, held_out_fraction: float) -> Split:
    """Return the side of a cluster, by its hash: it changes only where new near-duplicates join its cluster."""
    share = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:8], "big") / 2**64
    return Split.HELD_OUT if share < held_out_fraction else Split.TRAIN


@dataclass(frozen=True, slots=True)
class _Entry:
    candidate: Candidate
    prompt: str
    pair_id: str
    question: tuple[object, ...]
    """What is judged, whichever way."""
    stance: object
    """The judgement: two of them on one question contradict one another."""

    @classmethod
    def of(cls, candidate: Candidate) -> "_Entry":
        pair = candidate.pair
        prompt = prompt_key(pair.prompt, pair.tools)
        answers = [answer_key(r) for r in (pair.chosen, pair.rejected) if r is not None]
        stance = pair.label if pair.label is not None else answers[0]
        return cls(candidate, prompt, pair.pair_id, (prompt, pair.kind, frozenset(answers)), stance)

    @property
    def trust(self) -> int:
        return _TRUST[self.candidate.pair.source]

    @property
    def order(self) -> tuple[object, ...]:
        pair = self.candidate.pair
        return self.trust, self.pair_id, pair.created_at, pair.event_ids, self.candidate.place


def _settle(group: list[_Entry], rejections: list[Rejection]) -> list[_Entry]:
    """Return the one row that a question leaves, or none."""
    group.sort(key=lambda e: e.order)
    first, *others = group
    source, place = first.candidate.pair.source, first.candidate.place
    if any(e.trust == first.trust and e.stance != first.stance for e in others):
        rejections += [_reject(e, "conflict", f"source {source} also says the opposite") for e in group]
        return []
    for other in others:
        if other.stance == first.stance:
            rejections.append(_reject(other, "duplicate", f"says the same as {place}"))
        else:
            rejections.append(_reject(other, "conflict", f"{source} at {place} says the opposite"))
    merged = _merged(first.candidate.pair, [e.candidate.pair for e in others if e.stance == first.stance])
    return [replace(first, candidate=replace(first.candidate, pair=merged))]


def _merged(pair: Pair, others: Sequence[Pair]) -> Pair:
    """Return the pair with the provenance of all."""
    everyone = (pair, *others)
    return replace(
        pair,
        response_ids=tuple(sorted({i for p in everyone for i in p.response_ids})),
        event_ids=tuple(sorted({i for p in everyone for i in p.event_ids})),
        subject=pair.subject if len({p.subject for p in everyone}) == 1 else None,
        simulated=any(p.simulated for p in everyone),
        created_at=max(p.created_at for p in everyone),
    )


def _cap(entries: Iterable[_Entry], limit: int, rejections: list[Rejection]) -> list[_Entry]:
    def rank(entry: _Entry) -> tuple[object, ...]:
        pair = entry.candidate.pair
        models = {r.model_id for r in (pair.chosen, pair.rejected) if r is not None}
        return entry.trust, len(models), entry.pair_id

    kept: list[_Entry] = []
    by_prompt: dict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        if entry.candidate.pair.kind == "pair":
            by_prompt[entry.prompt].append(entry)
        else:
            kept.append(entry)
    for group in by_prompt.values():
        group.sort(key=rank)
        kept += group[:limit]
        rejections += [_reject(e, "over_prompt_cap", f"its prompt has {limit} pairs") for e in group[limit:]]
    return kept


def _reject(entry: _Entry, reason: str, detail: str) -> Rejection:
    raw = {**entry.candidate.pair.to_row(), "created_at": entry.candidate.pair.created_at.isoformat()}
    return Rejection(entry.candidate.place, reason, detail, canonical_json(raw))
