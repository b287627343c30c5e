"""Feedback to pairs: the rules of thumbs, edits and comparisons, and that every event is accounted for."""

import gzip
import itertools
import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.config import PairSection
from app.ledger import VERDICTS
from app.preferences.pairing import Answer, EditClass, Event, classify_edit, pair_events, subject_hash
from app.preferences.quality import resolve
from app.schemas import Message, Response, ToolCall

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SECTION = PairSection()
START = datetime(2026, 1, 1, tzinfo=UTC)


def answer(response_id: str, text: str, *, prompt: str = "Why?", finish: str = "stop", **more) -> Answer:
    response = Response(text, finish, (5, 6, 1), "template", more.pop("model", "model-1"), response_id, **more)
    return Answer(response_id, (Message("user", prompt),), None, response)


_numbers = itertools.count()


def event(kind: str, response_id: str, value: str, other: str | None = None, **more) -> Event:
    number = next(_numbers)
    fields = {"event_id": f"event-{number:04}", "revision": 1, "created_at": START + timedelta(seconds=number)}
    return Event(response_id=response_id, kind=kind, value=value, other_response_id=other, **{**fields, **more})


def thumb(response_id: str, value: str, **more) -> Event:
    return event("thumb", response_id, value, **more)


def compare(first: str, verdict: str, second: str, **more) -> Event:
    return event("comparison", first, verdict, second, **more)


def made(answers, events, section=SECTION):
    return pair_events(answers, events, section)


def sides(pairing) -> list[tuple[str | None, str | None]]:
    return sorted(
        (c.pair.chosen and c.pair.chosen.content, c.pair.rejected and c.pair.rejected.content)
        for c in pairing.candidates
    )


A, B, C = answer("a", "first"), answer("b", "second"), answer("c", "third")


def test_every_answer_voted_up_beats_every_answer_voted_down_on_the_same_prompt():
    pairing = made([A, B, C], [thumb("a", "up"), thumb("b", "down"), thumb("c", "down")])
    assert sides(pairing) == [("first", "second"), ("first", "third")]
    assert pairing.report.pairs == {"thumbs": 2}


def test_thumbs_on_different_prompts_make_no_pair():
    other = answer("b", "second", prompt="How?")
    pairing = made([A, other], [thumb("a", "up"), thumb("b", "down")])
    assert pairing.report.pairs == {}
    assert pairing.report.unpaired == {"false": 1, "true": 1}


def test_prompts_that_differ_in_the_system_prompt_or_the_tools_are_different():
    system = Answer("b", (Message("system", "Be brief."), *A.prompt), None, B.response)
    tools = Answer("c", A.prompt, '[{"name":"add"}]', C.response)
    pairing = made([A, system, tools], [thumb("a", "up"), thumb("b", "down"), thumb("c", "down")])
    assert pairing.report.pairs == {}


def test_a_lone_thumb_is_an_unpaired_row():
    pairing = made([A, B], [thumb("a", "up"), thumb("b", "up")])
    assert [(c.pair.label, c.pair.chosen.content) for c in pairing.candidates] == [(True, "first"), (True, "second")]


def test_a_pair_carries_where_it_came_from():
    up, down = thumb("a", "up", subject="ana"), thumb("b", "down", subject="ana")
    pair = made([A, B], [up, down]).candidates[0].pair
    assert pair.response_ids == ("a", "b")
    assert pair.event_ids == (up.event_id, down.event_id)
    assert pair.subject == subject_hash("ana") != "ana"
    assert pair.created_at == down.created_at
    assert (pair.chosen.token_ids, pair.chosen.template_digest, pair.chosen.model_id) == (
        (5, 6, 1),
        "template",
        "model-1",
    )
    assert (pair.source, pair.weight, pair.chosen.response_id) == ("thumbs", 1.0, "a")


def test_a_pair_of_two_subjects_names_neither():
    pairing = made([A, B], [thumb("a", "up", subject="ana"), thumb("b", "down", subject="bo")])
    assert pairing.candidates[0].pair.subject is None


@pytest.mark.parametrize(
    ("ups", "downs", "expected"),
    [(1, 1, {"disputed": 2}), (2, 1, {"disputed": 3}), (3, 1, {"outvoted": 1}), (1, 3, {"outvoted": 1})],
)
def test_a_disputed_answer_needs_a_margin_of_two(ups, downs, expected):
    votes = [thumb("a", "up") for _ in range(ups)] + [thumb("a", "down") for _ in range(downs)]
    pairing = made([A], votes)
    assert pairing.report.dropped == expected
    assert pairing.report.unpaired == ({} if "disputed" in expected else {str(ups > downs).lower(): 1})


