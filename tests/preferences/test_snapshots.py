"""Pair snapshots: whole or not there, the same for the same input, found by name, id and beginning of an id."""

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.config import PairSection, Recipe
from app.errors import DataError, RecipeError
from app.ledger import ResponseRow
from app.preferences.candidates import Rejection
from app.preferences.imports import import_files, print_import
from app.preferences.quality import HELD_OUT, split_of, usual_held_out
from app.preferences.snapshots import read_pairs, resolve_snapshot, write_pair_snapshot
from app.schemas import QUARANTINE_SCHEMA, Message, Pair, Response, ToolCall, prompt_key
from app.storage import Home
from ray_jobs.build_pairs import build_pairs, print_funnel

SECTION = PairSection(held_out_fraction=0.5)
START = datetime(2026, 1, 1, tzinfo=UTC)


def pair(number: int, **more) -> Pair:
    prompt = (Message("user", f"Question number {number} of many, what is it? 🙂"),)
    return Pair(prompt, Response("ja"), Response("nein"), "import", "", "", **more)


def write(home, ledger, pairs, **more):
    fields = {"section": SECTION, "quarantine": [], "counts": {}, "origin": {"kind": "ledger"}}
    return write_pair_snapshot(home, ledger, pairs, **{**fields, **more})


def files(home: Home, snapshot_id: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in home.local("pairs", snapshot_id).iterdir()}


def test_rows_come_back_as_they_were_written(home, ledger):
    rich = Pair(
        prompt=(
            Message("system", "Kurz."),
            Message("user", "Wie warm ist es in Zürich? \u2028", name="ana"),
            Message("assistant", None, tool_calls=(ToolCall("c1", "wetter", '{"ort": "Zürich"}'),)),
            Message("tool", "9 °C", tool_call_id="c1"),
        ),
        chosen=Response("Kühl.", "stop", (1, 2), "digest", "model", "r1"),
        rejected=Response("", "tool_calls", None, tool_calls=(ToolCall(None, "wetter", "{}"),)),
        source="edit",
        split="",
        cluster="",
        tools='[{"name":"wetter"}]',
        weight=0.5,
        response_ids=("r1",),
        event_ids=("e1", "e2"),
        subject="someone",
        created_at=START,
    )
    row = write(home, ledger, [rich, pair(1)])
    found = {p.pair_id: p for p in read_pairs(home, row.snapshot_id)}[rich.pair_id]
    assert found.cluster
    assert found.split in ("train", "held_out")
    assert found.to_row() == {**rich.to_row(), "cluster": found.cluster, "split": found.split}


def test_the_order_of_rows_and_drops_changes_no_byte(home, ledger, tmp_path):
    pairs = [pair(i) for i in range(40)]
    drops = [Rejection(f"place {i}", "empty", "`chosen` is empty", f"raw {i}") for i in range(9)]
    first = write(home, ledger, pairs, quarantine=drops)
    random.Random(1).shuffle(pairs)
    random.Random(2).shuffle(drops)
    elsewhere = Home.at(tmp_path / "elsewhere")
    second = write(elsewhere, ledger, pairs, quarantine=drops)
    assert first.snapshot_id == second.snapshot_id
    assert files(home, first.snapshot_id) == files(elsewhere, second.snapshot_id)


def test_other_drops_settings_or_provenance_are_another_snapshot(home, ledger):
    drop = Rejection("a:1", "empty", "", "raw")
    ids = {
        write(home, ledger, [pair(1)]).snapshot_id,
        write(home, ledger, [pair(1)], quarantine=[drop]).snapshot_id,
        write(home, ledger, [pair(1)], section=PairSection(held_out_fraction=0.2)).snapshot_id,
        write(home, ledger, [pair(1, event_ids=("e",))]).snapshot_id,
        write(home, ledger, [pair(2)]).snapshot_id,
    }
    assert len(ids) == 5


def test_the_manifest_counts_everything(home, ledger):
    unpaired = Pair(pair(7).prompt, Response("ja"), None, "thumbs", "", "", label=True)
    drops = [Rejection("a:1", "empty", "d", "x"), Rejection("a:2", "null", "d", "y\ud800")]
    row = write(home, ledger, [pair(1, created_at=START), unpaired], quarantine=drops, counts={"read": 4})
    manifest = home.artifact("pairs", row.snapshot_id).verify()
    assert (manifest["rows"], manifest["dropped"]) == (2, {"empty": 1, "null": 1})
    counts = manifest["counts"]
    assert (counts["read"], counts["by_kind"]) == (4, {"pair": 1, "unpaired": 1})
    assert (counts["by_source"], counts["by_label"]) == ({"import": 1}, {"true": 1})
    assert sum(counts["by_split"].values()) == 2
    assert manifest["created_at"] == START.isoformat()
    quarantine = home.artifact("pairs", row.snapshot_id).read_table(QUARANTINE_SCHEMA, stem="quarantine").to_pylist()
    assert [q["raw"] for q in quarantine] == ["x", "y\\ud800"]


