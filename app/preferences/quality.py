"""How many pairs of a prompt stay, and on which side of the split they stand.

A cluster holds near-duplicate prompts; it is on one side of the split as a whole, by the hash of its name, so that the
side of a prompt never changes while data grows. This module does not know where pairs come from.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from app.near_duplicates import cluster_texts
from app.schemas import Pair, Source, Split, prompt_key

_TRUST = tuple(source.value for source in Source)


def cap_prompts(pairs: Iterable[Pair], *, max_pairs_per_prompt: int, dropped: Counter[str]) -> list[Pair]:
    """Keep at most so many pairs of one prompt, the most trusted sources first, then by id."""
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    kept: list[Pair] = []
    for pair in pairs:
        if pair.kind == "pair":
            by_prompt[prompt_key(pair.prompt, pair.tools)].append(pair)
        else:
            kept.append(pair)
    for members in by_prompt.values():
        members.sort(key=lambda p: (_TRUST.index(p.source), p.pair_id))
        kept += members[:max_pairs_per_prompt]
        dropped["over_prompt_cap"] += max(0, len(members) - max_pairs_per_prompt)
    return kept


def assign_splits(pairs: Sequence[Pair], *, held_out_fraction: float, near_duplicate_threshold: float) -> list[Pair]:
    """Return the pairs with cluster and split, sorted by id."""
    texts = ["\n".join(m.content or "" for m in pair.prompt if m.role != "system") for pair in pairs]
    clusters = cluster_texts(texts, threshold=near_duplicate_threshold)
    placed = (
        replace(pair, cluster=cluster, split=split_of(cluster, held_out_fraction).value)
        for pair, cluster in zip(pairs, clusters, strict=True)
    )
    return sorted(placed, key=lambda p: p.pair_id)


def split_of(cluster: str, held_out_fraction: float) -> Split:
    """Return the side of a cluster, by its hash."""
    share = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:8], "big") / 2**64
    return Split.HELD_OUT if share < held_out_fraction else Split.TRAIN
