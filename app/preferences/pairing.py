"""Feedback becomes pairs: pure functions of the event log and the `pairs` section of a recipe.

    thumbs        same prompt: every answer voted up beats every answer voted down; without an opposite: unpaired
    edits         the edited text beats the original
    comparisons   the better answer beats the worse; both bad: two unpaired negatives

A regenerated answer needs no rule of its own: a thumb down on one answer and a thumb up on the other share a prompt.
Answers cut by the token limit are invalid: they neither win nor lose. Every event is behind a candidate or rejected
with a reason, never both. This module does not know the ledger, duplicates, caps or splits.
"""

import difflib
import hashlib
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, TypeVar

from app.config import PairSection
from app.preferences.candidates import Candidate, Rejection, answer_key, folded, is_unstorable, texts
from app.schemas import FinishReason, Message, Pair, Response, Source, canonical_json, prompt_key

_BETTER_IS_FIRST: Final = ("A>>B", "A>B")
_BETTER_IS_SECOND: Final = ("B>>A", "B>A")
_CROSSES_PER_CAP: Final = 8
_ALIGNED: Final = 500 * 500
_TOKEN: Final = re.compile(r"\w+|\W")

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of the log, with the prompt that it answers."""

    response_id: str
    prompt: tuple[Message, ...]
    tools: str | None
    response: Response

    @property
    def prompt_key(self) -> str:
        """Answers to the same prompt share it."""
        return prompt_key(self.prompt, self.tools)


@dataclass(frozen=True, slots=True)
class Event:
    """A judgement of the log; see `app.ledger.FeedbackRow`."""

    event_id: str
    response_id: str
    kind: str
    value: str
    revision: int
    created_at: datetime
    other_response_id: str | None = None
    subject: str | None = None
    origin: str = "user"


class EditClass(StrEnum):
    """How much an edit changed."""

    IDENTICAL = "identical"
    WHITESPACE = "whitespace"
    COSMETIC = "cosmetic"
    SUBSTANTIVE = "substantive"
    REWRITE = "rewrite"


@dataclass(frozen=True)
class PairingReport:
    """What the log held and what became of it."""

    responses: int
    events: Mapping[str, int]
    """Events by kind."""
    simulated_events: int
    """Events of a simulated audience, of all kinds."""
    pairs: Mapping[str, int]
    """Candidate pairs by source."""
    unpaired: Mapping[str, int]
    """Candidate unpaired rows by label, `true` and `false`."""
    edit_classes: Mapping[str, int]
    dropped: Mapping[str, int]
    """Events behind no candidate, by reason."""


@dataclass(frozen=True)
class Pairing:
    """Candidates without cluster and split, in a fixed order, and the events that gave none."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    report: PairingReport


def pair_events(answers: Iterable[Answer], events: Iterable[Event], section: PairSection) -> Pairing:
    """Turn the events of a log into candidates; the order of either does not matter."""
    log = _Log({a.response_id: a for a in answers})
    everything = sorted(events, key=lambda e: e.event_id)
    valid = [e for e in _latest(everything, log) if _is_usable(e, log)]
    by_kind: dict[str, list[Event]] = defaultdict(list)
    for event in valid:
        by_kind[event.kind].append(event)
    classes: Counter[str] = Counter()
    _thumbs(by_kind.pop("thumb", []), log, section)
    _edits(by_kind.pop("edit", []), log, section, classes)
    _comparisons(by_kind.pop("comparison", []), log)
    for kind, unused in by_kind.items():
        for event in unused:
            log.reject(event, kind, f"a {kind} gives no pair")
    used = {i for c in log.candidates for i in c.pair.event_ids}
    rejected = [r.place for r in log.rejections]
    assert len(used) + len(rejected) == len(everything), "events were lost"  # noqa: S101
    pairs = [c.pair for c in log.candidates]
    return Pairing(
        candidates=tuple(sorted(log.candidates, key=lambda c: (c.place, c.pair.pair_id))),
        rejections=tuple(sorted(log.rejections, key=lambda r: r.place)),
        report=PairingReport(
            responses=len(log.answers),
            events=_counted(e.kind for e in everything),
            simulated_events=sum(e.origin == "simulated" for e in everything),
            pairs=_counted(p.source for p in pairs if p.label is None),
            unpaired=_counted(str(p.label).lower() for p in pairs if p.label is not None),
            edit_classes=dict(sorted(classes.items())),
            dropped=_counted(r.reason for r in log.rejections),
        ),
    )


