"""Near duplicates: small changes of long and of short texts join them, and crowds take no for ever."""

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.near_duplicates import cluster_texts

LONG = "Please explain to a class of ten year old children why the sky looks blue at noon and turns red in the evening."
WORDS = LONG.lower().split()


def alike(one: str, other: str, threshold: float = 0.8) -> bool:
    first, second = cluster_texts([one, other], threshold=threshold)
    return first == second


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG, LONG.replace("evening.", "evening!  ")),
        (LONG, LONG.upper()),
        (LONG, "And please " + LONG[0].lower() + LONG[1:]),
        (
            "Give me one tip for cooking rice that does not stick.",
            "Give me one tip for cooking rice that doesn't stick.",
        ),
        (
            "Give me one tip for cooking rice that does not stick.",
            "give me a tip for cooking rice that does not stick!",
        ),
        ("caf\u00e9?", "CAFE\u0301?"),
    ],
)
def test_small_changes_leave_texts_alike(one, other):
    assert alike(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "What is the capital of Spain?"),
        ("你好吗", "再见了"),
        ("a", "b"),
        (LONG, LONG.replace("sky", "sea").replace("blue", "green").replace("class", "pub").replace("noon", "dusk")),
    ],
)
def test_other_questions_are_not_alike(one, other):
    assert not alike(one, other)


def test_a_threshold_of_one_joins_equal_texts_only():
    assert alike("Same here", "same  HERE", threshold=1.0)
    assert not alike(LONG, LONG + " now", threshold=1.0)


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_order_of_the_texts_changes_no_name(texts, seed):
    names = dict(zip(texts, cluster_texts(texts, threshold=0.8), strict=True))
    random.Random(seed).shuffle(texts)
    assert dict(zip(texts, cluster_texts(texts, threshold=0.8), strict=True)) == names


def test_two_thousand_texts_of_one_template_take_seconds():
    began = time.monotonic()
    names = cluster_texts([f"{LONG} {LONG} number {i}" for i in range(2000)], threshold=0.8)
    assert len(set(names)) == 1
    assert time.monotonic() - began < 30
