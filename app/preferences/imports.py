"""Import: files of preference data -> a pair snapshot with its quarantine.

Every row that was read is either in the snapshot or in the quarantine with its place and reason. Of equal rows the
first counts; rows that contradict one another are all left out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.config import PairSection
from app.errors import DataError
from app.ledger import Ledger, SnapshotRow
from app.preferences.candidates import Rejection, storable
from app.preferences.formats import read_rows
from app.preferences.quality import resolve
from app.preferences.snapshots import check_name, write_pair_snapshot
from app.schemas import Source
from app.storage import Home

_SHOWN = 2


@dataclass(frozen=True)
class ImportReport:
    """What was read and what of it was left out."""

    rows: int
    kept: int
    rejections: tuple[Rejection, ...]

    @property
    def by_reason(self) -> Counter[str]:
        """Rows left out, by reason."""
        return Counter(rejection.reason for rejection in self.rejections)


def import_files(
    home: Home, ledger: Ledger, paths: Sequence[Path], *, name: str, section: PairSection, judge: str | None = None
) -> tuple[SnapshotRow, ImportReport]:
    """Read files and write what can train as the pair snapshot `name`.

    Args:
        home: where the snapshot is written.
        ledger: where it is registered.
        paths: the files.
        name: what people call the snapshot.
        section: its settings.
        judge: the model that labelled the pairs, if one did: it may not judge what learned from them.

    Raises:
        DataError: a file cannot be read (all such files are listed), or no row is left (with examples of each reason).
        RecipeError: the name is malformed.
    """
    check_name(name)
    reading = read_rows(paths)
    source = Source.IMPORT if judge is None else Source.JUDGE
    candidates = [
        replace(c, pair=replace(c.pair, source=source.value, subject=judge or c.pair.subject))
        for c in reading.candidates
    ]
    pairs, later = resolve(candidates, max_pairs_per_prompt=section.max_pairs_per_prompt)
    report = ImportReport(reading.rows, len(pairs), (*reading.rejections, *later))
    assert report.kept + len(report.rejections) == reading.rows, "rows were lost"  # noqa: S101
    if not pairs:
        found = "\n".join(
            f"  {n} {reason}: {_examples(report, reason)}" for reason, n in report.by_reason.most_common()
        )
        msg = f"none of the {report.rows} rows can train:\n{found}"
        raise DataError(msg)
    row = write_pair_snapshot(
        home,
        ledger,
        pairs,
        section=section,
        quarantine=report.rejections,
        counts={"read": reading.rows},
        origin={
            "kind": "import",
            "files": [asdict(file) for file in reading.files],
            **({} if judge is None else {"judge": judge}),
        },
        name=name,
    )
    return row, report


def print_import(console: Console, name: str, row: SnapshotRow, report: ImportReport) -> None:
    """Print what was kept, what was left out and why, with examples."""
    counts = row.manifest["counts"]
    splits = ", ".join(f"{n} {split}" for split, n in sorted(counts["by_split"].items()))
    console.print(
        f"pair snapshot [bold]{row.snapshot_id}[/bold] ({name}): {report.kept} of {report.rows} rows, "
        f"{counts['clusters']} prompt clusters, {splits}",
        highlight=False,
    )
    if not report.rejections:
        return
    table = Table("left out", "rows", "for example", box=None)
    for reason, number in report.by_reason.most_common():
        table.add_row(reason, str(number), escape(_examples(report, reason)))
    console.print(table)
    console.print("all of them are kept beside the snapshot in quarantine-*.parquet", highlight=False)


def _examples(report: ImportReport, reason: str) -> str:
    found = [r for r in report.rejections if r.reason == reason][:_SHOWN]
    return storable("; ".join(f"{Path(r.place).name}: {r.detail}" for r in found))