def classify_edit(original: str, edited: str, *, cosmetic: float, rewrite: float) -> EditClass:
    """Return the class of an edit.

    Args:
        original: the answer as it was served.
        edited: the text of the user.
        cosmetic: edits at least this similar are cosmetic.
        rewrite: edits less similar than this are rewrites.
    """
    before, after = (unicodedata.normalize("NFC", text) for text in (original, edited))
    if before == after:
        return EditClass.IDENTICAL
    if folded(before) == folded(after):
        return EditClass.WHITESPACE
    similarity = _similarity(before, after)
    if similarity < rewrite:
        return EditClass.REWRITE
    return EditClass.COSMETIC if similarity >= cosmetic else EditClass.SUBSTANTIVE


def subject_hash(subject: str | None) -> str | None:
    """Return the pseudonym under which a subject appears in a snapshot."""
    return (
        None
        if subject is None
        else hashlib.sha256(f"subject/{subject}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    )


@dataclass
class _Log:
    answers: dict[str, Answer]
    candidates: list[Candidate] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)

    def reject(self, event: Event, reason: str, detail: str) -> None:
        raw = canonical_json([event.event_id, event.response_id, event.other_response_id, event.kind, event.value])
        self.rejections.append(Rejection(f"event {event.event_id}", reason, detail, raw))

    def add(
        self,
        events: Sequence[Event],
        chosen: Answer | None,
        rejected: Answer | None,
        source: Source,
        *,
        edited: str | None = None,
    ) -> None:
        """Add a row; `edited` replaces the text of `chosen`, and an unpaired row has one answer."""
        sides = [a for a in (chosen, rejected) if a is not None]
        better = None if chosen is None else chosen.response
        if better is not None and edited is not None:
            better = Response(edited, FinishReason.STOP, tool_calls=better.tool_calls)
        subjects = {e.subject for e in events}
        event_ids = tuple(sorted(e.event_id for e in events))
        pair = Pair(
            prompt=sides[0].prompt,
            chosen=better,
            rejected=None if rejected is None else rejected.response,
            source=source.value,
            split="",
            cluster="",
            label=None if len(sides) == 2 else chosen is not None,
            tools=sides[0].tools,
            response_ids=tuple(sorted({a.response_id for a in sides})),
            event_ids=event_ids,
            subject=subject_hash(subjects.pop()) if len(subjects) == 1 else None,
            simulated=any(e.origin == "simulated" for e in events),
            created_at=max(e.created_at for e in events),
        )
        self.candidates.append(Candidate(pair, f"event {', '.join(event_ids)}"))


def _latest(events: Iterable[Event], log: _Log) -> list[Event]:
    """Keep what each subject said last about the same thing; who gave no subject cannot revise."""
    revisions = _last_of(
        events,
        lambda e: (e.kind, e.response_id, e.other_response_id, e.subject or (e.event_id,)),
        lambda e: (e.revision, e.created_at, e.event_id),
        log,
    )
    # The same two answers may be shown to a subject in either order.
    return _last_of(
        revisions,
        lambda e: (e.kind, frozenset((e.response_id, e.other_response_id)), e.subject or (e.event_id,)),
        lambda e: (e.created_at, e.event_id),
        log,
    )


def _last_of(
    events: Iterable[Event], subject: Callable[[Event], object], order: Callable[[Event], tuple[object, ...]], log: _Log
) -> list[Event]:
    groups: dict[object, list[Event]] = defaultdict(list)
    for event in events:
        groups[subject(event)].append(event)
    last = []
    for group in groups.values():
        *earlier, newest = sorted(group, key=order)
        last.append(newest)
        for event in earlier:
            log.reject(event, "superseded", f"event {newest.event_id} revises it")
    return last


def _is_usable(event: Event, log: _Log) -> bool:
    for response_id in filter(None, (event.response_id, event.other_response_id)):
        answer = log.answers.get(response_id)
        if answer is None:
            log.reject(event, "unknown_response", f"response {response_id} is not in this log")
            return False
        if answer.response.finish_reason == FinishReason.LENGTH:
            log.reject(event, "cut_by_length", f"response {response_id} was cut by the token limit")
            return False
        if not answer.response.content.strip() and not answer.response.tool_calls:
            log.reject(event, "empty_response", f"response {response_id} has no text")
            return False
        if any(map(is_unstorable, (event.value, *texts(answer.prompt, answer.response)))):
            log.reject(event, "nul_or_surrogate", f"response {response_id} or the event holds a NUL or lone surrogate")
            return False
    return True


def _thumbs(events: Sequence[Event], log: _Log, section: PairSection) -> None:
    votes: dict[str, dict[object, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        answer = log.answers[event.response_id]
        votes[answer.prompt_key][answer_key(answer.response)].append(event)
    for by_answer in votes.values():
        ups: list[tuple[Answer, list[Event]]] = []
        downs: list[tuple[Answer, list[Event]]] = []
        for cast in by_answer.values():
            up = [e for e in cast if e.value == "up"]
            down = [e for e in cast if e.value == "down"]
            if up and down and abs(len(up) - len(down)) < section.thumb_margin:
                for event in cast:
                    log.reject(event, "disputed", f"{len(up)} up, {len(down)} down on the same answer")
                continue
            won, lost = (up, down) if len(up) > len(down) else (down, up)
            for event in lost:
                log.reject(event, "outvoted", f"{len(up)} up, {len(down)} down on the same answer")
            answer = log.answers[min(e.response_id for e in won)]
            (ups if won is up else downs).append((answer, won))
        for sign in (ups, downs):
            sign.sort(key=lambda vote: (vote[0].response.model_id or "", vote[0].response_id))
        if ups and downs:
            crosses = max(len(ups), len(downs), _CROSSES_PER_CAP * section.max_pairs_per_prompt)
            for (liked, for_it), (disliked, against) in itertools.islice(_crossed(ups, downs), crosses):
                log.add([*for_it, *against], liked, disliked, Source.THUMBS)
            continue
        for answer, won in ups:
            log.add(won, answer, None, Source.THUMBS)
        for answer, won in downs:
            log.add(won, None, answer, Source.THUMBS)


def _crossed(left: Sequence[Item], right: Sequence[Item]) -> Iterator[tuple[Item, Item]]:
    """Yield every couple once, such that the first `max(len(left), len(right))` hold every item."""
    if len(left) < len(right):
        yield from ((one, other) for other, one in _crossed(right, left))
        return
    for shift in range(len(right)):
        for i, item in enumerate(left):
            yield item, right[(i + shift) % len(right)]


def _edits(events: Sequence[Event], log: _Log, section: PairSection, classes: Counter[str]) -> None:
    for event in events:
        original = log.answers[event.response_id]
        found = classify_edit(
            original.response.content,
            event.value,
            cosmetic=section.edit_cosmetic_similarity,
            rewrite=section.edit_rewrite_similarity,
        )
        classes[found.value] += 1
        if found in (EditClass.IDENTICAL, EditClass.WHITESPACE, EditClass.REWRITE):
            log.reject(event, f"edit_{found}", f"the edit of response {event.response_id} is of class {found}")
        else:
            log.add([event], original, original, Source.EDIT, edited=event.value)


def _comparisons(events: Sequence[Event], log: _Log) -> None:
    contests: dict[tuple[str, frozenset[object]], dict[object, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        first, second = _compared(event, log)
        if first.prompt_key != second.prompt_key:
            log.reject(event, "different_prompts", "the two answers have different prompts")
        elif answer_key(first.response) == answer_key(second.response):
            log.reject(event, "identical", "the two answers are the same, white space aside")
        elif event.value == "both_bad":
            for answer in (first, second):
                log.add([event], None, answer, Source.COMPARISON)
        elif event.value in _BETTER_IS_FIRST or event.value in _BETTER_IS_SECOND:
            keys = answer_key(first.response), answer_key(second.response)
            winner = keys[0] if event.value in _BETTER_IS_FIRST else keys[1]
            contests[first.prompt_key, frozenset(keys)][winner].append(event)
        else:
            log.reject(event, "tie", "the two answers are equally good")
    for cast in contests.values():
        *others, won = sorted(cast.values(), key=len)
        lost = list(itertools.chain(*others))
        shown = f"{len(won)} against {len(lost)} on the same two answers"
        if len(lost) == len(won):
            for event in (*won, *lost):
                log.reject(event, "disputed", shown)
            continue
        for event in lost:
            log.reject(event, "outvoted", shown)
        # The same texts may have been served more than once: the first event's answers stand for all.
        better, worse = _compared(min(won, key=lambda e: e.event_id), log)
        if min(won, key=lambda e: e.event_id).value in _BETTER_IS_SECOND:
            better, worse = worse, better
        log.add(won, better, worse, Source.COMPARISON)


def _compared(event: Event, log: _Log) -> tuple[Answer, Answer]:
    assert event.other_response_id is not None  # noqa: S101  the ledger refuses a comparison without it
    return log.answers[event.response_id], log.answers[event.other_response_id]


def _similarity(before: str, after: str) -> float:
    """Return the share of characters that match, 0 to 1."""
    start = _shared_start(before, after)
    end = _shared_start(before[start:][::-1], after[start:][::-1])
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    if len(old) * len(new) <= _ALIGNED:
        matched = sum(m.size for m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks())
    else:
        # Aligning characters takes hours on long answers that repeat themselves; there, words in common tell as much.
        shared = Counter(_TOKEN.findall(old)) & Counter(_TOKEN.findall(new))
        matched = sum(len(token) * n for token, n in shared.items())
    return 2 * (start + end + matched) / (len(before) + len(after))


def _shared_start(left: str, right: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda couple: couple[0] == couple[1], zip(left, right, strict=False)))


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
