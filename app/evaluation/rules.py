"""A style: rules that score an answer and edits that move it towards the style, read from JSON.

    {"name": "…", "rules": [{"name": "…", "pattern": "…", "weight": 1.0}], "edits": [{"pattern": "…", "replace": "…"}]}

The score of a text is the sum of the weights of the rules whose Python regex (`re.M`) is found in it; an edit applies
the substitutions in order. A style stands in for a person's taste or for a judge. This module does not know who asks:
it sees texts only, never prompts, models or lengths.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec

from app.errors import DataError


@dataclass(frozen=True, slots=True)
class Rule:
    """One feature of a text and what it is worth."""

    name: str
    pattern: re.Pattern[str]
    weight: float


@dataclass(frozen=True, slots=True)
class Edit:
    """One substitution."""

    pattern: re.Pattern[str]
    replace: str


@dataclass(frozen=True, slots=True)
class Style:
    """A named taste."""

    name: str
    rules: tuple[Rule, ...]
    edits: tuple[Edit, ...] = ()

    def score(self, text: str) -> float:
        """Return the sum of the weights of the rules found in the text, rounded to the same value in any order."""
        return math.fsum(rule.weight for rule in self.rules if rule.pattern.search(text))

    def found(self, text: str) -> tuple[str, ...]:
        """Name the rules found in the text."""
        return tuple(rule.name for rule in self.rules if rule.pattern.search(text))

    def apply_edits(self, text: str) -> str:
        """Apply the substitutions in order."""
        for edit in self.edits:
            text = edit.pattern.sub(edit.replace, text)
        return text


def load_style(place: str) -> Style:
    """Read a style from a path or URI.

    Raises:
        DataError: the file is missing or no JSON, or lists every fault of its content by place.
    """
    try:
        with fsspec.open(place, "rb") as stream:
            tree = json.loads(stream.read())
    except FileNotFoundError:
        msg = f"no style at `{place}`"
        raise DataError(msg) from None
    except (OSError, ValueError) as error:
        msg = f"style `{place}` cannot be read: {error}"
        raise DataError(msg) from None
    return parse_style(tree, place=place)


def parse_style(tree: Any, *, place: str) -> Style:
    """Build a style from plain values; raises DataError that lists every fault by place."""
    faults: list[str] = []
    top = _fields(tree, "style", required=("name", "rules"), optional=("edits",), faults=faults)
    name = _text(top, "name", "name", faults)
    rules = [_rule(entry, f"rules[{i}]", faults) for i, entry in enumerate(_entries(top.get("rules"), "rules", faults))]
    edits = [
        _edit(entry, f"edits[{i}]", faults) for i, entry in enumerate(_entries(top.get("edits", []), "edits", faults))
    ]
    names = [rule.name for rule in rules if rule is not None]
    faults += [
        f"`rules`: the name `{n}` is used more than once" for n in sorted({n for n in names if names.count(n) > 1})
    ]
    if not faults and all(rule is None or rule.weight == 0 for rule in rules):
        faults.append("`rules`: no rule has a weight other than 0, so every answer has the same score")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        msg = f'style `{place}` has {len(faults)} fault(s):\n{lines}\n\nHint: a style is {{"name", "rules": [{{"name", "pattern", "weight"}}], "edits": [{{"pattern", "replace"}}]}}.'
        raise DataError(msg)
    return Style(name, tuple(r for r in rules if r is not None), tuple(e for e in edits if e is not None))


def _rule(entry: Any, place: str, faults: list[str]) -> Rule | None:
    fields = _fields(entry, place, required=("name", "pattern", "weight"), faults=faults)
    name = _text(fields, "name", f"{place}.name", faults)
    pattern = _pattern(fields, f"{place} (`{name}`)" if name else place, faults)
    weight = fields.get("weight")
    if "weight" in fields and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight)
    ):
        faults.append(f"`{place}.weight`: a finite number is needed, found {weight!r}")
        weight = None
    if not name or pattern is None or weight is None:
        return None
    return Rule(name, pattern, float(weight))


def _edit(entry: Any, place: str, faults: list[str]) -> Edit | None:
    fields = _fields(entry, place, required=("pattern", "replace"), faults=faults)
    pattern = _pattern(fields, place, faults)
    replace = fields.get("replace")
    if "replace" in fields and not isinstance(replace, str):
        faults.append(f"`{place}.replace`: text is needed, found {replace!r}")
    if pattern is None or not isinstance(replace, str):
        return None
    try:
        pattern.sub(replace, "")
    except (re.error, IndexError) as error:
        faults.append(f"`{place}.replace`: {replace!r} is no template for its pattern: {error}")
        return None
    return Edit(pattern, replace)


def _pattern(fields: dict[str, Any], place: str, faults: list[str]) -> re.Pattern[str] | None:
    source = _text(fields, "pattern", f"{place}.pattern", faults)
    if not source:
        return None
    try:
        return re.compile(source, re.MULTILINE)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        faults.append(f"{place}: pattern {source!r} is no regular expression{where}: {error.msg}")
        return None


def _text(fields: dict[str, Any], key: str, place: str, faults: list[str]) -> str:
    value = fields.get(key)
    if key in fields and (not isinstance(value, str) or not value):
        faults.append(f"`{place}`: text that is not empty is needed, found {value!r}")
    return value if isinstance(value, str) else ""


def _entries(value: Any, place: str, faults: list[str]) -> list[Any]:
    if isinstance(value, list) and (value or place != "rules"):
        return value
    if value is not None:
        faults.append(f"`{place}`: a list{' with at least one rule' if place == 'rules' else ''} is needed")
    return []


def _fields(
    value: Any, place: str, *, required: Sequence[str], optional: Sequence[str] = (), faults: list[str]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        faults.append(f"`{place}`: an object with {', '.join(required)} is needed, found {type(value).__name__}")
        return {}
    faults += [f"`{place}`: `{key}` is missing" for key in required if key not in value]
    faults += [
        f"`{place}`: unknown key `{key}` (known: {', '.join([*required, *optional])})"
        for key in value
        if key not in {*required, *optional}
    ]
    return value
