"""LEARNED is said only where the lower bound beats chance and both length-only rules; ties are half and shown."""

from dataclasses import replace

import numpy as np
import pytest

from app.evaluation.learning import judge_answers, judge_learning, judge_likelihood
from app.training.held_out import AnswerMeasure, Measures, PairMeasure, with_start


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


def test_sources_are_told_apart_where_there_are_several():
    rows = measures(right=60, wrong=40)
    sources = {str(i): "edit" if i < 50 else "thumbs" for i in range(100)}
    learning = judge_learning(rows, level=0.95, seed=0, sources=sources)
    assert [(b.name, b.pairs, b.accuracy) for b in learning.by_source] == [
        ("from edit", 50, 1.0),
        ("from thumbs", 50, pytest.approx(0.2)),
    ]
    assert "from thumbs: 50 pairs, accuracy 20.0%" in learning.table()
    for same in ({}, dict.fromkeys(sources, "edit")):
        assert judge_learning(rows, level=0.95, seed=0, sources=same).by_source == ()


def test_an_accuracy_whose_interval_holds_chance_is_not_learned():
    learning = judge_learning(measures(right=52, wrong=48), level=0.95, seed=0)
    assert learning.low < 0.5 < learning.accuracy
    assert not learning.learned


def test_margins_of_exactly_zero_count_half_and_are_shown():
    learning = judge_learning(measures(right=60, wrong=20, tied=20), level=0.95, seed=0)
    assert (learning.accuracy, learning.ties) == (0.7, 0.2)
    assert "ties 20.0%" in learning.table()


def test_what_was_there_before_training_does_not_count_as_learned():
    as_before = [replace(row, before_margin=row.margin) for row in measures(right=160, wrong=40)]
    assert judge_learning(as_before, level=0.95, seed=0).ties == 1.0
    turned = [replace(row, margin=-0.1, before_margin=-0.4) for row in measures(right=160, wrong=40)]
    learning = judge_learning(turned, level=0.95, seed=0)
    assert (learning.accuracy, learning.learned) == (1.0, True)
    assert learning.by_length[0].margin == pytest.approx(0.3)


def test_the_table_tells_whether_chosen_answers_became_less_likely():
    rows = [
        replace(row, chosen_logp=-20.0 - (i % 4), before_logp=-21.0)
        for i, row in enumerate(measures(right=30, wrong=10))
    ]
    learning = judge_learning(rows, level=0.95, seed=0)
    assert learning.chosen_fell == 0.5
    assert "50.0% became less likely" in learning.table()
    assert "became less likely" not in judge_learning(measures(right=30, wrong=10), level=0.95, seed=0).table()


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


def answers(*, liked_reward: float, noise: float = 1.0, longer: int = 0, count: int = 120) -> list[AnswerMeasure]:
    generator = np.random.default_rng(0)
    rows = []
    for i in range(count):
        liked = i % 2 == 0
        reward = (liked_reward if liked else 0.0) + noise * float(generator.normal())
        tokens = 9 + int(generator.integers(4)) + (longer if liked else 0)
        rows.append(AnswerMeasure(str(i), f"c{i // 2}", liked, reward, -1.0, tokens, 0.5))
    return rows


def test_liked_answers_are_held_against_disliked_ones_one_by_one():
    learning = judge_answers(answers(liked_reward=1.5, count=600), level=0.95, seed=0)
    assert learning.learned
    assert learning.pairs == 300 * 300
    # Two normals 1.5 apart: Phi(1.5 / sqrt(2)) = 0.856.
    assert learning.accuracy == pytest.approx(0.856, abs=0.05)
    assert learning.low < learning.accuracy < learning.high
    assert "a held-out liked answer gained more reward" in learning.table()


def test_rewards_without_meaning_or_that_follow_the_length_are_not_learned():
    assert not judge_answers(answers(liked_reward=0.0), level=0.95, seed=0).learned
    learning = judge_answers(answers(liked_reward=1.5, longer=9), level=0.95, seed=0)
    assert learning.longer == 1.0
    assert not learning.learned


def test_rewards_that_the_start_model_gave_already_are_not_learned():
    """It may be another one than the reference, such as the champion of rounds before."""
    rows = answers(liked_reward=1.5, count=600)
    start = [replace(row, reward=row.reward - 0.01, before_reward=0.0) for row in rows]
    unmoved = with_start(Measures([], rows), Measures([], start)).answers
    assert not judge_answers(unmoved, level=0.95, seed=0).learned
    moved = with_start(Measures([], rows), Measures([], answers(liked_reward=0.0, count=600))).answers
    assert judge_answers(moved, level=0.95, seed=0).learned


@pytest.mark.parametrize("disliked", [0, 1, 9])
def test_answers_of_one_kind_and_a_handful_of_the_other_say_nothing(disliked):
    rows = answers(liked_reward=1.0)
    few = [a for a in rows if a.desirable] + [a for a in rows if not a.desirable][:disliked]
    assert judge_answers(few, level=0.95, seed=0) is None


def test_a_few_disliked_answers_among_many_liked_ones_are_hardly_ever_learned_by_chance():
    generator = np.random.default_rng(2)
    found = 0
    for run in range(200):
        rewards = generator.normal(size=70)
        rows = [AnswerMeasure(str(i), f"c{i}", i >= 10, float(r), -1.0, 9, 0.5) for i, r in enumerate(rewards)]
        learning = judge_answers(rows, level=0.95, seed=run)
        assert learning is not None
        found += learning.learned
    assert found <= 8, "2.5 % would be five"


@pytest.mark.parametrize(("gain", "learned"), [(0.3, True), (0.0, False), (-0.2, False)])
def test_imitation_is_learned_where_the_likelihood_rises_for_certain(gain, learned):
    generator = np.random.default_rng(1)
    rows = []
    for i in range(80):
        tokens = 5 + i % 9
        start = -2.0 * tokens
        after = start + tokens * gain + float(generator.normal())
        rows.append(AnswerMeasure(str(i), f"c{i // 2}", True, 0.0, after, tokens, 0.5, start))
    likelihood = judge_likelihood(rows, level=0.95, seed=0)
    assert likelihood.learned is learned
    assert likelihood.before == pytest.approx(2.0)
    assert likelihood.after == pytest.approx(2.0 - gain, abs=0.05)
    assert f"{'LEARNED' if learned else 'NOT LEARNED'}: held-out negative log-likelihood" in likelihood.table()


def test_margins_are_told_apart_by_the_lengths_of_the_answers():
    """A reward that follows the length alone is right on one side and wrong on the other."""
    rows = [PairMeasure(f"l{i}", f"l{i}", 2.0, 0.5, 20, 10) for i in range(4)]
    rows += [PairMeasure(f"s{i}", f"s{i}", -1.0, 0.5, 10, 20) for i in range(3)]
    rows += [PairMeasure(f"e{i}", f"e{i}", 0.0, 0.5, 10, 9) for i in range(2)]
    learning = judge_learning(rows, level=0.95, seed=0)
    assert [(b.pairs, b.accuracy, b.margin) for b in learning.by_length] == [
        (3, 0.0, -1.0),
        (2, 0.5, 0.0),
        (4, 1.0, 2.0),
    ]
    assert "chosen longer by more than a fifth: 4 pairs, accuracy 100.0%, mean margin +2.000" in learning.table()
