"""The gate: named measurements and stated rules -> SHIP or HOLD, with every number and the reason in words.

A rule names a metric, the number or the end of its interval that counts, and what it must be; `must` rules hold, `warn`
rules are told. The default win rates are the claim; the other rules see to it that the claim is not bought: finished
answers (a model cannot win by spoiling its losses), length, looping, golden prompts, perplexity, distinct answers and
relevance (a constant answer can please a rule that reads it, never these two). `reward_accuracy` is the control on
the labels: a policy trained on labels without meaning drifts, and a drift may please the judge by luck, but its
margins on held-out pairs are coin flips. This module decides; it measures nothing.
"""

import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from app.config import GateSection, RuleSection
from app.evaluation.intervals import detectable, needed_clusters
from app.evaluation.metrics import Metric

Decision = Literal["SHIP", "HOLD"]
Comparison = Literal[">", ">=", "<", "<="]
_COMPARE: Final[Mapping[Comparison, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_WORDS: Final[Mapping[Comparison, str]] = {
    ">": "more than {} is needed",
    ">=": "at least {} is needed",
    "<": "less than {} is needed",
    "<=": "at most {} is allowed",
}
_BOUNDS: Final = {"value": "it", "low": "its lower bound", "high": "its upper bound"}


@dataclass(frozen=True, slots=True)
class RuleResult:
    """One rule, what it saw and what it says."""

    name: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    bound: Literal["value", "low", "high"]
    comparison: Comparison
    threshold: float
    decides: Literal["must", "warn"]
    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """SHIP when every rule that must hold does, else HOLD."""

    decision: Decision
    rules: tuple[RuleResult, ...]
    power: str
    """What the win rate over SFT could have shown with this many prompts."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Say why it holds; empty on SHIP."""
        return tuple(rule.reason for rule in self.rules if not rule.passed and rule.decides == "must")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say what is wrong and does not hold."""
        return tuple(rule.reason for rule in self.rules if not rule.passed and rule.decides == "warn")


def decide(metrics: Sequence[Metric], section: GateSection) -> Verdict:
    """Apply every rule of the section to what was measured."""
    by_name = {metric.name: metric for metric in metrics}
    rules = tuple(
        result
        for name, rule in section.rules.items()
        if rule is not None and (result := _apply(name, rule, by_name)) is not None
    )
    holds = any(not rule.passed and rule.decides == "must" for rule in rules)
    return Verdict("HOLD" if holds else "SHIP", rules, _power(by_name.get("win_rate.sft"), section))


def _apply(name: str, rule: RuleSection, by_name: Mapping[str, Metric]) -> RuleResult | None:
    """Return what a rule says; None where it asks for what this recipe does not measure, and lets that pass."""
    metric = by_name.get(rule.metric)
    if metric is None:
        if rule.absent == "pass":
            return None
        near = difflib.get_close_matches(rule.metric, by_name, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "no suite of this recipe measures it"
        return _result(name, rule, None, passed=False, reason=f"nothing measured `{rule.metric}`: {hint}")
    seen = {"value": metric.value, "low": metric.low, "high": metric.high}[rule.bound]
    if seen is None:
        what = "could not be measured" if metric.value is None else f"has no {rule.bound} end of an interval"
        return _result(name, rule, metric, passed=False, reason=f"{metric.name} {what}{_noted(metric)}")
    # A bound that was computed must not fail by its last bit.
    slack = 0.0 if rule.comparison in ("<", ">") else 1e-12 * max(1.0, abs(rule.threshold))
    passed = _COMPARE[rule.comparison](seen + (slack if rule.comparison == ">=" else -slack), rule.threshold)
    reason = f"{metric.name} is {_number(metric.value)}{_interval(metric)}{_noted(metric)}"
    if not passed:
        reason += (
            f"; {_BOUNDS[rule.bound]} is {_number(seen)}, {_WORDS[rule.comparison].format(_number(rule.threshold))}"
        )
        reason += _needed(rule, metric)
    return _result(name, rule, metric, passed=passed, reason=reason)


def _result(name: str, rule: RuleSection, metric: Metric | None, *, passed: bool, reason: str) -> RuleResult:
    return RuleResult(
        name=name,
        metric=rule.metric,
        value=None if metric is None else metric.value,
        low=None if metric is None else metric.low,
        high=None if metric is None else metric.high,
        n=0 if metric is None else metric.n,
        bound=rule.bound,
        comparison=rule.comparison,
        threshold=rule.threshold,
        decides=rule.decides,
        passed=passed,
        reason=reason,
    )


def _needed(rule: RuleSection, metric: Metric) -> str:
    """Say how many prompts would do, where more of them could."""
    if rule.bound == "value" and rule.comparison == ">=" and rule.metric == "prompts" and metric.value is not None:
        return f": {rule.threshold - metric.value:.0f} more"
    estimate = metric.estimate
    if rule.bound != "low" or estimate is None:
        return ""
    needed = needed_clusters(estimate, threshold=rule.threshold)
    if needed is None:
        return ""
    return f" (about {needed} prompts would be needed to show it, if it stays {_number(metric.value)})"


def _power(metric: Metric | None, section: GateSection) -> str:
    estimate = None if metric is None else metric.estimate
    if estimate is None or estimate.low == estimate.high:
        return ""
    rule = section.rules.get("win_rate_sft")
    threshold = 0.5 if rule is None else rule.threshold
    smallest = threshold + detectable(estimate)
    return f"with {estimate.n_clusters} prompt clusters a true win rate over SFT of {smallest:.1%} would pass 8 times in 10"


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f" [{_number(metric.low)}, {_number(metric.high)}] on {metric.n}"


def _noted(metric: Metric) -> str:
    return f" ({metric.note})" if metric.note else ""
