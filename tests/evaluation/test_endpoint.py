"""Answers from an endpoint that serves models by their ids: in order, by turn, and never those of another model."""

import pytest

from app.config import EndpointSection
from app.errors import RecipeError, ServiceError
from app.evaluation.endpoint import EndpointModel
from app.evaluation.questions import Question
from tests.evaluation.scripted_judge import scripted_judge


def section(server, **options):
    return EndpointSection(url=server.url, api_key_variable=None, retries=0, **options)


def echo(asked):
    return f"{len(asked.body['messages'])} messages, the last: {asked.user}"


def test_every_turn_is_asked_with_what_was_said_before_greedily_unless_the_question_wants_otherwise():
    questions = [
        Question("two", "c", "", ("first?", "second?")),
        Question("warm", "d", "", ("warm?",), temperature=0.7),
    ]
    with scripted_judge(echo) as server:
        answers = EndpointModel(section(server), max_tokens=33).answer("new-1", questions)
    assert [(a.prompt_id, a.turn, a.text) for a in answers] == [
        ("two", 1, "1 messages, the last: first?"),
        ("two", 2, "3 messages, the last: second?"),
        ("warm", 1, "1 messages, the last: warm?"),
    ]
    assert {(a.model_id, a.finish_reason) for a in answers} == {("new-1", "stop")}
    assert all(a.n_tokens > 0 and a.valid for a in answers)
    bodies = {asked.user: asked.body for asked in server.asked}
    assert bodies["second?"]["messages"][1] == {"role": "assistant", "content": "1 messages, the last: first?"}
    assert (bodies["first?"]["temperature"], bodies["warm?"]["temperature"]) == (0.0, 0.7)
    assert {body["max_tokens"] for body in bodies.values()} == {33}
    assert len({body["seed"] for body in bodies.values()}) == 3


def test_an_answer_that_the_limit_cut_is_marked():
    with scripted_judge(echo, finish_reason="length") as server:
        (answer,) = EndpointModel(section(server), max_tokens=1).answer("m", [Question("q", "q", "", ("?",))])
    assert (answer.finish_reason, answer.valid) == ("length", False)


def test_a_conversation_that_fills_the_context_gets_an_empty_answer_that_was_cut():
    words = "This model's maximum context length is 8192 tokens"
    with scripted_judge(echo, error=words) as server:
        server.statuses[:] = [400]
        first, second = EndpointModel(section(server, concurrency=1), max_tokens=8).answer(
            "m", [Question("long", "long", "", ("?",)), Question("q", "q", "", ("?",))]
        )
    assert (first.prompt_id, first.text, first.finish_reason, first.valid) == ("long", "", "length", False)
    assert second.valid


def test_requests_run_side_by_side_up_to_the_limit_and_answers_keep_their_order():
    questions = [Question(f"q{i}", "c", "", (f"number {i}",)) for i in range(12)]
    with scripted_judge(echo, seconds=0.05) as server:
        answers = EndpointModel(section(server, concurrency=3), max_tokens=8).answer("m", questions)
    assert [a.prompt_id for a in answers] == [q.id for q in questions]
    assert 1 < server.most_at_once <= 3


def test_another_models_answer_a_refused_request_and_a_missing_key_are_named(monkeypatch):
    asked = [Question("q", "q", "", ("?",))]
    with scripted_judge(echo, model="champion") as server:
        with pytest.raises(ServiceError, match="of `new-1` to question `q`: `champion` answered"):
            EndpointModel(section(server), max_tokens=8).answer("new-1", asked)
        server.statuses[:] = [404]
        with pytest.raises(ServiceError, match=r"to question `q`: (.|\n)*evaluate.endpoint"):
            EndpointModel(section(server), max_tokens=8).answer("new-1", asked)
        monkeypatch.delenv("SOME_KEY", raising=False)
        with pytest.raises(RecipeError, match=r"evaluate.endpoint is not in the environment: `SOME_KEY`"):
            EndpointModel(EndpointSection(url=server.url, api_key_variable="SOME_KEY"), max_tokens=8)
