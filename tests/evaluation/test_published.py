"""Every published number that can be computed from published files is ours too, and a difference would be told."""

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.errors import DataError
from app.evaluation.published import Check, verify_published


def test_a_difference_beyond_the_tolerance_does_not_hold():
    assert Check("x", 1.02, 1.0, 0.03).holds
    assert not Check("x", 1.02, 1.0, 0.01).holds
    assert not Check("x", float("nan"), 1.0, 9.0).holds


def test_a_missing_file_is_named_and_the_command_wants_one_thing(tmp_path):
    with pytest.raises(DataError, match=r"no file at .*battles_gpt-4-0314_baseline.jsonl"):
        next(verify_published(str(tmp_path)))
    for arguments in ([], ["recipe.yaml", "--verify-published", "x"]):
        result = CliRunner().invoke(cli, ["evaluate", *arguments])
        assert "give a recipe to evaluate by, or --verify-published DIR alone" in str(result.exception)
    result = CliRunner().invoke(cli, ["evaluate", "--verify-published", "x", "--model", "m"])
    assert "have no effect" in str(result.exception)


def test_all_published_numbers_hold(published):
    checks = list(verify_published(str(published)))
    assert [check for check in checks if not check.holds] == []
    assert len(checks) == 62
    shown = CliRunner().invoke(cli, ["evaluate", "--verify-published", f"{published}/"])
    assert shown.exit_code == 0
    assert "Arena-Hard v0.1, gpt-4-0613: score: 37.9 | 37.9 | +0 | 0\n" in shown.output
    assert f"{len(checks)} of {len(checks)} hold" in shown.output
