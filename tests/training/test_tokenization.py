"""Token ids: sampled ids are kept, cut answers never train an end token, every row is accounted for."""

import copy
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from app.errors import DataError
from app.models import template_digest
from app.schemas import Message, Pair, Response
from app.training.tokenization import encode_groups

END = 1
PROMPT = (Message("user", "Say hi"),)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def pair(chosen: Response, rejected: Response, prompt=PROMPT) -> Pair:
    return Pair(prompt, chosen, rejected, "import", "train", "cluster")


def encode(tokenizer, pairs, **changes):
    settings = {"max_length": 200, "too_long": "drop", "end_ids": (END,), "template_digest": template_digest(tokenizer)}
    return encode_groups(pairs, tokenizer, **(settings | changes))


def test_rendered_answers_end_with_exactly_one_end_token(tokenizer):
    groups, audit = encode(tokenizer, [pair(Response("Hello"), Response("Go away"))])
    for ids in groups[0].responses:
        assert ids[-1] == END
        assert ids.count(END) == 1
    assert tokenizer.decode(groups[0].responses[0][:-1]) == "Hello"
    assert tokenizer.decode(groups[0].prompt_ids).endswith("<|im_start|>assistant\n")
    assert audit.kept == 1


def test_an_answer_cut_by_length_never_trains_an_end_token(tokenizer):
    cut = Response("Hello", finish_reason="length")
    sampled = Response("Hi", finish_reason="length", token_ids=(7, 8, END), template_digest=template_digest(tokenizer))
    groups, _ = encode(tokenizer, [pair(cut, sampled)])
    assert all(END not in ids for ids in groups[0].responses)


def test_sampled_ids_are_trained_as_they_were_sampled_if_the_template_is_the_same(tokenizer):
    ids = (40, 41, 42, END)
    sampled = Response("abc", "stop", ids, template_digest(tokenizer))
    groups, _ = encode(tokenizer, [pair(sampled, Response("no"))])
    assert groups[0].responses[0] == ids
    foreign = replace(sampled, template_digest="another")
    groups, _ = encode(tokenizer, [pair(foreign, Response("no"))])
    assert tokenizer.decode(groups[0].responses[0][:-1]) == "abc"


def test_pairs_of_one_prompt_share_a_group_and_equal_answers(tokenizer):
    a, b, c = Response("a"), Response("b"), Response("c")
    groups, audit = encode(tokenizer, [pair(a, b), pair(a, c), pair(b, c)])
    assert len(groups) == 1
    assert len(groups[0].responses) == 3
    assert [(p.chosen, p.rejected) for p in groups[0].pairs] == [(0, 1), (0, 2), (1, 2)]
    assert audit.kept == 3


def test_rows_that_cannot_train_are_counted_by_reason(tokenizer):
    long = (Message("user", "x" * 300),)
    rows = [
        pair(Response("a"), Response("b"), prompt=long),
        pair(Response("a" * 190), Response("b")),
        pair(Response("a"), Response("a", finish_reason="unknown")),
        pair(Response("a"), Response("b")),
    ]
    groups, audit = encode(tokenizer, rows)
    assert audit.dropped == {"prompt_longer_than_window": 1, "longer_than_window": 1, "identical_tokens": 1}
    assert audit.kept + sum(audit.dropped.values()) == len(rows)
    assert len(groups) == 1


def test_too_long_rows_are_truncated_or_refused_where_the_recipe_says_so(tokenizer):
    row = pair(Response("a" * 190), Response("b"))
    groups, audit = encode(tokenizer, [row], too_long="truncate_response")
    assert audit.truncated == 1
    assert len(groups[0].prompt_ids) + len(groups[0].responses[0]) == 200
    assert END not in groups[0].responses[0]
    with pytest.raises(DataError, match="more than prepare.max_length = 200"):
        encode(tokenizer, [row], too_long="refuse")


def test_a_template_that_does_not_preserve_the_prompt_is_found(tokenizer):
    changed = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    changed.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    _, audit = encode(changed, [pair(Response("a"), Response("b"))], template_digest=template_digest(changed))
    assert audit.dropped == {"template_not_prefix_preserving": 1}


def test_an_answer_that_holds_an_end_token_does_not_train_and_the_first_such_row_is_named(tokenizer):
    said = tokenizer.convert_ids_to_tokens(END)
    rows = [pair(Response(f"one{said}two"), Response("b")), pair(Response(f"one{said}two"), Response("c"))]
    _, audit = encode(tokenizer, [*rows, pair(Response("a"), Response("b"))])
    assert (audit.kept, dict(audit.dropped), audit.examples) == (
        1,
        {"end_token_inside": 2},
        {"end_token_inside": rows[0].pair_id},
    )


def test_an_answer_without_a_token_to_score_does_not_train(tokenizer):
    empty = Response("", "stop", (END,), template_digest(tokenizer))
    _, audit = encode(tokenizer, [pair(empty, Response("b"))])
    assert dict(audit.dropped) == {"no_scored_token": 1}


def test_a_template_that_fails_or_writes_no_end_costs_the_row_and_not_the_run(tokenizer):
    broken, endless = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    broken.chat_template = "{{ raise_exception('no') }}"
    endless.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for changed, reason in ((broken, "template_error"), (endless, "no_end_token")):
        _, audit = encode(changed, [pair(Response("a"), Response("b"))])
        assert dict(audit.dropped) == {reason: 1}


def test_prompts_without_the_begin_token_of_plain_text_are_counted(tokenizer):
    """As with templates that leave it to the tokenizer, which adds none to a rendered conversation."""
    begin = tokenizer.convert_tokens_to_ids("!")
    other = copy.deepcopy(tokenizer)
    other.bos_token = "!"
    other._tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", begin)])
    assert other("a").input_ids[0] == begin
    rows = [pair(Response("a"), Response("b"))]
    assert encode(tokenizer, rows)[1].without_begin == 0
    assert encode(other, rows)[1].without_begin == 1
    other.chat_template = "!" + other.chat_template
    assert encode(other, rows)[1].without_begin == 0


@pytest.mark.parametrize("reason", ["two_begin_tokens", "two_end_tokens"])
def test_a_template_that_doubles_the_first_or_the_last_token_is_found_out(tokenizer, reason):
    doubled = copy.deepcopy(tokenizer)
    begin = doubled.convert_tokens_to_ids("<|im_start|>")
    if reason == "two_begin_tokens":
        doubled.bos_token = "<|im_start|>"
        assert doubled.bos_token_id == begin
        doubled.chat_template = "<|im_start|>" + doubled.chat_template
    else:
        doubled.chat_template = doubled.chat_template.replace("<|im_end|>", "<|im_end|><|im_end|>")
    _, audit = encode(doubled, [pair(Response("a"), Response("b"))])
    assert (audit.kept, audit.dropped) == (0, {reason: 1})
