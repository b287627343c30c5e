"""Answers questions with one model, in batches, and lets the model be replaced while answers are being given.

What waits is generated together, in a thread, and what arrives joins as long as the model stays the same; answers under
way end on the model they began with. Knows nothing of HTTP, of Ray, or of which model should serve.
"""

import asyncio
import hashlib
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from app.errors import ModelError
from app.generation import Completion, GenerationRequest, answer_text, context_window, generate
from app.models import LoadedModel, load_model, render_prompt
from app.schemas import FinishReason, Message
from app.storage import Home
from serving.messages import Answer, Delta, Event, Question, Refusal, Started

_log = logging.getLogger(__name__)
_SMOKE_PROMPT = (Message("user", "Say hello."),)
_SMOKE_TOKENS = 4
_TURNOVER = 16
"""A batch that has been joined by so many times its size ends, so that what it remembers of each question goes."""
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Serving:
    """A model that answers, and the champion's revision that put it there."""

    loaded: LoadedModel
    revision: int


def load_serving(
    home: Home, model_id: str, revision: int, *, dtype: str, device: torch.device | None = None
) -> Serving:
    """Verify and load a model, and try it on one short prompt.

    Raises:
        DataError: the artifact is missing or differs from its manifest.
        ModelError: it cannot be loaded, or gives numbers that are none.
    """
    loaded = load_model(home, model_id, dtype=dtype, device=device)
    prompt = tuple(render_prompt(loaded.tokenizer, _SMOKE_PROMPT, None))
    smoke = generate(loaded, [GenerationRequest(prompt, 0.0, 1.0, _SMOKE_TOKENS)])[0]
    if not all(math.isfinite(logp) for logp in smoke.logps):
        msg = f"model `{model_id}` gives log-probabilities that are no numbers\n\nHint: its training diverged; ship another one."
        raise ModelError(msg)
    return Serving(loaded, revision)


class Engine:
    """Batches questions for the model that is installed."""

    def __init__(self, *, max_batch_size: int, batch_wait_s: float) -> None:
        self._max_batch_size = max_batch_size
        self._batch_wait_s = batch_wait_s
        self._serving: Serving | None = None
        self._waiting: deque[_Ticket] = deque()
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")

    @property
    def serving(self) -> Serving | None:
        """The installed model."""
        return self._serving

    def install(self, serving: Serving) -> None:
        """Let this model answer what is asked from now on; answers under way end on the old one."""
        self._serving = serving

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """Yield `Started`, any number of `Delta` and one `Answer`, or a `Refusal`; closing early frees the row."""
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        ticket = _Ticket(question, asyncio.get_running_loop())
        self._waiting.append(ticket)
        self._arrived.set()
        try:
            while True:
                event = await ticket.events.get()
                yield event
                if isinstance(event, Answer | Refusal):
                    return
        finally:
            ticket.abandoned.set()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            await self._wait_for_company()
            batch = self._take(self._max_batch_size)
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            serving = self._serving
            if serving is None:
                for ticket in batch:
                    ticket.events.put_nowait(Refusal(503, "not_ready", "no model is loaded yet"))
                continue
            try:
                join = partial(self._joining, serving, batch)
                await asyncio.get_running_loop().run_in_executor(
                    self._thread, _run_batch, serving, batch, join, self._max_batch_size
                )
            except Exception as error:  # the worker must outlive whatever a model does  # noqa: BLE001
                _log.error("a batch of %d failed: %s", len(batch), type(error).__name__)
                for ticket in batch:
                    ticket.events.put_nowait(Refusal(500, "generation_failed", "the model failed on this batch"))

    def _take(self, most: int) -> list["_Ticket"]:
        taken: list[_Ticket] = []
        while self._waiting and len(taken) < most:
            ticket = self._waiting.popleft()
            if not ticket.abandoned.is_set():
                taken.append(ticket)
        return taken

    def _joining(self, serving: Serving, batch: list["_Ticket"], most: int) -> list["_Ticket"]:
        """Take what joins a batch under way; called in the generation thread."""
        if len(batch) >= _TURNOVER * self._max_batch_size:
            return []
        joining = self._take(most)
        if self._serving is not serving:
            # Whoever asks after a model was installed is answered by it.
            self._waiting.extendleft(reversed(joining))
            return []
        batch += joining
        return joining

    async def _wait_for_company(self) -> None:
        if len(self._waiting) >= self._max_batch_size or not self._batch_wait_s:
            return
        end = asyncio.get_running_loop().time() + self._batch_wait_s
        while (left := end - asyncio.get_running_loop().time()) > 0 and len(self._waiting) < self._max_batch_size:
            await asyncio.sleep(min(left, 0.01))


