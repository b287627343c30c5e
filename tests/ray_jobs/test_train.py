"""The train job on a real cluster: two workers equal one process, a killed run equals an unbroken one."""

import io
import math
import shutil
import threading
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import sqlalchemy as sa
import torch
from ray.train import TrainingFailedError
from rich.console import Console
from safetensors.torch import load_file

from app.config import TrackSection, parse_recipe, usual_learning_rate
from app.errors import DataError, LedgerError, RecipeError, ServiceError, TrainingError
from app.ledger import AuditRow, Ledger, ModelRow, RunRow, RunStepRow, now
from app.models import Lineage, load_model, register_folder
from app.schemas import Split
from app.storage import Home
from app.training.batch import PackedBatch, step_groups
from app.training.engine import Replicated, SingleWorker
from app.training.loop import learning_rate_factor, optimise
from app.training.objectives import load_objective
from app.training.policy import build_policy, precomputed
from app.training.scoring import ScoringModel
from app.training.snapshots import (
    SHUFFLE_WINDOW,
    Binding,
    epoch_files,
    epoch_stream,
    read_groups,
    train_files,
    write_training_snapshot,
)
from app.training.tokenization import Group, Preference
from ray_jobs.recorder import StepRecorder
from ray_jobs.runs import own_snapshot
from ray_jobs.session import Session
from ray_jobs.train import _body, _cause, _tuned_by, _warnings, train
from tests.ray_jobs.local_ray import local_ray
from tests.ray_jobs.telling import TellingRecorder
from tests.ray_jobs.test_trackers import events_of


@pytest.fixture(scope="module")
def cluster():
    with local_ray(num_cpus=6):
        yield


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model):
    """A home with a tiny SFT model and a training snapshot that holds its reference log-probabilities."""
    home = Home.at(tmp_path_factory.mktemp("train") / "home")
    made = make_stage(home, Ledger.open(home.ledger_url), tiny_model, tmp_path_factory.mktemp("copy"))
    yield made
    made[1].close()


def make_stage(home: Home, ledger: Ledger, tiny_model: Path, scratch: Path):
    folder = shutil.copytree(tiny_model, scratch / "model")
    model = register_folder(
        home, ledger, folder, name="sft", lineage=Lineage(kind="sft"), source=str(tiny_model.resolve())
    )
    loaded = load_model(home, model.model_id, dtype="float32")
    scorer = ScoringModel(loaded.model)
    groups = []
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: tuple(torch.randint(2, 258, (n,), generator=generator).tolist())  # noqa: E731
    for i in range(48):
        responses = tuple(draw(3 + (i + k) % 6) + (1,) for k in range(2 + i % 2))
        pairs = tuple(Preference(0, k, 1.0, f"{i}-{k}", "import") for k in range(1, len(responses)))
        split = "held_out" if i >= 40 else "train"
        group = Group(f"g{i}", f"c{i}", split, draw(4 + i % 9), responses, pairs)
        with torch.no_grad():
            logps = tuple(scorer(PackedBatch.pack([group])).logps.double().tolist())
        groups.append(replace(group, reference_logps=logps))
    binding = Binding("pairs", loaded.template_digest, 64, "drop", 0, model.digest, "float32")
    row = write_training_snapshot(home, ledger, groups, binding=binding, counts={}, rows_per_file=12)
    return home, ledger, model, row.snapshot_id, str(tiny_model)


def recipe_for(sft: str, **train_section):
    section = {
        "dtype": "float32",
        "learning_rate": 1e-3,
        "epochs": 2,
        "batch_pairs": 8,
        "micro_batch_tokens": 64,
        "checkpoint_every": 3,
        **({} if train_section.get("adapter") == "full" else {"lora": {"r": 4, "alpha": 8}}),
    }
    tree = {
        "name": "tiny",
        "model": {"sft": sft},
        "pairs": {"min_pairs": 10},
        "prepare": {"max_length": 64},
        "train": section | train_section,
        "workers": {"workers": 2, "cpus_per_worker": 1},
    }
    return parse_recipe(tree, place="test")


def steps_of(ledger: Ledger, run_id: str):
    with ledger.read() as session:
        rows = session.scalars(sa.select(RunStepRow).where(RunStepRow.run_id == run_id).order_by(RunStepRow.step)).all()
    return [row.metrics for row in rows]


