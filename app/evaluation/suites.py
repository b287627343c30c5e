"""What is measured on recorded answers: pure functions from answers to numbers.

Answers that the token limit cut, or that are empty, are *invalid*: a comparison in which either side is invalid is left
out of the win rate and counted apart. They are never losses, and they are no way to win either: `share_finished`
stands beside the win rate and the gate bounds its fall; `WinRate.if_invalid_lost` shows what the win rate would be if
each comparison that the candidate alone spoiled were lost. A model that says one thing to everybody is caught by
`share_distinct` and by `relevance`, which a rule that finds its feature in the constant answer cannot see. This module
does not know how answers were generated.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from app.errors import DataError
from app.evaluation.intervals import Estimate, Resampling, mean_rate, mean_ratio
from app.evaluation.judge_prompts import JudgeTask, meets
from app.evaluation.rows import read_rows
from app.schemas import SCHEMA_VERSION, FinishReason, content_hash

ANSWER_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("cluster", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("n_tokens", pa.int32()),
        ("model_id", pa.string()),
        ("turn", pa.int32()),
    ],
    metadata={"prefloop.kind": "answers", "prefloop.schema_version": str(SCHEMA_VERSION)},
)

_LOOP_RUN = 4
_LOOP_MIN_RUNS = 8
_LOOP_SHARE = 0.3
_COMMON_WORD = 0.1
_STRANGERS = 64
_GOLDEN_KEYS = ("id", "prompt", "must", "must_not", "exact", "judge", "must_pass")


@dataclass(frozen=True, slots=True)
class Answer:
    """One recorded answer; `n_tokens` counts the sampled tokens, with the end token if it was sampled."""

    prompt_id: str
    cluster: str
    text: str
    finish_reason: str
    n_tokens: int
    model_id: str
    turn: int = 1

    @property
    def valid(self) -> bool:
        """Whether the answer can be judged: it ended by itself and says something."""
        return self.finish_reason != FinishReason.LENGTH and bool(self.text.strip())


@dataclass(frozen=True, slots=True)
class WinRate:
    """A win rate with ties at one half, over the comparisons in which both answers are valid."""

    estimate: Estimate
    wins: int
    ties: int
    losses: int
    invalid_candidate: int
    """Left out: only the candidate's answer is invalid."""
    invalid_baseline: int
    """Left out: the baseline's answer is invalid, whatever the candidate's is."""
    if_invalid_lost: float


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """A prompt whose answer must contain, and must not contain, these patterns, be exactly a text, or satisfy a judge."""

    id: str
    prompt: str
    must: tuple[re.Pattern[str], ...]
    must_not: tuple[re.Pattern[str], ...]
    exact: str | None = None
    """White space around it does not count."""
    judge: str | None = None
    """A requirement in words, for the judge."""
    must_pass: bool = True
    """Whether the gate asks for it; the others count in the pass rate only."""


@dataclass(frozen=True, slots=True)
class GoldenResult:
    """Whether one golden case passed, and if not, why."""

    id: str
    passed: bool
    reason: str
    must_pass: bool = True


def win_rate(
    candidate: Sequence[Answer],
    baseline: Sequence[Answer],
    outcomes: Mapping[str, int | None],
    *,
    resampling: Resampling,
) -> WinRate:
    """Return the win rate from outcomes by prompt: 1, 0, -1; a comparison without one is left out.

    Raises:
        DataError: the two sides do not answer the same prompts, or answer one twice.
    """
    kept = [
        (mine, other) for mine, other in same_prompts(candidate, baseline) if outcomes.get(mine.prompt_id) is not None
    ]
    invalid = [(mine, other) for mine, other in same_prompts(candidate, baseline) if not (mine.valid and other.valid)]
    points = [(1 + (outcomes[mine.prompt_id] or 0)) / 2 for mine, _ in kept]
    spoilt = sum(other.valid for _, other in invalid)
    return WinRate(
        estimate=mean_rate(points, [mine.cluster for mine, _ in kept], resampling=resampling),
        wins=points.count(1.0),
        ties=points.count(0.5),
        losses=points.count(0.0),
        invalid_candidate=spoilt,
        invalid_baseline=len(invalid) - spoilt,
        if_invalid_lost=sum(points) / (len(points) + spoilt) if points or spoilt else 0.5,
    )


