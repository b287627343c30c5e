"""What readers of files and of feedback hand over: rows that may train, and rows that may not, with the reason.

Every row that was read is one or the other, so that counts add up. This module knows no file format and no signal.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

from app.schemas import Message, Pair, Response


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that may train, and where it stood."""

    pair: Pair
    place: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that does not train: one row of the quarantine. `raw` is what was read, as far as it can be written."""

    place: str
    reason: str
    detail: str
    raw: str

    def to_row(self) -> dict[str, Any]:
        """Return the Parquet row."""
        return {
            "place": storable(self.place),
            "reason": self.reason,
            "detail": storable(self.detail),
            "raw": storable(self.raw),
        }


def storable(text: str) -> str:
    """Return text that Parquet can hold: lone surrogates become backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_unstorable(text: str) -> bool:
    r"""Tell whether text holds NUL or a lone surrogate, which databases and tokenizers refuse."""
    return "\x00" in text or any("\ud800" <= c <= "\udfff" for c in text)


def folded(text: str) -> str:
    """Return text as it counts for sameness: NFC, with runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def answer_key(response: Response) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return what makes two answers the same: folded text and tool calls."""
    return folded(response.content), tuple((c.name, c.arguments) for c in response.tool_calls)


def texts(messages: tuple[Message, ...], *responses: Response | None) -> list[str]:
    """List every text of a prompt and its answers."""
    found: list[str | None] = []
    for message in messages:
        found += [message.role, message.content, message.name, message.tool_call_id]
    calls = [c for part in (*messages, *responses) if part is not None for c in part.tool_calls]
    for call in calls:
        found += [call.id, call.type, call.name, call.arguments]
    found += [r.content for r in responses if r is not None]
    return [text for text in found if text is not None]
