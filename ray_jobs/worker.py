"""What runs on each train worker: the steps of `ray_jobs.stream`, the loop of `app.training`, checkpoints, the export.

Rank 0 reads for all and broadcasts each step's groups, of which every rank takes its share, so storage is read once an
epoch and world size changes nothing about which rows make a step. The function lives in a module of its own because a
train function of `__main__` does not pickle.
"""

import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from app.config import TrainSection
from app.errors import DataError, ModelError, OutOfMemory, said
from app.evaluation.suites import repeated_share
from app.generation import GenerationRequest, context_window, generate
from app.models import DTYPES, LoadedModel, device_of, is_no_weights, is_out_of_memory, load_model
from app.schemas import FinishReason, Split
from app.storage import Artifact, Home, remove_if_allowed, write_atomically
from app.training.checkpoints import Checkpoints, RunIdentity
from app.training.engine import Engine, Replicated, Row, SingleWorker, Workers
from app.training.held_out import AnswerMeasure, Measures, PairMeasure, measure, measure_exported, with_start
from app.training.loop import optimise
from app.training.objectives import Objective, load_objective
from app.training.policy import Reference, adapter_off, autocast, build_policy, frozen, merged, precomputed
from app.training.proofs import check_packing, check_step_zero
from app.training.scoring import ScoringModel, causal_model, generating, own_attention
from app.training.snapshots import TrainFile, read_groups
from app.training.tokenization import Group
from ray_jobs.stream import read_ahead

RESULT = "result.json"
BEFORE = "before.json"
"""What a model gave for the held-out rows before the first step, in the folder of its run."""
EXPORT = "export"
MOST_HELD_OUT = 4096
"""Held-out rows that a run measures, the first in their shuffled order: so many tell an accuracy to 1.5 points, and every
worker keeps them all."""
_STEP_ZERO_GROUPS = 4
_TOKEN_BYTES = 8
_LOOK_S = 5.0
"""How often to ask whether a node is about to be taken away; as often as Ray Train itself looks."""
_CANARIES = 8
_CANARY_TOKENS = 128
_UNHEARD = 8
"""Steps whose measurements a checkpoint keeps. Ray Train holds one report of each worker back (`result_queue`, size 1),
one may be on its way, and one waits for the other ranks: a driver that was killed has not written the last few."""


@dataclass(frozen=True)
class TrainTask:
    """All that a train worker needs to know; plain values, so that it pickles small."""

    home_uri: str
    identity: RunIdentity
    start_model_id: str
    reference_model_id: str
    section: TrainSection
    epochs: int
    files: tuple[TrainFile, ...]
    total_steps: int
    learning_rate: float
    """At its peak."""
    threads: int

    def home(self) -> Home:
        """The home that holds the snapshot, the models and the run."""
        return Home.at(self.home_uri)


class _Common(TypedDict):
    """What every measurement of a run shares."""

    objective: Objective
    reference: Reference
    section: TrainSection
    workers: Workers


class DistributedWorkers:
    """The ranks of a torch process group."""

    def __init__(self, device: torch.device, *, sharded: bool) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device, self.sharded = device, sharded
        self.collectives = self.collective_bytes = 0
        """What this rank gave to collectives since it was last asked, ours and those of a sharding library."""

    def told(self) -> dict[str, int]:
        """Return and forget what was given to collectives."""
        found = {"collectives": self.collectives, "collective_bytes": self.collective_bytes}
        self.collectives = self.collective_bytes = 0
        return found

    def count(self, size: int) -> None:
        """Note that this rank gave so many bytes to a collective."""
        self.collectives += 1
        self.collective_bytes += size

    def share(self, step: "_Step | None") -> "_Step":
        """Return the step that the first rank has."""
        shared = [step]
        dist.broadcast_object_list(shared, src=0)
        assert shared[0] is not None  # noqa: S101  the first rank has one
        self.count(_TOKEN_BYTES * sum(group.num_tokens for group in shared[0].groups))
        return shared[0]

    def sum_(self, tensor: Tensor) -> None:
        """Add a tensor up over all ranks, in place."""
        self.count(tensor.numel() * tensor.element_size())
        dist.all_reduce(tensor)

    def gather(self, rows: list[Row]) -> list[Row]:
        """Return the rows of all ranks."""
        parts: list[list[Row]] = [[] for _ in range(self.size)]
        self.count(0)
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def rounds(self, batches: int) -> int:
        """Return how many forwards this rank makes: its own, or as many as the busiest where each is a collective."""
        if not self.sharded:
            return batches
        most = torch.tensor([batches], device=self.device)
        self.count(most.element_size())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)