def test_only_the_highest_revision_of_a_subject_counts():
    first = thumb("a", "down", subject="ana", revision=1, created_at=START + timedelta(days=9))
    second = thumb("a", "up", subject="ana", revision=2, created_at=START)
    pairing = made([A, B], [second, first, thumb("b", "down")])
    assert sides(pairing) == [("first", "second")]
    assert pairing.report.dropped == {"superseded": 1}


def test_events_without_a_subject_do_not_revise_one_another():
    pairing = made([A, B], [thumb("a", "up"), thumb("a", "up"), thumb("b", "down")])
    assert pairing.report.dropped == {}
    assert len(pairing.candidates[0].pair.event_ids) == 3


def test_an_edit_beats_the_original():
    edit = event("edit", "a", "first, but better")
    pair = made([A], [edit]).candidates[0].pair
    assert (pair.chosen.content, pair.chosen.finish_reason, pair.chosen.token_ids) == (
        "first, but better",
        "stop",
        None,
    )
    assert (pair.rejected, pair.source, pair.event_ids) == (A.response, "edit", (edit.event_id,))


def test_an_edit_of_the_text_keeps_the_tool_calls():
    calls = (ToolCall("1", "add", "{}"),)
    pair = made([answer("a", "adding it up", tool_calls=calls)], [event("edit", "a", "adding it")]).candidates[0].pair
    assert pair.chosen.tool_calls == calls


TEXT = "The quick brown fox jumps over the lazy dog and runs away from here. " * 3


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        (TEXT, "identical"),
        ("caf\u00e9 " + TEXT, "identical"),
        (TEXT.replace(" ", "  ") + "\n", "whitespace"),
        (TEXT.replace("fox", "cat", 1), "cosmetic"),
        (TEXT.replace("fox", "red cat").replace("lazy", "sleeping"), "substantive"),
        ("0123456789", "rewrite"),
    ],
)
def test_edits_have_classes(edited, expected):
    original = "cafe\u0301 " + TEXT if edited.startswith("caf") else TEXT
    assert classify_edit(original, edited, cosmetic=0.98, rewrite=0.30) == expected


@pytest.mark.parametrize(
    ("edited", "reason"),
    [(TEXT, "edit_identical"), (TEXT + " ", "edit_whitespace"), ("0123456789", "edit_rewrite")],
)
def test_edits_that_teach_nothing_are_left_out_and_counted(edited, reason):
    pairing = made([answer("a", TEXT)], [event("edit", "a", edited)])
    assert (pairing.candidates, pairing.report.dropped) == ((), {reason: 1})
    assert pairing.report.edit_classes == {reason.removeprefix("edit_"): 1}


def test_edits_of_long_and_looping_answers_are_classified_at_once():
    long = TEXT * 100
    assert classify_edit(long, long.replace("fox", "red cat"), cosmetic=0.98, rewrite=0.3) == EditClass.SUBSTANTIVE
    assert classify_edit("a" * 5000, "ab" * 2500, cosmetic=0.98, rewrite=0.3) == EditClass.REWRITE
    assert classify_edit(long, long + "Really.", cosmetic=0.98, rewrite=0.3) == EditClass.COSMETIC


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("A>B", [("first", "second")]),
        ("A>>B", [("first", "second")]),
        ("B>A", [("second", "first")]),
        ("B>>A", [("second", "first")]),
        ("A=B", []),
    ],
)
def test_a_comparison_gives_the_better_answer(verdict, expected):
    pairing = made([A, B], [compare("a", verdict, "b")])
    assert sides(pairing) == expected
    assert pairing.report.dropped == ({} if expected else {"tie": 1})
    assert all(c.pair.weight == 1.0 for c in pairing.candidates)


def test_both_bad_is_two_unpaired_negatives():
    pairing = made([A, B], [compare("a", "both_bad", "b")])
    assert sorted((c.pair.label, c.pair.rejected.content) for c in pairing.candidates) == [
        (False, "first"),
        (False, "second"),
    ]


SWAPPED = {"A>>B": "B>>A", "A>B": "B>A", "B>A": "A>B", "B>>A": "A>>B", "A=B": "A=B", "both_bad": "both_bad"}


