"""Answers, perplexity and likelihoods of models, by a Ray Data job or a running endpoint; what was generated once is kept.

Questions go in the order of their length, some batches to a *part*, which is generated and kept as a whole: a job that
was killed goes on with the parts that are missing, in the same company, so with the same answers. A pool of Ray actors
takes part after part of one model after the other; each holds one model at a time. With `evaluate.endpoint` the same
parts are asked for there instead (perplexity never is).

Complete sets of answers are artifacts keyed by weights, questions, token limit, batch size and compute type (an endpoint's
by its address too), so the SFT model and the champion answer a set once, not in every round. They are greedy, but
where a question asks for a temperature; then they are drawn with a seed of its own. Those of several turns are asked turn
by turn. This module does not know what the answers are for.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from app import errors
from app.config import EndpointSection
from app.errors import PrefloopError
from app.evaluation.endpoint import EndpointModel
from app.evaluation.perplexity import WINDOW, perplexity
from app.evaluation.questions import Question
from app.evaluation.suites import ANSWER_SCHEMA, Answer
from app.generation import Completion, GenerationRequest, context_window, generate
from app.ledger import ModelRow
from app.models import LoadedModel, device_of, load_model, render_prompt
from app.schemas import FinishReason, Message, Pair, Response, Source, content_hash
from app.storage import Artifact, Home
from app.training.scoring import ScoringModel, with_reference_logps
from app.training.tokenization import encode_groups
from ray_jobs.actors import mortal, settle_ray_data, told_of_dead_actors

_ROWS_PER_FILE = 4096
_SCORED_TOKENS = 8192
_SCORED_TOGETHER = 256
_BATCHES_PER_PART = 2
"""Within a part the next prompts join as answers end; after it, progress is shown and a killed job goes on from there."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class Resources:
    """What one actor asks of the cluster, and how many of them may answer side by side."""

    cpus: float
    gpus: float
    threads: int
    actors: int


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


@dataclass(frozen=True)
class Spoken:
    """An answer whose likelihood is wanted, and the request that it answers."""

    request: str
    text: str


@dataclass(frozen=True)
class Part:
    """What is asked of one model and kept as a whole: questions of one set, a text's perplexity, or answers' likelihoods."""

    model_id: str
    kept: Artifact
    """Where parts of unfinished sets lie; of anything else, the artifact itself."""
    index: int = 0
    questions: tuple[Question, ...] = ()
    text: str | None = None
    said: tuple[Spoken, ...] = ()

    @property
    def done(self) -> bool:
        """Whether it was done before."""
        return bool(self.kept.part_uris(self._stem))

    def keep(self, answers: Sequence[Answer]) -> None:
        """Keep the answers."""
        self.kept.write_rows(map(asdict, answers), ANSWER_SCHEMA, rows_per_file=_ROWS_PER_FILE, stem=self._stem)

    @property
    def _stem(self) -> str:
        return f"part-{self.index:05d}"