@dataclass
class _Ticket:
    question: Question
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    abandoned: threading.Event = field(default_factory=threading.Event)

    def send(self, event: Event) -> None:
        """Hand an event over from the generation thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass
class _GrowingText:
    """Text of a growing list of tokens; characters whose bytes are not complete yet are held back."""

    serving: Serving
    token_ids: list[int] = field(default_factory=list)
    length: int = 0

    def add(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        text = answer_text(self.serving.loaded.tokenizer, self.token_ids)
        if text.endswith(_REPLACEMENT):
            return ""
        new, self.length = text[self.length :], len(text)
        return new


def _run_batch(serving: Serving, batch: list[_Ticket], join: Callable[[int], list[_Ticket]], places: int) -> None:
    rows: list[tuple[_Ticket, GenerationRequest]] = []
    texts: list[_GrowingText] = []

    def admit(tickets: list[_Ticket]) -> list[GenerationRequest]:
        admitted = []
        for ticket in tickets:
            request = _request(serving, ticket.question)
            if isinstance(request, Refusal):
                ticket.send(request)
            else:
                ticket.send(Started(serving.loaded.model_id, serving.revision))
                admitted.append((ticket, request))
        rows.extend(admitted)
        texts.extend(_GrowingText(serving) for _ in admitted)
        return [request for _, request in admitted]

    def on_tokens(row: int, token_id: int) -> None:
        ticket, request = rows[row]
        if not ticket.question.deltas:
            return
        text = texts[row]
        last = token_id in serving.loaded.end_ids or len(text.token_ids) + 1 == request.max_tokens
        if not last and (new := text.add(token_id)):
            ticket.send(Delta(new))

    def on_completion(row: int, completion: Completion) -> None:
        ticket, request = rows[row]
        if completion.finish_reason != FinishReason.UNKNOWN.value:
            ticket.send(_answer(serving, request, completion))

    generate(
        serving.loaded,
        admit(batch),
        on_tokens=on_tokens,
        on_completion=on_completion,
        should_stop=lambda row: rows[row][0].abandoned.is_set(),
        more=lambda most: admit(join(most)),
        places=places,
    )


def _request(serving: Serving, question: Question) -> GenerationRequest | Refusal:
    loaded = serving.loaded
    if question.model_id not in (None, loaded.model_id):
        return Refusal(404, "model_not_found", f"`{question.model_id}` is not served; `{loaded.model_id}` is")
    try:
        prompt = tuple(render_prompt(loaded.tokenizer, question.messages, question.tools))
    except ModelError as error:
        return Refusal(400, "invalid_messages", str(error))
    window = context_window(loaded.model)
    room = question.max_tokens if window is None else window - len(prompt)
    if room < 1:
        message = f"the prompt has {len(prompt)} tokens, the model's context holds {window}"
        return Refusal(400, "context_length_exceeded", message)
    return GenerationRequest(
        prompt, question.temperature, question.top_p, min(question.max_tokens, room), question.seed
    )


def _answer(serving: Serving, request: GenerationRequest, completion: Completion) -> Answer:
    prompt = ",".join(map(str, request.prompt_ids))
    return Answer(
        text=completion.text,
        token_ids=completion.token_ids,
        tokens=tuple(str(serving.loaded.tokenizer.decode([token])) for token in completion.token_ids),
        logps=completion.logps,
        finish_reason=completion.finish_reason,
        prompt_tokens=len(request.prompt_ids),
        prompt_digest=hashlib.sha256(prompt.encode()).hexdigest(),
        template_digest=serving.loaded.template_digest,
    )
