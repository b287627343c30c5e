"""The order of rows is a function of seed, epoch and step, and a run that goes on reads what is left of it."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DataError
from app.schemas import TRAINING_SCHEMA, Split
from app.storage import Home
from app.training.batch import cut_steps
from app.training.snapshots import TrainFile, epoch_files, epoch_stream, read_groups, rows_of_steps, to_row
from tests.training.tiny_runs import make_groups

FILES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=5)


@settings(deadline=None)
@given(
    sizes=FILES,
    seed=st.integers(0, 3),
    epochs=st.integers(1, 3),
    window=st.integers(1, 9),
    batch_pairs=st.integers(1, 5),
    draw=st.data(),
)
def test_what_is_left_behind_any_step_is_the_end_of_the_whole_order(sizes, seed, epochs, window, batch_pairs, draw):
    firsts = itertools.accumulate(map(len, sizes), initial=0)
    files = [TrainFile(f"file-{first}", first, tuple(counts)) for first, counts in zip(firsts, sizes, strict=False)]
    order = {"seed": seed, "window": window}
    judgements = {file.first + i: count for file in files for i, count in enumerate(file.judgements)}

    def stream(begin: int, passed: int):
        for epoch in range(begin, epochs):
            ordered, left_out = epoch_files(files, seed=seed, epoch=epoch), passed if epoch == begin else 0
            rows = [file.first + i for file in ordered for i in range(len(file.judgements))]
            unread = left_out // window * window
            yield from epoch_stream(iter(rows[unread:]), ordered, epoch=epoch, passed=left_out, **order)

    whole = list(cut_steps(stream(0, 0), judgements.__getitem__, batch_pairs))
    done = draw.draw(st.integers(0, len(whole)))
    taken = rows_of_steps(files, epochs=epochs, batch_pairs=batch_pairs, steps=done, **order)
    assert taken == sum(map(len, whole[:done]))
    left = list(cut_steps(stream(*divmod(taken, len(judgements))), judgements.__getitem__, batch_pairs))
    assert left == whole[done:]


def test_no_file_is_read_behind_the_rows_that_are_wanted(home: Home):
    groups = make_groups(6)
    artifact = home.artifact("training", "snapshot")
    rows = (to_row(group, index) for index, group in enumerate(groups))
    artifact.write_rows(rows, TRAINING_SCHEMA, rows_per_file=2, stem=Split.TRAIN.value)
    Path(artifact.part_uris(Split.TRAIN.value)[2]).write_bytes(b"damaged")
    assert [g.group_id for g in read_groups(artifact, Split.TRAIN, at_most=3)] == [g.group_id for g in groups[:3]]
    with pytest.raises(DataError, match="no readable Parquet"):
        read_groups(artifact, Split.TRAIN)