def test_writing_again_is_the_same_snapshot_and_the_newest(home, ledger):
    first = write(home, ledger, [pair(1)])
    before = files(home, first.snapshot_id)
    second = write(home, ledger, [pair(2)])
    assert resolve_snapshot(home, ledger, None).snapshot_id == second.snapshot_id
    again = write(home, ledger, [pair(1)])
    assert again.snapshot_id == first.snapshot_id
    assert files(home, first.snapshot_id) == before
    assert resolve_snapshot(home, ledger, None).snapshot_id == first.snapshot_id


def test_a_snapshot_is_found_by_name_id_and_beginning_of_its_id(home, ledger):
    row = write(home, ledger, [pair(1)], name="harmless", origin={"kind": "import"})
    for reference in ("harmless", row.snapshot_id, row.snapshot_id[:5]):
        assert resolve_snapshot(home, ledger, reference).snapshot_id == row.snapshot_id
    with pytest.raises(DataError, match="no pairs snapshot is called `harmles`(.|\n)*did you mean `harmless`"):
        resolve_snapshot(home, ledger, "harmles")
    with pytest.raises(DataError, match="no training snapshot is called `harmless`"):
        resolve_snapshot(home, ledger, "harmless", kind="training")


def test_a_name_means_the_snapshot_that_got_it_last(home, ledger):
    first = write(home, ledger, [pair(1)], name="data")
    second = write(home, ledger, [pair(2)], name="data")
    assert resolve_snapshot(home, ledger, "data").snapshot_id == second.snapshot_id
    write(home, ledger, [pair(1)], name="data")
    write(home, ledger, [pair(1)], name="more")
    assert resolve_snapshot(home, ledger, "data").snapshot_id == first.snapshot_id
    assert resolve_snapshot(home, ledger, "more").manifest["names"] == ["data", "more"]


def test_an_ambiguous_beginning_is_refused(home, ledger):
    ids = [write(home, ledger, [pair(i)]).snapshot_id for i in range(20)]
    shared = next(i[0] for i in ids if sum(other[0] == i[0] for other in ids) > 1)
    with pytest.raises(DataError, match=f"`{shared}` begins more than one pairs snapshot"):
        resolve_snapshot(home, ledger, shared)


def test_without_a_reference_imports_are_not_taken_for_feedback(home, ledger):
    with pytest.raises(DataError, match="there is no pairs snapshot yet"):
        resolve_snapshot(home, ledger, None)
    write(home, ledger, [pair(1)], name="hh", origin={"kind": "import"})
    with pytest.raises(DataError, match=r"no pairs snapshot was built from the ledger; others: \w+ \(hh\)"):
        resolve_snapshot(home, ledger, None)


def test_feedback_on_another_deployment_is_not_taken_for_that_on_this_one(home, ledger):
    mine = write(home, ledger, [pair(1)], origin={"kind": "ledger", "deployment": "default"})
    write(home, ledger, [pair(2)], origin={"kind": "ledger", "deployment": "demo"})
    assert resolve_snapshot(home, ledger, None, deployment="default").snapshot_id == mine.snapshot_id
    with pytest.raises(DataError, match="built from the ledger of deployment `other`"):
        resolve_snapshot(home, ledger, None, deployment="other")


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65])
def test_a_malformed_name_is_refused(home, ledger, name):
    with pytest.raises(RecipeError, match="cannot name a snapshot"):
        write(home, ledger, [pair(1)], name=name)


def test_a_snapshot_without_its_manifest_or_with_changed_files_is_refused(home, ledger):
    row = write(home, ledger, [pair(1)])
    part = home.local("pairs", row.snapshot_id, "part-00000.parquet")
    content = part.read_bytes()
    part.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(DataError, match="part-00000.parquet` differs from its manifest"):
        read_pairs(home, row.snapshot_id)
    home.local("pairs", row.snapshot_id, "manifest.json").unlink()
    with pytest.raises(DataError, match="is in the ledger, but not complete"):
        resolve_snapshot(home, ledger, row.snapshot_id)


def test_nothing_to_keep_is_an_error_that_counts(home, ledger):
    with pytest.raises(DataError, match="no row can train: 1 empty"):
        write(home, ledger, [], quarantine=[Rejection("a:1", "empty", "", "")])
    assert home.names("pairs") == []


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"prompt": "Why?", "chosen": "Because [/it] is.", "rejected": "No."}


