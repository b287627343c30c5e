"""What a run keeps in the ledger: what it began with, what its attempts found out, how it ended.

The same run id goes on only with what its numbers depend on as it was; machines, memory and evaluation may be others.
Steps are not recorded here (`ray_jobs.recorder`), nor checkpoints (`app.training.checkpoints`).
"""

from typing import Any

import sqlalchemy as sa

from app.config import Recipe, deciding, differing
from app.errors import RecipeError, TrainingError
from app.ledger import Ledger, ModelRow, RunRow, RunStepRow, now
from app.models import code_version
from app.schemas import content_hash
from app.storage import Home
from app.training.objectives import Objective
from ray_jobs.worker import TrainTask

HALVED = "micro_batch_tokens"
"""Of the metrics of a run: what memory held, for the attempts that follow."""
_SOURCE = "objective_source"
"""Of the metrics of a run: what an objective of one's own was made of."""


def own_snapshot(home: Home, ledger: Ledger, recipe: Recipe, run_id: str | None) -> str | None:
    """Return the training snapshot that an unfinished run began with, though newer feedback makes another one by now.

    None where it is a new run, or one that another recipe began, or the home has its snapshot no more.
    """
    with ledger.read() as session:
        row = session.get(RunRow, run_id) if run_id is not None else None
    if row is None or row.snapshot_id is None:
        return None
    before, after = row.recipe, recipe.model_dump(mode="json")
    asked = [
        {
            **_numbers(tree),
            "snapshot": tree.get("snapshot"),
            "pairs": tree.get("pairs"),
            "deployment": tree["serving"]["deployment"],
        }
        for tree in (before, after)
    ]
    if row.status == "succeeded" or differing(*asked):
        return None
    return row.snapshot_id if home.artifact("training", row.snapshot_id).exists() else None


def recipe_digest(recipe: Recipe) -> str:
    """Return the digest of all that decides the numbers of a run, for its checkpoints."""
    return content_hash(deciding(_numbers(recipe.model_dump(mode="json"))))


def record_start(
    ledger: Ledger, recipe: Recipe, task: TrainTask, objective: Objective, reference: ModelRow
) -> dict[str, Any]:
    """Note that a run begins or goes on; return what attempts before this one found out.

    Raises:
        TrainingError: the run began with another snapshot, reference or recipe.
        RecipeError: its objective is another one by the same name.
    """
    identity, tree = task.identity, recipe.model_dump(mode="json")
    with ledger.write() as session:
        row = session.get(RunRow, identity.run_id)
        if row is None:
            row = RunRow(
                run_id=identity.run_id,
                kind="train",
                recipe=tree,
                snapshot_id=identity.snapshot_id,
                start_model_id=task.start_model_id,
                reference_model_id=reference.model_id if objective.has_reference else None,
                metrics={
                    "total_steps": task.total_steps,
                    "learning_rate": task.learning_rate,
                    **_own_source(objective),
                },
                attempt=0,
                code_version=code_version(),
                created_at=now(),
                updated_at=now(),
                status="running",
            )
            session.add(row)
        elif changed := _changed(row, tree, task, reference if objective.has_reference else None):
            msg = f"run `{identity.run_id}` exists with another {', '.join(changed)}\n\nHint: choose another --run, or leave it out."
            raise TrainingError(msg)
        elif row.metrics.get(_SOURCE) != _own_source(objective).get(_SOURCE):
            msg = f"run `{identity.run_id}` began with another source of `{objective.name}`\n\nHint: put it back as it was, or choose another --run."
            raise RecipeError(msg)
        elif _memory_settings(row.recipe) != _memory_settings(tree):
            # What memory held then is not what it holds now.
            row.metrics = {key: value for key, value in row.metrics.items() if key != HALVED}
            row.recipe = tree
        row.status, row.attempt, row.updated_at, row.error = "running", row.attempt + 1, now(), None
        return dict(row.metrics)


def record_known(ledger: Ledger, run_id: str, found: dict[str, Any]) -> None:
    """Keep what an attempt found out for those that follow."""
    with ledger.write() as session:
        row = session.get_one(RunRow, run_id)
        row.metrics = {**row.metrics, **found}


def record_end(
    ledger: Ledger,
    run_id: str,
    *,
    status: str,
    error: str | None = None,
    metrics: dict[str, Any] | None = None,
    output_model_id: str | None = None,
) -> None:
    """Note how a run ended; what its attempts found out stays beside `metrics`."""
    with ledger.write() as session:
        row = session.get_one(RunRow, run_id)
        row.status, row.error, row.updated_at = status, error, now()
        row.metrics = {**row.metrics, **(metrics or {})}
        row.output_model_id = output_model_id or row.output_model_id


def steps_without_update(ledger: Ledger, run_id: str) -> int:
    """Return how many steps made none, as their loss or gradient was not finite."""
    reports = sa.select(RunStepRow.metrics).where(RunStepRow.run_id == run_id)
    with ledger.read() as session:
        return sum(bool(metrics.get("skipped")) for metrics in session.scalars(reports))


def _changed(row: RunRow, tree: dict[str, Any], task: TrainTask, reference: ModelRow | None) -> list[str]:
    """Return what is another one than when the run began, of all that its steps depend on."""
    ids = {
        "snapshot": (row.snapshot_id, task.identity.snapshot_id),
        "reference": (row.reference_model_id, reference and reference.model_id),
    }
    named = [f"{what} (`{before}`, now `{after}`)" for what, (before, after) in ids.items() if before != after]
    return [*named, *differing(_numbers(row.recipe), _numbers(tree))]


def _numbers(tree: dict[str, Any]) -> dict[str, Any]:
    """Return what the numbers of a run depend on; it may move to other machines, or be evaluated otherwise."""
    return {key: tree[key] for key in ("model", "prepare", "train")}


def _memory_settings(tree: dict[str, Any]) -> list[Any]:
    return [tree["train"].get(key) for key in ("micro_batch_tokens", "activation_checkpointing")]


def _own_source(objective: Objective) -> dict[str, str]:
    """Return the digest of an objective of one's own, for the metrics of a run."""
    return {_SOURCE: content_hash(objective.source)} if objective.source else {}
