"""The headline: wall-clock from a pair snapshot to an exported model, each trainer started as its users start it.

Ours is `prefloop train` on a recipe: Ray, tokenisation, the reference pass, training, the merge, the export, the manifest.
TRL's is `app.bench.trl_script`: tokenisation, training with the reference in each step, `save_model`.
"""

import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa
import yaml

from app.bench.arms import Arm, section_of, this_device
from app.bench.runner import CHILD, run_arm, watched
from app.bench.train import BATCH, Ratio, Say, Share
from app.bench.work import Work, plain_messages
from app.config import PairSection
from app.ledger import Ledger, RunRow, RunStepRow
from app.preferences.snapshots import read_pairs, write_pair_snapshot
from app.schemas import Pair, Split
from app.storage import HOME_VARIABLE, Home
from app.training.snapshots import SHUFFLE_WINDOW, epoch_files, epoch_stream, read_groups, train_files
from app.training.tokenization import Group

_NOTHING_HELD_OUT = 1e-6


@dataclass(frozen=True)
class Headline:
    """What both took, in each round, and what Ray cost ours."""

    pairs: int
    seconds: tuple[float, ...]
    rival_seconds: tuple[float, ...]
    peak_pss: int
    rival_peak_pss: int
    ray_overhead: Share
    """Seconds of the job's steps over those of the bare loop on the same rows, less one, but for the first two and the last."""
    data_wait: Share
    """Share of its steps in which the job waited for rows."""

    @property
    def ratio(self) -> Ratio:
        """TRL over ours."""
        return Ratio("headline", tuple(t / o for o, t in zip(self.seconds, self.rival_seconds, strict=True)))

    def lines(self, expected: Mapping[str, float]) -> list[str]:
        """Return the report."""
        ours, theirs = (", ".join(f"{s:.0f}" for s in found) for found in (self.seconds, self.rival_seconds))
        return [
            f"headline: {self.pairs} pairs, snapshot to exported model: prefloop {ours} s (peak {self.peak_pss / 2**30:.2f} GiB with Ray), TRL {theirs} s (peak {self.rival_peak_pss / 2**30:.2f} GiB)",
            *(share.line(expected.get(share.name)) for share in (self.ray_overhead, self.data_wait)),
            self.ratio.line(expected.get(self.ratio.name)),
        ]


def compare_headline(work: Work, pairs: Sequence[Pair], *, rounds: int, say: Say) -> Headline:
    """Time both from the snapshot to the model, round by round.

    Args:
        work: what the arms did.
        pairs: its pairs as text.
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
    ours, theirs, runs, overheads, waits = [], [], [], [], []
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
            order, seconds, wait = _job_steps(home, ledger, runs[-1], epochs=work.epochs)
            bare = run_arm(
                replace(work, groups=order, epochs=1), Arm("bare", "prefloop", "cached", work.dtype, batch=0)
            )
            overheads.append(sum(seconds[2:-1]) / sum(bare.step_seconds[2:-1]) - 1)
            waits.append(wait)
            command = [sys.executable, "-m", "app.bench.trl_script", str(data), str(Path(scratch, f"model-{number}"))]
            theirs.append(watched(command, name="TRL script", environment=CHILD))
            say(f"headline, round {number + 1} of {rounds}: TRL: {theirs[-1][0]:.1f} s")
    _clean(home, ledger, runs)
    ledger.close()
    return Headline(
        pairs=len(rows),
        seconds=tuple(s for s, _ in ours),
        rival_seconds=tuple(s for s, _ in theirs),
        peak_pss=max(p for _, p in ours),
        rival_peak_pss=max(p for _, p in theirs),
        ray_overhead=Share("ray overhead", statistics.median(overheads)),
        data_wait=Share("data wait", statistics.median(waits)),
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
            "num_train_epochs": section.epochs,
        },
    }


def _job_steps(home: Home, ledger: Ledger, run_id: str, *, epochs: int) -> tuple[tuple[Group, ...], list[float], float]:
    """Return the groups of all epochs of a run in its order, seconds from report to report (of the first, NaN), and the share of waiting."""
    with ledger.read() as session:
        snapshot_id = session.get_one(RunRow, run_id).snapshot_id
        found = sa.select(RunStepRow).where(RunStepRow.run_id == run_id).order_by(RunStepRow.step)
        rows = session.scalars(found).all()
    snapshot = home.artifact("training", str(snapshot_id))
    groups = read_groups(snapshot, Split.TRAIN)
    order: list[Group] = []
    for epoch in range(epochs):
        files = epoch_files(train_files(snapshot), seed=0, epoch=epoch)
        read = (groups[file.first + i] for file in files for i in range(len(file.judgements)))
        order += epoch_stream(read, files, seed=0, epoch=epoch, window=SHUFFLE_WINDOW)
    seconds = [(after.created_at - before.created_at).total_seconds() for before, after in itertools.pairwise(rows)]
    waited, worked = (sum(row.metrics[key] for row in rows[2:-1]) for key in ("wait_seconds", "seconds"))
    return tuple(order), [math.nan, *seconds], waited / (waited + worked)


def _clean(home: Home, ledger: Ledger, runs: Sequence[str]) -> None:
    """Remove what the runs left in the home of benchmarks: some gigabytes each, and one model where all are the same."""
    with ledger.read() as session:
        models = session.scalars(sa.select(RunRow.output_model_id).where(RunRow.run_id.in_(runs)).distinct()).all()
    for kind, names in (("runs", runs), ("models", [model for model in models if model])):
        for name in names:
            shutil.rmtree(home.local(kind, name))