class ModelWorker:
    """A Ray Data actor that does parts, with one model at a time."""

    def __init__(self, home_uri: str, parts: Sequence[Part], decoding: Decoding, threads: int) -> None:
        torch.set_num_threads(threads)
        self._home, self._parts, self._decoding = Home.at(home_uri), parts, decoding
        self._held: LoadedModel | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the parts with these numbers and keep what they give; a refusal is told, for Ray would tell a trace."""
        refusals = []
        for number in batch["item"]:
            try:
                self._do(self._parts[int(number)])
            except PrefloopError as error:
                refusals.append([type(error).__name__, str(error)])
            else:
                refusals.append(["", ""])
        return {"item": batch["item"], "refusal": np.array(refusals)}

    def _do(self, part: Part) -> None:
        if self._held is None or self._held.model_id != part.model_id:
            self._held = None  # its memory is for the next one
            device = device_of(ray.get_gpu_ids())
            self._held = load_model(self._home, part.model_id, dtype=self._decoding.dtype, device=device)
        if part.text is not None:
            found = perplexity(self._held, part.text)
            part.kept.write_manifest({"kind": "perplexity", "model": part.model_id, "perplexity": found})
        elif part.said:
            logps = score(self._held, part.said)
            part.kept.write_manifest({"kind": "likelihoods", "model": part.model_id, "logps": logps})
        else:
            part.keep(answer(self._held, part.questions, self._decoding))


def answer(loaded: LoadedModel, questions: Sequence[Question], decoding: Decoding) -> list[Answer]:
    """Answer questions turn by turn; a turn that fills the model's context gets an empty answer that was cut."""
    said: dict[str, list[Answer]] = {question.id: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if len(question.turns) > turn]
        requests = {q.id: request for q in asked if (request := _request(loaded, q, said[q.id], decoding))}
        completions = generate(loaded, list(requests.values()), places=decoding.batch_size)
        given = dict(zip(requests, completions, strict=True))
        for question in asked:
            said[question.id].append(_answer(loaded.model_id, question, turn + 1, given.get(question.id)))
    return [answer for question in questions for answer in said[question.id]]


def _request(
    loaded: LoadedModel, question: Question, said: Sequence[Answer], decoding: Decoding
) -> GenerationRequest | None:
    messages = [Message("user", question.turns[0])]
    for answer, turn in zip(said, question.turns[1:], strict=False):
        messages += [Message("assistant", answer.text), Message("user", turn)]
    ids = tuple(render_prompt(loaded.tokenizer, messages, None))
    window = context_window(loaded.model)
    room = decoding.max_new_tokens if window is None else min(decoding.max_new_tokens, window - len(ids))
    if room <= 0:
        return None
    return GenerationRequest(
        ids, temperature=question.temperature, top_p=1.0, max_tokens=room, seed=question.seed(len(said))
    )


def _answer(model_id: str, question: Question, turn: int, completion: Completion | None) -> Answer:
    if completion is None:
        return Answer(question.id, question.cluster, "", FinishReason.LENGTH, 0, model_id, turn)
    reason, tokens = str(completion.finish_reason), len(completion.token_ids)
    return Answer(question.id, question.cluster, completion.text, reason, tokens, model_id, turn)


def score(loaded: LoadedModel, said: Sequence[Spoken]) -> list[float | None]:
    """Return the log-probability, in nats, that a model gives to each answer with its end; None where it cannot be read.

    Answers to one request share it in a packed row.
    """
    rows = [
        Pair(
            prompt=(Message("user", one.request),),
            chosen=Response(one.text, FinishReason.STOP.value),
            rejected=None,
            source=Source.JUDGE.value,
            split="",
            cluster="",
            label=True,
        )
        for one in said
    ]
    groups, _ = encode_groups(
        rows,
        loaded.tokenizer,
        template_digest=loaded.template_digest,
        end_ids=loaded.end_ids,
        max_length=context_window(loaded.model) or sys.maxsize,
        too_long="drop",
    )
    scorer, device = ScoringModel(loaded.model), loaded.model.device
    scored = with_reference_logps(groups, lambda batch: scorer(batch.to(device)).logps, token_budget=_SCORED_TOKENS)
    found = {
        label.pair_id: group.reference_logps[label.response]
        for group in scored
        if group.reference_logps is not None
        for label in group.labels
    }
    return [found.get(row.pair_id) for row in rows]


