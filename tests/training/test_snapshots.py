"""The order of rows is a function of seed, epoch and step, and a run that goes on reads what is left of it."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DataError
from app.schemas import TRAINING_SCHEMA, Split
from app.storage import Home
from app.training.batch import cut_steps
from app.training.snapshots import (
    Binding,
    TrainFile,
    check_binding,
    epoch_files,
    epoch_stream,
    known_scores,
    read_groups,
    rows_of_steps,
    to_row,
    write_training_snapshot,
)
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"reference_digest": "another"},
            "has reference log-probabilities of digest in float32, the run needs another in float32",
        ),
        ({"dtype": "bfloat16"}, "the run needs digest in bfloat16"),
        ({"template_digest": "another"}, "was made with another chat template"),
        ({"max_length": 128}, "the recipe says 128 and drop"),
        ({"too_long": "refuse"}, "the recipe says 64 and refuse"),
        ({"unit": "labels"}, "holds pairs, the objective needs labels"),
        ({"strangers": True}, "the objective needs pairs with answers to other prompts"),
    ],
)
def test_a_snapshot_that_was_made_for_something_else_is_refused(home, ledger, change, told):
    binding = Binding("pairs", "template", 64, "drop", 0, "digest", "float32")
    row = write_training_snapshot(home, ledger, make_groups(2), binding=binding, counts={}, rows_per_file=4)
    snapshot = home.artifact("training", row.snapshot_id)
    run = {"template_digest": "template", "max_length": 64, "too_long": "drop", "unit": "pairs", "strangers": False}
    run |= {"reference_digest": "digest", "dtype": "float32"}
    check_binding(snapshot, **run)
    check_binding(snapshot, **run | {"reference_digest": None, "dtype": "bfloat16"})  # a run that reads no column of it
    with pytest.raises(DataError, match=told):
        check_binding(snapshot, **run | change)


def test_no_file_is_read_behind_the_rows_that_are_wanted(home: Home):
    groups = make_groups(6)
    artifact = home.artifact("training", "snapshot")
    rows = (to_row(group, index) for index, group in enumerate(groups))
    artifact.write_rows(rows, TRAINING_SCHEMA, rows_per_file=2, stem=Split.TRAIN.value)
    Path(artifact.part_uris(Split.TRAIN.value)[2]).write_bytes(b"damaged")
    assert [g.group_id for g in read_groups(artifact, Split.TRAIN, at_most=3)] == [g.group_id for g in groups[:3]]
    with pytest.raises(DataError, match="no readable Parquet"):
        read_groups(artifact, Split.TRAIN)


def test_scores_are_looked_for_behind_other_data_and_no_further_than_an_older_state_of_the_same(
    home, ledger, monkeypatch
):
    *ours, shared, first, second = [replace(g, reference_logps=(-1.0,) * len(g.responses)) for g in make_groups(8)]
    binding = Binding("pairs", "template", 64, "drop", 0, "digest", "float32")

    def written(*groups):
        row = write_training_snapshot(home, ledger, groups, binding=binding, counts={}, rows_per_file=4)
        return row.snapshot_id

    oldest = written(*ours[:4])
    older = written(*ours[:4], shared)
    grown = written(*ours, shared)
    written(first)
    written(shared, second)
    looked_into = []
    monkeypatch.setattr(
        "app.training.snapshots.read_groups",
        lambda artifact, split: looked_into.append(artifact.name) or read_groups(artifact, split),
    )

    def found(*groups):
        looked_into.clear()
        wanted = {(g.prompt_ids, response) for g in groups for response in g.responses}
        scores = known_scores(home, ledger, wanted, reference_digest="digest", dtype="float32").logps
        assert scores.keys() <= wanted
        return len(scores) / len(wanted)

    # Newer snapshots have one of the rows, or none.
    assert found(*ours, shared) == 1.0
    assert grown in looked_into
    assert older not in looked_into
    # A row that nobody scored is looked for until an older state adds nothing.
    new = replace(shared, prompt_ids=(7, 7, 7))
    assert 0.8 < found(*ours, shared, new) < 1.0
    assert older in looked_into
    assert oldest not in looked_into
