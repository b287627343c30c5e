"""Reads what the pages show: counts and slices of the ledger and of pair snapshots, never whole tables.

Every read is one short transaction on SQL aggregates and limits, or a projected Parquet scan, so that a page costs
the same with fifty rows and with a million. Nothing here writes, and nothing knows of Streamlit or HTTP.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.config import TAKES_LONE_ANSWERS
from app.errors import DataError
from app.ledger import (
    AuditRow,
    ChampionRow,
    EvaluationRow,
    FeedbackRow,
    Ledger,
    ModelRow,
    ResponseRow,
    RunRow,
    RunStepRow,
    SnapshotRow,
    now,
)
from app.schemas import JUDGEMENT_SCHEMA, PAIR_SCHEMA, Pair, check_schema
from app.storage import JUDGEMENTS, REPORT_PAGE, Home

PAIRS = "pairs"
TRAIN = "train"
_GENERATIONS = 50
_Query = TypeVar("_Query", bound="sa.Select[*tuple[Any, ...]]")
_CURVE_POINTS = 1000
_RATE_DAYS = 7


@dataclass(frozen=True)
class Tally:
    """How many there are, how many of them a simulated audience made, and when the newest came."""

    total: int
    simulated: int = 0
    newest: datetime | None = None


@dataclass(frozen=True)
class Signals:
    """Judgements by kind, and how fast they come in."""

    by_kind: dict[str, Tally]
    last_week: int = 0

    @property
    def total(self) -> int:
        """All judgements."""
        return sum(t.total for t in self.by_kind.values())

    @property
    def simulated(self) -> int:
        """Judgements of a simulated audience."""
        return sum(t.simulated for t in self.by_kind.values())

    @property
    def newest(self) -> datetime | None:
        """When the newest came."""
        return max((t.newest for t in self.by_kind.values() if t.newest), default=None)

    @property
    def per_day(self) -> float:
        """Mean of the last seven days."""
        return self.last_week / _RATE_DAYS


@dataclass(frozen=True)
class Loop:
    """The state of one deployment's loop, from the newest of each step."""

    deployment: str
    served: Tally
    signals: Signals
    new_signals: int
    """Judgements since the newest pair snapshot was built."""
    pairs: SnapshotRow | None
    run: RunRow | None
    """The newest training run."""
    steps: int
    """Optimizer steps that this run has reported."""
    candidate: ModelRow | None
    """The model that this run made."""
    evaluation: EvaluationRow | None
    """The newest evaluation of the candidate."""
    champion: ChampionRow | None
    ships: int
    """How often the champion moved after the first model was put in place."""


@dataclass(frozen=True)
class PairCounts:
    """What a pair snapshot holds."""

    total: int
    by_source: dict[str, int]
    by_split: dict[str, int]
    by_kind: dict[str, int]
    events: int
    """Judgements behind the rows; one may stand behind several."""


def served(ledger: Ledger, deployment: str) -> Tally:
    """Count the answers of a deployment."""
    with ledger.read() as session:
        total, simulated = session.execute(
            sa.select(sa.func.count(), sa.func.sum(sa.case((ResponseRow.origin == "simulated", 1), else_=0))).where(
                ResponseRow.deployment == deployment
            )
        ).one()
        newest = session.scalar(
            sa.select(ResponseRow.created_at)
            .where(ResponseRow.deployment == deployment)
            .order_by(ResponseRow.created_at.desc())
            .limit(1)
        )
    return Tally(total, simulated or 0, newest)


def signals(ledger: Ledger, deployment: str) -> Signals:
    """Count the judgements of a deployment by kind."""
    query = sa.select(
        FeedbackRow.kind,
        sa.func.count(),
        sa.func.sum(sa.case((FeedbackRow.origin == "simulated", 1), else_=0)),
        sa.func.max(FeedbackRow.created_at),
        sa.func.sum(sa.case((FeedbackRow.created_at >= now() - timedelta(days=_RATE_DAYS), 1), else_=0)),
    )
    with ledger.read() as session:
        rows = session.execute(
            _of_deployment(session, query, deployment).group_by(FeedbackRow.kind).order_by(FeedbackRow.kind)
        ).all()
    return Signals(
        {kind: Tally(n, simulated, newest) for kind, n, simulated, newest, _ in rows}, sum(r[4] for r in rows)
    )


