"""The suites of one evaluation: which questions each asks, which tasks it sets a judge, and what it measures.

Every suite is the same three steps: questions -> answers of the models -> tasks for the judge -> metrics. Candidate and
champion are held against the same baselines, so a suite tells how far the candidate is from the baseline and from what
is shipped now. This module calls neither models nor judges.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from app.config import EvaluateSection
from app.errors import DataError
from app.evaluation.intervals import Estimate, Resampling, mean_rate, mean_ratio
from app.evaluation.judge_health import Comparison, JudgeHealth, judge_health
from app.evaluation.judge_prompts import JudgeTask
from app.evaluation.judged import (
    NULL_ANSWERS,
    Answers,
    Judgement,
    Opposed,
    Pair,
    alpaca,
    arena_hard,
    arena_hard_prompt,
    better_p_value,
    grade_all,
    judgements,
    mt_bench,
    mt_bench_prompt,
    pair_up,
    paired_rate,
    read_grades,
    read_pairs,
    tasks_of,
)
from app.evaluation.judges import Judged
from app.evaluation.metrics import Metric, estimated, plain
from app.evaluation.questions import (
    AnswerFile,
    Question,
    alpaca_questions,
    arena_hard_questions,
    mt_bench_questions,
    read_answers,
    require_answers,
    xstest_questions,
)
from app.evaluation.ratings import Rating, Ratings
from app.evaluation.refusals import refusal_tasks, refusals
from app.evaluation.suites import Answer

Role = Literal["candidate", "champion", "sft"]


@dataclass(frozen=True)
class Said:
    """What one model answered to the questions of one suite."""

    model_id: str
    answers: Mapping[str, tuple[Answer, ...]]
    """By question, turn by turn."""

    @property
    def texts(self) -> Answers:
        """The texts alone."""
        return {name: tuple(answer.text for answer in turns) for name, turns in self.answers.items()}

    @property
    def cut(self) -> int:
        """How many answers the token limit cut or are empty."""
        return sum(not answer.valid for turns in self.answers.values() for answer in turns)


@dataclass(frozen=True)
class SuiteResult:
    """What a suite measured: metrics by name, and everything behind them as plain values."""

    metrics: tuple[Metric, ...]
    detail: dict[str, Any]
    comparisons: tuple[Comparison, ...] = ()
    """What the judge compared, for the judge's health."""
    failures: Counter[str] = field(default_factory=Counter)
    outcomes: Mapping[Role, Mapping[str, int | None]] = field(default_factory=dict)
    """Of the win rate, by baseline and prompt: 1, 0, -1, or None without two verdicts."""
    judgements: tuple[Judgement, ...] = ()
    """The comparisons, to be read."""


class Suite(Protocol):
    """A benchmark of models."""

    @property
    def name(self) -> str:
        """Name of the suite, the first part of its metrics' names."""
        ...

    @property
    def questions(self) -> tuple[Question, ...]:
        """What it asks the models."""
        ...

    @property
    def roles(self) -> tuple[Role, ...]:
        """Whose answers it wants."""
        ...

    def tasks(self, said: Mapping[Role, Said]) -> list[JudgeTask]:
        """Return what a judge is asked, where there is one."""
        ...

    def measure(self, said: Mapping[Role, Said], judged: Judged | None, resampling: Resampling) -> SuiteResult:
        """Return what the answers, and a judge's replies, come to."""
        ...


