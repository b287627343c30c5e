"""A round of the loop remembers what its stages made, and throws no training away."""

import errno
import io
import json

import pytest
import sqlalchemy as sa
from rich.console import Console

from app.config import parse_recipe
from app.errors import DataError, RecipeError, ServiceError, TrainingError, WorkersLost
from app.ledger import EvaluationRow, RunRow
from app.preferences.imports import import_files
from app.services import Services
from ray_jobs import loop
from ray_jobs.loop import LoopRun, run_loop
from ray_jobs.session import Session
from ray_jobs.ship import ShipResult
from ray_jobs.train import _told_of_storage


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
    other = LoopRun.open(ledger, recipe(train={"options": {"beta": 0.2}}))
    assert other.run_id != run.run_id
    assert status_of(ledger, run) == "abandoned"
    assert other.abandons.startswith(f"round {run.run_id} is abandoned")
    assert "another train.options" in other.abandons
    with ledger.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(RunRow)) == 2


def test_an_interrupted_round_goes_on_with_other_workers(ledger):
    run = LoopRun.open(ledger, recipe(workers={"workers": 2}))
    run.end("stopped", error="machines were lost")
    more_room = {"micro_batch_tokens": 64, "activation_checkpointing": True}
    other = {"workers": {"workers": 1, "max_failures": 9}, "train": {"sharding": "zero3", **more_room}}
    again = LoopRun.open(ledger, recipe(**other))
    assert (again.run_id, again.abandons) == (run.run_id, "")
    with ledger.read() as session:
        assert session.get_one(RunRow, run.run_id).recipe == recipe(**other).model_dump(mode="json")


@pytest.fixture
def session(home, ledger, tmp_path):
    """A session whose recipe names readable prompts and rules."""
    (tmp_path / "style.json").write_text(
        json.dumps({"name": "s", "rules": [{"name": "r", "pattern": "x", "weight": 1}], "edits": []})
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Why?"}))

    def made(**changes):
        material = {"prompts": str(tmp_path / "prompts.jsonl"), "judge_rules": str(tmp_path / "style.json")}
        return Session(home, ledger, recipe(**{"evaluate": material, **changes}), "recipe.yaml", ())

    return made


def rounds(ledger):
    with ledger.read() as found:
        return [row.status for row in found.scalars(sa.select(RunRow).where(RunRow.kind == "loop"))]


def quiet():
    return Console(file=io.StringIO())


def raises(error):
    def body(*_, **__):
        raise error

    return body


@pytest.fixture
def stages(monkeypatch):
    """The stages of a round, each replaced by what it returns."""
    monkeypatch.setattr(loop, "ray_cluster", lambda _: io.StringIO())
    monkeypatch.setattr(
        loop, "_made_pairs", lambda *_: {"pairs": 1, "train_pairs": 1000, "by_source": {}, "snapshot": "p"}
    )
    monkeypatch.setattr(loop, "_prepared", lambda *_: {"snapshot": "t", "dropped": {}})
    monkeypatch.setattr(loop, "_trained", lambda *_: {"steps": 1, "model": "m", "run": "r"})
    monkeypatch.setattr(loop, "_judged", lambda *_: {"evaluation": "e", "verdict": "SHIP"})
    return monkeypatch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"prompts": "/nowhere", "judge_rules": "/nowhere"}}, "/nowhere"),
        ({"collect": {"style": "/nowhere", "prompts": "/nowhere"}}, "/nowhere"),
    ],
)
def test_a_file_that_only_a_late_stage_reads_is_missed_before_the_round_begins(session, ledger, changes, words):
    with pytest.raises(DataError, match=words):
        run_loop(session(**changes), quiet())
    assert rounds(ledger) == []


def test_a_snapshot_that_collected_feedback_would_not_be_used_with_is_refused(session):
    with pytest.raises(RecipeError, match="leave one of them out"):
        run_loop(session(collect={"style": "s", "prompts": "p"}, snapshot="mine"), quiet())


def test_the_loop_takes_the_snapshot_that_the_recipe_names(session, home, ledger, tmp_path, stages):
    stages.undo()
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "a", "rejected": "b"}) + "\n" for i in range(9)))
    given = session(snapshot="mine")
    row, _ = import_files(home, ledger, [file], name="mine", section=given.recipe.pairs)
    assert loop._made_pairs(home, ledger, given.recipe)["snapshot"] == row.snapshot_id


