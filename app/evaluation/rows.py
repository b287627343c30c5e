"""Rows of a file that somebody gave: JSONL, a JSON list or CSV, also gzipped, from a path or URI, each with its place.

This module does not know what the rows mean.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import fsspec

from app.errors import DataError


def read_rows(place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of a file: JSONL and JSON lists by their first character, CSV otherwise.

    `where` names file and line, or row of a list, for messages. Blank lines are passed over.

    Raises:
        DataError: the file is missing or not UTF-8, a line is no JSON object, or CSV has a row of another length.
    """
    content = _text(place)
    start = content.lstrip()[:1]
    if start == "[" and place.removesuffix(".gz").endswith(".json"):
        yield from _listed(place, content)
    elif start in ("{", "["):
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                where = f"`{place}` line {number}"
                yield where, _object(_json(line, where), where)
    else:
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                msg = f"`{place}` line {reader.line_num} is no CSV: {error}"
                raise DataError(msg) from None
            if row is None:
                return
            where = f"`{place}` line {reader.line_num}"
            if None in row or None in row.values():
                msg = f"{where} has another number of fields than the header, which names {', '.join(reader.fieldnames or ())}"
                raise DataError(msg)
            yield where, row


def name_of(row: dict[str, Any], keys: tuple[str, ...], where: str) -> str:
    """Return the first of these fields that the row has, as a name; raises DataError where it has none or it is empty."""
    key = next((key for key in keys if key in row), keys[0])
    value = row.get(key)
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        msg = f"{where}: `{key}` must be a name, found {value!r}"
        raise DataError(msg)
    return str(value)


def _text(place: str) -> str:
    try:
        with fsspec.open(place, "rb", compression="infer") as stream:
            return str(stream.read().decode("utf-8-sig"))
    except FileNotFoundError:
        msg = f"no file at `{place}`"
    except (OSError, EOFError, UnicodeDecodeError) as error:
        msg = f"`{place}` cannot be read: {error}"
    raise DataError(msg)


def _listed(place: str, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(_json(content, f"`{place}`"), start=1):
        where = f"`{place}` row {number}"
        yield where, _object(row, where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        msg = f"{where} is no JSON: {error}"
        raise DataError(msg) from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        msg = f"{where}: an object is needed, found {type(row).__name__}"
        raise DataError(msg)
    return row
