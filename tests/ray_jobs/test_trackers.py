"""Sinks get what the ledger has, by TRL's names, and none of them stops a run."""

import inspect
import io
import json
import struct
import threading
import time
from dataclasses import asdict, replace

import pytest
import sqlalchemy as sa
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from app.config import TrackSection, parse_recipe
from app.errors import DataError, RecipeError
from app.ledger import AuditRow, RunRow, RunStepRow, now
from app.storage import Home
from app.training.loop import StepReport
from ray_jobs.trackers import _NAMES, Follower, Trackers, require_trackers, tracked

REPORT = StepReport(
    step=3,
    loss=0.5,
    reward_chosen=0.25,
    reward_rejected=-0.25,
    reward_margin=0.5,
    reward_accuracy=0.75,
    reward_ties=0.0,
    logp_chosen=-4.0,
    logp_rejected=-8.0,
    chosen_fell=0.5,
    kl=None,
    grad_norm=2.0,
    learning_rate=1e-4,
    pairs=8,
    labels=0,
    tokens=100,
    seconds=1.5,
)


def events_of(folder):
    """Read TensorBoard's files: length, checksum, event, checksum."""
    found = {}
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_names_are_those_that_trl_writes():
    import trl.trainer.dpo_trainer
    import trl.trainer.kto_trainer

    written = inspect.getsource(trl.trainer.dpo_trainer) + inspect.getsource(trl.trainer.kto_trainer)
    ours = {
        "train/kl_estimate",
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "eval/loss",
        "train/rewards/ties",
        "eval/rewards/ties",
        "eval/chosen_change",
        "eval/chosen_fell",
    }
    for name in set(_NAMES.values()) - ours:
        assert f'"{name.split("/", 1)[1]}"' in written, name


def test_every_number_of_a_report_is_told_and_what_is_unknown_is_not():
    told = tracked(asdict(REPORT))
    assert told["train/rewards/accuracies"] == 0.75
    assert told["train/chosen_fell"] == 0.5
    assert "train/kl" not in told
    numbers = {name for name, value in asdict(REPORT).items() if isinstance(value, int | float)} - {"step"}
    assert len(told) == len(numbers)
    assert tracked({"held_out_accuracy": 0.6}) == {"eval/rewards/accuracies": 0.6}


def test_tensorboard_holds_every_step(home):
    trackers = Trackers(TrackSection(to=("tensorboard",)), home, "run-1", {})
    trackers.open()
    trackers.log(1, {"train/loss": 0.75})
    trackers.log(2, {"train/loss": 0.5})
    trackers.close(failed=False)
    assert trackers.lost == {}
    assert events_of(home.local("runs", "run-1", "track"))["train/loss"] == {1: 0.75, 2: 0.5}


def test_a_sink_that_fails_is_left_and_named(home):
    home.local("runs", "run-1").mkdir(parents=True)
    home.local("runs", "run-1", "track").write_text("in the way")
    trackers = Trackers(TrackSection(to=("tensorboard",)), home, "run-1", {})
    trackers.open()
    trackers.log(1, {"train/loss": 0.5})
    trackers.close(failed=False)
    assert "Error" in trackers.lost["tensorboard"]


class Sink:
    """A sink that writes down what it is told."""

    def __init__(self):
        self.told = []
        self.failed = None

    def log(self, step, metrics):
        self.told.append((step, metrics.get("train/loss", metrics.get("eval/loss"))))

    def close(self, *, failed):
        self.failed = failed


class Broken(Sink):
    def log(self, step, metrics):
        raise ConnectionError("no route")


class Stuck(Sink):
    def __init__(self):
        super().__init__()
        self.release = threading.Event()

    def log(self, step, metrics):
        self.release.wait(30)


def follow(home, ledger, console=None, **sinks):
    """Follow the run with sinks of the test in the place of real ones."""
    trackers = Trackers(TrackSection(to=tuple(sinks)), home, "run-1", {})
    trackers._make = {kind: lambda s=sink: s for kind, sink in sinks.items()}
    return Follower(ledger, "run-1", trackers, console, lambda meter, row: meter.say(f"shown: {row.step}"))


@pytest.fixture
def step(ledger):
    moment = now()
    with ledger.write() as session:
        session.add(
            RunRow(run_id="run-1", kind="train", recipe={}, metrics={}, attempt=1, code_version="x", created_at=moment, updated_at=moment, status="running")
        )  # fmt: skip

    def write(number):
        metrics = asdict(replace(REPORT, step=number, loss=1 / number))
        with ledger.write() as session:
            session.add(RunStepRow(run_id="run-1", step=number, metrics=metrics, created_at=now()))

    return write


