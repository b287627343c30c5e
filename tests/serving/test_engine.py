"""The engine answers in batches, and its model can be replaced at any time."""

import asyncio

import pytest
import torch

from app.errors import ModelError, ServiceError
from app.generation import GenerationRequest, generate
from app.models import Lineage, ensure_sft, load_model, render_prompt, save_model
from app.schemas import Message
from serving.engine import Engine, Serving, _request, load_serving
from serving.messages import Answer, Delta, Question, Refusal, Started
from serving.replica import Replica


@pytest.fixture
def first(home, ledger, tiny_model):
    return ensure_sft(home, ledger, str(tiny_model)).model_id


@pytest.fixture
def second(home, ledger, first):
    loaded = load_model(home, first, dtype="float32")
    with torch.no_grad():
        loaded.model.lm_head.weight.add_(torch.randn_like(loaded.model.lm_head.weight) * 0.05)
    return save_model(
        home, ledger, loaded.model, loaded.tokenizer, name="tiny", lineage=Lineage("merged", first)
    ).model_id


@pytest.fixture
def broken(home, ledger, first):
    loaded = load_model(home, first, dtype="float32")
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(torch.nan)
    return save_model(
        home, ledger, loaded.model, loaded.tokenizer, name="nan", lineage=Lineage("merged", first)
    ).model_id


def question(text="hi", **changes):
    values = {
        "messages": (Message("user", text),),
        "tools": None,
        "model_id": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 12,
        "seed": 3,
        "deltas": False,
    }
    return Question(**(values | changes))


async def ask(engine, asked):
    return [event async for event in engine.answer(asked)]


@pytest.fixture
def serving(home, first):
    return load_serving(home, first, 1, dtype="float32")


def engine_of(serving, **limits):
    engine = Engine(**({"max_batch_size": 4, "batch_wait_s": 0.05} | limits))
    if serving is not None:
        engine.install(serving)
    return engine


def test_an_answer_is_what_generation_gives(serving):
    async def run():
        return await ask(engine_of(serving), question())

    started, answer = asyncio.run(run())
    prompt = tuple(render_prompt(serving.loaded.tokenizer, (Message("user", "hi"),), None))
    expected = generate(serving.loaded, [GenerationRequest(prompt, 1.0, 1.0, 12, 3)])[0]
    assert started == Started(serving.loaded.model_id, 1)
    assert (answer.text, answer.token_ids, answer.finish_reason) == (
        expected.text,
        expected.token_ids,
        expected.finish_reason,
    )
    assert answer.logps == pytest.approx(expected.logps)
    assert answer.prompt_tokens == len(prompt)
    assert answer.template_digest == serving.loaded.template_digest


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_is_a_prefix_of_the_answer_and_never_holds_half_a_character(serving, seed):
    async def run():
        return await ask(engine_of(serving), question(deltas=True, seed=seed, max_tokens=60))

    _, *deltas, answer = asyncio.run(run())
    text = "".join(d.text for d in deltas)
    assert all(isinstance(d, Delta) for d in deltas)
    assert answer.text.startswith(text)
    assert not any(d.text.endswith("\ufffd") for d in deltas)


def test_questions_that_wait_are_answered_together_up_to_the_batch_size(serving, monkeypatch):
    fed = []
    forward = serving.loaded.model.forward

    def watched(*arguments, **keywords):
        fed.append(len(keywords["input_ids"]))
        return forward(*arguments, **keywords)

    monkeypatch.setattr(serving.loaded.model, "forward", watched)

    async def run():
        engine = engine_of(serving)
        return await asyncio.gather(*(ask(engine, question(max_tokens=40, seed=i)) for i in range(10)))

    answers = asyncio.run(run())
    assert fed[0] == max(fed) == 4
    assert all(isinstance(events[-1], Answer) for events in answers)


def test_a_question_joins_the_answers_under_way_and_ends_before_them(serving):
    async def run():
        engine, ended = engine_of(serving), []
        long = engine.answer(question(deltas=True, temperature=0.0, max_tokens=400))
        while not isinstance(await anext(long), Delta):
            pass

        async def rest():
            left = [event async for event in long]
            ended.append("long")
            return left[-1]

        under_way = asyncio.create_task(rest())
        short = (await ask(engine, question(temperature=0.0, max_tokens=5)))[-1]
        ended.append("short")
        return short, await under_way, ended, (await ask(engine, question(temperature=0.0, max_tokens=5)))[-1]

    short, long, ended, alone = asyncio.run(run())
    assert ended == ["short", "long"]
    assert short.token_ids == alone.token_ids
    assert len(long.token_ids) == 400


