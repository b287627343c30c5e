"""`prefloop bench scale`: what more workers cost, on the train job itself.

    named overhead   one worker with two threads against two with one: the same cores, so what is lost is Ray's and the collectives'
    collectives      how many a step makes and how many bytes of a worker go into them, at 1, 2 and 4 workers, with all weights
                     on each and in slices (ZeRO-3)
    storage          bytes that an epoch reads of its snapshot, at 1, 2, 4 and 8 workers: once, whatever their number

Every run is `prefloop train` on the same training snapshot, in a home that counts what is read of it and that the job takes
for an object store. What the driver reads to verify the snapshot is told apart: it is read once a run, not once an epoch.
It does not know how fast a network of several machines is.
"""

import statistics
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml

from app.bench.counted import COUNTS_VARIABLE, counts
from app.bench.runner import CHILD, watched
from app.bench.train import BATCH, Say
from app.bench.work import read_work
from app.config import PairSection
from app.errors import TrainingError
from app.ledger import Ledger, RunStepRow, SnapshotRow
from app.models import ensure_sft, load_model
from app.preferences.snapshots import write_pair_snapshot
from app.storage import HOME_VARIABLE, LEDGER_VARIABLE, SIGNING_VARIABLE, Home

_LAYOUTS = (
    *((1, 2, "none"), (2, 1, "none"), (4, 1, "none"), (8, 1, "none")),
    *((1, 1, "zero3"), (2, 1, "zero3"), (4, 1, "zero3")),
)
"""Workers, torch threads of each, and `train.sharding`."""
_EPOCHS = 2
_FIRST = 2
"""Steps that are left out: the first ones allocate."""


@dataclass(frozen=True)
class ScaleSettings:
    """What to train on."""

    data: Path
    pairs: int
    max_length: int
    model: str
    adapter: str
    dtype: str
    micro_batch_tokens: int


@dataclass(frozen=True)
class Layout:
    """What one number of workers did."""

    workers: int
    threads: int
    sharding: str
    step_seconds: float
    """Median."""
    collectives: float
    """Of a step, mean."""
    collective_bytes: float
    """Of one worker and step, mean."""
    wait_seconds: float
    """For rows, mean of a step."""
    read_by_stream: float
    """Bytes of the snapshot's training rows that an epoch read, over their size."""
    read_by_checks: float
    """The same of the driver, once a run."""

    def line(self) -> str:
        """Say it in one line."""
        return (
            f"{self.workers} worker(s) x {self.threads} thread(s), sharding {self.sharding:5}  {self.step_seconds:7.3f} s a step  "
            f"{self.collectives:5.1f} collectives, {self.collective_bytes / 1e6:9.3f} MB a step  waits {self.wait_seconds:.4f} s  "
            f"read {self.read_by_stream:.2f}x the snapshot an epoch (and {self.read_by_checks:.2f}x once, to verify it)"
        )


