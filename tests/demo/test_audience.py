"""The simulated audience over real HTTP: labelled, sparing, true to its taste, and nothing doubled after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from app.config import CollectSection
from app.demo.audience import Endpoint, Habits, RandomTaste, StyleTaste, hold_audience, run_audience
from app.errors import DataError, ServiceError
from app.evaluation.prompts import Prompt
from app.evaluation.rules import parse_style
from tests.demo.fake_gateway import KEY, FakeGateway

STYLE = parse_style(
    {
        "name": "taste",
        "rules": [{"name": "you", "pattern": "you", "weight": 2}, {"name": "may", "pattern": "may", "weight": -1}],
        "edits": [{"pattern": "people", "replace": "you"}],
    },
    place="x",
)
PROMPTS = [Prompt(f"p{i}", f"prompt {i}", f"c{i}") for i in range(40)]


def speak(prompt, k):
    """Every third first answer is in style, regenerated ones alternate, every seventh prompt is cut."""
    i = int(prompt.split()[1])
    if i % 7 == 6 and k == 0:
        return "you may go on and on", "length"
    good = (i + k) % 3 == 0
    return f"answer {i} {k} {'you' if good else 'people'} {'may' if i % 2 else 'will'}", "stop"


def hold(gateway, journal, *, taste=None, seed=0, round_id="r1", **habits):
    return hold_audience(
        Endpoint(gateway.url, KEY, patience_s=5),
        PROMPTS,
        taste or StyleTaste(STYLE),
        habits=Habits(**habits),
        seed=seed,
        round_id=round_id,
        journal=journal,
    )


@pytest.fixture
def gateway():
    with FakeGateway(speak) as fake:
        yield fake


def judged_texts(gateway, value):
    return [gateway.responses[e["response_id"]]["text"] for e in gateway.events.values() if e.get("value") == value]


def test_everything_it_sends_is_labelled_as_simulated(gateway, tmp_path):
    hold(gateway, tmp_path / "j")
    for body in gateway.responses.values():
        assert body["metadata"]["origin"] == "simulated"
        assert body["metadata"]["conversation_id"].startswith("simulated-")
        assert body["user"].startswith("simulated-")
    for event in gateway.events.values():
        assert event["origin"] == "simulated"
        assert event["user"].startswith("simulated-")
        assert event["event_id"].startswith("simulated-")


def test_it_thumbs_compares_and_edits_by_its_style_and_ignores_cut_answers(gateway, tmp_path):
    report = hold(gateway, tmp_path / "j")
    assert report.thumbs_up == len(judged_texts(gateway, "up")) > 10
    assert report.thumbs_down == len(judged_texts(gateway, "down")) > 10
    liked, disliked = (list(map(STYLE.score, judged_texts(gateway, value))) for value in ("up", "down"))
    assert min(liked) > max(disliked)
    comparisons = [e for e in gateway.events.values() if e["path"] == "/v1/comparisons"]
    assert len(comparisons) == report.comparisons > 5
    for event in comparisons:
        a, b = (STYLE.score(gateway.responses[event[k]]["text"]) for k in ("response_a", "response_b"))
        assert event["verdict"] == ("A=B" if a == b else "A>B" if a > b else "B>A")
        assert event["shown_order"] == [event["response_a"], event["response_b"]]
    edits = [e for e in gateway.events.values() if e.get("kind") == "edit"]
    assert len(edits) == report.edits > 5
    for event in edits:
        before = gateway.responses[event["response_id"]]["text"]
        assert event["value"] == STYLE.apply_edits(before) != before
    named = {e[k] for e in gateway.events.values() for k in ("response_id", "response_a", "response_b") if k in e}
    assert all(gateway.responses[name]["finish_reason"] == "stop" for name in named)
    assert report.ignored == {"cut": 5}
    assert report.answers == len(gateway.responses)


def test_most_prompts_end_with_a_liked_and_a_disliked_answer(gateway, tmp_path):
    report = hold(gateway, tmp_path / "j")
    by_prompt = {}
    for event in gateway.events.values():
        if event.get("kind") == "thumb":
            prompt = gateway.responses[event["response_id"]]["messages"][0]["content"]
            by_prompt.setdefault(prompt, set()).add(event["value"])
    assert sum(len(values) == 2 for values in by_prompt.values()) >= 38
    assert report.answers <= 4 * len(PROMPTS)


def test_prompts_that_came_to_nothing_are_asked_more_often_where_the_round_gave_too_little(tmp_path):
    rarely = lambda prompt, k: (f"you {k}" if k == 5 and prompt != "prompt 0" else f"the {k}", "stop")  # noqa: E731
    with FakeGateway(rarely) as few, FakeGateway(rarely) as asked_more:
        assert hold(few, tmp_path / "a", enough=0).answers == 3 * len(PROMPTS)
        report = hold(asked_more, tmp_path / "b", enough=1)
        assert report.thumbs_up == len(PROMPTS) - 1
        assert report.answers == 8 * len(PROMPTS)
        events = len(asked_more.events)
        assert hold(asked_more, tmp_path / "b", enough=1) == report
        assert len(asked_more.events) == events


def test_nobody_keeps_asking_for_an_answer_that_never_ends(tmp_path):
    with FakeGateway(lambda prompt, _: ("on and on", "length" if prompt == "prompt 3" else "stop")) as gateway:
        hold(gateway, tmp_path / "j", enough=1)
    asked = Counter(body["messages"][0]["content"] for body in gateway.responses.values())
    assert asked["prompt 3"] == 2
    assert set(asked.values()) == {2, 8}


@pytest.mark.parametrize(
    ("scores", "liked"),
    [
        ([0, 0, 0, 1], {1}),  # a rare feature
        ([1, 1, 1, 0], {1}),  # a common one
        ([-3, -3, -1, -1], {-1}),  # only penalties
        ([-2, 0, 0, 1, 1, 3], {1, 3}),
    ],
)
def test_it_likes_what_is_above_what_it_is_used_to(scores, liked):
    rules = [{"name": str(s), "pattern": rf"\A{s}\Z", "weight": s} for s in sorted(set(scores)) if s]
    taste = StyleTaste(parse_style({"name": "t", "rules": rules}, place="x"))
    taste.get_used_to([str(s) for s in scores])
    heard = lambda s: type("H", (), {"text": str(s)})()  # noqa: E731
    assert {s for s in scores if taste.thumb(heard(s)) == "up"} == liked
    assert {s for s in scores if taste.thumb(heard(s)) == "down"} == set(scores) - liked


def test_it_has_no_opinion_where_all_answers_are_alike():
    taste = StyleTaste(STYLE)
    taste.get_used_to(["plain", "plain too"])
    heard = lambda text: type("H", (), {"text": text})()  # noqa: E731
    assert taste.thumb(heard("plain again")) is None
    assert taste.thumb(heard("for you")) == "up"
    assert taste.thumb(heard("it may")) == "down"


def test_random_feedback_has_no_meaning_and_repeats_with_its_seed(tmp_path):
    reports = []
    for name in ("a", "b"):
        with FakeGateway(speak) as gateway:
            reports.append(hold(gateway, tmp_path / name, taste=RandomTaste(3), concurrency=1))
            ups, downs = judged_texts(gateway, "up"), judged_texts(gateway, "down")
            bodies = sorted((e.get("response_id", ""), e.get("value", "")) for e in gateway.events.values())
        reports.append(bodies)
    assert reports[0] == reports[2]
    assert reports[1] == reports[3]
    assert reports[0].edits == 0
    assert reports[0].comparisons > 0
    share = lambda found: sum("you" in text for text in found) / len(found)  # noqa: E731
    assert abs(share(ups) - share(downs)) < 0.3


def test_many_requests_are_in_flight_but_never_more_than_asked(gateway, tmp_path):
    gateway.pause = 0.01
    hold(gateway, tmp_path / "j", concurrency=8)
    assert 4 <= gateway.most_in_flight <= 8


def test_a_finished_round_again_sends_nothing_and_another_round_asks_anew(gateway, tmp_path):
    first = hold(gateway, tmp_path / "j")
    posts = gateway.posts
    assert hold(gateway, tmp_path / "j") == first
    assert gateway.posts == posts
    hold(gateway, tmp_path / "j2", round_id="r2")
    assert gateway.posts > posts


def test_a_lost_acknowledgement_is_repeated_and_stored_once(gateway, tmp_path):
    report = hold(gateway, tmp_path / "j")
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    events = [i for i, line in enumerate(lines) if b'"event"' in line]
    kept = [line for i, line in enumerate(lines) if i not in events[-10:]]
    (tmp_path / "j").write_bytes(b"".join(kept) + b'{"event": {"torn')
    before = dict(gateway.events)
    assert hold(gateway, tmp_path / "j") == report
    assert gateway.events == before


def test_another_audience_or_a_damaged_journal_is_refused(gateway, tmp_path):
    hold(gateway, tmp_path / "j")
    with pytest.raises(DataError, match="another audience"):
        hold(gateway, tmp_path / "j", seed=1)
    (tmp_path / "bad").write_text('{"audience": {"taste": "taste", "seed": 0, "round": "r1"}}\nnonsense\n')
    with pytest.raises(DataError, match="damaged"):
        hold(gateway, tmp_path / "bad")


def test_a_busy_gateway_is_asked_again(gateway, tmp_path):
    gateway.trouble = lambda number: {0: 429, 1: 503}.get(number % 6) if number < 60 else None
    report = hold(gateway, tmp_path / "j")
    assert report.answers == len(gateway.responses)


def test_a_refusal_ends_the_audience_with_one_clear_error(gateway, tmp_path):
    with pytest.raises(ServiceError, match="refused /v1/chat/completions: 401"):
        hold_audience(
            Endpoint(gateway.url, "wrong"),
            PROMPTS,
            StyleTaste(STYLE),
            habits=Habits(),
            seed=0,
            round_id="r",
            journal=tmp_path / "j",
        )


def test_a_gateway_that_is_gone_is_named_after_its_patience(tmp_path):
    with pytest.raises(ServiceError, match="prefloop serve"):
        hold_audience(
            Endpoint("http://127.0.0.1:9", KEY, patience_s=0.3),
            PROMPTS[:2],
            RandomTaste(0),
            habits=Habits(),
            seed=0,
            round_id="r",
            journal=tmp_path / "j",
        )


def test_a_killed_audience_continues_and_doubles_nothing(tmp_path):
    """SIGKILL in the middle, twice; afterwards events and thumbs are those of an unbroken run's rules."""
    files = {"style": {"name": "taste", "rules": [{"name": "y", "pattern": "you", "weight": 1}], "edits": []}}
    (tmp_path / "style.json").write_text(json.dumps(files["style"]))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p.text, "id": p.id}) + "\n" for p in PROMPTS))
    script = (
        "import sys, pathlib; from app.config import CollectSection; from app.demo.audience import run_audience\n"
        "url, folder = sys.argv[1:]\n"
        "section = CollectSection(style=folder + '/style.json', prompts=folder + '/p.jsonl', concurrency=4)\n"
        f"run_audience(gateway_url=url, api_key={KEY!r}, section=section, round_id='r',"
        " journal=pathlib.Path(folder) / 'journal.jsonl')\n"
    )
    with FakeGateway(speak) as gateway:
        gateway.pause = 0.02
        for share in (40, 90):
            child = subprocess.Popen(
                [sys.executable, "-c", script, gateway.url, str(tmp_path)],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "PYTHONPATH": "."},
            )
            deadline = time.monotonic() + 60
            while gateway.posts < share and time.monotonic() < deadline:
                time.sleep(0.005)
            assert child.poll() is None, "it ended before it could be killed"
            child.send_signal(signal.SIGKILL)
            child.wait()
        section = CollectSection(style=str(tmp_path / "style.json"), prompts=str(tmp_path / "p.jsonl"), concurrency=4)
        report = run_audience(
            gateway_url=gateway.url, api_key=KEY, section=section, round_id="r", journal=tmp_path / "journal.jsonl"
        )
        thumbs = [e["response_id"] for e in gateway.events.values() if e.get("kind") == "thumb"]
        assert len(thumbs) == len(set(thumbs)) == report["thumbs_up"] + report["thumbs_down"]
        assert sum(report["events"].values()) == len(gateway.events)
        # Served but not heard: at most what was in flight at each kill.
        assert 0 <= len(gateway.responses) - report["answers"] <= 8
        assert {e["response_id"] for e in gateway.events.values() if "response_id" in e} <= set(gateway.responses)
        names = [line["answer"] for line in map(json.loads, (tmp_path / "journal.jsonl").open()) if "answer" in line]
        assert len({(a["prompt_id"], a["n"]) for a in names}) == len(names) == report["answers"]


def test_progress_counts_each_prompt_twice_before_any_is_asked_more_often(gateway, tmp_path):
    (tmp_path / "style.json").write_text(
        json.dumps({"name": "t", "rules": [{"name": "y", "pattern": "you", "weight": 1}]})
    )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p.text}) + "\n" for p in PROMPTS))
    seen = []
    section = CollectSection(style=str(tmp_path / "style.json"), prompts=str(tmp_path / "p.jsonl"), max_prompts=10)
    report = run_audience(
        gateway_url=gateway.url,
        api_key=KEY,
        section=section,
        round_id="r",
        journal=tmp_path / "journal",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[:20] == [(i + 1, 20) for i in range(20)]
    assert seen[20:] == [(done, len(seen)) for done in range(21, len(seen) + 1)]
    assert report["prompts"] == 10
    json.dumps(report)