def test_what_is_asked_after_a_model_was_installed_does_not_join_the_old_one(home, serving, second):
    new = load_serving(home, second, 2, dtype="float32")

    async def run():
        engine, ended = engine_of(serving), []
        long = engine.answer(question(deltas=True, temperature=0.0, max_tokens=400))
        while not isinstance(await anext(long), Delta):
            pass
        engine.install(new)

        async def last():
            events = await ask(engine, question(max_tokens=2))
            ended.append("new")
            return events

        asked = asyncio.create_task(last())
        left = [event async for event in long]
        ended.append("old")
        return left[-1], await asked, ended

    old, events, ended = asyncio.run(run())
    assert len(old.token_ids) == 400
    assert ended == ["old", "new"]
    assert events[0] == Started(second, 2)


def test_an_abandoned_answer_that_joined_frees_its_place(serving):
    async def run():
        engine = engine_of(serving, max_batch_size=2)
        first = asyncio.create_task(ask(engine, question(temperature=0.0, max_tokens=1500)))
        await asyncio.sleep(0.2)
        joined = engine.answer(question(deltas=True, temperature=0.0, max_tokens=1500))
        while not isinstance(await anext(joined), Delta):
            pass
        await joined.aclose()
        answered = await ask(engine, question(max_tokens=2))
        under_way = not first.done()
        first.cancel()
        return answered, under_way

    answered, under_way = asyncio.run(run())
    assert isinstance(answered[-1], Answer)
    assert under_way


def test_a_batch_that_is_joined_for_long_ends(serving, monkeypatch):
    batches = []
    monkeypatch.setattr("serving.engine.generate", lambda *a, **k: batches.append(1) or generate(*a, **k))

    async def run():
        engine = engine_of(serving, max_batch_size=1)
        return await asyncio.gather(*(ask(engine, question(max_tokens=1, seed=i)) for i in range(40)))

    answers = asyncio.run(run())
    assert len(batches) == 3
    assert all(isinstance(events[-1], Answer) for events in answers)


def test_a_full_batch_does_not_wait_for_company(serving):
    async def run():
        engine = engine_of(serving, batch_wait_s=30)
        async with asyncio.timeout(10):
            return await asyncio.gather(*(ask(engine, question(seed=i)) for i in range(4)))

    assert len(asyncio.run(run())) == 4


def test_the_model_can_be_replaced_while_an_answer_is_given(home, serving, second):
    async def run():
        engine = engine_of(serving)
        events = engine.answer(question(deltas=True, temperature=0.0, max_tokens=400))
        opened = [await anext(events), await anext(events)]
        engine.install(load_serving(home, second, 2, dtype="float32"))
        rest = [event async for event in events]
        return opened, rest, await ask(engine, question(max_tokens=2))

    opened, rest, after = asyncio.run(run())
    assert opened[0] == Started(serving.loaded.model_id, 1)
    assert len(rest[-1].token_ids) == 400
    assert after[0] == Started(second, 2)


def test_an_abandoned_answer_frees_its_row(serving):
    async def run():
        engine = engine_of(serving, max_batch_size=1)
        events = engine.answer(question(deltas=True, temperature=0.0, max_tokens=2000))
        for _ in range(3):
            await anext(events)
        await events.aclose()
        async with asyncio.timeout(3):
            return await ask(engine, question(max_tokens=2))

    assert isinstance(asyncio.run(run())[-1], Answer)


def test_a_question_abandoned_in_the_queue_is_never_generated(serving, monkeypatch):
    began = []
    monkeypatch.setattr("serving.engine._request", lambda *given: began.append(given) or _request(*given))

    async def run():
        engine = engine_of(serving, max_batch_size=1, batch_wait_s=0)
        running = asyncio.create_task(ask(engine, question(max_tokens=200, temperature=0.0)))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(ask(engine, question()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await running
        await ask(engine, question())

    asyncio.run(run())
    assert len(began) == 2


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (question("x" * 3000), "context_length_exceeded"),
        (question(model_id="another"), "model_not_found"),
    ],
)
def test_a_question_that_cannot_be_answered_does_not_hurt_its_batch(serving, asked, code):
    async def run():
        engine = engine_of(serving)
        return await asyncio.gather(ask(engine, asked), ask(engine, question()))

    refused, answered = asyncio.run(run())
    assert [type(event) for event in refused] == [Refusal]
    assert refused[0].code == code
    assert isinstance(answered[-1], Answer)


