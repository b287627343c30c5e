"""Battles -> ratings: Bradley-Terry with ties, win rates, anchored scores, style control, each with its intervals.

P(i beats j) = 1 / (1 + exp(theta_j - theta_i)) (Bradley and Terry 1952, https://doi.org/10.2307/2334029); a tie is half
a win of each side, as in Arena-Hard and evalica. Ratings are Elo-like: 1000 for the baseline, or on average where there
is none, and 400 points for odds of ten to one. Where every battle is against the baseline the anchored score equals the
weighted win rate.

A resample of rows takes battles for independent, which two games on one prompt are not: Arena-Hard publishes such
intervals, and they are about 1.6 times too narrow. So each figure comes with two intervals, by row and by prompt, and
with raters named with a third. This module knows no files and no judges.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from app.errors import DataError
from app.evaluation.battles import Battles
from app.evaluation.intervals import Resampling, expanded_tail, unit_draws

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

STYLE_FEATURES: Final = ("length", "headers", "lists", "bold")
_ELO = 400 / math.log(10)
_NEWTON_STEPS = 100
_LONGEST_STEP = 2.0
_LARGEST = 12.0
"""In a resample that a model never lost its theta has no maximum; it stops here, at a score of 99.9994 %."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its intervals; None where the file names fewer than two prompts, or raters."""

    value: float
    by_row: Interval
    by_prompt: Interval | None
    by_rater: Interval | None


@dataclass(frozen=True, slots=True)
class Rating:
    """What the battles say of one model."""

    model: str
    battles: int
    win_rate: Figure
    """Weighted, in percent, ties at one half, over all its battles."""
    average_win_rate: Figure
    """The same against each opponent, averaged over opponents, however often it met each."""
    rating: Figure | None
    """None: no finite one fits, since it never lost to, or never won against, the models that have one."""
    score: Figure | None
    """Rate in percent at which it would win against the baseline; None without a baseline or a rating."""


@dataclass(frozen=True, slots=True)
class Ratings:
    """All models, best first, and how they were compared."""

    models: tuple[Rating, ...]
    baseline: str | None
    level: float
    n_battles: int
    n_prompts: int | None
    n_raters: int | None
    style: dict[str, Figure] | None
    """What one standard deviation of each feature adds to the log-odds of a win; None without style control."""


