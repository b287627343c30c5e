"""The gate: measurements and stated rules -> SHIP or HOLD, with every number and the reason in words.

Every rule must hold. The win rates are the claim; the other rules see to it that the claim is not bought: finished
answers (a model cannot win by spoiling its losses), length, looping, golden prompts, perplexity, distinct answers and
relevance (a constant answer can please a rule that reads it, never these two). `reward_accuracy` is the control on
the labels: a policy trained on labels without meaning drifts, and a drift may please the judge by luck, but its
margins on held-out pairs are coin flips. This module decides; it measures nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from app.config import GateSection
from app.evaluation.intervals import Estimate, needed_clusters
from app.evaluation.judge_health import FEWEST_READABLE, JudgeHealth
from app.evaluation.metrics import Metric
from app.evaluation.suites import GoldenResult, WinRate

_NULL_MODEL = 0.5
Decision = Literal["SHIP", "HOLD"]
Comparison = Literal[">", ">=", "<="]


@dataclass(frozen=True, slots=True)
class Sides:
    """The same number for the candidate and for the champion."""

    candidate: float
    champion: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything that was measured on a candidate. None: the recipe gives nothing to measure it on."""

    over_champion: WinRate
    over_sft: WinRate
    length_ratio: Estimate
    finished: Sides
    looping: Sides
    distinct: Sides
    relevance: Sides
    golden: tuple[GoldenResult, ...] | None
    perplexity: Sides | None
    reward_accuracy: Estimate | None
    n_prompts: int
    judge: JudgeHealth | None = None
    """None: rules judge, or nothing was compared."""
    null_model: tuple[Metric, ...] | None = None
    """Win rates of constant answers."""