def test_an_answer_is_shortened_to_the_room_that_the_context_has(serving):
    async def run():
        return await ask(engine_of(serving), question("x" * 2000, max_tokens=256, temperature=0.0))

    answer = asyncio.run(run())[-1]
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == 2048


def test_without_a_model_questions_are_refused(serving):
    async def run():
        return await ask(engine_of(None), question())

    [refusal] = asyncio.run(run())
    assert (refusal.status, refusal.code) == (503, "not_ready")
    assert isinstance(serving, Serving)


def test_a_failure_is_told_to_those_who_joined_and_not_to_those_who_were_answered(serving, monkeypatch):
    forward = serving.loaded.model.forward
    broken: list[int] = []

    def fragile(*arguments, **keywords):
        if broken:
            raise RuntimeError
        return forward(*arguments, **keywords)

    monkeypatch.setattr(serving.loaded.model, "forward", fragile)

    async def run():
        engine = engine_of(serving)
        first = engine.answer(question(deltas=True, temperature=0.0, max_tokens=1500))
        while not isinstance(await anext(first), Delta):
            pass
        answered = await ask(engine, question(max_tokens=2))
        joined = engine.answer(question(deltas=True, temperature=0.0, max_tokens=1500))
        while not isinstance(await anext(joined), Delta):
            pass
        broken.append(1)
        ends = [[event async for event in events][-1] for events in (first, joined)]
        broken.clear()
        return answered[-1], ends, await ask(engine, question(max_tokens=2))

    answered, ends, after = asyncio.run(run())
    assert isinstance(answered, Answer)
    assert [end.code for end in ends] == ["generation_failed"] * 2
    assert isinstance(after[-1], Answer)


def test_a_failing_batch_is_refused_and_the_next_one_is_answered(serving, monkeypatch):
    failures = iter([RuntimeError("out of memory")])

    def flaky(loaded, requests, **callbacks):
        for error in failures:
            raise error
        return generate(loaded, requests, **callbacks)

    monkeypatch.setattr("serving.engine.generate", flaky)

    async def run():
        engine = engine_of(serving)
        return await ask(engine, question()), await ask(engine, question())

    failed, answered = asyncio.run(run())
    assert failed[-1].code == "generation_failed"
    assert isinstance(answered[-1], Answer)


def test_a_model_that_gives_no_numbers_is_refused(home, broken):
    with pytest.raises(ModelError, match="no numbers"):
        load_serving(home, broken, 1, dtype="float32")


def replica_of(home):
    return Replica(home.uri, dtype="float32", threads=1, max_batch_size=4, batch_wait_s=0.0)


async def settle(replica):
    async with asyncio.timeout(30):
        while True:
            status = await replica.status()
            if status.error or (status.model_id, status.revision) == (status.target_model_id, status.target_revision):
                return status
            await asyncio.sleep(0.01)


def test_a_replica_serves_what_its_config_names_and_keeps_it_when_the_next_is_broken(home, first, second, broken):
    async def run():
        replica = replica_of(home)
        statuses = []
        for revision, model_id in enumerate([first, second, broken, "no-such-model", first], start=1):
            await replica.reconfigure({"model_id": model_id, "revision": revision})
            statuses.append(await settle(replica))
        return statuses, [event async for event in replica.answer(question())]

    statuses, events = asyncio.run(run())
    served = [(s.model_id, s.revision) for s in statuses]
    assert served == [(first, 1), (second, 2), (second, 2), (second, 2), (first, 5)]
    assert [bool(s.error) for s in statuses] == [False, False, True, True, False]
    assert "no numbers" in statuses[2].error
    assert "no-such-model" in statuses[3].error
    assert events[0] == Started(first, 5)


def test_a_replica_whose_first_model_is_broken_does_not_start(home, broken):
    async def run():
        await replica_of(home).reconfigure({"model_id": broken, "revision": 1})

    with pytest.raises(ServiceError, match="cannot be served"):
        asyncio.run(run())


def test_the_last_config_wins_while_models_are_loading(home, first, second):
    async def run():
        replica = replica_of(home)
        await replica.reconfigure({"model_id": first, "revision": 1})
        await replica.reconfigure({"model_id": second, "revision": 2})
        await replica.reconfigure({"model_id": first, "revision": 3})
        return await settle(replica)

    status = asyncio.run(run())
    assert (status.model_id, status.revision, status.error) == (first, 3, None)