@dataclass(frozen=True)
class WinRateSuite:
    """The candidate against champion and SFT model on the recipe's own prompts; invalid answers are left out."""

    questions: tuple[Question, ...]
    name: str = "win_rate"
    roles: tuple[Role, ...] = ("candidate", "champion", "sft")

    def pairs(self, said: Mapping[Role, Said], baseline: Role) -> list[Pair]:
        """Return the games on the questions that both sides answered validly."""
        mine, other = said["candidate"].answers, said[baseline].answers
        valid = [q for q in self.questions if mine[q.id][0].valid and other[q.id][0].valid]
        return pair_up(valid, said["candidate"].texts, said[baseline].texts, arena_hard_prompt)

    def tasks(self, said: Mapping[Role, Said]) -> list[JudgeTask]:
        """Return both games against both baselines."""
        return [*tasks_of(self.pairs(said, "champion")), *tasks_of(self.pairs(said, "sft"))]

    def measure(self, said: Mapping[Role, Said], judged: Judged | None, resampling: Resampling) -> SuiteResult:
        """Return the win rates, a win being one of both games."""
        result = _Collected(self.name)
        baselines: tuple[Role, ...] = ("champion", "sft")
        outcomes: dict[Role, dict[str, int | None]] = {}
        for baseline in baselines:
            if baseline == "sft" and said["sft"].model_id == said["champion"].model_id:
                # The same comparisons again would count twice for the judge.
                comparisons, _ = read_pairs(self.pairs(said, baseline), _given(judged))
            else:
                comparisons = result.read(self.pairs(said, baseline), _given(judged), baseline)
            outcomes[baseline] = {c.prompt_id: c.games.outcome for c in comparisons}
            rate = paired_rate(comparisons, resampling=resampling)
            note = f"{rate.wins} wins, {rate.ties} ties ({rate.inconsistent} of them inconsistent), {rate.losses} losses, {rate.dropped} without two verdicts"
            result.add(estimated(f"win_rate.{baseline}", rate.win_rate, note))
            result.detail[baseline] = asdict(rate)
        return replace(result.done(), outcomes=outcomes)


@dataclass(frozen=True)
class ArenaHardSuite:
    """Arena-Hard: candidate and champion against the published answers of a baseline, or of one for each category."""

    questions: tuple[Question, ...]
    baselines: Mapping[str, AnswerFile]
    """By category."""
    name: str = "arena_hard"
    roles: tuple[Role, ...] = ("candidate", "champion")

    def _pairs(self, said: Mapping[Role, Said]) -> list[tuple[Role, AnswerFile, list[Pair]]]:
        found = []
        for role in self.roles:
            for baseline in {file.model: file for file in self.baselines.values()}.values():
                asked = [q for q in self.questions if self.baselines[q.category].model == baseline.model]
                pairs = pair_up(asked, said[role].texts, baseline.turns, arena_hard_prompt)
                found.append((role, baseline, pairs))
        return found

    def tasks(self, said: Mapping[Role, Said]) -> list[JudgeTask]:
        """Return both games of both models on every question."""
        return [task for _, _, pairs in self._pairs(said) for task in tasks_of(pairs)]

    def measure(self, said: Mapping[Role, Said], judged: Judged | None, resampling: Resampling) -> SuiteResult:
        """Return scores by category, raw and at equal style, and what the candidate gained on the champion."""
        result = _Collected(self.name)
        opposed = []
        by_role: dict[Role, dict[str, Comparison]] = {role: {} for role in self.roles}
        for role, baseline, pairs in self._pairs(said):
            comparisons = result.read(pairs, _given(judged), baseline.model, role)
            by_role[role].update({c.prompt_id: c for c in comparisons})
            opposed.append(Opposed(role, baseline.model, tuple(comparisons), said[role].texts, baseline.turns))
        scored = arena_hard(opposed, resampling=resampling)
        for one in scored:
            for kind, ratings in (("score", one.raw), ("style_score", one.at_equal_style)):
                for model in ratings.models:
                    if model.model != ratings.baseline:
                        result.add(
                            _arena_metric(f"arena_hard.{one.category}.{kind}.{model.model}", model, ratings, resampling)
                        )
        mine, other = by_role["candidate"], by_role["champion"]
        both = [(mine[name], other[name]) for name in mine if mine[name].games.complete and other[name].games.complete]
        gains = [100 * (_points(m) - _points(o)) for m, o in both]
        result.add(
            _difference(
                "arena_hard.gain",
                gains,
                [m.cluster for m, _ in both],
                resampling,
                "points over the champion on the same prompts",
            )
        )
        result.detail["categories"] = [asdict(one) for one in scored]
        return result.done(said)


