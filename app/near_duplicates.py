"""Near-duplicate texts share a cluster: MinHash LSH proposes, the exact Jaccard similarity decides.

Long texts are compared by runs of five words, short ones, where one changed word breaks most of these, by runs of three
characters. The name of a cluster does not depend on the order of the texts. Used for splits, so that no prompt stands
on both sides, and for intervals, so that no prompt counts twice. This module does not know what the texts are.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from app.schemas import content_hash

_RUN_WORDS: Final = 5
_RUN_CHARACTERS: Final = 3
_SHORT_WORDS: Final = 20
_PERMUTATIONS: Final = 256
# LSH needs at least two bands; the exact similarity decides anyway.
_STRICTEST_PROPOSAL: Final = 0.95
# Three standard deviations of a similarity that so many permutations estimate.
_ESTIMATE_SLACK: Final = 0.08
# Of a crowd that looks alike, each text is compared with so many that follow it in sorted order.
_CROWD: Final = 2048


def cluster_texts(texts: Sequence[str], *, threshold: float) -> list[str]:
    """Return a cluster name for each text; near-duplicates (and their near-duplicates) share it.

    Args:
        texts: any texts; those that differ in case and white space only share a cluster.
        threshold: Jaccard similarity of runs from which two texts count as the same.

    Returns:
        For each text the hash of its cluster's first text in sorted order.
    """
    plain = [_plain(text) for text in texts]
    different = sorted(set(plain))
    joined = _Connected(len(different))
    words = [re.findall(r"\w+", text) for text in different]
    # Near-duplicates may differ in length, so the two ways overlap by as much as the threshold allows.
    short_limit = _SHORT_WORDS / threshold
    short = {i: _hashes(_runs(different[i], _RUN_CHARACTERS, "")) for i, w in enumerate(words) if len(w) < short_limit}
    long = {i: _hashes(_runs(w, _RUN_WORDS, " ")) for i, w in enumerate(words) if len(w) >= _SHORT_WORDS}
    for runs in (short, long):
        _join_similar(runs, joined, threshold)
    names = {text: content_hash(different[joined.root(i)])[:12] for i, text in enumerate(different)}
    return [names[text] for text in plain]


class _Connected:
    """Connected components of the numbers below `size`; the least number of each is its root."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._parent = list(range(size))

    def root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = self.root(i), self.root(j)
        self._parent[max(i, j)] = min(i, j)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _runs(parts: Sequence[str], length: int, glue: str) -> list[str]:
    return [glue.join(parts[i : i + length]) for i in range(max(1, len(parts) - length + 1))]


def _hashes(runs: Iterable[str]) -> NDArray[np.uint32]:
    return np.unique(np.array([zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs], dtype=np.uint32))


def _join_similar(runs: Mapping[int, NDArray[np.uint32]], joined: _Connected, threshold: float) -> None:
    if len(runs) < 2:
        return
    # Proposals are checked, so misses weigh more than false alarms.
    index = MinHashLSH(threshold=min(threshold, _STRICTEST_PROPOSAL), num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    made = MinHash.generator(
        (hashes.tolist() for hashes in runs.values()), num_perm=_PERMUTATIONS, hashfunc=int, scheme="affine32"
    )
    sketches = np.zeros((joined.size, _PERMUTATIONS), dtype=np.uint32)
    for i, sketch in zip(runs, made, strict=True):
        index.insert(i, sketch)
        sketches[i] = sketch.hashvalues
    for table in index.hashtables:
        for key in list(table.keys()):
            members = sorted(table.get(key))
            if len(members) > 1:
                _join_bucket(np.array(members), sketches, runs, joined, threshold)


def _join_bucket(
    members: NDArray[np.int64],
    sketches: NDArray[np.uint32],
    runs: Mapping[int, NDArray[np.uint32]],
    joined: _Connected,
    threshold: float,
) -> None:
    """Join the near-duplicates among the texts of one bucket; what is connected already costs next to nothing."""
    roots = np.array([joined.root(int(i)) for i in members])
    for at, i in enumerate(members):
        apart = at + 1 + np.flatnonzero(roots[at + 1 :] != roots[at])[:_CROWD]
        if not apart.size:
            continue
        estimates = (sketches[members[apart]] == sketches[i]).mean(axis=1)
        for other in apart[estimates >= threshold - _ESTIMATE_SLACK]:
            j = members[other]
            if roots[other] != roots[at] and _jaccard(runs[i], runs[j]) >= threshold:
                joined.join(int(i), int(j))
                roots[roots == roots[other]] = roots[at]


def _jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)
