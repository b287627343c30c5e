"""Ratings are the maximum of the likelihood, anchored, honest about clusters, and equal to what others publish."""

import csv
import json

import evalica
import numpy as np
import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.errors import DataError
from app.evaluation.battles import read_answer_texts, read_battles, with_texts
from app.evaluation.intervals import Resampling
from app.evaluation.published import strength_shares
from app.evaluation.ratings import STYLE_FEATURES, rate, style_features

QUICK = Resampling(level=0.95, samples=200, seed=0)


def write_csv(path, rows, columns=("left", "right", "winner")):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return str(path)


def tournament(models, battles, *, seed=0):
    """Random battles of models whose strength is their position."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(battles):
        left, right = generator.choice(len(models), 2, replace=False)
        odds = np.exp((left - right) / 2)
        winner = "tie" if generator.random() < 0.2 else "left" if generator.random() < odds / (1 + odds) else "right"
        rows.append((models[left], models[right], winner))
    return rows


def evalica_scores(rows, weights=None):
    winners = {"left": evalica.Winner.X, "right": evalica.Winner.Y, "tie": evalica.Winner.Draw}
    result = evalica.bradley_terry(
        [r[0] for r in rows],
        [r[1] for r in rows],
        [winners[r[2]] for r in rows],
        weights=weights,
        tolerance=1e-12,
        limit=100_000,
    )
    return dict(result.scores / result.scores.sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_ratings_equal_evalica_s_maximum_with_ties_and_weights(tmp_path, seed):
    rows = tournament(list("abcde"), 400, seed=seed)
    weights = np.random.default_rng(seed).choice([0.5, 1.0, 3.0], len(rows)).tolist()
    plain = rate(read_battles(write_csv(tmp_path / "a.csv", rows)), baseline=None, resampling=QUICK)
    assert strength_shares(plain) == pytest.approx(evalica_scores(rows), rel=1e-6)
    weighted = write_csv(
        tmp_path / "b.csv",
        [(*row, w) for row, w in zip(rows, weights, strict=True)],
        ("left", "right", "winner", "weight"),
    )
    heavy = rate(read_battles(weighted), baseline=None, resampling=QUICK)
    assert strength_shares(heavy) == pytest.approx(evalica_scores(rows, weights), rel=1e-6)


def test_where_all_fight_the_baseline_the_score_is_the_weighted_win_rate(tmp_path):
    rows = [("base", "x", w) for w in ["left"] * 30 + ["right"] * 50 + ["tie"] * 21]
    ratings = rate(read_battles(write_csv(tmp_path / "a.csv", rows)), baseline="base", resampling=QUICK)
    x = ratings.models[0]
    assert x.score.value == pytest.approx(x.win_rate.value) == pytest.approx(100 * 60.5 / 101)
    assert x.rating.value == pytest.approx(1000 + 400 * np.log10(60.5 / 40.5))
    assert (ratings.models[1].rating.value, ratings.models[1].score.value) == (1000, 50)


def test_two_games_of_one_prompt_widen_the_interval_by_prompt_and_not_the_one_by_row(tmp_path):
    generator = np.random.default_rng(0)
    outcomes = generator.choice(["left", "right"], 150)
    rows = [("base", "x", o, f"prompt {i}") for i, o in enumerate(outcomes) for _ in range(4)]
    battles = read_battles(write_csv(tmp_path / "a.csv", rows, ("left", "right", "winner", "prompt")))
    score = rate(battles, baseline="base", resampling=Resampling(0.95, 1000, 0)).models[0].score
    width = lambda interval: interval.high - interval.low  # noqa: E731
    assert 1.7 < width(score.by_prompt) / width(score.by_row) < 2.3
    assert score.by_rater is None


def test_who_never_lost_has_no_finite_rating_and_the_others_keep_theirs(tmp_path):
    rows = [*tournament(list("abc"), 100), *[("king", model, "left") for model in "abc" for _ in range(5)]]
    ratings = rate(read_battles(write_csv(tmp_path / "a.csv", rows)), baseline="a", resampling=QUICK)
    king = next(m for m in ratings.models if m.model == "king")
    assert (king.rating, king.score, king.win_rate.value) == (None, None, 100)
    assert {m.model for m in ratings.models if m.rating is not None} == set("abc")


def test_a_tournament_s_average_win_rate_counts_each_opponent_once(tmp_path):
    rows = [("a", "b", "left")] * 9 + [("a", "c", "right")]
    a = next(
        m
        for m in rate(read_battles(write_csv(tmp_path / "a.csv", rows)), baseline=None, resampling=QUICK).models
        if m.model == "a"
    )
    assert (a.win_rate.value, a.average_win_rate.value) == (90, 50)


def test_style_control_finds_the_strength_behind_the_length_and_does_not_centre_it_away(tmp_path):
    """Both models are equally good, the candidate always writes more, and length alone wins."""
    generator = np.random.default_rng(0)
    rows = []
    for i in range(1200):
        short, long = "word " * int(generator.integers(10, 40)), "word " * int(generator.integers(10, 90))
        gap = (len(long) - len(short)) / (len(long) + len(short))
        won = generator.random() < 1 / (1 + np.exp(-3 * gap))
        rows.append(("base", "x", "right" if won else "left", str(i), short, long))
    columns = ("left", "right", "winner", "prompt", "left_text", "right_text")
    battles = read_battles(write_csv(tmp_path / "a.csv", rows, columns))
    raw = rate(battles, baseline="base", resampling=QUICK).models[0].score
    equal = rate(battles, baseline="base", style=STYLE_FEATURES, resampling=QUICK)
    assert raw.by_prompt.low > 55
    assert equal.models[0].score.by_prompt.low < 50 < equal.models[0].score.by_prompt.high
    assert equal.style["length"].by_prompt.low > 0.5
    assert equal.style["headers"].value == 0


def test_style_counts_markdown_outside_of_code(tmp_path):
    rich = "# Head\n- one\n* two\n1. three\n**bold** __also__\n```\n# no\n- no\n```"
    rows = [("a", "b", "left", rich, "plain"), ("a", "b", "right", "plain", "plain")]
    columns = ("left", "right", "winner", "left_text", "right_text")
    gaps = style_features(read_battles(write_csv(tmp_path / "a.csv", rows, columns)), STYLE_FEATURES)
    # A gap of a / (a + 1), over its root mean square sqrt(gap^2 / 2).
    assert gaps[0] == pytest.approx([np.sqrt(2)] * 4)
    assert gaps[1] == pytest.approx([0.0] * 4)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a", "b", "won")], ("left", "right", "winner"), "line 2: `winner` is 'won'"),
        ([("a", "a", "left")], ("left", "right", "winner"), "stands against itself"),
        ([("a", "b", "left", "nan")], ("left", "right", "winner", "weight"), "`weight` must be a number above 0"),
        ([("a", "b", "left", "0")], ("left", "right", "winner", "weight"), "`weight` must be a number above 0"),
        ([("a", "", "left")], ("left", "right", "winner"), "`right` must be a name"),
        ([("a", "b", "left")], ("left", "right", "won"), "`left`, `right`, `winner` are needed"),
        ([], ("left", "right", "winner"), "holds no battles"),
    ],
)
def test_what_is_no_battle_is_named(tmp_path, rows, columns, message):
    with pytest.raises(DataError, match=message):
        read_battles(write_csv(tmp_path / "a.csv", rows, columns))


def test_the_command_rates_arena_hard_s_rows_and_names_what_it_did_not_use(tmp_path):
    rows = [
        {"question_id": str(i // 2), "model_a": "base", "model_b": "x", "winner": w, "tstamp": 1}
        for i, w in enumerate(["model_a", "model_b", "tie", "tie (bothbad)"] * 5)
    ]
    path = tmp_path / "battles.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    result = CliRunner().invoke(cli, ["ratings", str(path), "--baseline", "base", "--level", "0.9", "--json"])
    found = json.loads(result.output)
    assert (found["level"], found["n_battles"], found["n_prompts"]) == (0.9, 20, 10)
    assert found["models"][0]["score"]["value"] == pytest.approx(50)
    assert found["models"][0]["score"]["by_prompt"]["low"] <= 50
    assert found["unused_columns"] == ["tstamp"]
    shown = CliRunner().invoke(cli, ["ratings", str(path), "--baseline", "base"])
    assert "95% intervals by row and prompt (10)" in " ".join(shown.output.split())
    assert "not used: tstamp" in shown.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "y"], "the models are a, b"),
        (["--style-control"], "needs the two answers"),
        (["--answers", "x"], "has no effect without --style-control"),
    ],
)
def test_an_option_that_cannot_work_is_refused(tmp_path, options, message):
    path = write_csv(tmp_path / "a.csv", [("a", "b", "left")])
    result = CliRunner().invoke(cli, ["ratings", path, *options])
    assert result.exit_code != 0
    assert message in str(result.exception)


class TestPublished:
    """What Arena-Hard publishes, where its files are at hand; its scores are in test_published.py."""

    def test_style_control_is_not_centred(self, published):
        folder = published / "arena_hard" / "v0.1"
        battles = read_battles(str(folder / "battles_gpt-4-0314_baseline.jsonl"))
        texts = read_answer_texts([str(folder / f"answer_{model}.jsonl.gz") for model in battles.models])
        ratings = rate(with_texts(battles, texts), baseline="gpt-4-0314", style=STYLE_FEATURES, resampling=QUICK)
        scores = {m.model: m.score.value for m in ratings.models}
        assert scores["gpt-4-0613"] == pytest.approx(41.8, abs=0.3)
        assert scores["gpt-3.5-turbo-0125"] == pytest.approx(26.6, abs=0.3)