def test_every_step_and_the_outcome_are_told_once_and_a_continued_run_goes_on(home, ledger, step):
    first, second = Sink(), Sink()
    step(1)  # of the process before
    follower = follow(home, ledger, mlflow=first)
    step(2)
    step(3)
    follower.end((3, {"eval/loss": 0.1}))
    assert (first.told, first.failed) == ([(2, 0.5), (3, pytest.approx(1 / 3)), (3, 0.1)], False)
    follow(home, ledger, mlflow=second).end()
    assert (second.told, second.failed) == ([], True)


def test_a_broken_sink_is_told_of_once_and_the_others_go_on(home, ledger, step):
    good, printed = Sink(), io.StringIO()
    follower = follow(home, ledger, Console(file=printed, width=200), mlflow=Broken(), wandb=good)
    step(1)
    step(2)
    follower.end((2, {}))
    assert [number for number, _ in good.told] == [1, 2, 2]
    assert printed.getvalue().count("warning: mlflow gets no more of this run: ConnectionError: no route") == 1
    with ledger.read() as session:
        rows = session.scalars(sa.select(AuditRow).where(AuditRow.action == "tracker lost")).all()
    assert [row.detail["tracker"] for row in rows] == ["mlflow"]


def test_steps_that_follow_one_another_at_once_are_all_shown(home, ledger, step):
    printed = io.StringIO()
    follower = follow(home, ledger, Console(file=printed, width=200))
    for number in range(1, 6):
        step(number)
    follower.end((5, {}))
    assert printed.getvalue().splitlines() == [f"shown: {number}" for number in range(1, 6)]


def test_a_sink_that_hangs_does_not_hold_up_the_end_of_a_run(home, ledger, step, monkeypatch):
    monkeypatch.setattr("ray_jobs.trackers._LAST_S", 0.2)
    stuck = Stuck()
    follower = follow(home, ledger, mlflow=stuck)
    step(1)
    began = time.monotonic()
    follower.end((1, {}))
    assert time.monotonic() - began < 5
    stuck.release.set()


def test_sinks_that_are_not_there_are_refused_before_the_run(home, monkeypatch):
    monkeypatch.setattr("ray_jobs.trackers.find_spec", lambda name: None if name == "wandb" else object())
    section = TrackSection(to=("tensorboard", "wandb"))
    with pytest.raises(RecipeError, match=r"track.to names wandb, which is not installed\n\nHint: .*`track`"):
        require_trackers(section, home)
    require_trackers(TrackSection(to=("tensorboard",)), home)
    with pytest.raises(DataError, match="needs a local folder"):
        require_trackers(TrackSection(to=("tensorboard",)), Home.at("memory://home"))


def test_wandb_without_a_key_is_refused_before_it_asks_for_one(home, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.trackers.find_spec", lambda name: object())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match=r"no key for it\n\nHint: set WANDB_API_KEY"):
        require_trackers(TrackSection(to=("wandb",)), home)
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(TrackSection(to=("wandb",)), home)


def test_a_project_that_no_sink_has_is_refused():
    with pytest.raises(RecipeError, match="`project` has no effect without `mlflow` or `wandb`"):
        parse_recipe({"name": "x", "track": {"to": ["tensorboard"], "project": "p"}}, place="test")


@pytest.mark.full
def test_mlflow_holds_every_step_and_the_same_run_goes_on(home, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    section = TrackSection(to=("mlflow",), project="taste")
    for step in (1, 2):
        trackers = Trackers(section, home, "run-1", {"name": "mine"})
        trackers.open()
        trackers.log(step, tracked(asdict(REPORT)))
        trackers.close(failed=step == 1)
        assert trackers.lost == {}
    client = MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("taste").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-1", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/rewards/margins")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.5)]
    [written] = (tmp_path / "mlruns").rglob("recipe.json")
    assert json.loads(written.read_text()) == {"name": "mine"}


@pytest.mark.full
def test_wandb_holds_every_step(home, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = Trackers(TrackSection(to=("wandb",)), home, "run-1", {"name": "mine"})
    trackers.open()
    trackers.log(3, tracked(asdict(REPORT)))
    trackers.close(failed=False)
    assert trackers.lost == {}
    [path] = home.local("runs", "run-1", "track").rglob("*.wandb")
    # LevelDB's log format: a header of 7 bytes, then checksum, length, type and content of each record.
    content, at, told = path.read_bytes(), 7, {}
    while at < len(content):
        (length,) = struct.unpack_from("<H", content, at + 4)
        record = wandb_internal_pb2.Record.FromString(content[at + 7 : at + 7 + length])
        told |= {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        at += 7 + length
    assert float(told["train/rewards/margins"]) == 0.5
    assert int(told["_step"]) == 3