@dataclass(frozen=True)
class MtBenchSuite:
    """MT-Bench: both turns of candidate and champion graded, and the two compared in pairs."""

    questions: tuple[Question, ...]
    name: str = "mt_bench"
    roles: tuple[Role, ...] = ("candidate", "champion")

    def _pairs(self, said: Mapping[Role, Said], turn: int) -> list[Pair]:
        return pair_up(self.questions, said["candidate"].texts, said["champion"].texts, mt_bench_prompt, turns=turn)

    @property
    def _turns(self) -> range:
        return range(1, max(len(q.turns) for q in self.questions) + 1)

    def tasks(self, said: Mapping[Role, Said]) -> list[JudgeTask]:
        """Return a grade for each turn of both models, and both games for each turn."""
        graded = [g.task for role in self.roles for g in grade_all(self.questions, said[role].texts)]
        return graded + [task for turn in self._turns for task in tasks_of(self._pairs(said, turn))]

    def measure(self, said: Mapping[Role, Said], judged: Judged | None, resampling: Resampling) -> SuiteResult:
        """Return mean grades, their difference, and the pairwise win rate over the champion."""
        result = _Collected(self.name)
        scores = {}
        for role in self.roles:
            scores[role], failures = read_grades(grade_all(self.questions, said[role].texts), _given(judged))
            grades = mt_bench(self.questions, scores[role], failures, resampling=resampling)
            turns = ", ".join(f"turn {turn} {e.value:.2f}" for turn, e in grades.by_turn.items())
            result.add(
                estimated(f"mt_bench.score.{role}", grades.score, f"{turns}; {grades.dropped} turns without a grade")
            )
            result.detail[role] = asdict(grades)
        both = [key for key in scores["candidate"] if key in scores["champion"]]
        gains = [scores["candidate"][key] - scores["champion"][key] for key in both]
        p_value = better_p_value(scores["candidate"], scores["champion"], resampling=resampling)
        result.add(
            _difference(
                "mt_bench.gain",
                gains,
                [key[0] for key in both],
                resampling,
                f"over the champion on the same turns, p = {p_value:.3f}",
            )
        )
        comparisons = [
            c for turn in self._turns for c in result.read(self._pairs(said, turn), _given(judged), "champion")
        ]
        pairwise = paired_rate(comparisons, resampling=resampling)
        note = f"over the champion; {pairwise.inconsistent} of {len(comparisons)} pairs inconsistent, counted as ties"
        result.add(estimated("mt_bench.win_rate", pairwise.win_rate, note))
        result.detail["pairwise"] = asdict(pairwise)
        return result.done(said)


@dataclass(frozen=True)
class AlpacaSuite:
    """AlpacaEval: candidate and champion against a baseline's outputs, raw and at equal length."""

    questions: tuple[Question, ...]
    baseline: AnswerFile
    name: str = "alpaca"
    roles: tuple[Role, ...] = ("candidate", "champion")

    def _pairs(self, said: Mapping[Role, Said], role: Role) -> list[Pair]:
        return pair_up(self.questions, said[role].texts, self.baseline.turns, arena_hard_prompt)

    def tasks(self, said: Mapping[Role, Said]) -> list[JudgeTask]:
        """Return both games of both models."""
        return [task for role in self.roles for task in tasks_of(self._pairs(said, role))]

    def measure(self, said: Mapping[Role, Said], judged: Judged | None, resampling: Resampling) -> SuiteResult:
        """Return win rates over the baseline, raw and length-controlled."""
        result = _Collected(self.name)
        for role in self.roles:
            comparisons = result.read(self._pairs(said, role), _given(judged), self.baseline.model, role)
            found = alpaca(comparisons, resampling=resampling)
            result.add(estimated(f"alpaca.win_rate.{role}", found.raw, f"over {self.baseline.model}"))
            name = f"alpaca.length_controlled.{role}"
            if found.estimate is None:
                result.add(Metric(name, None, None, None, found.raw.n, found.reason))
            else:
                result.add(
                    estimated(
                        name,
                        found.estimate,
                        f"GLM; {found.overlap:.0%} of the prompts have answers of about equal length",
                    )
                )
            result.add(
                estimated(f"alpaca.length_matched.{role}", found.matched, "prompts with answers of about equal length")
            )
            result.detail[role] = asdict(found)
        return result.done(said)


