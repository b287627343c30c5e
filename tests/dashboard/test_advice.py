from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from app.ledger import ChampionRow, EvaluationRow, ModelRow, RunRow, SnapshotRow, now
from dashboard.advice import Advice, advise, age
from dashboard.reads import Loop, Signals, Tally

AT = now()
EMPTY = Loop("default", Tally(0), Signals({}), 0, None, None, 0, None, None, None, 0)
SERVED = replace(EMPTY, served=Tally(40))
JUDGED = replace(SERVED, signals=Signals({"thumb": Tally(30)}, last_week=28), new_signals=30)


def ago(minutes: float) -> Any:
    return AT - timedelta(minutes=minutes)


def built(state: Loop, minutes: float = 10) -> Loop:
    row = SnapshotRow(snapshot_id="pairs", kind="pairs", uri="", manifest={}, parent_id=None, created_at=ago(minutes))
    return replace(state, pairs=row, new_signals=0)


def trained(state: Loop, status: str = "succeeded", **changes: Any) -> Loop:
    run = RunRow(run_id="run-1", status=status, error=None, metrics={"total_steps": 36}, created_at=ago(5))
    run.updated_at = ago(1)
    for name, value in changes.items():
        setattr(run, name, value)
    candidate = ModelRow(model_id="new") if status == "succeeded" else None
    return replace(built(state), run=run, steps=12, candidate=candidate, champion=champion("old", None))


def judged(state: Loop, verdict: str, *failed: str) -> Loop:
    rules = [{"name": name, "passed": False} for name in failed]
    return replace(state, evaluation=EvaluationRow(verdict=verdict, report={"rules": rules}))


def champion(model_id: str, previous: str | None) -> ChampionRow:
    return ChampionRow(deployment="default", model_id=model_id, previous_model_id=previous, revision=1, updated_at=AT)


def told(state: Loop, pairs: int = 0) -> Advice:
    return advise(state, pairs=pairs, min_pairs=100, recipe="r.yaml", at=AT)


@pytest.mark.parametrize(
    "state, pairs, step, word",
    [
        (EMPTY, 0, "served", "No model is served yet"),
        (replace(EMPTY, champion=champion("old", None)), 0, "served", "No answer has been served"),
        (SERVED, 0, "signals", "40 answers served, none of them judged"),
        (JUDGED, 0, "pairs", "30 signals are not in a pair snapshot"),
        (built(JUDGED), 40, "pairs", "40 of 100 pairs: about 11 days at this rate"),
        (built(JUDGED), 100, "train", "100 pairs are ready"),
        (trained(JUDGED, "running"), 100, "train", "step 12 of 36"),
        (trained(JUDGED, "running", updated_at=ago(90)), 100, "train", "reported nothing since 1 hour ago"),
        (trained(JUDGED, "failed", error="no usable pairs\nmore"), 100, "train", "Run run-1 failed: no usable pairs"),
        (trained(JUDGED), 100, "gate", "new is trained and not evaluated"),
        (judged(trained(JUDGED), "HOLD", "golden", "length_ratio"), 100, "gate", "holds new: golden; length_ratio"),
        (judged(trained(JUDGED), "SHIP"), 100, "ship", "new passed the gate"),
    ],
)
def test_the_step_that_blocks_is_named(state: Loop, pairs: int, step: str, word: str) -> None:
    advice = told(state, pairs)
    assert (advice.step, word in advice.blocks) == (step, True), advice


@pytest.mark.parametrize(
    "run_id, command",
    [("run-1", "prefloop train r.yaml --run run-1"), ("demo-loop-1a2b3c4d-train", "prefloop loop r.yaml")],
)
def test_a_run_that_went_silent_is_continued_by_the_command_that_began_it(run_id: str, command: str) -> None:
    silent = trained(JUDGED, "running", run_id=run_id, updated_at=ago(90))
    assert f"`{command}`" in told(silent, 100).todo


def test_after_a_ship_the_next_round_begins_with_signals() -> None:
    shipped = replace(judged(trained(JUDGED), "SHIP"), champion=champion("new", "old"))
    assert told(shipped, 100).step == "signals"


def test_a_model_that_was_rolled_back_is_not_offered_again() -> None:
    rolled_back = replace(judged(trained(JUDGED), "SHIP"), champion=champion("old", "new"))
    assert told(rolled_back, 100).step == "signals"


def test_the_words_of_the_report_come_first() -> None:
    state = trained(JUDGED)
    report = {"rules": [{"name": "golden", "passed": False}], "reasons": ["2 of 20 golden prompts fail"]}
    held = replace(state, evaluation=EvaluationRow(verdict="HOLD", report=report))
    assert told(held, 100).blocks == "The gate holds new: 2 of 20 golden prompts fail."


def test_new_signals_open_the_next_round_after_a_hold() -> None:
    assert told(replace(judged(trained(JUDGED), "HOLD", "golden"), new_signals=5), 100).step == "pairs"


def test_no_rate_is_promised_where_nothing_comes_in() -> None:
    idle = built(replace(JUDGED, signals=Signals({"thumb": Tally(30)}, last_week=0)))
    assert "rate" not in told(idle, 40).blocks


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "just now"), (-5, "just now"), (60, "1 minute ago"), (7300, "2 hours ago"), (86_400, "1 day ago")],
)
def test_an_age_uses_the_largest_unit(seconds: int, said: str) -> None:
    assert age(AT - timedelta(seconds=seconds), AT) == said