@given(verdict=st.sampled_from(VERDICTS))
def test_swapping_the_answers_and_the_verdict_changes_nothing_and_the_verdict_alone_flips_the_pair(verdict):
    there = made([A, B], [compare("a", verdict, "b", event_id="e", created_at=START)])
    back = made([A, B], [compare("b", SWAPPED[verdict], "a", event_id="e", created_at=START)])
    flipped = made([A, B], [compare("a", SWAPPED[verdict], "b", event_id="e", created_at=START)])
    assert [c.pair for c in there.candidates] == [c.pair for c in back.candidates]
    if there.report.pairs:
        assert sides(flipped) == [(lost, won) for won, lost in sides(there)]


def test_the_majority_of_comparisons_wins_and_a_draw_is_disputed():
    events = [compare("a", "A>B", "b"), compare("b", "B>A", "a"), compare("a", "B>A", "b")]
    pairing = made([A, B], events)
    assert sides(pairing) == [("first", "second")]
    assert pairing.candidates[0].pair.event_ids == (events[0].event_id, events[1].event_id)
    assert pairing.report.dropped == {"outvoted": 1}
    assert made([A, B], events[1:]).report.dropped == {"disputed": 2}


def test_a_subject_who_compares_again_in_the_other_order_revises():
    events = [compare("a", "A>B", "b", subject="ana"), compare("b", "A>B", "a", subject="ana")]
    pairing = made([A, B], events)
    assert sides(pairing) == [("second", "first")]
    assert pairing.report.dropped == {"superseded": 1}


def test_answers_that_cannot_be_compared_are_counted():
    same, elsewhere = answer("b", " first "), answer("c", "third", prompt="How?")
    pairing = made([A, same, elsewhere], [compare("a", "A>B", "b"), compare("a", "A>B", "c")])
    assert pairing.report.dropped == {"different_prompts": 1, "identical": 1}


CUT = answer("cut", "a cut ans", finish="length")


@pytest.mark.parametrize(
    "given_event",
    [
        thumb("cut", "up"),
        thumb("cut", "down"),
        event("edit", "cut", "a cut answer"),
        *(compare("a", verdict, "cut") for verdict in VERDICTS),
        *(compare("cut", verdict, "a") for verdict in VERDICTS),
    ],
    ids=lambda e: f"{e.kind} {e.value}",
)
def test_an_answer_cut_by_the_token_limit_neither_wins_nor_loses(given_event):
    pairing = made([A, CUT], [given_event])
    assert (pairing.candidates, pairing.report.dropped) == ((), {"cut_by_length": 1})


def test_unknown_empty_and_unstorable_answers_and_ratings_are_counted():
    empty, broken = answer("e", " \n"), answer("s", "x\ud800")
    events = [thumb("nowhere", "up"), thumb("e", "up"), thumb("s", "up"), event("rating", "a", "4.5")]
    pairing = made([A, empty, broken], events)
    assert pairing.report.dropped == {"empty_response": 1, "nul_or_surrogate": 1, "rating": 1, "unknown_response": 1}
    for rejection in pairing.rejections:
        rejection.to_row()["raw"].encode()


def test_votes_on_the_same_text_served_twice_are_votes_on_one_answer():
    twin = answer("twin", "first")
    pairing = made([A, twin, B], [thumb("a", "up"), thumb("twin", "up"), thumb("twin", "down"), thumb("b", "down")])
    assert pairing.report.dropped == {"disputed": 3}


def test_simulated_events_are_counted():
    assert made([A], [thumb("a", "up", origin="simulated")]).report.simulated_events == 1


def test_a_pair_with_one_simulated_judgement_is_simulated():
    pairing = made([A, B, C], [thumb("a", "up", origin="simulated"), thumb("b", "down"), compare("b", "A>B", "c")])
    assert {c.pair.source: c.pair.simulated for c in pairing.candidates} == {"thumbs": True, "comparison": False}


def test_a_popular_prompt_uses_every_vote_without_making_every_pair():
    answers = [answer(f"r{i:03}", f"text {i}") for i in range(300)]
    votes = [thumb(a.response_id, "up" if i < 100 else "down") for i, a in enumerate(answers)]
    pairing = made(answers, votes)
    assert len(pairing.candidates) == 200
    assert {i for c in pairing.candidates for i in c.pair.response_ids} == {a.response_id for a in answers}
    assert len({c.pair.pair_id for c in pairing.candidates}) == 200


