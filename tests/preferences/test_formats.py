"""Files: every shape is read, every fault is named by place, field and reason, and no row is lost."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import DataError
from app.preferences.formats import read_rows
from app.schemas import Message, Pair, ToolCall

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def write(folder: Path, *rows, name="rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return path


def read_one(folder: Path, row) -> Pair:
    reading = read_rows([write(folder, row)])
    assert not reading.rejections, reading.rejections
    return reading.candidates[0].pair


def said(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SHAPES = {
    "strings": GOOD,
    "messages": {
        "prompt": [USER],
        "chosen": [ANSWER],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "one message a side": {"prompt": [USER], "chosen": ANSWER, "rejected": {"role": "assistant", "content": "No."}},
    "implicit prompt": {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No."}]},
    "implicit prompt of strings": {"chosen": "Why? Because.", "rejected": "Why? No."},
    "prompt repeated in the answers": {
        "prompt": "Why?",
        "chosen": [USER, ANSWER],
        "rejected": [USER, {"role": "assistant", "content": "No."}],
    },
    "openai": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [ANSWER],
        "non_preferred_output": [{"role": "assistant", "content": "No."}],
    },
    "transcripts": {
        "chosen": f"{HUMAN}Why?{ASSISTANT}Because.",
        "rejected": f"{HUMAN}Why?{ASSISTANT}No.",
    },
    "transcript as prompt": {"prompt": f"{HUMAN}Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "alpaca": {"instruction": "Why?", "input": "", "chosen": "Because.", "rejected": "No."},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_pair_gives_the_same_pair(tmp_path, shape):
    pair = read_one(tmp_path, SHAPES[shape])
    assert pair.prompt == said("Why?")
    assert (pair.chosen.content, pair.rejected.content) == ("Because.", "No.")
    assert (pair.kind, pair.source, pair.chosen.finish_reason) == ("pair", "import", "unknown")
    assert pair.pair_id == read_one(tmp_path, GOOD).pair_id


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    ],
)
def test_a_labelled_answer_is_an_unpaired_row(tmp_path, row, label):
    pair = read_one(tmp_path, {**row, "label": label})
    assert (pair.kind, pair.label, pair.prompt) == ("unpaired", label, said("Why?"))
    assert (pair.chosen if label else pair.rejected).content == "Because."
    assert (pair.rejected if label else pair.chosen) is None


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"prompt": "Why?", "completion": "Because."},
    ],
)
def test_instruction_data_is_labelled_good(tmp_path, row):
    pair = read_one(tmp_path, row)
    assert (pair.label, pair.chosen.content, pair.rejected) == (True, "Because.", None)


def test_an_instruction_and_its_input_are_one_question(tmp_path):
    pair = read_one(tmp_path, {"instruction": "Sum up.", "input": "A text.", "output": "Text."})
    assert pair.prompt == said("Sum up.\nA text.")


def test_a_row_may_say_what_its_judgement_counts_for(tmp_path):
    assert read_one(tmp_path, GOOD).weight == 1.0
    assert read_one(tmp_path, {**GOOD, "weight": None}).weight == 1.0
    assert read_one(tmp_path, {**GOOD, "weight": 2}).weight == 2.0
    assert read_one(tmp_path, {"prompt": "Why?", "completion": "So.", "label": False, "weight": 0.25}).weight == 0.25
    pq.write_table(pa.Table.from_pylist([{**GOOD, "weight": 0.5}]), tmp_path / "rows.parquet")
    assert [c.pair.weight for c in read_rows([tmp_path / "rows.parquet"]).candidates] == [0.5]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (0, "wrong_weight"),
        (-1.5, "wrong_weight"),
        (1e39, "wrong_weight"),
        (1e-50, "wrong_weight"),
        (True, "wrong_type"),
        ("2", "wrong_type"),
    ],
)
def test_a_weight_that_cannot_count_costs_its_row(tmp_path, weight, reason):
    reading = read_rows([write(tmp_path, {**GOOD, "weight": weight})])
    assert [rejection.reason for rejection in reading.rejections] == [reason]


@pytest.mark.parametrize("weight", ["NaN", "Infinity"])
def test_a_weight_that_is_no_number_costs_its_row(tmp_path, weight):
    line = json.dumps(GOOD)[:-1] + f', "weight": {weight}}}\n'
    reading = read_rows([write(tmp_path, line.encode())])
    assert len(reading.rejections) == 1, reading.candidates


def test_transcripts_share_their_earlier_turns_as_prompt(tmp_path):
    start = f"{HUMAN}One{ASSISTANT}Two{HUMAN}Three"
    pair = read_one(tmp_path, {"chosen": f"{start}{ASSISTANT}Four", "rejected": f"{start}{ASSISTANT}Five"})
    assert pair.prompt == said("One", "Two", "Three")


def test_tools_tool_calls_and_names_are_kept(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    row = {
        "input": {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Wie ist es in Zürich?", "name": "ana"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "9 °C", "tool_call_id": "call-1"},
            ],
            "tools": tools,
        },
        "preferred_output": [{"role": "assistant", "content": "Kühl, 9 °C."}],
        "non_preferred_output": [{"role": "assistant", "tool_calls": [call], "content": None}],
    }
    pair = read_one(tmp_path, row)
    assert json.loads(pair.tools) == tools
    assert pair.prompt[1].name == "ana"
    assert pair.prompt[2].tool_calls == (ToolCall("call-1", "weather", '{"city": "Zürich"}'),)
    assert pair.prompt[3].tool_call_id == "call-1"
    assert (pair.rejected.content, pair.rejected.tool_calls[0].name) == ("", "weather")


def test_sharegpt_function_calls_become_tool_calls(tmp_path):
    row = {
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
            {"from": "observation", "value": "2"},
        ],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3"},
    }
    pair = read_one(tmp_path, row)
    assert [m.role for m in pair.prompt] == ["system", "user", "assistant", "tool"]
    assert pair.prompt[2].tool_calls == (ToolCall(None, "add", '{"a":1,"b":1}'),)
    assert pair.tools == '[{"name":"add"}]'


def changed(**fields):
    return {**GOOD, **fields}


BAD = [
    (changed(chosen=""), "empty", "`chosen` is empty"),
    (changed(rejected=None), "null", "`rejected` is null"),
    ({"prompt": "Why?", "chosen": "Because."}, "null", "`rejected` is missing"),
    (changed(chosen=" \n\t"), "whitespace_only", "`chosen` holds white space only"),
    (changed(rejected=" Because. "), "identical", "the same, white space aside"),
    (changed(chosen="é", rejected="e\u0301"), "identical", "the same"),
    (changed(prompt=""), "no_prompt", "`prompt` is empty"),
    (changed(prompt=None), "no_prompt", "the prompt is null"),
    ({"chosen": "a", "rejected": "b"}, "no_prompt", "there is no `prompt`"),
    (changed(prompt=7), "wrong_type", "`prompt` must be text or messages, found int"),
    (changed(chosen=3.5), "wrong_type", "`chosen` must be text or messages, found float"),
    (changed(prompt=[{"role": "user", "content": 3}]), "wrong_type", "`prompt[0]`: `content` of a user message"),
    (changed(prompt=[{"content": "x"}]), "wrong_type", "`prompt[0]`: a message needs a `role`"),
    (changed(prompt=["x"]), "wrong_type", "`prompt[0]`: a message must be a mapping, found str"),
    (
        changed(prompt=[USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}]),
        "wrong_type",
        "`prompt[1]`: a tool call needs a function with a `name`",
    ),
    (changed(prompt=[USER, USER]), "wrong_role_order", "`user` follows user"),
    (changed(prompt=[USER, ANSWER]), "wrong_role_order", "the prompt ends with assistant"),
    (changed(prompt=[ANSWER, USER]), "wrong_role_order", "`assistant` follows start"),
    (changed(prompt=[{"role": "system", "content": "x"}]), "no_prompt", "holds no question"),
    (changed(chosen=[{"role": "user", "content": "Who?"}]), "wrong_role_order", "comes from `user`, not the assistant"),
    (
        {"conversations": [{"from": "martian", "value": "x"}], "chosen": "a", "rejected": "b"},
        "wrong_role_order",
        "`from` is 'martian'",
    ),
    (
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No."}]},
        "diverges_early",
        "differ before their last answer",
    ),
    (changed(chosen="a\x00b"), "nul_or_surrogate", "`chosen` holds a NUL"),
    (b'{"prompt": "x", "chosen": "\\ud800", "rejected": "b"}\n', "nul_or_surrogate", "`chosen` holds"),
    (b'{"prompt": "x", "chosen": "\xff\xfe", "rejected": "b"}\n', "not_utf8", "`chosen` is not UTF-8"),
    (b'{"prompt": "x", "chosen": \n', "unreadable_line", "no JSON"),
    (["a", "b"], "wrong_type", "a row must be a mapping of fields, found list"),
    ({"question": "x", "answer": "y"}, "unknown_shape", "no known shape has the fields question, answer"),
    ({"chosen": "blue", "rejected": "black"}, "no_prompt", "share no beginning"),
    ({"messages": [USER, ANSWER], "label": "yes"}, "wrong_type", "`label` must be true or false, found 'yes'"),
    ({"messages": [USER, ANSWER], "label": 1}, "wrong_type", "`label` must be true or false, found 1"),
    ({"messages": [USER], "label": True}, "wrong_role_order", "must end with an answer"),
    ({"input": "x", "preferred_output": [], "non_preferred_output": []}, "wrong_type", "`input` must be a mapping"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD, ids=range(len(BAD)))
def test_a_row_that_cannot_train_is_named_by_line_field_and_reason(tmp_path, row, reason, detail):
    path = write(tmp_path, GOOD, row, GOOD)
    reading = read_rows([path])
    assert (reading.rows, len(reading.candidates), len(reading.rejections)) == (3, 2, 1)
    rejection = reading.rejections[0]
    assert (rejection.place, rejection.reason) == (f"{path}:2", reason)
    assert detail in rejection.detail
    rejection.to_row()["raw"].encode()


def truncated_gzip() -> bytes:
    return gzip.compress(json.dumps(GOOD).encode() * 200)[:60]


def parquet(rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


UNREADABLE = [
    ("a.jsonl", b"", "it is empty (0 bytes)"),
    ("a.jsonl", b"\n\n", "it holds no rows"),
    ("a.json", b"[]", "it holds no rows"),
    ("a.json", b'[{"prompt": "x", ', "it is truncated or no JSON"),
    ("a.json", b'{"prompt": "x",\n "chosen"', "it is truncated or no JSON"),
    ("a.jsonl", b"not\njson\n", "no line of it is JSON (line 1:"),
    ("a.jsonl", "[1]".encode("utf-16"), "it is UTF-16 text, not JSONL"),
    ("a.jsonl", b"PAR1...", "it is Parquet, not JSONL"),
    ("a.jsonl.gz", b"plain text", "it is no gzip file"),
    ("a.jsonl.gz", truncated_gzip(), "the gzip stream is truncated"),
    ("a.parquet", b"", "it is empty (0 bytes)"),
    ("a.parquet", parquet([GOOD])[:-20], "it is no readable Parquet file"),
    ("a.parquet", b"x" * 100, "it is no readable Parquet file"),
    ("a.parquet", parquet([{"price": 3, "colour": "red"}]), "its columns are no preference or instruction data: price"),
    ("a.parquet", parquet([GOOD])[:4] + b"\x00" * 40 + parquet([GOOD])[44:], "it is no readable Parquet file"),
    ("a.csv", b"prompt,chosen\n", "unknown file type `.csv`; known: .parquet, .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "why"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name, content, why):
    path = write(tmp_path, content, name=name)
    with pytest.raises(DataError) as refused:
        read_rows([path])
    assert f"`{path}`: {why}" in str(refused.value)


def test_all_unreadable_files_are_listed_at_once_and_nothing_is_read(tmp_path):
    good = write(tmp_path, GOOD)
    empty = write(tmp_path, b"", name="empty.jsonl")
    with pytest.raises(DataError) as refused:
        read_rows([good, empty, tmp_path / "missing.json", tmp_path])
    message = str(refused.value)
    assert message.startswith("3 of 4 file(s) cannot be read, nothing was imported")
    assert f"`{empty}`: it is empty" in message
    assert "missing.json`: No such file or directory" in message
    assert str(good) not in message


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path, kind, suffix):
    rows = [GOOD, changed(prompt="Où ? \u2028 🙂"), changed(chosen="")]
    content = {
        "jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows).encode(),
        "json": json.dumps(rows, indent=1).encode(),
        "parquet": parquet(rows),
    }[kind]
    path = write(tmp_path, gzip.compress(content) if suffix else content, name=f"rows.{kind}{suffix}")
    reading = read_rows([path])
    assert [c.pair.prompt[0].content for c in reading.candidates] == ["Why?", "Où ? \u2028 🙂"]
    places = {"jsonl": f"{path}:3"}
    assert reading.rejections[0].place == places.get(kind, f"{path} row 3")


def test_json_lines_in_a_file_called_json_are_read(tmp_path):
    assert read_rows([write(tmp_path, GOOD, GOOD, name="rows.json")]).rows == 2


def test_text_that_is_not_utf8_in_parquet_costs_its_row_only(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "chosen": pa.array([b"x", b"\xff", b"z"]).cast(pa.binary()).view(pa.string()),
            "rejected": ["r", "r", "r"],
        }
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    reading = read_rows([path])
    assert [c.pair.prompt[0].content for c in reading.candidates] == ["a", "c"]
    assert [(r.place, r.reason) for r in reading.rejections] == [(f"{path} row 2", "not_utf8")]


def test_null_columns_of_a_mixed_parquet_file_are_no_shape_of_their_own(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{**GOOD, "completion": None, "label": None}, {"prompt": "Why?", "completion": "So.", "label": False}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [c.pair.kind for c in read_rows([path]).candidates] == ["pair", "unpaired"]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1).filter(
    lambda t: t.strip() and "Human:" not in t
)


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_text_comes_through_byte_equal(tmp_path_factory, prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    reading = read_rows([write(tmp_path_factory.mktemp("text"), row)])
    for candidate in reading.candidates:
        assert candidate.pair.prompt[0].content == prompt
        assert (candidate.pair.chosen.content, candidate.pair.rejected.content) == (chosen, rejected)
    assert [r.reason for r in reading.rejections] in ([], ["identical"])


PLAIN = st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(["", " ", "a", "b", "\ud800", "\x00"])
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), PLAIN, max_size=3)
JSON = PLAIN | MESSAGE | st.lists(MESSAGE | st.sampled_from([USER, ANSWER]), max_size=3)
FIELDS = st.sampled_from(
    ["prompt", "chosen", "rejected", "messages", "conversations", "label", "completion", "input", "preferred_output"]
)


@given(
    rows=st.lists(
        st.dictionaries(FIELDS, JSON, max_size=4) | st.binary(max_size=9).map(lambda b: b + b"\n"), max_size=6
    )
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_whatever_stands_in_a_file_no_row_is_lost(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("any"), {"prompt": "p", "chosen": "a", "rejected": "b"}, *rows)
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip(b" \t\r")]
    try:
        reading = read_rows([path])
    except DataError as refused:
        assert "cannot be read" in str(refused)
        return
    assert len(reading.candidates) + len(reading.rejections) == reading.rows == len(lines)
    for rejection in reading.rejections:
        assert rejection.reason
        assert rejection.detail


def test_hh_rlhf_is_read_as_it_is():
    path = SHARED / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    if not path.exists():
        start = f"{HUMAN}a{ASSISTANT}b{HUMAN}c"
        rows = {"chosen": f"{start}{ASSISTANT}d", "rejected": f"{start}{ASSISTANT}"}, GOOD
        assert _reasons(rows) == {"empty": 1}
        return
    reading = read_rows([path])
    assert reading.rows == 2312
    assert Counter(r.reason for r in reading.rejections) == {"diverges_early": 5, "empty": 4, "wrong_role_order": 4}


def _reasons(rows) -> Counter[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return Counter(r.reason for r in read_rows([write(Path(folder), *rows)]).rejections)


@pytest.mark.parametrize(
    ("name", "rows", "kinds"),
    [
        ("dpo_en_demo.json.gz", 300, {"pair": 300}),
        ("kto_en_demo.json.gz", 300, {"unpaired": 300}),
        ("alpaca_en_demo.json.gz", 999, {"unpaired": 999}),
    ],
)
def test_llama_factory_samples_are_read_whole(tmp_path, name, rows, kinds):
    path = SHARED / "llamafactory_demo" / name
    if not path.exists():
        assert read_one(tmp_path, SHAPES["sharegpt"]).kind == "pair"
        return
    reading = read_rows([path])
    assert reading.rows == rows
    assert Counter(c.pair.kind for c in reading.candidates) == kinds