def command(process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def a_worker_killed_after(ledger: Ledger, run_id: str, *, steps: int):
    """Kill one worker of this process's cluster once the run has done so many steps; yields the killed pids."""
    killed, ended = [], threading.Event()

    def kill_one():
        while not killed and not ended.wait(0.05):
            if len(steps_of(ledger, run_id)) < steps:
                continue
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in command(p)]
            for process in workers[:1]:
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        yield killed
    finally:
        ended.set()
        killer.join()


def weights_of(home: Home, model: ModelRow):
    return load_file(Path(home.artifact("models", model.model_id).path, "model.safetensors"))


def one_process(stage, recipe):
    home, _, model, snapshot_id, _ = stage
    section = recipe.train
    policy = build_policy(load_model(home, model.model_id, dtype="float32"), section)
    artifact = home.artifact("training", snapshot_id)
    groups = read_groups(artifact, Split.TRAIN)
    files = train_files(artifact)

    def rows():
        for epoch in range(section.epochs):
            ordered = epoch_files(files, seed=section.seed, epoch=epoch)
            stream = (groups[f.first + i] for f in ordered for i in range(len(f.judgements)))
            yield from epoch_stream(stream, ordered, seed=section.seed, epoch=epoch, window=SHUFFLE_WINDOW)

    steps = list(step_groups(rows(), section.batch_pairs))
    return list(
        optimise(
            Replicated(
                policy,
                learning_rate=section.learning_rate,
                max_grad_norm=section.max_grad_norm,
                workers=SingleWorker(),
            ),
            steps,
            objective=load_objective(section.objective, section.options),
            reference=precomputed,
            section=section,
            learning_rate=section.learning_rate,
            total_steps=len(steps),
            workers=SingleWorker(),
        )
    )