def train_worker(task: TrainTask) -> None:
    """Train one rank of a run, from the newest checkpoint if there is one, and export the result on rank 0.

    Raises:
        OutOfMemory: the machine or the GPU has not enough for a micro-batch.
    """
    try:
        _train(task)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(said(error, 0)) from error


def _train(task: TrainTask) -> None:
    torch.set_num_threads(task.threads)
    device = device_of(ray.get_gpu_ids())
    home, section = task.home(), task.section
    sharded = section.sharding == "zero3"
    if sharded or (dist.is_initialized() and dist.get_world_size() > 1):
        ranks = DistributedWorkers(device, sharded=sharded)
        sharding: _Whole = _Sliced(task, device, ranks) if sharded else _Whole(task, device, ranks)
    else:
        sharding = _Whole(task, device, SingleWorker())
    workers = sharding.workers
    objective = load_objective(section.objective, section.options)
    start = sharding.load(task.start_model_id, _dtype(section))
    policy = sharding.policy(start, agreement="agreement" in objective.needs)
    engine = sharding.engine(policy)
    reference = _reference(task, sharding, policy) if objective.has_reference else precomputed
    snapshot = home.artifact("training", task.identity.snapshot_id)

    held_out = read_groups(snapshot, Split.HELD_OUT, at_most=MOST_HELD_OUT)
    shown = held_out or read_groups(snapshot, Split.TRAIN, at_most=_STEP_ZERO_GROUPS)
    checkpoints = Checkpoints(home, task.identity, workers)
    resumed = checkpoints.load_newest(engine)
    if not resumed.step:
        tokens = section.token_budget(device.type)
        proofs = _to_prove(shown, tokens)
        for groups in proofs:
            check_packing(engine, groups, section=section, workers=workers)
        if task.reference_model_id == task.start_model_id and objective.has_reference:
            check_step_zero(policy, proofs[0], reference=reference, section=section)
    for note in resumed.skipped:
        ray.train.report({"note": note})
    for metrics in resumed.reports:
        ray.train.report(metrics)

    common = _Common(objective=objective, reference=reference, section=section, workers=workers)
    from_reference = objective.has_reference and task.start_model_id == task.reference_model_id
    from_zero = from_reference and objective.unit != "good"  # a likelihood is compared with that of the start
    # Where it is not the reference, what training adds is counted from the model that it begins with.
    before = None if from_zero else _before(task, sharding, policy, held_out, common, done_steps=resumed.step)
    unheard = deque(resumed.reports, maxlen=_UNHEARD)
    steps = SharedSteps(task, workers, skip=resumed.step)
    warned: set[str] = set()
    for report in optimise(
        engine,
        steps,
        objective=objective,
        reference=reference,
        section=section,
        learning_rate=task.learning_rate,
        total_steps=task.total_steps,
        done_steps=resumed.step,
        workers=workers,
    ):
        sharding.look_away()
        metrics = asdict(report)
        if isinstance(workers, DistributedWorkers):
            metrics |= workers.told()
        last = report.step == task.total_steps
        if not last and section.held_out_every and report.step % section.held_out_every == 0 and held_out:
            so_far = measure(policy, held_out, **common)
            metrics |= summary(so_far if before is None else with_start(so_far, before))
        if section.canary_every and report.step % section.canary_every == 0 and workers.rank == 0:
            metrics |= _canaries(policy, start, shown, dtype=section.dtype)
        unheard.append(metrics)
        checkpoints.require_no_failure()
        if checkpoints.left:
            metrics["checkpoints_left"] = len(checkpoints.left)
        going = _nodes_going(steps) - warned
        warned |= going
        if report.step % section.checkpoint_every == 0 or last or going:
            waited = checkpoints.save(
                engine, step=report.step, reports=tuple(unheard), score=metrics.get("held_out_accuracy")
            )
            metrics["checkpoint_seconds"] = waited
        if going:
            checkpoints.finish()  # the node may be gone before the next step ends
        ray.train.report(metrics)
    checkpoints.finish()

    exported, measures = measure_exported(policy, held_out, merge=sharding.merge, **common)
    if before is not None:
        measures = with_start(measures, before)
    # The first rank writes the model alone; Ray Train waits for it, so the others need not, in a collective with a time limit.
    _export(task, sharding, exported, start.tokenizer, measures, workers, memory=sharding.memory())


