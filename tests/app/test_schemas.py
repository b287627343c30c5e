"""The data contract: equal content has equal ids, and every row comes back as it went."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import DataError
from app.schemas import (
    PAIR_SCHEMA,
    Message,
    Pair,
    Response,
    ToolCall,
    canonical_json,
    content_hash,
    content_hash_of,
    prompt_key,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CALLS = st.lists(st.builds(ToolCall, st.none() | TEXT, TEXT, TEXT), max_size=2).map(tuple)
MESSAGES = st.builds(
    Message, st.sampled_from(["user", "assistant", "tool"]), st.none() | TEXT, st.none() | TEXT, CALLS, st.none() | TEXT
)
RESPONSES = st.builds(
    Response,
    TEXT,
    st.sampled_from(["stop", "length", "tool_calls", "unknown"]),
    st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    st.none() | TEXT,
    st.none() | TEXT,
    st.none() | TEXT,
    CALLS,
)
PAIRS = st.builds(
    Pair,
    prompt=st.lists(MESSAGES, min_size=1, max_size=3).map(tuple),
    chosen=st.none() | RESPONSES,
    rejected=st.none() | RESPONSES,
    source=st.sampled_from(["edit", "import"]),
    split=st.sampled_from(["train", "held_out"]),
    cluster=TEXT,
    label=st.none() | st.booleans(),
    tools=st.none() | TEXT,
    weight=st.sampled_from([0.25, 1.0]),
    response_ids=st.lists(TEXT, max_size=2).map(tuple),
    event_ids=st.lists(TEXT, max_size=2).map(tuple),
    subject=st.none() | TEXT,
)


@given(pair=PAIRS)
def test_a_pair_comes_back_from_arrow_as_it_went(pair):
    table = pa.Table.from_pylist([pair.to_row()], schema=PAIR_SCHEMA)
    row = table.to_pylist()[0]
    assert Pair.from_row(row) == pair
    assert (row["pair_id"], row["kind"]) == (pair.pair_id, pair.kind)


@given(message=MESSAGES)
def test_a_message_comes_back_from_the_openai_format(message):
    assert Message.from_openai(message.to_openai()) == message


@given(pair=PAIRS)
def test_the_id_of_a_pair_is_of_what_trains_not_of_where_it_came_from(pair):
    from dataclasses import replace

    assert replace(pair, source="judge", weight=0.5, event_ids=("x",), subject="x", split="x").pair_id == pair.pair_id
    assert replace(pair, prompt=(*pair.prompt, Message("user", "more"))).pair_id != pair.pair_id
    if pair.chosen != pair.rejected:
        swapped = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        trained = lambda r: r and (r.content, r.tool_calls, r.finish_reason, r.token_ids)  # noqa: E731
        assert (swapped.pair_id != pair.pair_id) == (trained(pair.chosen) != trained(pair.rejected))


@given(
    value=st.dictionaries(TEXT, st.integers() | TEXT | st.none() | st.lists(st.booleans()), max_size=5),
    data=st.data(),
)
def test_equal_values_have_one_text_and_one_hash(value, data):
    keys = data.draw(st.permutations(list(value)))
    again = {key: value[key] for key in keys}
    assert canonical_json(again) == canonical_json(value)
    assert content_hash(again) == content_hash(value)
    assert content_hash([value]) != content_hash(value)
    assert content_hash_of([value, 7], [value, again]) == content_hash([value, 7, [value, again]])
    assert content_hash_of([], []) == content_hash([[]])


def test_the_ids_are_these_for_ever():
    """Pinned: snapshots of earlier versions carry them."""
    pair = Pair((Message("user", "Why? 🙂"),), Response("a"), Response("b", "stop", (1, 2)), "import", "train", "c")
    assert content_hash({"b": [1, "é"], "a": None}) == "f8f17faab95c024891d173fa43442b0e"
    assert pair.pair_id == "4801d65a6612ffd4270f179954bd60d0"
    assert prompt_key(pair.prompt, None) == "e6758efc4f9606ed73042e45887d7aa9"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("text", "a message must be a mapping, found str"),
        ({}, "a message needs a `role`, found None"),
        ({"role": ""}, "a message needs a `role`, found ''"),
        ({"role": "user", "content": [1]}, "`content` of a user message must be text, found list"),
        ({"role": "user", "content": "x", "name": 3}, "`name` of a user message must be text, found int"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "`tool_call_id` of a tool message must be text"),
        ({"role": "assistant", "tool_calls": "x"}, "`tool_calls` of a assistant message must be a list, found str"),
        ({"role": "assistant", "tool_calls": [3]}, "a tool call needs a function with a `name`, found 3"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a tool call needs a function with a `name`"),
        ({"role": "assistant", "tool_calls": [{"id": 3, "function": {"name": "f"}}]}, "`id` and `type` of a tool call"),
    ],
)
def test_a_malformed_message_is_refused_in_words(raw, message):
    with pytest.raises(DataError) as refused:
        Message.from_openai(raw)
    assert message in str(refused.value)


def test_arguments_that_were_sent_as_an_object_become_json_text():
    raw = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": "é"}}}]}
    assert Message.from_openai(raw).tool_calls[0].arguments == '{"a":"é","b":1}'
