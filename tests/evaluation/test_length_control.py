"""Equal length is told where lengths overlap, refused where they do not, and equals what AlpacaEval publishes."""

import csv
import gzip
import io
from collections import defaultdict

import numpy as np
import pytest

from app.errors import DataError
from app.evaluation.intervals import Resampling
from app.evaluation.length_control import Prior, length_controlled

QUICK = Resampling(level=0.95, samples=200, seed=0)


def judged(*, strength, taste, ratio, prompts=800, seed=0):
    """A judge who adds `taste` log-odds for a gap of one spread, between answers whose lengths have this ratio."""
    generator = np.random.default_rng(seed)
    base = generator.lognormal(5, 0.4, prompts)
    mine = base * ratio * generator.lognormal(0, 0.4, prompts)
    gap = np.tanh((base - mine) / (base - mine).std(ddof=1))
    points = (generator.random(prompts) < 1 / (1 + np.exp(-strength - taste * gap))).astype(float)
    return points.tolist(), mine.tolist(), base.tolist(), [str(i) for i in range(prompts)]


def test_equal_models_are_equal_at_equal_length_however_much_the_judge_likes_length():
    found = [
        length_controlled(*judged(strength=0, taste=-1.5, ratio=1.5, seed=seed), resampling=QUICK) for seed in range(30)
    ]
    assert np.mean([f.raw.value for f in found]) > 0.65
    assert np.mean([f.estimate.value for f in found]) == pytest.approx(0.5, abs=0.015)
    assert np.mean([f.length_effect for f in found]) == pytest.approx(-1.5, abs=0.1)


def test_its_interval_covers_the_truth_and_is_wider_than_one_that_takes_the_fit_for_granted():
    truth = 1 / (1 + np.exp(-0.4))
    found = [
        length_controlled(
            *judged(strength=0.4, taste=-1.0, ratio=1.2, prompts=200, seed=seed), resampling=Resampling(0.95, 200, seed)
        ).estimate
        for seed in range(150)
    ]
    assert 0.9 <= np.mean([e.low <= truth <= e.high for e in found]) <= 0.99
    assert np.mean([e.high - e.low for e in found]) > 0.12


def test_without_overlap_there_is_no_number_but_the_matched_prompts():
    found = length_controlled(*judged(strength=0, taste=-1, ratio=0.25), resampling=QUICK)
    assert found.estimate is None
    assert found.overlap < 0.2
    assert "not identifiable" in found.reason
    assert found.matched.n == round(found.overlap * 800)


def test_a_prior_of_the_judge_holds_the_length_effect_where_data_are_few():
    few = [column[:12] for column in judged(strength=0, taste=-1, ratio=1.1)]
    free = length_controlled(*few, resampling=QUICK).length_effect
    held = length_controlled(*few, resampling=QUICK, prior=Prior(-1.0, 0.05)).length_effect
    assert held == pytest.approx(-1.0, abs=0.1)
    assert abs(free - held) > 0.2


def test_answers_of_one_length_leave_the_raw_rate():
    found = length_controlled([1.0, 0.0, 1.0, 1.0], [7] * 4, [7] * 4, list("abcd"), resampling=QUICK)
    assert found.estimate.value == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize(
    ("points", "lengths", "message"),
    [
        ([1.0, 0.0], [3, float("nan")], "candidate's answer 1 is nan"),
        ([1.0, 0.0], [-1, 3], "candidate's answer 0 is -1"),
        ([1.5, 0.0], [1, 3], "preference of answer 0 is 1.5"),
    ],
)
def test_numbers_that_cannot_be_are_named(points, lengths, message):
    with pytest.raises(DataError, match=message):
        length_controlled(points, lengths, [2, 2], ["a", "b"], resampling=QUICK)


class TestPublished:
    """AlpacaEval 2's annotations, where they are at hand; the rates are in test_published.py."""

    def test_answers_of_other_lengths_are_refused_a_number(self, published):
        refused = {}
        annotations = defaultdict(list)
        for row in rows(published / "alpaca_eval_results" / "annotations_compact.csv.gz"):
            annotations[row["model"]].append(row)
        for model, of_model in annotations.items():
            found = length_controlled(
                [(float(r["preference"]) or 1.5) - 1 for r in of_model],
                [float(r["len_2"]) for r in of_model],
                [float(r["len_1"]) for r in of_model],
                [r["index"] for r in of_model],
                resampling=QUICK,
            )
            refused[model] = found.estimate is None
        assert {m for m, no in refused.items() if not no} == {
            "FuseChat-Llama-3.1-8B-Instruct",
            "FuseChat-Qwen-2.5-7B-Instruct",
        }


def rows(path):
    content = path.read_bytes()
    return list(csv.DictReader(io.StringIO((gzip.decompress(content) if path.suffix == ".gz" else content).decode())))
