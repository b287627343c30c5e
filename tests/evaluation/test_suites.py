"""Measurements on recorded answers: what is invalid, what loops, what is about its prompt."""

import re

import pytest

from app.errors import DataError
from app.evaluation import suites
from app.evaluation.intervals import Resampling
from app.evaluation.rules import parse_style
from app.evaluation.scored import compare, style_score
from app.evaluation.suites import Answer, GoldenCase

QUICK = Resampling(samples=200)
YOU = parse_style({"name": "s", "rules": [{"name": "you", "pattern": "you", "weight": 1}]}, place="x")


def answers(*texts, model="m", reason="stop"):
    reasons = reason if isinstance(reason, tuple) else (reason,) * len(texts)
    return [
        Answer(f"p{i}", f"c{i}", text, why, max(1, len(text.split())), model)
        for i, (text, why) in enumerate(zip(texts, reasons, strict=True))
    ]


def win_rate(mine, base):
    requests = {answer.prompt_id: "?" for answer in mine}
    compared = compare(mine, base, style_score(YOU), against="base", requests=requests)
    return suites.win_rate(mine, base, compared.outcomes, resampling=QUICK)


def test_invalid_answers_are_left_out_and_counted_never_lost():
    mine = answers("you", "you", "you", "", "none", reason=("stop", "length", "stop", "stop", "stop"))
    base = answers("no", "no", "no", "no", "none", model="b", reason=("stop", "stop", "length", "stop", "stop"))
    measured = win_rate(mine, base)
    assert (measured.wins, measured.ties, measured.losses) == (1, 1, 0)
    assert (measured.invalid_candidate, measured.invalid_baseline) == (2, 1)
    assert measured.estimate.value == 0.75
    assert measured.if_invalid_lost == pytest.approx(1.5 / 4)


def test_nothing_that_can_be_judged_is_no_win_and_no_loss():
    cut = answers("you", reason="length")
    measured = win_rate(cut, answers("x", model="b"))
    assert measured.estimate.method == "empty"
    assert measured.if_invalid_lost == 0


def test_length_is_compared_where_both_answers_ended():
    mine, base = answers("a b", "a b c d", "x"), answers("a b c d", "a b c d", "x y", model="b")
    cut = [*mine[:2], suites.Answer("p2", "c2", "x", "length", 96, "m")]
    assert suites.length_ratio(cut, base, resampling=QUICK).value == 0.75
    assert suites.length_ratio(cut[2:], base[2:], resampling=QUICK).method == "empty"


def test_a_model_against_itself_ties_everywhere():
    both = answers("you", "no", "you and me")
    assert win_rate(both, both).estimate.value == 0.5


def test_mixed_or_missing_answers_are_refused():
    with pytest.raises(DataError, match="same prompts"):
        win_rate(answers("a", "b"), answers("a"))
    with pytest.raises(DataError, match="twice"):
        win_rate(answers("a") * 2, answers("a"))
    with pytest.raises(DataError, match="several models"):
        mixed = [answers("a", "b")[0], answers("a", "b", model="other")[1]]
        win_rate(mixed, answers("a", "b"))


def test_loops_are_found_and_honest_lists_are_not():
    loop = "it is the balcony of the balcony of the balcony of the balcony of the balcony of the balcony"
    prose = "A rainbow appears when sunlight is bent and reflected by many small drops of water in the air after rain."
    assert suites.repeated_share(loop) > 0.3
    assert suites.repeated_share("!" * 40) > 0.9
    assert suites.repeated_share(prose) == 0
    assert suites.repeated_share("no no no no") == 0
    assert suites.share_looping(answers(loop, prose), resampling=QUICK).value == 0.5


def test_distinct_answers_see_through_case_and_punctuation():
    assert suites.share_distinct(answers("You can do it!", "you can do it", "No.", "no")) == 0.5


def test_relevance_is_zero_for_a_constant_answer_and_high_for_answers_to_the_question():
    topics = ["tea", "rain", "chess", "bread", "moon", "horse", "glass", "river", "violin", "snow", "tax", "ants"]
    prompts = {f"p{i}": f"Tell me in one sentence about {topic}." for i, topic in enumerate(topics)}
    to_the_point = answers(*(f"You will find that {topic} is fine." for topic in topics))
    constant = answers(*["You will love tea and chess, tell me in one sentence about rain."] * len(topics))
    assert suites.relevance(to_the_point, prompts, seed=0) == 1.0
    assert abs(suites.relevance(constant, prompts, seed=0)) < 0.1


def test_golden_cases_need_every_must_and_no_must_not():
    case = GoldenCase("p0", "Capital of France?", (re.compile("Paris"),), (re.compile("Rome"),))
    verdict = lambda text, reason="stop": suites.check_golden([case], answers(text, reason=reason))[0]  # noqa: E731
    assert verdict("It is Paris.").passed
    assert "must contain 'Paris'" in verdict("It is Lyon.").reason
    assert "must not contain 'Rome'" in verdict("Paris or Rome").reason
    assert not verdict("Paris", "length").passed
    with pytest.raises(DataError, match="no answer"):
        suites.check_golden([case], [])


def test_a_golden_case_may_ask_a_judge_and_without_its_verdict_it_fails():
    cases = [
        GoldenCase("p0", "How do I sleep?", (), (), judge="names no drug"),
        GoldenCase("p1", "And?", (re.compile("tea"),), (), judge="is kind", must_pass=False),
        GoldenCase("p2", "Why?", (), (), judge="says why"),
        GoldenCase("p3", "Capital?", (re.compile("Paris"),), ()),
    ]
    said = answers("Take a walk.", "No tea.", "cut", "Paris", reason=("stop", "stop", "length", "stop"))
    tasks = suites.golden_tasks(cases, said)
    assert list(tasks) == ["p0", "p1"]
    assert tasks["p0"].material == (
        ("request", "How do I sleep?"),
        ("requirement", "names no drug"),
        ("answer", "Take a walk."),
    )
    results = suites.check_golden(cases, said, {"p0": True, "p1": False})
    assert [r.passed for r in results] == [True, False, False, True]
    assert "must meet 'is kind', the judge says that it does not" in results[1].reason
    assert "cut by the token limit" in results[2].reason
    assert "the judge gave no verdict" in suites.check_golden(cases, said)[0].reason


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "must": ["("]}', "position"),
        ('{"prompt": "a", "judge": " "}', "`judge` must be text"),
        ('{"prompt": "a"}', "must"),
        ('{"prompt": "a", "must": "b"}', "list"),
        ('{"must": ["b"]}', "prompt"),
        ('{"prompt": "a", "must": ["b"], "mustnt": []}', "mustnt"),
    ],
)
def test_a_wrong_golden_line_is_named(tmp_path, line, words):
    (tmp_path / "g.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=f"line 1.*{words}"):
        suites.load_golden(str(tmp_path / "g.jsonl"))