def rate(battles: Battles, *, baseline: str | None, style: Sequence[str] = (), resampling: Resampling) -> Ratings:
    """Rate all models of the battles.

    Args:
        battles: with texts where style is controlled.
        baseline: the model whose rating is 1000; None: the average is.
        style: the features whose effect is taken out, of `STYLE_FEATURES`: ratings and scores are then those at equal
            style. Features are scaled but not centred: centred, the average gap of a pool in which everybody meets
            the same baseline passes for strength, and a score depends on who else is in the pool.
        resampling: level, resamples, seed.

    Raises:
        DataError: the baseline fights no battle, or texts are missing.
    """
    if baseline is not None and baseline not in battles.models:
        msg = f"no battle of the baseline `{baseline}`\n\nHint: the models are {', '.join(battles.models)}."
        raise DataError(msg)
    fit = _Fit.of(battles, baseline, style)
    units = {"row": None, "prompt": battles.prompts, "rater": battles.raters}
    values = fit(np.ones((1, len(battles.left))))[0]
    bounds = {
        name: _bounds(fit, names, resampling)
        for name, names in units.items()
        # One prompt or one rater says nothing of another.
        if name == "row" or (names is not None and len(set(names)) > 1)
    }

    def figure(column: int, factor: float = 1.0, offset: float = 0.0) -> Figure:
        return _figure(values[column] * factor + offset, bounds, column, factor, offset)

    count = len(battles.models)
    rated = []
    for i, model in enumerate(battles.models):
        finite = bool(np.isfinite(values[2 * count + i]))
        rated.append(
            Rating(
                model=model,
                battles=int(np.count_nonzero((battles.left == i) | (battles.right == i))),
                win_rate=figure(i, 100.0),
                average_win_rate=figure(count + i, 100.0),
                rating=figure(2 * count + i, _ELO, 1000.0) if finite else None,
                score=figure(3 * count + i, 100.0) if finite and baseline is not None else None,
            )
        )
    rated.sort(key=lambda r: (r.rating is not None, r.rating.value if r.rating else r.win_rate.value), reverse=True)
    return Ratings(
        models=tuple(rated),
        baseline=baseline,
        level=resampling.level,
        n_battles=len(battles.left),
        n_prompts=None if battles.prompts is None else len(set(battles.prompts)),
        n_raters=None if battles.raters is None else len(set(battles.raters)),
        style={name: figure(4 * count + i) for i, name in enumerate(style)} if style else None,
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    """Weights of the rows -> every number that is told of the battles."""

    battles: Battles
    group: Indices
    """[G] the models that a finite rating fits; first the one whose theta is held at 0."""
    centred: bool
    """Whether the mean of the group is 0 in the end, as no baseline is."""
    features: Floats
    """[N, F]."""

    @classmethod
    def of(cls, battles: Battles, baseline: str | None, style: Sequence[str]) -> "_Fit":
        anchor = None if baseline is None else battles.models.index(baseline)
        return cls(battles, _group(battles, anchor), baseline is None, style_features(battles, style))

    def __call__(self, weights: Floats) -> Floats:
        """[B, N] weights -> [B, 4 K + F]: win rates, averages, thetas, rates against the baseline, coefficients."""
        count = len(self.battles.models)
        wins = _wins(self.battles, weights)
        fought = wins + wins.transpose(0, 2, 1)
        met = fought > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            win_rates = wins.sum(axis=2) / fought.sum(axis=2)
            averages = np.where(met, wins / fought, 0.0).sum(axis=2) / met.sum(axis=2)
        if self.features.shape[1]:
            found = [_newton_rows(self.battles, self.group, self.features, row) for row in weights]
            thetas, coefficients = np.stack([f[0] for f in found]), np.stack([f[1] for f in found])
        else:
            thetas = _newton_wins(wins[:, self.group[:, None], self.group])
            coefficients = np.zeros((len(weights), 0))
        if self.centred:
            thetas = thetas - thetas.mean(axis=1, keepdims=True)
        everybody = np.full((len(weights), count), np.nan)
        everybody[:, self.group] = thetas
        # A resample in which a model does not fight says nothing of it.
        everybody[fought.sum(axis=2) == 0] = np.nan
        return np.concatenate([win_rates, averages, everybody, expit(everybody), coefficients], axis=1)


def style_features(battles: Battles, names: Sequence[str]) -> Floats:
    """Return the style gaps of left over right, [N, F], each divided by its root mean square.

    Length is (left - right) / (left + right) in words and marks, the others (left - right) / (left + right + 1) in
    headers, list items and bold runs outside of fenced code, as in Arena-Hard v0.1.

    Raises:
        DataError: the battles have no texts.
    """
    if not names:
        return np.zeros((len(battles.left), 0))
    if battles.texts is None:
        msg = "style control needs the two answers of every battle\n\nHint: columns `left_text` and `right_text`, or --answers."
        raise DataError(msg)
    known = {text: _style(text) for sides in battles.texts for text in sides}
    gaps = np.zeros((len(battles.left), len(names)))
    for row, (left, right) in enumerate(battles.texts):
        for column, name in enumerate(names):
            mine, other = known[left][name], known[right][name]
            below = mine + other + (name != "length")
            gaps[row, column] = (mine - other) / below if below else 0.0
    scale = np.sqrt((gaps**2).mean(axis=0))
    return gaps / np.where(scale > 0, scale, 1.0)


_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
_ITEM = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
_WORD = re.compile(r"\w+|[^\w\s]")


def _style(text: str) -> dict[str, int]:
    prose = _FENCED.sub("", text)
    return {
        "length": len(_WORD.findall(text)),
        "headers": len(_HEADER.findall(prose)),
        "lists": len(_ITEM.findall(prose)),
        "bold": len(_BOLD.findall(prose)),
    }


def _wins(battles: Battles, weights: Floats) -> Floats:
    """[B, N] weights -> [B, K, K] weighted wins of the first over the second model."""
    count = len(battles.models)
    rows = np.arange(len(battles.left))
    entries = csr_array(
        (
            np.concatenate([battles.points, 1 - battles.points]) * np.tile(battles.weights, 2),
            (
                np.tile(rows, 2),
                np.concatenate([battles.left * count + battles.right, battles.right * count + battles.left]),
            ),
        ),
        shape=(len(rows), count * count),
    )
    wins: Floats = np.asarray(weights @ entries).reshape(-1, count, count)
    return wins


def _group(battles: Battles, anchor: int | None) -> Indices:
    """Return the models among which each has beaten each, be it through others: only there a maximum exists (Ford 1957)."""
    wins = _wins(battles, np.ones((1, len(battles.left))))[0]
    _, component = connected_components(csr_array(wins > 0), directed=True, connection="strong")
    chosen = int(np.bincount(component).argmax() if anchor is None else component[anchor])
    members = np.flatnonzero(component == chosen).astype(np.int64)
    return members if anchor is None else np.concatenate([[anchor], members[members != anchor]])


def _newton_wins(wins: Floats) -> Floats:
    """Fit [B, G, G] wins: [B, G] thetas, the first of them 0."""
    fought = wins + wins.transpose(0, 2, 1)
    thetas = np.zeros(wins.shape[:2])
    for _ in range(_NEWTON_STEPS if wins.shape[1] > 1 else 0):
        chance = expit(thetas[:, :, None] - thetas[:, None, :])
        gradient = (wins - fought * chance).sum(axis=2)[:, 1:]
        curvature = fought * chance * (1 - chance)
        hessian = np.eye(wins.shape[1]) * curvature.sum(axis=2)[:, :, None] - curvature
        hessian = hessian[:, 1:, 1:] + 1e-9 * np.eye(wins.shape[1] - 1)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        before = thetas[:, 1:].copy()
        thetas[:, 1:] = np.clip(before + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP), -_LARGEST, _LARGEST)
        if np.abs(thetas[:, 1:] - before).max() < 1e-10:
            break
    return thetas


