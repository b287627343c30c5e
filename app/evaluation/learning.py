"""Did the model learn? One measure for each kind of objective, fixed beforehand, on what was held out.

Pairs: reward accuracy. The lower bound (percentile bootstrap over prompt clusters) must exceed 50 % *and* the accuracy of
both length-only rules on the same pairs. Margins of exactly zero are ties: they count half and are shown apart. What counts
is what training added: the implicit reward begins at zero where the start model is the reference; where it is not, or where
an objective has none (SimPO, ORPO, CPO), the start model's is taken away, else a model that learned nothing could pass or
one that did could not.

Answers that were judged one by one: the same, for a liked and a disliked answer drawn at random (the area under the
ROC curve). Where pairs of ten prompt clusters are held out as well, their accuracy is the measure: two answers to one
prompt compare better than answers to two.

Answers that are imitated (`sft`): negative log-likelihood of a token, which must fall: the upper bound of its ratio to
the start model's must lie under 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.evaluation.intervals import Estimate, Resampling, at_most_certain, expanded_tail, mean_rate, mean_ratio

FEW_CLUSTERS = 10
"""Resamples of fewer prompt clusters than this say nothing about answers that are judged one by one."""
_SAME_LENGTH = 0.2
"""Share of the longer answer by which two may differ and count as of the same length."""


class Measured(Protocol):
    """A held-out pair with what training added to its reward margin."""

    @property
    def pair_id(self) -> str:
        """Id of the pair."""

    @property
    def cluster(self) -> str:
        """Prompt cluster."""

    @property
    def gain(self) -> float:
        """Reward of chosen less reward of rejected, less the same before training."""

    @property
    def chosen_tokens(self) -> int:
        """Length of the chosen answer."""

    @property
    def rejected_tokens(self) -> int:
        """Length of the rejected answer."""

    @property
    def chosen_change(self) -> float | None:
        """How much more likely the chosen answer became, in nats a token."""


class JudgedAnswer(Protocol):
    """A held-out answer that was judged by itself, with its reward."""

    @property
    def cluster(self) -> str:
        """Prompt cluster."""

    @property
    def desirable(self) -> bool:
        """Whether it was liked."""

    @property
    def gain(self) -> float:
        """Implicit reward, less the same before training."""

    @property
    def tokens(self) -> int:
        """Its length."""


class ImitatedAnswer(Protocol):
    """A held-out answer with its log-probability before and after training."""

    @property
    def cluster(self) -> str:
        """Prompt cluster."""

    @property
    def logp(self) -> float:
        """Log-probability under the trained model."""

    @property
    def start_logp(self) -> float | None:
        """Log-probability under the start model."""

    @property
    def tokens(self) -> int:
        """Its length."""


@dataclass(frozen=True)
class Bucket:
    """Pairs of one kind: of one source, or whose chosen answer is shorter, as long, or longer than the rejected one."""

    name: str
    pairs: int
    accuracy: float
    margin: float
    """Mean, in nats."""

    def line(self) -> str:
        """Say it in one line."""
        return f"{self.name}: {self.pairs} pairs, accuracy {self.accuracy:.1%}, mean margin {self.margin:+.3f}"


@dataclass(frozen=True)
class Learning:
    """Held-out accuracy with its interval, and what knowing only the lengths gives."""

    accuracy: float
    low: float
    high: float
    ties: float
    shorter: float
    longer: float
    pairs: int
    clusters: int
    level: float
    metric: str = "held-out reward accuracy"
    by_length: tuple["Bucket", ...] = ()
    by_source: tuple["Bucket", ...] = ()
    """Empty where all pairs have the same."""
    chosen_change: float | None = None
    """Mean change of a chosen answer's log-probability, in nats a token."""
    chosen_fell: float | None = None
    """Share of chosen answers that became less likely."""

    @property
    def learned(self) -> bool:
        """Whether the lower bound exceeds chance and both length-only rules."""
        return self.low > max(0.5, self.shorter, self.longer)

    def table(self) -> str:
        """Return the figures as text."""
        verdict = "LEARNED" if self.learned else "NOT LEARNED"
        moved = (
            ""
            if self.chosen_change is None
            else f"\n  chosen answers {self.chosen_change:+.3f} nats a token, {self.chosen_fell:.1%} became less likely"
        )
        return (
            f"{verdict}: {self.metric} {self.accuracy:.1%} "
            f"[{self.low:.1%}, {self.high:.1%}] ({self.level:.0%}, {self.clusters} prompt clusters)\n"
            f"  pairs {self.pairs}, ties {self.ties:.1%}\n"
            f"  chance 50.0%, prefer the shorter {self.shorter:.1%}, prefer the longer {self.longer:.1%}"
            + "".join(f"\n  {bucket.line()}" for bucket in (*self.by_length, *self.by_source))
            + moved
        )


@dataclass(frozen=True)
class Likelihood:
    """Held-out negative log-likelihood in nats a token, before and after, and the interval of their ratio."""

    before: float
    after: float
    ratio_low: float
    ratio_high: float
    answers: int
    clusters: int
    level: float

    @property
    def learned(self) -> bool:
        """Whether it fell for certain."""
        return self.ratio_high < 1

    def table(self) -> str:
        """Return the figures as text."""
        verdict = "LEARNED" if self.learned else "NOT LEARNED"
        return (
            f"{verdict}: held-out negative log-likelihood {self.before:.3f} -> {self.after:.3f} nats a token, ratio "
            f"[{self.ratio_low:.3f}, {self.ratio_high:.3f}] ({self.level:.0%}, {self.clusters} prompt clusters)\n"
            f"  answers {self.answers}"
        )


