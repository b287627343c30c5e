"""One stream for all ranks: a snapshot many times larger than the object store, read once an epoch, in flat memory."""

import hashlib
import itertools
import json
import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from app.bench.counted import COUNTS_VARIABLE, counts
from app.config import TrainSection
from app.schemas import TRAINING_SCHEMA, Split
from app.storage import Home
from app.training.batch import cut_steps
from app.training.checkpoints import RunIdentity
from app.training.snapshots import SHUFFLE_WINDOW, TrainFile, count_steps, epoch_files, epoch_stream, train_files
from ray_jobs.worker import TrainTask
from tests.ray_jobs.local_ray import local_ray
from tests.ray_jobs.stream_reader import LONG_STEP_S, read_stream, step_line

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
STORE = 100 * 2**20
SNAPSHOT = 5 * STORE
EPOCHS, BATCH_PAIRS = 2, 64
ROWS_PER_FILE, PROMPT, ANSWER, VOCABULARY = 1024, 600, 700, 49152
GROWTH = 1.02
PAUSE_S = 1.0
NO_PROGRESS_S = LONG_STEP_S / 4
"""After this long without progress Ray Data ends an execution, here; a step that takes longer must not look like that."""


def table_of(first: int, rows: int, draw: np.random.Generator) -> pa.Table:
    """Rows of random token ids, which do not compress."""

    def lists(count: int, length: int) -> pa.Array:
        ids = pa.array(draw.integers(0, VOCABULARY, count * length, dtype=np.int32))
        return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * length), ids)

    names = [f"g{first + i}" for i in range(rows)]
    answers = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * 2), lists(2 * rows, ANSWER))
    pairs = [[{"chosen": 0, "rejected": 1, "weight": 1.0, "pair_id": name, "source": "import"}] for name in names]
    columns = {
        "row_index": pa.array(range(first, first + rows)),
        "group_id": pa.array(names),
        "cluster": pa.array(names),
        "split": pa.array([Split.TRAIN.value] * rows),
        "prompt_ids": lists(rows, PROMPT),
        "responses": answers,
        "pairs": pa.array(pairs, TRAINING_SCHEMA.field("pairs").type),
        "labels": pa.array([[]] * rows, TRAINING_SCHEMA.field("labels").type),
        "reference_logps": pa.array([None] * rows, TRAINING_SCHEMA.field("reference_logps").type),
    }
    return pa.table(
        [columns[name].cast(TRAINING_SCHEMA.field(name).type) for name in TRAINING_SCHEMA.names], TRAINING_SCHEMA
    )


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> tuple[Home, int]:
    """A training snapshot of half a gigabyte, and its rows."""
    home = Home.at(f"counted://{tmp_path_factory.mktemp('stream') / 'home'}")
    folder = Path(home.artifact("training", "large").path)
    folder.mkdir(parents=True)
    draw, size = np.random.default_rng(0), 0
    for number in itertools.count():
        path = folder / f"train-{number:05d}.parquet"
        pq.write_table(table_of(number * ROWS_PER_FILE, ROWS_PER_FILE, draw), path, compression="zstd")
        size += path.stat().st_size
        if size > SNAPSHOT:
            return home, (number + 1) * ROWS_PER_FILE
    raise AssertionError


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("counts")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(COUNTS_VARIABLE, str(folder))
        # Ray Train gives the driver's settings to its workers, whatever their environment says.
        environment.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", NO_PROGRESS_S)
        with local_ray(num_cpus=6, store_bytes=STORE):
            yield folder


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_snapshot_larger_than_the_object_store_streams_once_an_epoch_in_flat_memory(
    counted, snapshot, tmp_path, claim, workers
):
    home, rows = snapshot
    for old in counted.glob("*.jsonl"):
        old.unlink()
    files = tuple(train_files(home.artifact("training", "large")))
    steps = count_steps(files, seed=0, epochs=EPOCHS, window=SHUFFLE_WINDOW, batch_pairs=BATCH_PAIRS)
    task = TrainTask(
        home_uri=home.uri,
        identity=RunIdentity("stream", "large", "", "", ""),
        start_model_id="",
        reference_model_id="",
        section=TrainSection(batch_pairs=BATCH_PAIRS, seed=0),
        epochs=EPOCHS,
        files=files,
        total_steps=steps,
        learning_rate=0.0,
        threads=1,
    )
    with watched() as seen:
        trainer_of(task, workers, tmp_path).fit()
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(workers)]
    assert [rank["rows"] for rank in found] == [rows * EPOCHS] * workers
    assert {rank["digest"] for rank in found} == {digest_of_steps(files)}, "rows of a step differ with the workers"
    flat = [flatness(rank["memory"]) for rank in found]
    assert max(flat) <= GROWTH, "a worker grows"
    assert flatness(seen.driver) <= GROWTH, "the driver grows"
    # A process of 40 MB; what it stores is not in its own memory, but shared.
    assert flatness(seen.raylet) <= 1.1, "the raylet grows"
    assert max(seen.outside) == seen.spilled == 0, "what does not fit is not materialised"
    first = found[0]
    boundary = steps // EPOCHS
    # Who computes nothing waits whenever a window of rows is gathered, here for a second or two. The first steps of an
    # epoch begin a window too, and wait no longer; the execution of an epoch of its own would take two seconds to start.
    window = SHUFFLE_WINDOW // BATCH_PAIRS
    usual = statistics.median(first["waits"][window : boundary - window : window])
    pause = max(first["waits"][boundary - 2 : boundary + 3])
    assert pause <= usual + PAUSE_S
    read = counts(counted)
    size = sum(Path(file.path).stat().st_size for file in files)
    names = {file.path for file in files}
    streamed = sum(count for (path, by_ray), count in read.items() if by_ray and path in names) / size / EPOCHS
    assert streamed <= 1.2
    claim(
        f"with {workers} worker(s) a snapshot five times the object store streams without spilling, read at most 1.2 times an epoch, in flat memory, the same rows in each step",
        figure=f"{size / 2**20:.0f} MB through {STORE / 2**20:.0f} MB, read {streamed:.2f}x, "
        f"workers grow by at most {max(flat) - 1:.1%} to {max(max(rank['memory']) for rank in found) / 2**20:.0f} MB, driver by {flatness(seen.driver) - 1:.1%} to {max(seen.driver) / 2**20:.0f} MB, "
        f"raylet by {flatness(seen.raylet) - 1:.1%} to {max(seen.raylet) / 2**20:.0f} MB, store up to {max(seen.stored) / 2**20:.0f} MB, wait for a window of rows {usual:.2f} s (median), at the epochs' boundary {pause:.2f} s",
        seed=0,
    )


