"""Questions and answers of the public benchmarks, in their own file formats, read from a path.

    Arena-Hard   JSONL: uid | question_id, category, cluster, prompt
    MT-Bench     JSONL: question_id, category, turns; references: question_id, choices[0].turns
    AlpacaEval   JSON:  instruction | prompt, input, output, generator
    XSTest       CSV:   id, prompt, type (unsafe ones begin with `contrast_`), label
    answers      JSONL: uid | question_id, model | model_id, messages | choices[0].turns

Nothing is bundled and nothing is fetched. This module does not know what is asked of a judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.errors import DataError
from app.evaluation.prompts import NEAR_DUPLICATE
from app.evaluation.rows import name_of, read_rows
from app.near_duplicates import cluster_texts
from app.schemas import content_hash

MT_BENCH_TEMPERATURES: Final = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Temperature of answers by category; 0 for the others (FastChat's llm_judge/common.py)."""
_UNSAFE = "contrast_"


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked, in one turn or several."""

    id: str
    cluster: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    """Right answers by turn, where there are any."""
    temperature: float = 0.0

    def seed(self, turn: int) -> int:
        """Return the seed of the answer to a turn, counted from 0: its own, and the same every time."""
        return int(content_hash([self.id, turn])[:8], 16)


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """What one model answered, by question."""

    model: str
    turns: Mapping[str, tuple[str, ...]]


def arena_hard_questions(place: str) -> list[Question]:
    """Read Arena-Hard's questions; its topics are clusters, and without them near-duplicates share one.

    Raises:
        DataError: a row has no id, category or prompt, or an id is used twice; names the row.
    """
    found = []
    for where, row in read_rows(place):
        identity = name_of(row, ("uid", "question_id"), where)
        category = name_of(row, ("category",), where)
        cluster = row.get("cluster")
        prompt = row.get("prompt")
        if prompt is None and row.get("turns"):
            prompt = _content(row["turns"][0])
        found.append(Question(identity, str(cluster or ""), category, (_text(prompt, "prompt", where),)))
    return _clustered(_unique(found, place))


def mt_bench_questions(place: str, references: str | None) -> list[Question]:
    """Read MT-Bench's questions, with reference answers where a file of them is given.

    Raises:
        DataError: a row has no id, category or turns, an id is used twice, or a reference answers no question.
    """
    right = {} if references is None else dict(read_answers(references).turns)
    found = []
    for where, row in read_rows(place):
        identity, category = name_of(row, ("question_id", "uid"), where), name_of(row, ("category",), where)
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns:
            msg = f"{where}: `turns` must be a list of requests, found {turns!r}"
            raise DataError(msg)
        found.append(
            Question(
                id=identity,
                cluster=identity,
                category=category,
                turns=tuple(_text(_content(turn), "turns", where) for turn in turns),
                references=right.get(identity, ()),
                temperature=MT_BENCH_TEMPERATURES.get(category, 0.0),
            )
        )
    strangers = sorted(right.keys() - {q.id for q in found})
    if strangers:
        msg = f"`{references}` answers `{strangers[0]}`, which `{place}` does not ask"
        raise DataError(msg)
    return _unique(found, place)


def alpaca_questions(place: str) -> tuple[list[Question], AnswerFile]:
    """Read AlpacaEval's instructions with the baseline's outputs; raises DataError where a row lacks one of them."""
    found, outputs, models = [], {}, set()
    for where, row in read_rows(place):
        request = _text(row.get("instruction", row.get("prompt")), "instruction", where)
        extra = row.get("input") or ""
        request = f"{request}\n\n{extra}" if str(extra).strip() else request
        output = row.get("output")
        if not isinstance(output, str):
            msg = f"{where}: `output`, the answer of the baseline, is missing"
            raise DataError(msg)
        identity = str(row.get("id") or content_hash(request)[:16])
        if identity in outputs:
            # Instruction data repeat themselves; the first answer stands.
            continue
        models.add(str(row.get("generator") or "baseline"))
        found.append(Question(identity, "", str(row.get("dataset") or "all"), (request,)))
        outputs[identity] = (output,)
    return _clustered(_unique(found, place)), AnswerFile(_one_model(models, place), outputs)


def xstest_questions(place: str) -> list[Question]:
    """Read XSTest's prompts: the category is `safe` or `unsafe`, the cluster the prompt itself.

    Raises:
        DataError: a row has no id, prompt or type, its label differs from its type, or an id is used twice.
    """
    found = []
    for where, row in read_rows(place):
        identity, kind = name_of(row, ("id",), where), name_of(row, ("type",), where)
        category = "unsafe" if kind.startswith(_UNSAFE) else "safe"
        label = row.get("label") or category
        if label != category:
            msg = f"{where}: the label is `{label}`, the type `{kind}` says `{category}`"
            raise DataError(msg)
        found.append(Question(identity, identity, category, (_text(row.get("prompt"), "prompt", where),)))
    return _unique(found, place)


def read_answers(place: str) -> AnswerFile:
    """Read what one model answered.

    Raises:
        DataError: a row has no id, model or answer, a question is answered twice, or there are several models.
    """
    turns: dict[str, tuple[str, ...]] = {}
    models = set()
    for where, row in read_rows(place):
        models.add(name_of(row, ("model", "model_id"), where))
        identity = name_of(row, ("uid", "question_id"), where)
        said = _said(row)
        if not said:
            msg = f"{where}: no answer in `messages` or `choices`"
            raise DataError(msg)
        if identity in turns:
            msg = f"{where}: `{identity}` is answered twice"
            raise DataError(msg)
        turns[identity] = said
    return AnswerFile(_one_model(models, place), turns)


def require_answers(questions: Sequence[Question], answers: AnswerFile, place: str) -> None:
    """Refuse answers that lack a question or a turn; raises DataError with their number and the first."""
    lacking = [q.id for q in questions if len(answers.turns.get(q.id, ())) < len(q.turns)]
    if lacking:
        msg = f"`{place}` lacks answers to {len(lacking)} of {len(questions)} questions, such as `{lacking[0]}`"
        raise DataError(msg)


def _said(row: Mapping[str, Any]) -> tuple[str, ...]:
    turns: list[Any] = [m.get("content") for m in row.get("messages") or [] if m.get("role") == "assistant"]
    if not turns and row.get("choices"):
        turns = row["choices"][0].get("turns") or []
    texts = [_content(turn) for turn in turns]
    return tuple(texts) if all(isinstance(text, str) for text in texts) else ()


def _content(turn: Any) -> Any:
    """Return the text of a turn: itself, or a field of an object, as Arena-Hard writes both."""
    if isinstance(turn, dict):
        return turn.get("answer", turn.get("content"))
    return turn


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        msg = f"{where}: `{key}` must be text that is not empty, found {value!r}"
        raise DataError(msg)
    return value


def _unique(questions: list[Question], place: str) -> list[Question]:
    if not questions:
        msg = f"`{place}` holds no questions"
        raise DataError(msg)
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            msg = f"`{place}`: the id `{question.id}` is used more than once"
            raise DataError(msg)
        seen.add(question.id)
    return questions


def _clustered(questions: list[Question]) -> list[Question]:
    found = cluster_texts([q.turns[0] for q in questions], threshold=NEAR_DUPLICATE)
    return [
        Question(q.id, q.cluster or f"near:{near}", q.category, q.turns, q.references, q.temperature)
        for q, near in zip(questions, found, strict=True)
    ]


def _one_model(models: set[str], place: str) -> str:
    if len(models) != 1:
        several = ", ".join(sorted(models)) or "none"
        msg = f"`{place}` must hold the answers of one model, found {several}"
        raise DataError(msg)
    return models.pop()
