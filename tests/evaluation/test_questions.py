"""Question and answer files of the benchmarks are read as their authors write them, and faults are named."""

import gzip
import json

import pytest

from app.errors import DataError
from app.evaluation.questions import (
    alpaca_questions,
    arena_hard_questions,
    mt_bench_questions,
    read_answers,
    require_answers,
    xstest_questions,
)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_arena_hard_s_topics_are_clusters_and_near_duplicates_share_one(tmp_path):
    long = (
        "write a story about a dragon that lives in a cave behind the old mill by the river and never sleeps at night"
    )
    rows = [
        {"uid": "a", "category": "c", "cluster": "ABC", "prompt": "x"},
        {"question_id": "b", "category": "c", "turns": [{"content": long}]},
        {"uid": "d", "category": "c", "prompt": long + "!"},
    ]
    found = arena_hard_questions(write(tmp_path / "q.jsonl", rows))
    assert [(q.id, q.category, q.turns[0][:5]) for q in found] == [
        ("a", "c", "x"),
        ("b", "c", "write"),
        ("d", "c", "write"),
    ]
    assert found[0].cluster == "ABC"
    assert found[1].cluster == found[2].cluster != "ABC"


def test_mt_bench_has_turns_references_and_temperatures(tmp_path):
    questions = [
        {"question_id": 1, "category": "math", "turns": ["1+1?", "+1?"]},
        {"question_id": 2, "category": "writing", "turns": ["write"]},
    ]
    references = [{"question_id": 1, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["2", "3"]}]}]
    found = mt_bench_questions(write(tmp_path / "q.jsonl", questions), write(tmp_path / "r.jsonl", references))
    assert [(q.id, q.references, q.temperature) for q in found] == [("1", ("2", "3"), 0.0), ("2", (), 0.7)]
    with pytest.raises(DataError, match="answers `1`, which .* does not ask"):
        mt_bench_questions(write(tmp_path / "q2.jsonl", questions[1:]), str(tmp_path / "r.jsonl"))


def test_alpaca_s_instructions_come_with_the_baseline_s_outputs(tmp_path):
    rows = [
        {"instruction": "Translate.", "input": "Hund", "output": "dog", "generator": "base"},
        {"instruction": "Say hi.", "output": "hi", "generator": "base"},
        {"instruction": "Say hi.", "output": "hello", "generator": "base"},
    ]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    questions, answers = alpaca_questions(str(path))
    assert [q.turns for q in questions] == [("Translate.\n\nHund",), ("Say hi.",)]
    assert (answers.model, sorted(answers.turns.values())) == ("base", [("dog",), ("hi",)])


def test_xstest_tells_safe_from_unsafe_by_type(tmp_path):
    (tmp_path / "x.csv").write_text(
        'id,prompt,type,label\n1,"kill, a process?",homonyms,safe\n2,kill a man?,contrast_homonyms,unsafe\n'
    )
    found = xstest_questions(str(tmp_path / "x.csv"))
    assert [(q.id, q.turns[0], q.category) for q in found] == [
        ("1", "kill, a process?", "safe"),
        ("2", "kill a man?", "unsafe"),
    ]


def test_answers_of_arena_hard_and_fastchat_are_read(tmp_path):
    arena = [
        {
            "uid": "a",
            "model": "m",
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": "x"}}],
        },
        {"uid": "b", "model": "m", "messages": [{"role": "assistant", "content": "y"}]},
    ]
    assert read_answers(write(tmp_path / "a.jsonl", arena)).turns == {"a": ("x",), "b": ("y",)}
    fastchat = [{"question_id": 1, "model_id": "m", "choices": [{"turns": ["one", "two"]}]}]
    found = read_answers(write(tmp_path / "f.jsonl", fastchat))
    assert (found.model, found.turns) == ("m", {"1": ("one", "two")})
    questions = arena_hard_questions(
        write(
            tmp_path / "q.jsonl",
            [{"uid": "1", "category": "c", "prompt": "x"}, {"uid": "2", "category": "c", "prompt": "y"}],
        )
    )
    with pytest.raises(DataError, match="lacks answers to 1 of 2 questions, such as `2`"):
        require_answers(questions, found, "f.jsonl")


GOOD = {"uid": "a", "category": "c", "prompt": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no questions"),
        ([GOOD, GOOD], "id `a` is used more than once"),
        ([{**GOOD, "category": ""}], "line 1: `category` must be a name"),
        ([{"uid": "a", "prompt": "x"}], "line 1: `category` must be a name, found None"),
        ([GOOD, {**GOOD, "uid": "b", "prompt": " "}], "line 2: `prompt` must be text"),
        ([{"category": "c", "prompt": "x"}], "line 1: `uid` must be a name"),
        ([["a"]], "line 1: an object is needed"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        arena_hard_questions(write(tmp_path / "q.jsonl", rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"uid": "a", "model": "m"}], "line 1: no answer in"),
        (
            [{"uid": "a", "model": x, "messages": [{"role": "assistant", "content": "y"}]} for x in "mn"],
            "answered twice",
        ),
        (
            [{"uid": x, "model": x, "messages": [{"role": "assistant", "content": "y"}]} for x in "mn"],
            "one model, found m, n",
        ),
        ([], "one model, found none"),
    ],
)
def test_answer_files_that_mix_or_lack_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_answers(write(tmp_path / "a.jsonl", rows))


def test_a_row_of_another_length_and_a_label_against_its_type_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("id,prompt,type,label\n1,kill,a,process,homonyms,safe\n")
    with pytest.raises(DataError, match="line 2 has another number of fields"):
        xstest_questions(str(tmp_path / "x.csv"))
    (tmp_path / "y.csv").write_text("id,prompt,type,label\n1,kill,contrast_homonyms,safe\n")
    with pytest.raises(DataError, match="the label is `safe`, the type `contrast_homonyms` says `unsafe`"):
        xstest_questions(str(tmp_path / "y.csv"))


class TestPublished:
    """The files as their authors publish them, where they are at hand."""

    def test_all_of_them_are_read(self, published):
        v1 = arena_hard_questions(str(published / "arena_hard/v0.1/question.jsonl"))
        assert (len(v1), len({q.cluster for q in v1})) == (500, 250)
        v2 = arena_hard_questions(str(published / "arena_hard/v2.0/question.jsonl"))
        assert (len(v2), {q.category for q in v2}) == (750, {"hard_prompt", "creative_writing"})
        require_answers(
            [q for q in v2 if q.category == "hard_prompt"],
            read_answers(str(published / "arena_hard/v2.0/answer_o3-mini-2025-01-31.jsonl.gz")),
            "o3-mini",
        )
        mt = mt_bench_questions(
            str(published / "mt_bench/question.jsonl"), str(published / "mt_bench/reference_answer_gpt-4.jsonl")
        )
        assert (len(mt), sum(bool(q.references) for q in mt), {len(q.turns) for q in mt}) == (80, 30, {2})
        halves = [q.category for q in xstest_questions(str(published / "xstest/xstest_prompts.csv"))]
        assert (halves.count("safe"), halves.count("unsafe")) == (250, 200)
        asked, answered = alpaca_questions(str(published / "llamafactory_demo/alpaca_en_demo.json.gz"))
        assert len(asked) == len(answered.turns) > 900
