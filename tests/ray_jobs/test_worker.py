"""The rows of a train worker: read ahead by a thread, waited for no longer than is told, and passed over undecoded."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from app.config import TrainSection
from app.errors import DataError
from app.generation import context_window
from app.models import ensure_sft, load_model
from app.schemas import TRAINING_SCHEMA, Split
from app.storage import read_parquet
from app.training.checkpoints import RunIdentity
from app.training.engine import SingleWorker
from app.training.held_out import AnswerMeasure, Measures, PairMeasure
from app.training.scoring import ScoringModel
from app.training.snapshots import SHUFFLE_WINDOW, count_steps, epoch_files, to_row, train_files
from app.training.tokenization import Group
from ray_jobs import stream
from ray_jobs.worker import SharedSteps, TrainTask, _canaries, _to_prove, summary
from tests.training.tiny_runs import make_groups

EPOCHS, BATCH_PAIRS = 3, 4


@pytest.fixture
def task(home) -> TrainTask:
    artifact = home.artifact("training", "snapshot")
    rows = (to_row(group, index) for index, group in enumerate(make_groups(30)))
    artifact.write_rows(rows, TRAINING_SCHEMA, rows_per_file=7, stem=Split.TRAIN.value)
    files = tuple(train_files(artifact))
    return TrainTask(
        home_uri=home.uri,
        identity=RunIdentity("run", "snapshot", "", "", ""),
        start_model_id="",
        reference_model_id="",
        section=TrainSection(batch_pairs=BATCH_PAIRS, seed=0),
        epochs=EPOCHS,
        files=files,
        total_steps=count_steps(files, seed=0, epochs=EPOCHS, window=SHUFFLE_WINDOW, batch_pairs=BATCH_PAIRS),
        learning_rate=0.0,
        threads=1,
    )


@pytest.fixture
def read(task, monkeypatch) -> list[str]:
    """The files that were read, in their order; their rows come without Ray, five at a time whatever the files."""
    read: list[str] = []

    def rows(home_uri: str, paths: Sequence[str]) -> Iterator[pa.Table]:
        read.extend(paths)
        whole = pa.concat_tables(table_of(task, path) for path in paths).combine_chunks()
        yield from map(pa.Table.from_batches, zip(whole.to_batches(max_chunksize=5), strict=True))

    monkeypatch.setattr(stream, "_read", rows)
    return read


def table_of(task: TrainTask, path: str) -> pa.Table:
    return read_parquet(task.home().filesystem, path, TRAINING_SCHEMA)


def paths_of(task: TrainTask) -> list[str]:
    """The files of all epochs, in their order."""
    return [f.path for epoch in range(task.epochs) for f in epoch_files(task.files, seed=0, epoch=epoch)]


def steps_of(task: TrainTask, *, skip: int) -> list[list[str]]:
    return [[group.group_id for group in step] for step in SharedSteps(task, SingleWorker(), skip=skip)]


def test_a_run_that_goes_on_gets_the_steps_that_are_left_and_reads_no_epoch_before_them(task, read):
    whole = steps_of(task, skip=0)
    assert len(whole) == task.total_steps
    assert read == paths_of(task)
    for done in range(task.total_steps):
        read.clear()
        assert steps_of(task, skip=done) == whole[done:]
        assert read == paths_of(task)[len(task.files) * (sum(map(len, whole[:done])) // 30) :]


def test_a_run_that_goes_on_reads_no_file_of_windows_that_are_done(task, read, monkeypatch):
    monkeypatch.setattr(stream, "SHUFFLE_WINDOW", 8)
    whole = steps_of(task, skip=0)
    sizes = {file.path: len(file.judgements) for file in task.files}
    for done in range(task.total_steps):
        read.clear()
        assert steps_of(task, skip=done) == whole[done:]
        epoch, passed = divmod(sum(map(len, whole[:done])), 30)
        needed, ends = passed // 8 * 8, list(itertools.accumulate(map(sizes.__getitem__, paths_of(task))))
        assert read == [path for path, end in zip(paths_of(task), ends, strict=True) if end > 30 * epoch + needed]


def test_windows_that_are_done_are_not_decoded(task, read, monkeypatch):
    monkeypatch.setattr(stream, "SHUFFLE_WINDOW", 8)
    decode, rows = stream.groups_of_table, []

    def counted(table: pa.Table):
        rows.append(table.num_rows)
        return decode(table)

    monkeypatch.setattr(stream, "groups_of_table", counted)
    whole = steps_of(task, skip=0)
    rows.clear()
    done = next(n for n in range(len(whole)) if sum(map(len, whole[:n])) >= 20)
    assert steps_of(task, skip=done) == whole[done:]
    assert sum(rows) == 30 * EPOCHS - 16


def test_rows_that_do_not_come_end_the_run_in_bounded_time(task, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(stream, "_read", lambda home_uri, paths: iter(held.wait, True))
    monkeypatch.setattr(stream, "_STARVED_S", 0.2)
    with pytest.raises(DataError, match=r"no row was read for 0 s[\s\S]*taken by other jobs"):
        steps_of(task, skip=0)
    held.set()


def test_the_proofs_of_a_run_see_several_groups_and_the_longest_of_all():
    def group(name: str, tokens: int) -> Group:
        return Group(name, name, "train", (1,) * (tokens - 2), ((2,), (3,)), ())

    shown = [group(f"g{tokens}", tokens) for tokens in (10, 20, 15, 12, 90, 61, 300)]

    def proven(shown: list[Group]) -> list[list[str]]:
        return [[g.group_id for g in groups] for groups in _to_prove(shown, 100)]

    assert proven(shown) == [["g10", "g20", "g15", "g12"], ["g300"]]
    assert proven(shown[4:]) == [["g90"], ["g300"]]
    assert proven(shown[:3]) == [["g10", "g20", "g15"]]
    many = Group("many", "many", "train", (1,) * 40, ((2,) * 100,) * 4, ())
    assert proven([*shown, many]) == [["g10", "g20", "g15", "g12"], ["g300"]], "its rows are shorter"


def test_canaries_are_prompts_that_leave_room_for_an_answer_and_others_where_there_are_too_few(
    tiny_model, home, ledger
):
    start = load_model(home, ensure_sft(home, ledger, str(tiny_model)).model_id, dtype="float32")
    window = context_window(start.model)
    short, other, long = (
        [replace(group, prompt_ids=(10 + i,) * n) for i, group in enumerate(make_groups(7))] for n in (5, 6, window - 3)
    )
    # A model of random weights goes on until its limit.
    tokens = lambda groups: _canaries(ScoringModel(start.model), start, groups, dtype="float32")["canary_tokens"]  # noqa: E731
    assert tokens(long) == 3
    assert tokens([*long, *short]) == (7 * 128 + 3) / 8
    assert tokens([*long, *short, *short]) == (7 * 128 + 3) / 8, "rows of one prompt are one canary"
    assert tokens([*long, *short, *other]) == 128


def test_held_out_rows_that_are_no_number_are_in_no_mean():
    def pair(name: str, margin: float, loss: float) -> PairMeasure:
        return PairMeasure(name, name, margin, loss, 5, 9, chosen_logp=margin, before_logp=-1.0)

    good = [pair("a", 0.5, 0.25), pair("b", -0.5, 0.75)]
    odd = [pair("c", math.nan, 0.5), pair("d", 0.5, math.inf)]
    answers = [AnswerMeasure("e", "e", True, reward, -1.0, 5, 0.5) for reward in (1.0, math.nan)]
    assert Measures([*good, *odd], answers).finite() == Measures(good, answers[:1])
    assert summary(Measures([*good, *odd], [])) == summary(Measures(good, []))
    assert summary(Measures(odd, [])) == {}


def test_what_the_reading_thread_meets_is_raised_where_the_step_is_waited_for(task, read):
    Path(task.files[1].path).write_bytes(b"damaged")
    with pytest.raises(DataError, match="no readable Parquet"):
        steps_of(task, skip=0)


def test_a_stream_in_another_order_is_refused(task, monkeypatch):
    monkeypatch.setattr(stream, "_read", lambda home_uri, paths: (table_of(task, path) for path in reversed(paths)))
    with pytest.raises(DataError, match=r"delivered row \d+ where row \d+ was expected"):
        steps_of(task, skip=0)
