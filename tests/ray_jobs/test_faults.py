"""Faults of a train job on a real cluster: what dies, stalls, fills up or is taken away, and how long that may take."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray
import sqlalchemy as sa
import torch

from app.errors import OutOfMemory, PrefloopError
from app.ledger import AuditRow, Ledger, ModelRow, RunRow, RunStepRow
from app.schemas import Split
from app.storage import Home
from app.training.snapshots import Binding, read_groups, write_training_snapshot
from ray_jobs.train import train
from tests.ray_jobs.deadly import POINTS
from tests.ray_jobs.deadly_driver import POINTS as DRIVER_POINTS
from tests.ray_jobs.test_train import (  # noqa: F401  fixtures
    cluster,
    command,
    recipe_for,
    stage,
    steps_of,
    weights_of,
)

pytestmark = [pytest.mark.full, pytest.mark.timeout(1500)]
KILLS, SEED = 20, 11
NOTICED_S, GOING_ON_S, REFUSED_S = 10.0, 60.0, 30.0


def recipe_of(sft: str, *, epochs: int = 2, max_failures: int = 3, **train_section):
    recipe = recipe_for(sft, epochs=epochs, **train_section)
    return recipe.model_copy(update={"workers": recipe.workers.model_copy(update={"max_failures": max_failures})})


def train_workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in command(p)]


@dataclass
class Hits:
    """What was done to workers, and how long it took until the driver's side knew and until a step was reported again."""

    times: list[float] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    going_on: list[float] = field(default_factory=list)


@contextmanager
def workers_hit(
    ledger: Ledger, run_id: str, *, count: int, do: Callable[[psutil.Process], None], seed: int
) -> Iterator[Hits]:
    """Do something to a random worker after a random number of new steps and a random moment, so often."""
    hits, ended, draw = Hits(), threading.Event(), random.Random(seed)

    def until(done: Callable[[], bool]) -> bool:
        while not done():
            if ended.wait(0.05):
                return False
        return True

    def run() -> None:
        for number in range(count):
            reached = newest_step(ledger, run_id) + draw.randint(1, 6)
            if not until(lambda reached=reached: newest_step(ledger, run_id) >= reached and len(train_workers()) > 1):
                return
            ended.wait(draw.uniform(0, 0.5))
            victim = draw.choice(train_workers())
            hits.times.append(time.time())
            do(victim)
            if not until(lambda number=number: len(failures(ledger, run_id)) > number):
                return
            failed = failures(ledger, run_id)[number]
            hits.noticed.append(failed - hits.times[-1])
            # What the checkpoint's steps had measured is reported again first, and steps since then are done again; a
            # report of the workers that are lost is no sign of the new ones.
            done = newest_step(ledger, run_id)
            if not until(lambda done=done, failed=failed: first_report(ledger, run_id, done, failed) is not None):
                return
            hits.going_on.append(first_report(ledger, run_id, done, failed) - hits.times[-1])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield hits
    finally:
        ended.set()
        thread.join()


def newest_step(ledger: Ledger, run_id: str) -> int:
    with ledger.read() as session:
        return session.scalar(sa.select(sa.func.max(RunStepRow.step)).where(RunStepRow.run_id == run_id)) or 0


def first_report(ledger: Ledger, run_id: str, beyond: int, after: float) -> float | None:
    """When a step beyond this one was first reported after this moment."""
    with ledger.read() as session:
        query = sa.select(RunStepRow.created_at).where(RunStepRow.run_id == run_id, RunStepRow.step > beyond)
        reports = [at.timestamp() for at in session.scalars(query)]
    return min((at for at in reports if at > after), default=None)


def failures(ledger: Ledger, run_id: str) -> list[float]:
    """When the driver's side knew that workers had failed."""
    with ledger.read() as session:
        query = sa.select(AuditRow.at).where(AuditRow.action == "workers_failed", AuditRow.target == run_id)
        return [at.timestamp() for at in session.scalars(query.order_by(AuditRow.sequence))]


@pytest.fixture(scope="module")
def long_run(cluster, stage):  # noqa: F811
    """An unbroken run of some 130 steps."""
    home, ledger, _, snapshot_id, sft = stage
    return train(home, ledger, recipe_of(sft, epochs=24), snapshot_id, run_id="long")


