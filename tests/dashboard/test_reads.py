import time
from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from app.errors import DataError
from app.ledger import FeedbackRow, Ledger, ResponseRow, RunStepRow, SnapshotRow, now
from app.schemas import PAIR_SCHEMA
from app.storage import Home
from dashboard import reads
from tests.dashboard import stage

MANY = 100_000


def test_only_the_deployment_that_was_asked_for_counts(ledger: Ledger) -> None:
    for number, deployment in enumerate(("default", "default", "other")):
        response_id = stage.add_response(ledger, number, deployment=deployment)
        ledger.record_feedback(event_id=f"e{number}", response_id=response_id, kind="thumb", value="up")
    assert reads.served(ledger, "default").total == 2
    assert reads.signals(ledger, "default").total == 2
    assert reads.signals(ledger, "other").by_kind["thumb"].total == 1
    assert reads.signals(ledger, "default").last_week == 2


def test_signals_after_a_moment_are_counted(ledger: Ledger) -> None:
    stage.add_response(ledger, 0)
    ledger.record_feedback(event_id="e", response_id="response-0", kind="edit", value="better")
    assert reads.signals_since(ledger, "default", now() - timedelta(minutes=1)) == 1
    assert reads.signals_since(ledger, "default", now()) == 0


def test_long_curves_are_thinned_and_keep_the_newest_step(ledger: Ledger) -> None:
    stage.add_run(ledger, "run")
    with ledger.write() as session:
        session.execute(
            sa.insert(RunStepRow),
            [{"run_id": "run", "step": s, "metrics": {"loss": 1.0}, "created_at": now()} for s in range(1, 5_432)],
        )
        measured = session.scalars(sa.select(RunStepRow).where(RunStepRow.step.in_((1_000, 2_003)))).all()
        measured[0].metrics = {"loss": 1.0, "held_out_loss": 0.0}
        measured[1].metrics = {"loss": 1.0, "canary_finished": 0.5}
    points = reads.curves(ledger, "run")
    assert 800 < len(points) <= 1_003
    assert points[-1]["step"] == 5_431
    assert {1_000, 2_003} <= {point["step"] for point in points}
    with ledger.write() as session:
        for row in session.scalars(sa.select(RunStepRow)):
            row.metrics = {"loss": 1.0, "held_out_loss": 0.5}
    assert len(reads.curves(ledger, "run")) <= 2_002


def test_a_lineage_that_turns_in_a_circle_ends(ledger: Ledger) -> None:
    stage.add_model(ledger, "a", parent_id="b")
    stage.add_model(ledger, "b", parent_id="a")
    assert [m.model_id for m in reads.ancestors(ledger, "a")] == ["a", "b"]


def test_the_pairs_behind_a_training_snapshot_are_found(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1)])
    with ledger.write() as session:
        session.add(
            SnapshotRow(
                snapshot_id="training-1", kind="training", uri="", manifest={}, parent_id="pairs-1", created_at=now()
            )
        )
    found = reads.pair_snapshot_of(ledger, "training-1")
    assert found is not None
    assert found.snapshot_id == "pairs-1"
    assert reads.pair_snapshot_of(ledger, None) is None


def test_pages_of_pairs_do_not_overlap_and_miss_nothing(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(n, source=("edit", "thumbs")[n % 2]) for n in range(25)])
    seen = [
        p.cluster
        for offset in (0, 5, 10)
        for p in reads.pair_page(home, "pairs-1", source="edit", split=None, offset=offset, limit=5)
    ]
    assert seen == [f"cluster-{n}" for n in range(0, 25, 2)]


def test_a_foreign_parquet_is_refused(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1)])
    pq.write_table(pa.table({"text": ["a"]}), home.artifact("pairs", "pairs-1").part_uris()[0])
    with pytest.raises(DataError, match="not a prefloop pairs file"):
        reads.pair_counts(home, "pairs-1")


def test_every_read_of_the_overview_stays_quick_with_many_rows(ledger: Ledger) -> None:
    stage.add_response(ledger, 0)
    with ledger.write() as session:
        columns = [c.name for c in ResponseRow.__table__.columns]
        copied = ", ".join("'many-' || n" if c == "response_id" else c for c in columns)
        numbers = f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {MANY})"
        session.execute(
            sa.text(f"INSERT INTO responses ({', '.join(columns)}) {numbers} SELECT {copied} FROM responses, numbers")
        )
        made = now()
        session.execute(
            sa.insert(FeedbackRow).from_select(
                [c.name for c in FeedbackRow.__table__.columns],
                sa.select(
                    *(
                        {
                            "event_id": ResponseRow.response_id,
                            "response_id": ResponseRow.response_id,
                            "other_response_id_key": sa.literal(""),
                            "kind": sa.literal("thumb"),
                            "value": sa.literal("up"),
                            "tags": sa.literal([], FeedbackRow.__table__.c.tags.type),
                            "subject_key": ResponseRow.response_id,
                            "revision": sa.literal(1),
                            "origin": sa.literal("simulated"),
                            "body_digest": sa.literal(""),
                            "created_at": sa.literal(made, FeedbackRow.__table__.c.created_at.type),
                        }.get(c.name, sa.null())
                        for c in FeedbackRow.__table__.columns
                    )
                ),
            )
        )
    began = time.perf_counter()
    state = reads.loop(ledger, "default")
    took = time.perf_counter() - began
    assert state.served.total == MANY + 1
    assert state.signals.simulated == MANY + 1
    assert took < 3, f"{took:.2f} s"


def test_the_rows_of_a_large_snapshot_are_sliced_not_loaded(home: Home, ledger: Ledger) -> None:
    artifact = home.artifact("pairs", "large")
    row = stage.pair(1).to_row()
    table = pa.Table.from_pylist([row] * 10_000, schema=PAIR_SCHEMA)
    artifact.filesystem.makedirs(artifact.path)
    for part in range(MANY // 10_000):
        pq.write_table(table, f"{artifact.path}/part-{part:05d}.parquet")
    artifact.write_manifest({"rows": MANY, "dropped": {}})
    began = time.perf_counter()
    assert len(reads.pair_page(home, "large", source="edit", split="train", offset=0, limit=50)) == 50
    assert reads.pair_counts(home, "large").by_source == {"edit": MANY}
    assert time.perf_counter() - began < 5


def test_lone_answers_count_towards_the_least_number_where_the_objective_learns_from_them() -> None:
    counts = {"by_split": {"train": 9, "held_out": 3}, "pairs_by_split": {"train": 4, "held_out": 1}}
    row = SnapshotRow(snapshot_id="s", kind="pairs", uri="", manifest={"counts": counts}, created_at=now())
    assert reads.trainable_rows(row, "dpo") == 4
    assert reads.trainable_rows(row, "package.module:function") == 4
    assert reads.trainable_rows(row, "kto") == 9
