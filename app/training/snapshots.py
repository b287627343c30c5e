"""Training snapshots: groups in Parquet in a fixed global order, bound to the tokenizer and the reference.

The manifest counts rows, pairs and tokens for each split; the id is the hash of what trains. Train rows and held-out
rows lie in files of their own (`train-*`, `held_out-*`), so a job reads what it needs.
"""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa

from app.errors import DataError
from app.ledger import Ledger, SnapshotRow, now
from app.schemas import TRAINING_SCHEMA, Split, content_hash_of
from app.storage import Artifact, Home, read_parquet
from app.training.batch import cut_steps
from app.training.tokenization import Group, Label, Preference

Item = TypeVar("Item")

SHUFFLE_WINDOW = 4096
"""Rows that an epoch shuffles among each other as it streams them."""


@dataclass(frozen=True)
class Binding:
    """What the token ids and reference log-probabilities of a snapshot depend on."""

    pair_snapshot_id: str
    template_digest: str
    max_length: int
    too_long: str
    seed: int
    reference_digest: str | None
    """Digest of the reference model; None where the snapshot has no reference log-probabilities."""
    dtype: str | None
    unit: str = "pairs"
    """What the objective learns from: `pairs`, `labels` or `good`."""
    strangers: bool = False
    """Whether labelled answers have partners from other prompts, for KTO's KL."""


def to_row(group: Group, row_index: int) -> dict[str, Any]:
    """Return the Parquet row of a group."""
    return {"row_index": row_index, **asdict(group)}


def from_row(row: dict[str, Any]) -> Group:
    """Read a group from a Parquet row."""
    return Group(
        group_id=row["group_id"],
        cluster=row["cluster"],
        split=row["split"],
        prompt_ids=tuple(row["prompt_ids"]),
        responses=tuple(map(tuple, row["responses"])),
        pairs=tuple(Preference(**pair) for pair in row["pairs"] or ()),
        labels=tuple(Label(**label) for label in row["labels"] or ()),
        reference_logps=None if row["reference_logps"] is None else tuple(row["reference_logps"]),
    )


def global_order(groups: Iterable[Group], seed: int) -> list[Group]:
    """Return the groups in the fixed shuffle of a seed, which does not depend on the order they come in."""
    ordered = sorted(groups, key=lambda g: g.group_id)
    random.Random(seed).shuffle(ordered)  # noqa: S311  an order, not a secret
    return ordered


