"""LEARNED is said only where the lower bound beats chance and both length-only rules; ties are half and shown."""

import pytest

from app.evaluation.learning import judge_learning
from app.training.loop import PairMeasure


def measures(*, right: int, wrong: int, tied: int = 0, shorter_chosen: float = 0.5) -> list[PairMeasure]:
    """Pairs of own clusters; the given share of them has the shorter answer chosen."""
    margins = [0.3] * right + [-0.3] * wrong + [0.0] * tied
    short = round(shorter_chosen * len(margins))
    return [
        PairMeasure(str(i), str(i), margin, 0.5, 5 if i < short else 9, 9 if i < short else 5)
        for i, margin in enumerate(margins)
    ]


def test_an_accuracy_surely_above_chance_and_both_length_rules_is_learned():
    learning = judge_learning(measures(right=160, wrong=40), level=0.95, seed=0)
    assert (learning.accuracy, learning.shorter, learning.longer) == (0.8, 0.5, 0.5)
    assert learning.low > 0.5
    assert learning.learned
    assert learning.table().startswith("LEARNED: held-out reward accuracy 80.0% [")


@pytest.mark.parametrize(
    ("shorter_chosen", "shorter", "longer"), [(0.85, 0.85, 0.15), (0.15, 0.15, 0.85)], ids=["shorter", "longer"]
)
def test_an_accuracy_that_lengths_alone_reach_is_not_learned(shorter_chosen, shorter, longer):
    learning = judge_learning(measures(right=160, wrong=40, shorter_chosen=shorter_chosen), level=0.95, seed=0)
    assert (learning.shorter, learning.longer) == pytest.approx((shorter, longer))
    assert learning.low > 0.5, "chance is beaten; the length rule is not"
    assert not learning.learned
    assert learning.table().startswith("NOT LEARNED: ")


def test_an_accuracy_whose_interval_holds_chance_is_not_learned():
    learning = judge_learning(measures(right=52, wrong=48), level=0.95, seed=0)
    assert learning.low < 0.5 < learning.accuracy
    assert not learning.learned


def test_margins_of_exactly_zero_count_half_and_are_shown():
    learning = judge_learning(measures(right=60, wrong=20, tied=20), level=0.95, seed=0)
    assert (learning.accuracy, learning.ties) == (0.7, 0.2)
    assert "ties 20.0%" in learning.table()


def test_answers_of_equal_length_say_nothing_for_either_length_rule():
    equal = [PairMeasure(str(i), str(i), 0.3, 0.5, 7, 7) for i in range(30)]
    learning = judge_learning(equal, level=0.95, seed=0)
    assert (learning.shorter, learning.longer) == (0.5, 0.5)


def test_the_table_holds_every_figure():
    table = judge_learning(measures(right=160, wrong=40, shorter_chosen=0.6), level=0.95, seed=0).table()
    for figure in (
        "80.0%",
        "95%",
        "200 prompt clusters",
        "pairs 200",
        "ties 0.0%",
        "chance 50.0%",
        "shorter 60.0%",
        "longer 40.0%",
    ):
        assert figure in table
