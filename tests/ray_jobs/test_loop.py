"""A round of the loop remembers what its stages made."""

import pytest
import sqlalchemy as sa

from app.config import parse_recipe
from app.ledger import RunRow
from ray_jobs.loop import LoopRun


def recipe(**changes):
    return parse_recipe({"name": "round", **changes}, place="test")


def status_of(ledger, run):
    with ledger.read() as session:
        return session.get_one(RunRow, run.run_id).status


def test_a_finished_stage_is_not_run_again_and_keeps_what_it_made(ledger):
    run = LoopRun.open(ledger, recipe())
    assert run.stage("build_pairs", lambda: {"snapshot": "a"}) == {"snapshot": "a"}
    again = LoopRun.open(ledger, recipe())
    assert again.run_id == run.run_id
    assert again.stage("build_pairs", lambda: pytest.fail("ran twice")) == {"snapshot": "a"}


def test_an_interrupted_stage_runs_again_in_the_same_round(ledger):
    run = LoopRun.open(ledger, recipe())
    with pytest.raises(KeyboardInterrupt):
        run.stage("train", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    run.end("stopped", error="interrupted")
    again = LoopRun.open(ledger, recipe())
    assert again.run_id == run.run_id
    assert again.began == run.began
    assert again.stage("train", lambda: {"model": "m"}) == {"model": "m"}


@pytest.mark.parametrize("status", ["succeeded", "held", "failed"])
def test_a_round_that_ended_is_followed_by_a_new_one(ledger, status):
    run = LoopRun.open(ledger, recipe())
    run.end(status)
    assert LoopRun.open(ledger, recipe()).run_id != run.run_id
    assert status_of(ledger, run) == status


def test_another_recipe_abandons_an_interrupted_round(ledger):
    run = LoopRun.open(ledger, recipe())
    other = LoopRun.open(ledger, recipe(train={"beta": 0.2}))
    assert other.run_id != run.run_id
    assert status_of(ledger, run) == "abandoned"
    with ledger.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(RunRow)) == 2