def flatness(memory: list[int]) -> float:
    """The median of the second half over the most until then; the window of rows has filled by an eighth of the whole."""
    warm, later = memory[len(memory) // 8 : len(memory) // 2], memory[len(memory) // 2 :]
    return statistics.median(later) / max(warm)


def digest_of_steps(files: tuple[TrainFile, ...]) -> str:
    """Of the rows of every step, by the definition of their order."""

    def names() -> Iterator[str]:
        for epoch in range(EPOCHS):
            ordered = epoch_files(files, seed=0, epoch=epoch)
            rows = (f"g{file.first + i}" for file in ordered for i in range(len(file.judgements)))
            yield from epoch_stream(rows, ordered, seed=0, epoch=epoch, window=SHUFFLE_WINDOW)

    digest = hashlib.sha256()
    for step in cut_steps(names(), lambda _: 1, BATCH_PAIRS):
        digest.update(step_line(step))
    return digest.hexdigest()


@dataclass
class Watched:
    """Bytes that were seen while the job ran."""

    driver: list[int] = field(default_factory=list)
    raylet: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    """Of objects in the store."""
    outside: list[int] = field(default_factory=list)
    """Of objects that it holds in files, for want of room."""
    spilled: int = 0
    """What it wrote away to make room."""


@contextmanager
def watched() -> Iterator[Watched]:
    seen, ended, process = Watched(), threading.Event(), psutil.Process()
    [raylet] = [child for child in process.children() if child.name() == "raylet"]
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    before = get_memory_info_reply(state).store_stats.spilled_bytes_total

    def look() -> None:
        seen.driver.append(process.memory_info().rss)
        seen.raylet.append(raylet.memory_info().rss)
        store = get_memory_info_reply(state).store_stats
        seen.stored.append(store.object_store_bytes_used)
        seen.outside.append(store.object_store_bytes_fallback)
        seen.spilled = store.spilled_bytes_total - before

    def keep_looking() -> None:
        while not ended.wait(0.5):
            look()

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(keep_looking)
        try:
            yield seen
        finally:
            ended.set()
    looking.result()
    look()


def trainer_of(task: TrainTask, workers: int, folder: Path) -> TorchTrainer:
    return TorchTrainer(
        read_stream,
        train_loop_config={"task": task, "into": str(folder)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=f"stream-{workers}", storage_path=str(folder / "ray")),
    )