def length_ratio(candidate: Sequence[Answer], baseline: Sequence[Answer], *, resampling: Resampling) -> Estimate:
    """Return mean tokens of the candidate's answers over those of the baseline's, where both are valid.

    Cut answers have the limit's length, not their own: how many there are is `share_finished`. Where no prompt has two
    valid answers the estimate is 0 with the method `empty`.
    """
    rows = [(mine, other) for mine, other in same_prompts(candidate, baseline) if mine.valid and other.valid]
    if not rows:
        return Estimate(0.0, 0.0, 0.0, resampling.level, 0, 0, "empty")
    return mean_ratio(
        [float(mine.n_tokens) for mine, _ in rows],
        [float(other.n_tokens) for _, other in rows],
        [mine.cluster for mine, _ in rows],
        resampling=resampling,
    )


def share_finished(answers: Sequence[Answer], *, resampling: Resampling) -> Estimate:
    """Return the share of valid answers: ended by themselves and not empty."""
    return _share(answers, lambda answer: answer.valid, resampling)


def share_looping(answers: Sequence[Answer], *, resampling: Resampling) -> Estimate:
    """Return the share of answers that repeat themselves: at least 30 % of their 4-word runs occurred before."""
    return _share(answers, lambda answer: loops(answer.text), resampling)


def loops(text: str) -> bool:
    """Say whether a text repeats itself: at least 30 % of its 4-word runs occurred before."""
    return repeated_share(text) >= _LOOP_SHARE


