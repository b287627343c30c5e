"""Greedy answers and perplexity of models, each model in a Ray actor of its own; what was generated once is kept.

Answers are an artifact keyed by weights, prompts, token limit, batch size and compute type, so the SFT model and the
champion answer a prompt set once, not in every round. Prompts go in the order of their length, the same way every time.
This module does not know what the answers are for.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from app.errors import PrefloopError
from app.evaluation.perplexity import WINDOW, perplexity
from app.evaluation.prompts import Prompt
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
    """How answers are generated; greedy."""

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
    """What one model is asked for: answers to sets of prompts, and perplexity on a text."""

    model: ModelRow
    prompt_sets: tuple[tuple[Prompt, ...], ...]
    neutral_text: str | None


@dataclass(frozen=True)
class Given:
    """What a model gave, in the order it was asked."""

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

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Answer]:
        """Answer prompts greedily; one that fills the model's context gets an empty answer that was cut."""
        window = context_window(self._loaded.model)
        requests: dict[str, GenerationRequest] = {}
        for prompt in prompts:
            ids = tuple(render_prompt(self._loaded.tokenizer, [Message("user", prompt.text)], None))
            room = decoding.max_new_tokens if window is None else min(decoding.max_new_tokens, window - len(ids))
            if room > 0:
                requests[prompt.id] = GenerationRequest(ids, temperature=0.0, top_p=1.0, max_tokens=room, seed=0)
        completions = generate(self._loaded, list(requests.values()), places=decoding.batch_size)
        given = dict(zip(requests, completions, strict=True))
        return [self._answer(prompt, given.get(prompt.id)) for prompt in prompts]

    def _answer(self, prompt: Prompt, completion: Completion | None) -> Answer:
        if completion is None:
            return Answer(prompt.id, prompt.cluster, "", FinishReason.LENGTH, 0, self._loaded.model_id)
        reason, tokens = str(completion.finish_reason), len(completion.token_ids)
        return Answer(prompt.id, prompt.cluster, completion.text, reason, tokens, self._loaded.model_id)

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
        on_progress: called with model id, answers done and answers to generate.
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
        self.artifacts = [self._answers_artifact(prompts) for prompts in wanted.prompt_sets]
        self.scored = self._perplexity_artifact()
        self.missing = [i for i, artifact in enumerate(self.artifacts) if not artifact.exists()]
        self.unscored = self.scored is not None and not self.scored.exists()
        self.fresh: dict[int, dict[str, Answer]] = {}
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
            self.total += len(self.wanted.prompt_sets[i])
            by_length = sorted(self.wanted.prompt_sets[i], key=lambda p: (len(p.text), p.id))
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
            self.fresh[which].update({answer.prompt_id: answer for answer in result})
            self.done += len(result)
            if len(self.fresh[which]) == len(self.wanted.prompt_sets[which]):
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
        ordered = [self.fresh[which][prompt.id] for prompt in self.wanted.prompt_sets[which]]
        artifact.write_rows(map(asdict, ordered), ANSWER_SCHEMA, rows_per_file=_ROWS_PER_FILE)
        model = self.wanted.model
        artifact.write_manifest(
            {"kind": "answers", "model": model.model_id, "digest": model.digest, **asdict(self.decoding)}
        )

    def _answers_artifact(self, prompts: Sequence[Prompt]) -> Artifact:
        key = content_hash(
            ["answers", self.wanted.model.digest, [[p.id, p.cluster, p.text] for p in prompts], asdict(self.decoding)]
        )
        return self.home.artifact("answers", key)

    def _perplexity_artifact(self) -> Artifact | None:
        text = self.wanted.neutral_text
        if text is None:
            return None
        key = content_hash(["perplexity", self.wanted.model.digest, text, self.decoding.dtype, WINDOW])
        return self.home.artifact("answers", key)
