"""Rates and ratios with honest intervals: every interval resamples prompt clusters, not rows.

Answers to near-duplicate prompts are not independent, so a bootstrap over rows is too narrow. Here whole clusters are
drawn with replacement, and percentiles of the resampled statistic are the interval, expanded for few clusters as
Student's t is wider than the normal (Hesterberg 2015, https://arxiv.org/abs/1411.5279). Where every cluster wins (or
loses) there is nothing to resample: the bootstrap would claim certainty, so the exact Clopper-Pearson bound over
clusters takes its place, and no interval promises more than that one would: of a few clusters with many rows each the bootstrap
sees no worse than the worst of them. Where all values are equal inside (0, 1), all ties for example, the interval is a point and
`method` says so. This module knows numbers and cluster names only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri, stdtrit

from app.errors import DataError

_CELLS = 4_000_000

Method = Literal["bootstrap", "exact", "constant", "empty"]


@dataclass(frozen=True, slots=True)
class Resampling:
    """How intervals are made: confidence level, number of resamples, seed."""

    level: float = 0.95
    samples: int = 2000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its two-sided interval; `n` rows in `n_clusters` prompt clusters."""

    value: float
    low: float
    high: float
    level: float
    n: int
    n_clusters: int
    method: Method


def mean_rate(values: Sequence[float], clusters: Sequence[str], *, resampling: Resampling) -> Estimate:
    """Return the mean of values in [0, 1] (a win is 1, a tie 0.5, a loss 0) with its cluster interval.

    Args:
        values: [N] in [0, 1].
        clusters: [N] prompt cluster of each value.
        resampling: level, resamples, seed.

    Without values the estimate is 0.5 in [0, 1] with the method `empty`: nothing is known.
    """
    if not values:
        return Estimate(0.5, 0.0, 1.0, resampling.level, 0, 0, "empty")
    array = np.asarray(values, dtype=np.float64)
    sums, sizes = by_cluster(clusters, array, np.ones_like(array))
    mean = float(array.mean())
    count = len(sums)
    if array.min() == array.max():
        tail = (1 - resampling.level) / 2
        if mean == 1.0:
            return Estimate(mean, float(betaincinv(count, 1, tail)), 1.0, resampling.level, len(array), count, "exact")
        if mean == 0.0:
            return Estimate(
                mean, 0.0, float(betaincinv(1, count, 1 - tail)), resampling.level, len(array), count, "exact"
            )
        return Estimate(mean, mean, mean, resampling.level, len(array), count, "constant")
    if count == 1:
        # Rows of one cluster say how they differ among themselves, not how another cluster would.
        return Estimate(mean, 0.0, 1.0, resampling.level, len(array), count, "exact")
    low, high = at_most_certain(*_percentiles(sums, sizes, resampling), level=resampling.level, count=count)
    return Estimate(mean, low, high, resampling.level, len(array), count, "bootstrap")


def at_most_certain(low: float, high: float, *, level: float, count: int) -> tuple[float, float]:
    """Return the interval of a rate, its ends no further from chance than `count` independent draws that all agree would put them."""
    tail = (1 - level) / 2
    return min(low, float(betaincinv(count, 1, tail))), max(high, float(betaincinv(1, count, 1 - tail)))


def mean_ratio(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str], *, resampling: Resampling
) -> Estimate:
    """Return sum(numerators) / sum(denominators) with its cluster interval.

    Args:
        numerators: [N], for example tokens of the candidate's answers.
        denominators: [N], not negative and not all 0, for example tokens of the baseline's answers.
        clusters: [N] prompt cluster of each row.
        resampling: level, resamples, seed.

    Raises:
        DataError: the denominators add up to nothing.
    """
    if not sum(denominators) > 0:
        msg = f"a ratio over {len(denominators)} denominators that add up to nothing says nothing"
        raise DataError(msg)
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    sums, sizes = by_cluster(clusters, above, below)
    value = float(above.sum() / below.sum())
    if np.allclose(sums * below.sum(), sizes * above.sum(), rtol=1e-12, atol=0):
        return Estimate(value, value, value, resampling.level, len(above), len(sums), "constant")
    low, high = _percentiles(sums, sizes, resampling)
    return Estimate(value, low, high, resampling.level, len(above), len(sums), "bootstrap")


