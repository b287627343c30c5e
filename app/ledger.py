"""The system of record for what is small, concurrent or must be transactional (SQL through SQLAlchemy 2).

SQLite file by default, PostgreSQL by URL; `Ledger.open` brings the tables to the current Alembic revision. A write is
durable when the call returns: SQLite runs with a rollback journal and synchronous=EXTRA, because SQLite 3.7.0 to
3.51.2 can corrupt a write-ahead log that two processes write. Large things (weights, Parquet) live in storage; the
ledger keeps their ids. This module knows nothing of HTTP, Ray or models.
"""

import fcntl
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import JSON, TypeDecorator

from app.errors import LedgerError
from app.schemas import canonical_json

THUMBS = ("up", "down")
VERDICTS = ("A>>B", "A>B", "A=B", "both_bad", "B>A", "B>>A")
_READ_ONLY = "prefloop_read_only"
TAKEN_OVER_S = 25.0
"""How long PostgreSQL takes to free what a machine held that lost its power, and a little more (`Ledger.open`)."""
_ASKED_AGAIN_S = 0.5
_IDS_PER_QUERY = 500
FeedbackKind = Literal["thumb", "edit", "comparison", "rating"]


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """Stores aware datetimes in UTC; SQLite forgets the zone, so it is put back on reading."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """Convert to UTC; a naive datetime is a programming error."""
        if value is None:
            return None
        assert value.tzinfo is not None, "naive datetime"  # noqa: S101
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """Put the zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of the tables."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, datetime: UtcDateTime}  # noqa: RUF012


class ResponseRow(Base):
    """An answer that was served here, or registered from elsewhere (`origin`)."""

    __tablename__ = "responses"
    response_id: Mapped[str] = mapped_column(primary_key=True)
    deployment: Mapped[str] = mapped_column(index=True)
    conversation_id: Mapped[str] = mapped_column(index=True)
    turn: Mapped[int]
    messages: Mapped[list[Any]]
    """Messages as sent (OpenAI format), with tools, tool calls and names."""
    tools: Mapped[list[Any] | None]
    prompt_key: Mapped[str] = mapped_column(index=True)
    """Hash of messages and tools: answers to the same prompt share it."""
    text: Mapped[str] = mapped_column(sa.Text)
    tool_calls: Mapped[list[Any] | None]
    prompt_digest: Mapped[str | None]
    """sha256 of the prompt's token ids as the model saw them."""
    token_ids: Mapped[list[Any] | None]
    """Ids as sampled, with the end token if it was sampled; None for foreign text."""
    logp: Mapped[float | None]
    """Sum of the log-probabilities of `token_ids` under the serving model at temperature 1."""
    finish_reason: Mapped[str]
    template_digest: Mapped[str | None]
    model_id: Mapped[str] = mapped_column(index=True)
    arm: Mapped[str]
    sampling: Mapped[dict[str, Any]]
    shown_order: Mapped[int | None]
    subject: Mapped[str | None] = mapped_column(index=True)
    origin: Mapped[str]
    """`served`, `simulated` (asked by a simulated audience) or `external`."""
    created_at: Mapped[datetime] = mapped_column(index=True)


class FeedbackRow(Base):
    """One judgement of a response. `event_id` is the idempotency key; the highest `revision` of a subject counts."""

    __tablename__ = "feedback"
    __table_args__ = (sa.UniqueConstraint("response_id", "other_response_id_key", "kind", "subject_key", "revision"),)
    event_id: Mapped[str] = mapped_column(primary_key=True)
    response_id: Mapped[str] = mapped_column(sa.ForeignKey("responses.response_id"), index=True)
    other_response_id: Mapped[str | None] = mapped_column(sa.ForeignKey("responses.response_id"))
    other_response_id_key: Mapped[str]
    kind: Mapped[str] = mapped_column(index=True)
    value: Mapped[str] = mapped_column(sa.Text)
    """thumb: up, down; edit: the better text; comparison: one of VERDICTS with A = response_id; rating: a number."""
    tags: Mapped[list[Any]]
    comment: Mapped[str | None] = mapped_column(sa.Text)
    subject: Mapped[str | None] = mapped_column(index=True)
    subject_key: Mapped[str]
    revision: Mapped[int]
    shown_order: Mapped[list[Any] | None]
    """Response ids from left to right, as they were shown."""
    origin: Mapped[str]
    """`user` or `simulated`."""
    body_digest: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(index=True)


class SnapshotRow(Base):
    """An immutable data set version in storage."""

    __tablename__ = "snapshots"
    snapshot_id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(index=True)
    uri: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    parent_id: Mapped[str | None]
    created_at: Mapped[datetime]


