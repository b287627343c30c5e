"""The ledger: one row for one event, one winner for one champion, nothing lost, nothing forged. On both databases."""

import multiprocessing
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from app.errors import LedgerError
from app.ledger import (
    VERDICTS,
    AuditRow,
    Base,
    EventConflict,
    FeedbackRow,
    Ledger,
    ModelRow,
    ResponseRow,
    UnknownResponse,
    now,
)
from tests.postgres import postgresql

CREATED = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def response(response_id: str, **more) -> ResponseRow:
    fields = {
        "response_id": response_id,
        "deployment": "default",
        "conversation_id": "c",
        "turn": 0,
        "messages": [{"role": "user", "content": "Où ? 🙂", "name": "ana"}],
        "tools": None,
        "prompt_key": "key",
        "text": "Là. \u2028",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        "prompt_digest": None,
        "token_ids": [1, 2, 3],
        "logp": -1.5,
        "finish_reason": "stop",
        "template_digest": "t",
        "model_id": "m",
        "arm": "champion",
        "sampling": {"temperature": 0.7},
        "shown_order": None,
        "subject": None,
        "origin": "served",
        "created_at": CREATED,
    }
    return ResponseRow(**{**fields, **more})


@pytest.fixture(scope="module")
def server() -> Iterator[sa.URL]:
    with postgresql() as url:
        yield sa.make_url(url).set(drivername="postgresql+psycopg")


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request, home, monkeypatch) -> Iterator[Ledger]:
    """An empty one, which others find at `home.ledger_url`."""
    if request.param == "postgresql":
        server = request.getfixturevalue("server")
        name = f"test_{secrets.token_hex(4)}"
        engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        monkeypatch.setenv("PREFLOOP_LEDGER", server.set(database=name).render_as_string(hide_password=False))
    opened = Ledger.open(home.ledger_url)
    yield opened
    opened.close()


@pytest.fixture
def judged(ledger) -> Ledger:
    for response_id in ("a", "b"):
        ledger.record_response(response(response_id))
    return ledger


def thumb(ledger: Ledger, event_id: str, value: str = "up", **more) -> FeedbackRow:
    return ledger.record_feedback(event_id=event_id, response_id="a", kind="thumb", value=value, **more)


def count(ledger: Ledger, table) -> int:
    with ledger.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table))


def test_the_migrations_make_the_tables_of_the_models(ledger):
    with ledger.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_again_keeps_everything(home, judged):
    again = Ledger.open(home.ledger_url)
    with again.read() as session:
        row = session.get_one(ResponseRow, "a")
    again.close()
    assert (row.text, row.messages[0]["content"], row.created_at) == ("Là. \u2028", "Où ? 🙂", CREATED)
    assert (row.token_ids, row.tool_calls[0]["function"]["name"], row.sampling) == (
        [1, 2, 3],
        "f",
        {"temperature": 0.7},
    )


def test_a_newer_ledger_is_refused(home, ledger):
    with ledger.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(LedgerError, match="was written by a newer prefloop"):
        Ledger.open(home.ledger_url)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(LedgerError, match="cannot be opened: file is not a database"):
        Ledger.open(f"sqlite:///{path}")


def test_a_response_is_stored_once(judged):
    with pytest.raises(LedgerError, match="response `a` is in the ledger already"):
        judged.record_response(response("a", text="another"))
    assert count(judged, ResponseRow) == 2


def test_the_same_event_again_is_the_same_row(judged):
    first = thumb(judged, "e1", tags=["short"], subject="ana")
    again = thumb(judged, "e1", tags=["short"], subject="ana")
    assert (first.revision, again.created_at) == (1, first.created_at)
    assert count(judged, FeedbackRow) == 1


@pytest.mark.parametrize("change", [{"value": "down"}, {"tags": ["x"]}, {"comment": "hm"}, {"subject": "bo"}])
def test_an_event_id_with_another_content_is_refused(judged, change):
    thumb(judged, "e1")
    with pytest.raises(EventConflict, match="event `e1` is in the ledger with another content"):
        thumb(judged, "e1", **change)
    assert count(judged, FeedbackRow) == 1


