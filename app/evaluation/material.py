"""What a recipe names to measure on, read before any model is loaded: a fault shows at once and not after an hour.

This module knows files only, no model, no judge's reply and no ledger.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import fsspec

from app.config import EvaluateSection
from app.errors import DataError
from app.evaluation.battery import NullModelSuite, Suite, WinRateSuite, build_battery
from app.evaluation.judge_prompts import prompts_digest
from app.evaluation.judged import NULL_ANSWERS
from app.evaluation.judges import EndpointJudge
from app.evaluation.prompts import NEAR_DUPLICATE, load_prompts
from app.evaluation.questions import Question
from app.evaluation.rules import Style, load_style
from app.evaluation.suites import GoldenCase, load_golden
from app.near_duplicates import cluster_texts

PROMPTS: Final = "prompts"
GOLDEN: Final = "golden"


@dataclass(frozen=True)
class Material:
    """What is asked, and who judges where that is a style or an endpoint."""

    prompts: tuple[Question, ...]
    style: Style | None
    judge: EndpointJudge | None
    suites: tuple[Suite, ...]
    golden: tuple[GoldenCase, ...]
    neutral_text: str | None
    places: Mapping[str, str]
    """By name of a set of questions its file."""

    def set_of(self, suite: Suite) -> str:
        """Name the set of questions that a suite asks: the recipe's own prompts, which every model answers, or its own."""
        return PROMPTS if suite.name in (WinRateSuite.name, NullModelSuite.name) else suite.name

    @property
    def content(self) -> list[Any]:
        """Everything that a verdict depends on, as plain values."""
        return [
            [[q.id, q.cluster, *q.turns] for q in self.prompts],
            None if self.style is None else [[r.name, r.pattern.pattern, r.weight] for r in self.style.rules],
            None if self.judge is None else [*self.judge.settings, prompts_digest(), NULL_ANSWERS],
            [repr(suite) for suite in self.suites],
            # `repr` of a long pattern ends after two hundred characters.
            [
                [
                    c.id,
                    c.prompt,
                    *([p.pattern for p in side] for side in (c.must, c.must_not)),
                    c.exact,
                    c.judge,
                    c.must_pass,
                ]
                for c in self.golden
            ],
            self.neutral_text,
        ]


def read_material(section: EvaluateSection) -> Material:
    """Read everything that an evaluation needs beside models.

    Raises:
        DataError: something cannot be read, sealed prompts stand in `evaluate.prompts` as well, or a golden case wants
            a judge that the recipe has not.
        RecipeError: the judge's key is not in the environment.
    """
    if section.sealed is not None:
        require_apart(section.prompts, section.sealed)
    prompts = tuple(
        Question(prompt.id, prompt.cluster, "", (prompt.text,))
        for prompt in load_prompts(section.prompts).prompts[: section.max_prompts]
    )
    battery = tuple(build_battery(section, prompts))
    golden = () if section.golden is None else tuple(load_golden(section.golden))
    wants_judge = [case.id for case in golden if case.judge is not None]
    if section.judge is None and wants_judge:
        msg = f"the golden case `{wants_judge[0]}` in `{section.golden}` wants a judge, and the recipe has none\n\nHint: add evaluate.judge, or check it by patterns."
        raise DataError(msg)
    places = {PROMPTS: section.prompts, **({} if section.golden is None else {GOLDEN: section.golden})}
    for name in ("arena_hard", "mt_bench", "alpaca", "refusal"):
        suite = getattr(section, name)
        if suite is not None:
            places[name] = suite.questions
    return Material(
        prompts=prompts,
        style=None if section.judge_rules is None else load_style(section.judge_rules),
        judge=None if section.judge is None else EndpointJudge(section.judge),
        suites=battery,
        golden=golden,
        neutral_text=None if section.neutral_text is None else _text(section.neutral_text),
        places=places,
    )


def file_digests(material: Material) -> dict[str, list[str]]:
    """Return by sha256 of its file the names of the sets in it: what is called otherwise is the same set."""
    found: dict[str, list[str]] = {}
    for name, place in material.places.items():
        with fsspec.open(place, "rb") as stream:
            found.setdefault(hashlib.sha256(stream.read()).hexdigest(), []).append(name)
    return found


def _text(place: str) -> str:
    try:
        with fsspec.open(place, "rb") as stream:
            text: str = stream.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"neutral text `{place}` cannot be read: {error}"
        raise DataError(msg) from None
    return text


def require_apart(prompts: str, sealed: str) -> None:
    """Refuse sealed prompts that every evaluation sees, in these words or nearly; raises DataError."""
    seen, kept = load_prompts(prompts).prompts, load_prompts(sealed).prompts
    found = cluster_texts([p.text for p in (*seen, *kept)], threshold=NEAR_DUPLICATE)
    known = set(found[: len(seen)])
    twice = [prompt for prompt, near in zip(kept, found[len(seen) :], strict=True) if near in known]
    if twice:
        msg = f"{len(twice)} of the {len(kept)} sealed prompts in `{sealed}` stand in `{prompts}` as well, or nearly so; the first is its `{twice[0].id}`\n\nHint: sealed prompts are for `ship` alone: take them out of one of the two files."
        raise DataError(msg)
