"""Build pairs: the feedback of a deployment in the ledger -> a pair snapshot.

    python -m ray_jobs.build_pairs RECIPE.yaml [--set a.b=c]

Needs no cluster. The same log and the same recipe give the same snapshot, byte for byte.
"""

import argparse
import sys
from collections import Counter
from datetime import UTC, datetime

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from app.config import Recipe
from app.errors import DataError
from app.ledger import FeedbackRow, Ledger, ResponseRow, SnapshotRow
from app.preferences.pairing import Answer, Event, pair_events
from app.preferences.quality import resolve
from app.preferences.snapshots import write_pair_snapshot
from app.schemas import Message, Response, canonical_json
from app.storage import Home
from ray_jobs.session import Session, run_job


def build_pairs(home: Home, ledger: Ledger, recipe: Recipe) -> SnapshotRow:
    """Write the pair snapshot of the recipe's deployment and return its ledger row.

    Raises:
        DataError: no event gives a row; says why.
    """
    section, deployment = recipe.pairs, recipe.serving.deployment
    answers, events = read_log(ledger, deployment, since=section.since)
    pairing = pair_events(answers, events, section)
    pairs, later = resolve(pairing.candidates, max_pairs_per_prompt=section.max_pairs_per_prompt)
    rejections = (*pairing.rejections, *later)
    if not pairs:
        reasons = Counter(r.reason for r in rejections)
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "there is none"
        msg = f"the feedback on deployment `{deployment}` gives no pair: {why}\n\nHint: give opposite thumbs on answers to the same prompt, compare two answers, or edit one."
        raise DataError(msg)
    report = pairing.report
    return write_pair_snapshot(
        home,
        ledger,
        pairs,
        section=section,
        quarantine=rejections,
        counts={
            "responses": report.responses,
            "events": report.events,
            "simulated_events": report.simulated_events,
            "candidates": {"pairs": report.pairs, "unpaired": report.unpaired},
            "edit_classes": report.edit_classes,
            "events_dropped": report.dropped,
            "rows_dropped": dict(sorted(Counter(r.reason for r in later).items())),
        },
        origin={"kind": "ledger", "deployment": deployment, "models": _models(answers)},
    )


def read_log(ledger: Ledger, deployment: str, *, since: datetime | None) -> tuple[list[Answer], list[Event]]:
    """Read the judged responses of a deployment and the events on them, in one consistent state.

    Args:
        ledger: where they are.
        deployment: only its responses, and events on them.
        since: only events from this time on (UTC where it has no zone).
    """
    judged = sa.select(FeedbackRow).join(ResponseRow, ResponseRow.response_id == FeedbackRow.response_id)
    judged = judged.where(ResponseRow.deployment == deployment)
    if since is not None:
        judged = judged.where(FeedbackRow.created_at >= (since if since.tzinfo else since.replace(tzinfo=UTC)))
    with ledger.read() as session:
        events = [_event(row) for row in session.scalars(judged)]
        named = judged.subquery()
        judged_ids = sa.union(sa.select(named.c.response_id), sa.select(named.c.other_response_id))
        responses = sa.select(ResponseRow).where(
            ResponseRow.deployment == deployment, ResponseRow.response_id.in_(judged_ids)
        )
        answers = [_answer(row) for row in session.scalars(responses)]
    return answers, events


def print_funnel(console: Console, row: SnapshotRow) -> None:
    """Print how events became rows, and what was dropped on the way."""
    counts = row.manifest["counts"]
    table = Table("step", "count", "", title="From feedback to pairs", title_justify="left", box=None)

    def add(step: str, parts: dict[str, int]) -> None:
        table.add_row(step, str(sum(parts.values())), ", ".join(f"{n} {name}" for name, n in parts.items()))

    labels = {f"labelled {label}": n for label, n in counts["candidates"]["unpaired"].items()}
    add("events", counts["events"])
    if counts["simulated_events"]:
        table.add_row("  of these SIMULATED", str(counts["simulated_events"]), "")
    add("  without a row", counts["events_dropped"])
    add("candidate pairs", counts["candidates"]["pairs"])
    add("candidate unpaired rows", labels)
    add("  dropped", counts["rows_dropped"])
    add("kept pairs", counts["by_source"])
    add("kept unpaired rows", {f"labelled {label}": n for label, n in counts["by_label"].items()})
    add("by split", counts["by_split"])
    console.print(table, highlight=False)
    console.print(f"pair snapshot [bold]{row.snapshot_id}[/bold]", highlight=False)


def _event(row: FeedbackRow) -> Event:
    return Event(
        event_id=row.event_id,
        response_id=row.response_id,
        kind=row.kind,
        value=row.value,
        revision=row.revision,
        created_at=row.created_at,
        other_response_id=row.other_response_id,
        subject=row.subject,
        origin=row.origin,
    )


def _answer(row: ResponseRow) -> Answer:
    try:
        messages = tuple(map(Message.from_openai, row.messages))
        spoken = Message.from_openai({"role": "assistant", "content": row.text, "tool_calls": row.tool_calls})
    except DataError as error:
        msg = f"response `{row.response_id}` in the ledger cannot be read: {error}"
        raise DataError(msg) from None
    return Answer(
        response_id=row.response_id,
        prompt=messages,
        tools=canonical_json(row.tools) if row.tools else None,
        response=Response(
            content=row.text,
            finish_reason=row.finish_reason,
            token_ids=None if row.token_ids is None else tuple(row.token_ids),
            template_digest=row.template_digest,
            model_id=row.model_id,
            response_id=row.response_id,
            tool_calls=spoken.tool_calls,
        ),
    )


def _models(answers: list[Answer]) -> dict[str, int]:
    return dict(sorted(Counter(a.response.model_id or "unknown" for a in answers).items()))


def _body(session: Session, options: argparse.Namespace) -> int:
    del options
    print_funnel(Console(), build_pairs(session.home, session.ledger, session.recipe))
    return 0


def main() -> int:
    """Run the job."""
    return run_job("build_pairs", _body)


if __name__ == "__main__":
    sys.exit(main())