def test_a_subject_revises_and_strangers_do_not(judged):
    assert [thumb(judged, f"e{i}", subject="ana").revision for i in range(3)] == [1, 2, 3]
    assert thumb(judged, "other", subject="bo").revision == 1
    assert [thumb(judged, f"nobody{i}").revision for i in range(2)] == [1, 1]


def test_feedback_on_an_unknown_response_is_refused(judged):
    for response_id, other in (("nowhere", "a"), ("a", "nowhere")):
        with pytest.raises(UnknownResponse, match="no response `nowhere` in the ledger"):
            judged.record_feedback(
                event_id="e", response_id=response_id, other_response_id=other, kind="comparison", value="A>B"
            )
    assert count(judged, FeedbackRow) == 0


@pytest.mark.parametrize(
    ("kind", "value", "other", "message"),
    [
        ("thumb", "sideways", None, "a thumb is one of up, down, not 'sideways'"),
        ("comparison", "A", "b", "a comparison is one of A>>B"),
        ("comparison", "A>B", None, "a comparison names two responses"),
        ("thumb", "up", "b", "a comparison names two responses, any other kind one"),
        ("edit", " \n", None, "an edit needs the better text"),
        ("rating", "good", None, "a rating is a number, not 'good'"),
    ],
)
def test_values_that_do_not_fit_their_kind_are_refused(judged, kind, value, other, message):
    with pytest.raises(LedgerError, match=message):
        judged.record_feedback(event_id="e", response_id="a", other_response_id=other, kind=kind, value=value)
    assert count(judged, FeedbackRow) == 0


def test_every_kind_is_stored(judged):
    thumb(judged, "thumb", "down")
    judged.record_feedback(event_id="edit", response_id="a", kind="edit", value="besser 🙂")
    judged.record_feedback(event_id="rating", response_id="a", kind="rating", value="4.5")
    for i, verdict in enumerate(VERDICTS):
        judged.record_feedback(
            event_id=f"c{i}",
            response_id="a",
            other_response_id="b",
            kind="comparison",
            value=verdict,
            shown_order=["b", "a"],
        )
    assert count(judged, FeedbackRow) == 3 + len(VERDICTS)


def race(workers: int, body) -> list:
    barrier, results = threading.Barrier(workers), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            results.append(body(number))
        except LedgerError as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == workers
    return results


def test_one_event_sent_by_many_threads_is_one_row(judged):
    rows = race(8, lambda _: thumb(judged, "e", subject="ana"))
    assert {(r.event_id, r.revision) for r in rows} == {("e", 1)}
    assert count(judged, FeedbackRow) == 1


def test_revisions_of_many_threads_are_numbered_without_a_gap(judged):
    rows = race(8, lambda i: thumb(judged, f"e{i}", subject="ana"))
    assert sorted(r.revision for r in rows) == list(range(1, 9))


def _send(url: str, worker: int, barrier) -> None:
    ledger = Ledger.open(url)
    barrier.wait()
    thumb(ledger, "shared", subject="ana")
    for i in range(5):
        thumb(ledger, f"own-{worker}-{i}", subject="ana")
    ledger.close()


def test_events_sent_by_many_processes_are_all_there_once(home, judged):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_send, args=(home.ledger_url, i, barrier)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with judged.read() as session:
        revisions = sorted(session.scalars(sa.select(FeedbackRow.revision)))
    assert revisions == list(range(1, 17))


def add_model(ledger: Ledger, model_id: str) -> None:
    with ledger.write() as session:
        session.add(ModelRow(model_id=model_id, digest="d", uri="u", kind="sft", manifest={}, created_at=now()))


def move(ledger: Ledger, model_id: str, revision: int):
    return ledger.set_champion("default", model_id, expected_revision=revision, actor="test", reason="why")


