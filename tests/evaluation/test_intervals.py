"""Intervals cover what they say, clusters count as one, and the degenerate cases are honest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DataError
from app.evaluation.intervals import (
    Resampling,
    detectable,
    mean_rate,
    mean_ratio,
    needed_clusters,
    paired_p_value,
)
from app.evaluation.learning import judge_learning
from app.training.held_out import PairMeasure

QUICK = Resampling(level=0.95, samples=400, seed=0)


def coverage(cluster_size: int, *, trials: int, clusters: int) -> float:
    """Share of intervals that contain the truth; prompts of a cluster share their probability of winning."""
    generator = np.random.default_rng(7)
    inside = 0
    for trial in range(trials):
        chance = generator.beta(1.2, 0.8, size=clusters)  # mean 0.6
        values = (generator.random((clusters, cluster_size)) < chance[:, None]).astype(float)
        names = np.repeat(np.arange(clusters), cluster_size).astype(str)
        estimate = mean_rate(
            values.ravel().tolist(), names.tolist(), resampling=Resampling(0.95, samples=300, seed=trial)
        )
        inside += estimate.low <= 0.6 <= estimate.high
    return inside / trials


def test_few_clusters_are_covered_too():
    assert 0.93 <= coverage(10, trials=500, clusters=20) <= 0.975


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_95_percent_intervals_cover_the_truth_with_and_without_clusters(cluster_size):
    assert 0.92 <= coverage(cluster_size, trials=500, clusters=120) <= 0.975


@pytest.mark.full
@pytest.mark.parametrize(
    ("cluster_size", "clusters"), [(1, 300), (1, 100), (5, 60), (5, 20), (10, 30), (10, 20)], ids=str
)
def test_two_thousand_intervals_cover_between_93_and_97_percent(cluster_size, clusters):
    assert 0.93 <= coverage(cluster_size, trials=2000, clusters=clusters) <= 0.97


def test_ignoring_clusters_would_be_too_sure():
    generator = np.random.default_rng(3)
    values = np.repeat((generator.random(60) < 0.6).astype(float), 5).tolist()
    by_cluster = mean_rate(values, [str(i // 5) for i in range(300)], resampling=QUICK)
    by_row = mean_rate(values, [str(i) for i in range(300)], resampling=QUICK)
    assert by_cluster.value == by_row.value
    assert (by_cluster.n, by_cluster.n_clusters, by_row.n_clusters) == (300, 60, 300)
    assert (by_cluster.high - by_cluster.low) > 1.8 * (by_row.high - by_row.low)


def test_all_wins_are_bounded_exactly_because_a_bootstrap_would_claim_certainty():
    estimate = mean_rate([1.0] * 40, [str(i // 2) for i in range(40)], resampling=QUICK)
    assert (estimate.value, estimate.high, estimate.method) == (1.0, 1.0, "exact")
    assert estimate.low == pytest.approx(0.025 ** (1 / 20))
    losses = mean_rate([0.0] * 40, [str(i // 2) for i in range(40)], resampling=QUICK)
    assert losses.high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_two_lucky_pairs_prove_nothing():
    measures = [PairMeasure(str(i), str(i), 0.3, 0.5, 5, 9) for i in range(2)]
    assert judge_learning(measures, level=0.95, seed=0).low < 0.5


@pytest.mark.parametrize(("wins", "rows"), [((3, 3), 4), ((3, 4), 5), ((18, 19, 17), 20)])
def test_many_rows_of_a_few_clusters_prove_nothing_either(wins, rows):
    values = [float(i < won) for won in wins for i in range(rows)]
    clusters = [str(number) for number in range(len(wins)) for _ in range(rows)]
    estimate = mean_rate(values, clusters, resampling=QUICK)
    perfect = 0.025 ** (1 / len(wins))
    assert estimate.low <= perfect + 1e-9 < 0.5, "no better than if every row of them had won"
    losses = mean_rate([1 - value for value in values], clusters, resampling=QUICK)
    assert losses.high >= 1 - perfect - 1e-9 > 0.5


def test_all_ties_are_a_point_and_no_values_are_no_knowledge():
    ties = mean_rate([0.5] * 9, list("abcdefghi"), resampling=QUICK)
    assert (ties.low, ties.high, ties.method) == (0.5, 0.5, "constant")
    empty = mean_rate([], [], resampling=QUICK)
    assert (empty.low, empty.high, empty.n, empty.method) == (0.0, 1.0, 0, "empty")


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from("abcdef")), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_an_interval_holds_its_value_and_repeats_with_its_seed(rows):
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    estimate = mean_rate(values, clusters, resampling=QUICK)
    assert 0 <= estimate.low <= estimate.value + 1e-12
    assert estimate.value - 1e-12 <= estimate.high <= 1
    assert estimate == mean_rate(values, clusters, resampling=QUICK)


def test_a_ratio_is_of_sums_and_a_constant_ratio_is_a_point():
    estimate = mean_ratio([10.0, 30.0], [20.0, 20.0], ["a", "b"], resampling=QUICK)
    assert estimate.value == 1.0
    assert (estimate.low, estimate.high) == (0.5, 1.5)
    half = mean_ratio([5.0, 10.0, 1.0], [10.0, 20.0, 2.0], ["a", "b", "c"], resampling=QUICK)
    assert (half.value, half.low, half.high) == (0.5, 0.5, 0.5)
    with pytest.raises(DataError):
        mean_ratio([1.0], [0.0], ["a"], resampling=QUICK)


def test_the_number_of_prompts_needed_is_enough():
    generator = np.random.default_rng(11)
    wins = lambda n: (generator.permutation(n) < 0.6 * n).astype(float).tolist()  # noqa: E731
    small = mean_rate(wins(60), [str(i) for i in range(60)], resampling=QUICK)
    needed = needed_clusters(small, threshold=0.5)
    assert small.low < 0.5
    assert needed is not None
    assert 60 < needed < 200
    larger = mean_rate(wins(needed + 10), [str(i) for i in range(needed + 10)], resampling=QUICK)
    assert larger.low > 0.49
    assert needed_clusters(small, threshold=0.7) is None


def test_one_cluster_says_nothing_of_another():
    estimate = mean_rate([1.0, 0.0, 1.0], ["a", "a", "a"], resampling=QUICK)
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_what_is_detectable_is_detected_as_often_as_it_says():
    generator = np.random.default_rng(5)
    sample = lambda rate: (generator.random(200) < rate).astype(float).tolist()  # noqa: E731
    names = [str(i) for i in range(200)]
    effect = detectable(mean_rate(sample(0.5), names, resampling=QUICK))
    shown = [mean_rate(sample(0.5 + effect), names, resampling=QUICK).low > 0.5 for _ in range(300)]
    assert effect == pytest.approx(2.8 * np.sqrt(0.25 / 200), rel=0.1)
    assert 0.7 < np.mean(shown) < 0.9


def test_a_paired_test_rejects_equal_models_as_often_as_it_says_with_clusters():
    generator = np.random.default_rng(2)
    names = np.repeat(np.arange(40), 5).astype(str).tolist()

    def p_value(shift):
        common = generator.normal(shift, 0.3, 40)
        return paired_p_value((np.repeat(common, 5) + generator.normal(0, 0.2, 200)).tolist(), names, resampling=QUICK)

    assert np.mean([p_value(0.0) < 0.05 for _ in range(300)]) < 0.09
    assert np.mean([p_value(0.2) < 0.05 for _ in range(100)]) > 0.9
    assert paired_p_value([0.0, 0.0], ["a", "b"], resampling=QUICK) == 1.0