def loop(ledger: Ledger, deployment: str) -> Loop:
    """Read the newest of each step of the loop."""
    pairs = newest_built(ledger, deployment)
    newest_run = next(iter(training_runs(ledger, deployment, limit=1)), None)
    output = newest_run.output_model_id if newest_run else None
    candidate = model(ledger, output) if output else None
    signals_now = signals(ledger, deployment)
    return Loop(
        deployment=deployment,
        served=served(ledger, deployment),
        signals=signals_now,
        new_signals=signals_since(ledger, deployment, pairs.created_at) if pairs else signals_now.total,
        pairs=pairs,
        run=newest_run,
        steps=last_step(ledger, newest_run.run_id) if newest_run else 0,
        candidate=candidate,
        evaluation=evaluation(ledger, deployment, candidate.model_id) if candidate else None,
        champion=ledger.champion(deployment),
        ships=_ships(ledger, deployment),
    )


def signals_since(ledger: Ledger, deployment: str, moment: datetime) -> int:
    """Count the judgements after a moment."""
    query = sa.select(sa.func.count(FeedbackRow.event_id)).where(FeedbackRow.created_at > moment)
    with ledger.read() as session:
        return session.scalar(_of_deployment(session, query, deployment)) or 0


def pair_snapshots(ledger: Ledger, *, limit: int) -> list[SnapshotRow]:
    """Return the newest pair snapshots, imported ones among them."""
    with ledger.read() as session:
        return list(
            session.scalars(
                sa.select(SnapshotRow)
                .where(SnapshotRow.kind == PAIRS)
                .order_by(SnapshotRow.created_at.desc())
                .limit(limit)
            )
        )


def newest_built(ledger: Ledger, deployment: str) -> SnapshotRow | None:
    """Return the newest pair snapshot that was built from this deployment's judgements."""
    origin = SnapshotRow.manifest["origin"]
    with ledger.read() as session:
        return session.scalar(
            sa.select(SnapshotRow)
            .where(
                SnapshotRow.kind == PAIRS,
                origin["kind"].as_string() == "ledger",
                origin["deployment"].as_string() == deployment,
            )
            .order_by(SnapshotRow.created_at.desc())
            .limit(1)
        )


def snapshot(ledger: Ledger, snapshot_id: str) -> SnapshotRow | None:
    """Return a snapshot by id."""
    with ledger.read() as session:
        return session.get(SnapshotRow, snapshot_id)


def runs(ledger: Ledger, *, limit: int) -> list[RunRow]:
    """Return the newest runs of all jobs."""
    with ledger.read() as session:
        return list(session.scalars(sa.select(RunRow).order_by(RunRow.created_at.desc()).limit(limit)))


def training_runs(ledger: Ledger, deployment: str, *, limit: int) -> list[RunRow]:
    """Return the newest runs that train for a deployment."""
    with ledger.read() as session:
        return list(
            session.scalars(
                sa.select(RunRow)
                .where(RunRow.kind == TRAIN, RunRow.recipe["serving"]["deployment"].as_string() == deployment)
                .order_by(RunRow.created_at.desc())
                .limit(limit)
            )
        )


def run(ledger: Ledger, run_id: str) -> RunRow | None:
    """Return a run by id."""
    with ledger.read() as session:
        return session.get(RunRow, run_id)


def last_step(ledger: Ledger, run_id: str) -> int:
    """Return the last optimizer step that a run reported, 0 before the first."""
    with ledger.read() as session:
        return session.scalar(sa.select(sa.func.max(RunStepRow.step)).where(RunStepRow.run_id == run_id)) or 0


