"""The HTTP API in front of a scripted answerer and a real ledger."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.ledger import FeedbackRow, ResponseRow
from app.schemas import Message
from serving.bodies import MAX_BODY_BYTES
from serving.gateway import Limits, create_app
from serving.messages import Answer, Busy, Delta, Refusal, ReplicaStatus, Started, Unavailable
from serving.recorder import Recorder

KEY = "pl-test"
STARTED = Started("sft-1", 3)
ANSWER = Answer("Hello you", (5, 6, 1), ("Hello", " you", ""), (-0.5, -0.25, -0.125), "stop", 4, "pd", "td")
HELLO = {"model": "champion", "messages": [{"role": "user", "content": "hi"}]}


class Script:
    """Answers every question with the same events; an exception in the list is raised."""

    def __init__(self, *events):
        self.events = events
        self.questions = []
        self.closed = 0
        self.replicas = [ReplicaStatus("r1", "sft-1", 3, "sft-1", 3, None)]

    async def answer(self, question):
        self.questions.append(question)
        try:
            for event in self.events:
                if isinstance(event, BaseException):
                    raise event
                await asyncio.sleep(0)
                yield event
        finally:
            self.closed += 1

    async def status(self):
        if not self.replicas:
            raise Unavailable
        return self.replicas


@pytest.fixture
def script():
    return Script(STARTED, Delta("Hello"), ANSWER)


@asynccontextmanager
async def _client(script, ledger, key=KEY):
    app = create_app(script, Recorder(ledger), key=KEY, deployment="default", limits=Limits(max_tokens=64))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
        yield client


@pytest.fixture
def call(script, ledger):
    def send(method, path, *, key=KEY, **arguments):
        async def run():
            async with _client(script, ledger, key) as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(run())

    return send


def responses(ledger):
    with ledger.read() as session:
        return session.scalars(sa.select(ResponseRow)).all()


def events_of(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer_is_in_the_ledger_with_all_that_training_needs(call, script, ledger):
    body = HELLO | {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 11,
        "user": "anna",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "metadata": {"conversation_id": "c1", "turn": "2", "origin": "simulated"},
    }
    reply = call("POST", "/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == "Hello you"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert reply["model"] == "sft-1"
    [row] = responses(ledger)
    assert row.response_id == reply["id"]
    assert (row.conversation_id, row.turn, row.origin, row.subject) == ("c1", 2, "simulated", "anna")
    assert row.messages == [{"role": "user", "content": "hi"}]
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]
    assert row.token_ids == [5, 6, 1]
    assert row.logp == pytest.approx(-0.875)
    assert (row.model_id, row.arm, row.template_digest, row.prompt_digest) == ("sft-1", "champion", "td", "pd")
    assert row.sampling == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 11}
    assert script.questions[0].messages == (Message("user", "hi"),)


def test_an_answer_without_a_seed_records_the_one_that_was_drawn(call, script, ledger):
    call("POST", "/v1/chat/completions", json=HELLO)
    assert responses(ledger)[0].sampling["seed"] == script.questions[0].seed


def test_logprobs_are_those_of_the_sampled_tokens(call):
    reply = call("POST", "/v1/chat/completions", json=HELLO | {"logprobs": True}).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert [(c["token"], c["logprob"]) for c in content] == [("Hello", -0.5), (" you", -0.25), ("", -0.125)]


def test_a_stream_grows_to_the_whole_answer_and_ends_with_its_reason(call, ledger):
    body = HELLO | {"stream": True, "stream_options": {"include_usage": True}}
    reply = call("POST", "/v1/chat/completions", json=body)
    *chunks, usage, done = events_of(reply)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello you"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert {c["id"] for c in chunks} == {responses(ledger)[0].response_id}


def test_a_stream_survives_clients_that_end_lines_wherever_unicode_does(script, call):
    text = "one\u2028two\x85three\u2029\x0bé\x1c😀"
    script.events = (STARTED, Delta(text[:6]), replace(ANSWER, text=text))
    reply = call("POST", "/v1/chat/completions", json=HELLO | {"stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text


def test_a_stream_is_recorded_before_its_last_event_is_sent(script, ledger):
    seen = []

    class Noting(Recorder):
        async def record_response(self, response):
            await super().record_response(response)
            seen.append("recorded")

    app = create_app(script, Noting(ledger), key=KEY, deployment="default", limits=Limits(max_tokens=64))

    async def send(message):
        if b'"finish_reason": "stop"' in message.get("body", b""):
            seen.append("finish sent")
        elif b'"Hello"' in message.get("body", b""):
            seen.append("text sent")

    body = json.dumps(HELLO | {"stream": True}).encode()
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        while not waiting:
            await asyncio.sleep(30)
        return waiting.pop()

    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "server": ("gateway", 80),
        "client": ("1.2.3.4", 5),
        "root_path": "",
    }
    asyncio.run(app(scope, receive, send))
    assert seen == ["text sent", "recorded", "finish sent"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_cut_short_is_not_recorded(script, call, ledger, stream):
    script.events = (STARTED, Delta("Hel"), Unavailable())
    reply = call("POST", "/v1/chat/completions", json=HELLO | {"stream": stream})
    if stream:
        assert events_of(reply)[-1]["error"]["code"] == "unavailable"
        assert "[DONE]" not in reply.text
    else:
        assert reply.status_code == 503
    assert responses(ledger) == []
    assert script.closed == 1


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_cannot_be_recorded_is_not_finished(script, ledger, stream):
    class Full(Recorder):
        async def record_response(self, response):
            raise sa.exc.OperationalError("insert", {}, Exception("disk full"))

    app = create_app(script, Full(ledger), key=KEY, deployment="default", limits=Limits(max_tokens=64))

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as client:
            headers = {"authorization": f"Bearer {KEY}"}
            return await client.post("/v1/chat/completions", json=HELLO | {"stream": stream}, headers=headers)

    reply = asyncio.run(run())
    assert "not_recorded" in reply.text
    assert '"finish_reason": "stop"' not in reply.text
    assert reply.status_code == (200 if stream else 503)


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        (Busy(), 429, "queue_full"),
        (Unavailable(), 503, "unavailable"),
        (Refusal(400, "context_length_exceeded", "too long"), 400, "context_length_exceeded"),
        (Refusal(404, "model_not_found", "not served"), 404, "model_not_found"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_before_the_first_token_is_an_http_status(script, call, event, status, code, stream):
    script.events = (event,)
    reply = call("POST", "/v1/chat/completions", json=HELLO | {"stream": stream})
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == code
    assert (reply.headers.get("retry-after") == "5") == (status in (429, 503))
    assert script.closed == 1


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", "pl-tes\u00e9"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/feedback"),
        ("POST", "/v1/comparisons"),
        ("GET", "/v1/models"),
        ("GET", "/v1/admin/status"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nowhere"),
    ],
)
def test_nothing_but_health_is_told_without_the_key(call, script, key, method, path):
    headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
    reply = call(method, path, key=None, headers=headers, json=HELLO)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert script.questions == []


def test_another_scheme_with_the_right_key_is_refused(call):
    assert call("GET", "/v1/models", key=None, headers={"authorization": f"Basic {KEY}"}).status_code == 401


def test_docs_are_not_served_even_with_the_key(call):
    assert call("GET", "/docs").status_code == 404
    assert call("GET", "/openapi.json").status_code == 200


def test_a_body_beyond_the_limit_is_refused_unread(call, script):
    big = HELLO | {"user": "x" * MAX_BODY_BYTES}
    assert call("POST", "/v1/chat/completions", json=big).status_code == 413

    async def chunks():
        for _ in range(40):
            yield b"x" * 8192

    reply = call("POST", "/v1/feedback", content=chunks(), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert script.questions == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "a\x00b"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"n": 2}, "n"),
        ({"stop": ["x"]}, "stop"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "NaN"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream": True, "logprobs": True}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"metadata": {"colour": "red"}}, "metadata.colour"),
        ({"metadata": {"origin": "external"}}, "metadata.origin"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"tools": [{"x": "a\x00"}]}, "tools.0"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_a_request_that_asks_for_too_much_is_told_which_field(call, script, ledger, change, named):
    reply = call("POST", "/v1/chat/completions", json=HELLO | change)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert named in (error["message"] + str(error["param"]))
    assert script.questions == []
    assert responses(ledger) == []


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model":"\\ud800","messages":[]}', b'{"\\ud800":1}'],
)
def test_a_body_that_is_no_proper_json_object_is_a_400(call, raw):
    reply = call("POST", "/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "messages", "role", "content", "tools", "n"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_no_body_makes_the_gateway_fail(call, body):
    raw = json.dumps(body).encode()
    reply = call("POST", "/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400)


def test_what_openai_clients_send_by_default_is_accepted(call):
    neutral = {
        "n": 1,
        "stop": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "top_logprobs": None,
        "parallel_tool_calls": True,
        "store": False,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
    }
    assert call("POST", "/v1/chat/completions", json=HELLO | neutral).status_code == 200


@pytest.fixture
def answers(call):
    return [call("POST", "/v1/chat/completions", json=HELLO).json()["id"] for _ in range(2)]


def test_the_same_event_again_is_acknowledged_once(call, answers, ledger):
    event = {"response_id": answers[0], "kind": "thumb", "value": "up", "user": "anna", "event_id": "e1"}
    first = call("POST", "/v1/feedback", json=event)
    again = call("POST", "/v1/feedback", json=event, headers={"idempotency-key": "e1"})
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json() == {"event_id": "e1", "response_id": answers[0], "revision": 1}
    with ledger.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(FeedbackRow)) == 1


def test_a_changed_mind_is_the_next_revision_of_the_same_user(call, answers):
    event = {"response_id": answers[0], "kind": "thumb", "value": "up", "user": "anna"}
    assert call("POST", "/v1/feedback", json=event).json()["revision"] == 1
    assert call("POST", "/v1/feedback", json=event | {"value": "down"}).json()["revision"] == 2
    assert call("POST", "/v1/feedback", json=event | {"user": "ben"}).json()["revision"] == 1


def test_feedback_of_every_kind_is_kept_as_it_was_sent(call, answers, ledger):
    call(
        "POST",
        "/v1/feedback",
        json={
            "response_id": answers[0],
            "kind": "edit",
            "value": "better\u2028text",
            "tags": ["tone"],
            "comment": "so",
        },
    )
    call(
        "POST", "/v1/feedback", json={"response_id": answers[0], "kind": "rating", "value": 4.5, "origin": "simulated"}
    )
    body = {"response_a": answers[0], "response_b": answers[1], "verdict": "B>>A", "shown_order": answers[::-1]}
    assert call("POST", "/v1/comparisons", json=body | {"event_id": "c"}).status_code == 201
    with ledger.read() as session:
        rows = {row.kind: row for row in session.scalars(sa.select(FeedbackRow))}
    assert (rows["edit"].value, rows["edit"].tags, rows["edit"].comment) == ("better\u2028text", ["tone"], "so")
    assert (rows["rating"].value, rows["rating"].origin) == ("4.5", "simulated")
    assert (rows["comparison"].value, rows["comparison"].other_response_id) == ("B>>A", answers[1])
    assert rows["comparison"].shown_order == answers[::-1]


@pytest.mark.parametrize(
    ("path", "change", "status"),
    [
        ("/v1/feedback", {"response_id": "nobody"}, 404),
        ("/v1/feedback", {"value": "sideways"}, 422),
        ("/v1/feedback", {"kind": "edit", "value": "  "}, 422),
        ("/v1/feedback", {"kind": "rating", "value": "many"}, 400),
        ("/v1/feedback", {"kind": "rating", "value": "nan"}, 400),
        ("/v1/feedback", {"kind": "thumb", "value": 1.0}, 400),
        ("/v1/feedback", {"kind": "comparison"}, 400),
        ("/v1/feedback", {"value": "a\x00"}, 400),
        ("/v1/feedback", {"comment": "a\x00"}, 400),
        ("/v1/feedback", {"colour": "red"}, 400),
        ("/v1/comparisons", {"response_b": "nobody"}, 404),
        ("/v1/comparisons", {"response_b": None}, 400),
        ("/v1/comparisons", {"verdict": "A"}, 400),
        ("/v1/comparisons", {"shown_order": ["x", "y"]}, 400),
    ],
)
def test_wrong_feedback_is_refused_and_nothing_is_stored(call, answers, ledger, path, change, status):
    right = {
        "/v1/feedback": {"response_id": answers[0], "kind": "thumb", "value": "up"},
        "/v1/comparisons": {"response_a": answers[0], "response_b": answers[1], "verdict": "A>B"},
    }[path]
    reply = call("POST", path, json=right | change)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]
    with ledger.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(FeedbackRow)) == 0


def test_the_same_event_id_with_another_content_is_a_conflict(call, answers):
    event = {"response_id": answers[0], "kind": "thumb", "value": "up", "event_id": "e1"}
    assert call("POST", "/v1/feedback", json=event).status_code == 201
    reply = call("POST", "/v1/feedback", json=event | {"value": "down"})
    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "event_conflict"


def test_two_ids_for_one_event_are_refused(call, answers):
    event = {"response_id": answers[0], "kind": "thumb", "value": "up", "event_id": "e1"}
    assert call("POST", "/v1/feedback", json=event, headers={"idempotency-key": "e2"}).status_code == 400


@pytest.mark.parametrize(
    ("replicas", "status", "said"),
    [
        ([("sft-1", 3, "sft-1", 3, None)], 200, {"status": "ok", "model_id": "sft-1", "revision": 3}),
        ([("sft-1", 3, "b-2", 4, None)], 200, {"status": "switching", "model_id": "sft-1", "revision": 3}),
        (
            [("b-2", 4, "b-2", 4, None), ("sft-1", 3, "b-2", 4, None)],
            200,
            {"status": "switching", "model_id": "b-2", "revision": 4},
        ),
        ([("sft-1", 3, "b-2", 4, "broken")], 200, {"status": "degraded", "model_id": "sft-1", "revision": 3}),
        ([(None, None, "sft-1", 3, None)], 503, {"status": "unavailable", "model_id": None, "revision": None}),
        ([], 503, {"status": "unavailable", "model_id": None, "revision": None}),
    ],
)
def test_health_says_what_is_served(call, script, replicas, status, said):
    script.replicas = [ReplicaStatus("r", *row) for row in replicas]
    reply = call("GET", "/healthz", key=None)
    assert (reply.status_code, reply.json()) == (status, said)


def test_what_users_write_is_not_logged(call, script, caplog):
    script.events = (RuntimeError("secret text"),)
    reply = call("POST", "/v1/chat/completions", json=HELLO | {"user": "secret-user"})
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert "secret" not in caplog.text
