"""Certify: a case file's faults are told by case, a miss is an exit code."""

import json

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.errors import DataError
from app.training.certify import GOLDEN, certify

CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
CASE = CASES[0]
KTO = next(case for case in CASES if case["name"] == "kto")


def judged(tmp_path, **changes):
    case = {**CASE, **changes}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"format": 1, "cases": [case]}), encoding="utf-8")
    (verdict,) = certify(path)
    return verdict


def test_the_golden_table_holds_and_the_command_says_so():
    result = CliRunner().invoke(cli, ["certify"])
    assert result.exit_code == 0
    assert result.output.count("\n") == len(CASES) + 1
    assert f"{len(CASES)} of {len(CASES)} cases hold" in result.output


def test_a_miss_is_named_and_ends_with_exit_code_1(tmp_path):
    verdict = judged(tmp_path, expected=0.66)
    assert not verdict.passed
    assert verdict.line() == "MISS  dpo: 0.6589592975, expected 0.66 (TRL 1.16.0)"
    result = CliRunner().invoke(cli, ["certify", str(tmp_path / "cases.json"), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)[0]["passed"] is False


def test_the_tolerance_is_relative(tmp_path):
    assert judged(tmp_path, expected=0.6589592975 * 1.009, tolerance=0.01).passed
    assert not judged(tmp_path, expected=0.6589592975 * 1.011, tolerance=0.01).passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dpoo"}, "did you mean `dpo`"),
        ({"options": {"betta": 1}}, "did you mean `beta`"),
        ({"reference": None}, "`dpo` needs `reference`, which the case does not have"),
        ({"reference": {"chosen": [[-1.0]], "rejected": [[-1.0]]}}, "differ in responses or tokens"),
        ({"policy": {"chosen": [[-1.0]], "rejected": []}}, "needs `chosen` and as many `rejected`"),
        ({"policy": {"chosen": [[]], "rejected": [[-1.0]]}}, "a response without a token"),
        ({"expected": "much"}, "`expected` is no number"),
        ({"tolerance": -1}, "tolerances must be non-negative"),
        ({"objective": "sft", "options": {}, "labels": [True]}, "needs one label for each of 4 responses"),
        ({**KTO, "kl": {"policy": [-1.0], "reference": [-1.0, -2.0]}}, "`kl` has 1 answers of the policy and 2"),
        ({"tolerence": 1}, "unknown key `tolerence`"),
        ({"objective": "kto"}, "`kto` needs one label for each of 4 responses"),
        ({**KTO, "kl": None}, "the case does not have"),
    ],
)
def test_a_case_that_cannot_be_computed_says_why_and_does_not_pass(tmp_path, changes, message):
    verdict = judged(tmp_path, **changes)
    assert not verdict.passed
    assert message in verdict.line()


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2, "cases": [1]}', '{"format": 1, "cases": []}'])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    path = tmp_path / "cases.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="is no case file|has no cases of format 1"):
        certify(path)
    with pytest.raises(DataError, match="no case file at"):
        certify(tmp_path / "nothing.json")
