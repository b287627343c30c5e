"""Which rows train: each once, none against another, not too many of one prompt, no prompt on both sides."""

import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.preferences.candidates import Candidate
from app.preferences.formats import read_rows
from app.preferences.quality import assign_splits, resolve, split_of, usual_held_out
from app.schemas import Message, Pair, Response, Source

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def pair(chosen: str | None, rejected: str | None, *, prompt="Why?", source="import", label=None, **more) -> Pair:
    answers = [None if text is None else Response(text) for text in (chosen, rejected)]
    return Pair((Message("user", prompt),), *answers, source, "", "", label=label, **more)


def settled(*pairs: Pair, cap: int | None = None):
    kept, rejections = resolve([Candidate(p, f"place {i}") for i, p in enumerate(pairs)], max_pairs_per_prompt=cap)
    assert len(kept) + len(rejections) == len(pairs)
    return kept, Counter(r.reason for r in rejections)


def test_a_row_is_kept_once():
    assert settled(pair("a", "b"), pair("a", "b"), pair(" a", "b\n")) == (
        [min((pair("a", "b"), pair(" a", "b\n")), key=lambda p: p.pair_id)],
        {"duplicate": 2},
    )


def test_the_same_row_of_several_sources_keeps_the_most_trusted_one_and_all_events():
    day = datetime(2026, 1, 2, tzinfo=UTC)
    kept, reasons = settled(
        pair("a", "b", source="thumbs", event_ids=("e1", "e2"), response_ids=("r1",), created_at=day),
        pair("a", "b", source="comparison", event_ids=("e3",), response_ids=("r2",), simulated=True),
    )
    assert reasons == {"duplicate": 1}
    assert (kept[0].source, kept[0].event_ids, kept[0].response_ids) == ("comparison", ("e1", "e2", "e3"), ("r1", "r2"))
    assert (kept[0].created_at, kept[0].simulated) == (day, True)


@pytest.mark.parametrize("better", range(len(Source) - 1))
def test_the_more_trusted_source_wins_a_contradiction(better):
    trusted, other = list(Source)[better : better + 2]
    kept, reasons = settled(pair("b", "a", source=other), pair("a", "b", source=trusted))
    assert [(p.chosen.content, p.source) for p in kept] == [("a", trusted)]
    assert reasons == {"conflict": 1}


def test_equally_trusted_contradictions_are_all_left_out():
    assert settled(pair("a", "b"), pair("b", "a"), pair("a", "b")) == ([], {"conflict": 3})
    assert settled(pair("a", None, label=True), pair(None, "a", label=False)) == ([], {"conflict": 2})


def test_the_same_answers_to_other_prompts_do_not_contradict():
    kept, reasons = settled(pair("a", "b"), pair("b", "a", prompt="How?"))
    assert (len(kept), reasons) == (2, {})


def test_a_prompt_keeps_the_most_trusted_pairs_up_to_the_cap():
    pairs = [pair(f"a{i}", "b", source=source) for i, source in enumerate(["import", "edit", "thumbs", "edit"])]
    kept, reasons = settled(*pairs, pair("c", None, label=True), cap=2)
    assert sorted(p.source for p in kept if p.label is None) == ["edit", "edit"]
    assert reasons == {"over_prompt_cap": 2}


def test_pairs_of_one_model_come_before_pairs_of_two():
    mixed = [pair(f"a{i}", "b") for i in range(6)]
    mixed = [
        replace(p, chosen=replace(p.chosen, model_id="1"), rejected=replace(p.rejected, model_id="2")) for p in mixed
    ]
    same = pair("c", "d")
    kept, _ = settled(*mixed, same, cap=1)
    assert kept == [same]


ROWS = st.lists(
    st.builds(
        lambda chosen, rejected, prompt, source, label: (
            pair(chosen, rejected, prompt=prompt, source=source)
            if label is None
            else pair(*((chosen, None) if label else (None, chosen)), prompt=prompt, source=source, label=label)
        ),
        st.sampled_from("abc"),
        st.sampled_from("xyz"),
        st.sampled_from(["p", "q"]),
        st.sampled_from([s.value for s in Source]),
        st.sampled_from([None, None, True, False]),
    ),
    max_size=25,
)