def test_an_import_keeps_counts_and_quarantines_every_row(home, ledger, tmp_path):
    swapped = {"prompt": "How?", "chosen": "b", "rejected": "a"}
    path = jsonl(
        tmp_path / "rows.jsonl",
        GOOD,
        GOOD,
        swapped,
        {**swapped, "chosen": "a", "rejected": "b"},
        {**GOOD, "chosen": ""},
        {"[/b]": "x"},
    )
    row, report = import_files(home, ledger, [path], name="mine", section=SECTION)
    assert row.manifest["dropped"] == {"conflict": 2, "duplicate": 1, "empty": 1, "unknown_shape": 1}
    assert report.rows == row.manifest["rows"] + sum(row.manifest["dropped"].values()) == 6
    quarantine = home.artifact("pairs", row.snapshot_id).read_table(QUARANTINE_SCHEMA, stem="quarantine").to_pylist()
    assert {q["place"].rsplit(":", 1)[1] for q in quarantine} >= {"3", "4", "5", "6"}
    assert resolve_snapshot(home, ledger, "mine").snapshot_id == row.snapshot_id
    assert row.manifest["origin"]["files"][0]["rows"] == 6


def test_what_an_import_prints_names_places_even_where_text_looks_like_markup(home, ledger, tmp_path, capsys):
    from rich.console import Console

    path = jsonl(tmp_path / "rows.jsonl", GOOD, {"[/b]": "x", "[red": 1}, {**GOOD, "rejected": None})
    row, report = import_files(home, ledger, [path], name="mine", section=SECTION)
    print_import(Console(width=200), "mine", row, report)
    shown = capsys.readouterr().out
    assert "rows.jsonl:2" in shown
    assert "rows.jsonl:3: `rejected` is null" in shown
    assert row.snapshot_id in shown


