"""One arm of a benchmark: a way to do the work, run in a process of its own and measured there.

    python -m app.bench.arms FOLDER

reads `work.json` and `arm.json` of the folder and writes `measured.json`. A process of its own gives every arm the same
fresh allocator and its own peak of memory, which the parent watches.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from app.bench.work import Work, pair_tokens
from app.config import TrainSection
from app.models import load_model
from app.storage import Home
from app.training.batch import micro_batches, step_groups
from app.training.engine import Replicated, SingleWorker
from app.training.loop import optimise
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
    order: Literal["sequential", "by_length"] = "sequential"
    """`sequential` is the random order in which the rows of the work lie."""
    checkpointing: bool = False
    """Whether activations are recomputed in backward: TRL does so by default, ours does not."""


@dataclass(frozen=True)
class Measured:
    """What an arm did and how long it took; the tuples but `shapes` have one value for each optimizer step."""

    score_seconds: float
    """Pass of the reference over all rows, once for all epochs; 0 where it is asked in each step."""
    step_seconds: tuple[float, ...]
    """From the end of a step to the end of the next; the first from the begin of training."""
    step_pairs: tuple[int, ...]
    step_tokens: tuple[int, ...]
    """See `pair_tokens`."""
    losses: tuple[float, ...]
    logps: tuple[float, ...]
    """Mean log-probability of the chosen answers, in nats."""
    shapes: tuple[tuple[int, int], ...]
    """Rows and tokens of a row, of every forward with gradients."""
    score_shapes: tuple[tuple[int, int], ...]
    """The same of the pass of the reference."""
    threads: int
    peak_pss: int = 0
    """Bytes, of the process and its children; the parent fills it in."""

    @property
    def total(self) -> float:
        """Seconds of the pass and of all steps."""
        return self.score_seconds + sum(self.step_seconds)

    @property
    def steady(self) -> float:
        """Seconds for a token of a pair, without the first step."""
        return sum(self.step_seconds[1:]) / sum(self.step_tokens[1:])

    @property
    def speed(self) -> float:
        """Pairs a second, without the first step."""
        return sum(self.step_pairs[1:]) / sum(self.step_seconds[1:])

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the backbone with gradients, padding and repeated prompts among them."""
        return tokens_of(self.shapes)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what an arm wrote."""
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
        return cls(**found | {name: tuple(map(tuple, tree[name])) for name in ("shapes", "score_shapes")})


def tokens_of(shapes: Iterable[tuple[int, int]]) -> int:
    """Return the tokens of batches of these rows and lengths."""
    return sum(rows * length for rows, length in shapes)


def run_ours(work: Work, arm: Arm) -> Measured:
    """Do the work with the loop that every train worker runs, without Ray."""
    torch.set_num_threads(work.threads)
    device = this_device()
    section = section_of(work).model_copy(update={"activation_checkpointing": arm.checkpointing})
    home = Home.at(work.home_uri)
    start = load_model(home, work.model_id, dtype="float32" if work.adapter == "full" else work.dtype, device=device)
    groups = list(work.groups)
    score_seconds = 0.0
    if arm.reference == "cached":
        score = frozen(ScoringModel(load_model(home, work.model_id, dtype=work.dtype, device=device).model), work.dtype)
        began = time.perf_counter()
        groups = with_reference_logps(
            groups, lambda batch: score(batch.to(device)), token_budget=work.micro_batch_tokens
        )
        del score
        score_seconds = time.perf_counter() - began
    policy = build_policy(start, section).to(device)
    reference = precomputed if arm.reference == "cached" else _online(work, policy)
    steps = list(step_groups(groups, work.batch_pairs)) * work.epochs
    seconds, losses, logps = [], [], []
    last = time.perf_counter()
    workers = SingleWorker()
    engine = Replicated(policy, learning_rate=work.learning_rate, max_grad_norm=section.max_grad_norm, workers=workers)
    for report in optimise(
        engine,
        steps,
        objective=load_objective(section.objective, section.options),
        reference=reference,
        section=section,
        learning_rate=work.learning_rate,
        total_steps=len(steps),
        workers=workers,
    ):
        seconds.append(time.perf_counter() - last)
        last += seconds[-1]
        losses.append(_number(report.loss))
        logps.append(_number(report.logp_chosen))
    batches = [batch for step in steps for batch in micro_batches(step, work.micro_batch_tokens)]
    return Measured(
        score_seconds=score_seconds,
        step_seconds=tuple(seconds),
        step_pairs=tuple(sum(len(group.pairs) for group in step) for step in steps),
        step_tokens=tuple(sum(map(pair_tokens, step)) for step in steps),
        losses=tuple(losses),
        logps=tuple(logps),
        shapes=tuple((1, batch.input_ids.numel()) for batch in batches),
        score_shapes=(),
        threads=torch.get_num_threads(),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def this_device() -> torch.device:
    """Return the GPU on which both trainers run where there is one, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def section_of(work: Work) -> TrainSection:
    """Return the train section under which our loop does the work, and by which a rival is set up."""
    return TrainSection(
        adapter=work.adapter,
        learning_rate=work.learning_rate,
        epochs=work.epochs,
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
