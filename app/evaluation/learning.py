"""Did the model learn? Held-out reward accuracy against chance and against answers' lengths alone.

The bar, fixed beforehand: the lower bound of the accuracy (percentile bootstrap over prompt clusters) must exceed
50 % *and* the accuracy of both length-only rules on the same pairs. Margins of exactly zero are ties: they count half
and are shown apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from app.evaluation.ratings import Estimate, Resampling, mean_rate


class Measured(Protocol):
    """A held-out pair with its reward margin."""

    @property
    def cluster(self) -> str:
        """Prompt cluster."""

    @property
    def margin(self) -> float:
        """Reward of chosen less reward of rejected."""

    @property
    def chosen_tokens(self) -> int:
        """Length of the chosen answer."""

    @property
    def rejected_tokens(self) -> int:
        """Length of the rejected answer."""


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

    @property
    def learned(self) -> bool:
        """Whether the lower bound exceeds chance and both length-only rules."""
        return self.low > max(0.5, self.shorter, self.longer)

    def table(self) -> str:
        """Return the figures as text."""
        verdict = "LEARNED" if self.learned else "NOT LEARNED"
        return (
            f"{verdict}: held-out reward accuracy {self.accuracy:.1%} "
            f"[{self.low:.1%}, {self.high:.1%}] ({self.level:.0%}, {self.clusters} prompt clusters)\n"
            f"  pairs {self.pairs}, ties {self.ties:.1%}\n"
            f"  chance 50.0%, prefer the shorter {self.shorter:.1%}, prefer the longer {self.longer:.1%}"
        )


def reward_accuracy(measures: Sequence[Measured], *, resampling: Resampling) -> Estimate:
    """Return the share of pairs whose chosen answer has the higher reward, ties as half, resampled by prompt cluster."""
    margins = np.array([m.margin for m in measures])
    return mean_rate((0.5 * (1 + np.sign(margins))).tolist(), [m.cluster for m in measures], resampling=resampling)


def judge_learning(measures: Sequence[Measured], *, level: float, seed: int) -> Learning:
    """Compare the margins of at least one held-out pair with chance and with their lengths."""
    margins = np.array([m.margin for m in measures])
    gaps = np.array([m.rejected_tokens - m.chosen_tokens for m in measures])
    shorter = float(0.5 * (1 + np.sign(gaps)).mean())
    accuracy = reward_accuracy(measures, resampling=Resampling(level=level, seed=seed))
    return Learning(
        accuracy=accuracy.value,
        low=accuracy.low,
        high=accuracy.high,
        ties=float((margins == 0).mean()),
        shorter=shorter,
        longer=1 - shorter,
        pairs=accuracy.n,
        clusters=accuracy.n_clusters,
        level=level,
    )
