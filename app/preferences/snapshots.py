"""Pair snapshots: immutable, content-addressed Parquet with a quarantine, registered in the ledger.

    pairs/ID/part-*.parquet         the rows, sorted by pair id
    pairs/ID/quarantine-*.parquet   every row or event that was dropped, with place and reason
    pairs/ID/manifest.json          counts, the settings that made it, where it came from

Equal rows, drops and settings give an equal id and equal bytes. Names are kept in the ledger: a name means the
snapshot that got it last. This module does not know how rows are made.
"""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa

from app.config import PairSection
from app.errors import DataError, RecipeError
from app.ledger import Ledger, SnapshotRow, now
from app.preferences.candidates import Rejection
from app.preferences.quality import HELD_OUT, assign_splits
from app.schemas import PAIR_SCHEMA, QUARANTINE_SCHEMA, SCHEMA_VERSION, Pair, canonical_json
from app.storage import Home

KIND: Final = "pairs"
QUARANTINE: Final = "quarantine"
_ROWS_PER_FILE: Final = 8192
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def write_pair_snapshot(
    home: Home,
    ledger: Ledger,
    pairs: Sequence[Pair],
    *,
    section: PairSection,
    quarantine: Sequence[Rejection],
    counts: Mapping[str, Any],
    origin: Mapping[str, Any],
    name: str | None = None,
) -> SnapshotRow:
    """Split the pairs, write them as a snapshot and register it; an existing one is registered as the newest again.

    Args:
        home: where the snapshot is written.
        ledger: where it is registered.
        pairs: the rows; cluster and split are set here.
        section: settings of the split, kept in the manifest.
        quarantine: what was dropped; counted by reason.
        counts: further counts for the manifest.
        origin: where the rows come from, with `kind`: `ledger` or `import`.
        name: what people call the snapshot.

    Raises:
        DataError: there are no rows.
        RecipeError: the name is malformed.
    """
    if name is not None:
        check_name(name)
    reasons = _counted(r.reason for r in quarantine)
    if not pairs:
        msg = f"no row can train: {', '.join(f'{n} {reason}' for reason, n in reasons.items()) or 'nothing was read'}"
        raise DataError(msg)
    share = section.held_out_fraction
    if share is None and origin["kind"] == "ledger":
        share = HELD_OUT
    split = assign_splits(pairs, threshold=section.near_duplicate_threshold, held_out_fraction=share)
    rows = sorted((p.to_row() for p in split), key=lambda row: str(row["pair_id"]))
    dropped = sorted((r.to_row() for r in quarantine), key=lambda row: (row["reason"], row["raw"], row["place"]))
    settings = section.model_dump(mode="json", exclude={"min_pairs"})
    manifest = {
        "kind": KIND,
        "rows": len(rows),
        "dropped": reasons,
        "counts": {
            **counts,
            "by_kind": _counted(row["kind"] for row in rows),
            "by_source": _counted(row["source"] for row in rows if row["label"] is None),
            "by_label": _counted(str(row["label"]).lower() for row in rows if row["label"] is not None),
            "by_split": _counted(row["split"] for row in rows),
            "pairs_by_split": _counted(row["split"] for row in rows if row["label"] is None),
            "simulated": sum(row["simulated"] for row in rows),
            "clusters": len({row["cluster"] for row in rows}),
            "dropped": reasons,
        },
        "settings": settings,
        "origin": dict(origin),
        "created_at": max(row["created_at"] for row in rows).isoformat(),
    }
    snapshot_id = _identity(rows, dropped, settings)
    artifact = home.artifact(KIND, snapshot_id)
    if not artifact.is_whole():
        artifact.write_rows(rows, PAIR_SCHEMA, rows_per_file=_ROWS_PER_FILE)
        artifact.write_rows(dropped, QUARANTINE_SCHEMA, rows_per_file=_ROWS_PER_FILE, stem=QUARANTINE)
        artifact.write_manifest({"snapshot_id": snapshot_id, **manifest})
    return _register(ledger, snapshot_id, artifact.uri, artifact.manifest(), name)


def resolve_snapshot(
    home: Home, ledger: Ledger, reference: str | None, *, kind: str = KIND, deployment: str | None = None
) -> SnapshotRow:
    """Return the snapshot that a name, an id or a unique beginning of an id means.

    Without a reference it is the newest one; for pairs, the newest that was built from the ledger, from the feedback on
    `deployment` where one is given.

    Raises:
        DataError: nothing or more than one fits, or the snapshot is not complete in this home.
    """
    with ledger.read() as session:
        newest_first = sa.select(SnapshotRow).where(SnapshotRow.kind == kind).order_by(SnapshotRow.created_at.desc())
        known = list(session.scalars(newest_first))
    row = _newest(known, kind, deployment) if reference is None else _referred(known, reference, kind)
    if not home.artifact(kind, row.snapshot_id).exists():
        msg = f"snapshot `{row.snapshot_id}` is in the ledger, but not complete under `{home.uri}/{kind}`"
        raise DataError(msg)
    return row