class RunRow(Base):
    """One run of a job. `status`: running, succeeded, failed, held, stopped, abandoned."""

    __tablename__ = "runs"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(index=True)
    recipe: Mapped[dict[str, Any]]
    snapshot_id: Mapped[str | None]
    start_model_id: Mapped[str | None]
    reference_model_id: Mapped[str | None]
    output_model_id: Mapped[str | None]
    metrics: Mapped[dict[str, Any]]
    error: Mapped[str | None] = mapped_column(sa.Text)
    job_id: Mapped[str | None]
    attempt: Mapped[int]
    code_version: Mapped[str]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class RunStepRow(Base):
    """The metrics of one optimizer step of a run."""

    __tablename__ = "run_steps"
    run_id: Mapped[str] = mapped_column(sa.ForeignKey("runs.run_id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class ModelRow(Base):
    """A model artifact in storage and what it came from."""

    __tablename__ = "models"
    model_id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(index=True)
    uri: Mapped[str]
    kind: Mapped[str]
    """`sft`, `merged`, `full` or `adapter`."""
    parent_id: Mapped[str | None] = mapped_column(index=True)
    run_id: Mapped[str | None]
    snapshot_id: Mapped[str | None]
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class EvaluationRow(Base):
    """The measurements of a candidate and the verdict of the gate, bound to a deployment and the digest of its weights."""

    __tablename__ = "evaluations"
    evaluation_id: Mapped[str] = mapped_column(primary_key=True)
    deployment: Mapped[str] = mapped_column(index=True)
    """Whose champion it was compared with; no other deployment ships by it."""
    model_id: Mapped[str] = mapped_column(index=True)
    model_digest: Mapped[str]
    champion_id: Mapped[str]
    sft_id: Mapped[str]
    verdict: Mapped[str]
    report: Mapped[dict[str, Any]]
    run_id: Mapped[str | None]
    created_at: Mapped[datetime]


class JudgementRow(Base):
    """What a judge said to one task: asked once, read by every later evaluation."""

    __tablename__ = "judgements"
    judgement_id: Mapped[str] = mapped_column(primary_key=True)
    """Hash of the judge, its settings and the task; the nonce is not in it."""
    judge: Mapped[str] = mapped_column(index=True)
    prompt: Mapped[str]
    """Name and version of the prompt."""
    text: Mapped[str] = mapped_column(sa.Text)
    nonce: Mapped[str]
    """What a verdict in the text must carry."""
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    created_at: Mapped[datetime]


class LookRow(Base):
    """One use of a file of prompts by an evaluation: who chooses models by a set learns to please it."""

    __tablename__ = "looks"
    evaluation_id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True, index=True)
    """sha256 of the file, whatever it is called."""
    place: Mapped[str]
    model_id: Mapped[str]
    created_at: Mapped[datetime]


class ChampionRow(Base):
    """What a deployment ships: one row for each deployment name, changed by compare-and-set on `revision`."""

    __tablename__ = "champion"
    deployment: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(sa.ForeignKey("models.model_id"))
    previous_model_id: Mapped[str | None]
    revision: Mapped[int]
    updated_at: Mapped[datetime]


class ApprovalRow(Base):
    """Who allowed or refused to ship which weights, and why."""

    __tablename__ = "approvals"
    approval_id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(index=True)
    model_digest: Mapped[str]
    evaluation_id: Mapped[str | None]
    identity: Mapped[str]
    decision: Mapped[str]
    reason: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime]


class AuditRow(Base):
    """Append-only log of actions; each row's hash covers the row before it."""

    __tablename__ = "audit"
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str] = mapped_column(index=True)
    target: Mapped[str]
    detail: Mapped[dict[str, Any]]
    previous_hash: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)


