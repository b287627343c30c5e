"""What is where: the tables of `prefloop status`, read from the ledger."""

from collections.abc import Sequence

import sqlalchemy as sa

from app.ledger import ChampionRow, EvaluationRow, FeedbackRow, Ledger, ResponseRow, RunRow, SnapshotRow
from app.services import Services
from app.storage import Home

_NEWEST = 5
StatusTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def read_status(home: Home, ledger: Ledger) -> list[StatusTable]:
    """Return (title, columns, rows) for each table."""
    services = Services.read(home)
    with ledger.read() as session:
        responses = session.execute(
            sa.select(ResponseRow.origin, sa.func.count()).group_by(ResponseRow.origin).order_by(ResponseRow.origin)
        ).all()
        kinds = session.execute(
            sa.select(FeedbackRow.kind, FeedbackRow.origin, sa.func.count())
            .group_by(FeedbackRow.kind, FeedbackRow.origin)
            .order_by(FeedbackRow.kind, FeedbackRow.origin)
        ).all()
        champions = session.scalars(sa.select(ChampionRow)).all()
        snapshots = session.scalars(sa.select(SnapshotRow).order_by(SnapshotRow.created_at.desc()).limit(_NEWEST)).all()
        runs = session.scalars(sa.select(RunRow).order_by(RunRow.created_at.desc()).limit(_NEWEST)).all()
        verdicts = session.scalars(
            sa.select(EvaluationRow).order_by(EvaluationRow.created_at.desc()).limit(_NEWEST)
        ).all()
    answers = ", ".join(f"{count} {_loud(origin)}" for origin, count in responses) or "none"
    feedback = ", ".join(f"{count} {kind} ({_loud(origin)})" for kind, origin, count in kinds) or "none"
    overview = [
        ("home", home.uri),
        ("gateway", services.gateway_url if services else "not running (prefloop serve RECIPE)"),
        ("responses", answers),
        ("feedback", feedback),
    ]
    return [
        ("prefloop", ("", ""), overview),
        (
            "champions",
            ("deployment", "model", "previous", "revision"),
            [(c.deployment, c.model_id, c.previous_model_id or "-", str(c.revision)) for c in champions],
        ),
        (
            "snapshots",
            ("id", "kind", "made"),
            [(s.snapshot_id, s.kind, f"{s.created_at:%Y-%m-%d %H:%M}") for s in snapshots],
        ),
        (
            "runs",
            ("run", "kind", "status", "model"),
            [(r.run_id, r.kind, r.status, r.output_model_id or "-") for r in runs],
        ),
        (
            "verdicts",
            ("model", "verdict", "made"),
            [(v.model_id, v.verdict, f"{v.created_at:%Y-%m-%d %H:%M}") for v in verdicts],
        ),
    ]


def _loud(origin: str) -> str:
    return origin.upper() if origin == "simulated" else origin