def repeated_share(text: str) -> float:
    """Return the share of 4-word runs that occurred before in the text; 0 for texts of fewer than 8 runs."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    runs = [tuple(words[i : i + _LOOP_RUN]) for i in range(len(words) - _LOOP_RUN + 1)]
    return 0.0 if len(runs) < _LOOP_MIN_RUNS else 1 - len(set(runs)) / len(runs)


def share_distinct(answers: Sequence[Answer]) -> float:
    """Return distinct texts over answers; case, punctuation and white space do not make a text distinct."""
    if not answers:
        return 0.0
    return len({" ".join(re.findall(r"\w+", a.text.lower())) for a in answers}) / len(answers)


def relevance(answers: Sequence[Answer], prompts: Mapping[str, str], *, seed: int) -> float:
    """Return how much oftener answers share a word with their own prompt than with a stranger's, in [-1, 1].

    Words of a tenth of the prompts and more (articles, "answer in one sentence") do not count. 0 is chance: what a
    constant answer gets, whatever it says.

    Args:
        answers: one for each prompt.
        prompts: text by prompt id.
        seed: draws up to 64 strangers for each answer.
    """
    words = {a.prompt_id: frozenset(re.findall(r"\w+", prompts[a.prompt_id].lower())) for a in answers}
    counts: dict[str, int] = {}
    for found in words.values():
        for word in found:
            counts[word] = counts.get(word, 0) + 1
    limit = max(2.0, _COMMON_WORD * len(words))
    topics = {name: frozenset(w for w in found if counts[w] < limit) for name, found in words.items()}
    names = sorted(topics)
    if len(names) < 2:
        return 0.0
    generator = np.random.default_rng(seed)
    gains = []
    for answer in answers:
        said = frozenset(re.findall(r"\w+", answer.text.lower()))
        drawn = generator.choice(len(names), size=min(_STRANGERS, len(names)), replace=False)
        strangers = [names[i] for i in drawn if names[i] != answer.prompt_id]
        chance = sum(not said.isdisjoint(topics[name]) for name in strangers) / max(1, len(strangers))
        gains.append(float(not said.isdisjoint(topics[answer.prompt_id])) - chance)
    return float(np.mean(gains)) if gains else 0.0


def load_golden(place: str) -> list[GoldenCase]:
    """Read golden cases: `prompt`, checks (regexes in `must` and `must_not`, `exact`, `judge`), optional `id`, `must_pass`.

    Raises:
        DataError: a line has another key, no prompt, no check, or a bad regex; names the line.
    """
    cases: list[GoldenCase] = []
    for where, row in read_rows(place):
        unknown = sorted(row.keys() - set(_GOLDEN_KEYS))
        if unknown:
            msg = f"{where}: unknown key `{unknown[0]}` (known: {', '.join(_GOLDEN_KEYS)})"
            raise DataError(msg)
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            msg = f"{where}: `prompt` must be text that is not empty, found {prompt!r}"
            raise DataError(msg)
        must, must_not = (_patterns(row.get(key, []), f"{where}: `{key}`") for key in ("must", "must_not"))
        exact, judge, must_pass = row.get("exact"), row.get("judge"), row.get("must_pass", True)
        for key, text in (("exact", exact), ("judge", judge)):
            if text is not None and not (isinstance(text, str) and text.strip()):
                msg = f"{where}: `{key}` must be text that is not empty, found {text!r}"
                raise DataError(msg)
        if not isinstance(must_pass, bool):
            msg = f"{where}: `must_pass` must be true or false, found {must_pass!r}"
            raise DataError(msg)
        if not must and not must_not and exact is None and judge is None:
            msg = f"{where}: a golden case needs a pattern in `must` or `must_not`, or a text in `exact` or `judge`"
            raise DataError(msg)
        name = row.get("id")
        identity = content_hash(prompt)[:16] if name is None else str(name)
        cases.append(GoldenCase(identity, prompt, must, must_not, exact, judge, must_pass))
    names = [case.id for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not cases:
        msg = f"`{place}`: the id `{twice[0]}` is used more than once" if twice else f"`{place}` holds no golden cases"
        raise DataError(msg)
    return cases


def golden_tasks(cases: Sequence[GoldenCase], answers: Sequence[Answer]) -> dict[str, JudgeTask]:
    """Return by case what a judge is asked about the valid answers to the cases that want one."""
    by_prompt = _by_prompt(answers)
    return {
        case.id: meets(case.prompt, by_prompt[case.id].text, case.judge)
        for case in cases
        if case.judge is not None and case.id in by_prompt and by_prompt[case.id].valid
    }


def check_golden(
    cases: Sequence[GoldenCase], answers: Sequence[Answer], met: Mapping[str, bool] = MappingProxyType({})
) -> list[GoldenResult]:
    """Check each case's answer; an invalid answer fails, and one that wants a judge's verdict and has none.

    Args:
        cases: what must be answered how.
        answers: one for each case.
        met: by case what the judge said of its requirement.

    Raises:
        DataError: an answer is missing.
    """
    by_prompt = _by_prompt(answers)
    results = []
    for case in cases:
        answer = by_prompt.get(case.id)
        if answer is None:
            msg = f"no answer to the golden prompt `{case.id}`"
            raise DataError(msg)
        results.append(_golden_result(case, answer, met.get(case.id)))
    return results


def _golden_result(case: GoldenCase, answer: Answer, met: bool | None) -> GoldenResult:  # noqa: FBT001
    reason = _golden_fault(case, answer, met)
    return GoldenResult(case.id, not reason, reason, case.must_pass)


def _golden_fault(case: GoldenCase, answer: Answer, met: bool | None) -> str:  # noqa: FBT001
    if not answer.valid:
        return "the answer is empty or was cut by the token limit"
    if case.exact is not None and answer.text.strip() != case.exact.strip():
        return f"must be exactly {case.exact!r}: {answer.text[:200]!r}"
    lacking = [p.pattern for p in case.must if not p.search(answer.text)]
    if lacking:
        return f"must contain {lacking[0]!r}: {answer.text[:200]!r}"
    wrong = [p.pattern for p in case.must_not if p.search(answer.text)]
    if wrong:
        return f"must not contain {wrong[0]!r}: {answer.text[:200]!r}"
    if case.judge is not None and not met:
        said = "the judge gave no verdict" if met is None else "the judge says that it does not"
        return f"must meet {case.judge!r}, {said}: {answer.text[:200]!r}"
    return ""


def _patterns(value: object, place: str) -> tuple[re.Pattern[str], ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        msg = f"{place} must be a list of regexes, found {value!r}"
        raise DataError(msg)
    try:
        return tuple(re.compile(item, re.MULTILINE) for item in value)
    except re.error as error:
        msg = f"{place}: {error.pattern!r} is no regular expression at position {error.pos}: {error.msg}"
        raise DataError(msg) from None


def _share(answers: Sequence[Answer], holds: Callable[[Answer], bool], resampling: Resampling) -> Estimate:
    return mean_rate([float(holds(a)) for a in answers], [a.cluster for a in answers], resampling=resampling)


def same_prompts(candidate: Sequence[Answer], baseline: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Pair the answers of two models up; raises DataError where they do not answer the same prompts, each once."""
    mine, other = _by_prompt(candidate), _by_prompt(baseline)
    if mine.keys() != other.keys():
        odd = sorted(mine.keys() ^ other.keys())
        msg = f"the two models did not answer the same prompts: {len(odd)} differ, the first is `{odd[0]}`"
        raise DataError(msg)
    return [(mine[name], other[name]) for name in mine]


def _by_prompt(answers: Sequence[Answer]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for answer in answers:
        if answer.prompt_id in found:
            msg = f"prompt `{answer.prompt_id}` is answered twice"
            raise DataError(msg)
        found[answer.prompt_id] = answer
    if len({answer.model_id for answer in answers}) > 1:
        msg = f"the answers of one side come from several models: {', '.join(sorted({a.model_id for a in answers}))}"
        raise DataError(msg)
    return found
