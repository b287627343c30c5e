"""The demo's own content is usable: enough prompts, none on both sides, a style that is not length."""

from pathlib import Path

from app.evaluation.prompts import NEAR_DUPLICATE, load_prompts
from app.evaluation.rules import load_style
from app.evaluation.suites import load_golden
from app.near_duplicates import cluster_texts

DATA = Path(__file__).parents[2] / "app" / "demo" / "data"


def texts(name):
    found = load_prompts(str(DATA / name))
    assert found.repeated == 0
    return [prompt.text for prompt in found.prompts]


def test_there_are_enough_prompts_and_no_near_duplicate_is_on_both_sides():
    train, held_out = texts("prompts_train.jsonl"), texts("prompts_held_out.jsonl")
    assert len(train) >= 200
    assert len(held_out) >= 160
    golden = [case.prompt for case in load_golden(str(DATA / "golden.jsonl"))]
    clusters = cluster_texts([*train, *held_out, *golden], threshold=NEAR_DUPLICATE)
    asked, judged = set(clusters[: len(train)]), set(clusters[len(train) :])
    assert not asked & judged


def test_the_house_style_rewards_no_length():
    """Twice the text scores the same, and each length has good and bad answers."""
    style = load_style(str(DATA / "style.json"))
    good, bad = "To you, tea is warm and kind.", "Tea is warm and kind to all."
    assert len(good.split()) == len(bad.split())
    assert style.score(good) > style.score(bad)
    for text in (good, bad, "A kettle may boil."):
        assert style.score(f"{text} And so on, as ever, with many more words.") == style.score(text)


def test_the_edits_of_the_house_style_never_make_an_answer_worse():
    style = load_style(str(DATA / "style.json"))
    for text in (
        "A comet is a small icy body that orbits the Sun.",
        "An oven can often heat food.",
        "The tide may rise when people sleep.",
        "We usually see their shadows.",
    ):
        assert style.score(style.apply_edits(text)) > style.score(text)
    assert style.apply_edits("You know it.") == "You know it."


def test_the_neutral_text_is_long_enough_to_measure():
    assert 600 <= len((DATA / "neutral.txt").read_text(encoding="utf-8").split()) <= 1000