def same_weights(home, ours, expected) -> bool:
    found, wanted = weights_of(home, ours), weights_of(home, expected)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_run_whose_workers_are_killed_again_and_again_ends_with_the_bits_of_an_unbroken_one(long_run, stage, claim):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_of(sft, epochs=24, max_failures=2 * KILLS)
    with workers_hit(ledger, "killed", count=KILLS, do=psutil.Process.kill, seed=SEED) as hits:
        result = train(home, ledger, recipe, snapshot_id, run_id="killed")
    assert len(hits.times) == KILLS
    assert same_weights(home, result.model, long_run.model)
    found, expected = steps_of(ledger, "killed"), steps_of(ledger, "long")
    assert [s["step"] for s in found] == list(range(1, result.steps + 1))
    assert [(s["loss"], s["pairs"]) for s in found] == [(s["loss"], s["pairs"]) for s in expected]
    noticed, going_on = hits.noticed, hits.going_on
    assert len(going_on) == KILLS
    assert max(noticed) <= NOTICED_S
    assert max(going_on) <= GOING_ON_S
    told = {"seed": SEED}
    claim(
        "workers of a train job killed at random moments: the weights are those of an unbroken run, every row once",
        figure=f"{KILLS} of {KILLS} kills",
        **told,
    )
    claim("a killed worker is noticed within 10 s", figure=f"at most {max(noticed):.1f} s of {KILLS}", **told)
    claim("training goes on within 60 s of a kill", figure=f"at most {max(going_on):.1f} s of {KILLS}", **told)


@pytest.fixture(scope="module")
def short_run(cluster, stage):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    return train(home, ledger, recipe_of(sft), snapshot_id, run_id="short")


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_at_a_named_point_leaves_a_run_that_ends_with_the_bits_of_an_unbroken_one(
    short_run,
    stage,  # noqa: F811
    tmp_path,
    claim,
    point,
):
    home, ledger, _, snapshot_id, sft = stage
    run_id, marker = point.replace(" ", "-"), tmp_path / "killed"
    options = {"point": point, "marker": str(marker)}
    recipe = recipe_of(sft, objective="tests.ray_jobs.deadly:deadly", options=options)
    result = train(home, ledger, recipe, snapshot_id, run_id=run_id)
    assert marker.exists(), "nobody was killed"
    assert len(failures(ledger, run_id)) == 1
    assert same_weights(home, result.model, short_run.model)
    found, expected = steps_of(ledger, run_id), steps_of(ledger, "short")
    assert [(s["step"], s["loss"], s["pairs"]) for s in found] == [(s["step"], s["loss"], s["pairs"]) for s in expected]
    claim(
        f"a worker killed {point}: the weights are those of an unbroken run, every row once",
        figure=f"{len(found)} steps",
    )