def test_an_import_keeps_as_many_pairs_of_a_prompt_as_the_recipe_allows(home, ledger, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", *({**GOOD, "chosen": f"good {i}"} for i in range(6)))
    section = SECTION.model_copy(update={"max_pairs_per_prompt": 2})
    _, report = import_files(home, ledger, [path], name="mine", section=section)
    assert (report.kept, report.by_reason) == (2, {"over_prompt_cap": 4})


def test_an_import_of_nothing_usable_names_what_is_wrong_with_it(home, ledger, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {**GOOD, "chosen": " "}, {**GOOD, "chosen": ""})
    with pytest.raises(DataError) as refused:
        import_files(home, ledger, [path], name="mine", section=SECTION)
    assert "none of the 2 rows can train" in str(refused.value)
    assert "rows.jsonl:2: `chosen` is empty" in str(refused.value)


def test_the_order_of_imported_rows_changes_no_part(home, ledger, tmp_path):
    rows = [{**GOOD, "prompt": f"Question {i % 30}?", "chosen": "abc"[i % 3]} for i in range(60)]
    first, _ = import_files(home, ledger, [jsonl(tmp_path / "rows.jsonl", *rows)], name="a", section=SECTION)
    random.Random(0).shuffle(rows)
    other = Home.at(tmp_path / "other")
    second, _ = import_files(other, ledger, [jsonl(tmp_path / "again.jsonl", *rows)], name="b", section=SECTION)
    parts = [
        {n: c for n, c in files(h, r.snapshot_id).items() if n.startswith("part-")}
        for h, r in ((home, first), (other, second))
    ]
    assert parts[0] == parts[1]


def respond(ledger, response_id: str, text: str, **more) -> None:
    messages = [{"role": "user", "content": more.pop("prompt", "Warum? 🙂")}]
    fields = {
        "response_id": response_id,
        "deployment": "default",
        "conversation_id": "c",
        "turn": 0,
        "messages": messages,
        "tools": None,
        "prompt_key": prompt_key(tuple(map(Message.from_openai, messages)), None),
        "text": text,
        "tool_calls": None,
        "prompt_digest": None,
        "token_ids": [5, 6, 1],
        "logp": -1.0,
        "finish_reason": "stop",
        "template_digest": "template",
        "model_id": "model-1",
        "arm": "champion",
        "sampling": {},
        "shown_order": None,
        "subject": None,
        "origin": "served",
        "created_at": START,
    }
    ledger.record_response(ResponseRow(**{**fields, **more}))


def feedback(ledger, kind, response_id, value, **more):
    number = sum(1 for _ in ledger_events(ledger))
    return ledger.record_feedback(
        event_id=more.pop("event_id", f"event-{number}"), response_id=response_id, kind=kind, value=value, **more
    )


def ledger_events(ledger):
    import sqlalchemy as sa

    from app.ledger import FeedbackRow

    with ledger.read() as session:
        return list(session.scalars(sa.select(FeedbackRow)))


RECIPE = Recipe(name="test", pairs=SECTION)


def test_a_ledger_becomes_a_snapshot_with_its_funnel(home, ledger, capsys):
    from rich.console import Console

    for response_id, text in (("a", "erste"), ("b", "zweite"), ("c", "dritte")):
        respond(ledger, response_id, text)
    respond(ledger, "cut", "abgeschn", finish_reason="length")
    respond(ledger, "x", "elsewhere", deployment="other")
    feedback(ledger, "thumb", "a", "up")
    feedback(ledger, "thumb", "b", "down")
    feedback(ledger, "comparison", "a", "A>B", other_response_id="b")
    feedback(ledger, "comparison", "a", "both_bad", other_response_id="c")
    feedback(ledger, "edit", "c", "dritte, aber besser")
    feedback(ledger, "thumb", "cut", "down")
    feedback(ledger, "thumb", "x", "down", origin="simulated")
    row = build_pairs(home, ledger, RECIPE)
    counts = row.manifest["counts"]
    assert counts["events"] == {"comparison": 2, "edit": 1, "thumb": 3}
    assert counts["by_source"] == {"comparison": 1, "edit": 1}
    assert counts["by_label"] == {"false": 2}
    assert row.manifest["dropped"] == {"cut_by_length": 1, "duplicate": 1}
    assert counts["simulated_events"] == 0
    assert row.manifest["origin"]["models"] == {"model-1": 4}
    pairs = read_pairs(home, row.snapshot_id)
    compared = next(p for p in pairs if p.source == "comparison" and p.label is None)
    assert compared.event_ids == ("event-0", "event-1", "event-2")
    assert compared.chosen.token_ids == (5, 6, 1)
    print_funnel(Console(width=120), row)
    shown = capsys.readouterr().out
    assert "1 comparison, 1 edit" in shown
    assert row.snapshot_id in shown


def test_the_same_log_gives_the_same_bytes(home, ledger, tmp_path):
    respond(ledger, "a", "erste")
    respond(ledger, "b", "zweite")
    feedback(ledger, "thumb", "a", "up", subject="ana")
    feedback(ledger, "thumb", "b", "down", subject="bo")
    first = build_pairs(home, ledger, RECIPE)
    elsewhere = Home.at(tmp_path / "elsewhere")
    second = build_pairs(elsewhere, ledger, RECIPE)
    assert files(home, first.snapshot_id) == files(elsewhere, second.snapshot_id)


def test_only_the_deployment_of_the_recipe_and_events_since_count(home, ledger):
    respond(ledger, "a", "erste")
    respond(ledger, "b", "zweite", deployment="other")
    feedback(ledger, "thumb", "a", "up")
    feedback(ledger, "thumb", "b", "down")
    other = Recipe(name="test", serving={"deployment": "other"})
    assert build_pairs(home, ledger, other).manifest["counts"]["by_label"] == {"false": 1}
    for future in (datetime.now(UTC) + timedelta(hours=1), datetime(2100, 1, 1)):  # noqa: DTZ001
        late = Recipe(name="test", pairs=PairSection(since=future))
        with pytest.raises(DataError, match="the feedback on deployment `default` gives no pair: there is none"):
            build_pairs(home, ledger, late)


def test_feedback_that_gives_no_pair_says_why(home, ledger):
    respond(ledger, "a", "erste", finish_reason="length")
    feedback(ledger, "thumb", "a", "up")
    with pytest.raises(DataError, match="gives no pair: 1 cut_by_length(.|\n)*Hint"):
        build_pairs(home, ledger, RECIPE)


def test_a_small_import_holds_out_more_and_feedback_always_the_same_share(home, ledger):
    few = [pair(i) for i in range(60)]
    shares = {}
    for kind in ("import", "ledger"):
        row = write(
            home, ledger, few, section=PairSection(near_duplicate_threshold=1.0), origin={"kind": kind}, name=kind
        )
        rows = read_pairs(home, row.snapshot_id)
        clusters = {p.cluster for p in rows}
        shares[kind] = {p.cluster for p in rows if p.split == "held_out"}
        share = usual_held_out(len(clusters)) if kind == "import" else HELD_OUT
        assert shares[kind] == {cluster for cluster in clusters if split_of(cluster, share) == "held_out"}
    assert shares["ledger"] < shares["import"]