def curves(ledger: Ledger, run_id: str) -> list[dict[str, Any]]:
    """Return the metrics of a run by step, thinned evenly to about a thousand steps.

    The newest step is always among them, and about a thousand of those at which something was measured that is measured now and then.
    """
    last = last_step(ledger, run_id)
    stride = max(1, -(-last // _CURVE_POINTS))
    measured = [RunStepRow.metrics[name].as_float().is_not(None) for name in ("held_out_loss", "canary_finished")]
    with ledger.read() as session:
        rows = session.execute(
            sa.select(RunStepRow.step, RunStepRow.metrics)
            .where(RunStepRow.run_id == run_id, sa.or_(RunStepRow.step % stride == last % stride, *measured))
            .order_by(RunStepRow.step)
        ).all()
    even = [step % stride == last % stride for step, _ in rows]
    rare = itertools.count()
    thinner = -(-even.count(False) // _CURVE_POINTS) or 1
    kept = [row for row, is_even in zip(rows, even, strict=True) if is_even or next(rare) % thinner == 0]
    return [{**metrics, "step": step} for step, metrics in kept]


def models(ledger: Ledger, *, limit: int) -> list[ModelRow]:
    """Return the newest models."""
    with ledger.read() as session:
        return list(session.scalars(sa.select(ModelRow).order_by(ModelRow.created_at.desc()).limit(limit)))


def model(ledger: Ledger, model_id: str) -> ModelRow | None:
    """Return a model by id."""
    with ledger.read() as session:
        return session.get(ModelRow, model_id)


def ancestors(ledger: Ledger, model_id: str) -> list[ModelRow]:
    """Return a model and the models that it came from, newest first, at most fifty."""
    chain: list[ModelRow] = []
    with ledger.read() as session:
        row = session.get(ModelRow, model_id)
        while row is not None and len(chain) < _GENERATIONS and row not in chain:
            chain.append(row)
            row = session.get(ModelRow, row.parent_id) if row.parent_id else None
    return chain


def report_page(home: Home, evaluation_id: str) -> bytes:
    """Return the HTML report of an evaluation; raises DataError where there is none, or its files were changed."""
    artifact = home.artifact("evaluations", evaluation_id)
    artifact.verify()
    try:
        page: bytes = artifact.filesystem.cat_file(f"{artifact.path}/{REPORT_PAGE}")
    except FileNotFoundError:
        msg = f"evaluation `{evaluation_id}` was made before there were pages\n\nHint: evaluate again."
        raise DataError(msg) from None
    return page


def metrics(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return everything that an evaluation measured, each once."""
    found = {metric["name"]: metric for metric in report.get("metrics", ())}
    for suite in report.get("suites", {}).values():
        for metric in suite["metrics"]:
            found.setdefault(metric["name"], metric)
    return list(found.values())


def judgements(home: Home, evaluation_id: str, *, limit: int) -> list[dict[str, Any]]:
    """Return the first comparisons of an evaluation; raises DataError where its files are missing or were changed."""
    artifact = home.artifact("evaluations", evaluation_id)
    artifact.verify()
    rows: list[dict[str, Any]] = artifact.read_table(JUDGEMENT_SCHEMA, stem=JUDGEMENTS).slice(0, limit).to_pylist()
    return rows


def evaluation(ledger: Ledger, deployment: str, model_id: str) -> EvaluationRow | None:
    """Return the newest evaluation of a model for a deployment."""
    with ledger.read() as session:
        return session.scalar(
            sa.select(EvaluationRow)
            .where(EvaluationRow.deployment == deployment, EvaluationRow.model_id == model_id)
            .order_by(EvaluationRow.created_at.desc())
            .limit(1)
        )


def verdicts(ledger: Ledger, deployment: str, model_ids: Sequence[str]) -> dict[str, str]:
    """Return the newest verdict for a deployment of each of some models; models that have none are left out."""
    with ledger.read() as session:
        rows = session.execute(
            sa.select(EvaluationRow.model_id, EvaluationRow.verdict)
            .where(EvaluationRow.deployment == deployment, EvaluationRow.model_id.in_(model_ids))
            .order_by(EvaluationRow.created_at)
        ).all()
    return {row.model_id: row.verdict for row in rows}


def champion_moves(ledger: Ledger, deployment: str, *, limit: int) -> list[AuditRow]:
    """Return the newest moves of the champion pointer."""
    with ledger.read() as session:
        return list(
            session.scalars(
                sa.select(AuditRow)
                .where(AuditRow.action == "champion", AuditRow.target == deployment)
                .order_by(AuditRow.sequence.desc())
                .limit(limit)
            )
        )


def pair_snapshot_of(ledger: Ledger, snapshot_id: str | None) -> SnapshotRow | None:
    """Return the pair snapshot behind a snapshot: itself, or the parent of a training snapshot."""
    row = snapshot(ledger, snapshot_id) if snapshot_id else None
    while row is not None and row.kind != PAIRS:
        row = snapshot(ledger, row.parent_id) if row.parent_id else None
    return row


def manifest_rows(row: SnapshotRow) -> int:
    """Return how many rows a snapshot's manifest counts."""
    return int(row.manifest.get("rows", 0))


def manifest_dropped(row: SnapshotRow) -> dict[str, int]:
    """Return what was dropped on the way to a snapshot, by reason, most frequent first."""
    dropped = {str(reason): int(n) for reason, n in (row.manifest.get("dropped") or {}).items() if n}
    return dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0])))


