"""Near-duplicate texts share a cluster: MinHash over runs of five words.

The name of a cluster does not depend on the order of the texts. Used for splits, so that no prompt stands on both
sides, and for intervals, so that no prompt counts twice. This module does not know what the texts are.
"""

import re
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

from app.schemas import content_hash

_RUN = 5
_PERMUTATIONS = 128


def cluster_texts(texts: Sequence[str], *, threshold: float) -> list[str]:
    """Return a cluster name for each text; near-duplicates (and their near-duplicates) share it.

    Args:
        texts: any texts; equal ones share a cluster.
        threshold: estimated Jaccard similarity of five-word runs from which two texts count as the same.

    Returns:
        For each text the hash of its cluster's first text in sorted order.
    """
    plain = [_plain(text) for text in texts]
    different = sorted(set(plain))
    sketches = [_sketch(text) for text in different]
    index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
    parents = list(range(len(different)))

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for i, sketch in enumerate(sketches):
        for j in index.query(sketch):
            if sketch.jaccard(sketches[j]) >= threshold:
                # The smaller index is the earlier text, so the root names the cluster.
                low, high = sorted((root(i), root(j)))
                parents[high] = low
        index.insert(i, sketch)
    names = {text: content_hash(different[root(i)])[:12] for i, text in enumerate(different)}
    return [names[text] for text in plain]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())) or text


def _sketch(text: str) -> MinHash:
    words = text.split()
    runs = [" ".join(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))]
    sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
    sketch.update_batch([run.encode("utf-8", "surrogatepass") for run in runs])
    return sketch
