"""Judges that score an answer by itself, and say that the higher score wins: a style's rules, an implicit reward.

Such a judge sees no order and no other answer, so there are no two games. Comparisons in which an answer is invalid, or
has no score, have no outcome. This module does not know where scores come from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from app.evaluation.judged import Judgement
from app.evaluation.rules import Style
from app.evaluation.suites import Answer, same_prompts

_LEFT_OUT = "(left out: an answer is empty or was cut by the token limit)"


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer is worth, and why, in words."""

    value: float | None
    words: str


@dataclass(frozen=True, slots=True)
class Compared:
    """One model's answers against another's."""

    outcomes: Mapping[str, int | None]
    """By prompt: 1, 0 or -1 for the candidate, None without one."""
    judgements: tuple[Judgement, ...]


def style_score(style: Style) -> Callable[[Answer], Score]:
    """Return what scores an answer by a style."""
    return lambda answer: Score(
        style.score(answer.text), f"{style.score(answer.text):g} ({', '.join(style.found(answer.text)) or 'nothing'})"
    )


def compare(
    candidate: Sequence[Answer],
    baseline: Sequence[Answer],
    score: Callable[[Answer], Score],
    *,
    against: str,
    requests: Mapping[str, str],
) -> Compared:
    """Compare two models' answers to the same prompts by their scores.

    Args:
        candidate: one answer for each prompt.
        baseline: the same of the other side.
        score: called for valid answers.
        against: what to call the other side.
        requests: text by prompt id.

    Raises:
        DataError: the two sides do not answer the same prompts, or answer one twice.
    """
    outcomes: dict[str, int | None] = {}
    judgements = []
    for mine, other in same_prompts(candidate, baseline):
        outcome: int | None = None
        words: tuple[str, ...] = (_LEFT_OUT,)
        if mine.valid and other.valid:
            a, b = score(mine), score(other)
            words = (f"candidate: {a.words}", f"{against}: {b.words}")
            if a.value is not None and b.value is not None:
                outcome = (a.value > b.value) - (a.value < b.value)
        outcomes[mine.prompt_id] = outcome
        judgements.append(
            Judgement(
                suite="win_rate",
                player="candidate",
                baseline=against,
                category="",
                outcome=outcome,
                request=requests[mine.prompt_id],
                answer=mine.text,
                other=other.text,
                words=words,
            )
        )
    return Compared(outcomes, tuple(judgements))
