"""A judge that cannot be believed is called unusable, and one that can is measured against people."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from app.cli import cli
from app.errors import DataError
from app.evaluation.battles import read_battles
from app.evaluation.intervals import Resampling
from app.evaluation.judge_health import Comparison, calibrate, judge_health, kappa
from app.evaluation.verdicts import Games, games, parse_verdict

QUICK = Resampling(level=0.95, samples=400, seed=0)


def comparisons(verdicts):
    """Comparisons from the verdicts for A of two games each."""
    return [Comparison(str(i), str(i), "", games(*pair), 10, 20) for i, pair in enumerate(verdicts)]


def test_a_judge_that_reads_is_usable_and_its_habits_are_told():
    verdicts = [(-1, 2)] * 20 + [(1, -1)] * 15 + [(0, 0)] * 5 + [(1, 1)] * 6 + [(-1, -1)] * 2 + [(1, 0)] * 2
    health = judge_health(comparisons(verdicts), {}, resampling=QUICK)
    assert (health.usable, health.reasons, health.readable, health.failures) == (True, (), 1.0, {})
    assert (health.ties.value, health.flips.value, health.first_wins_of_flips) == (5 / 50, 8 / 50, 6 / 8)
    # The candidate's answers are shorter, and win 20 of 35 decided comparisons.
    assert (health.longer_wins.value, health.longer_wins.n) == (pytest.approx(15 / 35), 35)
    assert health.beyond_order.low > 0.5


def test_a_judge_that_sees_one_side_win_always_is_usable_and_three_such_pairs_prove_nothing():
    assert judge_health(comparisons([(-1, 1)] * 30), {}, resampling=QUICK).usable
    assert not judge_health(comparisons([(-1, 1)] * 3), {}, resampling=QUICK).usable


@pytest.mark.parametrize("verdict", [1, -1, 0])
def test_a_judge_that_always_says_the_same_is_unusable(verdict):
    health = judge_health(comparisons([(verdict, verdict)] * 50), {}, resampling=QUICK)
    assert not health.usable
    assert "no more than chance" in health.reasons[0]


def test_a_judge_that_guesses_is_unusable():
    generator = np.random.default_rng(1)
    verdicts = [tuple(map(int, pair)) for pair in generator.choice([1, 0, -1], (80, 2))]
    health = judge_health(comparisons(verdicts), {}, resampling=QUICK)
    assert not health.usable


def test_a_judge_that_answers_nonsense_is_unusable_and_has_no_tie_rate():
    health = judge_health(comparisons([(None, None)] * 40), {"timeout": 3}, resampling=QUICK)
    assert not health.usable
    assert "only 0% of its verdicts can be read" in health.reasons[0]
    assert health.failures == {"timeout": 3, "unreadable": 77}
    assert (health.ties.n, health.ties.method) == (0, "empty")
    assert not judge_health([], {}, resampling=QUICK).usable


def test_kappa_is_cohen_s_and_its_interval_knows_clusters():
    generator = np.random.default_rng(0)
    first = generator.choice([1, 0, -1], 300).tolist()
    second = [a if generator.random() < 0.5 else int(generator.choice([1, 0, -1])) for a in first]
    alone = kappa(first, second, [str(i) for i in range(300)], resampling=QUICK)
    assert alone.value == pytest.approx(cohen_kappa_score(first, second))
    assert alone.low < alone.value < alone.high
    twice = kappa(first * 4, second * 4, [str(i % 300) for i in range(1200)], resampling=QUICK)
    rows = kappa(first * 4, second * 4, [str(i) for i in range(1200)], resampling=QUICK)
    assert twice.high - twice.low > 1.7 * (rows.high - rows.low)


def write(path, rows, columns=("prompt", "left", "right", "winner", "left_text", "right_text")):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return str(path)


@pytest.fixture
def files(tmp_path):
    human = [
        *[("p1", "x", "gpt", w, "long one", "short") for w in ("left", "left", "right")],
        ("p2", "gpt", "x", "left", "a", "bb"),
        ("p3", "x", "gpt", "tie", "a", "a"),
        ("p4", "x", "gpt", "left", "aa", "a"),
        ("only human", "x", "gpt", "left", "a", "a"),
    ]
    judge = [
        ("p1", "x", "gpt", "left", "long one", "short"),
        ("p1", "gpt", "x", "right", "short", "long one"),
        ("p2", "x", "gpt", "left", "bb", "a"),
        ("p3", "x", "gpt", "right", "a", "a"),
        ("p4", "x", "gpt", "left", "aa", "a"),
        ("p4", "gpt", "x", "left", "a", "aa"),
    ]
    return write(tmp_path / "human.csv", human), write(tmp_path / "judge.csv", judge)


def test_a_judge_is_held_against_the_majority_of_people(files):
    found = calibrate(*map(read_battles, files), judge_model="gpt", resampling=QUICK)
    assert (found.compared, found.only_human, found.only_judge) == (4, 1, 0)
    # p1 agree, p2 not, p3 a tie against a win, p4 a win against two orders that differ.
    assert found.agreement_with_ties.value == 1 / 4
    assert (found.agreement_without_ties.value, found.agreement_without_ties.n) == (1 / 2, 2)
    assert (found.human_ties.value, found.judge_ties.value) == (1 / 4, 1 / 4)
    assert (found.flips.value, found.flips.n) == (1 / 2, 2)
    assert (found.human_longer_wins.value, found.human_longer_wins.n) == (2 / 3, 3)
    assert (found.judge_longer_wins.value, found.judge_longer_wins.n) == (1.0, 2)
    assert (found.human_self_wins.value, found.judge_self_wins.value) == (1 / 3, 1 / 3)


def test_the_command_prints_the_calibration(files):
    human, judge = files
    arguments = ["judges", "calibrate", "--human", human, "--judge", judge]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert found["agreement_with_ties"]["value"] == 0.25
    shown = CliRunner().invoke(cli, arguments).output
    assert "4 pairs that humans and the judge labelled" in shown
    assert "not known" in shown


def test_files_that_share_nothing_are_named(files, tmp_path):
    other = write(tmp_path / "other.csv", [("p1", "x", "y", "left", "a", "b")])
    with pytest.raises(DataError, match="share none"):
        calibrate(read_battles(files[0]), read_battles(other), judge_model=None, resampling=QUICK)
    with pytest.raises(DataError, match="`llama` is in both files"):
        calibrate(*map(read_battles, files), judge_model="llama", resampling=QUICK)
    bare = write(tmp_path / "bare.csv", [("x", "gpt", "left")], ("left", "right", "winner"))
    with pytest.raises(DataError, match="human battles name no prompts"):
        calibrate(read_battles(bare), read_battles(files[1]), judge_model=None, resampling=QUICK)


class TestPublished:
    """GPT-4's pairs of MT-Bench, where they are at hand."""

    def test_gpt_4_is_usable_and_prefers_whoever_stands_first(self, published):
        path = published / "mt_bench_judgments" / "gpt-4_pair.jsonl"
        found = []
        for record in map(json.loads, path.read_text().splitlines()):
            pair = games(parse_verdict(record["g1_judgment"]), parse_verdict(record["g2_judgment"]))
            found.append(Comparison(str(record["question_id"]), str(record["question_id"]), "", pair, 1, 1))
        health = judge_health(found, {}, resampling=QUICK)
        assert health.usable
        assert health.failures == {"unreadable": 3}
        assert (health.flips.value, health.first_wins_of_flips) == (18 / 73, 16 / 18)
        assert Games(None, 1).outcome is None
