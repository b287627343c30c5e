"""Win rate at equal length: a logistic regression of the judge's preferences on the length gap, where lengths overlap.

    logit P(candidate preferred) = theta + phi * tanh((baseline length - candidate length) / sd) + psi * difficulty

with the length term set to 0 in the end (AlpacaEval 2, https://arxiv.org/abs/2404.04475). What differs from AlpacaEval,
and so it is called "length-controlled (GLM)": without a difficulty of each prompt there is no such term; phi is held by
a prior of earlier runs with the same judge instead of invented "gamed" rows; the interval resamples prompt clusters and
fits anew, where theirs takes the fit for granted.

A regression cannot say what would be at equal length where lengths never are about equal: it extrapolates, by up to 28
points on the published annotations. So the share of prompts whose lengths are within a fifth stands beside the number,
and below a fifth of them there is no number, but the plain win rate on the prompts that match. This module knows
numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from app.errors import DataError
from app.evaluation.intervals import Estimate, Resampling, expanded_tail, mean_rate, unit_draws

Floats = NDArray[np.float64]

ALIKE: Final = 0.2
"""Lengths that differ by less than this share of the longer one are about equal."""
FEWEST_ALIKE: Final = 0.2
_NEWTON_STEPS = 50
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of phi before: mean and standard deviation; by default next to nothing."""

    mean: float = 0.0
    sd: float = 30.0


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A win rate at equal length, or why there is none."""

    estimate: Estimate | None
    """None: lengths do not overlap enough for one."""
    raw: Estimate
    matched: Estimate
    """The plain win rate over the prompts with lengths about equal."""
    overlap: float
    """Share of such prompts."""
    length_effect: float | None
    """phi; above 0 the judge prefers the shorter, below 0 the longer."""
    reason: str


def length_controlled(
    points: Sequence[float],
    candidate_lengths: Sequence[float],
    baseline_lengths: Sequence[float],
    clusters: Sequence[str],
    *,
    resampling: Resampling,
    difficulty: Sequence[float] | None = None,
    prior: Prior = Prior(),
) -> LengthControlled:
    """Fit the regression and tell the win rate at equal length.

    Args:
        points: [N] in [0, 1], how much the judge prefers the candidate; may be probabilities.
        candidate_lengths: [N], at least 0, in any one unit.
        baseline_lengths: [N] in the same unit.
        clusters: [N] prompt cluster of each.
        resampling: level, resamples, seed.
        difficulty: [N] log-odds at which candidates do well on the prompt, if known.
        prior: of phi.

    Raises:
        DataError: a length is negative or not finite, or a point is outside of [0, 1]; names the first.
    """
    target, mine, other = (np.asarray(v, dtype=np.float64) for v in (points, candidate_lengths, baseline_lengths))
    _check(target, mine, other)
    raw = mean_rate(points, clusters, resampling=resampling)
    longest = np.maximum(mine, other)
    alike = np.abs(mine - other) < ALIKE * np.where(longest > 0, longest, 1.0)
    overlap = float(alike.mean()) if len(alike) else 0.0
    matched = mean_rate(
        target[alike].tolist(), [c for c, a in zip(clusters, alike, strict=True) if a], resampling=resampling
    )
    if not len(target):
        return LengthControlled(None, raw, matched, overlap, None, "no comparison has two verdicts")
    if overlap < FEWEST_ALIKE:
        reason = f"only {overlap:.0%} of the prompts have answers of about equal length, {FEWEST_ALIKE:.0%} are needed: not identifiable"
        return LengthControlled(None, raw, matched, overlap, None, reason)
    if raw.method == "exact":
        # All wins or all losses: there is nothing to fit, and the exact bound of the plain rate is what is known.
        return LengthControlled(raw, raw, matched, overlap, None, "all comparisons ended the same way")
    gaps = other - mine
    spread = float(gaps.std(ddof=1)) if len(gaps) > 1 else 0.0
    columns = [np.ones_like(gaps), np.tanh(gaps / spread) if spread else np.zeros_like(gaps)]
    columns += [] if difficulty is None else [np.asarray(difficulty, dtype=np.float64)]
    design = np.stack(columns, axis=1)
    found = fit(design, target, np.ones((1, len(target))), prior)[0]
    value = float(_at_equal_length(design, found[None], np.ones((1, len(target))))[0])
    low, high = _interval(design, target, clusters, prior, resampling)
    estimate = Estimate(value, min(low, value), max(high, value), resampling.level, raw.n, raw.n_clusters, "bootstrap")
    return LengthControlled(estimate, raw, matched, overlap, float(found[1]), "")


def fit(design: Floats, target: Floats, weights: Floats, prior: Prior) -> Floats:
    """Fit logistic regressions by Newton's method.

    Args:
        design: [N, P]: 1, the length gap, further columns.
        target: [N] in [0, 1].
        weights: [B, N], a regression each.
        prior: of the second coefficient.

    Returns:
        [B, P] coefficients.
    """
    width = design.shape[1]
    precision, mean = np.full(width, _RIDGE), np.zeros(width)
    precision[1], mean[1] = 1 / prior.sd**2, prior.mean
    precision[2:] = Prior().sd ** -2
    found = np.zeros((len(weights), width))
    for _ in range(_NEWTON_STEPS):
        chance = expit(found @ design.T)
        gradient = (weights * (target - chance)) @ design - precision * (found - mean)
        hessian = np.einsum("bn,np,nq->bpq", weights * chance * (1 - chance), design, design, optimize=True)
        step = np.linalg.solve(hessian + np.diag(precision), gradient[:, :, None])[:, :, 0]
        found = found + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-10:
            break
    return found


def predicted_rate(theta: float, psi: float, difficulty: Sequence[float]) -> float:
    """Return the mean over prompts of sigmoid(theta + psi * difficulty): the win rate at equal length, in [0, 1]."""
    return float(expit(theta + psi * np.asarray(difficulty, dtype=np.float64)).mean())


def _at_equal_length(design: Floats, found: Floats, weights: Floats) -> Floats:
    level = design.copy()
    level[:, 1] = 0.0
    rates: Floats = (expit(found @ level.T) * weights).sum(axis=1) / weights.sum(axis=1)
    return rates


def _interval(
    design: Floats, target: Floats, clusters: Sequence[str], prior: Prior, resampling: Resampling
) -> tuple[float, float]:
    owner = np.unique(np.asarray(clusters), return_inverse=True)[1]
    units = int(owner.max()) + 1
    if units == 1:
        return 0.0, 1.0
    rates = []
    for draws in unit_draws(units, width=len(target), resampling=resampling):
        weights = draws[:, owner]
        rates.append(_at_equal_length(design, fit(design, target, weights, prior), weights))
    tail = expanded_tail(resampling.level, units)
    low, high = np.quantile(np.concatenate(rates), [tail, 1 - tail])
    return float(low), float(high)


def _check(target: Floats, mine: Floats, other: Floats) -> None:
    for name, lengths in (("candidate", mine), ("baseline", other)):
        wrong = ~(np.isfinite(lengths) & (lengths >= 0))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            msg = f"the length of the {name}'s answer {at} is {lengths[at]}: it must be a number of at least 0"
            raise DataError(msg)
    wrong = ~((target >= 0) & (target <= 1))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        msg = f"the preference of answer {at} is {target[at]}: it must lie between 0 and 1"
        raise DataError(msg)
