"""A train job whose driver is killed by the system at a named point of its end: `deadly_driver.py JOB.json MARKER [POINT]`."""

import json
import sys
from pathlib import Path
from typing import Any

import ray
from fsspec.implementations.local import LocalFileSystem

from app.config import Recipe
from app.ledger import Ledger
from app.storage import Artifact, Home
from ray_jobs import train
from tests.ray_jobs.deadly import arm

POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the model is registered": (train, "register_folder", 1, True),
    "while the model's files are copied": (LocalFileSystem, "put_file", 2, True),
    "before the model's manifest": (Artifact, "write_manifest", 1, True),
    "before the model is in the ledger": (Artifact, "write_manifest", 1, False),
    "before the model's export is removed": (train, "register_folder", 1, False),
    "before the end is recorded": (train, "record_end", 1, True),
    "after the end is recorded": (train, "record_end", 1, False),
}
"""Where a function is looked up, its name, at which call once the workers have ended, and before or after it."""


def main(job: dict[str, Any], marker: Path, point: str | None) -> None:
    """Train; with a point, up to there."""
    finish = train._finish

    def armed(*arguments: Any) -> Any:
        if point is not None:
            arm(*POINTS[point], marker)
        return finish(*arguments)

    train._finish = armed
    home = Home.at(job["home"])
    ray.init(address=job["address"], log_to_driver=False)
    recipe = Recipe.model_validate(job["recipe"])
    train.train(home, Ledger.open(home.ledger_url), recipe, job["snapshot_id"], run_id=job["run_id"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
