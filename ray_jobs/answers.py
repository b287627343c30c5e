"""Answers and perplexity of models, each model in a Ray actor of its own; what was generated once is kept.

Answers are an artifact keyed by weights, questions, token limit, batch size and compute type, so the SFT model and the
champion answer a set of questions once, not in every round. They are greedy, but where a question asks for a temperature;
then they are drawn with a seed of its own. Questions go in the order of their length, the same way every time; those of
several turns are asked turn by turn. This module does not know what the answers are for.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from app.errors import PrefloopError
from app.evaluation.perplexity import WINDOW, perplexity
from app.evaluation.questions import Question
from app.evaluation.suites import ANSWER_SCHEMA, Answer
from app.generation import Completion, GenerationRequest, context_window, generate
from app.ledger import ModelRow
from app.models import LoadedModel, device_of, load_model, render_prompt
from app.schemas import FinishReason, Message, content_hash
from app.storage import Artifact, Home

_ROWS_PER_FILE = 4096
_BATCHES_PER_CALL = 2
"""Within a call the next prompts join as answers end; after it, progress is shown and a failure starts from there."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class Resources:
    """What one model's actor asks of the cluster."""

    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True)
class Wanted:
    """What one model is asked for: answers to sets of questions, and perplexity on a text."""

    model: ModelRow
    sets: tuple[tuple[Question, ...], ...]
    neutral_text: str | None


@dataclass(frozen=True)
class Given:
    """What a model gave, in the order it was asked; to each question an answer for each turn, one after the other."""

    answers: tuple[tuple[Answer, ...], ...]
    perplexity: float | None
    artifacts: tuple[str, ...]


class ModelActor:
    """Holds one model in a process of its own."""

    def __init__(self, home_uri: str, model_id: str, dtype: str, threads: int) -> None:
        self._home_uri, self._model_id, self._dtype, self._threads = home_uri, model_id, dtype, threads

    @functools.cached_property
    def _loaded(self) -> LoadedModel:
        # Not in the constructor: an error there reaches the caller as the death of an actor, after two restarts.
        import torch

        torch.set_num_threads(self._threads)
        device = device_of(ray.get_gpu_ids())
        return load_model(Home.at(self._home_uri), self._model_id, dtype=self._dtype, device=device)

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> list[Answer]:
        """Answer questions turn by turn; a turn that fills the model's context gets an empty answer that was cut."""
        said: dict[str, list[Answer]] = {question.id: [] for question in questions}
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [question for question in questions if len(question.turns) > turn]
            requests = {q.id: request for q in asked if (request := self._request(q, said[q.id], decoding))}
            completions = generate(self._loaded, list(requests.values()), places=decoding.batch_size)
            given = dict(zip(requests, completions, strict=True))
            for question in asked:
                said[question.id].append(self._answer(question, turn + 1, given.get(question.id)))
        return [answer for question in questions for answer in said[question.id]]

    def _request(self, question: Question, said: Sequence[Answer], decoding: Decoding) -> GenerationRequest | None:
        messages = [Message("user", question.turns[0])]
        for answer, turn in zip(said, question.turns[1:], strict=False):
            messages += [Message("assistant", answer.text), Message("user", turn)]
        ids = tuple(render_prompt(self._loaded.tokenizer, messages, None))
        window = context_window(self._loaded.model)
        room = decoding.max_new_tokens if window is None else min(decoding.max_new_tokens, window - len(ids))
        if room <= 0:
            return None
        seed = int(content_hash([question.id, len(said)])[:8], 16)
        return GenerationRequest(ids, temperature=question.temperature, top_p=1.0, max_tokens=room, seed=seed)

    def _answer(self, question: Question, turn: int, completion: Completion | None) -> Answer:
        model_id = self._loaded.model_id
        if completion is None:
            return Answer(question.id, question.cluster, "", FinishReason.LENGTH, 0, model_id, turn)
        reason, tokens = str(completion.finish_reason), len(completion.token_ids)
        return Answer(question.id, question.cluster, completion.text, reason, tokens, model_id, turn)

    def perplexity(self, text: str) -> float:
        """Return the perplexity on a text."""
        return perplexity(self._loaded, text)