def needed_clusters(estimate: Estimate, *, threshold: float) -> int | None:
    """Return how many clusters would put the lower bound above the threshold if the value stayed what it is.

    None where the value itself does not exceed the threshold: then no number would do.
    """
    gap = estimate.value - threshold
    if gap <= 0 or estimate.n_clusters == 0:
        return None
    return int(np.ceil(estimate.n_clusters * ((estimate.value - estimate.low) / gap) ** 2)) + 1


def detectable(estimate: Estimate, *, power: float = 0.8) -> float:
    """Return the smallest distance from a threshold that as many clusters would show with this probability.

    It is (z of the level + z of the power) standard errors, the standard error read off the interval; 0 where the
    interval is a point.
    """
    z = float(ndtri((1 + estimate.level) / 2))
    standard_error = (estimate.high - estimate.low) / (2 * z)
    return (z + float(ndtri(power))) * standard_error


def paired_p_value(differences: Sequence[float], clusters: Sequence[str], *, resampling: Resampling) -> float:
    """Return the two-sided p-value of "the mean difference is 0", by flipping the signs of whole clusters.

    Args:
        differences: [N] of one prompt each: one model's points less another's on the same prompt, or points less 0.5.
        clusters: [N] prompt cluster of each.
        resampling: resamples and seed; the p-value is never below 1 / (samples + 1).
    """
    array = np.asarray(differences, dtype=np.float64)
    sums, _ = by_cluster(clusters, array, np.ones_like(array))
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    generator = np.random.default_rng(resampling.seed)
    rows = max(1, _CELLS // len(sums))
    extreme = 0
    for start in range(0, resampling.samples, rows):
        signs = generator.integers(0, 2, size=(min(rows, resampling.samples - start), len(sums))) * 2 - 1
        extreme += int(np.count_nonzero(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9))
    return (1 + extreme) / (1 + resampling.samples)


def by_cluster(
    clusters: Sequence[str], above: NDArray[np.float64], below: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Add up two columns, [N] each, over the rows of each cluster: [C] and [C]."""
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    owner = np.fromiter((index[name] for name in clusters), dtype=np.int64, count=len(clusters))
    sums: NDArray[np.float64] = np.bincount(owner, weights=above, minlength=len(index)).astype(np.float64)
    sizes: NDArray[np.float64] = np.bincount(owner, weights=below, minlength=len(index)).astype(np.float64)
    return sums, sizes


def expanded_tail(level: float, count: int) -> float:
    """Return the percentile that stands for the lower end of an interval from `count` independent draws.

    The percentile bootstrap is too narrow by sqrt(n / (n - 1)) and by what the normal lacks of Student's t; of a
    hundred and more draws little is left of it (Hesterberg 2015, equation 5).
    """
    if count < 2:
        return (1 - level) / 2
    return float(ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - level) / 2)))


def unit_draws(units: int, *, width: int, resampling: Resampling) -> Iterator[NDArray[np.float64]]:
    """Yield how often each unit is drawn, [B, U], a few resamples at a time.

    Args:
        units: U, what is drawn with replacement.
        width: numbers that the caller needs for one resample; it bounds B.
        resampling: resamples and seed.
    """
    generator = np.random.default_rng(resampling.seed)
    rows = max(1, _CELLS // width)
    for start in range(0, resampling.samples, rows):
        count = min(rows, resampling.samples - start)
        yield np.stack(
            [np.bincount(generator.integers(0, units, units), minlength=units) for _ in range(count)]
        ).astype(np.float64)


def _percentiles(sums: NDArray[np.float64], sizes: NDArray[np.float64], resampling: Resampling) -> tuple[float, float]:
    generator = np.random.default_rng(resampling.seed)
    # Clusters that are alike are drawn as one kind: the same distribution, from far fewer numbers.
    kinds, alike = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    count = len(sums)
    rows = max(1, _CELLS // len(kinds))
    resampled = []
    for start in range(0, resampling.samples, rows):
        draws = generator.multinomial(count, alike / count, size=min(rows, resampling.samples - start))
        above, below = draws @ kinds[:, 0], draws @ kinds[:, 1]
        # A resample without any weight says nothing about the ratio.
        resampled.append(above[below > 0] / below[below > 0])
    tail = expanded_tail(resampling.level, count)
    low, high = np.quantile(np.concatenate(resampled), [tail, 1 - tail])
    return float(low), float(high)
