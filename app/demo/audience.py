"""A simulated audience: asks, thumbs, regenerates, compares and edits through the gateway's HTTP API, and nothing else.

    ask every prompt once -> know what one is used to -> for each prompt: thumb, regenerate, thumb, compare, edit
      -> where too few prompts got anything to learn from: regenerate more often

It stands for end users in the demo and is labelled `simulated` in everything it sends (origin, subject, event id). A
person's taste is hidden from the product: `StyleTaste` follows a style, `RandomTaste` flips coins. Every decision and
every event id follows from (seed, round, prompt, number of the answer) and from the answers themselves; each answer
and each acknowledged event is written to a journal, so that a run that was killed continues and sends nothing twice.
An answer that was served but not yet in the journal when the run was killed is asked again; nobody judges the first.
This module does not know models, pairs or the ledger.
"""

import asyncio
import hashlib
import itertools
import json
import random
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx

from app.config import CollectSection
from app.errors import DataError, ServiceError, one_of
from app.evaluation.prompts import Prompt, load_prompts
from app.evaluation.rules import Style, load_style

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_PERSONS = 8


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the gateway listens and the key it wants."""

    url: str
    api_key: str
    model: str = "champion"
    timeout_s: float = 300.0
    patience_s: float = 120.0
    """How long a request is retried while the gateway is busy or away."""


@dataclass(frozen=True, slots=True)
class Habits:
    """How the audience behaves."""

    max_answers: int = 3
    """Answers that one prompt gets at most, the first included."""
    more_answers: int = 8
    """The same where `enough` is not reached."""
    enough: int = 100
    """Prompts that should end with a preference: one answer liked and one not, a decided comparison or an edit."""
    gives_up_after: int = 2
    """First answers to a prompt that cannot be judged (cut, empty) before nobody asks it again."""
    compare_share: float = 0.5
    """Share of regenerated answers that are compared with the one before."""
    edit_share: float = 0.75
    """Share of prompts on which the audience edits the first answer that one of its edits makes better."""
    temperature: float = 1.0
    top_p: float = 0.9
    max_tokens: int = 96
    concurrency: int = 16


@dataclass(frozen=True, slots=True)
class Heard:
    """An answer that the audience got; `n` counts the answers to the prompt from 0."""

    prompt_id: str
    n: int
    response_id: str
    text: str
    finish_reason: str
    model: str

    @property
    def valid(self) -> bool:
        """Whether it can be judged: an answer that was cut or is empty is ignored."""
        return self.finish_reason != "length" and bool(self.text.strip())


class Taste(Protocol):
    """What a person thinks of an answer."""

    @property
    def name(self) -> str:
        """Names the taste in the journal."""

    def get_used_to(self, texts: Sequence[str]) -> None:
        """See the first answers to all prompts before judging any."""

    def thumb(self, answer: Heard) -> str | None:
        """Return `up`, `down`, or None for no opinion."""

    def compare(self, left: Heard, right: Heard) -> str:
        """Return `A>B`, `A=B` or `B>A`, where A is `left`."""

    def edit(self, answer: Heard) -> str | None:
        """Return the better text, or None where nothing would be better."""


class StyleTaste:
    """Likes what scores above what it is used to.

    What it is used to is the cut between two scores that separates the first answers best: most even in number and
    widest in score (the largest variance between the two sides, Otsu 1979). So it works for any style: a rare feature,
    a common one, weights of either sign. Where all first answers score the same, only answers that score otherwise are
    thumbed.
    """

    def __init__(self, style: Style) -> None:
        self.style = style
        self._cut = 0.0

    @property
    def name(self) -> str:
        """Name of the style."""
        return self.style.name

    def get_used_to(self, texts: Sequence[str]) -> None:
        """Find the cut between the scores of these texts."""
        scores = sorted(self.style.score(text) for text in texts)
        levels = sorted(set(scores))
        if len(levels) > 1:
            self._cut = max(map(statistics.fmean, itertools.pairwise(levels)), key=partial(_separation, scores))
        elif levels:
            # Nothing to cut: what is exactly usual gets no thumb.
            self._cut = levels[0]

    def thumb(self, answer: Heard) -> str | None:
        """Return `up` above the cut, `down` below."""
        score = self.style.score(answer.text)
        return "up" if score > self._cut else "down" if score < self._cut else None

    def compare(self, left: Heard, right: Heard) -> str:
        """Prefer the higher score; equal scores are a tie."""
        mine, other = self.style.score(left.text), self.style.score(right.text)
        return "A=B" if mine == other else "A>B" if mine > other else "B>A"

    def edit(self, answer: Heard) -> str | None:
        """Apply the style's edits; None where they do not raise the score."""
        edited = self.style.apply_edits(answer.text)
        return edited if edited.strip() and self.style.score(edited) > self.style.score(answer.text) else None


