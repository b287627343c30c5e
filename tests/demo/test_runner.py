"""The demo's report says what the ledger says."""

import itertools
import json
import random
from datetime import timedelta
from pathlib import Path

import pytest

from app.config import load_recipe
from app.demo.runner import make_report, run_demo
from app.errors import DataError, RecipeError
from app.ledger import EvaluationRow, RunRow, now
from app.services import Services

RECIPE = "recipes/demo_only.yaml"


def finished_round(ledger, *, shipped: bool):
    recipe = load_recipe(RECIPE).model_dump(mode="json")
    stages = {
        "serve": {"champion": "sft-1"},
        "collect": {"answers": 828},
        "build_pairs": {"by_source": {"edit": 9, "thumbs": 30}, "dropped": {"tie": 3}},
        "prepare": {"snapshot": "t", "dropped": {"longer_than_window": 2, "tie": 1}},
        "train": {"steps": 60, "reward_accuracy": 0.8, "model": "demo-2"},
        "evaluate": {"evaluation": "e1"},
    }
    if shipped:
        stages["ship"] = {"requests_during_switch": 116, "failed_requests": 1, "streams_across_switch": 2}
    figures = {
        "win_rate": 0.7,
        "ci_low": 0.6,
        "ci_high": 0.8,
        "n_prompts": 144,
        "length_ratio": 0.9,
        "golden": {"passed": 8, "of": 8},
    }
    rules = [{"name": "win_rate", "passed": shipped, "reason": "the lower bound is 48 %"}]
    began = now() - timedelta(minutes=5)
    with ledger.write() as session:
        session.add(
            EvaluationRow(
                evaluation_id="e1",
                deployment="demo",
                model_id="demo-2",
                model_digest="d",
                champion_id="sft-1",
                sft_id="sft-1",
                verdict="SHIP" if shipped else "HOLD",
                report={"figures": figures, "rules": rules},
                created_at=now(),
            )
        )
        session.add(
            RunRow(
                run_id="demo-loop-1",
                kind="loop",
                status="succeeded" if shipped else "held",
                recipe=recipe,
                metrics={"stages": stages, "seconds": {"train": 150.04}},
                attempt=1,
                code_version="0",
                created_at=began,
                updated_at=now(),
            )
        )


def test_the_report_of_a_shipped_round_names_both_champions(ledger):
    finished_round(ledger, shipped=True)
    report = make_report(ledger, "demo", last_attempt_s=500.0)
    assert (report["champion_before"], report["champion_after"]) == ("sft-1", "demo-2")
    assert report["seconds"] == {"total": 500.0, "train": 150.0}
    assert report["responses"] == 828
    assert report["requests_during_switch"] == 116
    assert report["dropped"] == {"tie": 4, "longer_than_window": 2}, "those of prepare count too"
    wanted = "seconds responses feedback_events pairs dropped train_steps reward_accuracy win_rate ci_low ci_high n_prompts length_ratio golden verdict champion_before champion_after requests_during_switch failed_requests"
    assert set(wanted.split()) <= report.keys()


def test_the_report_of_a_held_round_keeps_the_champion_and_says_why(ledger):
    finished_round(ledger, shipped=False)
    report = make_report(ledger, "demo", last_attempt_s=1.0)
    assert report["seconds"]["total"] == 150.0, "earlier attempts count too"
    assert report["verdict"] == "HOLD"
    assert report["champion_after"] == "sft-1"
    assert report["reasons"] == ["the lower bound is 48 %"]


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        ("shipped", "1 requests failed, 2 streams crossed"),
        ("failed", "worker 1 died"),
        ("killed", "the loop died in stage evaluate"),
        ("not begun", "before its round began"),
    ],
)
def test_a_round_that_fails_says_so_in_its_report_which_is_never_that_of_the_round_before(
    home, ledger, monkeypatch, ended, told
):
    def loop(_command, _home):
        if ended != "not begun":
            finished_round(ledger, shipped=ended == "shipped")
        if ended in ("failed", "killed"):
            with ledger.write() as session:
                run = session.get_one(RunRow, "demo-loop-1")
                run.status, run.error = ("stopped", "worker 1 died") if ended == "failed" else ("running", None)
                run.metrics = {**run.metrics, "stage": "evaluate"}
        return 1

    report = home.local("demo", "report.json")
    report.parent.mkdir(parents=True)
    report.write_text("of the round before")
    monkeypatch.setattr("app.demo.runner._child", loop)
    options = {"audience": "style", "style": None, "prompts": None, "overrides": []}
    assert run_demo(home, recipe=Path(RECIPE), **options) == 1
    said = json.loads(report.read_text())
    assert said["exit_code"] == 1
    assert told in said["error"]
    assert ("verdict" in said) == (ended == "shipped")