def require_packable(reason: str | None, model_id: str) -> None:
    """Refuse slices of a model whose answers are rows of their own, for the `reason`; raises ModelError.

    Forwards would not be the same row of collectives on every worker.
    """
    if reason is not None:
        msg = f"`{model_id}` cannot be sharded: {reason}, so a forward is as many as a batch has answers\n\nHint: set train.sharding to `none`."
        raise ModelError(msg)


class _Whole:
    """Every worker holds whole models."""

    def __init__(self, task: TrainTask, device: torch.device, workers: Workers) -> None:
        self.task, self.device, self.workers = task, device, workers

    def load(self, model_id: str, dtype: str) -> LoadedModel:
        """Load a model that is to be trained."""
        return load_model(self.task.home(), model_id, dtype=dtype)

    def policy(self, start: LoadedModel, *, agreement: bool) -> ScoringModel:
        """Make the policy of it."""
        return build_policy(start, self.task.section, agreement=agreement).to(self.device)

    def engine(self, policy: ScoringModel) -> Engine:
        """Return what trains it."""
        section = self.task.section
        return Replicated(
            policy,
            learning_rate=self.task.learning_rate,
            max_grad_norm=section.max_grad_norm,
            weight_decay=section.weight_decay,
            workers=self.workers,
        )

    def frozen(self, model_id: str, dtype: str, *, agreement: bool = False) -> ScoringModel:
        """Load a model that only scores."""
        loaded = load_model(self.task.home(), model_id, dtype=dtype, device=self.device)
        return ScoringModel(loaded.model, agreement=agreement, backend=self.task.section.attention)

    def watch(self, reference: ScoringModel) -> None:
        """Measure what a reference takes, where it lies in slices."""

    def look_away(self) -> None:
        """Stop to measure what a reference takes: the steps are alike."""

    def memory(self) -> dict[str, int]:
        """Return the bytes of a reference in slices: `total`, the `largest` layer, and the most that a worker `held`.

        At its peak it held more: while it was `loading`, and whenever it computed (`peak`).
        """
        return {}

    merge = staticmethod(merged)

    def save(self, exported: ScoringModel, folder: Path | None) -> None:
        """Write the plain model to a folder, on the first worker."""
        if folder is None:
            return
        model: Any = exported.model
        model.set_attn_implementation(own_attention(model))
        model.config.use_cache = True
        model.save_pretrained(folder)


