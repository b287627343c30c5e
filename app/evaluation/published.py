"""Our numbers beside the published ones, from the files that their authors published: `evaluate --verify-published DIR`.

    arena_hard/v0.1            scores, intervals by row, the nine full judgements
    alpaca_eval_results        raw win rates, length-controlled rates from the published weights, refits
    evalica_golden             Bradley-Terry scores and average win rates
    mt_bench_judgments         verdicts of pairs, consistency, flips
    xstest                     the string matcher's labels, Llama 2's refusals by its human labels

The published values stand here; the files are not bundled. This module decides nothing: a difference is a number.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from app.evaluation.battles import read_battles
from app.evaluation.intervals import Resampling
from app.evaluation.length_control import Prior, fit, predicted_rate
from app.evaluation.ratings import Ratings, rate
from app.evaluation.rows import read_rows
from app.evaluation.verdicts import STRENGTHS, games, parse_verdict, refuses

_RESAMPLING: Final = Resampling(level=0.95, samples=5000, seed=0)
_ARENA: Final = {"gpt-4-0613": (37.90, 35.6, 40.36), "gpt-3.5-turbo-0125": (23.34, 21.67, 25.27)}
"""Score and ends of the interval: arena_hard_leaderboard_20240731.csv."""
_WIDENING: Final = 1.6
"""How much wider intervals by prompt are than those by row; our own finding, so the tolerance is wide."""
_REFITS: Final = {
    "FuseChat-Llama-3.1-8B-Instruct": 64.93,
    "FuseChat-Qwen-2.5-7B-Instruct": 63.76,
    "claude-2.1": 24.74,
    "gpt4_0613_concise": 22.61,
}
"""Length-controlled rates refitted with the published difficulties and without the gamed rows."""
_LC_WITHIN = 0.02
_LC_EXPECTED: Final = (199, 197)
_XSTEST_MODELS: Final = ("gpt4", "llama2new", "llama2orig", "mistralinstruct")
_MT_BENCH: Final = {"valid pairs": 73, "consistent": 46, "flips": 18, "flips won by whoever stood first": 16}


@dataclass(frozen=True, slots=True)
class Check:
    """One number of ours beside the published one."""

    what: str
    ours: float
    published: float
    tolerance: float

    @property
    def difference(self) -> float:
        """Ours less the published one."""
        return self.ours - self.published

    @property
    def holds(self) -> bool:
        """Whether they differ by no more than the tolerance."""
        return abs(self.difference) <= self.tolerance


def verify_published(folder: str) -> Iterator[Check]:
    """Yield every comparison, in the order of the module's table.

    Args:
        folder: path or URI of the folder that holds the files.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    for part in (_arena_hard, _alpaca_eval, _evalica, _mt_bench, _xstest):
        yield from part(folder.rstrip("/"))


def _arena_hard(folder: str) -> Iterator[Check]:
    place = f"{folder}/arena_hard/v0.1"
    battles = read_battles(f"{place}/battles_gpt-4-0314_baseline.jsonl")
    scores = {m.model: m.score for m in rate(battles, baseline="gpt-4-0314", resampling=_RESAMPLING).models}
    for model, (score, low, high) in _ARENA.items():
        found = scores[model]
        assert found is not None  # noqa: S101  both won and lost battles
        assert found.by_prompt is not None  # noqa: S101  the file names its questions
        yield Check(f"Arena-Hard v0.1, {model}: score", round(found.value, 2), score, 0.0)
        yield Check(f"Arena-Hard v0.1, {model}: lower end by row", found.by_row.low, low, 0.5)
        yield Check(f"Arena-Hard v0.1, {model}: upper end by row", found.by_row.high, high, 0.5)
        wider = (found.by_prompt.high - found.by_prompt.low) / (found.by_row.high - found.by_row.low)
        yield Check(f"Arena-Hard v0.1, {model}: interval by prompt, times that by row", wider, _WIDENING, 0.15)
    played = [game for _, row in read_rows(f"{place}/judgment_sample_gpt-4o_llama3_8b.jsonl") for game in row["games"]]
    parsed = sum(parse_verdict(game["judgment"]) == STRENGTHS[game["score"]] for game in played)
    yield Check("Arena-Hard v0.1, games of the full judgements that parse to their score", parsed, len(played), 0.0)