def gather(
    home: Home,
    wanted: Sequence[Wanted],
    *,
    decoding: Decoding,
    resources: Resources,
    before_start: Callable[[], None],
    on_progress: Callable[[str, int, int], None],
) -> list[Given]:
    """Return what the models say; only what is not kept from before is generated.

    Args:
        home: where models lie and answers are kept.
        wanted: one entry for each model.
        decoding: token limit, batch size, compute type.
        resources: of one model's actor. Models run side by side where the cluster has room, else one after another.
        before_start: called once before the first model starts, and not where everything is kept from before.
        on_progress: called with model id, questions answered and questions to answer.
    """
    works = [_Work(home, entry, decoding) for entry in wanted]
    running: dict[Any, _Work] = {}
    if any(work.to_do for work in works):
        before_start()
    for work in works:
        for reference in work.start(resources):
            running[reference] = work
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        work = running.pop(ready)
        done, total = work.take(ready, _result(ready))
        on_progress(work.wanted.model.model_id, done, total)
    return [work.given() for work in works]


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PrefloopError):
            # Ray's own text of it is a trace.
            raise error.cause from None
        raise


class _Work:
    def __init__(self, home: Home, wanted: Wanted, decoding: Decoding) -> None:
        self.home = home
        self.wanted = wanted
        self.decoding = decoding
        self.artifacts = [self._answers_artifact(questions) for questions in wanted.sets]
        self.scored = self._perplexity_artifact()
        self.missing = [i for i, artifact in enumerate(self.artifacts) if not artifact.exists()]
        self.unscored = self.scored is not None and not self.scored.exists()
        self.fresh: dict[int, dict[str, list[Answer]]] = {}
        self.tasks: dict[Any, int | None] = {}
        self.done = self.total = 0
        self.actor: Any = None

    @property
    def to_do(self) -> bool:
        return bool(self.missing) or self.unscored

    def start(self, resources: Resources) -> list[Any]:
        if not self.to_do:
            return []
        self.actor = (
            ray.remote(ModelActor)
            .options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_restarts=2, max_task_retries=2)
            .remote(self.home.uri, self.wanted.model.model_id, self.decoding.dtype, resources.threads)
        )
        for i in self.missing:
            self.fresh[i] = {}
            self.total += len(self.wanted.sets[i])
            by_length = sorted(self.wanted.sets[i], key=lambda q: (sum(map(len, q.turns)), q.id))
            together = _BATCHES_PER_CALL * self.decoding.batch_size
            for at in range(0, len(by_length), together):
                self.tasks[self.actor.answer.remote(by_length[at : at + together], self.decoding)] = i
        if self.unscored:
            self.tasks[self.actor.perplexity.remote(self.wanted.neutral_text)] = None
        return list(self.tasks)

    def take(self, reference: Any, result: Any) -> tuple[int, int]:
        which = self.tasks.pop(reference)
        if which is None:
            assert self.scored is not None  # noqa: S101
            self.scored.write_manifest(
                {"kind": "perplexity", "model": self.wanted.model.model_id, "perplexity": result}
            )
        else:
            answered = self.fresh[which]
            before = len(answered)
            for answer in result:
                answered.setdefault(answer.prompt_id, []).append(answer)
            self.done += len(answered) - before
            if len(answered) == len(self.wanted.sets[which]):
                self._keep(which)
        if not self.tasks:
            # Its CPUs are for the next model, which may be waiting for them.
            ray.kill(self.actor)
        return self.done, self.total

    def given(self) -> Given:
        answers = tuple(
            tuple(Answer(**row) for row in artifact.read_table(ANSWER_SCHEMA).to_pylist())
            for artifact in self.artifacts
        )
        scored = None if self.scored is None else float(self.scored.manifest()["perplexity"])
        return Given(answers, scored, tuple(artifact.name for artifact in self.artifacts))

    def _keep(self, which: int) -> None:
        artifact = self.artifacts[which]
        ordered = [answer for question in self.wanted.sets[which] for answer in self.fresh[which][question.id]]
        artifact.write_rows(map(asdict, ordered), ANSWER_SCHEMA, rows_per_file=_ROWS_PER_FILE)
        model = self.wanted.model
        artifact.write_manifest(
            {"kind": "answers", "model": model.model_id, "digest": model.digest, **asdict(self.decoding)}
        )

    def _answers_artifact(self, questions: Sequence[Question]) -> Artifact:
        asked = [[q.id, q.cluster, list(q.turns), q.temperature] for q in questions]
        key = content_hash(["answers/2", self.wanted.model.digest, asked, asdict(self.decoding)])
        return self.home.artifact("answers", key)

    def _perplexity_artifact(self) -> Artifact | None:
        text = self.wanted.neutral_text
        if text is None:
            return None
        key = content_hash(["perplexity", self.wanted.model.digest, text, self.decoding.dtype, WINDOW])
        return self.home.artifact("answers", key)
