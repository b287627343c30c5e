"""Whether a judge can be believed: by itself, and held against human labels.

By itself: does it give verdicts at all, do they survive a swap of the sides, does it see differences, does it prefer
whatever is longer. Whoever does not read the answers and says A, B or tie with chances of its own names the same winner
in both orders with 2 P(A) P(B), and another in each with P(A)^2 + P(B)^2, which is at least as much. So a judge whose
decided pairs do not outnumber its flips, or that cannot be read at all, is *unusable*, and so is every number from it. Against humans: agreement with and without ties as in MT-Bench (an
inconsistent pair counts as a tie in the first, and in the second only where both decided), Cohen's kappa, and whether it
prefers its own answers more than humans do. This module asks nobody.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from app.errors import DataError
from app.evaluation.battles import Battles
from app.evaluation.intervals import Estimate, Resampling, expanded_tail, mean_rate
from app.evaluation.verdicts import Games

FEWEST_READABLE: Final = 0.9
"""Share of verdicts that must be readable."""
_RESAMPLES_OF_KAPPA = 1000


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a judge said of two answers to one prompt, from the candidate's side."""

    prompt_id: str
    cluster: str
    category: str
    games: Games
    candidate_length: int
    baseline_length: int
    identical: bool = False
    """The same answer on both sides: a tie that nobody was asked about."""


@dataclass(frozen=True, slots=True)
class JudgeHealth:
    """How a judge behaved in its own comparisons."""

    comparisons: int
    readable: float
    """Share of the two games of each comparison that have a verdict."""
    failures: dict[str, int]
    """Games without a reply, by reason; and `unreadable`, with a reply that has no verdict."""
    ties: Estimate
    """Share of ties among complete comparisons, inconsistent ones not counted as such."""
    flips: Estimate
    """Share of complete comparisons in which each game has another winner."""
    first_wins_of_flips: float | None
    """Share of them that whoever stood first won; 0.5 is no preference for a place."""
    beyond_order: Estimate
    """(1 + decided alike in both orders - flips) / 2: 1 is perfect, at most 0.5 is what a judge gets who does not read."""
    longer_wins: Estimate
    """Share of decided comparisons with answers of different length that the longer one won."""
    usable: bool
    reasons: tuple[str, ...]


