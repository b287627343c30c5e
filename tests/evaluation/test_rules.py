"""A style scores and edits texts as its JSON says, and a wrong one is refused by place."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import DataError
from app.evaluation.rules import load_style, parse_style

STYLE = {
    "name": "plain",
    "rules": [
        {"name": "list", "pattern": "^- ", "weight": -2},
        {"name": "you", "pattern": r"\byou\b", "weight": 1.5},
    ],
    "edits": [{"pattern": "^- ", "replace": ""}, {"pattern": r"(\w+)$", "replace": r"\1."}],
}


def test_score_adds_the_weights_of_the_rules_that_are_found_on_any_line():
    style = parse_style(STYLE, place="x")
    assert style.score("nothing") == 0
    assert style.score("for you and you") == 1.5
    assert style.score("first\n- second for you") == -0.5
    assert style.found("a\n- b") == ("list",)


def test_edits_are_applied_in_order_on_every_line():
    assert parse_style(STYLE, place="x").apply_edits("- one\n- two") == "one.\ntwo."


@given(st.permutations([0.1, 0.2, 0.3, -0.6, 1e16, 1.0, -1e16]))
def test_the_order_of_rules_does_not_change_a_score(weights):
    rules = [{"name": str(i), "pattern": "a", "weight": w} for i, w in enumerate(weights)]
    assert parse_style({"name": "s", "rules": rules}, place="x").score("a") == math.fsum(weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rules": [{"name": "bad", "pattern": "a(b", "weight": 1}]}, ["`bad`", "'a(b'", "position 1"]),
        ({"rules": [{"name": "n", "pattern": "a", "weight": float("nan")}]}, ["rules[0].weight", "finite", "nan"]),
        ({"rules": [{"name": "n", "pattern": "a", "weight": True}]}, ["rules[0].weight", "True"]),
        ({"rules": [{"name": "n", "pattern": "a"}]}, ["rules[0]", "`weight` is missing"]),
        ({"rules": []}, ["`rules`", "at least one"]),
        ({"rules": [{"name": "n", "pattern": "a", "weight": 0}]}, ["every answer has the same score"]),
        ({"rule": []}, ["unknown key `rule`", "known: name, rules, edits"]),
        ({"edits": [{"pattern": "(a)", "replace": r"\2"}]}, ["edits[0].replace", "group"]),
        ({"edits": [{"pattern": "[", "replace": ""}]}, ["edits[0]", "position"]),
        ({"name": ""}, ["`name`"]),
        ({"rules": [STYLE["rules"][0], STYLE["rules"][0]]}, ["`list` is used more than once"]),
    ],
)
def test_a_wrong_style_is_refused_with_the_place_of_the_fault(change, words):
    with pytest.raises(DataError) as caught:
        parse_style({**STYLE, **change}, place="taste.json")
    assert all(word in str(caught.value) for word in ["taste.json", *words])


def test_all_faults_of_a_style_are_reported_at_once():
    tree = {"rules": [{"name": "a", "pattern": "(", "weight": "x", "colour": 1}], "edits": [3]}
    with pytest.raises(DataError, match=r"5 fault\(s\)"):
        parse_style(tree, place="x")


def test_a_style_that_is_missing_or_no_json_is_named(tmp_path):
    with pytest.raises(DataError, match="no style at"):
        load_style(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"name": ')
    with pytest.raises(DataError, match="cannot be read"):
        load_style(str(tmp_path / "bad.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="object"):
        load_style(str(tmp_path / "list.json"))
    (tmp_path / "good.json").write_text(json.dumps(STYLE))
    assert load_style(str(tmp_path / "good.json")).name == "plain"
