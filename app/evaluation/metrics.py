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


def estimated(name: str, estimate: Estimate, note: str = "") -> Metric:
    """Return an estimate as a metric; where nothing was measured it has no value."""
    if estimate.method == "empty":
        return Metric(name, None, None, None, 0, note or "nothing could be measured")
    return Metric(name, estimate.value, estimate.low, estimate.high, estimate.n, note)


def plain(name: str, value: float, n: int, note: str = "") -> Metric:
    """Return a number without an interval."""
    return Metric(name, value, None, None, n, note)
