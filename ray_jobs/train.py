"""Train: training snapshot + start model -> run, merged model artifact.

    python -m ray_jobs.train RECIPE.yaml [--set a.b=c] [--run RUN_ID] [--training-snapshot ID]

A Ray Train job; `ray_jobs.worker` is what runs on each worker. The same run id again continues from the newest valid
checkpoint. Prints whether the model learned: held-out reward accuracy against chance and against the length-only
baselines, with intervals by prompt cluster.
"""

import argparse
import dataclasses
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from rich.console import Console

from app.config import (
    HALVINGS,
    Recipe,
    TrainSection,
    TunedBy,
    unusual_options,
    unusual_rate,
    usual_learning_rate,
)
from app.errors import (
    DataError,
    OutOfMemory,
    PrefloopError,
    ServiceError,
    WorkersLost,
)
from app.evaluation.learning import FEW_CLUSTERS, Learning, Likelihood, judge_answers, judge_learning, judge_likelihood
from app.ledger import TAKEN_OVER_S, Ledger, ModelRow, RunStepRow, SnapshotRow
from app.models import (
    Lineage,
    computes_bfloat16,
    load_architecture,
    load_tokenizer,
    model_width,
    register_folder,
    template_digest,
)
from app.preferences.snapshots import resolve_snapshot
from app.schemas import Split
from app.storage import Artifact, Home, arrow_filesystem, remove_if_allowed
from app.training.checkpoints import RunIdentity, newest_checkpoint
from app.training.held_out import Measures
from app.training.judgements import Unit, balanced, distinct
from app.training.objectives import Objective, load_objective
from app.training.scoring import alike_up_to, unpackable
from app.training.snapshots import (
    SHUFFLE_WINDOW,
    TrainFile,
    check_binding,
    count_steps,
    read_groups,
    train_files,
)
from ray_jobs.preflight import preflight
from ray_jobs.prepare import named_model, prepare, print_summary, require_reference_in_use
from ray_jobs.progress import Meter
from ray_jobs.recorder import REFUSALS, StepRecorder
from ray_jobs.rendezvous import NodeTorchConfig
from ray_jobs.runs import (
    HALVED,
    own_snapshot,
    recipe_digest,
    record_end,
    record_known,
    record_start,
    steps_without_update,
)
from ray_jobs.session import COLLECTIVE_TIMEOUT_S, Session, ray_cluster, require_room, run_job, warn_of_idle_gpus
from ray_jobs.stream import READ_CPUS
from ray_jobs.trackers import Follower, Trackers, require_trackers, tracked
from ray_jobs.worker import (
    EXPORT,
    MOST_HELD_OUT,
    RESULT,
    RunResult,
    TrainTask,
    require_packable,
    run_result,
    summary,
    train_worker,
)

_FEWEST_STEPS = 32
"""Of a recipe that says neither epochs nor steps: fewer hardly move a model at rates that do not break it."""

_MORE_ROOM = "\n\nHint: the pairs of a prompt are never divided: set train.activation_checkpointing, lower prepare.max_length, or take fewer pairs.max_pairs_per_prompt."


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its model and what the held-out pairs say."""

    run_id: str
    model: ModelRow
    steps: int
    learning_rate: float
    """Its peak: the recipe's or the usual one."""
    learning: Learning | Likelihood | None
    metrics: dict[str, float]
    """Of what was held out, by the names of the ledger."""
    skipped_steps: int
    """Steps whose loss or gradient was not finite, so that they made no update."""
    worker_result: RunResult


def train(
    home: Home,
    ledger: Ledger,
    recipe: Recipe,
    training_snapshot_id: str,
    *,
    run_id: str,
    console: Console | None = None,
) -> TrainResult:
    """Train one run to its end and register its model; progress is printed to the console.

    Raises:
        DataError: the snapshot differs from its manifest, does not fit the recipe or has too few pairs.
        RecipeError: a tracker is not installed.
        ServiceError: the cluster has no room for the workers, or another process trains this run.
        WorkersLost: workers failed more often than `workers.max_failures`; the same run id continues.
        TrainingError: a worker refused to go on (another reference, packing that is not exact, a loss that is not
            finite), which is not tried again.
        ModelError: a worker cannot load, pack or adapt the model; not tried again either.
    """
    with ledger.alone(f"train-{run_id}", patience_s=TAKEN_OVER_S) as alone:
        if not alone:
            # Each would take the other's checkpoints for unfinished ones, and remove them.
            msg = f"run `{run_id}` is being trained by another process\n\nHint: wait for it, stop it, or choose another --run."
            raise ServiceError(msg)
        return _train(home, ledger, recipe, training_snapshot_id, run_id=run_id, console=console)


