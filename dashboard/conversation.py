"""The state of one chat, without a screen: turns, answers, judgements, and what is sent with the next message.

Knows nothing of Streamlit or HTTP. Blind comparison is decided here: which answer stands left, and what a verdict about
left and right says about answers A and B.
"""

import difflib
import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from app.schemas import Message
from dashboard.service import Answer

TAGS = ("wrong fact", "off topic", "too long", "too short", "style", "unsafe", "refused wrongly")
SideVerdict = Literal["left>>", "left>", "tie", "both_bad", "right>", "right>>"]

_VERDICT_OF_A_LEFT: dict[SideVerdict, str] = {
    "left>>": "A>>B",
    "left>": "A>B",
    "tie": "A=B",
    "both_bad": "both_bad",
    "right>": "B>A",
    "right>>": "B>>A",
}
_SWAPPED = {"A>>B": "B>>A", "A>B": "B>A", "B>A": "A>B", "B>>A": "A>>B"}


@dataclass
class Comparison:
    """Two answers to the same message, side by side. A is the first one; `a_is_left` was drawn at random."""

    other: Answer
    a_is_left: bool
    verdict: str | None = None
    event_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def shuffled(cls, other: Answer) -> "Comparison":
        """Put the two answers in random order."""
        return cls(other, a_is_left=bool(random.SystemRandom().getrandbits(1)))

    def verdict_for(self, side: SideVerdict) -> str:
        """Translate a verdict about left and right into one about A and B."""
        verdict = _VERDICT_OF_A_LEFT[side]
        return verdict if self.a_is_left else _SWAPPED.get(verdict, verdict)


@dataclass
class Turn:
    """A message and its answer, with what was judged about it."""

    prompt: str
    answer: Answer
    thumb: str | None = None
    edit: str | None = None
    editing: bool = False
    reasons_sent: bool = False
    comparison: Comparison | None = None

    @property
    def kept_text(self) -> str:
        """The text that the conversation continues with: the edit, the preferred answer, or the answer."""
        if self.edit is not None:
            return self.edit
        return self.answer.text


@dataclass
class Conversation:
    """The turns so far."""

    conversation_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[Turn] = field(default_factory=list)

    def messages(self, prompt: str, *, turn: int | None = None) -> list[Message]:
        """Return what is sent to ask `prompt` as the given turn (default: the next one)."""
        before = self.turns if turn is None else self.turns[:turn]
        out: list[Message] = []
        for past in before:
            out += [Message("user", past.prompt), Message("assistant", past.kept_text)]
        return [*out, Message("user", prompt)]

    def settle(self, turn: int, verdict: str) -> None:
        """Record the verdict of a turn's comparison; the conversation goes on with the answer that was preferred."""
        comparison = self.turns[turn].comparison
        assert comparison is not None, "nothing is compared"  # noqa: S101
        comparison.verdict = verdict
        if verdict in {"B>A", "B>>A"}:
            kept = self.turns[turn]
            self.turns[turn] = Turn(
                kept.prompt,
                comparison.other,
                comparison=Comparison(kept.answer, not comparison.a_is_left, _SWAPPED[verdict]),
            )


def word_diff(before: str, after: str) -> str:
    """Return the difference of two texts by words, one line for each run of words: `-` taken out, `+` put in."""
    old, new = _words(before), _words(after)
    lines: list[str] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            lines += _marked(" ", old[a:b])
        else:
            lines += _marked("-", old[a:b]) + _marked("+", new[c:d])
    return "\n".join(lines)


def _words(text: str) -> list[str]:
    return re.findall(r"\S+|\n", text)


def _marked(mark: str, words: Sequence[str]) -> list[str]:
    return [f"{mark} {line.strip()}" for line in " ".join(words).split("\n") if line.strip()]