def test_wrong_options_are_refused_before_anything_starts(home, tmp_path):
    options = {"recipe": RECIPE, "style": None, "prompts": None, "overrides": []}
    with pytest.raises(RecipeError, match="no audience `loud`"):
        run_demo(home, audience="loud", **options)
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "one"}\n')
    with pytest.raises(DataError, match="give at least 120 prompts"):
        run_demo(home, audience="style", **(options | {"prompts": few}))
    bad = tmp_path / "style.json"
    bad.write_text(json.dumps({"name": "s", "rules": [{"name": "r", "pattern": "(", "weight": 1}], "edits": []}))
    for style in (bad, tmp_path / "none.json"):
        with pytest.raises(DataError, match=style.name):
            run_demo(home, audience="style", **(options | {"style": style}))


@pytest.mark.parametrize(("started_by", "stopped"), [("loop", True), ("user", False)])
def test_the_demo_stops_the_service_of_its_loop_and_never_a_users(home, monkeypatch, started_by, stopped):
    commands = []

    def child(command, _home):
        commands.append(command)
        return 1

    monkeypatch.setattr("app.demo.runner._child", child)
    Services("http://127.0.0.1:9", "http://127.0.0.1:9", "127.0.0.1:9", started_by=started_by).write(home)
    run_demo(home, recipe=Path(RECIPE), audience="style", style=None, prompts=None, overrides=[])
    assert any("--stop" in command for command in commands) == stopped


@pytest.mark.parametrize(
    ("different", "alike", "held_out"), [(330, 0, 165), (250, 0, 130), (160, 0, 80), (120, 0, 60), (140, 190, 60)]
)
def test_a_large_prompt_file_holds_out_more_where_its_near_duplicates_allow(
    home, monkeypatch, tmp_path, different, alike, held_out
):
    monkeypatch.setattr("app.demo.runner._child", lambda *_: 1)
    # The hash of this group comes late, when the others have been held out.
    long = "kindly explain to me in detail how a bicycle stays upright while somebody is riding it along the road "
    texts = [f"{i} {random.Random(i).getrandbits(64)}" for i in range(different)] + [f"{long}{i}" for i in range(alike)]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert run_demo(home, recipe=Path(RECIPE), audience="style", style=None, prompts=file, overrides=[]) == 1
    (held,) = home.local("demo", "prompts").glob("*/evaluate.jsonl")
    (train,) = home.local("demo", "prompts").glob("*/collect.jsonl")
    lines = [len(path.read_text().splitlines()) for path in (held, train)]
    assert sum(lines) == different + alike
    assert lines[0] == held_out


@pytest.mark.parametrize(
    ("overrides", "limits"),
    [
        ([], (256, 256)),
        (["evaluate.max_new_tokens=200"], (256, 200)),
        (["serving.max_tokens=512", "collect.max_tokens=400"], (400, 256)),
        (["serving.max_tokens=192"], (192, 192)),
    ],
)
def test_prompts_from_outside_get_longer_answers_unless_the_user_says_how_long(
    home, monkeypatch, tmp_path, overrides, limits
):
    started: list[list[str]] = []
    monkeypatch.setattr("app.demo.runner._child", lambda command, _: started.append(list(command)) or 1)
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{i} {random.Random(i).getrandbits(64)}"}) + "\n" for i in range(200))
    )
    assert run_demo(home, recipe=Path(RECIPE), audience="style", style=None, prompts=file, overrides=overrides) == 1
    settings = [after for before, after in itertools.pairwise(started[0]) if before == "--set"]
    told = load_recipe(Path(RECIPE), settings)
    assert (told.collect.max_tokens, told.evaluate.max_new_tokens) == limits
    gates = [recipe.evaluate.gate for recipe in (told, load_recipe(RECIPE))]
    thresholds = [[gate.rules[name].threshold for name in ("judged_prompts", "reward_accuracy")] for gate in gates]
    assert thresholds == [[40, 0.4], [120, 0.5]]


@pytest.mark.parametrize(
    ("narrow", "overrides", "types"),
    [
        (True, [], ("bfloat16", "bfloat16")),
        (False, [], ("float32", "float32")),
        (False, ["train.dtype=bfloat16"], ("bfloat16", "bfloat16")),
        (False, ["serving.gpus_per_replica=1"], ("bfloat16", "bfloat16")),
    ],
)
def test_on_a_cpu_without_bf16_the_demo_computes_in_fp32_unless_the_user_says_otherwise(
    home, monkeypatch, narrow, overrides, types
):
    started: list[list[str]] = []
    monkeypatch.setattr("app.demo.runner._child", lambda command, _: started.append(list(command)) or 1)
    monkeypatch.setattr("app.models.computes_bfloat16", lambda: narrow)
    run_demo(home, recipe=Path(RECIPE), audience="style", style=None, prompts=None, overrides=overrides)
    settings = [after for before, after in itertools.pairwise(started[0]) if before == "--set"]
    told = load_recipe(Path(RECIPE), settings)
    assert (told.train.dtype, told.serving.dtype) == types
