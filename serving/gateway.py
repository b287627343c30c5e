"""The HTTP API: OpenAI-compatible chat completions, models, feedback and comparisons.

    POST /v1/chat/completions     an answer, whole or as server-sent events
    POST /v1/feedback             a judgement of one answer
    POST /v1/comparisons          which of two answers is better
    GET  /v1/models               what answers now
    GET  /v1/admin/status         what every replica serves
    GET  /healthz                 the only path without a key

An answer is in the ledger before its last byte is sent, and feedback is acknowledged after its commit. Errors have
OpenAI's shape. Nothing that users write is logged. Knows neither models nor Ray: whoever answers is an `Answerer`.
"""

import asyncio
import hmac
import json
import logging
import math
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from app.errors import DataError, LedgerError
from app.ledger import VERDICTS, EventConflict, ResponseRow, UnknownResponse, now
from app.schemas import Message, canonical_json, prompt_key
from serving.messages import Answer, Busy, Delta, Event, Question, Refusal, ReplicaStatus, Started, Unavailable
from serving.recorder import Recorder

MAX_BODY_BYTES = 256 * 1024
CHAMPION = "champion"
"""Model name by which a client asks for whatever is shipped."""
_ARM = "champion"
_RETRY_AFTER_S = 5
_STATUS_AGE_S = 1.0
_OPEN_PATHS = frozenset({"/healthz"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What pydantic adds to a place beside the field's names: the body itself, and the member of a union.
_SCHEMA_PART = re.compile(r"^(body|str|float)$|\[")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_log = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Answerer(Protocol):
    """Whoever answers questions behind the gateway."""

    def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer; raises Busy or Unavailable before the first. Closing it stops the work."""

    async def status(self) -> list[ReplicaStatus]:
        """Return the status of every replica; raises Unavailable."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_tokens: int


def _clean(text: str) -> str:
    if "\x00" in text:
        msg = "text must not hold NUL characters"
        raise ValueError(msg)
    if _SURROGATE.search(text):
        msg = "text must be valid Unicode (it holds half of a surrogate pair)"
        raise ValueError(msg)
    return text


def _clean_tree(value: Any) -> Any:
    if isinstance(value, str):
        _clean(value)
    elif isinstance(value, float) and not math.isfinite(value):
        msg = "numbers must be finite"
        raise ValueError(msg)
    elif isinstance(value, dict):
        for key, item in value.items():
            _clean(key)
            _clean_tree(item)
    elif isinstance(value, list):
        for item in value:
            _clean_tree(item)
    return value


def _must_be_neutral(*allowed: Any) -> BeforeValidator:
    """Accept an OpenAI field that this service does not implement, as long as it asks for nothing."""

    def check(value: Any) -> None:
        if value is not None and value not in allowed:
            msg = "this field is not supported; leave it out"
            raise ValueError(msg)

    return BeforeValidator(check)


Text = Annotated[str, AfterValidator(_clean)]
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_clean)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_clean_tree)]
Unset = Annotated[None, _must_be_neutral()]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TextPart(_Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class FunctionCall(_Body):
    """Name and JSON arguments of a call."""

    name: Name
    arguments: Text


class ToolCallIn(_Body):
    """A tool call of an earlier answer."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: Name | None = None
    refusal: Unset = None
    audio: Unset = None
    function_call: Unset = None
    annotations: Annotated[None, _must_be_neutral([])] = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            msg = f"a {self.role} message needs `content`"
            raise ValueError(msg)
        return self

    def message(self) -> Message:
        """Return the message as it is stored and rendered; the parts of a text are joined."""
        raw = self.model_dump(include={"role", "name", "tool_calls", "tool_call_id"}, exclude_none=True)
        parts = self.content
        raw["content"] = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        return Message.from_openai(raw)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatMetadata(_Body):
    """Where an answer belongs (OpenAI's free `metadata`, with the keys that mean something here)."""

    conversation_id: Name | None = None
    turn: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    origin: Literal["served", "simulated"] = "served"


class ChatRequest(_Body):
    """Body of `/v1/chat/completions`; what OpenAI knows and this service does not must be left out or neutral."""

    model: Name = CHAMPION
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    tools: Annotated[list[JsonObject], Field(max_length=128)] | None = None
    tool_choice: Literal["auto"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Name | None = None
    metadata: ChatMetadata | None = None
    logprobs: bool | None = None
    n: Annotated[None, _must_be_neutral(1)] = None
    top_logprobs: Annotated[None, _must_be_neutral(0)] = None
    stop: Annotated[None, _must_be_neutral([])] = None
    presence_penalty: Annotated[None, _must_be_neutral(0)] = None
    frequency_penalty: Annotated[None, _must_be_neutral(0)] = None
    logit_bias: Annotated[None, _must_be_neutral({})] = None
    response_format: Annotated[None, _must_be_neutral({"type": "text"})] = None
    parallel_tool_calls: Annotated[None, _must_be_neutral(True, False)] = None
    store: Annotated[None, _must_be_neutral(False)] = None
    service_tier: Annotated[None, _must_be_neutral("auto", "default")] = None
    modalities: Annotated[None, _must_be_neutral(["text"])] = None
    functions: Unset = None
    function_call: Unset = None
    audio: Unset = None
    prediction: Unset = None
    reasoning_effort: Unset = None
    verbosity: Unset = None
    web_search_options: Unset = None
    safety_identifier: Unset = None
    prompt_cache_key: Unset = None
    prompt_cache_retention: Unset = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            msg = "give `max_tokens` or `max_completion_tokens`, not both"
            raise ValueError(msg)
        if self.stream_options is not None and not self.stream:
            msg = "`stream_options` needs `stream: true`"
            raise ValueError(msg)
        if self.logprobs and self.stream:
            msg = "`logprobs` is not supported in a stream"
            raise ValueError(msg)
        return self


class FeedbackRequest(_Body):
    """Body of `/v1/feedback`: a thumb (up, down), an edit (the better text) or a rating (a number)."""

    response_id: Name
    kind: Literal["thumb", "edit", "rating"]
    value: Annotated[Text, Field(max_length=MAX_BODY_BYTES)] | Finite
    tags: Annotated[list[Name], Field(max_length=32)] = []
    comment: Text | None = None
    user: Name | None = None
    origin: Literal["user", "simulated"] = "user"
    event_id: Name | None = None

    @model_validator(mode="after")
    def _fits(self) -> "FeedbackRequest":
        if self.kind == "rating":
            try:
                finite = math.isfinite(float(self.value))
            except ValueError:
                finite = False
            if not finite:
                msg = "a rating is a finite number"
                raise ValueError(msg)
        elif not isinstance(self.value, str):
            msg = f"the value of a {self.kind} is text"
            raise ValueError(msg)
        return self


class ComparisonRequest(_Body):
    """Body of `/v1/comparisons`; the verdict speaks of A = `response_a` and B = `response_b`."""

    response_a: Name
    response_b: Name
    verdict: Literal["A>>B", "A>B", "A=B", "both_bad", "B>A", "B>>A"]
    shown_order: Annotated[list[Name], Field(min_length=2, max_length=2)] | None = None
    tags: Annotated[list[Name], Field(max_length=32)] = []
    comment: Text | None = None
    user: Name | None = None
    origin: Literal["user", "simulated"] = "user"
    event_id: Name | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ComparisonRequest":
        answers = {self.response_a, self.response_b}
        if len(answers) != 2:
            msg = "`response_a` and `response_b` are the same answer"
            raise ValueError(msg)
        if self.shown_order is not None and set(self.shown_order) != answers:
            msg = "`shown_order` must name both answers, from left to right"
            raise ValueError(msg)
        return self


class ApiError(Exception):
    """An error that is told to the client in OpenAI's shape."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kinds = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def create_app(answerer: Answerer, recorder: Recorder, *, key: str, deployment: str, limits: Limits) -> FastAPI:
    """Build the application.

    Args:
        answerer: who answers.
        recorder: where answers and feedback are kept.
        key: bearer key that every request but `/healthz` must carry.
        deployment: name under which answers are recorded.
        limits: what a request may ask for.
    """
    app = FastAPI(title="prefloop", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_middleware(_Guard, key=key)
    watch = _Watch(answerer)

    @app.exception_handler(ApiError)
    async def _told(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _explain(error).response()

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, "http_error", str(error.detail)).response()

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "internal_error", f"the request failed ({type(error).__name__})").response()

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        replicas = await watch.replicas()
        serving = [r for r in replicas if r.model_id is not None]
        if not serving:
            return JSONResponse({"status": "unavailable", "model_id": None, "revision": None}, status_code=503)
        newest = max(serving, key=lambda r: r.revision or 0)
        settled = {(r.model_id, r.revision) for r in replicas} == {(newest.target_model_id, newest.target_revision)}
        status = "ok" if settled else "degraded" if any(r.error for r in replicas) else "switching"
        return JSONResponse({"status": status, "model_id": newest.model_id, "revision": newest.revision})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        champion = await recorder.champion(deployment)
        served = sorted({r.model_id for r in await watch.replicas() if r.model_id is not None})
        created = int(champion.updated_at.timestamp()) if champion else 0
        data = [
            {
                "id": model_id,
                "object": "model",
                "created": created,
                "owned_by": "prefloop",
                "champion": champion is not None and champion.model_id == model_id,
            }
            for model_id in served
        ]
        return {"object": "list", "data": data}

    @app.get("/v1/admin/status")
    async def status() -> dict[str, Any]:
        champion = await recorder.champion(deployment)
        return {
            "deployment": deployment,
            "champion": champion and {"model_id": champion.model_id, "revision": champion.revision},
            "replicas": [asdict(replica) for replica in await watch.replicas(fresh=True)],
        }

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest) -> JSONResponse | StreamingResponse:
        asked = _Asked.read(body, deployment=deployment, limits=limits)
        events = answerer.answer(asked.question)
        try:
            started = await _first_event(events)
        except BaseException:
            await events.aclose()
            raise
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            stream = _stream(asked, started, events, recorder, usage=usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        async with aclosing(events):
            answer = await _last_event(events)
            await _record(recorder, asked, started, answer)
        return JSONResponse(asked.completion(started, answer, with_logprobs=bool(body.logprobs)))

    @app.post("/v1/feedback", status_code=201)
    async def feedback(
        body: FeedbackRequest, idempotency_key: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        return await _store(
            recorder,
            event_id=_event_id(body.event_id, idempotency_key),
            response_id=body.response_id,
            kind=body.kind,
            value=str(body.value),
            tags=body.tags,
            comment=body.comment,
            subject=body.user,
            origin=body.origin,
        )

    @app.post("/v1/comparisons", status_code=201)
    async def comparisons(
        body: ComparisonRequest, idempotency_key: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        assert body.verdict in VERDICTS  # noqa: S101
        return await _store(
            recorder,
            event_id=_event_id(body.event_id, idempotency_key),
            response_id=body.response_a,
            other_response_id=body.response_b,
            kind="comparison",
            value=body.verdict,
            tags=body.tags,
            comment=body.comment,
            subject=body.user,
            shown_order=body.shown_order,
            origin=body.origin,
        )

    return app


class _Guard:
    """Outermost layer: key and size of the body. Reads nothing of a request that it refuses.

    Serve's proxy gives every request an id, or takes the client's, and returns it; here it only names what failed.
    """

    def __init__(self, app: Any, *, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        begun = ended = False

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal begun, ended
            begun = begun or message["type"] == "http.response.start"
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        async def refuse(error: ApiError) -> None:
            response = error.response()
            response.headers["connection"] = "close"
            await response(scope, receive, send_and_note)  # type: ignore[arg-type]

        if scope["path"] not in _OPEN_PATHS and not self._authorised(headers):
            await refuse(ApiError(401, "invalid_api_key", "a valid key is needed: `Authorization: Bearer KEY`"))
            return
        body = await _read_body(headers, receive)
        if body is None:
            await refuse(ApiError(413, "body_too_large", f"a request may have at most {MAX_BODY_BYTES} bytes"))
            return
        replayed = False

        async def receive_again() -> dict[str, Any]:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(scope, receive_again, send_and_note)
        except Exception as error:
            # The traceback could quote what a user wrote: only its kind is logged.
            _log.error("request %s failed: %s", request_id, type(error).__name__)
            if not begun:
                await refuse(ApiError(500, "internal_error", f"the request failed; its id is {request_id}"))
            elif not ended:
                raise

    def _authorised(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer"


class _Watch:
    """What the replicas serve, asked at most once a second: `/healthz` is open to anybody."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._lock = asyncio.Lock()
        self._known: list[ReplicaStatus] = []
        self._at = -math.inf

    async def replicas(self, *, fresh: bool = False) -> list[ReplicaStatus]:
        asked_at = time.monotonic()
        async with self._lock:
            if self._at < (asked_at if fresh else asked_at - _STATUS_AGE_S):
                try:
                    self._known = await self._answerer.status()
                except Unavailable:
                    self._known = []
                self._at = time.monotonic()
            return self._known


@dataclass(frozen=True)
class _Asked:
    """A chat request on its way: what is asked, and what will be recorded of it."""

    response_id: str
    created: int
    question: Question
    metadata: ChatMetadata
    subject: str | None
    deployment: str
    tools: list[dict[str, Any]] | None

    @classmethod
    def read(cls, body: ChatRequest, *, deployment: str, limits: Limits) -> "_Asked":
        asked_for = body.max_completion_tokens or body.max_tokens or limits.max_tokens
        if asked_for > limits.max_tokens:
            message = f"an answer may have at most {limits.max_tokens} tokens here, {asked_for} were asked for"
            raise ApiError(400, "max_tokens_too_large", message, param="max_tokens")
        try:
            messages = tuple(message.message() for message in body.messages)
        except DataError as error:
            raise ApiError(400, "invalid_messages", str(error), param="messages") from None
        question = Question(
            messages=messages,
            tools=canonical_json(body.tools) if body.tools else None,
            model_id=None if body.model == CHAMPION else body.model,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_tokens=asked_for,
            # A seed of our own makes every answer repeatable.
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            deltas=bool(body.stream),
        )
        return cls(
            response_id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            question=question,
            metadata=body.metadata or ChatMetadata(),
            subject=body.user,
            deployment=deployment,
            tools=body.tools or None,
        )

    def row(self, started: Started, answer: Answer) -> ResponseRow:
        question = self.question
        users = sum(message.role == "user" for message in question.messages)
        return ResponseRow(
            response_id=self.response_id,
            deployment=self.deployment,
            conversation_id=self.metadata.conversation_id or f"conv-{self.response_id.removeprefix('chatcmpl-')}",
            turn=users if self.metadata.turn is None else self.metadata.turn,
            messages=[message.to_openai() for message in question.messages],
            tools=self.tools,
            prompt_key=prompt_key(question.messages, question.tools),
            text=answer.text,
            tool_calls=None,
            prompt_digest=answer.prompt_digest,
            token_ids=list(answer.token_ids),
            logp=sum(answer.logps),
            finish_reason=answer.finish_reason,
            template_digest=answer.template_digest,
            model_id=started.model_id,
            arm=_ARM,
            sampling={
                "temperature": question.temperature,
                "top_p": question.top_p,
                "max_tokens": question.max_tokens,
                "seed": question.seed,
            },
            shown_order=None,
            subject=self.subject,
            origin=self.metadata.origin,
            created_at=now(),
        )

    def completion(self, started: Started, answer: Answer, *, with_logprobs: bool) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": answer.finish_reason,
            "logprobs": _logprobs(answer) if with_logprobs else None,
        }
        return self._envelope("chat.completion", started, [choice]) | {"usage": _usage(answer)}

    def chunk(self, started: Started, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._envelope("chat.completion.chunk", started, [choice])

    def usage_chunk(self, started: Started, answer: Answer) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", started, []) | {"usage": _usage(answer)}

    def _envelope(self, kind: str, started: Started, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": started.model_id,
            "system_fingerprint": f"revision-{started.revision}",
            "choices": choices,
        }


async def _read_body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
    announced = headers.get(b"content-length", b"0")
    if not announced.isdigit() or int(announced) > MAX_BODY_BYTES:
        return None
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += bytes(message.get("body", b""))
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


async def _first_event(events: AsyncIterator[Event]) -> Started:
    try:
        event = await anext(events, None)
    except Busy:
        message = "too many requests are waiting; try again in a moment"
        raise ApiError(429, "queue_full", message, retry_after_s=_RETRY_AFTER_S) from None
    except Unavailable:
        message = "no replica can answer at the moment"
        raise ApiError(503, "unavailable", message, retry_after_s=_RETRY_AFTER_S) from None
    if not isinstance(event, Started):
        raise _unexpected(event)
    return event


async def _last_event(events: AsyncIterator[Event]) -> Answer:
    try:
        async for event in events:
            if isinstance(event, Answer):
                return event
            if not isinstance(event, Delta):
                raise _unexpected(event)
    except Unavailable:
        pass
    raise ApiError(503, "unavailable", "the replica that was answering is gone", retry_after_s=_RETRY_AFTER_S)


def _unexpected(event: Event | None) -> ApiError:
    if isinstance(event, Refusal):
        return ApiError(event.status, event.code, event.message)
    return ApiError(503, "unavailable", "the replica ended without an answer", retry_after_s=_RETRY_AFTER_S)


async def _record(recorder: Recorder, asked: _Asked, started: Started, answer: Answer) -> None:
    try:
        await recorder.record_response(asked.row(started, answer))
    except (LedgerError, SQLAlchemyError) as error:
        _log.error("an answer could not be recorded: %s", type(error).__name__)
        message = "the answer could not be recorded, so it is not given"
        raise ApiError(503, "not_recorded", message, retry_after_s=_RETRY_AFTER_S) from None


async def _stream(
    asked: _Asked, started: Started, events: AsyncGenerator[Event, None], recorder: Recorder, *, usage: bool
) -> AsyncIterator[str]:
    sent = 0
    try:
        async with aclosing(events):
            yield _sse(asked.chunk(started, {"role": "assistant", "content": ""}))
            async for event in events:
                if isinstance(event, Delta):
                    sent += len(event.text)
                    yield _sse(asked.chunk(started, {"content": event.text}))
                    continue
                if not isinstance(event, Answer):
                    raise _unexpected(event)
                await _record(recorder, asked, started, event)
                rest = event.text[sent:]
                yield _sse(asked.chunk(started, {"content": rest} if rest else {}, event.finish_reason))
                if usage:
                    yield _sse(asked.usage_chunk(started, event))
                yield "data: [DONE]\n\n"
                return
        raise ApiError(503, "unavailable", "the replica ended before the answer did")
    except Unavailable:
        yield _sse(ApiError(503, "unavailable", "the replica that was answering is gone").body())
    except ApiError as error:
        yield _sse(error.body())


async def _store(recorder: Recorder, **event: Any) -> dict[str, Any]:
    try:
        row = await recorder.record_feedback(**event)
    except UnknownResponse as error:
        raise ApiError(404, "unknown_response", str(error), param="response_id") from None
    except EventConflict as error:
        raise ApiError(409, "event_conflict", str(error), param="event_id") from None
    except LedgerError as error:
        raise ApiError(422, "refused", str(error)) from None
    except SQLAlchemyError as error:
        _log.error("feedback could not be recorded: %s", type(error).__name__)
        message = "the event could not be recorded; send it again"
        raise ApiError(503, "not_recorded", message, retry_after_s=_RETRY_AFTER_S) from None
    return {"event_id": row.event_id, "response_id": row.response_id, "revision": row.revision}


def _event_id(in_body: str | None, in_header: str | None) -> str:
    if in_header is not None and not 1 <= len(in_header) <= 256:
        raise ApiError(400, "invalid_value", "Idempotency-Key must have 1 to 256 characters", param="Idempotency-Key")
    if in_body is not None and in_header is not None and in_body != in_header:
        raise ApiError(400, "invalid_value", "`event_id` and Idempotency-Key differ", param="event_id")
    return in_body or in_header or f"event-{uuid.uuid4().hex}"


def _explain(error: RequestValidationError) -> ApiError:
    """Turn pydantic's faults into one sentence that quotes no value."""
    faults: dict[str, str] = {}
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"] if not _SCHEMA_PART.search(str(part))) or "body"
        said = "this field is not known" if fault["type"] == "extra_forbidden" else str(fault["msg"])
        # The name of an unknown field is a user's text too, and may be no Unicode.
        place = place[:200].encode("utf-8", "replace").decode()
        faults.setdefault(place, said.removeprefix("Value error, "))
    message = "; ".join(f"`{place}`: {said}" for place, said in faults.items())
    return ApiError(400, "invalid_request", message[:2000], param=next(iter(faults), None))


def _logprobs(answer: Answer) -> dict[str, Any]:
    content = [
        {"token": token, "logprob": logp, "bytes": list(token.encode()), "top_logprobs": []}
        for token, logp in zip(answer.tokens, answer.logps, strict=True)
    ]
    return {"content": content, "refusal": None}


def _usage(answer: Answer) -> dict[str, int]:
    completion = len(answer.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": answer.prompt_tokens + completion,
    }


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