def likelihoods(
    home: Home,
    models: Sequence[ModelRow],
    said: Sequence[Spoken],
    *,
    decoding: Decoding,
    resources: Callable[[], Resources],
) -> list[list[float | None]]:
    """Return for each model the log-probability of each answer; what was scored before is not scored again.

    Args:
        home: where models lie and scores are kept.
        models: who scores.
        said: the answers, each once.
        decoding: its compute type is used.
        resources: as for `gather`.
    """
    # Answers to one request stay together, for they are scored together.
    ordered = sorted(said, key=lambda one: one.request)
    slices = [tuple(ordered[at : at + _SCORED_TOGETHER]) for at in range(0, len(ordered), _SCORED_TOGETHER)]

    def part(model: ModelRow, answers: tuple[Spoken, ...]) -> Part:
        key = content_hash(["likelihoods", model.digest, [[a.request, a.text] for a in answers], decoding.dtype])
        return Part(model.model_id, home.artifact("answers", key), said=answers)

    parts = {model.model_id: [part(model, answers) for answers in slices] for model in models}
    missing = [part for of_model in parts.values() for part in of_model if not part.kept.exists()]
    for _ in _in_actors(home, missing, decoding, resources()) if missing else ():
        pass
    if not said:
        return [[] for _ in models]
    found = []
    for model in models:
        logps = [logp for part in parts[model.model_id] for logp in part.kept.manifest()["logps"]]
        by_answer = dict(zip(ordered, logps, strict=True))
        found.append([by_answer[one] for one in said])
    return found


def gather(
    home: Home,
    wanted: Sequence[Wanted],
    *,
    decoding: Decoding,
    endpoint: EndpointSection | None,
    resources: Callable[[], Resources],
    on_progress: Callable[[str, int, int], None],
) -> list[Given]:
    """Return what the models say; only what is not kept from before is generated.

    Args:
        home: where models lie and answers are kept.
        wanted: one entry for each model.
        decoding: token limit, batch size, compute type.
        endpoint: where the models are served by their ids; None: they are loaded.
        resources: asked for before the first model is loaded, and not where everything is kept from before.
        on_progress: called with model id, questions answered and questions to answer.

    Raises:
        PrefloopError: a model cannot be loaded or asked.
        ServiceError: an endpoint does not answer, or actors die again and again.
    """
    works = [_Work(home, entry, decoding, endpoint) for entry in wanted]
    parts = {part: work for work in works for part in work.missing}
    asked = [part for part in parts if part.text is None and endpoint is not None]
    loaded = [part for part in parts if part.text is not None or endpoint is None]
    for part in itertools.chain(
        _at_endpoint(endpoint, asked, decoding) if endpoint is not None and asked else (),
        _in_actors(home, loaded, decoding, resources()) if loaded else (),
    ):
        on_progress(part.model_id, *parts[part].take(part))
    return [work.given() for work in works]


def _at_endpoint(endpoint: EndpointSection, parts: Sequence[Part], decoding: Decoding) -> Iterator[Part]:
    """Yield the parts as the endpoint has answered them."""
    served = EndpointModel(endpoint, max_tokens=decoding.max_new_tokens)
    for part in parts:
        part.keep(served.answer(part.model_id, part.questions))
        yield part


def _in_actors(home: Home, parts: Sequence[Part], decoding: Decoding, resources: Resources) -> Iterator[Part]:
    """Yield the parts as actors have done them, model after model."""
    settle_ray_data(in_order=False)
    actors = min(resources.actors, len(parts))
    numbers = ray.data.from_items(list(range(len(parts))), override_num_blocks=len(parts))
    done = numbers.map_batches(
        ModelWorker,
        fn_constructor_kwargs={
            "home_uri": home.uri,
            "parts": parts,
            "decoding": decoding,
            "threads": resources.threads,
        },
        batch_size=1,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        # One at a time, so that no actor has a second model's part in hand while another one is idle.
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        ray_remote_args_fn=mortal,
    )
    with told_of_dead_actors("that answers", actors):
        for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
            for number, (kind, words) in zip(batch["item"], batch["refusal"], strict=True):
                if kind:
                    raise getattr(errors, kind, PrefloopError)(words)
                yield parts[int(number)]