def _train(
    home: Home, ledger: Ledger, recipe: Recipe, training_snapshot_id: str, *, run_id: str, console: Console | None
) -> TrainResult:
    require_trackers(recipe.track, home)
    start = named_model(home, ledger, recipe, recipe.model.start)
    reference = named_model(home, ledger, recipe, recipe.model.reference_model)
    snapshot = home.artifact("training", training_snapshot_id)
    held_out = int(snapshot.verify()["splits"][Split.HELD_OUT.value]["rows"])
    files = tuple(train_files(snapshot))
    objective = load_objective(recipe.train.objective, recipe.train.options)
    require_reference_in_use(recipe, objective)
    counts = _check_snapshot(home, snapshot, recipe, objective, start, reference)
    # Snapshots from before there were objectives without pairs do not know these weights, and need none.
    weights = {side: counts.get(f"{side}_weight", 0.0) for side in ("liked", "disliked")}
    options = balanced({**recipe.train.options, **objective.open_weights}, **weights)
    section = recipe.train.model_copy(update={"options": options})
    epochs, steps = _plan(section, files)
    total_steps = min(steps, section.max_steps or steps)
    tuned_by = _tuned_by(ledger, start, recipe)
    usual = usual_learning_rate(
        section.objective,
        section.adapter,
        width=model_width(home, start.model_id),
        total_steps=total_steps,
        tuned_by=tuned_by,
    )
    warnings = _warnings(section, usual, held_out=held_out, on_cpus=not recipe.workers.use_gpu)
    if objective.coupled:
        warnings.append(
            f"the loss that `{objective.name}` gives a row depends on the rows beside it: it is given a whole step at once, which is scored twice for that"
        )
    if console is not None:
        for warning in warnings:
            console.print(f"warning: {warning}", highlight=False, markup=False)
    task = TrainTask(
        home_uri=home.uri,
        identity=RunIdentity(
            run_id,
            training_snapshot_id,
            start.digest,
            recipe_digest(recipe),
            reference.digest if objective.has_reference else "",
        ),
        start_model_id=start.model_id,
        reference_model_id=reference.model_id,
        section=section,
        epochs=epochs,
        files=files,
        total_steps=total_steps,
        learning_rate=section.learning_rate or usual,
        threads=recipe.workers.threads,
    )
    known = record_start(ledger, recipe, task, objective, reference)
    for warning in [*unusual_options(section.objective, section.options, tuned_by=tuned_by), *warnings]:
        ledger.audit("train", "warning", run_id, {"warning": warning})
    # What is usual may be another rate with a newer version of this program.
    task = dataclasses.replace(task, learning_rate=known.get("learning_rate", task.learning_rate))
    if (tokens := known.get(HALVED)) is not None:
        task = dataclasses.replace(task, section=section.model_copy(update={"micro_batch_tokens": tokens}))
    trackers = Trackers(recipe.track, home, run_id, recipe.model_dump(mode="json"))
    follower = Follower(ledger, run_id, trackers, console, partial(_show, total=task.total_steps))
    try:
        # A worker would refuse them too, once it has started.
        newest_checkpoint(home, task.identity, passed={})
        _fit_in_memory(home, ledger, recipe, task, console=console)
        result = _finish(home, ledger, recipe, objective, task)
        follower.end((task.total_steps, tracked(result.metrics)))
        return result
    except TrainingFailedError as error:
        refusal = getattr(error, "controller_failure", None)
        if isinstance(refusal, REFUSALS):
            why = f"{refusal}{_MORE_ROOM if isinstance(refusal, OutOfMemory) else ''}"
            record_end(ledger, run_id, status="failed", error=why)
            msg = f"run `{run_id}` was refused by a worker: {why}"
            raise type(refusal)(msg) from error
        cause = _cause(error)
        record_end(ledger, run_id, status="failed", error=cause)
        msg = f"run `{run_id}` failed: {cause}\n\nHint: the same run id continues from its last checkpoint."
        raise WorkersLost(msg) from error
    except PrefloopError as error:
        record_end(ledger, run_id, status="failed", error=str(error))
        raise
    except KeyboardInterrupt:
        record_end(ledger, run_id, status="stopped", error="interrupted")
        raise
    except Exception as error:
        record_end(ledger, run_id, status="failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        follower.end()


def _tuned_by(ledger: Ledger, start: ModelRow, recipe: Recipe) -> TunedBy:
    """Return what a model and those it descends from learned from; of the one from outside the recipe knows."""
    row: ModelRow | None = start
    with ledger.read() as session:
        while row is not None and (made_by := row.manifest.get("recipe")) is not None:
            if made_by.get("train", {}).get("objective") != "sft":
                return "preferences"
            row = session.get(ModelRow, row.parent_id) if row.parent_id is not None else None
    return recipe.model.sft_tuned_by


def _warnings(section: TrainSection, usual: float, *, held_out: int, on_cpus: bool) -> list[str]:
    """Return what somebody should know before the run, a line each."""
    found = unusual_rate(section.learning_rate, usual)
    if not held_out and section.held_out_every:
        found.append("nothing is held out, so train.held_out_every measures nothing")
    if held_out > MOST_HELD_OUT:
        found.append(f"of {held_out} held-out rows the first {MOST_HELD_OUT} are measured")
    if on_cpus and section.dtype == "bfloat16" and not computes_bfloat16():
        found.append("this CPU computes in bfloat16 several times slower than in float32: set train.dtype to float32")
    return found


def _plan(section: TrainSection, files: tuple[TrainFile, ...]) -> tuple[int, int]:
    """Return the epochs, as many as the recipe says or as its fewest steps take, and their optimizer steps."""

    def steps_of(epochs: int) -> int:
        return count_steps(
            files, seed=section.seed, epochs=epochs, window=SHUFFLE_WINDOW, batch_pairs=section.batch_pairs
        )

    if section.epochs is not None:
        return section.epochs, steps_of(section.epochs)
    fewest, once = section.min_steps or _FEWEST_STEPS, steps_of(1)
    # Epochs follow one another without a cut; in another order one may have a step more.
    epochs = max(1, fewest // (once + 1))
    while 0 < (steps := steps_of(epochs)) < fewest:
        epochs += 1
    return epochs, steps


def _show(meter: Meter, row: RunStepRow, *, total: int) -> None:
    meter.show("train: steps", row.step, total, _note(row.metrics))
    if measured := _measured_now_and_then(row.metrics):
        meter.say(f"train: step {row.step}: {measured}")


def _note(metrics: dict[str, Any]) -> str:
    accuracy = metrics["reward_accuracy"]
    known = [] if accuracy is None else [f"reward accuracy {accuracy:.0%}"]
    unit = "pairs" if metrics["pairs"] else "answers"
    speed = f"{(metrics['pairs'] or metrics['labels']) / metrics['seconds']:.1f} {unit}/s"
    loss = "not finite, no update" if metrics["loss"] is None else f"loss {metrics['loss']:.3f}"
    return ", ".join([loss, *known, speed])


_NOW_AND_THEN = {
    "held_out_accuracy": "held-out accuracy {:.1%}",
    "held_out_loss": "held-out loss {:.4g}",
    "held_out_chosen_change": "chosen answers {:+.3f} nats a token",
    "held_out_chosen_fell": "{:.1%} of them less likely than at the start",
    "canary_finished": "canaries {:.1%} finished",
    "canary_repetition": "{:.1%} repeated",
    "canary_tokens": "{:.0f} tokens each",
}


def _measured_now_and_then(metrics: dict[str, Any]) -> str:
    """Return what `train.held_out_every` and `canary_every` found at a step, in words."""
    found = {name: metrics.get(name) for name in _NOW_AND_THEN}
    return ", ".join(_NOW_AND_THEN[name].format(value) for name, value in found.items() if value is not None)


def _check_snapshot(
    home: Home, snapshot: Artifact, recipe: Recipe, objective: Objective, start: ModelRow, reference: ModelRow
) -> dict[str, float]:
    precomputed = objective.has_reference and recipe.train.reference == "precomputed"
    manifest = check_binding(
        snapshot,
        template_digest=template_digest(load_tokenizer(home, start.model_id)),
        max_length=recipe.prepare.max_length,
        too_long=recipe.prepare.too_long,
        unit=objective.unit,
        strangers="kl" in objective.needs,
        reference_digest=reference.digest if precomputed else None,
        dtype=recipe.train.dtype,
    )
    if recipe.train.sharding == "zero3":
        sliced = (start, reference) if objective.has_reference and recipe.train.reference == "sharded" else (start,)
        for model_id in dict.fromkeys(model.model_id for model in sliced):
            model = load_architecture(home, model_id).model
            alike = alike_up_to(model)
            reason = unpackable(model)
            if reason is None and alike is not None and recipe.prepare.max_length > alike:
                reason = f"it turns positions otherwise in rows of more than {alike} tokens (prepare.max_length = {recipe.prepare.max_length})"
            require_packable(reason, model_id)
    counts: dict[str, float] = manifest["splits"]["train"]
    require_pairs(recipe, int(counts.get("judged", counts["pairs"])))
    return counts


def require_pairs(recipe: Recipe, pairs: int) -> None:
    """Refuse to train on fewer pairs than the recipe wants; raises DataError."""
    if pairs < recipe.pairs.min_pairs:
        what = "pairs" if load_objective(recipe.train.objective, recipe.train.options).unit == "pairs" else "judgements"
        msg = f"{pairs} training {what} are fewer than pairs.min_pairs = {recipe.pairs.min_pairs}\n\nHint: collect more feedback, or lower pairs.min_pairs if you know that a small run is what you want."
        raise DataError(msg)


def usable_rows(recipe: Recipe, pairs: SnapshotRow) -> int:
    """Return how many rows of the train split of a pair snapshot the objective can learn from, before tokenisation."""
    unit = load_objective(recipe.train.objective, recipe.train.options).unit
    counts = pairs.manifest["counts"]
    usable: int = counts["pairs_by_split" if unit == "pairs" else "by_split"].get("train", 0)
    return usable


def look_ahead(home: Home, recipe: Recipe, console: Console) -> None:
    """Refuse a run, or warn of it, before hours go into what comes before it.

    Raises:
        ServiceError: the cluster has no room for the run, or a node of it cannot do its part.
        RecipeError: a tracker is not installed.
        DataError: a tracker writes files, and the home is no local folder.
    """
    _require_train_room(recipe)
    preflight(home, home.ledger_url)
    require_trackers(recipe.track, home)
    warn_of_idle_gpus(recipe.workers, console)


def tell_unusual_options(home: Home, ledger: Ledger, recipe: Recipe, console: Console) -> None:
    """Say which options are beyond what is usual; `train` itself only keeps that with the run."""
    tuned_by = _tuned_by(ledger, named_model(home, ledger, recipe, recipe.model.start), recipe)
    for warning in unusual_options(recipe.train.objective, recipe.train.options, tuned_by=tuned_by):
        console.print(f"warning: {warning}", highlight=False, markup=False)


def _require_train_room(recipe: Recipe) -> None:
    require_room(recipe.workers, recipe.workers.workers, reading=READ_CPUS)


def _fit_in_memory(home: Home, ledger: Ledger, recipe: Recipe, task: TrainTask, *, console: Console | None) -> None:
    """Train, with half of the tokens in a micro-batch where a worker's memory does not hold them; steps stay the same.

    Raises:
        TrainingFailedError: as `fit` does, also where half and a quarter of the tokens are too many.
    """
    for attempt in range(HALVINGS + 1):
        try:
            _fit(home, recipe, task)
            return
        except TrainingFailedError as error:
            refusal = getattr(error, "controller_failure", None)
            if not isinstance(refusal, OutOfMemory) or attempt == HALVINGS:
                raise
            held = task.section.token_budget(recipe.workers.device)
            tokens = held // 2
            told = f"a worker's memory did not hold {held} tokens: going on with micro-batches of {tokens} ({refusal})"
            ledger.audit("train", "note", task.identity.run_id, {"note": told})
            record_known(ledger, task.identity.run_id, {HALVED: tokens})
            if console is not None:
                console.print(f"warning: {told}", highlight=False, markup=False)
            task = dataclasses.replace(task, section=task.section.model_copy(update={"micro_batch_tokens": tokens}))


def _fit(home: Home, recipe: Recipe, task: TrainTask) -> None:
    workers = recipe.workers
    _require_train_room(recipe)
    preflight(home, home.ledger_url)
    attempt = uuid.uuid4().hex[:8]
    arrow = arrow_filesystem(home.uri)
    trainer = TorchTrainer(
        # Bound, not as `train_loop_config`: the controller would unpickle that, and import transformers for it.
        partial(train_worker, task),
        torch_config=NodeTorchConfig(
            backend="cpu:gloo,cuda:nccl" if workers.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ScalingConfig(
            num_workers=workers.workers,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker, **({"GPU": 1} if workers.use_gpu else {})},
        ),
        run_config=RunConfig(
            # Ray's own snapshot of a run is not written atomically, so no attempt ever reads another's.
            name=f"{task.identity.run_id}-{attempt}",
            storage_path=f"{home.uri}/runs/{task.identity.run_id}/ray"
            if arrow is None
            else home.path("runs", task.identity.run_id, "ray"),
            storage_filesystem=arrow,
            # The annotations in `ray.train` are those of Train V1, the classes those of V2.
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
            callbacks=[StepRecorder(home.ledger_url, task.identity.run_id)],  # type: ignore[list-item]
        ),
    )
    _fit_interruptibly(trainer)


def _fit_interruptibly(trainer: TorchTrainer) -> None:
    """Run `fit` in a thread: in the main thread it takes Ctrl-C for itself and leaves the process with exit code 0."""
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:  # noqa: BLE001  raised again below, in the main thread
            outcome.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join()
    if outcome[0] is not None:
        raise outcome[0]


def _finish(home: Home, ledger: Ledger, recipe: Recipe, objective: Objective, task: TrainTask) -> TrainResult:
    run_id = task.identity.run_id
    result = run_result(home, run_id)
    if result is None:
        msg = f"run `{run_id}` ended without `{RESULT}`, which its first worker writes\n\nHint: is `{home.uri}` a folder that all nodes see? The same run id continues."
        raise WorkersLost(msg)
    snapshot = home.artifact("training", task.identity.snapshot_id)
    means = summary(result.measures)
    learning = _judge(
        result.measures,
        objective.unit,
        seed=recipe.train.seed,
        sources=distinct(read_groups(snapshot, Split.HELD_OUT, at_most=MOST_HELD_OUT)),
    )
    counts = snapshot.manifest()["counts"]
    metrics = {
        **means,
        "steps": task.total_steps,
        "learning_rate": task.learning_rate,
        "simulated_pairs": counts.get("simulated", 0),
    }
    if learning is not None:
        metrics["learning"] = dataclasses.asdict(learning)
    if result.not_finite:
        metrics["held_out_not_finite"] = result.not_finite
    skipped = steps_without_update(ledger, run_id)
    if skipped:
        metrics["steps_skipped"] = skipped
    if result.reference_memory:
        metrics["reference_memory"] = result.reference_memory
    export = home.artifact(f"runs/{run_id}", EXPORT)
    with _told_of_storage(), export.local_copy() as folder:
        lineage = Lineage(
            kind="merged" if recipe.train.adapter == "lora" else "full",
            parent_id=task.start_model_id,
            run_id=run_id,
            snapshot_id=task.identity.snapshot_id,
            recipe=recipe.model_dump(mode="json"),
            metrics=metrics,
        )
        model = register_folder(home, ledger, folder, name=recipe.name, lineage=lineage)
    remove_if_allowed(export.filesystem, export.path)
    record_end(ledger, run_id, status="succeeded", metrics=metrics, output_model_id=model.model_id)
    return TrainResult(run_id, model, task.total_steps, task.learning_rate, learning, means, skipped, result)


@contextmanager
def _told_of_storage() -> Iterator[None]:
    """Say that the run is done where the home or this machine's disk does not take the model that leaves it.

    Not as a DataError, which would have the loop begin a new round: nothing of what was trained is wrong.
    """
    try:
        yield
    except OSError as error:
        msg = f"the run is done, and its model cannot be registered: {error}\n\nHint: is there room in the home and in {tempfile.gettempdir()} of this machine? The same run id goes on from here."
        raise ServiceError(msg) from error


def _judge(measures: Measures, unit: Unit, *, seed: int, sources: dict[str, str]) -> Learning | Likelihood | None:
    """Say whether the run learned, by the measure of its objective; None where too little was held out."""
    pairs, answers = measures.pairs, measures.answers
    if unit == "good":
        return judge_likelihood(answers, level=0.95, seed=seed)
    if answers and len({pair.cluster for pair in pairs}) < FEW_CLUSTERS:
        return judge_answers(answers, level=0.95, seed=seed)
    return judge_learning(pairs, level=0.95, seed=seed, sources=sources) if pairs else None


def _cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    # Workers that lost a peer fail as well; the peer that died is the cause.
    causes = sorted(map(str, failures.values()), key=lambda text: "died" not in text) or [str(error)]
    lines = [line.strip() for line in causes[0].splitlines() if line.strip()]
    died = [line for line in lines if "died" in line]
    # "Training failed due to controller error:" says nothing without the line that follows.
    named = died[:1] or [line for line in lines if "Error" in line][-1:] or lines[: 2 if lines[0].endswith(":") else 1]
    return " ".join(named) or "unknown"


def print_measures(console: Console, result: TrainResult) -> None:
    """Print the table that says whether the model learned from its pairs, and what a reference in slices took."""
    if result.learning is None:
        console.print("too little was held out: whether the model learned is not known", highlight=False)
    else:
        console.print(result.learning.table(), highlight=False)
    if result.worker_result.not_finite:
        console.print(
            f"left out: {result.worker_result.not_finite} held-out rows whose reward is no number", highlight=False
        )
    if memory := result.worker_result.reference_memory:
        mb = {name: count / 1e6 for name, count in memory.items()}
        console.print(
            f"reference in slices: {mb['total']:.4g} MB in all, at most {mb['held']:.4g} MB on each of {memory['workers']} workers, "
            f"{mb['loading']:.4g} MB while it loads and {mb['peak']:.4g} MB while it computes (largest layer {mb['largest']:.4g} MB), no optimizer",
            highlight=False,
        )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run id; an existing one continues")
    parser.add_argument("--training-snapshot", help="default: prepared from the recipe's pair snapshot")


def _enough_pairs(home: Home, ledger: Ledger, recipe: Recipe) -> str:
    pairs = resolve_snapshot(home, ledger, recipe.snapshot, kind="pairs", deployment=recipe.serving.deployment)
    require_pairs(recipe, usable_rows(recipe, pairs))
    return pairs.snapshot_id


def _body(session: Session, options: argparse.Namespace) -> int:
    console = Console()
    home, ledger, recipe = session.home, session.ledger, session.recipe
    with ray_cluster(home):
        look_ahead(home, recipe, console)
        snapshot_id = options.training_snapshot or own_snapshot(home, ledger, recipe, options.run)
        if snapshot_id is None:
            pairs_id = _enough_pairs(home, ledger, recipe)
        elif options.training_snapshot is None:
            console.print(f"training snapshot {snapshot_id}, which the run began with", highlight=False)
        tell_unusual_options(home, ledger, recipe, console)
        if snapshot_id is None:
            row = prepare(home, ledger, recipe, pairs_id, console=console)
            print_summary(console, row)
            snapshot_id = row.snapshot_id
        run_id = options.run or f"{recipe.name}-{uuid.uuid4().hex[:8]}"
        console.print(f"run [bold]{run_id}[/bold]; interrupted, it continues with --run {run_id}", highlight=False)
        result = train(home, ledger, recipe, snapshot_id, run_id=run_id, console=console)
    print_measures(console, result)
    lost = f" ({result.skipped_steps} of them without an update)" if result.skipped_steps else ""
    console.print(
        f"run {result.run_id}: {result.steps} steps{lost}, learning rate up to {result.learning_rate:.3g}, model [bold]{result.model.model_id}[/bold]",
        highlight=False,
    )
    return 0


def main() -> int:
    """Run the job."""
    return run_job("train", _body, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