def _newton_rows(battles: Battles, group: Indices, features: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Fit [N] weighted rows with [N, F] features: [G] thetas, the first of them 0, and [F] coefficients.

    The coefficients have a standard normal prior: where nobody varies a feature, it explains nothing.
    """
    position = np.full(len(battles.models), -1)
    position[group] = np.arange(len(group))
    inside = (position[battles.left] >= 0) & (position[battles.right] >= 0) & (weights > 0)
    rows = np.arange(np.count_nonzero(inside))
    design = np.zeros((len(rows), len(group) + features.shape[1]))
    design[rows, position[battles.left[inside]]] = 1.0
    design[rows, position[battles.right[inside]]] = -1.0
    design[:, len(group) :] = features[inside]
    design = design[:, 1:]
    heavy, points = (weights * battles.weights)[inside], battles.points[inside]
    prior = np.concatenate([np.full(len(group) - 1, 1e-9), np.ones(features.shape[1])])
    found = np.zeros(design.shape[1])
    for _ in range(_NEWTON_STEPS):
        chance = expit(design @ found)
        gradient = design.T @ (heavy * (points - chance)) - prior * found
        hessian = (design * (heavy * chance * (1 - chance))[:, None]).T @ design + np.diag(prior)
        step = np.clip(np.linalg.solve(hessian, gradient), -_LONGEST_STEP, _LONGEST_STEP)
        before, found = found, np.clip(found + step, -_LARGEST, _LARGEST)
        if np.abs(found - before).max() < 1e-10:
            break
    return np.concatenate([[0.0], found[: len(group) - 1]]), found[len(group) - 1 :]


def _bounds(fit: _Fit, names: Sequence[str] | None, resampling: Resampling) -> tuple[Floats, Floats]:
    """Resample whole units and return the ends of the intervals of every number, [S] and [S]."""
    rows = len(fit.battles.left)
    owner = np.arange(rows) if names is None else np.unique(np.asarray(names), return_inverse=True)[1]
    units = int(owner.max()) + 1
    width = max(rows, len(fit.battles.models) ** 2)
    found = np.concatenate([fit(draws[:, owner]) for draws in unit_draws(units, width=width, resampling=resampling)])
    tail = expanded_tail(resampling.level, units)
    known = np.isfinite(found).any(axis=0)
    ends = np.full((2, found.shape[1]), np.nan)
    ends[:, known] = np.nanquantile(found[:, known], [tail, 1 - tail], axis=0)
    return ends[0], ends[1]


def _figure(
    value: float, bounds: dict[str, tuple[Floats, Floats]], column: int, factor: float, offset: float
) -> Figure:
    def interval(name: str) -> Interval | None:
        if name not in bounds:
            return None
        low, high = bounds[name]
        return Interval(float(low[column]) * factor + offset, float(high[column]) * factor + offset)

    by_row = interval("row")
    assert by_row is not None  # noqa: S101  rows are always resampled
    return Figure(float(value), by_row, interval("prompt"), interval("rater"))