def ledger_name(url: str) -> str:
    """Return the URL of a ledger without its password; raises LedgerError where it is no URL that a ledger can have."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        # The text may hold a password.
        found = "no URL" if parsed is None else f"a URL of `{parsed.get_backend_name()}`"
        msg = f"the ledger must be `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/DATABASE`, found {found}\n\nHint: look at PREFLOOP_LEDGER."
        raise LedgerError(msg)
    if "password" in parsed.query:
        # Only the password of the first form is left out of messages and of what jobs are told.
        msg = "the ledger's URL has its password in the query\n\nHint: write `postgresql://USER:PASSWORD@HOST/DATABASE` in PREFLOOP_LEDGER."
        raise LedgerError(msg)
    database = parsed.database
    if (
        parsed.get_backend_name() == "sqlite"
        and database
        and database != ":memory:"
        and not Path(database).is_absolute()
    ):
        # Jobs and replicas run in folders of their own and would each make another ledger.
        msg = f"the ledger `{database}` is a relative path\n\nHint: write an absolute one in PREFLOOP_LEDGER, with four slashes: `sqlite:////folder/{Path(database).name}`."
        raise LedgerError(msg)
    return parsed.render_as_string(hide_password=True)


class Ledger:
    """A connection to the ledger. Safe to use from several threads; open one for each process."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, url: str) -> "Ledger":
        """Open the ledger and bring its tables up to date.

        Raises:
            LedgerError: the URL is none of SQLite or PostgreSQL, the database cannot be reached, or it was written by a
                newer prefloop.
        """
        name = ledger_name(url)
        parsed = sa.make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        arguments: dict[str, Any] = {}
        if parsed.get_backend_name() == "postgresql":
            # A machine that lost its power closes nothing: the server must find out by itself, and not after hours.
            found_out = {"idle": 10, "interval": 5, "count": 2}
            options = " ".join(f"-c tcp_keepalives_{name}={value}" for name, value in found_out.items())
            arguments["connect_args"] = {"options": options, "connect_timeout": 10}
            # A database that was away for a moment must not fail the next query as well.
            arguments["pool_pre_ping"] = True
        if parsed.get_backend_name() == "sqlite":
            arguments["connect_args"] = {"timeout": 60}
            if parsed.database:
                try:
                    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    msg = f"the folder of the ledger `{name}` cannot be made: {error}"
                    raise LedgerError(msg) from None
        engine = sa.create_engine(parsed, **arguments)
        if parsed.get_backend_name() == "sqlite":
            sa.event.listen(engine, "connect", _configure_sqlite)
            sa.event.listen(engine, "begin", _begin_sqlite)
        try:
            _migrate(engine)
        except (OperationalError, DatabaseError) as error:
            msg = f"the ledger at `{name}` cannot be opened: {error.orig}"
            raise LedgerError(msg) from None
        return cls(engine)

    def close(self) -> None:
        """Release the connections."""
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Run one transaction; what it wrote is durable when the block ends without an error."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Run queries on one consistent state."""
        options: dict[str, Any] = {_READ_ONLY: True}
        if self.engine.dialect.name == "postgresql":
            # Its default lets every statement see what was committed since the one before.
            options["isolation_level"] = "REPEATABLE READ"
        with Session(self.engine.execution_options(**options), expire_on_commit=False) as session:
            yield session

    @contextmanager
    def alone(self, name: str, *, patience_s: float) -> Iterator[bool]:
        """Yield whether this process alone holds `name`, until the block ends or the process dies.

        PostgreSQL keeps the lock with a connection, SQLite with a file beside the database.

        Args:
            name: what is held.
            patience_s: how long PostgreSQL may take to learn that a holder's machine lost its power (`TAKEN_OVER_S` are
                enough); a holder of SQLite's lock is on this machine, and what it held is free with its end.
        """
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                query = sa.text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
                end = time.monotonic() + patience_s
                try:
                    while not (alone := bool(connection.scalar(query, {"name": f"prefloop:{name}"}))):
                        if time.monotonic() > end:
                            break
                        time.sleep(_ASKED_AGAIN_S)
                    yield alone
                finally:
                    # Back in the pool it would keep the lock.
                    connection.invalidate()
            return
        folder = Path(str(self.engine.url.database)).parent / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        # A run's id may hold what a file's name may not.
        with (folder / hashlib.sha256(name.encode()).hexdigest()).open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def record_response(self, response: ResponseRow) -> None:
        """Store a response; the same id again is refused."""
        try:
            with self.write() as session:
                session.add(response)
        except IntegrityError:
            msg = f"response `{response.response_id}` is in the ledger already"
            raise LedgerError(msg) from None

    def record_feedback(
        self,
        *,
        event_id: str,
        response_id: str,
        kind: FeedbackKind,
        value: str,
        other_response_id: str | None = None,
        tags: Sequence[str] = (),
        comment: str | None = None,
        subject: str | None = None,
        shown_order: Sequence[str] | None = None,
        origin: str = "user",
    ) -> FeedbackRow:
        """Store one event and return it. The same `event_id` with the same content returns the stored row.

        Raises:
            UnknownResponse: a response is not in the ledger.
            EventConflict: the `event_id` was used with another content.
            LedgerError: the value does not fit the kind.
        """
        _check_value(kind, value, other_response_id)
        body = [
            response_id,
            other_response_id,
            kind,
            value,
            list(tags),
            comment,
            subject,
            shown_order and list(shown_order),
        ]
        digest = hashlib.sha256(canonical_json(body).encode("utf-8", "surrogatepass")).hexdigest()
        for _ in range(8):
            try:
                with self.write() as session:
                    known = session.get(FeedbackRow, event_id)
                    if known is not None:
                        if known.body_digest != digest:
                            msg = f"event `{event_id}` is in the ledger with another content"
                            raise EventConflict(msg)
                        return known
                    for wanted in filter(None, (response_id, other_response_id)):
                        if session.get(ResponseRow, wanted) is None:
                            msg = f"no response `{wanted}` in the ledger"
                            raise UnknownResponse(msg)
                    last = session.scalar(
                        sa.select(sa.func.max(FeedbackRow.revision)).where(
                            FeedbackRow.response_id == response_id,
                            FeedbackRow.other_response_id_key == (other_response_id or ""),
                            FeedbackRow.kind == kind,
                            FeedbackRow.subject_key == (subject or event_id),
                        )
                    )
                    row = FeedbackRow(
                        event_id=event_id,
                        response_id=response_id,
                        other_response_id=other_response_id,
                        other_response_id_key=other_response_id or "",
                        kind=kind,
                        value=value,
                        tags=list(tags),
                        comment=comment,
                        subject=subject,
                        # Without a subject nobody can revise an event, so each one stands alone.
                        subject_key=subject or event_id,
                        revision=(last or 0) + 1,
                        shown_order=list(shown_order) if shown_order else None,
                        origin=origin,
                        body_digest=digest,
                        created_at=now(),
                    )
                    session.add(row)
                return row
            except IntegrityError:
                continue  # another writer took the same event id or revision: look again
        msg = f"event `{event_id}` could not be stored: too many writers revise the same response"
        raise LedgerError(msg)

    def judgements(self, judgement_ids: Sequence[str]) -> dict[str, JudgementRow]:
        """Return those judgements that are known, by id."""
        known: dict[str, JudgementRow] = {}
        with self.read() as session:
            for start in range(0, len(judgement_ids), _IDS_PER_QUERY):
                wanted = judgement_ids[start : start + _IDS_PER_QUERY]
                rows = session.scalars(sa.select(JudgementRow).where(JudgementRow.judgement_id.in_(wanted)))
                known.update({row.judgement_id: row for row in rows})
        return known

    def record_judgement(self, judgement: JudgementRow) -> None:
        """Store what a judge said; where another job was quicker, its judgement stays."""
        try:
            with self.write() as session:
                session.add(judgement)
        except IntegrityError:
            with self.read() as session:
                if session.get(JudgementRow, judgement.judgement_id) is None:
                    raise

    def record_looks(self, evaluation_id: str, model_id: str, places: Mapping[str, str]) -> dict[str, int]:
        """Note that an evaluation uses these files, each once, and return how many evaluations have used each so far.

        Args:
            evaluation_id: the same one again is no other look.
            model_id: the candidate.
            places: by sha256 of the file where it is.
        """
        rows = [
            LookRow(evaluation_id=evaluation_id, digest=digest, place=place, model_id=model_id, created_at=now())
            for digest, place in places.items()
        ]
        for row in rows:
            try:
                with self.write() as session:
                    if session.get(LookRow, (row.evaluation_id, row.digest)) is None:
                        session.add(row)
            except IntegrityError:
                continue  # another job with the same evaluation was quicker
        counted = sa.select(LookRow.digest, sa.func.count()).where(LookRow.digest.in_(list(places)))
        with self.read() as session:
            found = session.execute(counted.group_by(LookRow.digest)).all()
        return {digest: int(count) for digest, count in found}

    def champion(self, deployment: str) -> ChampionRow | None:
        """Return what a deployment ships, or None before the first ship."""
        with self.read() as session:
            return session.get(ChampionRow, deployment)

    def set_champion(
        self, deployment: str, model_id: str, *, expected_revision: int, actor: str, reason: str
    ) -> ChampionRow:
        """Move the champion pointer if nobody else moved it (revision 0 = no champion yet), and audit the move.

        Raises:
            LedgerError: the revision differs from the expected one, or the model is unknown.
        """
        with self.write() as session:
            if session.get(ModelRow, model_id) is None:
                msg = f"no model `{model_id}` in the ledger"
                raise LedgerError(msg)
            row = session.get(ChampionRow, deployment, with_for_update=True)
            found = row.revision if row else 0
            if found != expected_revision:
                msg = f"the champion of `{deployment}` is at revision {found}, not {expected_revision}: somebody else shipped"
                raise LedgerError(msg)
            previous = row.model_id if row else None
            if row is None:
                row = ChampionRow(deployment=deployment, model_id=model_id, revision=1, updated_at=now())
                session.add(row)
                try:
                    session.flush()
                except IntegrityError:
                    # A row that is not there yet cannot be locked.
                    msg = f"`{deployment}` has a champion by now: somebody else shipped"
                    raise LedgerError(msg) from None
            else:
                row.previous_model_id, row.model_id = row.model_id, model_id
                row.revision, row.updated_at = row.revision + 1, now()
            _audit(session, actor, "champion", deployment, {"from": previous, "to": model_id, "reason": reason})
            return row

    def restore_champion(self, before: ChampionRow, *, expected_revision: int, actor: str, reason: str) -> ChampionRow:
        """Undo a move of the champion pointer, as a move of its own: model and previous model are those of `before`.

        Raises:
            LedgerError: the revision differs from the expected one: somebody else shipped meanwhile.
        """
        with self.write() as session:
            row = session.get_one(ChampionRow, before.deployment, with_for_update=True)
            if row.revision != expected_revision:
                msg = f"the champion of `{before.deployment}` is at revision {row.revision}, not {expected_revision}: somebody else shipped"
                raise LedgerError(msg)
            detail = {"from": row.model_id, "to": before.model_id, "reason": reason}
            row.model_id, row.previous_model_id = before.model_id, before.previous_model_id
            row.revision, row.updated_at = row.revision + 1, now()
            _audit(session, actor, "champion", before.deployment, detail)
            return row

    def audit(self, actor: str, action: str, target: str, detail: dict[str, Any]) -> None:
        """Append an action to the audit log."""
        with self.write() as session:
            _audit(session, actor, action, target, detail)

    def verify_audit(self) -> int:
        """Check the hash chain of the audit log and return its length; raises LedgerError where it is broken."""
        with self.read() as session:
            previous = ""
            rows = session.scalars(sa.select(AuditRow).order_by(AuditRow.sequence)).all()
        for row in rows:
            if row.previous_hash != previous or row.hash != _audit_hash(row):
                msg = f"the audit log is broken at entry {row.sequence}"
                raise LedgerError(msg)
            previous = row.hash
        return len(rows)


