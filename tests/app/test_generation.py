"""Generation answers a batch as each row would have been answered alone."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from app.errors import ModelError
from app.generation import GenerationRequest, answer_text, context_window, generate, nucleus


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    return Loaded(model, tokenizer, (1,))


def request(prompt=(5, 9, 30), *, temperature=0.0, top_p=1.0, max_tokens=8, seed=None):
    return GenerationRequest(tuple(prompt), temperature, top_p, max_tokens, seed)


PROMPTS = [(5, 9, 30), (7,), tuple(range(20, 60)), (200, 100)]


def forced_logps(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    logps = model(ids).logits[0].float().log_softmax(-1)
    return [logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]


@pytest.mark.parametrize("room", [1, 5, 64])
def test_a_greedy_batch_equals_transformers_own_generate_row_by_row(loaded, monkeypatch, room):
    monkeypatch.setattr("app.generation._ROOM", room)
    # Of ten rows one that has ended stays in the batch for a while, and the batch shrinks more than once.
    prompts, limits = [*PROMPTS, *PROMPTS, *PROMPTS[:2]], (3, 12, 5, 9, 2, 12, 12, 7, 11, 12)
    answers = generate(loaded, [request(p, max_tokens=n) for p, n in zip(prompts, limits, strict=True)])
    for prompt, limit, answer in zip(prompts, limits, answers, strict=True):
        ids = torch.tensor([prompt])
        alone = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, pad_token_id=1
        )
        assert list(answer.token_ids) == alone[0, len(prompt) :].tolist()


def test_rows_that_ended_leave_the_batch(loaded, monkeypatch):
    rows_computed = []
    forward = loaded.model.forward

    def watched(*arguments, **keywords):
        rows_computed.append(len(keywords["input_ids"]))
        return forward(*arguments, **keywords)

    monkeypatch.setattr(loaded.model, "forward", watched)
    answers = generate(loaded, [request(p, max_tokens=n) for p, n in zip(PROMPTS, (2, 12, 4, 12), strict=True)])
    lengths = [len(answer.token_ids) for answer in answers]
    assert rows_computed == [sum(n > step for n in lengths) for step in range(max(lengths))]


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
def test_a_seeded_row_does_not_depend_on_its_company(loaded, place, top_p):
    ours = request(temperature=1.0, top_p=top_p, seed=3, max_tokens=20)
    alone = generate(loaded, [ours])[0]
    rows = [
        request(p, temperature=0.7, top_p=0.5, seed=50 + i, max_tokens=5 + 9 * i) for i, p in enumerate(PROMPTS[1:])
    ]
    together = generate(loaded, [*rows[:place], ours, *rows[place:]])[place]
    assert together.token_ids == alone.token_ids
    assert together.logp == pytest.approx(alone.logp, abs=1e-4)


def test_other_seeds_give_other_answers(loaded):
    answers = generate(loaded, [request(temperature=1.0, seed=s, max_tokens=12) for s in range(6)])
    assert len({a.token_ids for a in answers}) == 6


def test_rows_without_a_seed_differ(loaded):
    first, second = generate(loaded, [request(temperature=1.0, max_tokens=16)] * 2)
    assert first.token_ids != second.token_ids


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    temperatures=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_logp_is_the_teacher_forced_logp_at_temperature_one(loaded, temperatures, top_p, seed):
    rows = [
        request(PROMPTS[i], temperature=t, top_p=top_p, seed=seed + i, max_tokens=6 + i)
        for i, t in enumerate(temperatures)
    ]
    for row, answer in zip(rows, generate(loaded, rows), strict=True):
        assert list(answer.logps) == pytest.approx(
            forced_logps(loaded.model, row.prompt_ids, answer.token_ids), abs=1e-4
        )
        assert answer.logp == pytest.approx(sum(answer.logps))


def test_an_answer_that_ends_keeps_its_end_token_and_its_logp_but_not_in_the_text(loaded):
    sampled = request(temperature=1.0, seed=0, max_tokens=4)
    first = generate(loaded, [sampled])[0]
    assert first.token_ids[2] not in first.token_ids[:2]
    ended = Loaded(loaded.model, loaded.tokenizer, (first.token_ids[2],))
    answer = generate(ended, [sampled])[0]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == first.token_ids[:3]
    assert answer.text == answer_text(loaded.tokenizer, first.token_ids[:2])
    assert list(answer.logps) == pytest.approx(forced_logps(loaded.model, (5, 9, 30), answer.token_ids), abs=1e-4)


def test_an_answer_cut_by_its_limit_has_no_end_token(loaded):
    short, long = generate(loaded, [request(max_tokens=3), request(PROMPTS[2], max_tokens=9)])
    assert short.finish_reason == long.finish_reason == "length"
    assert len(short.token_ids) == 3
    assert len(long.token_ids) == 9
    assert not {1} & {*short.token_ids, *long.token_ids}


def test_a_tight_nucleus_is_greedy(loaded):
    greedy, nucleus = generate(loaded, [request(max_tokens=10), request(temperature=1.5, top_p=1e-6, max_tokens=10)])
    assert nucleus.token_ids == greedy.token_ids


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 8.0])
def test_the_nucleus_is_that_of_transformers(vocabulary, top_p, sharpness):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * sharpness
    expected = TopPLogitsWarper(top_p)(None, logits).isfinite()
    probabilities = logits.softmax(-1)
    kept = nucleus(probabilities, torch.full((3, 1), top_p, dtype=torch.float64)) > 0
    assert torch.equal(kept, expected)


def test_rows_with_and_without_a_nucleus_share_a_batch():
    probabilities = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3]])
    kept = nucleus(probabilities, torch.tensor([[0.5], [1.0]]))
    assert kept.tolist() == [pytest.approx([0, 0.6, 0]), pytest.approx([0.1, 0.6, 0.3])]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.1])
def test_tokens_are_drawn_as_often_as_the_model_says(loaded, top_p):
    expected = loaded.model(torch.tensor([[5, 9, 30]])).logits[0, -1].float().softmax(-1)
    expected = nucleus(expected[None], torch.tensor([[top_p]]))[0]
    expected /= expected.sum()
    asked = [request(temperature=1.0, top_p=top_p, seed=s, max_tokens=1) for s in range(4000)]
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in generate(loaded, asked)]), minlength=258)
    inside = expected > 0
    assert not counts[~inside].any()
    z = ((counts - 4000 * expected) / (4000 * expected * (1 - expected)).sqrt())[inside]
    assert z.abs().max() < 5
    assert 0.7 < z.std() < 1.3


def test_tokens_are_given_out_as_they_are_sampled(loaded):
    seen: list[tuple[int, int]] = []
    answers = generate(
        loaded, [request(max_tokens=2), request((7,), max_tokens=4)], on_tokens=lambda r, t: seen.append((r, t))
    )
    assert [t for r, t in seen if r == 0] == list(answers[0].token_ids)
    assert [t for r, t in seen if r == 1] == list(answers[1].token_ids)
    assert [r for r, _ in seen] == [0, 1, 0, 1, 1, 1]


def test_a_short_answer_is_complete_before_the_batch_is(loaded):
    order: list[object] = []
    answers = generate(
        loaded,
        [request(max_tokens=6), request((7,), max_tokens=2)],
        on_tokens=lambda row, _: order.append(row),
        on_completion=lambda row, answer: order.append((row, answer)),
    )
    assert order[:5] == [0, 1, 0, 1, (1, answers[1])]
    assert order[-1] == (0, answers[0])


def test_a_row_that_nobody_waits_for_ends_early_and_the_others_go_on(loaded):
    tokens = [0, 0]

    def count(row, _token):
        tokens[row] += 1

    stopped, other = generate(
        loaded,
        [request(max_tokens=30), request((7,), max_tokens=30)],
        on_tokens=count,
        should_stop=lambda row: row == 0 and tokens[0] >= 3,
    )
    alone = generate(loaded, [request((7,), max_tokens=30)])[0]
    assert len(stopped.token_ids) == 3
    assert stopped.finish_reason == "unknown"
    assert other.token_ids == alone.token_ids


def test_sampling_habits_of_a_model_folder_change_nothing(loaded, tiny_model):
    habitual = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    habitual.generation_config.repetition_penalty = 3.0
    habitual.generation_config.no_repeat_ngram_size = 1
    habitual.generation_config.temperature = 0.1
    plain = generate(loaded, [request(max_tokens=16), request(temperature=1.0, seed=1, max_tokens=16)])
    assert (
        generate(
            Loaded(habitual, loaded.tokenizer, (1,)),
            [request(max_tokens=16), request(temperature=1.0, seed=1, max_tokens=16)],
        )
        == plain
    )


def test_no_requests_give_no_answers(loaded):
    assert generate(loaded, []) == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (request(()), "without tokens"),
        (request(max_tokens=0), "max_tokens"),
        (request(top_p=0.0), "top_p"),
        (request(temperature=-1.0), "temperature"),
        (request(range(100), max_tokens=2000), "context of 2048"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_by_name(loaded, wrong, named):
    assert context_window(loaded.model) == 2048
    with pytest.raises(ModelError, match=named):
        generate(loaded, [request(), wrong])


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 14)), min_size=2, max_size=9),
    asked=st.lists(st.integers(0, 3), max_size=12),
    places=st.sampled_from([3, 8]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_that_joins_a_batch_under_way_gets_the_answer_it_gets_alone(loaded, rows, asked, places):
    requests = [request(PROMPTS[which], max_tokens=limit) for which, limit in rows]
    waiting, turns = requests[1:], iter(asked)

    def more(most):
        count = len(waiting) if most == places else min(most, next(turns, 0))
        joining = waiting[:count]
        del waiting[:count]
        return joining

    answers = generate(loaded, requests[:1], more=more, places=places)
    assert not waiting
    for answer, alone in zip(answers, requests, strict=True):
        assert answer.token_ids == generate(loaded, [alone])[0].token_ids


def test_a_batch_that_is_joined_without_end_does_not_grow_without_end(loaded, monkeypatch):
    widths = []
    forward = loaded.model.forward

    def watched(*arguments, **keywords):
        widths.append(keywords["attention_mask"].shape[1])
        return forward(*arguments, **keywords)

    monkeypatch.setattr(loaded.model, "forward", watched)
    waiting = [request(max_tokens=6, temperature=1.0, seed=i) for i in range(40)]
    answers = generate(loaded, [request(max_tokens=4)], more=lambda _: [waiting.pop()] if waiting else [], places=3)
    assert len(answers) == 41
    # A row is 3 + 6 tokens at most, and columns of rows that left go when the next one joins.
    assert max(widths) <= 3 + 6 + 6


def test_rows_under_way_get_their_tokens_while_others_join_without_end(loaded):
    order: list[int] = []
    left = iter(range(1000))

    def more(_most):
        return [request(max_tokens=1)] if next(left, None) is not None and order.count(0) < 12 else []

    generate(loaded, [request(max_tokens=12)], more=more, places=16, on_tokens=lambda row, _: order.append(row))
    assert order[:4] == [0, 1, 2, 0], "between two tokens of a row others begin once"
    assert len(order) <= 2 * 12 + 2


def test_rows_leave_the_batch_of_a_model_with_convolution_layers(loaded):
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    hybrid = Loaded(Lfm2ForCausalLM(config).eval(), loaded.tokenizer, (1,))
    # Prompts of one length: left padding is no business of a convolution's.
    prompts, limits = [(5, 9, 30), (7, 8, 9), (200, 100, 50)], (2, 10, 6)
    asked: list[int] = []
    answers = generate(
        hybrid,
        [request(p, max_tokens=n) for p, n in zip(prompts, limits, strict=True)],
        more=lambda n: asked.append(n) or [],
        places=2,
    )
    assert not asked, "what such a layer keeps of a row cannot be moved beside another's"
    for prompt, limit, answer in zip(prompts, limits, answers, strict=True):
        (alone,) = generate(hybrid, [request(prompt, max_tokens=limit)])
        assert answer.token_ids == alone.token_ids


def test_a_temperature_too_small_for_fp32_is_greedy(loaded):
    cold, greedy = generate(loaded, [request(temperature=1e-50, seed=1), request()])
    assert cold.token_ids == greedy.token_ids
