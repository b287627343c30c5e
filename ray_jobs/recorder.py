"""What a run's workers report, written to the ledger; it runs in Ray Train's controller.

The controller unpickles this before it starts any worker, so this module imports no model code: with it every run began
later by what transformers and ours take to import. (torch is imported there for Ray's own `TorchConfig`.)
"""

import time
from collections.abc import Callable
from typing import Any

import ray.exceptions
from ray.train import UserCallback
from sqlalchemy.exc import OperationalError

from app.errors import LedgerError, ModelError, OutOfMemory, RecipeError, TrainingError, said
from app.ledger import Ledger, RunStepRow, now

LEDGER_AWAY_S = 120.0
"""How long the ledger may be away while a run reports its steps."""
_ASKED_AGAIN_S = 1.0

REFUSALS = (TrainingError, ModelError, RecipeError)
"""What a worker raises on purpose, and would raise again."""


class StepRecorder(UserCallback):
    """Writes each step's metrics to the ledger, on the driver's node."""

    def __init__(self, ledger_url: str, run_id: str) -> None:
        self.ledger_url = ledger_url
        self.run_id = run_id
        self._ledger: Ledger | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        """Store rank 0's metrics; a step that is done again after a restart replaces its old row."""
        report = metrics[0]
        if "step" not in report:
            self._written(lambda ledger: ledger.audit("train", "note", self.run_id, report))
            return

        def merge(ledger: Ledger) -> None:
            if report.get("skipped"):
                with ledger.read() as session:
                    known = session.get(RunStepRow, (self.run_id, report["step"]))
                # A run that goes on reports its last steps again. Before the step itself: what is written again is told twice rather than never.
                if known is None or not known.metrics.get("skipped"):
                    ledger.audit("train", "no_update", self.run_id, {"step": report["step"], "rows": report["skipped"]})
            with ledger.write() as session:
                row = RunStepRow(run_id=self.run_id, step=report["step"], metrics=report, created_at=now())
                session.merge(row)

        self._written(merge)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Note that workers failed, and end the attempt where another one like it would only fail again.

        Ray Train raises what a callback raises to the driver, as the `controller_failure` of a `ControllerError`, and
        retries none of it: a worker that refused its model or reference, or one whose memory was too small, which Ray
        itself may have killed for it. A DataError may be a storage that was away for a moment, so it is tried again.
        """
        failed = {str(rank): said(error, -1)[:300] for rank, error in worker_exceptions.items()}
        self._written(lambda ledger: ledger.audit("train", "workers_failed", self.run_id, failed))
        for error in worker_exceptions.values():
            if isinstance(error, REFUSALS):
                raise error
            if isinstance(error, ray.exceptions.OutOfMemoryError) or "low on memory" in str(error):
                raise OutOfMemory(said(error, 0)) from error

    def _written(self, write: Callable[[Ledger], object]) -> None:
        """Write to the ledger, again and again while it is away; the workers wait with their next report as long.

        Ray Train ends a run for what a callback raises, and a database may restart while a run of days goes on.
        """
        end = time.monotonic() + LEDGER_AWAY_S
        while True:
            try:
                if self._ledger is None:
                    self._ledger = Ledger.open(self.ledger_url)
                write(self._ledger)
            except (OperationalError, LedgerError):
                if time.monotonic() > end:
                    raise
                time.sleep(_ASKED_AGAIN_S)
            else:
                return

    def __getstate__(self) -> dict[str, Any]:
        return {"ledger_url": self.ledger_url, "run_id": self.run_id, "_ledger": None}