class _Sliced(_Whole):
    """Every worker holds slices (`app.training.zero`)."""

    def __init__(self, task: TrainTask, device: torch.device, workers: DistributedWorkers) -> None:
        super().__init__(task, device, workers)
        # It looks for GPUs when it is imported, and a GPU that is only visible belongs to somebody else.
        os.environ["DS_ACCELERATOR"] = device.type
        # DeepSpeed takes seconds to import, and only this needs it.
        from app.training import zero

        self._zero = zero
        zero.join(device, count=workers.count)
        self._dtype = DTYPES[_dtype(task.section)]
        self.merge = partial(zero.merge_in_slices, dtype=self._dtype)
        self._held: Any = None
        self._loading: list[int] = []
        self._reference_loading: list[int] = []

    def _wanted(self, name: str) -> bool:
        """Only the first worker reads weights."""
        return self.workers.rank == 0 or is_no_weights(name)

    def load(self, model_id: str, dtype: str) -> LoadedModel:
        """Load a model that is to be trained, slice by slice."""
        # DeepSpeed wants one type for all that it trains; autocast computes in the recipe's all the same.
        read = partial(self._zero.load_in_slices, rounded=DTYPES[dtype])
        return load_model(self.task.home(), model_id, dtype="float32", read=read, wanted=self._wanted)

    def policy(self, start: LoadedModel, *, agreement: bool) -> ScoringModel:
        """Make the policy of it; raises ModelError where forwards would not be the same row of collectives on every worker."""
        policy = build_policy(start, self.task.section, agreement=agreement)
        require_packable(policy.plain_because, start.model_id)
        return policy

    def engine(self, policy: ScoringModel) -> Engine:
        """Return what trains it."""
        section = self.task.section
        return self._zero.Zero3(
            policy,
            learning_rate=self.task.learning_rate,
            max_grad_norm=section.max_grad_norm,
            weight_decay=section.weight_decay,
            workers=self.workers,
            offload="optimizer" in section.offload,
        )

    def frozen(self, model_id: str, dtype: str, *, agreement: bool = False) -> ScoringModel:
        """Load a model that only scores, slice by slice."""
        section = self.task.section
        on_cpu = "reference" in section.offload
        self._loading = []
        read = partial(self._zero.load_in_slices, on_cpu=on_cpu, watch=self._loading.append)
        loaded = load_model(self.task.home(), model_id, dtype=dtype, read=read, wanted=self._wanted)
        model = ScoringModel(loaded.model, agreement=agreement, backend=section.attention)
        require_packable(model.plain_because, model_id)
        return self._zero.frozen_in_slices(model, on_cpu=on_cpu)

    def watch(self, reference: ScoringModel) -> None:
        """Measure what a reference takes."""
        self._held, self._reference_loading = self._zero.Held(reference), self._loading

    def look_away(self) -> None:
        """Stop to measure what a reference takes: the steps are alike."""
        if self._held is not None:
            self._held.close()

    def memory(self) -> dict[str, int]:
        """Return the bytes of a reference in slices: `total`, the `largest` layer, and the most that a worker `held`.

        At its peak it held more: while it was `loading`, and whenever it computed (`peak`).
        """
        if self._held is None:
            return {}
        held = self._held
        rows = self.workers.gather([(held.slices, max(self._reference_loading), held.peak)])
        slices, loading, peaks = zip(*rows, strict=True)
        return {
            "total": held.total,
            "held": max(slices),
            "loading": max(loading),
            "peak": max(peaks),
            "largest": held.largest,
            "workers": self.workers.size,
        }

    def save(self, exported: ScoringModel, folder: Path | None) -> None:
        """Write the plain model to a folder, on the first worker, a tensor at a time."""
        causal = causal_model(exported.model)
        causal.set_attn_implementation(own_attention(causal))
        causal.config.use_cache = True
        self._zero.save_in_slices(exported, folder, dtype=self._dtype)


def _dtype(section: TrainSection) -> str:
    # Full fine-tuning keeps fp32 master weights; a frozen base may lie in the compute type.
    return "float32" if section.adapter == "full" else section.dtype


def _canaries(policy: ScoringModel, start: LoadedModel, groups: Sequence[Group], *, dtype: str) -> dict[str, float]:
    """Let the policy answer a few prompts greedily: one that forgets to stop or repeats itself is seen while it trains.

    The first worker does this alone; the others wait at their next step. A prompt that leaves less room than an answer may
    take is asked where too few leave more.
    """
    window = context_window(start.model) or sys.maxsize

    def room(group: Group) -> int:
        return min(_CANARY_TOKENS, window - len(group.prompt_ids))

    # A prompt may have several rows.
    prompts = list({group.prompt_ids: group for group in reversed(groups)}.values())[::-1]
    requests = [
        GenerationRequest(group.prompt_ids, temperature=0.0, top_p=1.0, max_tokens=room(group))
        for group in sorted(prompts, key=room, reverse=True)[:_CANARIES]
    ]
    with generating(policy) as model, autocast(model.device, dtype):
        answers = generate(replace(start, model=model), requests)
    count = len(answers)
    return {
        "canary_finished": sum(a.finish_reason == FinishReason.STOP for a in answers) / count,
        "canary_repetition": sum(repeated_share(a.text) for a in answers) / count,
        "canary_tokens": sum(len(a.token_ids) for a in answers) / count,
    }