def random_log(seed: int) -> tuple[list[Answer], list[Event]]:
    rng = random.Random(seed)
    answers = [
        answer(
            f"r{i}",
            rng.choice(["yes", "no", "maybe so", "well, it depends", " "]),
            prompt=rng.choice(["Why?", "How?"]),
            finish=rng.choice(["stop", "stop", "stop", "length"]),
        )
        for i in range(8)
    ]
    events = []
    for i in range(25):
        kind = rng.choice(["thumb", "edit", "comparison", "rating"])
        first, second = rng.sample(range(9), 2)  # r8 is unknown
        value = {
            "thumb": rng.choice(["up", "down"]),
            "edit": rng.choice(["yes", "yes indeed", "maybe not", "0"]),
            "comparison": rng.choice(VERDICTS),
            "rating": "3",
        }[kind]
        events.append(
            Event(
                event_id=f"e{i:02}",
                response_id=f"r{first}",
                kind=kind,
                value=value,
                revision=rng.randint(1, 3),
                created_at=START + timedelta(minutes=rng.randint(0, 50)),
                other_response_id=f"r{second}" if kind == "comparison" else None,
                subject=rng.choice([None, "ana", "bo"]),
            )
        )
    return answers, events


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_event_is_behind_a_row_or_left_out_with_a_reason_and_the_order_changes_nothing(seed):
    answers, events = random_log(seed)
    pairing = made(answers, events)
    used = {i for c in pairing.candidates for i in c.pair.event_ids}
    left_out = Counter(r.place.removeprefix("event ") for r in pairing.rejections)
    assert used | set(left_out) == {e.event_id for e in events}
    assert not used & set(left_out)
    assert max(left_out.values(), default=1) == 1
    assert sum(pairing.report.dropped.values()) == len(pairing.rejections)
    cut = {a.response_id for a in answers if a.response.finish_reason == "length"}
    assert not cut & {i for c in pairing.candidates for i in c.pair.response_ids}
    shuffled = random.Random(seed + 1)
    shuffled.shuffle(answers)
    shuffled.shuffle(events)
    again = made(answers, events)
    assert again == pairing
    kept, over = resolve(pairing.candidates, max_pairs_per_prompt=2)
    assert len(kept) + len(over) == len(pairing.candidates)


def test_real_edits_have_the_published_share_of_whitespace_edits():
    """DeFacto, 346 edits: 7 change white space at most."""
    path = SHARED / "defacto_edits" / "val_edits.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts = [(r["candidate"], r["edited"]) for r in rows if r["edited"]]
        expected = {"identical": 7, "rewrite": 6, "cosmetic": 4, "substantive": 329}
    else:
        texts = [(TEXT, TEXT), (TEXT, TEXT.replace("fox", "red cat"))]
        expected = {"identical": 1, "substantive": 1}
    answers = [answer(f"r{i:03}", before, prompt=f"Prompt {i}") for i, (before, _) in enumerate(texts)]
    events = [event("edit", f"r{i:03}", after) for i, (_, after) in enumerate(texts)]
    assert made(answers, events).report.edit_classes == expected


def oasst_replies(path: Path):
    def walk(message, thread):
        for reply in message["replies"]:
            thread_then = (*thread, reply)
            if reply["role"] == "assistant":
                yield thread_then
            yield from walk(reply, thread_then)

    for line in gzip.decompress(path.read_bytes()).splitlines():
        root = json.loads(line)["prompt"]
        yield from walk(root, (root,))


def test_real_votes_give_the_published_number_of_clean_prompts():
    """OpenAssistant sample: 73 of 455 voted replies carry both signs; 48 prompts have a clean up and a clean down."""
    path = SHARED / "open_assistant" / "en_100_tree.jsonl.gz"
    if not path.exists():
        pairing = made([A, B], [thumb("a", "up"), thumb("b", "down")])
        assert pairing.report.pairs == {"thumbs": 1}
        return
    answers, events, signs = [], [], Counter()
    for *thread, reply in oasst_replies(path):
        roles = {"prompter": "user", "assistant": "assistant"}
        prompt = tuple(Message(roles[m["role"]], m["text"]) for m in thread)
        response = Response(reply["text"], "stop", response_id=reply["message_id"])
        answers.append(Answer(reply["message_id"], prompt, None, response))
        emojis = reply.get("emojis") or {}
        votes = {"up": emojis.get("+1", 0), "down": emojis.get("-1", 0)}
        signs[sum(map(bool, votes.values()))] += 1
        events += [thumb(reply["message_id"], sign) for sign, n in votes.items() for _ in range(n)]
    assert (signs[2], signs[1] + signs[2]) == (73, 455)
    pairing = made(answers, events, PairSection(thumb_margin=1000))
    prompts = {c.pair.prompt for c in pairing.candidates if c.pair.kind == "pair"}
    assert len(prompts) == 48
