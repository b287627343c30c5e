"""The report of an evaluation: plain values for JSON, Markdown for people, a card for the terminal.

The three say the same: the verdict, every rule with value, interval, n and threshold, and the reasons in words. The
tables of ratings are here too. This module measures and decides nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from app.evaluation.battery import SuiteResult
from app.evaluation.gate import RuleResult, Verdict
from app.evaluation.judge_health import Calibration, JudgeHealth
from app.evaluation.measurements import Measurements
from app.evaluation.metrics import Metric
from app.evaluation.ratings import Figure, Ratings
from app.evaluation.suites import WinRate


@dataclass(frozen=True, slots=True)
class Look:
    """How many evaluations have used a file of prompts, this one included."""

    name: str
    place: str
    times: int


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What was compared, on what, what was measured and what the gate says."""

    evaluation_id: str
    model_id: str
    champion_id: str
    sft_id: str
    judge: str
    """Names the judge; a style that users asked for is named as such by the caller."""
    answered_by: str
    """Where the answers come from: whoever runs an endpoint vouches for the weights behind it."""
    prompts: str
    level: float
    measurements: Measurements
    suites: Mapping[str, SuiteResult]
    """What the suites measured, by name."""
    unanswered: Mapping[str, int]
    """Tasks to which the judge gave no reply, by reason; the same evaluation again asks for them."""
    looks: tuple[Look, ...]
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the headline numbers on top."""
        over = self.measurements.over_champion
        golden = self.measurements.golden
        return {
            **{name: value for name, value in asdict(replace(self, suites={})).items() if name != "suites"},
            "suites": {
                name: {"metrics": [asdict(metric) for metric in result.metrics], "detail": result.detail}
                for name, result in self.suites.items()
            },
            "verdict": self.verdict.decision,
            "rules": [asdict(rule) for rule in self.verdict.rules],
            "reasons": list(self.verdict.reasons),
            "warnings": list(self.verdict.warnings),
            "power": self.verdict.power,
            "metrics": [asdict(metric) for metric in self.measurements.metrics()],
            "figures": {
                "win_rate": over.estimate.value,
                "ci_low": over.estimate.low,
                "ci_high": over.estimate.high,
                "n_prompts": over.estimate.n,
                "length_ratio": self.measurements.length_ratio.value,
                "golden": None
                if golden is None
                else {"passed": sum(result.passed for result in golden), "of": len(golden)},
            },
        }

    def as_markdown(self) -> str:
        """Return the report as Markdown."""
        lines = [
            f"# {self.verdict.decision}: `{self.model_id}`",
            "",
            f"Against champion `{self.champion_id}` and SFT `{self.sft_id}`, on `{self.prompts}`, judged by {self.judge}; "
            f"answers of {self.answered_by}. Intervals: {self.level:.0%}, bootstrap over prompt clusters.",
            "",
            "| rule | value | interval | n | wanted | |",
            "|---|---|---|---|---|---|",
            *(f"| {' | '.join(_cells(rule))} |" for rule in self.verdict.rules),
            "",
            _counts("champion", self.measurements.over_champion),
            _counts("SFT", self.measurements.over_sft),
        ]
        if self.suites:
            lines += ["", "| suite | value | interval | n | |", "|---|---|---|---|---|"]
            lines += [f"| {' | '.join(_metric_cells(metric))} |" for metric in self._metrics()]
        if self.measurements.judge is not None:
            lines += ["", _health(self.measurements.judge)]
        if self.verdict.reasons:
            lines += ["", "It holds because:", "", *(f"- {reason}" for reason in self.verdict.reasons)]
        if self.verdict.warnings:
            lines += ["", "Warnings:", "", *(f"- {reason}" for reason in self.verdict.warnings)]
        if self.verdict.power:
            lines += ["", f"Power: {self.verdict.power}."]
        lines += ["", f"Evaluations that used these files so far, this one included: {_looks(self.looks)}."]
        return "\n".join(lines) + "\n"

    def _metrics(self) -> list[Metric]:
        return [metric for result in self.suites.values() for metric in result.metrics]

    def as_card(self) -> Panel:
        """Return the verdict card for the terminal."""
        ships = self.verdict.decision == "SHIP"
        table = Table(box=None, pad_edge=False)
        for heading in ("rule", "value", "interval", "n", "wanted", ""):
            table.add_column(heading, justify="left" if heading in ("rule", "wanted", "") else "right")
        for rule in self.verdict.rules:
            style = "" if rule.passed else "bold red" if rule.decides == "must" else "yellow"
            table.add_row(*map(Text, _cells(rule)), style=style)
        measured = Table(box=None, pad_edge=False)
        for heading in ("suite", "value", "interval", "n"):
            measured.add_column(heading, justify="left" if heading == "suite" else "right")
        for metric in self._metrics():
            measured.add_row(*map(Text, _metric_cells(metric)[:-1]))
        health = [] if self.measurements.judge is None else [Text(_health(self.measurements.judge), style="dim")]
        notes = [Text(reason, style="red") for reason in self.verdict.reasons]
        notes += [Text(f"warning: {reason}", style="yellow") for reason in self.verdict.warnings]
        below = Text(
            f"judge: {self.judge}; {self.level:.0%} intervals by prompt cluster; {_counts('champion', self.measurements.over_champion)} {self.verdict.power}; looks so far: {_looks(self.looks)}",
            style="dim",
        )
        return Panel(
            Group(table, *([measured] if self.suites else []), *notes, *health, below),
            title=Text(f"{self.verdict.decision}  {self.model_id}", style="bold green" if ships else "bold red"),
            border_style="green" if ships else "red",
        )


def _looks(looks: Sequence[Look]) -> str:
    return ", ".join(f"{look.name} {look.times}" for look in looks)


def _metric_cells(metric: Metric) -> tuple[str, str, str, str, str]:
    interval = "" if metric.low is None or metric.high is None else f"{metric.low:.3f} to {metric.high:.3f}"
    value = "not measured" if metric.value is None else f"{metric.value:.3f}"
    return metric.name, value, interval, str(metric.n), metric.note


def _health(health: JudgeHealth) -> str:
    failures = ", ".join(f"{count} {reason}" for reason, count in health.failures.items()) or "none"
    first = (
        ""
        if health.first_wins_of_flips is None
        else f", whoever stood first won {health.first_wins_of_flips:.0%} of them"
    )
    return (
        f"The judge: {health.readable:.0%} of its verdicts read (without one: {failures}); ties {health.ties.value:.0%}, "
        f"flips {health.flips.value:.0%}{first}; the longer answer won {health.longer_wins.value:.0%}."
    )


def _cells(rule: RuleResult) -> tuple[str, str, str, str, str, str]:
    interval = "" if rule.low is None or rule.high is None else f"{rule.low:.3f} to {rule.high:.3f}"
    bound = {"value": "", "low": "lower bound ", "high": "upper bound "}[rule.bound]
    return (
        rule.name,
        "not measured" if rule.value is None else f"{rule.value:.3f}",
        interval,
        str(rule.n),
        f"{bound}{rule.comparison} {rule.threshold:.3g}",
        "pass" if rule.passed else "HOLD" if rule.decides == "must" else "warn",
    )


def _counts(baseline: str, measured: WinRate) -> str:
    return (
        f"Against {baseline}: {measured.wins} wins, {measured.ties} ties, {measured.losses} losses; left out as invalid: "
        f"{measured.invalid_candidate} by the candidate, {measured.invalid_baseline} by the baseline "
        f"(were the candidate's losses: win rate {measured.if_invalid_lost:.1%})."
    )


def ratings_tables(ratings: Ratings) -> list[Table]:
    """Return the ratings of all models and, under style control, what style is worth, as tables for the terminal."""
    units = [("prompt", ratings.n_prompts), ("rater", ratings.n_raters)]
    by = " and ".join(["row", *(f"{unit} ({n})" for unit, n in units if n is not None)])
    style = " at equal style" if ratings.style is not None else ""
    against = f"; scores against {ratings.baseline}" if ratings.baseline is not None else ""
    title = f"{ratings.n_battles} battles, ratings{style}{against}; {ratings.level:.0%} intervals by {by}"
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("model", "battles", "rating", "score", "win rate"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in ratings.models:
        table.add_row(
            Text(model.model),
            str(model.battles),
            "no finite one" if model.rating is None else _figure(model.rating, ".0f"),
            "" if model.score is None else _figure(model.score, ".2f"),
            _figure(model.win_rate, ".2f"),
        )
    if ratings.style is None:
        return [table]
    effects = Table(title="log-odds of a standard deviation more", title_justify="left", box=None)
    for heading in ("style", "effect"):
        effects.add_column(heading)
    for name, figure in ratings.style.items():
        effects.add_row(name, _figure(figure, "+.2f"))
    return [table, effects]


def _figure(figure: Figure, form: str) -> str:
    intervals = (figure.by_row, figure.by_prompt, figure.by_rater)
    return " ".join(
        [f"{figure.value:{form}}", *(f"[{i.low:{form}}, {i.high:{form}}]" for i in intervals if i is not None)]
    )


def calibration_table(calibration: Calibration) -> Table:
    """Return a judge's calibration as a table for the terminal."""
    title = f"{calibration.compared} pairs that humans and the judge labelled (only humans: {calibration.only_human}, only the judge: {calibration.only_judge})"
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("", "value", f"{calibration.kappa.level:.0%} interval", "pairs"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, estimate in (
        ("agreement, ties included", calibration.agreement_with_ties),
        ("agreement where both decide", calibration.agreement_without_ties),
        ("Cohen's kappa", calibration.kappa),
        ("ties, humans", calibration.human_ties),
        ("ties, judge", calibration.judge_ties),
        ("judge flips with the order", calibration.flips),
        ("longer wins, humans", calibration.human_longer_wins),
        ("longer wins, judge", calibration.judge_longer_wins),
        ("judge's own answers win, humans", calibration.human_self_wins),
        ("judge's own answers win, judge", calibration.judge_self_wins),
    ):
        if estimate.n:
            interval = f"[{estimate.low:.3f}, {estimate.high:.3f}]"
            table.add_row(name, f"{estimate.value:.3f}", interval, str(estimate.n))
        else:
            table.add_row(name, "not known", "", "0")
    return table