@pytest.mark.parametrize(
    ("stage", "error", "status"),
    [
        ("_trained", DataError("x"), "failed"),
        ("_trained", TrainingError("x"), "failed"),
        ("_trained", WorkersLost("x"), "stopped"),
        ("_judged", DataError("x"), "stopped"),
        ("_judged", ServiceError("x"), "stopped"),
    ],
)
def test_a_round_that_another_attempt_may_save_is_continued(session, ledger, stages, stage, error, status):
    stages.setattr(loop, stage, raises(error))
    with pytest.raises(type(error)):
        run_loop(session(), quiet())
    assert rounds(ledger) == [status]


def test_a_verdict_that_the_champion_has_outdated_is_reached_again_at_the_next_attempt(session, ledger, stages):
    verdicts: list[str] = []
    stages.setattr(loop, "_judged", lambda *_: verdicts.append("asked") or {"evaluation": "e", "verdict": "SHIP"})
    answers = [
        ShipResult(False, "m", "old", 3, False, "the champion is another now"),
        ShipResult(True, "m", "b", 4, True, ""),
    ]
    stages.setattr(loop, "ship", lambda *_: answers.pop(0))
    with pytest.raises(ServiceError, match="evaluates again"):
        run_loop(session(), quiet())
    assert run_loop(session(), quiet()) == 0
    assert len(verdicts) == 2
    assert rounds(ledger) == ["succeeded"]


def test_requests_that_failed_while_the_champion_changed_are_an_error_of_a_round_that_shipped(session, ledger, stages):
    stages.setattr(loop, "_shipped", lambda *_: {"requests_during_switch": 100, "failed_requests": 2})
    with pytest.raises(ServiceError, match="2 simulated requests failed"):
        run_loop(session(), quiet())
    assert rounds(ledger) == ["succeeded"]


def test_a_switch_that_no_open_stream_saw_proves_nothing(session, ledger, stages):
    shipped = {"failed_requests": 0, "streams_across_switch": 1, "switched_under_load": True}
    stages.setattr(loop, "_shipped", lambda *_: shipped)
    with pytest.raises(ServiceError, match="only 1 simulated streams were open while the champion changed"):
        run_loop(session(), quiet())
    shipped["switched_under_load"] = False  # the champion had changed before the stage was interrupted
    assert run_loop(session(), quiet()) == 0
    assert rounds(ledger) == ["succeeded", "succeeded"]


def test_a_recipe_whose_gate_could_not_decide_is_refused_before_the_round_begins(session, ledger):
    with pytest.raises(RecipeError, match="no section `evaluate`"):
        run_loop(session(evaluate=None), quiet())
    assert rounds(ledger) == []


def test_a_simulated_audience_never_talks_to_the_service_of_another_deployment(session, home, ledger, monkeypatch):
    monkeypatch.setattr(Services, "healthy", lambda _: True)
    Services("http://here", "http://here", "here", deployment="default").write(home)
    prompts = {"prompts": session().recipe.evaluate.prompts, "style": session().recipe.evaluate.judge_rules}
    asked = session(collect=prompts, serving={"deployment": "demo"})
    with pytest.raises(ServiceError, match="serves deployment `default`, the recipe is for `demo`"):
        run_loop(asked, quiet())
    assert rounds(ledger) == ["stopped"]


def test_a_hold_is_no_end_of_the_round_while_the_judge_owes_answers(monkeypatch):
    row = EvaluationRow(
        evaluation_id="e", verdict="HOLD", report={"unanswered": {"timeout": 2, "status 503": 1, "refused": 1}}
    )
    monkeypatch.setattr(loop, "evaluate", lambda *_: row)
    trained = {"model": "m", "run": "r"}
    with pytest.raises(ServiceError, match=r"the judge owes 3 answers \(2 timeout, 1 status 503\)"):
        loop._judged(None, None, None, trained)
    # What a judge refuses for good would be owed for ever.
    for failures in ({}, {"refused": 4, "status 400": 1, "malformed": 1}):
        row.report = {"unanswered": failures}
        assert loop._judged(None, None, None, trained) == {"evaluation": "e", "verdict": "HOLD"}
    row.verdict, row.report = "SHIP", {"unanswered": {"timeout": 2}}
    assert loop._judged(None, None, None, trained)["verdict"] == "SHIP"


def test_a_round_whose_model_finds_no_room_goes_on_where_it_was(session, ledger, stages):
    def full(*_, **__):
        with _told_of_storage():
            raise OSError(errno.ENOSPC, "No space left on device")

    stages.setattr(loop, "_trained", full)
    with pytest.raises(ServiceError, match=r"the run is done.*No space left on device[\s\S]*goes on from here"):
        run_loop(session(), quiet())
    assert rounds(ledger) == ["stopped"], "a failed round would be followed by one that trains anew"