def bench_scale(settings: ScaleSettings, *, say: Say) -> list[Layout]:
    """Train once with each number of workers.

    Raises:
        DataError: the data has too few usable pairs.
        TrainingError: a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="prefloop-scale-") as scratch:
        place = Path(scratch, "home")
        counted = Home(f"counted://{place}")
        ledger_url = f"sqlite:///{place / 'ledger.db'}"
        environment = {
            **CHILD,
            HOME_VARIABLE: counted.uri,
            LEDGER_VARIABLE: ledger_url,
            SIGNING_VARIABLE: uuid.uuid4().hex,
        }
        ledger = Ledger.open(ledger_url)
        try:
            model = ensure_sft(counted, ledger, settings.model)
            loaded = load_model(counted, model.model_id, dtype="bfloat16")
            pairs, _ = read_work(
                settings.data, loaded, max_length=settings.max_length, pairs=settings.pairs, batch_pairs=BATCH
            )
            del loaded
            section = PairSection(held_out_fraction=0.1)
            origin = {"kind": "import"}
            made = write_pair_snapshot(counted, ledger, pairs, section=section, quarantine=(), counts={}, origin=origin)
            recipe = Path(scratch, "scale.yaml")
            recipe.write_text(yaml.safe_dump(_recipe(settings, made.snapshot_id)), encoding="utf-8")
            _child("prepare", recipe, environment)
            snapshot = _newest(ledger, "training")
            found = []
            for workers, threads, sharding in _LAYOUTS:
                found.append(_run(place, ledger, recipe, snapshot, environment, workers, threads, sharding))
                say(found[-1].line())
            return found
        finally:
            ledger.close()


def overhead(found: Sequence[Layout]) -> float:
    """Return what two workers with a thread each lose against one with two: seconds of a step over seconds, less one."""
    seconds = {(layout.workers, layout.threads): layout.step_seconds for layout in found if layout.sharding == "none"}
    return seconds[2, 1] / seconds[1, 2] - 1


def _recipe(settings: ScaleSettings, pair_snapshot_id: str) -> dict[str, Any]:
    return {
        "name": "scale",
        "model": {"sft": settings.model},
        "snapshot": pair_snapshot_id,
        "pairs": {"min_pairs": 1},
        "prepare": {"max_length": settings.max_length, "too_long": "truncate_response"},
        "train": {
            "adapter": settings.adapter,
            "dtype": settings.dtype,
            "micro_batch_tokens": settings.micro_batch_tokens,
            "batch_pairs": BATCH,
            "epochs": _EPOCHS,
        },
        "workers": {"cpus_per_worker": 0.25},
    }


def _child(job: str, recipe: Path, environment: dict[str, str], *arguments: str) -> None:
    watched([sys.executable, "-m", "ray_jobs", job, str(recipe), *arguments], name=job, environment=environment)


def _newest(ledger: Ledger, kind: str) -> str:
    with ledger.read() as session:
        query = (
            sa.select(SnapshotRow.snapshot_id).where(SnapshotRow.kind == kind).order_by(SnapshotRow.created_at.desc())
        )
        found = session.scalars(query).first()
    if found is None:
        msg = f"no {kind} snapshot was made"
        raise TrainingError(msg)
    return found


def _run(
    place: Path,
    ledger: Ledger,
    recipe: Path,
    snapshot: str,
    environment: dict[str, str],
    workers: int,
    threads: int,
    sharding: str,
) -> Layout:
    run = f"scale-{workers}x{threads}-{sharding}"
    with tempfile.TemporaryDirectory(prefix="prefloop-counts-") as folder:
        settings = {"workers.workers": workers, "workers.threads_per_worker": threads, "train.sharding": sharding}
        arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        _child(
            "train",
            recipe,
            {**environment, COUNTS_VARIABLE: folder},
            *("--training-snapshot", snapshot, "--run", run),
            *arguments,
        )
        read = counts(Path(folder))
    with ledger.read() as session:
        query = sa.select(RunStepRow.metrics).where(RunStepRow.run_id == run).order_by(RunStepRow.step)
        steps = session.scalars(query).all()[_FIRST:]
    rows = sorted(Path(place, "training", snapshot).glob("train-*.parquet"))
    size = sum(path.stat().st_size for path in rows)
    names = {str(path) for path in rows}

    def share(*, streamed: bool) -> float:
        return sum(number for (path, by), number in read.items() if path in names and by == streamed) / size

    return Layout(
        workers=workers,
        threads=threads,
        sharding=sharding,
        step_seconds=statistics.median(step["seconds"] for step in steps),
        collectives=statistics.fmean(step.get("collectives", 0) for step in steps),
        collective_bytes=statistics.fmean(step.get("collective_bytes", 0) for step in steps),
        wait_seconds=statistics.fmean(step["wait_seconds"] for step in steps),
        read_by_stream=share(streamed=True) / _EPOCHS,
        read_by_checks=share(streamed=False),
    )