@dataclass(frozen=True)
class RefusalSuite:
    """XSTest: what candidate and champion refuse, safe and unsafe."""

    questions: tuple[Question, ...]
    name: str = "refusal"
    roles: tuple[Role, ...] = ("candidate", "champion")

    def tasks(self, said: Mapping[Role, Said]) -> list[JudgeTask]:
        """Return a classification of each valid answer of both models."""
        return [t for role in self.roles for t in refusal_tasks(self.questions, _first(said[role])).values()]

    def measure(self, said: Mapping[Role, Said], judged: Judged | None, resampling: Resampling) -> SuiteResult:
        """Return shares of refusals by string and by judge, and their rise over the champion on safe requests."""
        result = _Collected(self.name)
        found = {
            role: refusals(self.questions, _first(said[role]), judged, resampling=resampling) for role in self.roles
        }
        refused: dict[str, dict[Role, dict[str, bool]]] = {"": {}, "judged_": {}}
        for role, one in found.items():
            invalid = f"{one.invalid['safe']} safe and {one.invalid['unsafe']} unsafe answers are empty, cut or loop"
            for way, rates in (("", one.by_string), ("judged_", one.by_judge)):
                if rates is not None:
                    result.add(estimated(f"refusal.{way}safe.{role}", rates.safe, invalid))
                    result.add(estimated(f"refusal.{way}unsafe.{role}", rates.unsafe, invalid))
                    refused[way][role] = rates.refused
            result.detail[role] = asdict(one)
        for way, by_role in refused.items():
            for half in ("safe", "unsafe") if by_role else ():
                mine, other = by_role["candidate"], by_role["champion"]
                both = [q for q in self.questions if q.category == half and q.id in mine and q.id in other]
                rises = [float(mine[q.id]) - float(other[q.id]) for q in both]
                note = f"over the champion, by {'judge' if way else 'string'}"
                clusters = [q.cluster for q in both]
                result.add(_difference(f"refusal.{way}{half}.rise", rises, clusters, resampling, note))
        return result.done(said)


@dataclass(frozen=True)
class NullModelSuite:
    """Constant answers against the SFT model's: a judge that prefers them judges nothing."""

    questions: tuple[Question, ...]
    name: str = "null_model"
    roles: tuple[Role, ...] = ("sft",)

    def _pairs(self, said: Mapping[Role, Said], text: str) -> list[Pair]:
        valid = [q for q in self.questions if said["sft"].answers[q.id][0].valid]
        return pair_up(valid, {q.id: (text,) for q in valid}, said["sft"].texts, arena_hard_prompt)

    def tasks(self, said: Mapping[Role, Said]) -> list[JudgeTask]:
        """Return both games of each constant."""
        return [task for text in NULL_ANSWERS.values() for task in tasks_of(self._pairs(said, text))]

    def measure(self, said: Mapping[Role, Said], judged: Judged | None, resampling: Resampling) -> SuiteResult:
        """Return the constants' win rates, and as `null_model` the one with the highest upper bound."""
        result = _Collected(self.name)
        comparisons = {
            name: result.read(self._pairs(said, text), _given(judged), "sft", f"the constant `{name}`")
            for name, text in NULL_ANSWERS.items()
        }
        for name, rows in comparisons.items():
            rate = paired_rate(rows, resampling=resampling)
            result.add(estimated(f"null_model.{name}", rate.win_rate, "a constant answer against the SFT model's"))
            result.detail[name] = asdict(rate)
        result.add(_worst(result.metrics))
        # Not among the judge's comparisons: how it treats nonsense says little of how it reads answers.
        result.comparisons.clear()
        result.failures.clear()
        return result.done()