def reward_accuracy(measures: Sequence[Measured], *, resampling: Resampling) -> Estimate:
    """Return the share of pairs whose chosen answer gained the more reward, ties as half, resampled by prompt cluster."""
    gains = np.array([m.gain for m in measures])
    return mean_rate((0.5 * (1 + np.sign(gains))).tolist(), [m.cluster for m in measures], resampling=resampling)


def judge_learning(
    measures: Sequence[Measured], *, level: float, seed: int, sources: Mapping[str, str] = MappingProxyType({})
) -> Learning:
    """Compare what training added to the margins of held-out pairs with chance and with their lengths.

    Args:
        measures: at least one.
        level: of the interval.
        seed: of its resamples.
        sources: by pair where its label came from, such as `thumbs` or `edit`.
    """
    gains = np.array([m.gain for m in measures])
    moved = [m.chosen_change for m in measures if m.chosen_change is not None]
    gaps = np.array([m.rejected_tokens - m.chosen_tokens for m in measures])
    shorter = float(0.5 * (1 + np.sign(gaps)).mean())
    accuracy = reward_accuracy(measures, resampling=Resampling(level=level, seed=seed))
    sides = {
        "chosen shorter by more than a fifth": gaps > _SAME_LENGTH * _longest(measures),
        "about the same length": np.abs(gaps) <= _SAME_LENGTH * _longest(measures),
        "chosen longer by more than a fifth": -gaps > _SAME_LENGTH * _longest(measures),
    }
    return Learning(
        accuracy=accuracy.value,
        low=accuracy.low,
        high=accuracy.high,
        ties=float((gains == 0).mean()),
        shorter=shorter,
        longer=1 - shorter,
        pairs=accuracy.n,
        clusters=accuracy.n_clusters,
        level=level,
        by_length=_buckets(sides, gains),
        by_source=_by_source(measures, gains, sources),
        chosen_change=float(np.mean(moved)) if moved else None,
        chosen_fell=float(np.mean(np.array(moved) < 0)) if moved else None,
    )


def _by_source(
    measures: Sequence[Measured], gains: NDArray[np.float64], sources: Mapping[str, str]
) -> tuple[Bucket, ...]:
    of_pair = np.array([sources.get(m.pair_id, "unknown") for m in measures])
    names = sorted(set(of_pair))
    return _buckets({f"from {name}": of_pair == name for name in names}, gains) if len(names) > 1 else ()


def _buckets(kinds: Mapping[str, NDArray[np.bool_]], gains: NDArray[np.float64]) -> tuple[Bucket, ...]:
    return tuple(
        Bucket(name, int(kind.sum()), float(0.5 * (1 + np.sign(gains[kind])).mean()), float(gains[kind].mean()))
        for name, kind in kinds.items()
        if kind.any()
    )


def _longest(measures: Sequence[Measured]) -> NDArray[np.float64]:
    return np.array([max(m.chosen_tokens, m.rejected_tokens) for m in measures], dtype=np.float64)


def judge_answers(answers: Sequence[JudgedAnswer], *, level: float, seed: int) -> Learning | None:
    """Compare what training added to rewards of liked and of disliked answers with chance and with their lengths.

    None where there are fewer than ten prompt clusters of either kind: a resample of a handful repeats them, and says nothing
    of others.
    """
    good = np.array([a.desirable for a in answers], dtype=bool)
    rarer = min(len({a.cluster for a in answers if a.desirable is kind}) for kind in (True, False))
    if rarer < FEW_CLUSTERS:
        return None
    gains, tokens = np.array([a.gain for a in answers]), np.array([a.tokens for a in answers], dtype=np.float64)
    index = {name: i for i, name in enumerate(dict.fromkeys(a.cluster for a in answers))}
    owner = np.array([index[a.cluster] for a in answers])
    wins = 0.5 * (1 + np.sign(gains[good][:, None] - gains[~good][None, :]))
    generator = np.random.default_rng(seed)
    resampled = []
    for draw in generator.multinomial(len(index), np.full(len(index), 1 / len(index)), size=Resampling().samples):
        liked, disliked = draw[owner[good]].astype(np.float64), draw[owner[~good]].astype(np.float64)
        weight = liked.sum() * disliked.sum()
        if weight:
            resampled.append(liked @ wins @ disliked / weight)
    tail = expanded_tail(level, rarer)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    low, high = at_most_certain(float(low), float(high), level=level, count=rarer)
    shorter = float(0.5 * (1 + np.sign(tokens[~good][None, :] - tokens[good][:, None])).mean())
    return Learning(
        accuracy=float(wins.mean()),
        low=low,
        high=high,
        ties=float((wins == 0.5).mean()),
        shorter=shorter,
        longer=1 - shorter,
        pairs=int(wins.size),
        clusters=len(index),
        level=level,
        metric="a held-out liked answer gained more reward than a disliked one",
    )


def judge_likelihood(answers: Sequence[ImitatedAnswer], *, level: float, seed: int) -> Likelihood | None:
    """Compare the likelihood of held-out answers with what the start model gave them; None for fewer than ten clusters."""
    if len({a.cluster for a in answers}) < FEW_CLUSTERS:
        return None
    before = [-(a.start_logp if a.start_logp is not None else float("nan")) for a in answers]
    after = [-a.logp for a in answers]
    ratio = mean_ratio(after, before, [a.cluster for a in answers], resampling=Resampling(level=level, seed=seed))
    tokens = sum(a.tokens for a in answers)
    return Likelihood(
        before=sum(before) / tokens,
        after=sum(after) / tokens,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        answers=ratio.n,
        clusters=ratio.n_clusters,
        level=level,
    )