def _reference(task: TrainTask, sharding: _Whole, policy: ScoringModel) -> Reference:
    if task.section.reference == "precomputed":
        return precomputed
    if task.section.reference == "adapter_off":
        return adapter_off(policy, task.section.dtype)
    reference = sharding.frozen(task.reference_model_id, task.section.dtype)
    sharding.watch(reference)
    return frozen(reference, task.section.dtype)


@dataclass(frozen=True)
class _Step:
    groups: list[Group]
    look: bool


class SharedSteps:
    """The groups of each step, the same on every rank; rank 0 reads, the others listen."""

    def __init__(self, task: TrainTask, workers: Workers, *, skip: int) -> None:
        self._task, self._workers, self._skip = task, workers, skip
        self._looked = time.monotonic()
        self.look = False
        """Whether all ranks are to ask, after this step, if a node is about to go: now and then, and all of them or none."""

    def __iter__(self) -> Iterator[Sequence[Group]]:
        """Yield the groups of the steps that are left."""
        task, first = self._task, self._workers.rank == 0
        steps: Iterator[list[Group]] = iter(())
        if first:
            section = task.section
            steps = read_ahead(
                task.home_uri,
                task.files,
                seed=section.seed,
                epochs=task.epochs,
                batch_pairs=section.batch_pairs,
                skip=self._skip,
            )
        for number in range(self._skip, task.total_steps):
            step = next(steps, None) if first else None
            if first and step is None:
                msg = f"the stream ended at step {number} of {task.total_steps}"
                raise DataError(msg)
            own = None if step is None else _Step(step, look=time.monotonic() - self._looked > _LOOK_S)
            shared = self._workers.share(own) if isinstance(self._workers, DistributedWorkers) else own
            assert shared is not None  # noqa: S101  a worker that is alone is the first
            self.look = shared.look
            if self.look:
                self._looked = time.monotonic()
            yield shared.groups


def _before(
    task: TrainTask,
    sharding: _Whole,
    policy: ScoringModel,
    held_out: Sequence[Group],
    common: _Common,
    *,
    done_steps: int,
) -> Measures:
    """Return what the model that training begins with gives for what is held out; measured before the first step, and kept.

    Then the policy is that model: another one beside weights, gradients and moments would be memory that training never took.
    """
    run, workers = task.home().artifact("runs", task.identity.run_id), common["workers"]
    if done_steps:
        known: RunResult | None = None
        if workers.rank == 0:
            with suppress(DataError):
                known = _stored(run, BEFORE)
        known = workers.gather([known] if workers.rank == 0 else [])[0]
        if known is not None:
            return known.measures
        # A run from before these were kept, or a damaged file.
        policy = sharding.frozen(task.start_model_id, _dtype(task.section), agreement=policy.agreement)
    measures = measure(policy, held_out, **common)
    if workers.rank == 0:
        write_atomically(run.filesystem, f"{run.path}/{BEFORE}", json.dumps(_plain(measures)).encode())
    return measures


def _nodes_going(steps: SharedSteps) -> set[str]:
    """Return the nodes of this run's workers that are about to be taken away, as far as that was asked."""
    info = ray.train.get_preemption_info() if steps.look else None
    return set(info.preempted_node_ids) if info is not None else set()


def _to_prove(groups: Sequence[Group], token_budget: int) -> list[list[Group]]:
    """Take a few groups that fit in one micro-batch, at least one, and by itself the one with the longest row if it is not among them.

    What a model does otherwise in long rows (a window, chunks) shows in none of the short ones. A row is the prompt with one answer.
    Training may hold one as long, whatever the budget: a group is never divided.
    """
    few: list[Group] = []
    for group in groups[:_STEP_ZERO_GROUPS]:
        if few and sum(g.num_tokens for g in few) + group.num_tokens > token_budget:
            break
        few.append(group)
    longest = max(groups, key=lambda group: len(group.prompt_ids) + max(map(len, group.responses)))
    return [few] if longest in few else [few, [longest]]