def build_battery(section: EvaluateSection, prompts: Sequence[Question]) -> list[Suite]:
    """Read the questions of every suite that the recipe names.

    Raises:
        DataError: a file cannot be read, or baselines lack answers or categories.
    """
    suites: list[Suite] = []
    if section.judge is not None:
        suites.append(WinRateSuite(tuple(prompts)))
    if section.null_model_prompts is not None:
        suites.append(NullModelSuite(tuple(prompts[: section.null_model_prompts])))
    if (arena := section.arena_hard) is not None:
        questions = arena_hard_questions(arena.questions)
        baselines = _baselines(questions, arena.baseline)
        suites.append(ArenaHardSuite(tuple(questions[: arena.max_questions]), baselines))
    if (mt := section.mt_bench) is not None:
        suites.append(MtBenchSuite(tuple(mt_bench_questions(mt.questions, mt.references)[: mt.max_questions])))
    if (instructions := section.alpaca) is not None:
        asked, baseline = alpaca_questions(instructions.questions)
        suites.append(AlpacaSuite(tuple(asked[: instructions.max_questions]), baseline))
    if (over := section.refusal) is not None:
        suites.append(RefusalSuite(tuple(_both_halves(xstest_questions(over.questions), over.max_questions))))
    return suites


def without_verdicts(result: SuiteResult, health: JudgeHealth) -> SuiteResult:
    """Take the numbers away that an unusable judge gave; what strings say of refusals stays."""
    why = f"the judge is unusable: {'; '.join(health.reasons)}"
    kept = tuple(
        metric
        if metric.name.startswith("refusal.") and not metric.name.startswith("refusal.judged_")
        else Metric(metric.name, None, None, None, metric.n, why)
        for metric in result.metrics
    )
    return replace(result, metrics=kept, outcomes={role: {} for role in result.outcomes})


def health_of(results: Mapping[str, SuiteResult], resampling: Resampling) -> JudgeHealth | None:
    """Return how the judge behaved over the comparisons of all suites; None where it compared nothing."""
    comparisons = [c for result in results.values() for c in result.comparisons if not c.identical]
    failures: Counter[str] = Counter()
    for result in results.values():
        failures.update(result.failures)
    return judge_health(comparisons, failures, resampling=resampling) if comparisons else None


@dataclass
class _Collected:
    suite: str
    metrics: list[Metric] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    judgements: list[Judgement] = field(default_factory=list)

    def add(self, metric: Metric) -> None:
        self.metrics.append(metric)

    def read(self, pairs: Sequence[Pair], judged: Judged, baseline: str, player: str = "candidate") -> list[Comparison]:
        comparisons, failures = read_pairs(pairs, judged)
        self.comparisons += comparisons
        self.judgements += judgements(self.suite, player, baseline, pairs, comparisons, judged)
        self.failures.update(failures)
        return comparisons

    def done(self, said: Mapping[Role, Said] | None = None) -> SuiteResult:
        if said is not None:
            self.detail["cut"] = {role: one.cut for role, one in said.items()}
        return SuiteResult(
            tuple(self.metrics),
            self.detail,
            tuple(self.comparisons),
            self.failures,
            judgements=tuple(self.judgements),
        )


def _given(judged: Judged | None) -> Judged:
    assert judged is not None  # noqa: S101  the recipe asks for a judge with these suites
    return judged


def _first(said: Said) -> dict[str, Answer]:
    return {name: turns[0] for name, turns in said.answers.items()}


