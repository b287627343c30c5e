"""One arm of a benchmark: a way to do the work, run in a process of its own and measured there.

    python -m app.bench.arms FOLDER

reads `work.json` and `arm.json` of the folder and writes `measured.json`. A process of its own gives every arm the same
fresh allocator and its own peak of memory, which the parent watches.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from app.bench.work import Work
from app.config import TrainSection
from app.models import load_model
from app.storage import Home
from app.training.batch import micro_batches, step_groups
from app.training.loop import SingleWorker, make_optimizer, optimise
from app.training.objectives import load_objective
from app.training.policy import Reference, adapter_off, build_policy, frozen, precomputed
from app.training.scoring import ScoringModel, with_reference_logps


@dataclass(frozen=True)
class Arm:
    """A way to do the work."""

    name: str
    trainer: Literal["prefloop", "trl"]
    reference: Literal["online", "cached"]
    dtype: Literal["float32", "bfloat16"]
    batch: int
    """Pairs of one forward; ours goes by its token budget."""
    order: Literal["sequential", "group_by_length"] = "sequential"
    """`sequential` is the random order in which the rows of the work lie."""
    checkpointing: bool = False
    """Whether activations are recomputed in backward, as TRL does by default."""


@dataclass(frozen=True)
class Measured:
    """What an arm did and how long it took."""

    score_seconds: float
    """Pass of the reference over all rows; 0 where it is asked in each step."""
    step_seconds: tuple[float, ...]
    """From the end of a step to the end of the next; the first from the begin of training."""
    step_pairs: tuple[int, ...]
    losses: tuple[float, ...]
    shapes: tuple[tuple[int, int], ...]
    """Rows and tokens of a row, of every forward with gradients."""
    threads: int
    peak_pss: int = 0
    """Bytes, of the process and its children; the parent fills it in."""

    @property
    def total(self) -> float:
        """Seconds of the pass and of all steps."""
        return self.score_seconds + sum(self.step_seconds)

    @property
    def steady(self) -> float:
        """Seconds of a pair, without the first step."""
        return sum(self.step_seconds[1:]) / sum(self.step_pairs[1:])

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the backbone with gradients, padding and repeated prompts among them."""
        return sum(rows * length for rows, length in self.shapes)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what an arm wrote."""
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**tree | {"shapes": tuple(map(tuple, tree["shapes"]))})


def run_ours(work: Work, arm: Arm) -> Measured:
    """Do the work with the loop that every train worker runs, without Ray."""
    torch.set_num_threads(work.threads)
    section, device = section_of(work), this_device()
    home = Home.at(work.home_uri)
    start = load_model(home, work.model_id, dtype="float32" if work.adapter == "full" else work.dtype, device=device)
    groups = list(work.groups)
    score_seconds = 0.0
    if arm.reference == "cached":
        began = time.perf_counter()
        score = frozen(ScoringModel(load_model(home, work.model_id, dtype=work.dtype, device=device).model), work.dtype)
        groups = with_reference_logps(
            groups, lambda batch: score(batch.to(device)), token_budget=work.micro_batch_tokens
        )
        del score
        score_seconds = time.perf_counter() - began
    policy = build_policy(start, section).to(device)
    reference = precomputed if arm.reference == "cached" else _online(work, policy)
    steps = list(step_groups(groups, work.batch_pairs))
    seconds, losses = [], []
    last = time.perf_counter()
    for report in optimise(
        policy,
        steps,
        objective=load_objective(section.objective, section.options),
        reference=reference,
        optimizer=make_optimizer(policy, section),
        section=section,
        total_steps=len(steps),
        workers=SingleWorker(),
    ):
        seconds.append(time.perf_counter() - last)
        last += seconds[-1]
        losses.append(float("nan") if report.loss is None else report.loss)
    batches = [batch for step in steps for batch in micro_batches(step, work.micro_batch_tokens)]
    return Measured(
        score_seconds=score_seconds,
        step_seconds=tuple(seconds),
        step_pairs=tuple(sum(len(group.pairs) for group in step) for step in steps),
        losses=tuple(losses),
        shapes=tuple((1, batch.input_ids.numel()) for batch in batches),
        threads=torch.get_num_threads(),
    )


def this_device() -> torch.device:
    """Return the GPU on which both trainers run where there is one, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def section_of(work: Work) -> TrainSection:
    """Return the train section under which our loop does the work, and by which a rival is set up."""
    return TrainSection(
        adapter=work.adapter,
        learning_rate=work.learning_rate,
        schedule="constant",
        warmup_ratio=0.0,
        batch_pairs=work.batch_pairs,
        micro_batch_tokens=work.micro_batch_tokens,
        dtype=work.dtype,
    )


def _online(work: Work, policy: ScoringModel) -> Reference:
    if work.adapter == "lora":
        return adapter_off(policy, work.dtype)
    model = load_model(Home.at(work.home_uri), work.model_id, dtype=work.dtype, device=this_device()).model
    return frozen(ScoringModel(model), work.dtype)


def main() -> None:
    """Run one arm."""
    folder = Path(sys.argv[1])
    work, arm = Work.load(folder / "work.json"), Arm(**json.loads((folder / "arm.json").read_text(encoding="utf-8")))
    if arm.trainer == "trl":
        from app.bench.rival import run_trl as run
    else:
        run = run_ours
    (folder / "measured.json").write_text(json.dumps(asdict(run(work, arm))), encoding="utf-8")


if __name__ == "__main__":
    main()
