"""Battle files: who stood against whom on which prompt, and who won.

Two shapes, in CSV, JSONL or a JSON list, each also gzipped:

    left, right, winner                 winner: left | right | tie
    model_a, model_b, winner            Arena-Hard's: model_a | model_b | tie | tie (bothbad)

and with either `prompt` (or `question_id`), `rater` (or `judge`), `weight`, and for style control `left_text` and
`right_text`. Other columns are named, not used. This module does not know how battles are rated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.errors import DataError
from app.evaluation.questions import read_answers
from app.evaluation.rows import name_of, read_rows

_SHAPES: Final = (
    ("left", "right", {"left": 1.0, "right": 0.0, "tie": 0.5}),
    (
        "model_a",
        "model_b",
        {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "tie (both bad)": 0.5},
    ),
)
_PROMPT: Final = ("prompt", "question_id")
_RATER: Final = ("rater", "judge")
_TEXTS: Final = ("left_text", "right_text")


@dataclass(frozen=True, slots=True)
class Battles:
    """N battles between K models; where a file names no prompts, every battle is a prompt of its own."""

    models: tuple[str, ...]
    left: NDArray[np.int64]
    """[N] index into `models`."""
    right: NDArray[np.int64]
    points: NDArray[np.float64]
    """[N] of the left side: 1, 0.5 or 0."""
    weights: NDArray[np.float64]
    """[N], above 0."""
    prompts: tuple[str, ...] | None
    """[N] prompt of each battle."""
    raters: tuple[str, ...] | None
    """[N] who judged."""
    texts: tuple[tuple[str, str], ...] | None
    """[N] the two answers."""
    unused: tuple[str, ...] = field(default=())
    """Columns of the file that say nothing here."""


def read_battles(place: str) -> Battles:
    """Read a battle file from a path or URI.

    Raises:
        DataError: the file cannot be read, has no battles or other columns, or a row has an unknown winner, a model
            against itself, or a weight that is not above 0; names the row.
    """
    placed = list(read_rows(place))
    if not placed:
        msg = f"`{place}` holds no battles"
        raise DataError(msg)
    rows = [row for _, row in placed]
    columns = dict.fromkeys(key for row in rows for key in row).keys()
    shape = next((shape for shape in _SHAPES if {*shape[:2], "winner"} <= columns), None)
    if shape is None:
        msg = f"`{place}` has the columns {', '.join(columns)}\n\nHint: `left`, `right`, `winner` are needed, or `model_a`, `model_b`, `winner`."
        raise DataError(msg)
    left, right, points = shape
    prompt = next((name for name in _PROMPT if name in columns), None)
    rater = next((name for name in _RATER if name in columns), None)
    texts = _TEXTS if set(_TEXTS) <= columns else ()
    used = {left, right, "winner", prompt, rater, "weight", *texts}
    index: dict[str, int] = {}
    for where, row in placed:
        sides = [name_of(row, (side,), where) for side in (left, right)]
        if sides[0] == sides[1]:
            msg = f"{where}: `{sides[0]}` stands against itself"
            raise DataError(msg)
        if not isinstance(row.get("winner"), str) or row["winner"] not in points:
            msg = f"{where}: `winner` is {row.get('winner')!r}, not one of {', '.join(points)}"
            raise DataError(msg)
        lacking = [key for key in texts if not isinstance(row.get(key), str)]
        if lacking:
            msg = f"{where}: `{lacking[0]}` must be text, found {row.get(lacking[0])!r}"
            raise DataError(msg)
        for side in sides:
            index.setdefault(side, len(index))
    return Battles(
        models=tuple(index),
        left=np.array([index[str(row[left])] for row in rows], dtype=np.int64),
        right=np.array([index[str(row[right])] for row in rows], dtype=np.int64),
        points=np.array([points[row["winner"]] for row in rows], dtype=np.float64),
        weights=np.array([_weight(row, where) for where, row in placed]),
        prompts=_column(placed, prompt),
        raters=_column(placed, rater),
        texts=tuple((str(row[texts[0]]), str(row[texts[1]])) for row in rows) if texts else None,
        unused=tuple(name for name in columns if name not in used),
    )


def read_answer_texts(places: Sequence[str]) -> dict[tuple[str, str], str]:
    """Read answer files of Arena-Hard, JSONL also gzipped, into (model, prompt) -> text of the last turn.

    Raises:
        DataError: a file cannot be read, holds several models, or a row has no id or no answer; names the row.
    """
    files = [read_answers(place) for place in places]
    return {(file.model, prompt): turns[-1] for file in files for prompt, turns in file.turns.items()}


def with_texts(battles: Battles, texts: Mapping[tuple[str, str], str]) -> Battles:
    """Give every battle its two answers; raises DataError where one is missing."""
    if battles.prompts is None:
        msg = "battles that name no prompts cannot be joined with answers\n\nHint: add a column `prompt`, or `left_text` and `right_text`."
        raise DataError(msg)
    joined = []
    for left, right, prompt in zip(battles.left, battles.right, battles.prompts, strict=True):
        sides = [(battles.models[side], prompt) for side in (left, right)]
        missing = [side for side in sides if side not in texts]
        if missing:
            msg = f"no answer of `{missing[0][0]}` to prompt `{missing[0][1]}` in the answer files"
            raise DataError(msg)
        joined.append((texts[sides[0]], texts[sides[1]]))
    return replace(battles, texts=tuple(joined))


def _column(placed: Sequence[tuple[str, dict[str, Any]]], name: str | None) -> tuple[str, ...] | None:
    return None if name is None else tuple(name_of(row, (name,), where) for where, row in placed)


def _weight(row: dict[str, Any], where: str) -> float:
    value = row.get("weight", 1.0)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        msg = f"{where}: `weight` must be a number above 0, found {value!r}"
        raise DataError(msg)
    return weight