class _Set:
    """The answers of one model to one set of questions, and which parts of them are missing."""

    def __init__(
        self,
        home: Home,
        model: ModelRow,
        questions: Sequence[Question],
        decoding: Decoding,
        endpoint: EndpointSection | None,
    ) -> None:
        asked = [[q.id, q.cluster, list(q.turns), q.temperature] for q in questions]
        content = ["answers/2", model.digest, asked, asdict(decoding)]
        key = content_hash(content if endpoint is None else [*content, endpoint.url])
        self.model, self.questions = model, questions
        self.manifest = {"kind": "answers", "model": model.model_id, "digest": model.digest, **asdict(decoding)}
        if endpoint is not None:
            self.manifest["endpoint"] = endpoint.url
        self.artifact = home.artifact("answers", key)
        # Of the model, too: another one with the same weights may be at work on the same set.
        self._kept = home.artifact("cache/answers", f"{key}-{model.model_id}")
        self.missing: list[Part] = []
        self.to_do = 0
        if self.artifact.exists():
            return
        by_length = sorted(questions, key=lambda q: (sum(map(len, q.turns)), q.id))
        together = _BATCHES_PER_PART * decoding.batch_size
        parts = [
            Part(model.model_id, self._kept, index, tuple(by_length[at : at + together]))
            for index, at in enumerate(range(0, len(by_length), together))
        ]
        self.to_do = len(questions)
        self.missing = [part for part in parts if not part.done]
        if not self.missing:
            self._finish()

    @property
    def done(self) -> int:
        """Questions that are answered, of those to do."""
        return self.to_do - sum(len(part.questions) for part in self.missing)

    def take(self, part: Part) -> None:
        """Note that a part is done; the last one completes the set."""
        self.missing.remove(part)
        if not self.missing:
            self._finish()

    def _finish(self) -> None:
        # Other processes wrote the parts; some file systems remember what a folder held.
        self._kept.filesystem.invalidate_cache()
        if not self.artifact.exists():  # another set may have asked the same
            self._write()
        if self._kept.filesystem.exists(self._kept.path):
            self._kept.filesystem.rm(self._kept.path, recursive=True)

    def _write(self) -> None:
        said: dict[str, list[dict[str, Any]]] = {}
        for row in self._kept.read_table(ANSWER_SCHEMA).to_pylist():
            said.setdefault(row["prompt_id"], []).append(row)
        ordered = [row for question in self.questions for row in said[question.id]]
        self.artifact.write_rows(ordered, ANSWER_SCHEMA, rows_per_file=_ROWS_PER_FILE)
        self.artifact.write_manifest(self.manifest)


class _Work:
    """What one model is asked for."""

    def __init__(self, home: Home, wanted: Wanted, decoding: Decoding, endpoint: EndpointSection | None) -> None:
        self.model_id = wanted.model.model_id
        self._sets = [_Set(home, wanted.model, questions, decoding, endpoint) for questions in wanted.sets]
        self._scored: Artifact | None = None
        self.missing = [part for one in self._sets for part in one.missing]
        if wanted.neutral_text is not None:
            key = content_hash(["perplexity", wanted.model.digest, wanted.neutral_text, decoding.dtype, WINDOW])
            self._scored = home.artifact("answers", key)
            if not self._scored.exists():
                self.missing.append(Part(self.model_id, self._scored, text=wanted.neutral_text))

    def take(self, part: Part) -> tuple[int, int]:
        """Note that a part is done; returns questions answered and questions to answer."""
        for one in self._sets:
            if part in one.missing:
                one.take(part)
        return sum(one.done for one in self._sets), sum(one.to_do for one in self._sets)

    def given(self) -> Given:
        """Return what the model gave, everything being done."""
        answers = tuple(
            tuple(Answer(**row) for row in one.artifact.read_table(ANSWER_SCHEMA).to_pylist()) for one in self._sets
        )
        scored = None if self._scored is None else float(self._scored.manifest()["perplexity"])
        return Given(answers, scored, tuple(one.artifact.name for one in self._sets))
