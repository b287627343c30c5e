"""One stream of rows for a whole job: from the Parquet files of a snapshot to the groups of each optimizer step.

The first rank runs one Ray Data execution over the files of all epochs, in order, and iterates it in a thread, a few
steps ahead (`read_ahead`); what it does with a step is the business of `ray_jobs.worker`. Which rows make which step
follows from the seed and the files' numbers alone (`app.training.snapshots`), so a run that goes on begins with the file
in which something is left, and reads none before it.

Why `_Files` and not `ray.data.read_parquet`: that loses a path which is listed twice, which every path is that has a second
epoch; a union of epochs takes their blocks in turn where they are ordered; and an execution for each epoch made the first
rows of an epoch wait for the last of the one before.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import Empty, Queue
from threading import Thread
from typing import cast

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from app.errors import DataError
from app.schemas import TRAINING_SCHEMA
from app.storage import Home, read_parquet
from app.training.batch import step_groups
from app.training.snapshots import (
    SHUFFLE_WINDOW,
    TrainFile,
    epoch_files,
    epoch_stream,
    groups_of_table,
    rows_of_steps,
)
from app.training.tokenization import Group

READ_CPUS = 0.25
"""Logical CPUs of a task that reads token ids: little work, and a whole one may not be free beside workers."""
_READERS = 2
"""Files that are read at once. One reader is faster than the rank that turns rows into groups; as many as there are CPUs,
each with a file of token ids, filled an object store of 100 MB and were spilled to disk."""
_READ_BATCH = 256
_AHEAD = 4
"""Steps that are read before they are asked for; they hide where a window of rows is gathered to be shuffled."""
_STARVED_S = 480.0
"""How long the next step may take to be read; less than workers wait for one another, so that the one that knows why says it."""


def read_ahead(
    home_uri: str, files: tuple[TrainFile, ...], *, seed: int, epochs: int, batch_pairs: int, skip: int
) -> Iterator[list[Group]]:
    """Yield the groups of each step behind the first `skip`; what these took is passed over: files unread, rows undecoded.

    Args:
        home_uri: where they lie.
        files: the train files of the snapshot.
        seed: of the orders of files and rows.
        epochs: how often the rows are passed.
        batch_pairs: judgements of a step.
        skip: steps that are done.

    Raises:
        DataError: nothing came for `_STARVED_S`, or rows came in another order than was asked for.
    """
    read = partial(_read_steps, home_uri, files, seed=seed, epochs=epochs, batch_pairs=batch_pairs, skip=skip)
    return _ahead(read)


def _ahead(read: Callable[[], Iterator[list[Group]]]) -> Iterator[list[Group]]:
    """Yield what a thread reads, a few steps ahead.

    Raises:
        DataError: nothing came for `_STARVED_S`. Ray Data waits without a word for CPUs that others have taken, and a worker
            that is alone has nobody who would miss it in a collective.
    """
    steps: Queue[list[Group] | BaseException | None] = Queue(_AHEAD)

    def run() -> None:
        try:
            for step in read():
                steps.put(step)
        except BaseException as error:  # noqa: BLE001  raised again below, where it is waited for
            steps.put(error)
        else:
            steps.put(None)

    # It dies with the process; a run that ends before its rows do leaves it waiting.
    Thread(target=run, name="rows", daemon=True).start()
    while True:
        try:
            step = steps.get(timeout=_STARVED_S)
        except Empty:
            msg = f"no row was read for {_STARVED_S:.0f} s\n\nHint: are the cluster's CPUs taken by other jobs, or does the storage not answer?"
            raise DataError(msg) from None
        if isinstance(step, BaseException):
            raise step
        if step is None:
            return
        yield step


def _read_steps(
    home_uri: str, files: tuple[TrainFile, ...], *, seed: int, epochs: int, batch_pairs: int, skip: int
) -> Iterator[list[Group]]:
    orders = [epoch_files(files, seed=seed, epoch=epoch) for epoch in range(epochs)]
    length = sum(len(file.judgements) for file in files)
    rows = rows_of_steps(
        files,
        seed=seed,
        epochs=epochs,
        window=SHUFFLE_WINDOW,
        batch_pairs=batch_pairs,
        steps=skip,
    )
    first, passed = divmod(rows, length)
    # A window of which something is left is needed whole.
    skip_rows = passed // SHUFFLE_WINDOW * SHUFFLE_WINDOW
    left = list(itertools.chain.from_iterable(orders[first:]))
    while left and skip_rows >= len(left[0].judgements):
        skip_rows -= len(left.pop(0).judgements)

    def groups() -> Iterator[Group]:
        indices = (file.first + i for file in left for i in range(len(file.judgements)))
        ordered = _in_order(_read(home_uri, [file.path for file in left]), indices, skip=skip_rows)
        for epoch in range(first, epochs):
            left_out = passed if epoch == first else 0
            yield from epoch_stream(
                ordered, orders[epoch], seed=seed, epoch=epoch, window=SHUFFLE_WINDOW, passed=left_out
            )

    return step_groups(groups(), batch_pairs)


class _Files(Datasource):
    """Files of a training snapshot, each read whole by a task of its own, in the order given."""

    def __init__(self, home: Home, paths: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Pickled by value, as lambdas are: by reference, each process that reads would import torch with this module.
        self._reads = [lambda path=path: [read_parquet(home.filesystem, path, TRAINING_SCHEMA)] for path in paths]

    def estimate_inmemory_data_size(self) -> int | None:
        """Say that it is not known; nothing is decided by it, as a file is a task."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Return a task for each file."""
        del parallelism, data_context
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown, per_task_row_limit=per_task_row_limit) for read in self._reads]


def _read(home_uri: str, paths: Sequence[str]) -> Iterable[pa.Table]:
    """Read files one after the other in one execution."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # It would end a run whose steps take long: for half an hour no block may be asked for. `_STARVED_S` watches instead.
    context.execution_no_progress_timeout_s = -1
    files = ray.data.read_datasource(
        _Files(Home.at(home_uri), paths), num_cpus=READ_CPUS, concurrency=_READERS, override_num_blocks=len(paths)
    )
    return cast(
        "Iterable[pa.Table]", files.iter_batches(batch_size=_READ_BATCH, batch_format="pyarrow", prefetch_batches=2)
    )


def _in_order(batches: Iterable[pa.Table], indices: Iterator[int], *, skip: int) -> Iterator[Group]:
    """Yield the groups of a stream behind the first `skip`, and refuse one that is not in the order which was asked for."""
    at = 0
    for table in batches:
        found = table["row_index"].to_pylist()
        wanted = list(itertools.islice(indices, len(found)))
        if found != wanted:
            index, other = next((f, w) for f, w in zip(found, [*wanted, None], strict=False) if f != w)
            msg = f"the stream delivered row {index} where row {other} was expected"
            raise DataError(msg)
        yield from groups_of_table(table.slice(max(skip - at, 0)))
        at += len(found)
