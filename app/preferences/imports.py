"""Import: files of preference data -> a pair snapshot with its quarantine.

Every row that was read is either in the snapshot or in the quarantine with its place and reason. Of equal rows the
first counts; rows that contradict one another (the same answers, swapped) are all left out.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.config import PairSection
from app.ledger import Ledger, SnapshotRow
from app.preferences.candidates import Candidate, Rejection, answer_key
from app.preferences.formats import read_rows
from app.preferences.snapshots import write_pair_snapshot
from app.schemas import Pair, canonical_json, prompt_key
from app.storage import Home

_SHOWN = 5


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
    home: Home, ledger: Ledger, paths: Sequence[Path], *, name: str, section: PairSection
) -> tuple[SnapshotRow, ImportReport]:
    """Read files and write what can train as the pair snapshot `name`.

    Raises:
        DataError: a file cannot be read (all such files are listed), no row is left, or the name is taken.
    """
    reading = read_rows(paths)
    kept, left_out = _settle(reading.candidates)
    rejections = (*reading.rejections, *left_out)
    report = ImportReport(reading.rows, len(kept), rejections)
    assert len(kept) + len(rejections) == reading.rows, "rows were lost"  # noqa: S101
    row = write_pair_snapshot(
        home,
        ledger,
        [candidate.pair for candidate in kept],
        section=section,
        counts={"read": reading.rows, "files": [asdict(file) for file in reading.files]},
        dropped=report.by_reason,
        quarantine=[rejection.to_row() for rejection in rejections],
        name=name,
    )
    return row, report


def print_import(console: Console, row: SnapshotRow, report: ImportReport) -> None:
    """Print what was kept, what was left out and why, with examples."""
    counts = row.manifest["counts"]
    splits = ", ".join(f"{n} {split}" for split, n in sorted(counts["by_split"].items()))
    console.print(
        f"pair snapshot [bold]{row.snapshot_id}[/bold] ({row.manifest['name']}): {report.kept} of {report.rows} rows, "
        f"{counts['clusters']} prompt clusters, {splits}",
        highlight=False,
    )
    if not report.rejections:
        return
    table = Table("left out", "rows", "for example", box=None)
    for reason, number in report.by_reason.most_common():
        examples = [r for r in report.rejections if r.reason == reason][:_SHOWN]
        table.add_row(reason, str(number), "; ".join(f"{Path(r.place).name}: {r.detail}" for r in examples[:2]))
    console.print(table)
    console.print("all of them are kept beside the snapshot in quarantine-*.parquet", highlight=False)


def _settle(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Rejection]]:
    left_out: list[Rejection] = []
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        known = first.setdefault(candidate.pair.pair_id, candidate)
        if known is not candidate:
            left_out.append(_rejection(candidate, "duplicate", f"the same row as {known.place}"))
    by_answers: dict[tuple[object, ...], dict[tuple[object, ...], list[Candidate]]] = defaultdict(
        lambda: defaultdict(list)
    )
    kept: list[Candidate] = []
    for candidate in first.values():
        pair = candidate.pair
        if pair.chosen is None or pair.rejected is None:
            kept.append(candidate)
            continue
        order = (answer_key(pair.chosen), answer_key(pair.rejected))
        context = (prompt_key(pair.prompt, pair.tools), *sorted(order))
        by_answers[context][order].append(candidate)
    for directions in by_answers.values():
        members = [candidate for group in directions.values() for candidate in group]
        if len(directions) == 1:
            kept += members
        else:
            left_out += [_rejection(c, "conflict", "the same answers stand the other way round too") for c in members]
    return kept, left_out


def _rejection(candidate: Candidate, reason: str, detail: str) -> Rejection:
    return Rejection(candidate.place, reason, detail, canonical_json(_plain(candidate.pair)))


def _plain(pair: Pair) -> dict[str, object]:
    return {
        "prompt": [message.to_openai() for message in pair.prompt],
        "chosen": None if pair.chosen is None else pair.chosen.content,
        "rejected": None if pair.rejected is None else pair.rejected.content,
        "label": pair.label,
    }