class RandomTaste:
    """Thumbs and comparisons without meaning: seeded coins. It never edits."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def get_used_to(self, texts: Sequence[str]) -> None:
        """See nothing in them."""

    def thumb(self, answer: Heard) -> str | None:
        """Flip a coin."""
        return self._coin("thumb", answer.prompt_id, answer.n).choice(("up", "down"))

    def compare(self, left: Heard, right: Heard) -> str:
        """Flip a coin; every fifth is a tie."""
        return self._coin("compare", left.prompt_id, left.n, right.n).choice(("A>B", "A>B", "A=B", "B>A", "B>A"))

    def edit(self, answer: Heard) -> str | None:  # noqa: ARG002
        """Never edit."""
        return None

    def _coin(self, *place: object) -> random.Random:
        return random.Random(f"{self._seed}/{place}")  # noqa: S311


@dataclass(frozen=True, slots=True)
class AudienceReport:
    """What the audience did in this round, resumed parts included. All of it is simulated."""

    taste: str
    prompts: int
    answers: int
    ignored: dict[str, int]
    """Answers nobody judged, by reason."""
    thumbs_up: int
    thumbs_down: int
    comparisons: int
    ties: int
    edits: int
    models: dict[str, int]
    """Answers by the model that gave them."""

    @property
    def events(self) -> dict[str, int]:
        """Count events by kind."""
        return {"thumb": self.thumbs_up + self.thumbs_down, "comparison": self.comparisons, "edit": self.edits}


def run_audience(
    *,
    gateway_url: str,
    api_key: str,
    section: CollectSection,
    round_id: str,
    journal: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Let the audience of a recipe talk to the gateway and return what it did, as plain values.

    Args:
        gateway_url: where the gateway listens.
        api_key: the key it wants.
        section: taste, prompts and habits.
        round_id: tells rounds apart; the same prompts in another round are asked again.
        journal: JSONL of answers and acknowledged events; made where it is missing.
        on_progress: called with visits so far and visits in all (a prompt is visited twice: asked, then talked about;
            a third time where the round gave too little).

    Raises:
        DataError: prompts or style cannot be read, or the journal is another audience's or damaged.
        ServiceError: the gateway refuses, answers wrongly, or stays away.
    """
    prompts = load_prompts(section.prompts).prompts[: section.max_prompts]
    taste = RandomTaste(section.seed) if section.audience == "random" else StyleTaste(load_style(section.style))
    habits = Habits(
        temperature=section.temperature,
        top_p=section.top_p,
        max_tokens=section.max_tokens,
        concurrency=section.concurrency,
    )
    report = hold_audience(
        Endpoint(gateway_url, api_key),
        prompts,
        taste,
        habits=habits,
        seed=section.seed,
        round_id=round_id,
        journal=journal,
        on_progress=on_progress,
    )
    return {**asdict(report), "events": report.events}


