"""Battle files: who stood against whom on which prompt, and who won.

Two shapes, in CSV, JSONL or a JSON list, each also gzipped:

    left, right, winner                 winner: left | right | tie
    model_a, model_b, winner            Arena-Hard's: model_a | model_b | tie | tie (bothbad)

and with either `prompt` (or `question_id`), `rater` (or `judge`), `weight`, and for style control `left_text` and
`right_text`. Other columns are named, not used. This module does not know how battles are rated.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import fsspec
import numpy as np
from numpy.typing import NDArray

from app.errors import DataError

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
    rows = list(_rows(place))
    if not rows:
        msg = f"`{place}` holds no battles"
        raise DataError(msg)
    columns = rows[0].keys()
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
    for number, row in enumerate(rows, start=1):
        where = f"`{place}` row {number}"
        sides = [_named(row, side, where) for side in (left, right)]
        if sides[0] == sides[1]:
            msg = f"{where}: `{sides[0]}` stands against itself"
            raise DataError(msg)
        if row.get("winner") not in points:
            msg = f"{where}: `winner` is {row.get('winner')!r}, not one of {', '.join(points)}"
            raise DataError(msg)
        for side in sides:
            index.setdefault(side, len(index))
    return Battles(
        models=tuple(index),
        left=np.array([index[str(row[left])] for row in rows], dtype=np.int64),
        right=np.array([index[str(row[right])] for row in rows], dtype=np.int64),
        points=np.array([points[row["winner"]] for row in rows], dtype=np.float64),
        weights=np.array([_weight(row, f"`{place}` row {n}") for n, row in enumerate(rows, start=1)]),
        prompts=_column(rows, prompt, place),
        raters=_column(rows, rater, place),
        texts=tuple((str(row[texts[0]]), str(row[texts[1]])) for row in rows) if texts else None,
        unused=tuple(name for name in columns if name not in used),
    )


def read_answer_texts(places: Sequence[str]) -> dict[tuple[str, str], str]:
    """Read answer files of Arena-Hard, JSONL also gzipped, into (model, prompt) -> text of the last turn.

    Raises:
        DataError: a file cannot be read, or a row has no model, no question id or no answer; names the row.
    """
    texts: dict[tuple[str, str], str] = {}
    for place in places:
        for number, row in enumerate(_rows(place), start=1):
            where = f"`{place}` row {number}"
            model = _named(row, "model" if "model" in row else "model_id", where)
            prompt = _named(row, "uid" if "uid" in row else "question_id", where)
            text = _last_turn(row)
            if text is None:
                msg = f"{where}: no answer in `messages` or `choices`"
                raise DataError(msg)
            texts[model, prompt] = text
    return texts


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
    return Battles(
        battles.models,
        battles.left,
        battles.right,
        battles.points,
        battles.weights,
        battles.prompts,
        battles.raters,
        tuple(joined),
        battles.unused,
    )


def _rows(place: str) -> Iterator[dict[str, Any]]:
    try:
        with fsspec.open(place, "rb", compression="infer") as stream:
            content = stream.read().decode("utf-8-sig")
    except FileNotFoundError:
        msg = f"no file at `{place}`"
        raise DataError(msg) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        msg = f"`{place}` cannot be read: {error}"
        raise DataError(msg) from None
    start = content.lstrip()[:1]
    if start not in ("{", "["):
        yield from csv.DictReader(io.StringIO(content, newline=""))
        return
    lines = [content] if start == "[" else [line for line in content.split("\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            msg = f"`{place}` row {number} is no JSON: {error}"
            raise DataError(msg) from None
        for row in found if isinstance(found, list) else [found]:
            if not isinstance(row, dict):
                msg = f"`{place}` row {number}: an object is needed, found {type(row).__name__}"
                raise DataError(msg)
            yield row


def _column(rows: Sequence[dict[str, Any]], name: str | None, place: str) -> tuple[str, ...] | None:
    if name is None:
        return None
    return tuple(_named(row, name, f"`{place}` row {n}") for n, row in enumerate(rows, start=1))


def _named(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str | int) or not str(value).strip():
        msg = f"{where}: `{name}` must be a name, found {value!r}"
        raise DataError(msg)
    return str(value)


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


def _last_turn(row: dict[str, Any]) -> str | None:
    turns: Any = [m.get("content") for m in row.get("messages") or [] if m.get("role") == "assistant"]
    if not turns and row.get("choices"):
        turns = row["choices"][0].get("turns")
    last = turns[-1] if turns else None
    if isinstance(last, dict):
        last = last.get("answer") if "answer" in last else last.get("content")
    return last if isinstance(last, str) else None