@pytest.fixture(scope="module")
def unbroken(cluster, stage):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft).model_copy(update={"track": TrackSection(to=("tensorboard",))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_jobs.train.StepRecorder", TellingRecorder)
        return train(home, ledger, recipe, snapshot_id, run_id="unbroken")


def test_no_run_waits_until_the_controller_has_imported_model_code(unbroken, stage):
    with stage[1].read() as session:
        query = sa.select(AuditRow.detail).where(AuditRow.target == "unbroken", AuditRow.action == "imported")
        found = session.scalars(query).all()
    assert len(found) == unbroken.steps
    assert all(modules == {"ray.train": True, "transformers": False} for modules in found)


def test_two_workers_train_like_one_process(unbroken, stage):
    expected = one_process(stage, recipe_for(stage[4]))
    found = steps_of(stage[1], "unbroken")
    assert len(found) == len(expected) >= 10
    for step, (ours, reference) in enumerate(zip(found, expected, strict=True)):
        assert ours["loss"] == pytest.approx(reference.loss, rel=1e-5), step
        assert ours["pairs"] == reference.pairs


@pytest.mark.full
@pytest.mark.parametrize("reference", ["adapter_off", "sharded"])
def test_a_reference_beside_or_under_the_policy_trains_like_scores_of_the_snapshot(unbroken, stage, reference):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft, reference=reference, held_out_every=4)
    result = train(home, ledger, recipe, snapshot_id, run_id=reference)
    expected = [step["loss"] for step in steps_of(ledger, "unbroken")]
    assert [step["loss"] for step in steps_of(ledger, reference)] == pytest.approx(expected, rel=1e-5)
    assert result.learning.accuracy == unbroken.learning.accuracy
    assert "held_out_loss" in steps_of(ledger, reference)[3]


def test_the_first_loss_is_ln_2_and_the_run_is_recorded(unbroken, stage):
    home, ledger, model, _, _ = stage
    assert steps_of(ledger, "unbroken")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    with ledger.read() as session:
        run = session.get_one(RunRow, "unbroken")
    assert (run.status, run.start_model_id, run.reference_model_id) == ("succeeded", model.model_id, model.model_id)
    assert run.output_model_id == unbroken.model.model_id
    manifest = home.artifact("models", unbroken.model.model_id).verify()
    assert (manifest["parent"], manifest["run"]) == (model.model_id, "unbroken")
    assert unbroken.learning.pairs == sum(1 + i % 2 for i in range(40, 48))


def test_a_run_ends_when_its_workers_have(unbroken):
    """Ray Train's controller gives up on its cleaner after 12 s where that one looks for a dashboard."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path(), "train")
    logs = [path.read_text() for path in folder.glob("ray-train-sys-controller-*.log")]
    assert any("PlacementGroupCleaner launched" in log for log in logs)
    assert not any("Failed to stop PlacementGroupCleaner" in log for log in logs)


def test_a_sink_is_told_every_step_and_what_was_held_out(unbroken, stage):
    told = events_of(stage[0].local("runs", "unbroken", "track"))
    steps = steps_of(stage[1], "unbroken")
    assert told["train/loss"] == pytest.approx({m["step"]: m["loss"] for m in steps})
    assert told["eval/rewards/accuracies"] == pytest.approx({unbroken.steps: unbroken.metrics["held_out_accuracy"]})


def test_a_run_whose_worker_is_killed_ends_with_the_bits_of_an_unbroken_one(unbroken, stage):
    home, ledger, _, snapshot_id, sft = stage
    with a_worker_killed_after(ledger, "killed-once", steps=5) as killed:
        result = train(home, ledger, recipe_for(sft), snapshot_id, run_id="killed-once")
    assert len(killed) == 1
    ours, expected = weights_of(home, result.model), weights_of(home, unbroken.model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert [m["step"] for m in steps_of(ledger, "killed-once")] == list(range(1, result.steps + 1))


def test_a_step_without_an_update_is_told_where_it_happens_and_counted_at_the_end(cluster, stage):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(
        sft, objective="tests.ray_jobs.patchy:patchy", options={"call": 2}, max_steps=3, micro_batch_tokens=4096
    )
    recipe = recipe.model_copy(update={"workers": recipe.workers.model_copy(update={"workers": 1})})
    shown = io.StringIO()
    result = train(home, ledger, recipe, snapshot_id, run_id="patchy", console=Console(file=shown, width=500))
    steps = steps_of(ledger, "patchy")
    assert [bool(step["skipped"]) for step in steps] == [False, True, False], "three calls of the fifth are no step"
    rows = steps[1]["skipped"]
    assert len(rows) == steps[1]["pairs"]
    assert (
        f"warning: step 2 made no update, a loss or gradient of it is not finite; rows: {rows[0]}, " in shown.getvalue()
    )
    assert (result.skipped_steps, result.model.manifest["metrics"]["steps_skipped"]) == (1, 1)
    with ledger.read() as session:
        query = sa.select(AuditRow.detail).where(AuditRow.target == "patchy", AuditRow.action == "no_update")
        assert session.scalars(query).all() == [{"step": 2, "rows": rows}]


def test_an_option_beyond_what_is_usual_is_told_before_anything_is_prepared(cluster, stage, monkeypatch, capsys):
    home, ledger, _, _, sft = stage

    def prepared(*_, **__):
        raise DataError("prepared")

    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr("ray_jobs.train._enough_pairs", lambda *_: "pairs")
    monkeypatch.setattr("ray_jobs.train.prepare", prepared)
    job = Session(home, ledger, recipe_for(sft, options={"beta": 5.0}), "test", ())
    with pytest.raises(DataError, match="prepared"):
        _body(job, Namespace(run=None, training_snapshot=None))
    assert capsys.readouterr().out.startswith("warning: train.options.beta = 5 is outside of what dpo is used with")


def test_an_option_beyond_what_is_usual_is_kept_with_the_run(cluster, stage):
    home, ledger, _, snapshot_id, sft = stage
    train(home, ledger, recipe_for(sft, options={"beta": 5.0}, max_steps=1), snapshot_id, run_id="steep")
    with ledger.read() as session:
        query = sa.select(AuditRow.detail).where(AuditRow.target == "steep", AuditRow.action == "warning")
        assert session.scalars(query).one()["warning"].startswith("train.options.beta = 5 is outside")


def test_what_somebody_should_know_before_a_run_is_a_line_each(monkeypatch):
    section = recipe_for("sft").train
    monkeypatch.setattr("ray_jobs.train.computes_bfloat16", lambda: False)
    assert _warnings(section, 1e-3, held_out=4096, on_cpus=True) == []
    looking = section.model_copy(update={"held_out_every": 4})
    assert _warnings(looking, 1e-3, held_out=4096, on_cpus=True) == []
    assert _warnings(looking, 1e-3, held_out=0, on_cpus=True) == [
        "nothing is held out, so train.held_out_every measures nothing"
    ]
    told = _warnings(section.model_copy(update={"dtype": "bfloat16"}), 1e-3, held_out=5000, on_cpus=True)
    assert told == [
        "of 5000 held-out rows the first 4096 are measured",
        "this CPU computes in bfloat16 several times slower than in float32: set train.dtype to float32",
    ]
    wide = section.model_copy(update={"dtype": "bfloat16"})
    assert _warnings(wide, 1e-3, held_out=0, on_cpus=False) == []
    monkeypatch.setattr("ray_jobs.train.computes_bfloat16", lambda: True)
    assert _warnings(wide, 1e-3, held_out=0, on_cpus=True) == []


def test_a_ledger_that_is_away_for_a_moment_loses_no_step(home, monkeypatch):
    monkeypatch.setattr("ray_jobs.recorder._ASKED_AGAIN_S", 0.01)
    ledger, opened, left = Ledger.open(home.ledger_url), Ledger.open, [2]
    run = {"kind": "train", "recipe": {}, "metrics": {}, "attempt": 1, "code_version": "", "status": "running"}
    with ledger.write() as session:
        session.add(RunRow(run_id="run", **run, created_at=now(), updated_at=now()))

    def away(url):
        if left[0]:
            left[0] -= 1
            raise LedgerError("connection refused")
        return opened(url)

    monkeypatch.setattr("ray_jobs.recorder.Ledger.open", away)
    recorder = StepRecorder(home.ledger_url, "run")
    recorder.after_report(None, [{"step": 1, "loss": 0.5}], None)
    recorder.after_report(None, [{"step": 2, "loss": 0.4}], None)
    assert [metrics["loss"] for metrics in steps_of(ledger, "run")] == [0.5, 0.4]
    monkeypatch.setattr("ray_jobs.recorder.LEDGER_AWAY_S", 0.05)
    left[0] = 1_000_000
    with pytest.raises(LedgerError, match="connection refused"):
        StepRecorder(home.ledger_url, "run").after_report(None, [{"step": 3, "loss": 0.3}], None)
    ledger.close()


def test_too_few_pairs_are_refused_with_the_number(cluster, stage):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft).model_copy(update={"pairs": recipe_for(sft).pairs.model_copy(update={"min_pairs": 500})})
    with pytest.raises(DataError, match="training pairs are fewer than pairs.min_pairs = 500"):
        train(home, ledger, recipe, snapshot_id, run_id="few")


def test_workers_that_leave_no_cpu_for_reading_are_refused_with_the_numbers(cluster, stage):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft)
    recipe = recipe.model_copy(update={"workers": recipe.workers.model_copy(update={"workers": 6})})
    with pytest.raises(ServiceError, match="the cluster has 6 CPUs free, with places for 6 of them"):
        train(home, ledger, recipe, snapshot_id, run_id="starved")
    with ledger.read() as session:
        row = session.get_one(RunRow, "starved")
    assert row.status == "failed"
    assert "6 worker(s) with 1 CPUs each and 0.25 CPUs for reading do not fit" in row.error


def test_a_worker_that_no_node_can_hold_is_refused(cluster, stage):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft)
    for change, told in (({"cpus_per_worker": 64}, "needs 64 CPUs"), ({"use_gpu": True}, "and 1 GPUs on one node")):
        asked = recipe.model_copy(update={"workers": recipe.workers.model_copy(update=change)})
        with pytest.raises(ServiceError, match=told):
            train(home, ledger, asked, snapshot_id, run_id=f"large-{len(told)}")


@pytest.mark.full
def test_a_run_that_cannot_leave_its_model_is_a_failed_run(unbroken, stage, monkeypatch):
    home, ledger, _, snapshot_id, sft = stage

    def full_disk(*_args, **_settings):
        raise OSError("no space left")

    monkeypatch.setattr("ray_jobs.train.register_folder", full_disk)
    with pytest.raises(ServiceError, match="the run is done, and its model cannot be registered: no space left"):
        train(home, ledger, recipe_for(sft), snapshot_id, run_id="full-disk")
    with ledger.read() as session:
        row = session.get_one(RunRow, "full-disk")
    assert row.status == "failed"
    assert "no space left" in row.error


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_damaged_snapshot_trains_nothing(cluster, stage, tmp_path, damage):
    home, ledger, _, snapshot_id, sft = stage
    other = Home.at(
        shutil.copytree(home.artifact("training", snapshot_id).path.rsplit("/training/")[0], tmp_path / "h")
    )
    part = sorted(Path(other.artifact("training", snapshot_id).path).glob("train*.parquet"))[1]
    part.unlink() if damage == "lost" else part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=f"{part.name}"):
        train(other, ledger, recipe_for(sft), snapshot_id, run_id="damaged")
    with ledger.read() as session:
        assert session.get(RunRow, "damaged") is None


def test_reference_columns_of_another_compute_type_are_refused(cluster, stage):
    home, ledger, _, snapshot_id, sft = stage
    with pytest.raises(DataError, match="the run needs .* in bfloat16"):
        train(home, ledger, recipe_for(sft, dtype="bfloat16"), snapshot_id, run_id="other")


def test_a_run_id_with_another_recipe_is_refused(unbroken, stage):
    home, ledger, _, snapshot_id, sft = stage
    with pytest.raises(TrainingError, match="`unbroken` exists with another train.options.beta\n"):
        train(home, ledger, recipe_for(sft, options={"beta": 0.2}), snapshot_id, run_id="unbroken")


@pytest.fixture
def attempts(monkeypatch):
    """The task of each attempt of a run, which is interrupted before anything is trained."""
    tasks = []

    def interrupted(home, ledger, recipe, task, *, console):
        tasks.append(task)
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_jobs.train._fit_in_memory", interrupted)
    return tasks


def test_a_run_goes_on_with_the_usual_rate_of_its_beginning(cluster, stage, attempts, monkeypatch):
    home, ledger, _, snapshot_id, sft = stage
    for usual in (1e-5, 2e-5):  # of another version of this program
        monkeypatch.setattr("ray_jobs.train.usual_learning_rate", lambda *_, usual=usual, **__: usual)
        with pytest.raises(KeyboardInterrupt):
            train(home, ledger, recipe_for(sft, learning_rate=None), snapshot_id, run_id="upgraded")
    assert [task.learning_rate for task in attempts] == [1e-5, 1e-5]


def test_a_run_goes_on_with_the_snapshot_of_its_beginning_and_another_recipe_with_its_own(stage, attempts, tmp_path):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft)
    assert own_snapshot(home, ledger, recipe, "mine") is None
    with pytest.raises(KeyboardInterrupt):
        train(home, ledger, recipe, snapshot_id, run_id="mine")
    assert own_snapshot(home, ledger, recipe, "mine") == snapshot_id
    assert own_snapshot(home, ledger, recipe_for(sft, micro_batch_tokens=128), "mine") == snapshot_id
    assert own_snapshot(home, ledger, recipe_for(sft, options={"beta": 0.2}), "mine") is None
    for change in (
        {"snapshot": "other"},
        {"pairs": recipe.pairs.model_copy(update={"max_pairs_per_prompt": 1})},
        {"serving": recipe.serving.model_copy(update={"deployment": "other"})},
    ):
        assert own_snapshot(home, ledger, recipe.model_copy(update=change), "mine") is None
    assert own_snapshot(home, ledger, recipe, None) is None
    assert own_snapshot(Home.at(tmp_path), ledger, recipe, "mine") is None
    with ledger.write() as session:
        session.get_one(RunRow, "mine").status = "succeeded"
    assert own_snapshot(home, ledger, recipe, "mine") is None


def test_what_memory_held_counts_until_a_recipe_says_something_else_of_memory(cluster, stage, attempts):
    home, ledger, _, snapshot_id, sft = stage
    more = {"micro_batch_tokens": 256}
    for changes in ({}, {}, more, more):
        with pytest.raises(KeyboardInterrupt):
            train(home, ledger, recipe_for(sft, **changes), snapshot_id, run_id="small")
        if len(attempts) == 1:
            with ledger.write() as session:
                row = session.get_one(RunRow, "small")
                row.metrics = {**row.metrics, "micro_batch_tokens": 32}
    assert [task.section.micro_batch_tokens for task in attempts] == [64, 32, 256, 256]


def test_a_run_does_not_go_on_with_another_source_of_its_objective(cluster, stage, attempts, monkeypatch):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft, objective="tests.ray_jobs.patchy:patchy", options={"call": 99})
    with pytest.raises(KeyboardInterrupt):
        train(home, ledger, recipe, snapshot_id, run_id="edited")
    monkeypatch.setattr("app.training.objectives.Objective.source", "def patchy(): ...")
    with pytest.raises(RecipeError, match="run `edited` began with another source of `tests.ray_jobs.patchy:patchy`"):
        train(home, ledger, recipe, snapshot_id, run_id="edited")
    assert len(attempts) == 1


def test_a_refusal_of_a_worker_ends_the_run_at_its_first_attempt(cluster, stage):
    home, ledger, model, snapshot_id, sft = stage
    snapshot = home.artifact("training", snapshot_id)
    groups = [
        replace(group, reference_logps=tuple(logp - 5.0 for logp in group.reference_logps or ()))
        for split in (Split.TRAIN, Split.HELD_OUT)
        for group in read_groups(snapshot, split)
    ]
    digest = load_model(home, model.model_id, dtype="float32").template_digest
    binding = Binding("pairs", digest, 64, "drop", 0, model.digest, "float32")
    wrong = write_training_snapshot(home, ledger, groups, binding=binding, counts={}, rows_per_file=12)
    with pytest.raises(TrainingError, match="was refused by a worker: policy and reference differ by"):
        train(home, ledger, recipe_for(sft), wrong.snapshot_id, run_id="refused")
    with ledger.read() as session:
        run = session.get_one(RunRow, "refused")
        assert run.status == "failed"
        assert "prepare.reuse_scores=false" in run.error


@pytest.mark.full
def test_a_run_whose_worker_dies_too_often_says_what_happened(unbroken, stage):
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_for(sft, epochs=None, min_steps=25, learning_rate=None)
    recipe = recipe.model_copy(update={"workers": recipe.workers.model_copy(update={"max_failures": 0})})
    with (
        a_worker_killed_after(ledger, "mortal", steps=2) as killed,
        pytest.raises(TrainingError, match=r"run `mortal` failed: .*(died|Error).*\n\nHint: the same run id continues"),
    ):
        train(home, ledger, recipe, snapshot_id, run_id="mortal")
    assert len(killed) == 1
    with ledger.read() as session:
        per_epoch = session.get_one(RunRow, "unbroken").metrics["total_steps"] / 2
        total = session.get_one(RunRow, "mortal").metrics["total_steps"]
    assert 25 <= total < 25 + per_epoch
    usual = usual_learning_rate("dpo", "lora", width=32, total_steps=total, tuned_by="answers")
    first = learning_rate_factor(0, total_steps=total, warmup_ratio=0.1, schedule="cosine")
    assert steps_of(ledger, "mortal")[0]["learning_rate"] == pytest.approx(usual * first)


def test_what_a_start_model_learned_from_is_known_by_its_lineage_and_else_by_the_recipe(ledger):
    def tuned_by(*objectives, told="answers"):
        """Of the last of a row of models, each trained from the one before; the first is from outside."""
        name = "-".join(("outside", *objectives))
        for number in range(len(objectives) + 1):
            made_by = {"train": {"objective": objectives[number - 1]}} if number else None
            row = ModelRow(
                model_id=f"{name}-{told}-{number}",
                digest=f"{name}-{number}",
                uri="",
                kind="full" if number else "sft",
                parent_id=f"{name}-{told}-{number - 1}" if number else None,
                manifest={"recipe": made_by},
                created_at=now(),
            )
            with ledger.write() as session:
                session.add(row)
        recipe = parse_recipe({"name": "x", "model": {"sft_tuned_by": told}}, place="x")
        return _tuned_by(ledger, row, recipe)

    assert tuned_by() == "answers"
    assert tuned_by(told="preferences") == "preferences"
    assert tuned_by("sft") == "answers"
    assert tuned_by("sft", told="preferences") == "preferences"
    assert tuned_by("kto") == "preferences"
    assert tuned_by("dpo", "sft") == "preferences"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Training failed due to controller error:\nno node has 8 GPUs", "controller error: no node has 8 GPUs"),
        ("trace\n  File x\nValueError: odd\nmore", "ValueError: odd"),
        ("The actor died because of OOM.\nRuntimeError: connection closed", "The actor died because of OOM."),
    ],
)
def test_the_line_that_says_why_is_told_of_a_failure(text, told):
    assert _cause(TrainingFailedError(text)).endswith(told)