def judge_health(
    comparisons: Sequence[Comparison], failures: Mapping[str, int], *, resampling: Resampling
) -> JudgeHealth:
    """Say how the judge behaved and whether its verdicts can be used.

    Args:
        comparisons: all that were asked for, also those without verdicts.
        failures: games without a reply, by reason.
        resampling: level, resamples, seed.
    """
    asked = 2 * len(comparisons)
    read = sum((c.games.as_a is not None) + (c.games.as_b is not None) for c in comparisons)
    counted = {**failures, "unreadable": asked - read - sum(failures.values())}
    complete = [c for c in comparisons if c.games.complete]

    def share(holds: Sequence[bool], rows: Sequence[Comparison]) -> Estimate:
        return mean_rate([float(h) for h in holds], [c.cluster for c in rows], resampling=resampling)

    flips = [c for c in complete if c.games.flipped]
    unequal = [c for c in complete if c.games.outcome and c.candidate_length != c.baseline_length]
    beyond_order = mean_rate(
        [(1 + bool(c.games.outcome) - c.games.flipped) / 2 for c in complete],
        [c.cluster for c in complete],
        resampling=resampling,
    )
    readable = read / asked if asked else 0.0
    reasons = []
    if readable < FEWEST_READABLE:
        reasons.append(f"only {readable:.0%} of its verdicts can be read ({FEWEST_READABLE:.0%} are needed)")
    if complete and beyond_order.low <= 0.5:
        decided = sum(bool(c.games.outcome) for c in complete)
        reasons.append(
            f"of {len(complete)} pairs it decides {decided} alike in both orders and flips {len(flips)}, no more than chance gives: it does not read the answers, or sees no difference"
        )
    if not comparisons:
        reasons.append("it was asked nothing")
    return JudgeHealth(
        comparisons=len(comparisons),
        readable=readable,
        failures={reason: count for reason, count in counted.items() if count},
        ties=share([c.games.consistent and c.games.outcome == 0 for c in complete], complete),
        flips=share([c.games.flipped for c in complete], complete),
        first_wins_of_flips=float(np.mean([c.games.first_position_won for c in flips])) if flips else None,
        beyond_order=beyond_order,
        longer_wins=share(
            [(c.games.outcome == 1) == (c.candidate_length > c.baseline_length) for c in unequal], unequal
        ),
        usable=not reasons,
        reasons=tuple(reasons),
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """A judge held against human labels on the same prompts and answers."""

    compared: int
    """Pairs of answers that both labelled."""
    only_human: int
    only_judge: int
    agreement_with_ties: Estimate
    agreement_without_ties: Estimate
    kappa: Estimate
    human_ties: Estimate
    judge_ties: Estimate
    flips: Estimate
    """Of pairs that the judge saw in both orders."""
    human_longer_wins: Estimate
    judge_longer_wins: Estimate
    human_self_wins: Estimate
    """How often humans decide for the answers of the judge's own model, over pairs with one of them."""
    judge_self_wins: Estimate


@dataclass(frozen=True, slots=True)
class _Label:
    """What was said of one pair of answers, from the side of the model whose name comes first."""

    prompt: str
    models: tuple[str, str]
    outcome: int
    flipped: bool | None
    """None: one order was seen only."""
    longer: int
    """1: the first model's answer is longer, -1: the other's, 0: neither, or texts are not known."""


def majority(votes: Sequence[float]) -> int:
    """Return who has more of the votes for the first (1, 0.5 or 0 each): 1, -1, or 0 where nobody has."""
    lead = sum(vote - 0.5 for vote in votes)
    return int(lead > 0) - int(lead < 0)


def unanimous(votes: Sequence[float]) -> int:
    """Return whom all votes name: 1, -1, or 0 where they differ."""
    return majority(votes) if len(set(votes)) == 1 else 0


def calibrate(human: Battles, judge: Battles, *, judge_model: str | None, resampling: Resampling) -> Calibration:
    """Hold a judge's battles against human ones on the same prompts.

    Args:
        human: one or more votes on a pair; the majority counts, none is a tie.
        judge: one row a pair, or one for each order.
        judge_model: the model in the battles that is the judge itself, for self-preference.
        resampling: level, resamples, seed.

    Raises:
        DataError: a file names no prompts, the two share no pair, or the judge's model fights no battle.
    """
    theirs, its = _labels(human, "human", majority), _labels(judge, "judge", unanimous)
    both = [(theirs[key], its[key]) for key in theirs if key in its]
    if not both:
        msg = f"the {len(theirs)} human pairs and the {len(its)} of the judge share none: `prompt` and the models' names must be the same in both files"
        raise DataError(msg)
    if judge_model is not None and not any(judge_model in h.models for h, _ in both):
        msg = f"no battle of the judge's model `{judge_model}` is in both files"
        raise DataError(msg)

    def share(rows: Sequence[tuple[bool, str]]) -> Estimate:
        return mean_rate([float(holds) for holds, _ in rows], [prompt for _, prompt in rows], resampling=resampling)

    decided = [(h, j) for h, j in both if h.outcome and j.outcome]
    return Calibration(
        compared=len(both),
        only_human=len(theirs) - len(both),
        only_judge=len(its) - len(both),
        agreement_with_ties=share([(h.outcome == j.outcome, h.prompt) for h, j in both]),
        agreement_without_ties=share([(h.outcome == j.outcome, h.prompt) for h, j in decided]),
        kappa=kappa(
            [h.outcome for h, _ in both],
            [j.outcome for _, j in both],
            [h.prompt for h, _ in both],
            resampling=resampling,
        ),
        human_ties=share([(h.outcome == 0, h.prompt) for h, _ in both]),
        judge_ties=share([(j.outcome == 0, j.prompt) for _, j in both]),
        flips=share([(j.flipped, j.prompt) for _, j in both if j.flipped is not None]),
        human_longer_wins=share(_longer(h for h, _ in both)),
        judge_longer_wins=share(_longer(j for _, j in both)),
        human_self_wins=share(_own((h for h, _ in both), judge_model)),
        judge_self_wins=share(_own((j for _, j in both), judge_model)),
    )


def kappa(first: Sequence[int], second: Sequence[int], clusters: Sequence[str], *, resampling: Resampling) -> Estimate:
    """Return Cohen's kappa of two labellings, with its cluster interval (https://doi.org/10.1177/001316446002000104).

    0 where chance alone agrees always: nothing can be said beyond it.

    Args:
        first: [N] labels.
        second: [N] labels of the same things.
        clusters: [N] prompt cluster of each.
        resampling: level, resamples, seed.
    """
    if not first:
        return Estimate(0.0, -1.0, 1.0, resampling.level, 0, 0, "empty")
    names = sorted({*first, *second})
    cells = np.array([names.index(a) * len(names) + names.index(b) for a, b in zip(first, second, strict=True)])
    owner = np.unique(np.asarray(clusters), return_inverse=True)[1]
    units = int(owner.max()) + 1
    tables = np.zeros((units, len(names) ** 2))
    np.add.at(tables, (owner, cells), 1.0)

    def of(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        shares = (counts / counts.sum(axis=1, keepdims=True)).reshape(-1, len(names), len(names))
        observed = np.trace(shares, axis1=1, axis2=2)
        expected = (shares.sum(axis=2) * shares.sum(axis=1)).sum(axis=1)
        beyond = np.where(expected < 1, 1 - expected, 1.0)
        kappas: NDArray[np.float64] = np.where(expected < 1, (observed - expected) / beyond, 0.0)
        return kappas

    value = float(of(tables.sum(axis=0, keepdims=True))[0])
    if units == 1:
        return Estimate(value, -1.0, 1.0, resampling.level, len(cells), 1, "exact")
    generator = np.random.default_rng(resampling.seed)
    draws = generator.multinomial(units, np.full(units, 1 / units), size=min(resampling.samples, _RESAMPLES_OF_KAPPA))
    tail = expanded_tail(resampling.level, units)
    low, high = np.quantile(of(draws @ tables), [tail, 1 - tail])
    return Estimate(value, float(low), float(high), resampling.level, len(cells), units, "bootstrap")


def _labels(battles: Battles, whose: str, rule: Callable[[Sequence[float]], int]) -> dict[tuple[str, str, str], _Label]:
    if battles.prompts is None:
        msg = f"the {whose} battles name no prompts, so no pair can be found in both files\n\nHint: add a column `prompt`."
        raise DataError(msg)
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row, prompt in enumerate(battles.prompts):
        first, second = sorted((battles.models[battles.left[row]], battles.models[battles.right[row]]))
        rows[prompt, first, second].append(row)
    found = {}
    for (prompt, first, second), of_pair in rows.items():
        as_left = [battles.models[battles.left[row]] == first for row in of_pair]
        votes = [
            float(battles.points[row]) if left else 1 - float(battles.points[row])
            for row, left in zip(of_pair, as_left, strict=True)
        ]
        longer = 0
        if battles.texts is not None:
            left, right = (len(text) for text in battles.texts[of_pair[0]])
            longer = (1 if as_left[0] else -1) * (int(left > right) - int(left < right))
        flipped = {0.0, 1.0} <= set(votes) if len(set(as_left)) == 2 else None
        found[prompt, first, second] = _Label(prompt, (first, second), rule(votes), flipped, longer)
    return found


def _longer(labels: Iterable[_Label]) -> list[tuple[bool, str]]:
    return [(label.outcome == label.longer, label.prompt) for label in labels if label.outcome and label.longer]


def _own(labels: Iterable[_Label], model: str | None) -> list[tuple[bool, str]]:
    return [
        (label.models[0 if label.outcome > 0 else 1] == model, label.prompt)
        for label in labels
        if label.outcome and model in label.models
    ]
