"""One stream of rows for a whole job: from the Parquet files of a snapshot to the groups of each optimizer step.

The driver hands over one Ray Data read for each epoch (`epoch_datasets`), whole and in order. The first rank iterates
them in a thread, a few steps ahead (`read_ahead`); what it does with a step is the business of `ray_jobs.worker`. Which rows
make which step follows from the seed and the files' numbers alone (`app.training.snapshots`), so a run that goes on
passes over what is done without reading it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import Empty, Queue
from threading import Thread
from typing import Any, cast

import pyarrow as pa
import ray.data
import ray.train
from ray.train import DataConfig

from app.errors import DataError
from app.storage import Home, arrow_filesystem
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
"""Steps that are read before they are asked for; they hide where one epoch's execution ends and the next begins."""
_STARVED_S = 480.0
"""How long the next step may take to be read; less than workers wait for one another, so that the one that knows why says it."""


def epoch_datasets(home: Home, files: Sequence[TrainFile], *, seed: int, epochs: int) -> dict[str, Any]:
    """Return what reads the rows of each epoch, in its order, by the names under which workers find it."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # The newer reader packs row groups into bins as they fit, which loses the order of files, and starts 32 actors for
    # the footers of one file.
    context.use_datasource_v2 = False
    filesystem, arrow = home.filesystem, arrow_filesystem(home.uri)
    found: dict[str, Any] = {}
    for epoch in range(epochs):
        ordered = epoch_files(files, seed=seed, epoch=epoch)
        paths = [filesystem.unstrip_protocol(file.path) if arrow is None else file.path for file in ordered]
        # A path that is listed twice in one read vanishes, and a union of ordered data sets takes blocks in turn.
        read = ray.data.read_parquet(
            paths, filesystem=arrow, override_num_blocks=len(paths), num_cpus=READ_CPUS, concurrency=_READERS
        )
        found[_dataset(epoch)] = read
    return found


def stream_config() -> DataConfig:
    """Return how workers are given them: whole and in order, since one rank reads for all."""
    return DataConfig(datasets_to_split=[], execution_options=ray.data.ExecutionOptions(preserve_order=True))


def read_ahead(
    files: tuple[TrainFile, ...], *, seed: int, epochs: int, batch_pairs: int, skip: int
) -> Iterator[list[Group]]:
    """Yield the groups of each step behind the first `skip`; what these took is passed over, epochs unread, rows undecoded.

    Args:
        files: the train files of the snapshot.
        seed: of the orders of files and rows.
        epochs: how often the rows are passed.
        batch_pairs: judgements of a step.
        skip: steps that are done.

    Raises:
        DataError: nothing came for `_STARVED_S`, or rows came in another order than was asked for.
    """
    read = partial(_read_steps, files, seed=seed, epochs=epochs, batch_pairs=batch_pairs, skip=skip)
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
    files: tuple[TrainFile, ...], *, seed: int, epochs: int, batch_pairs: int, skip: int
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

    def groups() -> Iterator[Group]:
        for epoch in range(first, epochs):
            order, left_out = orders[epoch], passed if epoch == first else 0
            indices = [file.first + i for file in order for i in range(len(file.judgements))]
            ordered = _in_order(_read_epoch(epoch), indices, skip=left_out // SHUFFLE_WINDOW * SHUFFLE_WINDOW)
            yield from epoch_stream(ordered, order, seed=seed, epoch=epoch, window=SHUFFLE_WINDOW, passed=left_out)

    return step_groups(groups(), batch_pairs)


def _dataset(epoch: int) -> str:
    """Return the name under which the driver hands over the rows of an epoch."""
    return f"epoch-{epoch}"


def _read_epoch(epoch: int) -> Iterable[pa.Table]:
    rows = ray.train.get_dataset_shard(_dataset(epoch))
    return cast(
        "Iterable[pa.Table]", rows.iter_batches(batch_size=_READ_BATCH, batch_format="pyarrow", prefetch_batches=2)
    )


def _in_order(batches: Iterable[pa.Table], indices: Sequence[int], *, skip: int) -> Iterator[Group]:
    """Yield the groups of a stream behind the first `skip`, and refuse one that is not in the order which was asked for."""
    at = 0
    for table in batches:
        found = table["row_index"].to_pylist()
        if found != indices[at : at + len(found)]:
            wanted = [*indices[at : at + len(found)], None]
            index, other = next((f, w) for f, w in zip(found, wanted, strict=False) if f != w)
            msg = f"the stream delivered row {index} where row {other} was expected"
            raise DataError(msg)
        yield from groups_of_table(table.slice(max(skip - at, 0)))
        at += len(found)