def read_pairs(home: Home, snapshot_id: str) -> list[Pair]:
    """Read the rows of a snapshot, in stored order, after comparing every file with its hash.

    Raises:
        DataError: the snapshot is missing, incomplete, damaged or of a newer version.
    """
    artifact = home.artifact(KIND, snapshot_id)
    artifact.verify()
    return [Pair.from_row(row) for row in artifact.read_table(PAIR_SCHEMA).to_pylist()]


def check_name(name: str) -> None:
    """Refuse what cannot name a snapshot; raises RecipeError."""
    if not _NAME.fullmatch(name):
        msg = f"`{name}` cannot name a snapshot\n\nHint: use letters, digits, `.`, `_` and `-`, at most 64."
        raise RecipeError(msg)


def _identity(rows: Iterable[dict[str, Any]], dropped: Iterable[dict[str, Any]], settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(canonical_json([SCHEMA_VERSION, settings]).encode())
    for row in rows:
        plain = {**row, "created_at": row["created_at"].isoformat()}
        digest.update(canonical_json(plain).encode() + b"\n")
    for row in dropped:
        # Without the place: the same rows in another order are the same snapshot.
        digest.update(canonical_json([row["reason"], row["raw"]]).encode() + b"\n")
    return digest.hexdigest()[:16]


def _register(ledger: Ledger, snapshot_id: str, uri: str, manifest: dict[str, Any], name: str | None) -> SnapshotRow:
    with ledger.write() as session:
        row = session.get(SnapshotRow, snapshot_id)
        if row is None:
            row = SnapshotRow(snapshot_id=snapshot_id, kind=KIND, uri=uri, manifest=manifest, parent_id=None)
            session.add(row)
        names = [n for n in row.manifest.get("names", []) if n != name]
        row.manifest = {**manifest, "names": [*names, name] if name else names}
        row.created_at = now()
        if name is not None:
            for other in session.scalars(
                sa.select(SnapshotRow).where(SnapshotRow.kind == KIND, SnapshotRow.snapshot_id != snapshot_id)
            ):
                if name in other.manifest.get("names", []):
                    kept = [n for n in other.manifest["names"] if n != name]
                    other.manifest = {**other.manifest, "names": kept}
    return row


def _newest(known: Sequence[SnapshotRow], kind: str, deployment: str | None) -> SnapshotRow:
    origins = {row.snapshot_id: row.manifest.get("origin", {}) for row in known}
    wanted = [row for row in known if kind != KIND or origins[row.snapshot_id].get("kind") == "ledger"]
    if deployment is not None:
        wanted = [row for row in wanted if origins[row.snapshot_id].get("deployment") == deployment]
    if wanted:
        return wanted[0]
    if known:
        whose = "" if deployment is None else f" of deployment `{deployment}`"
        msg = f"no {kind} snapshot was built from the ledger{whose}; others: {', '.join(map(_shown, known))}\n\nHint: choose one with `snapshot: NAME` in the recipe or `--set snapshot=NAME`, or run `prefloop build-pairs`."
    else:
        msg = f"there is no {kind} snapshot yet\n\nHint: run `prefloop build-pairs RECIPE` or `prefloop import FILE... --to NAME`."
    raise DataError(msg)


def _referred(known: Sequence[SnapshotRow], reference: str, kind: str) -> SnapshotRow:
    for fits in (
        [row for row in known if reference in row.manifest.get("names", [])],
        [row for row in known if reference and row.snapshot_id.startswith(reference)],
    ):
        if len(fits) > 1:
            msg = f"`{reference}` begins more than one {kind} snapshot: {', '.join(row.snapshot_id for row in fits)}"
            raise DataError(msg)
        if fits:
            return fits[0]
    words = [word for row in known for word in (*row.manifest.get("names", []), row.snapshot_id)]
    near = difflib.get_close_matches(reference, words, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(map(_shown, known[:10])) or 'none'}."
    msg = f"no {kind} snapshot is called `{reference}`\n\nHint: {hint}"
    raise DataError(msg)


def _shown(row: SnapshotRow) -> str:
    names = row.manifest.get("names", [])
    return f"{row.snapshot_id} ({', '.join(names)})" if names else row.snapshot_id


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
