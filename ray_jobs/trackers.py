"""Sinks for the metrics of a run: TensorBoard, MLflow, Weights & Biases. The ledger has them all in any case.

Names are TRL's where they mean the same, under `train/` and `eval/` as transformers' integrations write them. MLflow and
W&B are extras (`track`) and take their address and key from their own environment variables; nothing of them is in a
recipe. All of it happens in a thread that follows the ledger: a sink that fails or hangs stops no run. What a process told
is not told again by the one that continues its run, so the last second before a kill may be missing in a sink.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from app.config import TrackSection
from app.errors import RecipeError
from app.ledger import Ledger, RunStepRow
from app.storage import Home
from ray_jobs.progress import Meter

_PROJECT = "prefloop"
_LIBRARIES = {"tensorboard": "tensorboardX"}
_LAST_S = 20.0
"""How long the end of a run waits for its sinks."""
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
    "kl": "train/kl_estimate",  # TRL's `kl` is clamped to 0
    "held_out_loss": "eval/loss",
    "held_out_accuracy": "eval/rewards/accuracies",
    "held_out_margin": "eval/rewards/margins",
    "held_out_ties": "eval/rewards/ties",
    "held_out_chosen_change": "eval/chosen_change",
    "held_out_chosen_fell": "eval/chosen_fell",
    "reward_ties": "train/rewards/ties",
}
"""What TRL has, ties, which it counts as losses, and what `eval/` ours are; every other metric is `train/` and its own name."""
_FEW = 8
"""Rows that are named of a step without an update; the audit log has them all."""
_NO_METRICS = frozenset({"step", "skipped"})


class Tracker(Protocol):
    """One sink of one run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

    def close(self, *, failed: bool) -> None:
        """Write what is held back, and how the run ended."""


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
        self._make: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: _TensorBoard(home.local("runs", run_id, "track")),
            "mlflow": lambda: _Mlflow(section.project or _PROJECT, run_id, recipe),
            "wandb": lambda: _Wandb(section.project or _PROJECT, run_id, recipe, home.local("runs", run_id, "track")),
        }
        self._kinds = section.to

    def open(self) -> None:
        """Reach every sink, which may take its time."""
        for kind in self._kinds:
            with self._losing(kind):
                self._open[kind] = self._make[kind]()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to every sink."""
        for kind, tracker in list(self._open.items()):
            with self._losing(kind):
                tracker.log(step, metrics)

    def close(self, *, failed: bool) -> None:
        """Close every sink."""
        for kind, tracker in list(self._open.items()):
            with self._losing(kind):
                tracker.close(failed=failed)
        self._open.clear()

    @contextmanager
    def _losing(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  a sink's own library raises whatever its network does
            self.lost[kind] = f"{type(error).__name__}: {error}"
            with suppress(Exception):
                if (tracker := self._open.pop(kind, None)) is not None:
                    tracker.close(failed=True)


class Follower:
    """Follows the steps of a run in the ledger, as the controller writes them: shows them and tells the sinks."""

    def __init__(
        self,
        ledger: Ledger,
        run_id: str,
        trackers: Trackers,
        console: Console | None,
        show: Callable[[Meter, Any], None],
    ) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._trackers = trackers
        self._console = console
        self._show = show
        self._ended = threading.Event()
        self._outcome: tuple[int, Mapping[str, float]] | None = None
        self._known: set[str] = set()
        with ledger.read() as session:
            newest = sa.select(sa.func.max(RunStepRow.step)).where(RunStepRow.run_id == run_id)
            self._told: int = session.scalar(newest) or 0
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def end(self, outcome: tuple[int, Mapping[str, float]] | None = None) -> None:
        """Tell what is left and how the run ended, and stop; again changes nothing.

        Args:
            outcome: the last step and what was held out; None where the run failed.
        """
        if not self._ended.is_set():
            self._outcome = outcome
            self._ended.set()
            self._thread.join(timeout=_LAST_S)

    def _follow(self) -> None:
        with Meter(self._console) if self._console is not None else nullcontext() as meter:
            self._trackers.open()
            while not self._ended.wait(1.0):
                self._tell(meter)
            self._tell(meter)
        if self._outcome is not None:
            self._trackers.log(*self._outcome)
        self._trackers.close(failed=self._outcome is None)
        self._warn()

    def _tell(self, meter: Meter | None) -> None:
        newer = sa.select(RunStepRow).where(RunStepRow.run_id == self._run_id, RunStepRow.step > self._told)
        try:
            with self._ledger.read() as session:
                rows = session.scalars(newer.order_by(RunStepRow.step)).all()
        except SQLAlchemyError:
            return  # a second later the ledger may answer again
        for row in rows:
            self._trackers.log(row.step, tracked(row.metrics))
            self._told = row.step
            if (odd := row.metrics.get("skipped")) and self._console is not None:
                named = f"{', '.join(odd[:_FEW])}{' …' if len(odd) > _FEW else ''}"
                line = f"warning: step {row.step} made no update, a loss or gradient of it is not finite; rows: {named}"
                self._console.print(line, highlight=False, markup=False)
            if meter is not None:
                self._show(meter, row)
        self._warn()

    def _warn(self) -> None:
        for kind in self._trackers.lost.keys() - self._known:
            self._known.add(kind)
            why = self._trackers.lost[kind]
            with suppress(SQLAlchemyError):
                self._ledger.audit("train", "tracker lost", self._run_id, {"tracker": kind, "error": why})
            if self._console is not None:
                line = f"warning: {kind} gets no more of this run: {why}"
                self._console.print(line, highlight=False, markup=False)


def require_trackers(section: TrackSection, home: Home) -> None:
    """Refuse sinks that cannot be, before hours go into what comes before them.

    Raises:
        RecipeError: a library is not installed, or W&B has no key.
        DataError: files of a sink would lie in a remote home.
    """
    if {"tensorboard", "wandb"} & set(section.to):
        home.local("runs")
    missing = [kind for kind in section.to if find_spec(_LIBRARIES.get(kind, kind)) is None]
    if missing:
        msg = f"track.to names {', '.join(missing)}, which is not installed\n\nHint: install prefloop with its extra `track` where the job runs."
        raise RecipeError(msg)
    # Without a key it would ask for one on the terminal, in the middle of a run.
    known = {"WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"} & os.environ.keys()
    if "wandb" in section.to and not known and not Path("~/.netrc").expanduser().exists():
        msg = "track.to names wandb, and there is no key for it\n\nHint: set WANDB_API_KEY where the job runs, or WANDB_MODE=offline."
        raise RecipeError(msg)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  it keeps no such thing
        self._writer.close()


class _Mlflow:
    def __init__(self, project: str, run_id: str, recipe: Mapping[str, Any]) -> None:
        # A server that does not answer is asked for eleven minutes by default.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
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

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class _Wandb:
    def __init__(self, project: str, run_id: str, recipe: Mapping[str, Any], folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=run_id,
            config=dict(recipe),
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(init_timeout=30, silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