def _alpaca_eval(folder: str) -> Iterator[Check]:
    place = f"{folder}/alpaca_eval_results"
    difficulty = [
        float(row["instruction_difficulty"])
        for _, row in read_rows(f"{place}/instruction_difficulty_reconstructed.csv")
    ]
    board = {row[""]: row for _, row in read_rows(f"{place}/alpaca_eval_2_leaderboard.csv")}
    annotations: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, row in read_rows(f"{place}/annotations_compact.csv.gz"):
        annotations[row["model"]].append(row)
    for model, rows in annotations.items():
        # A stored 0 is a tie.
        points = np.array([(float(row["preference"]) or 1.5) - 1 for row in rows])
        published = float(board[model]["win_rate"])
        yield Check(f"AlpacaEval 2, {model}: raw win rate", float(100 * points.mean()), published, 1e-9)
        if model in _REFITS:
            gaps = np.array([float(row["len_1"]) - float(row["len_2"]) for row in rows])
            hard = np.array([difficulty[int(row["index"])] for row in rows])
            design = np.stack([np.ones_like(gaps), np.tanh(gaps / gaps.std(ddof=1)), hard], axis=1)
            theta, _, psi = fit(design, points, np.ones((1, len(points))), Prior())[0]
            refit = 100 * predicted_rate(theta, psi, difficulty)
            yield Check(f"AlpacaEval 2, {model}: refit without gamed rows", refit, _REFITS[model], 0.02)
    errors = []
    for _, row in read_rows(f"{place}/glm_weights_length_controlled_v1.csv"):
        model, _, psi, theta = row.values()
        if model in board:
            published = float(board[model]["length_controlled_winrate"])
            errors.append(abs(100 * predicted_rate(float(theta), float(psi), difficulty) - published))
    within = sum(error <= _LC_WITHIN for error in errors)
    yield Check("AlpacaEval 2, models whose length-controlled rate is predicted", len(errors), _LC_EXPECTED[0], 0.0)
    yield Check(f"AlpacaEval 2, of them within {_LC_WITHIN}", within, _LC_EXPECTED[1], 0.0)


def _evalica(folder: str) -> Iterator[Check]:
    for name in ("simple", "food"):
        place = f"{folder}/evalica_golden/{name}"
        rated = rate(read_battles(f"{place}.csv"), baseline=None, resampling=Resampling(samples=100))
        strengths = strength_shares(rated)
        averages = {m.model: m.average_win_rate.value / 100 for m in rated.models}
        for _, row in read_rows(f"{place}-golden.csv"):
            ours = {"bradley_terry": strengths, "average_win_rate": averages}.get(row["algorithm"])
            if ours is not None:
                what = f"evalica {name}, {row['item']}: {row['algorithm']}"
                yield Check(what, ours[row["item"]], float(row["score"]), 1e-6)


def _mt_bench(folder: str) -> Iterator[Check]:
    winners = {1: ("model_1", "model_2"), -1: ("model_2", "model_1"), 0: ("tie", "tie"), None: ("error", "error")}
    found, read, stored = [], 0, 0
    for _, row in read_rows(f"{folder}/mt_bench_judgments/gpt-4_pair.jsonl"):
        first, second = parse_verdict(row["g1_judgment"]), parse_verdict(row["g2_judgment"])
        read += (winners[first][0] == row["g1_winner"]) + (winners[second][1] == row["g2_winner"])
        stored += 2
        found.append(games(first, second))
    yield Check("MT-Bench pairs, games that parse to their winner", read, stored, 0.0)
    valid = [g for g in found if g.complete]
    ours = (
        len(valid),
        sum(g.consistent for g in valid),
        sum(g.flipped for g in valid),
        sum(g.first_position_won for g in valid),
    )
    for (what, published), count in zip(_MT_BENCH.items(), ours, strict=True):
        yield Check(f"MT-Bench pairs, phi-3 against phi-3-dpo: {what}", count, published, 0.0)


def _xstest(folder: str) -> Iterator[Check]:
    place = f"{folder}/xstest"
    labels = {(row["model"], row["id"]): row for _, row in read_rows(f"{place}/labels.csv")}
    for model in _XSTEST_MODELS:
        rows = [row for _, row in read_rows(f"{place}/completions_{model}.csv.gz")]
        agreed = sum(
            labels[model, row["id"]]["strmatch_label"]
            == ("2_full_refusal" if refuses(row["completion"]) else "1_full_compliance")
            for row in rows
        )
        yield Check(f"XSTest, {model}: labels of the string matcher", agreed, len(rows), 0.0)
    safe = Counter(
        row["final_label"]
        for (model, _), row in labels.items()
        if model == "llama2orig" and not row["type"].startswith("contrast")
    )
    for label, published in (("2_full_refusal", 38.0), ("3_partial_refusal", 21.6)):
        share = 100 * safe[label] / safe.total()
        yield Check(f"XSTest, Llama 2 on safe prompts: {label[2:]} in percent", share, published, 0.05)


def strength_shares(ratings: Ratings) -> dict[str, float]:
    """Return Bradley-Terry strengths that add up to 1, as evalica's golden files have them."""
    strengths = {m.model: 10 ** ((m.rating.value - 1000) / 400) for m in ratings.models if m.rating is not None}
    return {name: strength / sum(strengths.values()) for name, strength in strengths.items()}