@dataclass(frozen=True, slots=True)
class RuleResult:
    """One rule, what it saw and what it says."""

    name: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    comparison: Comparison
    threshold: float
    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """SHIP when every rule holds, else HOLD."""

    decision: Decision
    rules: tuple[RuleResult, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Say why it holds; empty on SHIP."""
        return tuple(rule.reason for rule in self.rules if not rule.passed)


def decide(measurements: Measurements, section: GateSection) -> Verdict:
    """Apply every rule of the section."""
    rules = tuple(_rules(measurements, section))
    return Verdict("SHIP" if all(rule.passed for rule in rules) else "HOLD", rules)


def _rules(m: Measurements, section: GateSection) -> Iterable[RuleResult]:
    yield _prompts(m, section)
    if m.judge is not None:
        yield _judge(m.judge)
    if m.null_model is not None:
        yield _null_model(m.null_model)
    yield _win_rate("win_rate_over_champion", "the champion", m.over_champion, section.win_rate_over_champion)
    yield _win_rate("win_rate_over_sft", "the SFT model", m.over_sft, section.win_rate_over_sft)
    if section.reward_accuracy_over is not None:
        yield _reward_accuracy(m.reward_accuracy, section.reward_accuracy_over)
    yield _length("length_ratio_min", ">=", m, section.length_ratio_min)
    yield _length("length_ratio_max", "<=", m, section.length_ratio_max)
    if m.golden is not None:
        yield _golden(m.golden, section.golden_pass_rate)
    yield _sides(
        "finished",
        "share of finished answers",
        m.finished,
        m.n_prompts,
        ">=",
        m.finished.champion - section.finished_drop_max,
    )
    yield _sides(
        "repetition",
        "share of answers that repeat themselves",
        m.looping,
        m.n_prompts,
        "<=",
        m.looping.champion + section.repetition_rise_max,
    )
    yield _sides(
        "distinct",
        "share of distinct answers",
        m.distinct,
        m.n_prompts,
        ">=",
        m.distinct.champion * section.distinct_ratio_min,
    )
    yield _sides(
        "relevance",
        "relevance to the prompts",
        m.relevance,
        m.n_prompts,
        ">=",
        max(0.0, m.relevance.champion * section.relevance_ratio_min),
    )
    if m.perplexity is not None:
        yield _sides(
            "perplexity",
            "perplexity on neutral text",
            m.perplexity,
            1,
            "<=",
            m.perplexity.champion * section.perplexity_ratio_max,
        )


def _prompts(m: Measurements, section: GateSection) -> RuleResult:
    judged = m.over_champion.estimate.n
    passed = judged >= section.min_prompts
    left_out = m.over_champion.invalid_candidate + m.over_champion.invalid_baseline
    reason = f"{judged} prompts were judged"
    if left_out:
        reason += f" ({left_out} left out: an answer was empty or cut by the token limit)"
    if not passed:
        reason += f", {section.min_prompts} are needed: {section.min_prompts - judged} more"
    return RuleResult(
        "min_prompts", "judged prompts", float(judged), None, None, judged, ">=", section.min_prompts, passed, reason
    )


def _judge(health: JudgeHealth) -> RuleResult:
    reason = "the judge is unusable: " + "; ".join(health.reasons) if health.reasons else ""
    reason = (
        reason
        or f"{health.readable:.0%} of the judge's verdicts can be read, {health.flips.value:.0%} of its pairs flip with the order"
    )
    return RuleResult(
        "judge",
        "readable verdicts",
        health.readable,
        None,
        None,
        health.comparisons,
        ">=",
        FEWEST_READABLE,
        health.usable,
        reason,
    )


def _null_model(rates: Sequence[Metric]) -> RuleResult:
    worst = max(rates, key=lambda rate: 1.0 if rate.high is None else rate.high)
    name = worst.name.removeprefix("null_model.")
    if worst.value is None or worst.high is None:
        reason = f"how the judge treats the constant answer `{name}` could not be measured: {worst.note}"
        return RuleResult("null_model", "win rate of a constant", None, None, None, 0, "<=", _NULL_MODEL, False, reason)
    passed = worst.high < _NULL_MODEL
    reason = f"the constant answer `{name}` wins {worst.value:.1%} against the SFT model"
    if not passed:
        reason += f"; its upper bound {worst.high:.1%} is not below {_NULL_MODEL:.0%}: the judge does not tell it from an answer"
    return RuleResult(
        "null_model",
        "win rate of a constant",
        worst.value,
        worst.low,
        worst.high,
        worst.n,
        "<=",
        _NULL_MODEL,
        passed,
        reason,
    )


def _win_rate(name: str, baseline: str, measured: WinRate, threshold: float) -> RuleResult:
    estimate = measured.estimate
    passed = estimate.method != "empty" and estimate.low > threshold
    reason = (
        f"against {baseline} it wins {_percent(estimate.value)} {_interval(estimate)}: "
        f"{measured.wins} wins, {measured.ties} ties, {measured.losses} losses"
    )
    if estimate.method == "empty":
        reason = f"no answer could be judged against {baseline}"
    elif passed:
        reason += f"; even the lower bound exceeds {_percent(threshold)}"
    else:
        reason += f"; the lower bound does not exceed {_percent(threshold)}"
        needed = needed_clusters(estimate, threshold=threshold)
        if needed is not None:
            reason += f" (about {needed} prompts would be needed to show a win rate of {_percent(estimate.value)})"
    return _estimated(name, f"win rate over {baseline}", estimate, ">", threshold, passed=passed, reason=reason)


def _reward_accuracy(estimate: Estimate | None, threshold: float) -> RuleResult:
    metric = "held-out reward accuracy"
    if estimate is None or estimate.method == "empty":
        reason = f"the {metric} was not measured (no held-out pairs, a run that imitates, or no run of this product); set evaluate.gate.reward_accuracy_over to null to do without"
        return RuleResult("reward_accuracy", metric, None, None, None, 0, ">", threshold, False, reason)
    passed = estimate.low > threshold
    reason = f"the policy ranks {_percent(estimate.value)} {_interval(estimate)} of {estimate.n} held-out pairs as they were labelled"
    if not passed:
        reason += f"; the lower bound does not exceed {_percent(threshold)}: what it learned may be chance"
    return _estimated("reward_accuracy", metric, estimate, ">", threshold, passed=passed, reason=reason)


def _length(name: str, comparison: Comparison, m: Measurements, threshold: float) -> RuleResult:
    estimate = m.length_ratio
    passed = estimate.method != "empty" and _compare(estimate.value, comparison, threshold)
    reason = f"answers have {estimate.value:.2f} times the champion's tokens {_interval(estimate, percent='')}"
    if estimate.method == "empty":
        reason = "no prompt has two answers whose lengths could be compared"
    elif not passed:
        reason += f", {'at least' if comparison == '>=' else 'at most'} {threshold:g} is allowed"
    return _estimated(name, "length ratio", estimate, comparison, threshold, passed=passed, reason=reason)


def _golden(results: Sequence[GoldenResult], threshold: float) -> RuleResult:
    failed = [result for result in results if not result.passed]
    rate = 1 - len(failed) / len(results)
    passed = rate >= threshold
    reason = f"{len(results) - len(failed)} of {len(results)} golden prompts passed"
    reason += "".join(f"; `{result.id}` {result.reason}" for result in failed)
    return RuleResult("golden", "golden pass rate", rate, None, None, len(results), ">=", threshold, passed, reason)


def _sides(name: str, metric: str, sides: Sides, n: int, comparison: Comparison, threshold: float) -> RuleResult:
    passed = _compare(sides.candidate, comparison, threshold)
    reason = f"{metric}: {sides.candidate:.3g}, the champion has {sides.champion:.3g}"
    if not passed:
        reason += f", {'at least' if comparison == '>=' else 'at most'} {threshold:.3g} is allowed"
    return RuleResult(name, metric, sides.candidate, None, None, n, comparison, threshold, passed, reason)


def _estimated(
    name: str, metric: str, estimate: Estimate, comparison: Comparison, threshold: float, *, passed: bool, reason: str
) -> RuleResult:
    return RuleResult(
        name, metric, estimate.value, estimate.low, estimate.high, estimate.n, comparison, threshold, passed, reason
    )


def _compare(value: float, comparison: Comparison, threshold: float) -> bool:
    # A bound that was computed must not fail by its last bit.
    slack = 1e-12 * max(1.0, abs(threshold))
    if comparison == ">":
        return value > threshold
    return value >= threshold - slack if comparison == ">=" else value <= threshold + slack


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _interval(estimate: Estimate, *, percent: str = "%") -> str:
    low, high = (f"{b:.1%}" if percent else f"{b:.2f}" for b in (estimate.low, estimate.high))
    return f"[{low}, {high}] ({estimate.level:.0%}, {estimate.n_clusters} prompt clusters)"
