"""Answers -> what a judge says of them, whichever judge the recipe names, in one shape.

A style and an implicit reward score each answer by itself (`app.evaluation.scored`); a model behind an endpoint is asked,
and its health decides whether its word counts. The implicit reward is the log-probability of an answer under a model that
was trained on preferences, less that under the model it was trained against (https://arxiv.org/abs/2305.18290, eq. 5,
without beta, which changes no sign). This module decides nothing.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from rich.console import Console

from app.evaluation.battery import Role, Said, SuiteResult, WinRateSuite, health_of, without_verdicts
from app.evaluation.intervals import Resampling
from app.evaluation.judge_health import JudgeHealth
from app.evaluation.judged import Judgement
from app.evaluation.material import GOLDEN, PROMPTS, Material
from app.evaluation.scored import Score, compare, style_score
from app.evaluation.suites import Answer, golden_tasks
from app.evaluation.verdicts import parse_met
from app.ledger import Ledger, ModelRow
from app.storage import Home
from ray_jobs.answers import Decoding, Given, Resources, Spoken, likelihoods
from ray_jobs.progress import Meter

BASELINES: Final[tuple[Role, ...]] = ("champion", "sft")
"""Whom the candidate is compared with; before the first ship the SFT model is the champion."""


@dataclass(frozen=True)
class Answered:
    """What the models gave, by role and set of questions."""

    roles: Mapping[Role, ModelRow]
    given: Mapping[str, Given]
    """By model id."""
    sets: Mapping[str, tuple[str, ...]]
    """By model id the names of its sets of questions, in the order of the answers."""

    def of(self, role: Role) -> Given:
        """Return everything that the model in a role gave."""
        return self.given[self.roles[role].model_id]

    def answers(self, role: Role, name: str) -> tuple[Answer, ...]:
        """Return the answers of the model in a role to a set, turn by turn; nothing where it was not asked."""
        names = self.sets[self.roles[role].model_id]
        return self.of(role).answers[names.index(name)] if name in names else ()

    def said(self, role: Role, name: str) -> Said:
        """Return the same by question."""
        turns: dict[str, list[Answer]] = {}
        for answer in self.answers(role, name):
            turns.setdefault(answer.prompt_id, []).append(answer)
        return Said(self.roles[role].model_id, {question: tuple(answers) for question, answers in turns.items()})


@dataclass(frozen=True)
class Judging:
    """What the judge said."""

    outcomes: Mapping[Role, Mapping[str, int | None]]
    """By baseline and prompt: 1, 0 or -1 for the candidate, None without a verdict."""
    judgements: tuple[Judgement, ...]
    """Every comparison, to be read."""
    results: Mapping[str, SuiteResult]
    """By suite; the win rate is one where a model behind an endpoint judges."""
    met: Mapping[str, bool]
    """By golden case that wants a judge, whether its requirement is met."""
    unanswered: Mapping[str, int]
    """How much the endpoint did not answer, by reason."""
    health: JudgeHealth | None
    """Of a model behind an endpoint that compared anything."""


@dataclass(frozen=True)
class RewardJudge:
    """A model whose implicit reward judges, and the one that it was trained against."""

    model: ModelRow
    reference: ModelRow

    @property
    def name(self) -> str:
        """Name the judge as reports do."""
        return f"the implicit reward of `{self.model.model_id}` over `{self.reference.model_id}`"


def judge(
    ledger: Ledger,
    material: Material,
    answered: Answered,
    resampling: Resampling,
    score: Callable[[Answer], Score] | None,
) -> Judging:
    """Let the judge compare the answers, and the suites measure.

    Args:
        ledger: keeps what an endpoint said.
        material: names suites and judge.
        answered: what the models gave.
        resampling: level, resamples, seed.
        score: of an answer to the recipe's prompts; None: the judge behind the endpoint compares those too.
    """
    said = {
        suite.name: {role: answered.said(role, material.set_of(suite)) for role in suite.roles}
        for suite in material.suites
    }
    cases = golden_tasks(material.golden, answered.answers("candidate", GOLDEN))
    judged = None
    if material.judge is not None:
        tasks = [task for suite in material.suites for task in suite.tasks(said[suite.name])]
        with Meter(Console()) as meter:
            judged = material.judge.judge(
                ledger,
                [*tasks, *cases.values()],
                on_progress=lambda done, total: meter.show("evaluate: judgements", done, total),
            )
    results = {suite.name: suite.measure(said[suite.name], judged, resampling) for suite in material.suites}
    judgements = [judgement for result in results.values() for judgement in result.judgements]
    health = health_of(results, resampling)
    met: dict[str, bool] = {}
    if health is not None and not health.usable:
        results = {name: without_verdicts(result, health) for name, result in results.items()}
        judgements = [replace(judgement, outcome=None) for judgement in judgements]
    elif judged is not None:
        replies = {name: judged.replies[task.key] for name, task in cases.items() if task.key in judged.replies}
        verdicts = {name: parse_met(reply.text, reply.nonce) for name, reply in replies.items()}
        met = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    if score is None:
        outcomes = results[WinRateSuite.name].outcomes
    else:
        outcomes, read = _by_score(material, answered, score)
        judgements = [*read, *judgements]
    failures = Counter(() if judged is None else judged.failures.values())
    return Judging(outcomes, tuple(judgements), results, met, dict(failures), health)


def style_scores(material: Material) -> Callable[[Answer], Score] | None:
    """Return what scores an answer by the recipe's style; None where it has none."""
    return None if material.style is None else style_score(material.style)


def reward_scores(
    home: Home,
    reward: RewardJudge,
    material: Material,
    answered: Answered,
    *,
    decoding: Decoding,
    resources: Callable[[], Resources],
) -> Callable[[Answer], Score]:
    """Return what scores an answer to the recipe's prompts by the judge's implicit reward.

    Args:
        home: where models lie and likelihoods are kept.
        reward: who judges.
        material: has the prompts.
        answered: the answers of all roles, which are scored together.
        decoding: its compute type is used.
        resources: as `ray_jobs.answers.gather` takes them.
    """
    requests = {question.id: question.turns[0] for question in material.prompts}
    answers = [answer for role in answered.roles for answer in answered.answers(role, PROMPTS) if answer.valid]
    spoken = list(dict.fromkeys(Spoken(requests[answer.prompt_id], answer.text) for answer in answers))
    above, below = likelihoods(home, [reward.model, reward.reference], spoken, decoding=decoding, resources=resources)
    rewards = {
        one: None if logp is None or before is None else logp - before
        for one, logp, before in zip(spoken, above, below, strict=True)
    }

    def score(answer: Answer) -> Score:
        value = rewards[Spoken(requests[answer.prompt_id], answer.text)]
        return Score(value, "no likelihood" if value is None else f"implicit reward {value:+.3f} nats")

    return score


def _by_score(
    material: Material, answered: Answered, score: Callable[[Answer], Score]
) -> tuple[dict[Role, Mapping[str, int | None]], list[Judgement]]:
    requests = {question.id: question.turns[0] for question in material.prompts}
    outcomes: dict[Role, Mapping[str, int | None]] = {}
    judgements: list[Judgement] = []
    for role in BASELINES:
        mine, other = answered.answers("candidate", PROMPTS), answered.answers(role, PROMPTS)
        compared = compare(mine, other, score, against=role, requests=requests)
        outcomes[role] = compared.outcomes
        if role == "champion" or answered.roles["sft"].model_id != answered.roles["champion"].model_id:
            judgements += compared.judgements
    return outcomes, judgements