@given(rows=ROWS, seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_order_of_the_rows_changes_neither_what_is_kept_nor_what_is_counted(rows, seed):
    kept, reasons = settled(*rows, cap=3)
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    assert settled(*shuffled, cap=3) == (kept, reasons)
    stances = Counter((p.prompt, p.kind, frozenset(r.content for r in (p.chosen, p.rejected) if r)) for p in kept)
    assert max(stances.values(), default=1) == 1


LONG = "Please explain to a class of ten year old children why the sky looks blue at noon and turns red in the evening."


def split(*prompts: str, fraction: float | None = 0.3) -> list[Pair]:
    return assign_splits([pair("a", "b", prompt=p) for p in prompts], threshold=0.8, held_out_fraction=fraction)


def test_near_duplicate_prompts_share_cluster_and_side():
    rows = split(LONG, LONG.replace("evening.", "evening!  "), LONG.upper(), "Something else entirely, a haiku say.")
    assert len({r.cluster for r in rows[:3]}) == 1
    assert rows[3].cluster != rows[0].cluster


def test_few_clusters_hold_out_a_hundred_but_never_more_than_a_third_and_a_growing_set_never_takes_one_back():
    shares = [usual_held_out(clusters) for clusters in range(1, 2000)]
    assert shares == sorted(shares, reverse=True)
    assert (shares[29], shares[-1]) == (1 / 3, 0.15)
    assert 500 * usual_held_out(500) == pytest.approx(100)
    rows = split(*(f"{word} " * 30 for word in map(str, range(60))), fraction=None)
    assert {row.split for row in rows} == {"train", "held_out"}
    assert [row.split for row in rows] == [split_of(row.cluster, 1 / 3) for row in rows]


def test_a_system_prompt_does_not_make_prompts_alike():
    system = Message("system", "You are a helpful assistant. " * 30)
    rows = [replace(pair("a", "b"), prompt=(system, Message("user", text))) for text in (LONG, "Write a haiku.")]
    rows = assign_splits(rows, threshold=0.8, held_out_fraction=0.3)
    assert rows[0].cluster != rows[1].cluster


WORDS = ["red", "blue", "why", "how", "sky", "sea", "the", "a", "is", "was", "large", "small"]
PROMPTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join), min_size=1, max_size=12)


@given(prompts=PROMPTS, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_prompt_and_no_cluster_is_on_both_sides_whatever_the_order(prompts, seed):
    prompts = [*prompts, *(p.upper() for p in prompts[:3])]
    rows = split(*prompts)
    sides = {(r.cluster, r.split) for r in rows}
    assert len(sides) == len({cluster for cluster, _ in sides})
    of_prompt = {r.prompt[0].content.casefold(): r.cluster for r in rows}
    assert all(of_prompt[r.prompt[0].content.casefold()] == r.cluster for r in rows)
    random.Random(seed).shuffle(prompts)
    again = {r.prompt[0].content.casefold(): (r.cluster, r.split) for r in split(*prompts)}
    assert again == {r.prompt[0].content.casefold(): (r.cluster, r.split) for r in rows}


def test_the_share_of_held_out_clusters_is_what_was_asked():
    sides = Counter(split_of(str(i), 0.1) for i in range(20_000))
    assert sides["held_out"] / 20_000 == pytest.approx(0.1, abs=0.01)


def test_hh_rlhf_leaves_no_prompt_on_both_sides():
    path = SHARED / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    if not path.exists():
        rows = split(*(f"{LONG} {word}" for word in WORDS))
        assert len({(r.cluster, r.split) for r in rows}) == len({r.cluster for r in rows})
        return
    reading = read_rows([path])
    kept, rejections = resolve(reading.candidates, max_pairs_per_prompt=4)
    assert (len(kept), len(rejections)) == (2299, 0)
    rows = assign_splits(kept, threshold=0.8, held_out_fraction=0.1)
    clusters = {r.cluster: r.split for r in rows}
    assert all(clusters[r.cluster] == r.split for r in rows)
    assert len({r.prompt for r in rows if r.split == "train"} & {r.prompt for r in rows if r.split == "held_out"}) == 0
    assert 2270 <= len(clusters) <= 2299
    assert 0.08 < sum(r.split == "held_out" for r in rows) / len(rows) < 0.12


@pytest.mark.parametrize(("name", "kept"), [("dpo_en_demo", 295), ("kto_en_demo", 300), ("alpaca_en_demo", 985)])
def test_llama_factory_samples_hold_these_distinct_rows(name, kept):
    path = SHARED / "llamafactory_demo" / f"{name}.json.gz"
    if not path.exists():
        assert len(settled(pair("a", "b"), pair("a", "b"))[0]) == 1
        return
    reading = read_rows([path])
    pairs, rejections = resolve(reading.candidates, max_pairs_per_prompt=4)
    assert len(pairs) == kept
    assert {r.reason for r in rejections} <= {"duplicate"}
