"""What schema version 1 wrote, this version reads: a ledger, a pair and a training snapshot, a model artifact."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.config import PairSection, Recipe
from app.errors import DataError
from app.ledger import (
    ApprovalRow,
    EvaluationRow,
    FeedbackRow,
    Ledger,
    ModelRow,
    ResponseRow,
    RunRow,
    RunStepRow,
)
from app.models import load_model, render_prompt
from app.preferences.snapshots import read_pairs, resolve_snapshot
from app.schemas import QUARANTINE_SCHEMA, Message, Split, ToolCall, canonical_json, prompt_key
from app.storage import Home
from app.training.snapshots import check_binding, known_scores, read_groups
from app.training.tokenization import Label, Preference
from ray_jobs.build_pairs import build_pairs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v1"
PAIRS, TRAINING, MODEL = "cdbb7dc88d38116f", "88d91019f90be46b", "sft-a2dc0fe6d7a6"
START = datetime(2026, 11, 1, 12, 0, 0, 250_000, tzinfo=UTC)
CALL = ToolCall("call-1", "wetter", '{"ort": "Zürich"}')


@pytest.fixture
def old(tmp_path, monkeypatch) -> Home:
    monkeypatch.delenv("PREFLOOP_LEDGER", raising=False)
    return Home.at(shutil.copytree(FIXTURES, tmp_path / "v1"))


@pytest.fixture
def old_ledger(old):
    opened = Ledger.open(old.ledger_url)
    yield opened
    opened.close()


def test_the_responses_of_version_1_are_read(old_ledger):
    with old_ledger.read() as session:
        rows = {row.response_id: row for row in session.scalars(sa.select(ResponseRow))}
    assert sorted(rows) == [f"r{i:02}" for i in range(1, 13)]
    french = rows["r04"]
    assert french.messages == [
        {"role": "system", "content": "Réponds brièvement."},
        {"role": "user", "content": "Où est la gare ? 🚉\u2028Merci !", "name": "ana"},
    ]
    assert (french.text, french.token_ids, french.logp) == ("À gauche, après le café. 🙂", [10, 11, 12, 0], -3.75)
    assert french.sampling == {"temperature": 0.7, "top_p": 0.9, "seed": 3}
    assert (french.model_id, french.arm, french.template_digest, french.subject) == (
        MODEL,
        "champion",
        "template",
        "ana",
    )
    assert rows["r01"].created_at == START
    assert (rows["r03"].finish_reason, rows["r10"].finish_reason) == ("length", "tool_calls")
    weather = rows["r06"]
    prompt = tuple(map(Message.from_openai, weather.messages))
    assert (prompt[1].tool_calls, prompt[2].tool_call_id) == ((CALL,), "call-1")
    assert weather.tools[0]["function"]["name"] == "wetter"
    assert weather.prompt_key == prompt_key(prompt, canonical_json(weather.tools))


def test_the_feedback_the_champion_and_the_audit_of_version_1_are_read(old_ledger):
    with old_ledger.read() as session:
        rows = {row.event_id: row for row in session.scalars(sa.select(FeedbackRow))}
        model = session.get_one(ModelRow, MODEL)
    assert len(rows) == 10
    assert (rows["e00"].value, rows["e00"].tags) == ("up", ["helpful"])
    assert (rows["e02"].revision, rows["e02"].comment) == (2, "trop court 🙁")
    assert (rows["e04"].value, rows["e04"].other_response_id, rows["e04"].shown_order) == (
        "A>>B",
        "r05",
        ["r05", "r04"],
    )
    assert (rows["e05"].kind, rows["e05"].value) == ("edit", "Es ist kühl, 9 °C.")
    assert (rows["e08"].value, rows["e09"].origin) == ("4.5", "simulated")
    assert (model.kind, model.digest[:12], model.manifest["source"]) == ("sft", "a2dc0fe6d7a6", "v1")
    champion = old_ledger.champion("default")
    assert (champion.model_id, champion.revision, champion.updated_at) == (MODEL, 1, START)
    assert old_ledger.verify_audit() == 1


def test_the_runs_verdicts_and_approvals_of_version_1_are_read(old_ledger):
    with old_ledger.read() as session:
        run, step = session.get_one(RunRow, "v1-train"), session.get_one(RunStepRow, ("v1-train", 1))
        verdict = session.get_one(EvaluationRow, "evaluation-v1")
        approval = session.get_one(ApprovalRow, "approval-v1")
    assert (run.status, run.attempt, run.recipe["train"], run.metrics["learning"]) == (
        "succeeded",
        2,
        {"beta": 0.1},
        {"accuracy": 0.75},
    )
    assert (run.start_model_id, run.reference_model_id, run.created_at) == (MODEL, MODEL, START)
    assert step.metrics == {"loss": 0.6875}
    assert (verdict.verdict, verdict.sft_id, verdict.report["figures"]["win_rate"]) == ("SHIP", MODEL, 0.75)
    assert (approval.evaluation_id, approval.decision, approval.reason) == ("evaluation-v1", "approved", "geprüft ✓")
    assert verdict.model_digest == approval.model_digest


def test_the_model_of_version_1_is_loaded(old):
    loaded = load_model(old, MODEL, dtype="float32")
    assert loaded.digest[:12] == "a2dc0fe6d7a6"
    assert loaded.end_ids == (1,)
    ids = render_prompt(loaded.tokenizer, [Message("user", "Où ?")], None)
    assert loaded.tokenizer.decode(ids) == "<|im_start|>user\nOù ?<|im_end|>\n<|im_start|>assistant\n"
    assert float(loaded.model.lm_head.weight.sum()) == pytest.approx(-1.8189258, abs=1e-5)


def test_the_ledger_of_version_1_takes_new_events(old_ledger):
    row = old_ledger.record_feedback(event_id="new", response_id="r02", kind="thumb", value="up", subject="bo")
    assert row.revision == 3
    old_ledger.audit("bo", "note", "target", {})
    assert old_ledger.verify_audit() == 2


def test_the_pair_snapshot_of_version_1_is_read(old, old_ledger):
    assert resolve_snapshot(old, old_ledger, None).snapshot_id == PAIRS
    pairs = {p.event_ids: p for p in read_pairs(old, PAIRS) if p.kind == "pair"}
    edit, thumbs, comparison = pairs["e05",], pairs["e00", "e02"], pairs["e04",]
    assert edit.prompt == (
        Message("user", "Wie warm ist es in Zürich?"),
        Message("assistant", None, tool_calls=(CALL,)),
        Message("tool", "9 °C", tool_call_id="call-1"),
    )
    assert (edit.chosen.content, edit.chosen.token_ids, edit.chosen.finish_reason) == (
        "Es ist kühl, 9 °C.",
        None,
        "stop",
    )
    assert (edit.rejected.content, edit.rejected.token_ids) == ("Es ist warm.", (10, 11, 12, 13, 14, 15, 0))
    assert edit.tools.startswith('[{"function":{"name":"wetter"')
    assert comparison.prompt[1] == Message("user", "Où est la gare ? 🚉\u2028Merci !", name="ana")
    assert (comparison.chosen.response_id, comparison.rejected.response_id) == ("r04", "r05")
    assert (thumbs.source, thumbs.split, thumbs.weight, thumbs.subject) == ("thumbs", "train", 1.0, None)
    assert thumbs.pair_id == "69b453badf529d9f2de8ee44c05f7867"
    unpaired = sorted(
        (p.label, (p.chosen or p.rejected).content) for p in read_pairs(old, PAIRS) if p.kind == "unpaired"
    )
    simulated = {p.event_ids for p in read_pairs(old, PAIRS) if p.simulated}
    assert simulated == {("e09",)}, "r06 was liked by a simulated audience"
    assert unpaired == [(False, "Because of the sea."), (False, "It just is."), (True, "In Zürich sind es 9 °C.")]


def test_the_quarantine_of_version_1_is_read(old):
    rows = old.artifact("pairs", PAIRS).read_table(QUARANTINE_SCHEMA, stem="quarantine").to_pylist()
    assert [(r["place"], r["reason"]) for r in rows] == [
        ("event e03", "cut_by_length"),
        ("event e08", "rating"),
        ("event e01", "superseded"),
        ("event e06", "tie"),
    ]


def loaded_digest(home):
    return home.artifact("models", MODEL).manifest()["digest"]


def test_the_training_snapshot_of_version_1_is_read(old, old_ledger):
    assert resolve_snapshot(old, old_ledger, TRAINING, kind="training").parent_id == PAIRS
    artifact = old.artifact("training", TRAINING)
    artifact.verify()
    first, second = read_groups(artifact, Split.TRAIN)
    manifest = check_binding(
        artifact,
        template_digest="template",
        max_length=512,
        too_long="drop",
        unit="pairs",
        strangers=False,
        reference_digest=loaded_digest(old),
        dtype="bfloat16",
    )
    with pytest.raises(DataError, match=r"max_length = 512 .*, the recipe says 256 and drop"):
        check_binding(
            artifact,
            template_digest="template",
            max_length=256,
            too_long="drop",
            unit="pairs",
            strangers=False,
            reference_digest=None,
            dtype="bfloat16",
        )
    assert manifest["splits"]["train"] == {"rows": 2, "pairs": 1, "labels": 1, "tokens": 11}
    assert manifest["counts"] == {"kept": 3, "dropped": {"too_long": 1}}
    assert (first.group_id, first.cluster, first.prompt_ids) == ("group-a", "cluster-a", (1, 2, 3))
    assert (first.responses, first.reference_logps) == (((4, 5, 0), (6, 0)), (-3.25, -1.5))
    assert first.pairs == (Preference(0, 1, 1.0, "pair-a", "thumbs"),)
    assert (second.labels, second.reference_logps) == ((Label(0, False, 0.5, "pair-b", "comparison"),), (-2.0,))
    (third,) = read_groups(artifact, Split.HELD_OUT)
    assert (third.pairs, third.cluster) == ((Preference(1, 0, 0.25, "pair-c", "edit"),), "cluster-c")
    wanted = {(g.prompt_ids, r) for split in Split for g in read_groups(artifact, split) for r in g.responses}
    scores = known_scores(old, old_ledger, wanted, reference_digest=loaded_digest(old), dtype="bfloat16").logps
    assert (scores[(1, 2, 3), (6, 0)], scores[(1, 9), (5, 0)], len(scores)) == (-1.5, -0.75, 5)


def test_the_log_of_version_1_gives_the_pairs_that_it_gave(old, old_ledger, tmp_path):
    recipe = Recipe(name="v1", pairs=PairSection(held_out_fraction=0.5))
    elsewhere = Home.at(tmp_path / "elsewhere")
    row = build_pairs(elsewhere, old_ledger, recipe)
    assert {p.pair_id for p in read_pairs(elsewhere, row.snapshot_id)} == {p.pair_id for p in read_pairs(old, PAIRS)}
