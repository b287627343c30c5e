"""Sinks for the metrics of a run: TensorBoard, MLflow, Weights & Biases. The ledger has them all in any case.

Names are TRL's where they mean the same, under `train/` and `eval/` as transformers' integrations write them. MLflow and
W&B are extras (`track`) and take their address and key from their own environment variables; nothing of them is in a
recipe. A sink that fails says so once and is left: a run does not stop for it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from app.config import TrackSection
from app.errors import RecipeError
from app.storage import Home

_PROJECT = "prefloop"
_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "reward_chosen": "train/rewards/chosen",
    "reward_rejected": "train/rewards/rejected",
    "reward_margin": "train/rewards/margins",
    "reward_accuracy": "train/rewards/accuracies",
    "logp_chosen": "train/logps/chosen",
    "logp_rejected": "train/logps/rejected",
    "kl": "train/kl",
    "held_out_loss": "eval/loss",
    "held_out_accuracy": "eval/rewards/accuracies",
    "held_out_margin": "eval/rewards/margins",
    "held_out_ties": "eval/rewards/ties",
    "reward_ties": "train/rewards/ties",
}
"""What TRL has, and ties, which it counts as losses; every other metric is `train/` and its own name."""
_NO_METRICS = frozenset({"step", "skipped"})


class Tracker(Protocol):
    """One sink of one run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

    def close(self) -> None:
        """Write what is held back."""


def tracked(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a step report by the names of the sinks; what is not known is left out."""
    return {
        _NAMES.get(name, f"train/{name}"): float(value)
        for name, value in report.items()
        if name not in _NO_METRICS and isinstance(value, int | float)
    }


class Trackers:
    """All sinks of a run; the first error of a sink is kept in `lost` and the sink is left.

    Args:
        section: which sinks.
        home: where TensorBoard's and W&B's files go: `runs/RUN/track`.
        run_id: names the run in each sink; the same id goes on with it.
        recipe: plain values, told to sinks that keep settings.
    """

    def __init__(self, section: TrackSection, home: Home, run_id: str, recipe: Mapping[str, Any]) -> None:
        self.lost: dict[str, str] = {}
        self._open: dict[str, Tracker] = {}
        folder = home.local("runs", run_id, "track") if section.to else Path()
        for kind in section.to:
            with self._losing(kind):
                if kind == "tensorboard":
                    self._open[kind] = _TensorBoard(folder)
                elif kind == "mlflow":
                    self._open[kind] = _Mlflow(section.project or _PROJECT, run_id, recipe)
                else:
                    self._open[kind] = _Wandb(section.project or _PROJECT, run_id, recipe, folder)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to every sink."""
        for kind, tracker in list(self._open.items()):
            with self._losing(kind):
                tracker.log(step, metrics)

    def close(self) -> None:
        """Close every sink."""
        for kind, tracker in list(self._open.items()):
            with self._losing(kind):
                tracker.close()
        self._open.clear()

    @contextmanager
    def _losing(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  a sink's own library raises whatever its network does
            self.lost[kind] = f"{type(error).__name__}: {error}"
            self._open.pop(kind, None)


def require_trackers(section: TrackSection, home: Home) -> None:
    """Refuse sinks whose library is not installed, or files for them in a remote home; raises RecipeError, DataError."""
    if section.to:
        home.local("runs")
    missing = [kind for kind in section.to if not _installed(kind)]
    if missing:
        msg = f"track.to names {', '.join(missing)}, which is not installed\n\nHint: install prefloop with its extra `track` where the job runs."
        raise RecipeError(msg)


def _installed(kind: str) -> bool:
    from importlib.util import find_spec

    return find_spec({"tensorboard": "tensorboardX"}.get(kind, kind)) is not None


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, project: str, run_id: str, recipe: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        known = self._client.search_runs([experiment_id], f"tags.`prefloop.run_id` = '{run_id}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        run = self._client.create_run(experiment_id, run_name=run_id, tags={"prefloop.run_id": run_id})
        self._run = run.info.run_id
        self._client.log_dict(self._run, dict(recipe), "recipe.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        moment = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, v, moment, step) for name, v in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Wandb:
    def __init__(self, project: str, run_id: str, recipe: Mapping[str, Any], folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project, id=run_id, name=run_id, config=dict(recipe), resume="allow", dir=str(folder)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