def test_the_champion_moves_by_compare_and_set_and_remembers_the_one_before(ledger):
    for model_id in ("m1", "m2"):
        add_model(ledger, model_id)
    assert ledger.champion("default") is None
    assert move(ledger, "m1", 0).revision == 1
    moved = move(ledger, "m2", 1)
    assert (moved.model_id, moved.previous_model_id, moved.revision) == ("m2", "m1", 2)
    with pytest.raises(LedgerError, match="is at revision 2, not 1: somebody else shipped"):
        move(ledger, "m1", 1)
    with pytest.raises(LedgerError, match="no model `m9` in the ledger"):
        move(ledger, "m9", 2)
    assert ledger.champion("default").model_id == "m2"
    assert ledger.verify_audit() == 2


@pytest.mark.parametrize("revision", [0, 1])
def test_of_eight_who_ship_at_once_one_wins(ledger, revision):
    for i in range(9):
        add_model(ledger, f"m{i}")
    if revision:
        move(ledger, "m8", 0)
    results = race(8, lambda i: move(ledger, f"m{i}", revision))
    won = [r for r in results if not isinstance(r, LedgerError)]
    assert len(won) == 1
    champion = ledger.champion("default")
    assert (champion.model_id, champion.revision) == (won[0].model_id, revision + 1)
    assert ledger.verify_audit() == revision + 1


def test_the_audit_log_is_a_chain_also_when_many_write(ledger):
    race(8, lambda i: ledger.audit(f"actor {i}", "note", "target", {"n": i, "text": "é"}))
    assert ledger.verify_audit() == 8


@pytest.mark.parametrize(
    "tamper",
    [
        sa.update(AuditRow).where(AuditRow.sequence == 2).values(actor="someone else"),
        sa.update(AuditRow).where(AuditRow.sequence == 2).values(detail={"n": 9}),
        sa.update(AuditRow).where(AuditRow.sequence == 2).values(at=CREATED),
        sa.delete(AuditRow).where(AuditRow.sequence == 2),
    ],
    ids=["actor", "detail", "time", "deleted"],
)
def test_a_changed_or_missing_audit_entry_is_found(ledger, tamper):
    for i in range(4):
        ledger.audit("ana", "note", "target", {"n": i})
    with ledger.write() as session:
        session.execute(tamper)
    with pytest.raises(LedgerError, match="the audit log is broken at entry [23]"):
        ledger.verify_audit()


def test_a_transaction_that_fails_leaves_nothing(ledger):
    with pytest.raises(ZeroDivisionError), ledger.write() as session:
        session.add(response("a"))
        session.flush()
        raise ZeroDivisionError
    assert count(ledger, ResponseRow) == 0


@pytest.mark.parametrize(
    "url",
    ["garbage", "mysql://ana:secret@host/x", "postgresql://host/x?user=ana&password=secret", "sqlite:///ledger.db"],
)
def test_a_url_that_no_ledger_can_have_is_refused_without_telling_a_password(url):
    with pytest.raises(LedgerError, match="PREFLOOP_LEDGER") as told:
        Ledger.open(url)
    assert "secret" not in str(told.value)


def test_a_name_is_held_by_one_at_a_time_and_free_again_afterwards(ledger, home):
    other = Ledger.open(home.ledger_url)
    with (
        ledger.alone("loop-mine", patience_s=0) as first,
        other.alone("loop-mine", patience_s=0) as second,
        other.alone("loop-yours", patience_s=0) as third,
    ):
        assert (first, second, third) == (True, False, True)
    with other.alone("loop-mine", patience_s=0) as again:
        assert again
    other.close()


def _hold(url: str, held) -> None:
    with Ledger.open(url).alone("loop-mine", patience_s=0) as alone:
        held.put(alone)
        time.sleep(600)


def test_a_name_whose_holder_was_killed_is_free(ledger, home):
    context = multiprocessing.get_context("spawn")
    held = context.Queue()
    holder = context.Process(target=_hold, args=(home.ledger_url, held), daemon=True)
    holder.start()
    try:
        assert held.get(timeout=120)
        with ledger.alone("loop-mine", patience_s=0) as mine:
            assert not mine
    finally:
        holder.kill()
        holder.join(60)
    end = time.monotonic() + 30
    while True:
        with ledger.alone("loop-mine", patience_s=0) as mine:
            if mine:
                break
        assert time.monotonic() < end, "the dead holder still has it"
        time.sleep(0.1)
