"""Which candidates stay and on which side of the split they stand: duplicates, conflicts, caps, clusters.

Where rows contradict one another, the more trusted source wins (edit > comparison > thumbs > judge > import); equally
trusted ones are all left out, because nothing tells which is right. A cluster holds near-duplicate prompts and is on
one side of the split as a whole, by the hash of its name. The order of the candidates changes nothing but which of
several equal rows counts as the first. This module does not know where candidates come from.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from app.near_duplicates import cluster_texts
from app.preferences.candidates import Candidate, Rejection, answer_key
from app.schemas import Pair, Source, Split, canonical_json, prompt_key

_TRUST = tuple(source.value for source in Source)


def resolve(
    candidates: Iterable[Candidate], *, max_pairs_per_prompt: int | None = None
) -> tuple[list[Pair], list[Rejection]]:
    """Settle duplicates, conflicts and caps.

    Args:
        candidates: rows that may train.
        max_pairs_per_prompt: pairs of one prompt that stay, the most trusted first; None keeps all.

    Returns:
        The pairs that stay, sorted by id, and a rejection for every other candidate.
    """
    rejections: list[Rejection] = []
    stances: dict[tuple[Any, ...], dict[tuple[Any, ...], Candidate]] = defaultdict(dict)
    for candidate in candidates:
        question, stance = _question(candidate.pair)
        known = stances[question].get(stance)
        if known is None:
            stances[question][stance] = candidate
            continue
        first, second = sorted((known, candidate), key=lambda c: _TRUST.index(c.pair.source))
        stances[question][stance] = replace(first, pair=_joined(first.pair, second.pair))
        rejections.append(_rejection(second, "duplicate", f"says the same as {first.place}"))
    settled: list[Candidate] = []
    for sides in stances.values():
        ordered = sorted(sides.values(), key=lambda c: _TRUST.index(c.pair.source))
        best = [c for c in ordered if c.pair.source == ordered[0].pair.source]
        losers = ordered if len(best) > 1 else ordered[1:]
        rejections += [_rejection(c, "conflict", f"contradicted by {ordered[0].pair.source}") for c in losers]
        settled += best if len(best) == 1 else []
    kept, over = _capped(settled, max_pairs_per_prompt)
    rejections += [_rejection(c, "over_prompt_cap", f"the prompt has {max_pairs_per_prompt} pairs") for c in over]
    return sorted((c.pair for c in kept), key=lambda p: p.pair_id), rejections


def assign_splits(pairs: Sequence[Pair], *, threshold: float, held_out_fraction: float) -> list[Pair]:
    """Return the pairs with cluster and split, in the same order.

    Args:
        pairs: rows without cluster.
        threshold: Jaccard similarity of five-word runs that joins prompts.
        held_out_fraction: share of clusters that is held out.
    """
    texts = ["\n".join(m.content or "" for m in pair.prompt if m.role != "system") for pair in pairs]
    clusters = cluster_texts(texts, threshold=threshold)
    return [
        replace(pair, cluster=cluster, split=split_of(cluster, held_out_fraction).value)
        for pair, cluster in zip(pairs, clusters, strict=True)
    ]


def split_of(cluster: str, held_out_fraction: float) -> Split:
    """Return the side of a cluster, by its hash: it never changes while data grows."""
    share = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:8], "big") / 2**64
    return Split.HELD_OUT if share < held_out_fraction else Split.TRAIN


def _question(pair: Pair) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what is judged, and the judgement: rows with one question and two judgements contradict one another."""
    context = prompt_key(pair.prompt, pair.tools)
    if pair.chosen is not None and pair.rejected is not None:
        order = (answer_key(pair.chosen), answer_key(pair.rejected))
        return (context, "pair", *sorted(order)), order
    only = pair.chosen or pair.rejected
    assert only is not None  # noqa: S101  a row has at least one answer
    return (context, "unpaired", answer_key(only)), (pair.label,)


def _joined(first: Pair, second: Pair) -> Pair:
    """Return `first` with the provenance of both."""
    return replace(
        first,
        response_ids=tuple(sorted({*first.response_ids, *second.response_ids})),
        event_ids=tuple(sorted({*first.event_ids, *second.event_ids})),
        created_at=max(first.created_at, second.created_at),
    )


def _capped(candidates: Sequence[Candidate], cap: int | None) -> tuple[list[Candidate], list[Candidate]]:
    if cap is None:
        return list(candidates), []
    kept: list[Candidate] = []
    over: list[Candidate] = []
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.pair.kind == "pair":
            by_prompt[prompt_key(candidate.pair.prompt, candidate.pair.tools)].append(candidate)
        else:
            kept.append(candidate)
    for members in by_prompt.values():
        members.sort(key=lambda c: (_TRUST.index(c.pair.source), c.pair.pair_id))
        kept += members[:cap]
        over += members[cap:]
    return kept, over


def _rejection(candidate: Candidate, reason: str, detail: str) -> Rejection:
    pair = candidate.pair
    raw = {
        "prompt": [message.to_openai() for message in pair.prompt],
        "chosen": None if pair.chosen is None else pair.chosen.content,
        "rejected": None if pair.rejected is None else pair.rejected.content,
        "label": pair.label,
        "events": list(pair.event_ids),
    }
    return Rejection(candidate.place, reason, detail, canonical_json(raw))