class UnknownResponse(LedgerError):  # noqa: N818
    """Feedback names a response that is not in the ledger."""


class EventConflict(LedgerError):  # noqa: N818
    """An event id is used again with another content."""


def _check_value(kind: str, value: str, other_response_id: str | None) -> None:
    if kind == "thumb" and value not in THUMBS:
        msg = f"a thumb is one of {', '.join(THUMBS)}, not {value!r}"
        raise LedgerError(msg)
    if kind == "comparison" and value not in VERDICTS:
        msg = f"a comparison is one of {', '.join(VERDICTS)}, not {value!r}"
        raise LedgerError(msg)
    if kind == "edit" and not value.strip():
        msg = "an edit needs the better text"
        raise LedgerError(msg)
    if kind == "rating":
        try:
            float(value)
        except ValueError:
            msg = f"a rating is a number, not {value!r}"
            raise LedgerError(msg) from None
    if (kind == "comparison") != (other_response_id is not None):
        msg = f"a comparison names two responses, any other kind one (kind {kind!r}, other {other_response_id!r})"
        raise LedgerError(msg)


def _audit(session: Session, actor: str, action: str, target: str, detail: dict[str, Any]) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.text("LOCK TABLE audit IN EXCLUSIVE MODE"))
    last = session.scalar(sa.select(AuditRow.hash).order_by(AuditRow.sequence.desc()).limit(1))
    row = AuditRow(
        at=now(), actor=actor, action=action, target=target, detail=detail, previous_hash=last or "", hash=""
    )
    row.hash = _audit_hash(row)
    session.add(row)


def _audit_hash(row: AuditRow) -> str:
    content = [row.at.isoformat(), row.actor, row.action, row.target, row.detail, row.previous_hash]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions on its own: see _begin_sqlite
    for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "foreign_keys=ON", "busy_timeout=60000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that reads first cannot become a writer once another one wrote ("database is locked" at
    # once, whatever the timeout), so writers take the lock at their beginning.
    reading = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _migrate(engine: sa.Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        if connection.dialect.name == "postgresql":
            # Of two processes that open an old ledger at once, one migrates it. (SQLite's writers exclude each other.)
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('prefloop migrations'))"))
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            msg = f"the ledger at `{engine.url.render_as_string(hide_password=True)}` was written by a newer prefloop: {error}"
            raise LedgerError(msg) from None