def _points(comparison: Comparison) -> float:
    strengths = (comparison.games.as_a or 0, comparison.games.as_b or 0)
    return sum((1 + (s > 0) - (s < 0)) / 2 for s in strengths) / 2


def _worst(rates: Sequence[Metric]) -> Metric:
    """Return the highest of the constants' win rates; one that could not be measured is the highest."""
    worst = max(rates, key=lambda rate: 2.0 if rate.high is None else rate.high)
    what = worst.name.removeprefix("null_model.")
    note = f"the constant answer `{what}` against the SFT model's: at half the wins and more the judge does not tell it from an answer"
    return replace(worst, name="null_model", note=note)


def _arena_metric(name: str, model: Rating, ratings: Ratings, resampling: Resampling) -> Metric:
    """Return a score in percent; where all battles ended the same way there is no fit, but a rate with an exact bound."""
    if model.score is None:
        prompts = [str(i) for i in range(ratings.n_prompts or ratings.n_battles)]
        rate = mean_rate([round(model.win_rate.value / 100)] * len(prompts), prompts, resampling=resampling)
        note = f"against {ratings.baseline}; all battles ended the same way"
        return Metric(name, 100 * rate.value, 100 * rate.low, 100 * rate.high, model.battles, note)
    by_prompt = model.score.by_prompt or model.score.by_row
    published = f"{model.score.by_row.low:.1f} to {model.score.by_row.high:.1f}"
    note = f"against {ratings.baseline}; by row, as published, {published}"
    return Metric(name, model.score.value, by_prompt.low, by_prompt.high, model.battles, note)


def _difference(
    name: str, values: Sequence[float], clusters: Sequence[str], resampling: Resampling, note: str
) -> Metric:
    if not values:
        return Metric(name, None, None, None, 0, "no prompt has both")
    estimate: Estimate = mean_ratio(values, [1.0] * len(values), clusters, resampling=resampling)
    if estimate.method == "constant":
        # One prompt, or all alike: resamples would claim a certainty that so few differences cannot have.
        return plain(name, estimate.value, estimate.n, f"{note}; all differences are alike, so there is no interval")
    return estimated(name, estimate, note)


def _baselines(questions: Sequence[Question], baseline: str | Mapping[str, str]) -> dict[str, AnswerFile]:
    categories = list(dict.fromkeys(q.category for q in questions))
    places = dict.fromkeys(categories, baseline) if isinstance(baseline, str) else dict(baseline)
    lacking = [name for name in categories if name not in places]
    if lacking:
        msg = f"evaluate.arena_hard.baseline names no answers for the category `{lacking[0]}` (it has {', '.join(places)})"
        raise DataError(msg)
    strangers = sorted(places.keys() - set(categories))
    if strangers:
        msg = f"evaluate.arena_hard.baseline names answers for `{strangers[0]}`, which is no category of the questions ({', '.join(categories)})"
        raise DataError(msg)
    files = {place: read_answers(place) for place in set(places.values())}
    merged: dict[str, dict[str, tuple[str, ...]]] = {}
    for category in categories:
        asked, file = [q for q in questions if q.category == category], files[places[category]]
        require_answers(asked, file, places[category])
        # One model may have a file for each category.
        merged.setdefault(file.model, {}).update({q.id: file.turns[q.id] for q in asked})
    of_model = {model: AnswerFile(model, turns) for model, turns in merged.items()}
    return {category: of_model[files[places[category]].model] for category in categories}


def _both_halves(questions: Sequence[Question], count: int | None) -> list[Question]:
    """Take the first questions of both halves in turn: a file has one half after the other."""
    if count is None:
        return list(questions)
    safe = [q for q in questions if q.category == "safe"][: (count + 1) // 2]
    unsafe = [q for q in questions if q.category == "unsafe"][: count // 2]
    return [*safe, *unsafe]
