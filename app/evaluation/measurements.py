"""Everything that was measured on a candidate beside the suites, as metrics by name.

Numbers of candidate and champion become a change or a ratio, so that one threshold fits every model. This module
measures nothing and decides nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.evaluation.intervals import Estimate
from app.evaluation.judge_health import JudgeHealth
from app.evaluation.learning import Learning
from app.evaluation.metrics import Metric, estimated, plain
from app.evaluation.suites import GoldenResult, WinRate


@dataclass(frozen=True, slots=True)
class Sides:
    """The same number for the candidate and for the champion."""

    candidate: float
    champion: float

    @property
    def change(self) -> float:
        """The candidate's less the champion's."""
        return self.candidate - self.champion

    @property
    def ratio(self) -> float:
        """The candidate's over the champion's; a champion of 0 and less is beaten by any candidate that is not below 0."""
        if self.champion <= 0:
            return 1.0 if self.candidate >= 0 else 0.0
        return self.candidate / self.champion


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was measured. None: the recipe gives nothing to measure it on."""

    over_champion: WinRate
    over_sft: WinRate
    length_ratio: Estimate
    finished: Sides
    looping: Sides
    distinct: Sides
    relevance: Sides
    golden: tuple[GoldenResult, ...] | None
    perplexity: Sides | None
    reward_accuracy: Estimate | None
    n_prompts: int
    judge: JudgeHealth | None = None
    """None: rules judge, or nothing was compared."""
    learning: Learning | None = None
    """How the held-out pairs are ranked, by length too; None where there are none."""

    def metrics(self) -> list[Metric]:
        """Return them by name."""
        over = self.over_champion
        left_out = over.invalid_candidate + over.invalid_baseline
        note = (
            f"judged prompts; {left_out} left out, an answer was empty or cut by the token limit"
            if left_out
            else "judged prompts"
        )
        found = [
            plain("prompts", float(over.estimate.n), over.estimate.n, note),
            _win_rate("win_rate.champion", over),
            _win_rate("win_rate.sft", self.over_sft),
            _accuracy(self.reward_accuracy),
            estimated(
                "length_ratio",
                self.length_ratio,
                "tokens against the champion's"
                if self.length_ratio.n
                else "no prompt has two answers whose lengths could be compared",
            ),
            self._sides("finished", self.finished, "change"),
            self._sides("repetition", self.looping, "change"),
            self._sides("distinct", self.distinct, "ratio"),
            self._sides("relevance", self.relevance, "ratio"),
        ]
        if self.perplexity is not None:
            found.append(self._sides("perplexity", self.perplexity, "ratio"))
        if self.golden is not None:
            found += _golden(self.golden)
        if self.judge is not None:
            found.append(_judge(self.judge))
        return found + _preference(self.learning)

    def _sides(self, name: str, sides: Sides, how: str) -> Metric:
        value = sides.change if how == "change" else sides.ratio
        note = f"{name}: candidate {sides.candidate:.3g}, champion {sides.champion:.3g}"
        return plain(f"{name}.{how}", value, self.n_prompts, note)


def _win_rate(name: str, measured: WinRate) -> Metric:
    note = f"{measured.wins} wins, {measured.ties} ties, {measured.losses} losses"
    return estimated(name, measured.estimate, note if measured.estimate.n else "no answer could be judged")


def _accuracy(estimate: Estimate | None) -> Metric:
    if estimate is None or estimate.method == "empty":
        note = "no held-out pairs, a run that imitates, or no run of this product; set evaluate.gate.rules.reward_accuracy to null to do without"
        return Metric("reward_accuracy", None, None, None, 0, note)
    return estimated("reward_accuracy", estimate, "held-out pairs ranked as they were labelled; about 0.5 is chance")


def _preference(learning: Learning | None) -> list[Metric]:
    """Return what held-out pairs say beside their accuracy: what length alone would give, and displacement."""
    if learning is None:
        return []
    n, best = learning.pairs, max(0.5, learning.shorter, learning.longer)
    gain = learning.accuracy - best
    note = (
        f"accuracy over the best of chance, the shorter ({learning.shorter:.3g}) and the longer ({learning.longer:.3g})"
    )
    found = [
        Metric(
            "preference.gain",
            gain,
            learning.low - best,
            learning.high - best,
            n,
            note,
            learning.clusters,
            learning.level,
        )
    ]
    buckets = (*learning.by_length, *learning.by_source)
    found += [plain(f"preference.accuracy.{b.name.replace(' ', '_')}", b.accuracy, b.pairs) for b in buckets]
    if learning.chosen_change is not None:
        fell = f"nats a token that held-out chosen answers became more likely; {learning.chosen_fell or 0:.0%} became less so"
        found.append(plain("chosen_change", learning.chosen_change, n, fell))
    return found


def _golden(results: Sequence[GoldenResult]) -> list[Metric]:
    must = [result for result in results if result.must_pass]
    metrics = [_passed("golden.pass_rate", results)]
    return [*metrics, _passed("golden.must_pass", must)] if must else metrics


def _passed(name: str, results: Sequence[GoldenResult]) -> Metric:
    failed = [result for result in results if not result.passed]
    note = f"{len(results) - len(failed)} of {len(results)} passed"
    note += "".join(f"; `{result.id}` {result.reason}" for result in failed)
    return plain(name, 1 - len(failed) / len(results), len(results), note)


def _judge(health: JudgeHealth) -> Metric:
    note = (
        "; ".join(health.reasons)
        or f"{health.readable:.0%} of its verdicts read, {health.flips.value:.0%} of its pairs flip"
    )
    return plain(
        "judge.usable",
        float(health.usable),
        health.comparisons,
        f"the judge is {'usable' if health.usable else 'unusable'}: {note}",
    )