def manifest_simulated(row: SnapshotRow) -> int:
    """Return how many rows of a pair snapshot a simulated audience is behind."""
    return int(row.manifest.get("counts", {}).get("simulated", 0))


def trainable_rows(row: SnapshotRow, objective: str) -> int:
    """Return how many rows count towards the least number that trains.

    Held-out rows do not, and lone answers only where the objective learns from them.
    """
    kind = "by_split" if objective in TAKES_LONE_ANSWERS else "pairs_by_split"
    return int(row.manifest.get("counts", {}).get(kind, {}).get("train", 0))


def manifest_funnel(row: SnapshotRow) -> list[tuple[str, int]]:
    """Return the way from judgements to rows as (step, count); empty for what was not built from the ledger."""
    counts = row.manifest.get("counts", {})
    if "events" not in counts:
        return []
    candidates = counts.get("candidates", {})
    return [
        ("answers judged", _total(counts.get("responses"))),
        ("judgements", _total(counts["events"])),
        ("of these simulated", _total(counts.get("simulated_events"))),
        ("candidate pairs", _total(candidates.get("pairs"))),
        ("candidate single answers", _total(candidates.get("unpaired"))),
        ("rows kept", manifest_rows(row)),
    ]


def pair_counts(home: Home, snapshot_id: str) -> PairCounts:
    """Count the rows of a pair snapshot from its Parquet files.

    Raises:
        DataError: the snapshot is incomplete, damaged or of a newer version.
    """
    table = _pairs(home, snapshot_id).to_table(columns=["source", "split", "kind", "event_ids"])
    return PairCounts(
        total=table.num_rows,
        by_source=_value_counts(table["source"]),
        by_split=_value_counts(table["split"]),
        by_kind=_value_counts(table["kind"]),
        events=pc.sum(pc.list_value_length(table["event_ids"])).as_py() or 0,
    )


def pair_page(
    home: Home, snapshot_id: str, *, source: str | None, split: str | None, offset: int, limit: int
) -> list[Pair]:
    """Return some rows of a pair snapshot, in stored order, filtered by source and split where given."""
    wanted = [ds.field(name) == value for name, value in (("source", source), ("split", split)) if value]
    condition = None
    for part in wanted:
        condition = part if condition is None else condition & part
    table = _pairs(home, snapshot_id).scanner(filter=condition).head(offset + limit)
    return [Pair.from_row(row) for row in table.slice(offset).to_pylist()]


def find_pair(home: Home, snapshot_id: str, pair_id: str) -> Pair | None:
    """Return one row of a pair snapshot by its id."""
    table = _pairs(home, snapshot_id).scanner(filter=ds.field("pair_id") == pair_id).head(1)
    return Pair.from_row(table.to_pylist()[0]) if table.num_rows else None


def _of_deployment(session: Session, query: _Query, deployment: str) -> _Query:
    """Restrict a query on feedback to a deployment; joins only where the ledger holds another one."""
    first = session.scalar(sa.select(sa.func.min(ResponseRow.deployment)))
    last = session.scalar(sa.select(sa.func.max(ResponseRow.deployment)))
    if first == last == deployment:
        return query
    return query.join(ResponseRow, ResponseRow.response_id == FeedbackRow.response_id).where(
        ResponseRow.deployment == deployment
    )


def _total(count: Any) -> int:
    return sum(map(int, count.values())) if isinstance(count, dict) else int(count or 0)


def _ships(ledger: Ledger, deployment: str) -> int:
    champion = ledger.champion(deployment)
    return max(0, champion.revision - 1) if champion else 0


def _pairs(home: Home, snapshot_id: str) -> ds.Dataset:
    artifact = home.artifact("pairs", snapshot_id)
    artifact.manifest()
    parts = artifact.part_uris()
    try:
        found = ds.dataset(parts, filesystem=artifact.filesystem, format="parquet")
    except (pa.ArrowException, OSError) as error:
        msg = f"pair snapshot `{snapshot_id}` cannot be read: {str(error).splitlines()[0]}"
        raise DataError(msg) from None
    check_schema(found.schema, PAIR_SCHEMA, place=artifact.uri)
    return found


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = [(c["values"], c["counts"]) for c in pc.value_counts(column).to_pylist()]
    return dict(sorted(counted, key=lambda item: (-item[1], item[0])))
