"""A recorder that tells what its process has imported. In a module of its own: Ray Train's controller imports it."""

import sys
from typing import Any

from ray_jobs.recorder import StepRecorder


class TellingRecorder(StepRecorder):
    """Writes whether there is model code beside each report, as the action `imported`."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, metrics, checkpoint)
        found = {name: name in sys.modules for name in ("ray.train", "transformers")}
        self._written(lambda ledger: ledger.audit("train", "imported", self.run_id, found))