Scored = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a response."""
_LOOKED_INTO = 8
"""Snapshots in which scores are looked for: those of some data sets and units that are trained on in turn."""


@dataclass(frozen=True)
class KnownScores:
    """What a reference scored before."""

    logps: Mapping[Scored, float]
    damaged: Mapping[str, str]
    """Snapshots that were passed over, by id, and why."""


def known_scores(home: Home, ledger: Ledger, wanted: Set[Scored], *, reference_digest: str, dtype: str) -> KnownScores:
    """Return what this reference gave to prompts and responses in the newest snapshots that it scored.

    Snapshots are read until all is found, or until one that has at least half of it adds nothing to what newer ones had:
    data that grow are in the newest, and data sets that are trained on in turn in one of the last.

    Args:
        home: where they lie.
        ledger: knows them.
        wanted: what is asked for.
        reference_digest: of the model.
        dtype: in which it scored.
    """
    with ledger.read() as session:
        rows = session.scalars(
            sa.select(SnapshotRow).where(SnapshotRow.kind == "training").order_by(SnapshotRow.created_at.desc())
        ).all()
    found: dict[Scored, float] = {}
    damaged: dict[str, str] = {}
    of_this = (
        home.artifact("training", row.snapshot_id)
        for row in rows
        if (row.manifest["binding"]["reference_digest"], row.manifest["binding"]["dtype"]) == (reference_digest, dtype)
    )
    for artifact in itertools.islice((artifact for artifact in of_this if artifact.exists()), _LOOKED_INTO):
        try:
            artifact.verify()
        except DataError as error:
            damaged[artifact.name] = str(error)
            continue
        groups = (group for split in Split for group in read_groups(artifact, split))
        scores = {
            (group.prompt_ids, response): logp
            for group in groups
            for response, logp in zip(group.responses, group.reference_logps or (), strict=True)
            if math.isfinite(logp) and (group.prompt_ids, response) in wanted
        }
        known = len(found)
        found = scores | found
        if len(found) == len(wanted) or (len(found) == known and 2 * len(scores) >= len(wanted)):
            break
    return KnownScores(found, damaged)


def write_training_snapshot(
    home: Home,
    ledger: Ledger,
    groups: Sequence[Group],
    *,
    binding: Binding,
    counts: dict[str, Any],
    rows_per_file: int,
) -> SnapshotRow:
    """Write groups (already in global order) as a snapshot and register it; the same content gives the same id.

    One that is there already is left as it is, and written again where it is damaged.
    """
    snapshot_id = content_hash_of([asdict(binding), rows_per_file], map(asdict, groups))[:16]
    artifact = home.artifact("training", snapshot_id)
    if not artifact.is_whole():
        splits: dict[str, dict[str, float]] = {}
        for split in Split:
            members = [g for g in groups if g.split == split]
            rows = (to_row(group, index) for index, group in enumerate(members))
            artifact.write_rows(rows, TRAINING_SCHEMA, rows_per_file=rows_per_file, stem=split.value)
            splits[split.value] = {
                "rows": len(members),
                "pairs": sum(len(g.pairs) for g in members),
                "labels": sum(len(g.labels) for g in members),
                "judged": len({judged.pair_id for g in members for judged in g.judgements}),
                "liked_weight": sum(label.weight for g in members for label in g.labels if label.label),
                "disliked_weight": sum(label.weight for g in members for label in g.labels if not label.label),
                "tokens": sum(g.num_tokens for g in members),
            }
        artifact.write_manifest(
            {"snapshot_id": snapshot_id, "binding": asdict(binding), "splits": splits, "counts": counts}
        )
    with ledger.write() as session:
        row = session.get(SnapshotRow, snapshot_id)
        if row is None:
            row = SnapshotRow(
                snapshot_id=snapshot_id,
                kind="training",
                uri=artifact.uri,
                manifest=artifact.manifest(),
                parent_id=binding.pair_snapshot_id,
                created_at=now(),
            )
            session.add(row)
    return row


def check_binding(
    artifact: Artifact,
    *,
    template_digest: str,
    max_length: int,
    too_long: str,
    unit: str,
    strangers: bool,
    reference_digest: str | None,
    dtype: str,
) -> dict[str, Any]:
    """Return the manifest of a training snapshot that fits a run.

    Args:
        artifact: the snapshot.
        template_digest: of the policy's tokenizer.
        max_length: tokens that a row may have, as the run wants it.
        too_long: what the run wants done with longer rows.
        unit: what the run's objective learns from.
        strangers: whether it needs answers to other prompts.
        reference_digest: of the reference whose log-probabilities the run wants to read, or None.
        dtype: compute type of the run.

    Raises:
        DataError: the snapshot was made with another chat template, another truncation, another reference or another
            compute type.
    """
    manifest = artifact.manifest()
    binding = Binding(**manifest["binding"])
    if binding.template_digest != template_digest:
        msg = f"training snapshot `{artifact.name}` was made with another chat template ({binding.template_digest[:8]}…, the policy has {template_digest[:8]}…)\n\nHint: run `prefloop prepare` again."
        raise DataError(msg)
    if (binding.max_length, binding.too_long) != (max_length, too_long):
        msg = f"training snapshot `{artifact.name}` was made with prepare.max_length = {binding.max_length} and prepare.too_long = {binding.too_long}, the recipe says {max_length} and {too_long}\n\nHint: run `prefloop prepare` again, or set these values as the snapshot has them."
        raise DataError(msg)
    if binding.unit != unit or (strangers and not binding.strangers):
        msg = f"training snapshot `{artifact.name}` holds {binding.unit}{' with answers to other prompts' if binding.strangers else ''}, the objective needs {unit}{' with answers to other prompts' if strangers else ''}\n\nHint: run `prefloop prepare` again."
        raise DataError(msg)
    if reference_digest is not None and (binding.reference_digest, binding.dtype) != (reference_digest, dtype):
        msg = f"training snapshot `{artifact.name}` has reference log-probabilities of {binding.reference_digest or 'no model'} in {binding.dtype}, the run needs {reference_digest} in {dtype}\n\nHint: run `prefloop prepare` again."
        raise DataError(msg)
    return manifest


def read_groups(artifact: Artifact, split: Split, *, at_most: int | None = None) -> list[Group]:
    """Read the groups of a split in global order, which is shuffled; no file is read behind the first `at_most` rows."""
    rows = (row for path in artifact.part_uris(split.value) for row in _rows(artifact, path))
    return list(map(from_row, itertools.islice(rows, at_most)))


def groups_of_table(table: pa.Table) -> list[Group]:
    """Read groups from a table of the training schema."""
    return [from_row(row) for row in table.to_pylist()]


@dataclass(frozen=True)
class TrainFile:
    """One file of train rows, which are numbered from `first` on."""

    path: str
    first: int
    judgements: tuple[int, ...]
    """Pairs and labels of each row."""


def train_files(artifact: Artifact) -> list[TrainFile]:
    """List the train files with the number of pairs and labels of each row; reads no token."""
    files = []
    for path in artifact.part_uris(Split.TRAIN.value):
        with artifact.filesystem.open(path, "rb") as stream:
            table = pq.read_table(stream, columns=["row_index", "pairs", "labels"])
        lengths = [pc.fill_null(pc.list_value_length(table[kind]), 0).to_pylist() for kind in ("pairs", "labels")]
        counts = tuple(map(sum, zip(*lengths, strict=True)))
        if counts:
            files.append(TrainFile(path, table["row_index"][0].as_py(), counts))
    return files


def epoch_files(files: Sequence[TrainFile], *, seed: int, epoch: int) -> list[TrainFile]:
    """Return the files in the order of an epoch."""
    return _permuted(files, f"{seed}/{epoch}/files")


def epoch_stream(
    items: Iterator[Item], files: Sequence[TrainFile], *, seed: int, epoch: int, window: int, passed: int = 0
) -> Iterator[Item]:
    """Take one epoch off a stream that comes in file order, permuted inside fixed windows.

    The permutation depends on (seed, epoch, window number) alone, so it is the same for every world size and resume.

    Args:
        items: the rows from the first window on of which something is left.
        files: in the order of the epoch.
        seed: of the run.
        epoch: its number.
        window: rows that are shuffled among each other.
        passed: rows of the epoch that were taken before and are left out.

    Raises:
        DataError: the stream ends before the rows of the epoch do.
    """
    length = sum(len(file.judgements) for file in files)
    for start in range(passed // window * window, length, window):
        number = start // window
        buffer = list(itertools.islice(items, min(window, length - start)))
        if len(buffer) < min(window, length - start):
            msg = f"the stream of epoch {epoch} ended after {start + len(buffer)} of {length} rows"
            raise DataError(msg)
        yield from _permuted(buffer, f"{seed}/{epoch}/{number}")[max(passed - start, 0) :]


def count_steps(files: Sequence[TrainFile], *, seed: int, epochs: int, window: int, batch_pairs: int) -> int:
    """Return the number of optimizer steps, by walking the very order that training walks."""
    return sum(1 for _ in _steps(files, seed=seed, epochs=epochs, window=window, batch_pairs=batch_pairs))


def rows_of_steps(
    files: Sequence[TrainFile], *, seed: int, epochs: int, window: int, batch_pairs: int, steps: int
) -> int:
    """Return how many rows, of all epochs one after the other, the first so many steps take; reads no row."""
    walked = _steps(files, seed=seed, epochs=epochs, window=window, batch_pairs=batch_pairs)
    return sum(map(len, itertools.islice(walked, steps)))


def _steps(files: Sequence[TrainFile], *, seed: int, epochs: int, window: int, batch_pairs: int) -> Iterator[list[int]]:
    """Yield the pairs and labels of each row of each step."""

    def counts() -> Iterator[int]:
        for epoch in range(epochs):
            ordered = epoch_files(files, seed=seed, epoch=epoch)
            stream = (count for file in ordered for count in file.judgements)
            yield from epoch_stream(stream, ordered, seed=seed, epoch=epoch, window=window)

    return cut_steps(counts(), lambda count: count, batch_pairs)


def _permuted(items: Sequence[Item], key: str) -> list[Item]:
    order = list(items)
    random.Random(key).shuffle(order)  # noqa: S311  an order, not a secret
    return order


def _rows(artifact: Artifact, path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_parquet(artifact.filesystem, path, TRAINING_SCHEMA).to_pylist()
    return rows