def test_a_driver_killed_at_any_point_of_its_end_is_started_again_and_registers_the_same_model_once(
    short_run,
    stage,  # noqa: F811
    tmp_path,
    claim,
):
    home, ledger, _, snapshot_id, sft = stage
    # A seed of its own, or the model would have the name of one that is registered.
    recipe = recipe_of(sft, seed=3)
    job = {
        "home": home.uri,
        "address": ray.get_runtime_context().gcs_address,
        "recipe": recipe.model_dump(mode="json"),
        "snapshot_id": snapshot_id,
        "run_id": "driver",
    }
    place = tmp_path / "job.json"
    place.write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(*point: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tests.ray_jobs.deadly_driver", place, tmp_path / "-".join(("at", *point))]
        return subprocess.run(
            [*command, *point], env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    for point in DRIVER_POINTS:
        assert (told := start(point)).returncode == -signal.SIGKILL, (point, told.stderr[-3000:])
    assert (told := start()).returncode == 0, told.stderr[-3000:]
    expected = train(home, ledger, recipe, snapshot_id, run_id="driver-unbroken")
    with ledger.read() as session:
        run = session.get_one(RunRow, "driver")
        made = session.scalars(sa.select(ModelRow).where(ModelRow.run_id.in_(["driver", "driver-unbroken"]))).all()
    assert run.status == "succeeded"
    assert [model.model_id for model in made] == [run.output_model_id] == [expected.model.model_id]
    home.artifact("models", expected.model.model_id).verify()
    steps = [[(s["step"], s["loss"], s["pairs"]) for s in steps_of(ledger, r)] for r in ("driver", "driver-unbroken")]
    assert steps[0] == steps[1]
    claim(
        "a driver killed at a named point of its end, and started again: the model and the rows are those of an unbroken run",
        figure=f"{len(DRIVER_POINTS)} of {len(DRIVER_POINTS)} points",
    )


def test_a_worker_that_stalls_is_given_up_and_the_run_ends_as_an_unbroken_one(long_run, stage, claim, monkeypatch):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    stall_s = 8
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(stall_s))
    stopped: list[psutil.Process] = []

    def stop(process: psutil.Process) -> None:
        process.send_signal(signal.SIGSTOP)
        stopped.append(process)

    with workers_hit(ledger, "stalled", count=1, do=stop, seed=SEED) as hits:
        result = train(home, ledger, recipe_of(sft, epochs=24), snapshot_id, run_id="stalled")
    assert same_weights(home, result.model, long_run.model)
    noticed = hits.noticed
    assert max(noticed) <= stall_s + 10
    assert not [p for p in stopped if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "an orphan holds memory"
    claim(
        f"a worker that stalls is given up after its time limit (here {stall_s} s) and at most 10 s more",
        figure=f"{max(noticed):.1f} s",
        seed=SEED,
    )


def test_workers_wait_for_one_that_hangs_no_longer_than_a_collective_may_take(
    short_run,
    stage,  # noqa: F811
    tmp_path,
    claim,
    monkeypatch,
):
    """It answers when Ray asks if it is alive; only its step does not go on."""
    home, ledger, _, snapshot_id, sft = stage
    wait_s = 20
    monkeypatch.setattr("ray_jobs.train.COLLECTIVE_TIMEOUT_S", wait_s)
    marker = tmp_path / "stuck"
    recipe = recipe_of(sft, objective="tests.ray_jobs.deadly:stuck", options={"marker": str(marker)})
    result = train(home, ledger, recipe, snapshot_id, run_id="stuck")
    began = marker.stat().st_mtime
    noticed = min(at for at in failures(ledger, "stuck") if at > began) - began
    assert noticed >= wait_s - 1, "it was given up for another reason"
    assert noticed <= wait_s + 10
    assert same_weights(home, result.model, short_run.model)
    claim(
        f"a worker that hangs in a step is given up after the time limit of a collective (here {wait_s} s) and at most 10 s more",
        figure=f"{noticed:.1f} s",
    )


def test_a_micro_batch_that_memory_does_not_hold_is_halved_and_the_steps_stay_the_same(cluster, stage, claim):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    plain = train(home, ledger, recipe_of(sft, micro_batch_tokens=256), snapshot_id, run_id="enough")
    recipe = recipe_of(sft, objective="tests.ray_jobs.hungry:hungry", options={}, micro_batch_tokens=256)
    result = train(home, ledger, recipe, snapshot_id, run_id="hungry")
    found, expected = (steps_of(ledger, name) for name in ("hungry", "enough"))
    assert [s["loss"] for s in found] == pytest.approx([s["loss"] for s in expected], rel=1e-5)
    assert result.steps == plain.steps
    with ledger.read() as session:
        query = sa.select(AuditRow).where(AuditRow.target == "hungry", AuditRow.action == "note")
        notes = [row.detail["note"] for row in session.scalars(query)]
        known = session.get_one(RunRow, "hungry").metrics["micro_batch_tokens"]
    assert notes
    assert known == 256 // 2 ** len(notes), "later attempts begin with what fitted"
    assert all("memory did not hold" in note for note in notes)
    claim(
        "a micro-batch that does not fit memory is halved, with the same losses as where it fits",
        figure=f"{len(notes)} halving(s), {len(found)} steps",
    )


def test_memory_that_holds_not_even_a_quarter_ends_the_run_with_the_reason(cluster, stage):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_of(sft, objective="tests.ray_jobs.hungry:hungry", options={}, micro_batch_tokens=4096)
    with pytest.raises(
        OutOfMemory, match=r"(?s)was refused by a worker: .*DefaultCPUAllocator.*Hint: .*activation_checkpointing"
    ):
        train(home, ledger, recipe, snapshot_id, run_id="starving")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_as_a_checkpoint_is_written_costs_no_more_than_the_steps_since_the_one_before(
    short_run,
    stage,  # noqa: F811
    small_disk,
    tmp_path,
    claim,
):
    home, ledger, _, snapshot_id, sft = stage
    options = {"disk": str(small_disk), "marker": str(tmp_path / "was-full")}
    recipe = recipe_of(sft, objective="tests.ray_jobs.crowded:crowded", options=options)
    first, ended = [], threading.Event()

    def note_the_first_step() -> None:
        while not first and not ended.wait(0.05):
            first.extend(s["seconds"] for s in steps_of(ledger, "crowded")[:1])

    noting = threading.Thread(target=note_the_first_step)
    noting.start()
    try:
        result = train(home, ledger, recipe, snapshot_id, run_id="crowded")
    finally:
        ended.set()
        noting.join()
    with ledger.read() as session:
        query = sa.select(AuditRow).where(AuditRow.action == "workers_failed", AuditRow.target == "crowded")
        told = [str(row.detail) for row in session.scalars(query)]
    assert len(told) == 1
    assert "make room" in told[0]
    assert not list(small_disk.iterdir()), "half of a file is left"
    assert same_weights(home, result.model, short_run.model)
    found, expected = steps_of(ledger, "crowded"), steps_of(ledger, "short")
    assert [s["seconds"] for s in found[:1]] == first, "it began anew: a step that is done again takes another time"
    assert [(s["step"], s["loss"], s["pairs"]) for s in found] == [(s["step"], s["loss"], s["pairs"]) for s in expected]
    claim(
        "a disk that is full as a checkpoint is written: the run goes on from the one before, with the bits of an unbroken run",
        figure=f"{len(found)} steps",
    )


def other_workers(stage, place):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    recipe = recipe_of(sft)
    recipe = recipe.model_copy(update={"workers": recipe.workers.model_copy(update={"workers": 60})})
    train(home, ledger, recipe, snapshot_id, run_id="too-many")


def lost_part(stage, place):  # noqa: F811
    part = parts_of(other := elsewhere(stage, place))[1]
    part.unlink()
    train(other, stage[1], recipe_of(stage[4]), stage[3], run_id="lost-part")


def changed_part(stage, place):  # noqa: F811
    part = parts_of(other := elsewhere(stage, place))[1]
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    train(other, stage[1], recipe_of(stage[4]), stage[3], run_id="changed-part")


def other_recipe(stage, place):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    train(home, ledger, recipe_of(sft, options={"beta": 0.2}), snapshot_id, run_id="short")


def other_snapshot(stage, place):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    artifact = home.artifact("training", snapshot_id)
    groups = [group for split in Split for group in read_groups(artifact, split)]
    binding = Binding(**artifact.manifest()["binding"])
    fewer = write_training_snapshot(home, ledger, groups[1:], binding=binding, counts={}, rows_per_file=12)
    train(home, ledger, recipe_of(sft), fewer.snapshot_id, run_id="short")


def another_runs_checkpoints(stage, place):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    shutil.copytree(home.local("runs", "short", "checkpoints"), home.local("runs", "borrowed", "checkpoints"))
    train(home, ledger, recipe_of(sft), snapshot_id, run_id="borrowed")


def checkpoints_of_another_key(stage, place):  # noqa: F811
    other = elsewhere(stage, place)
    shutil.copytree(
        stage[0].local("runs", "short", "checkpoints"), other.local("runs", "short-elsewhere", "checkpoints")
    )
    (other.local() / "signing_key").unlink()
    train(other, stage[1], recipe_of(stage[4]), stage[3], run_id="short-elsewhere")


def a_run_under_way(stage, place):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    with Ledger.open(home.ledger_url).alone("train-busy", patience_s=0):
        train(home, ledger, recipe_of(sft), snapshot_id, run_id="busy")


def elsewhere(stage, place: Path) -> Home:  # noqa: F811
    return Home.at(shutil.copytree(stage[0].local(), place / "home", ignore=shutil.ignore_patterns("runs", "locks")))


def parts_of(home: Home) -> list[Path]:
    return sorted(home.local("training").glob("*/train-*.parquet"))


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (other_workers, r"60 worker\(s\) with 1 CPUs each .* do not fit: the cluster has .* places for"),
        (lost_part, r"lacks the file `train-00001.parquet`"),
        (changed_part, r"train-00001.parquet` differs from its manifest"),
        (other_recipe, r"run `short` exists with another train\."),
        (other_snapshot, r"run `short` exists with another snapshot \(`"),
        (another_runs_checkpoints, r"run `borrowed` has checkpoints of another run_id"),
        (checkpoints_of_another_key, r"run `short-elsewhere` has checkpoints, and none that can be trusted"),
        (a_run_under_way, r"run `busy` is being trained by another process"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_cannot_work_is_refused_within_half_a_minute_in_one_message(short_run, stage, tmp_path, claim, ask, told):  # noqa: F811
    began = time.monotonic()
    with pytest.raises(PrefloopError, match=told):
        ask(stage, tmp_path)
    took = time.monotonic() - began
    assert took <= REFUSED_S
    size = sum(part.stat().st_size for part in parts_of(stage[0])) if ask in (lost_part, changed_part) else 0
    of = f", a snapshot of {size / 1000:.0f} kB" if size else ""
    claim(f"refused within 30 s: {ask.__name__.replace('_', ' ')}", figure=f"{took:.1f} s{of}")