def _export(
    task: TrainTask,
    sharding: _Whole,
    exported: ScoringModel,
    tokenizer: Any,
    measures: Measures,
    workers: Workers,
    *,
    memory: dict[str, int],
) -> None:
    """Write the model and what it measured; every worker calls it, the first one writes."""
    if workers.rank:
        sharding.save(exported, None)
        return
    home = task.home()
    artifact = home.artifact(f"runs/{task.identity.run_id}", EXPORT)
    filesystem = artifact.filesystem
    if filesystem.exists(artifact.path):
        remove_if_allowed(filesystem, artifact.path)  # of an attempt before; files of the same names take their place
    filesystem.makedirs(artifact.path, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prefloop-export-") as scratch:
        sharding.save(exported, Path(scratch))
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                filesystem.put_file(str(path), f"{artifact.path}/{path.relative_to(scratch)}")
    artifact.write_manifest({"run_id": task.identity.run_id})
    finite = measures.finite()
    lost = len(measures.pairs) + len(measures.answers) - len(finite.pairs) - len(finite.answers)
    result = {**_plain(finite), "reference_memory": memory, "not_finite": lost}
    run = home.artifact("runs", task.identity.run_id)
    write_atomically(filesystem, f"{run.path}/{RESULT}", json.dumps(result).encode())


@dataclass(frozen=True)
class RunResult:
    """What the first worker left of a finished run, beside the model."""

    measures: Measures
    """Of what was held out."""
    reference_memory: dict[str, int]
    """Bytes that a reference in slices took; empty where there was none."""
    not_finite: int
    """Held-out rows that were left out because their reward was no number."""


def run_result(home: Home, run_id: str) -> RunResult | None:
    """Return what a finished run left, or None where it left nothing; raises DataError where the file is damaged."""
    return _stored(home.artifact("runs", run_id), RESULT)


def _plain(measures: Measures) -> dict[str, Any]:
    return {"pairs": [asdict(m) for m in measures.pairs], "answers": [asdict(m) for m in measures.answers]}


def _stored(run: Artifact, name: str) -> RunResult | None:
    try:
        found = json.loads(run.filesystem.cat_file(f"{run.path}/{name}"))
        # `measures` is what runs of pairs wrote before there were others.
        pairs, answers = found.get("pairs", found.get("measures")), found.get("answers", [])
        measures = Measures([PairMeasure(**row) for row in pairs], [AnswerMeasure(**row) for row in answers])
        return RunResult(measures, found.get("reference_memory", {}), found.get("not_finite", 0))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        msg = f"`{run.path}/{name}` is damaged: {error}\n\nHint: remove it to evaluate the model all the same; its reward accuracy is not known then, which the gate's rule `reward_accuracy` holds."
        raise DataError(msg) from None


def summary(measures: Measures) -> dict[str, float]:
    """Return the means over what was held out, by the names of the ledger's metrics; nothing where there is nothing."""
    found: dict[str, float] = {}
    measures = measures.finite()
    losses = [m.loss for m in measures.pairs if m.loss is not None] + [m.loss for m in measures.answers]
    if losses:
        found["held_out_loss"] = sum(losses) / len(losses)
    if measures.pairs:
        margins = [m.margin for m in measures.pairs]
        found["held_out_accuracy"] = sum(m > 0 for m in margins) / len(margins)
        found["held_out_ties"] = sum(m == 0 for m in margins) / len(margins)
        found["held_out_margin"] = sum(margins) / len(margins)
        # Against the model that training began with, which no step of an objective without a reference knows.
        moved = [m.chosen_change for m in measures.pairs if m.chosen_change is not None]
        if moved:
            found["held_out_chosen_change"] = sum(moved) / len(moved)
            found["held_out_chosen_fell"] = sum(change < 0 for change in moved) / len(moved)
    return found
