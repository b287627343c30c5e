"""A judge that labelled what a candidate learned from is found, however far back, and does not gate."""

import json

import pytest

from app.config import GateSection, PairSection
from app.evaluation.gate import decide
from app.evaluation.independence import independence
from app.evaluation.metrics import plain
from app.ledger import ModelRow, RunRow, SnapshotRow, now
from app.preferences.imports import import_files
from app.preferences.snapshots import read_pairs

SECTION = PairSection(held_out_fraction=0.5)


def imported(home, ledger, folder, name, judge):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{name} {i}?", "chosen": "a", "rejected": "b"}) for i in range(4)))
    return import_files(home, ledger, [path], name=name, section=SECTION, judge=judge)[0]


def trained(ledger, model_id, parent_id, pairs):
    with ledger.write() as session:
        fields = {"kind": "training", "uri": "", "manifest": {}, "created_at": now()}
        session.add(SnapshotRow(snapshot_id=f"of-{model_id}", parent_id=pairs.snapshot_id, **fields))
        fields = {"digest": model_id, "uri": "", "kind": "merged", "manifest": {}, "created_at": now()}
        session.add(ModelRow(model_id=model_id, parent_id=parent_id, snapshot_id=f"of-{model_id}", **fields))


def test_a_judge_that_labelled_pairs_of_any_model_before_is_known_whatever_its_owner_is_called(home, ledger, tmp_path):
    trained(ledger, "first", None, imported(home, ledger, tmp_path, "one", "acme/Judge-1"))
    trained(ledger, "second", "first", imported(home, ledger, tmp_path, "two", None))
    trained(ledger, "third", "second", imported(home, ledger, tmp_path, "three", "other"))
    for judge, candidate, value in (
        ("judge-1", "first", 0),
        ("Judge-1", "second", 0),
        ("elsewhere/JUDGE-1", "third", 0),
        ("other", "third", 0),
        ("other", "second", 1),
        ("judge-2", "third", 1),
        ("judge-1", "nobody", 1),
    ):
        assert independence(home, ledger, judge, candidate).value == value, (judge, candidate)
    assert "the judge `judge-1` labelled pairs" in independence(home, ledger, "judge-1", "third").note


def test_equal_weights_of_a_later_run_have_its_judge_too(home, ledger, tmp_path):
    trained(ledger, "model", None, imported(home, ledger, tmp_path, "one", None))
    labelled = imported(home, ledger, tmp_path, "again", "judge-1")
    with ledger.write() as session:
        fields = {"kind": "training", "uri": "", "manifest": {}, "created_at": now()}
        session.add(SnapshotRow(snapshot_id="later", parent_id=labelled.snapshot_id, **fields))
        times = {"created_at": now(), "updated_at": now()}
        made = {"output_model_id": "model", "snapshot_id": "later"}
        plain_run = {
            "kind": "train",
            "status": "succeeded",
            "recipe": {},
            "metrics": {},
            "attempt": 1,
            "code_version": "0",
        }
        session.add(RunRow(run_id="later", **plain_run, **made, **times))
    assert independence(home, ledger, "judge-1", "model").value == 0


def test_pairs_that_a_judge_labelled_say_so_and_another_judges_are_another_snapshot(home, ledger, tmp_path):
    rows = {judge: imported(home, ledger, tmp_path, "same", judge) for judge in ("a", "b", None)}
    assert len({row.snapshot_id for row in rows.values()}) == 3
    for judge, row in rows.items():
        assert row.manifest["origin"].get("judge") == judge
        (source,) = {pair.source for pair in read_pairs(home, row.snapshot_id)}
        assert source == ("import" if judge is None else "judge")


@pytest.mark.parametrize("passed", [False, True])
def test_a_judge_that_is_no_stranger_holds(passed):
    verdict = decide(
        [plain("judge.independent", float(passed), 1, "" if passed else "it labelled them")], GateSection()
    )
    (rule,) = [rule for rule in verdict.rules if rule.name == "judge_independent"]
    assert (rule.passed, rule.decides) == (passed, "must")
    assert passed or "it labelled them" in rule.reason


def test_a_model_that_judges_may_share_neither_pairs_nor_weights_with_the_candidate(home, ledger, tmp_path):
    one, two = (imported(home, ledger, tmp_path, name, None) for name in ("one", "two"))
    # The same pairs in a larger snapshot, as feedback grows from round to round.
    both = import_files(home, ledger, [tmp_path / "one.jsonl", tmp_path / "two.jsonl"], name="both", section=SECTION)[0]
    sft = imported(home, ledger, tmp_path, "sft", None)
    trained(ledger, "sft", None, sft)
    trained(ledger, "candidate", "sft", one)
    trained(ledger, "stranger", "sft", imported(home, ledger, tmp_path, "three", None))
    trained(ledger, "same-pairs", "sft", one)
    trained(ledger, "more-pairs", "sft", both)
    trained(ledger, "parents-pairs", "stranger", two)
    trained(ledger, "later", "candidate", two)
    found = {name: independence(home, ledger, name, "candidate") for name in ("stranger", "parents-pairs")}
    assert [metric.value for metric in found.values()] == [1.0, 1.0]
    for name in ("same-pairs", "more-pairs"):
        shared = independence(home, ledger, name, "candidate")
        assert (shared.value, "learned from 4 of the candidate's pairs" in shared.note) == (0, True)
    for judge, candidate in (("sft", "candidate"), ("candidate", "candidate"), ("later", "candidate")):
        line = independence(home, ledger, judge, candidate)
        assert (line.value, "descend from one another" in line.note) == (0, True)