def hold_audience(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    taste: Taste,
    *,
    habits: Habits,
    seed: int,
    round_id: str,
    journal: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> AudienceReport:
    """Let persons of one taste talk to the gateway until every prompt is judged; see `run_audience`."""
    identity = {"taste": taste.name, "seed": seed, "round": round_id}
    with Journal.open(journal, identity) as book:
        audience = _Audience(endpoint, prompts, taste, habits, seed, round_id, book, on_progress)
        asyncio.run(audience.run())
        return _report(taste, prompts, book)


class Journal:
    """What was heard and acknowledged, one JSON object a line; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[tuple[str, int], Heard] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self._stream = path.open("ab")

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> "Journal":
        """Read what is there and be ready to append; raises DataError where it is another audience's or damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as stream:
                stream.truncate(len(whole))
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            found = rows[0]["audience"] if rows else identity
            if found != identity:
                msg = f"`{path}` is the journal of another audience: {found}, not {identity}\n\nHint: choose another round or remove the file."
                raise DataError(msg)
            journal = cls(path)
            for row in rows[1:]:
                journal._remember(row)
        except (ValueError, KeyError, TypeError) as error:
            msg = f"`{path}` is no journal of a simulated audience, or is damaged: {error!r}"
            raise DataError(msg) from None
        if not rows:
            journal._append({"audience": identity})
        return journal

    def __enter__(self) -> "Journal":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._stream.close()

    def hear(self, answer: Heard) -> None:
        """Store an answer."""
        self._append({"answer": asdict(answer)})
        self.answers[answer.prompt_id, answer.n] = answer

    def acknowledge(self, event_id: str, body: dict[str, Any]) -> None:
        """Store an event that the gateway acknowledged."""
        event = {
            "event_id": event_id,
            "kind": body.get("kind", "comparison"),
            "value": body.get("value", body.get("verdict")),
        }
        self._append({"event": event})
        self.events[event_id] = event

    def _remember(self, row: dict[str, Any]) -> None:
        if "answer" in row:
            answer = Heard(**row["answer"])
            self.answers[answer.prompt_id, answer.n] = answer
        else:
            self.events[row["event"]["event_id"]] = row["event"]

    def _append(self, row: dict[str, Any]) -> None:
        self._stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._stream.flush()


@dataclass
class _Audience:
    endpoint: Endpoint
    prompts: Sequence[Prompt]
    taste: Taste
    habits: Habits
    seed: int
    round_id: str
    journal: Journal
    on_progress: Callable[[int, int], None] | None
    visited: int = 0
    visits: int = field(init=False)
    client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.visits = 2 * len(self.prompts)

    async def run(self) -> None:
        headers = {"Authorization": f"Bearer {self.endpoint.api_key}"}
        limits = httpx.Limits(max_connections=self.habits.concurrency)
        async with httpx.AsyncClient(
            base_url=self.endpoint.url, headers=headers, timeout=self.endpoint.timeout_s, limits=limits, trust_env=False
        ) as self.client:
            await self._each(self._ask)
            firsts = (self.journal.answers[prompt.id, 0] for prompt in self.prompts)
            self.taste.get_used_to([answer.text for answer in firsts if answer.valid])
            open_ = await self._each(self._talk)
            if len(self.prompts) - len(open_) < self.habits.enough:
                self.visits += len(open_)
                await self._each(partial(self._talk, limit=self.habits.more_answers), open_)

    async def _each(
        self, visit: Callable[[Prompt], Awaitable[bool]], prompts: Sequence[Prompt] | None = None
    ) -> list[Prompt]:
        """Visit prompts, some at a time; returns those whose visit came to nothing, in their order."""
        prompts = self.prompts if prompts is None else prompts
        came_to: dict[str, bool] = {}
        places = asyncio.Semaphore(self.habits.concurrency)

        async def one(prompt: Prompt) -> None:
            async with places:
                came_to[prompt.id] = await visit(prompt)
            self.visited += 1
            if self.on_progress is not None:
                self.on_progress(self.visited, self.visits)

        try:
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    group.create_task(one(prompt))
        except BaseExceptionGroup as errors:
            raise one_of(errors) from None
        return [prompt for prompt in prompts if not came_to[prompt.id]]

    async def _ask(self, prompt: Prompt) -> bool:
        await self._answer(prompt, 0)
        return True

    async def _talk(self, prompt: Prompt, *, limit: int | None = None) -> bool:
        """Thumb the first answer; regenerate until one was liked and one was not; compare and edit on the way.

        A prompt that is talked about again, with a higher limit, goes the same way as far as it went before.
        Returns whether it came to a preference.
        """
        may_edit = self._chance(prompt, "edit") < self.habits.edit_share
        opinions: set[str] = set()
        preferred, unjudged = False, 0
        previous: Heard | None = None
        for n in range(limit or self.habits.max_answers):
            if previous is None and unjudged == self.habits.gives_up_after:
                break
            answer = await self._answer(prompt, n)
            if not answer.valid:
                unjudged += 1
                continue
            thumb = self.taste.thumb(answer)
            if thumb is not None:
                await self._feedback(prompt, answer, "thumb", thumb)
                opinions.add(thumb)
            if previous is not None and self._chance(prompt, "compare", n) < self.habits.compare_share:
                swapped = self._chance(prompt, "swap", n) < 0.5
                preferred |= await self._compare(prompt, *((answer, previous) if swapped else (previous, answer)))
            if may_edit and (better := self.taste.edit(answer)) is not None:
                await self._feedback(prompt, answer, "edit", better)
                may_edit, preferred = False, True
            previous = answer
            if len(opinions) == 2:
                return True
        return preferred

    def _chance(self, prompt: Prompt, *what: object) -> float:
        """Draw from [0, 1), the same in every attempt at a round."""
        return random.Random(f"{self.seed}/{self.round_id}/{prompt.id}/{what}").random()  # noqa: S311

    async def _answer(self, prompt: Prompt, n: int) -> Heard:
        known = self.journal.answers.get((prompt.id, n))
        if known is not None:
            return known
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": prompt.text}],
            "temperature": self.habits.temperature,
            "top_p": self.habits.top_p,
            "max_tokens": self.habits.max_tokens,
            "seed": int(self._digest("sampling", prompt.id, n)[:7], 16),
            "user": self._subject(prompt),
            "metadata": {
                "conversation_id": f"simulated-{self._digest('conversation', prompt.id)[:16]}",
                "turn": "0",
                "origin": "simulated",
            },
        }
        raw = await self._post("/v1/chat/completions", body, {})
        try:
            choice = raw["choices"][0]
            answer = Heard(
                prompt_id=prompt.id,
                n=n,
                response_id=str(raw["id"]),
                text=choice["message"]["content"] or "",
                finish_reason=str(choice["finish_reason"]),
                model=str(raw["model"]),
            )
        except (KeyError, IndexError, TypeError) as error:
            msg = f"the gateway at `{self.endpoint.url}` gave an answer that is no chat completion: {error!r}"
            raise ServiceError(msg) from None
        self.journal.hear(answer)
        return answer

    async def _feedback(self, prompt: Prompt, answer: Heard, kind: str, value: str) -> None:
        await self._send("/v1/feedback", prompt, {"response_id": answer.response_id, "kind": kind, "value": value})

    async def _compare(self, prompt: Prompt, left: Heard, right: Heard) -> bool:
        """Compare two answers; returns whether one was preferred."""
        shown = [left.response_id, right.response_id]
        body = {
            "response_a": left.response_id,
            "response_b": right.response_id,
            "verdict": self.taste.compare(left, right),
            "shown_order": shown,
        }
        await self._send("/v1/comparisons", prompt, body)
        return body["verdict"] != "A=B"

    async def _send(self, path: str, prompt: Prompt, body: dict[str, Any]) -> None:
        # The responses are part of the id: were the journal lost, new answers would make new events.
        event_id = f"simulated-{self._digest(prompt.id, path, body.get('kind'), body.get('response_id'), body.get('shown_order'))}"
        if event_id in self.journal.events:
            return
        labelled = {**body, "user": self._subject(prompt), "origin": "simulated", "event_id": event_id}
        await self._post(path, labelled, {"Idempotency-Key": event_id})
        self.journal.acknowledge(event_id, body)

    async def _post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        """Send until it is answered; a request that may have arrived is safe to repeat, see `_send`."""
        loop = asyncio.get_running_loop()
        began, pause = loop.time(), 0.2
        while True:
            try:
                response = await self.client.post(path, json=body, headers=headers)
                trouble = f"{response.status_code} {response.text[:300]}"
                if response.is_success:
                    return response.json()
                if response.status_code not in _RETRIED:
                    msg = f"the gateway at `{self.endpoint.url}` refused {path}: {trouble}"
                    raise ServiceError(msg)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            except ValueError as error:
                msg = f"the gateway at `{self.endpoint.url}` answered {path} with no JSON: {error}"
                raise ServiceError(msg) from None
            if loop.time() - began > self.endpoint.patience_s:
                msg = f"the gateway at `{self.endpoint.url}` did not take {path} for {self.endpoint.patience_s:g} s: {trouble}\n\nHint: is `prefloop serve` running? What was acknowledged is kept; run again to continue."
                raise ServiceError(msg)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)

    def _subject(self, prompt: Prompt) -> str:
        return f"simulated-{int(self._digest('person', prompt.id)[:8], 16) % _PERSONS + 1}"

    def _digest(self, *parts: object) -> str:
        text = json.dumps([self.seed, self.round_id, self.taste.name, *parts])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _separation(scores: Sequence[float], cut: float) -> float:
    below, above = [s for s in scores if s <= cut], [s for s in scores if s > cut]
    return len(below) * len(above) * (statistics.fmean(above) - statistics.fmean(below)) ** 2


def _report(taste: Taste, prompts: Sequence[Prompt], journal: Journal) -> AudienceReport:
    answers = journal.answers.values()
    events = Counter(
        (event["kind"], event["value"] if event["kind"] != "edit" else "") for event in journal.events.values()
    )
    return AudienceReport(
        taste=taste.name,
        prompts=len(prompts),
        answers=len(answers),
        ignored=dict(Counter("cut" if a.finish_reason == "length" else "empty" for a in answers if not a.valid)),
        thumbs_up=events["thumb", "up"],
        thumbs_down=events["thumb", "down"],
        comparisons=sum(count for (kind, _), count in events.items() if kind == "comparison"),
        ties=events["comparison", "A=B"],
        edits=events["edit", ""],
        models=dict(Counter(a.model for a in answers)),
    )
