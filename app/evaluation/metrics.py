"""One measured number with a name: what suites give, what rules of a gate ask for, what reports and pages show."""

from dataclasses import dataclass

from app.evaluation.intervals import Estimate


@dataclass(frozen=True, slots=True)
class Metric:
    """A number by its name, such as `win_rate.sft`; without a value it could not be measured, and `note` says why."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    """Prompts, or whatever the number is a mean over."""
    note: str = ""
    n_clusters: int = 0
    """Independent units behind the interval; 0 where there is none."""
    level: float = 0.95

    @property
    def estimate(self) -> Estimate | None:
        """Return the number as an estimate; None without an interval."""
        if self.value is None or self.low is None or self.high is None or not self.n_clusters:
            return None
        return Estimate(self.value, self.low, self.high, self.level, self.n, self.n_clusters, "bootstrap")


def estimated(name: str, estimate: Estimate, note: str = "") -> Metric:
    """Return an estimate as a metric; where nothing was measured it has no value."""
    if estimate.method == "empty":
        return Metric(name, None, None, None, 0, note or "nothing could be measured")
    e = estimate
    return Metric(name, e.value, e.low, e.high, e.n, note, e.n_clusters, e.level)


def plain(name: str, value: float, n: int, note: str = "") -> Metric:
    """Return a number without an interval."""
    return Metric(name, value, None, None, n, note)
