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
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from app.errors import DataError, LedgerError
from app.ledger import VERDICTS, EventConflict, ResponseRow, UnknownResponse, now
from app.schemas import canonical_json, prompt_key
from serving.bodies import CHAMPION, MAX_BODY_BYTES, ChatMetadata, ChatRequest, ComparisonRequest, FeedbackRequest
from serving.messages import Answer, Busy, Delta, Event, Question, Refusal, ReplicaStatus, Started, Unavailable
from serving.recorder import Recorder

_ARM = "champion"
_RETRY_AFTER_S = 5
_STATUS_AGE_S = 1.0
_OPEN_PATHS = frozenset({"/healthz"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What pydantic adds to a place beside the field's names: the body itself, and the member of a union.
_SCHEMA_PART = re.compile(r"^(body|str|float)$|\[")
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
    # In ASCII: many clients (httpx's `iter_lines` among them) also end a line at U+0085 and U+2028, which JSON lets stand.
    return f"data: {json.dumps(content)}\n\n"
