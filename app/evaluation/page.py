"""The report of an evaluation as one HTML page: verdict, rules, win rates by category, lengths, every judgement.

The page is a file that opens anywhere: no script, nothing fetched, and what models and judges wrote is text, never
markup (a content security policy forbids the rest). The comparisons are filtered by style sheet alone. This module
takes a signed report as it is stored and changes no number of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

from app.evaluation.judged import Judgement

_TEMPLATE: Final = "page.html.j2"
_OUTCOMES: Final = {1: "win", 0: "tie", -1: "loss", None: "none"}
_SIZE: Final = 320
"""Of the scatter, in pixels."""


@dataclass(frozen=True, slots=True)
class _Row:
    """Comparisons of one suite, player, baseline and category."""

    suite: str
    player: str
    baseline: str
    category: str
    wins: int
    ties: int
    losses: int
    none: int

    @property
    def rate(self) -> float | None:
        decided = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / decided if decided else None


@dataclass(frozen=True, slots=True)
class _Point:
    x: float
    y: float
    outcome: str
    title: str


def render_page(report: Mapping[str, Any], judgements: Sequence[Judgement]) -> str:
    """Return the HTML.

    Args:
        report: as it is stored and signed.
        judgements: every comparison behind it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    against_champion = [j for j in judgements if (j.suite, j.baseline) == ("win_rate", "champion")]
    metrics = {metric["name"]: metric for metric in report["metrics"]}
    for suite in report["suites"].values():
        metrics.update({metric["name"]: metric for metric in suite["metrics"]})
    return environment.get_template(_TEMPLATE).render(
        report=report,
        metrics=list(metrics.values()),
        health=report["measurements"]["judge"],
        rows=_by_category(judgements),
        scatter=_scatter(against_champion),
        ticks=_ticks(against_champion),
        size=_SIZE,
        judgements=[(j, _OUTCOMES[j.outcome]) for j in judgements],
    )


def _by_category(judgements: Sequence[Judgement]) -> list[_Row]:
    kinds = dict.fromkeys((j.suite, j.player, j.baseline, j.category) for j in judgements)
    found = []
    for kind in kinds:
        outcomes = [j.outcome for j in judgements if (j.suite, j.player, j.baseline, j.category) == kind]
        found.append(_Row(*kind, *(outcomes.count(outcome) for outcome in _OUTCOMES)))
    return found


def _scatter(judgements: Sequence[Judgement]) -> list[_Point]:
    top = _top(judgements)
    return [
        _Point(
            _place(len(j.other), top),
            _SIZE - _place(len(j.answer), top),
            _OUTCOMES[j.outcome],
            f"{len(j.answer)} and {len(j.other)} characters: {j.request[:80]}",
        )
        for j in judgements
    ]


def _ticks(judgements: Sequence[Judgement]) -> list[tuple[int, float]]:
    top = _top(judgements)
    return [(n, _place(n, top)) for n in (10**e for e in range(1, 7)) if n <= top]


def _top(judgements: Sequence[Judgement]) -> int:
    return max([10, *(len(text) for j in judgements for text in (j.answer, j.other))])


def _place(length: int, top: int) -> float:
    """Return where a length stands on a logarithmic axis, in pixels."""
    return round(_SIZE * math.log1p(length) / math.log1p(top), 1)


def _number(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
