"""The headline: wall-clock from a pair snapshot to an exported model, each trainer started as its users start it.

Ours is `prefloop train` on a recipe: Ray, tokenisation, the reference pass, training, the merge, the export, the manifest.
TRL's is `app.bench.trl_script`: tokenisation, training with the reference in each step, `save_model`.
"""

import json
import shutil
import statistics
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import yaml

from app.bench.arms import Measured, section_of, this_device
from app.bench.runner import CHILD, watched
from app.bench.train import BATCH, Ratio, Say
from app.bench.work import Work, plain_messages
from app.config import PairSection
from app.ledger import Ledger, RunRow, RunStepRow
from app.preferences.snapshots import read_pairs, write_pair_snapshot
from app.schemas import Pair, Split
from app.storage import HOME_VARIABLE, Home

_NOTHING_HELD_OUT = 1e-6


@dataclass(frozen=True)
class Headline:
    """What both took, in each round, and what Ray cost ours."""

    pairs: int
    seconds: tuple[float, ...]
    rival_seconds: tuple[float, ...]
    peak_pss: int
    rival_peak_pss: int
    ray_overhead: float
    """Seconds for a token in a step of the job over those of the bare loop, less one, but for first and last steps."""
    data_wait: float
    """Share of its steps in which the job waited for rows."""

    @property
    def ratio(self) -> Ratio:
        """TRL over ours."""
        return Ratio("headline", tuple(t / o for o, t in zip(self.seconds, self.rival_seconds, strict=True)))

    def lines(self, expected: float | None) -> list[str]:
        """Return the report."""
        ours, theirs = (", ".join(f"{s:.0f}" for s in found) for found in (self.seconds, self.rival_seconds))
        return [
            f"headline: {self.pairs} pairs, snapshot to exported model: prefloop {ours} s (peak {self.peak_pss / 2**30:.2f} GiB with Ray), TRL {theirs} s (peak {self.rival_peak_pss / 2**30:.2f} GiB)",
            f"Ray Train and Ray Data: {self.ray_overhead:+.1%} over the bare loop; waiting for rows {self.data_wait:.2%} of the steps",
            self.ratio.line(expected),
        ]


def compare_headline(work: Work, pairs: Sequence[Pair], bare: Sequence[Measured], *, rounds: int, say: Say) -> Headline:
    """Time both from the snapshot to the model, round by round.

    Args:
        work: what the arms did.
        pairs: its pairs as text.
        bare: what our loop without Ray measured with cached references on the same pairs.
        rounds: how often.
        say: told of each.
    """
    home = Home.at(work.home_uri)
    ledger = Ledger.open(home.ledger_url)
    section = PairSection(held_out_fraction=_NOTHING_HELD_OUT)
    snapshot = write_pair_snapshot(
        home, ledger, pairs, section=section, quarantine=(), counts={}, origin={"kind": "import"}
    )
    rows = [plain_messages(pair) for pair in read_pairs(home, snapshot.snapshot_id) if pair.split == Split.TRAIN]
    ours, theirs, runs = [], [], []
    with tempfile.TemporaryDirectory(prefix="prefloop-headline-") as scratch:
        recipe, data = Path(scratch, "bench.yaml"), Path(scratch, "work.json")
        recipe.write_text(yaml.safe_dump(_recipe(work, snapshot.snapshot_id)), encoding="utf-8")
        model = home.artifact("models", work.model_id).path
        data.write_text(json.dumps(_script_settings(work, rows, model)), encoding="utf-8")
        for number in range(rounds):
            runs.append(f"bench-{uuid.uuid4().hex[:8]}")
            command = [sys.executable, "-m", "ray_jobs", "train", str(recipe), "--run", runs[-1]]
            environment = {**CHILD, HOME_VARIABLE: home.uri}
            ours.append(watched(command, name="prefloop train", environment=environment))
            say(f"headline, round {number + 1} of {rounds}: prefloop train: {ours[-1][0]:.1f} s")
            command = [sys.executable, "-m", "app.bench.trl_script", str(data), str(Path(scratch, f"model-{number}"))]
            theirs.append(watched(command, name="TRL script", environment=CHILD))
            say(f"headline, round {number + 1} of {rounds}: TRL: {theirs[-1][0]:.1f} s")
    per_token, wait = _job_steps(ledger, runs)
    _clean(home, ledger, runs)
    ledger.close()
    bare_per_token = statistics.median(sum(m.step_seconds[1:-1]) / sum(m.step_tokens[1:-1]) for m in bare)
    return Headline(
        pairs=len(rows),
        seconds=tuple(s for s, _ in ours),
        rival_seconds=tuple(s for s, _ in theirs),
        peak_pss=max(p for _, p in ours),
        rival_peak_pss=max(p for _, p in theirs),
        ray_overhead=per_token / bare_per_token - 1,
        data_wait=wait,
    )


def _recipe(work: Work, snapshot_id: str) -> dict[str, object]:
    train = section_of(work).model_dump(mode="json", exclude_unset=True)
    return {
        "name": "bench",
        "model": {"sft": work.sft},
        "snapshot": snapshot_id,
        "pairs": {"min_pairs": 1},
        "prepare": {"max_length": work.max_length, "too_long": "truncate_response", "reuse_scores": False},
        "train": train,
        "workers": {
            "workers": 1,
            "cpus_per_worker": 1,
            "threads_per_worker": work.threads,
            "use_gpu": this_device().type == "cuda",
        },
    }


def _script_settings(work: Work, rows: Sequence[dict[str, object]], model: str) -> dict[str, object]:
    section = section_of(work)
    return {
        "rows": list(rows),
        "model": model,
        "lora": section.lora.model_dump(mode="json") if work.adapter == "lora" else None,
        "threads": work.threads,
        "arguments": {
            "beta": section.options["beta"],
            "max_length": work.max_length,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": work.batch_pairs // BATCH,
            "bf16": work.dtype == "bfloat16",
            "learning_rate": work.learning_rate,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 1,
            "gradient_checkpointing": False,
        },
    }


def _job_steps(ledger: Ledger, runs: Sequence[str]) -> tuple[float, float]:
    """Return seconds for a token from report to report, and the share of waiting for rows, over the steps of the runs.

    First steps are left out because nothing was reported before them, last ones because a checkpoint is written first.
    """
    found = sa.select(RunStepRow).where(RunStepRow.run_id.in_(runs)).order_by(RunStepRow.run_id, RunStepRow.step)
    with ledger.read() as session:
        rows = session.scalars(found).all()
    seconds, tokens, waited, worked = 0.0, 0, 0.0, 0.0
    for before, after, later in zip(rows, rows[1:], rows[2:], strict=False):
        if before.run_id == after.run_id == later.run_id:
            seconds += (after.created_at - before.created_at).total_seconds()
            tokens += after.metrics["tokens"]
            waited += after.metrics["wait_seconds"]
            worked += after.metrics["seconds"]
    return seconds / tokens, waited / (waited + worked)


def _clean(home: Home, ledger: Ledger, runs: Sequence[str]) -> None:
    """Remove what the runs left in the home of benchmarks: some gigabytes each, and one model where all are the same."""
    with ledger.read() as session:
        models = session.scalars(sa.select(RunRow.output_model_id.distinct()).where(RunRow.run_id.in_(runs))).all()
    for kind, names in (("runs", runs), ("models", [model for model in models if model])):
        for name in names:
            shutil.rmtree(home.local(kind, name))
