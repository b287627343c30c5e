"""Self-test: what a GPU machine computes, proven there, in one JSON; the rows "not run" of docs/training.md wait for it.

    python -m ray_jobs.selftest [--model SFT] [--json FILE]

It asks nothing of a recipe or a home: a model, groups of random tokens, and the functions that the train job calls. Without a
GPU it does what a CPU can and says of the rest that it was not run and why. Exit code 1 where a check failed.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from app.bench.arms import Arm, this_device
from app.bench.runner import run_arm, run_parity
from app.bench.train import BATCH, require_rival
from app.bench.work import Work
from app.config import Recipe, TrainSection, parse_recipe
from app.errors import TrainingError
from app.ledger import Ledger, ModelRow, RunStepRow
from app.models import LoadedModel, ensure_sft, load_model
from app.storage import Home
from app.training.attention import Backend
from app.training.batch import step_groups
from app.training.checkpoints import Checkpoints, RunIdentity
from app.training.engine import Replicated, SingleWorker
from app.training.loop import StepReport, optimise
from app.training.objectives import load_objective
from app.training.policy import build_policy, frozen, precomputed, trainable
from app.training.proofs import check_packing, score_packed, score_plain
from app.training.scoring import ScoringModel, with_reference_logps
from app.training.snapshots import Binding, global_order, write_training_snapshot
from app.training.tokenization import Group, Preference
from ray_jobs.session import ray_cluster
from ray_jobs.train import train

_BACKENDS: tuple[Backend, ...] = ("sdpa", "flex", "varlen")
_PAIRS = 32
_STEP_PAIRS = 8
_LEARNING_RATE = 1e-4
_PROMPT, _ANSWER = 48, 24
_MORE_NOISE = 1.5
"""How many times as far as plain rows of their type the gradient of packed rows may be from float32's."""
_JOB_APART = {"float32": 1e-5, "bfloat16": 0.02}
"""Losses and gradient norms of two workers and of one process, relative: in bfloat16 other micro-batches are other sums."""


class NotRun(Exception):  # noqa: N818
    """A check does not apply here; the argument says why."""


@dataclass(frozen=True)
class Check:
    """One row of the result."""

    name: str
    status: Literal["passed", "failed", "not run"]
    detail: str
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What the checks share: a home of their own, a model in it, and groups of random tokens."""

    home: Home
    ledger: Ledger
    model: ModelRow
    sft: str
    groups: tuple[Group, ...]
    device: torch.device

    def load(self, dtype: str) -> LoadedModel:
        """Load the model onto the device."""
        return load_model(self.home, self.model.model_id, dtype=dtype, device=self.device)


def selftest(sft: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every check and return the result as plain values."""
    with tempfile.TemporaryDirectory(prefix="prefloop-selftest-") as scratch:
        home = Home.at(scratch)
        ledger = Ledger.open(home.ledger_url)
        model = ensure_sft(home, ledger, sft)
        vocabulary = load_model(home, model.model_id, dtype="bfloat16").model.config.vocab_size
        bench = Bench(home, ledger, model, sft, random_groups(vocabulary), this_device())
        checks = [
            _check(
                f"packed = plain rows{what}, {backend}, {dtype}", partial(packing, bench, policy, backend, dtype), say
            )
            for policy, what in ((_policy, ""), (_windowed, " in a window"), (_capped, " with a cap"))
            for backend in _BACKENDS
            for dtype in ("float32", "bfloat16")
        ]
        checks.append(_check("a run that continues = an unbroken one", partial(resume, bench), say))
        in_fp32 = _section("float32", "sdpa")
        sliced = in_fp32.model_copy(update={"sharding": "zero3", "reference": "sharded"})
        checks.append(_check("the train job = one process", partial(job, bench, in_fp32), say))
        checks.append(_check("the train job in slices (ZeRO-3) = one process", partial(job, bench, sliced), say))
        checks += [
            _check(f"the train job in bfloat16, {b} = one process", partial(job, bench, _section("bfloat16", b)), say)
            for b in _BACKENDS
        ]
        checks.append(_check("pairs a second against TRL", partial(speed, bench), say))
        ledger.close()
    return {"machine": _machine(), "checks": [dataclasses.asdict(check) for check in checks]}


def random_groups(vocabulary: int) -> tuple[Group, ...]:
    """Return groups of two answers, of different lengths."""
    draw = _tokens(vocabulary, seed=0)
    return tuple(
        Group(
            group_id=f"g{i}",
            cluster=f"c{i}",
            split="train",
            prompt_ids=draw(_PROMPT - 5 * (i % 8)),
            responses=(draw(_ANSWER - i % 9), draw(_ANSWER - i % 5)),
            pairs=(Preference(0, 1, 1.0, f"p{i}", "selftest"),),
        )
        for i in range(_PAIRS)
    )


def _tokens(vocabulary: int, *, seed: int) -> Callable[[int], tuple[int, ...]]:
    """Return what draws so many random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return lambda length: tuple(torch.randint(2, vocabulary, (length,), generator=generator).tolist())


def _several_answers(vocabulary: int) -> Group:
    """Return a group of three answers, longer than the window of `_windowed` and than all others."""
    draw = _tokens(vocabulary, seed=1)
    pairs = (Preference(0, 1, 1.0, "long-1", "selftest"), Preference(0, 2, 1.0, "long-2", "selftest"))
    return Group("long", "long", "train", draw(2 * _PROMPT), (draw(2 * _ANSWER), draw(_ANSWER), draw(1)), pairs)


def packing(bench: Bench, make: Callable[[Bench, TrainSection], ScoringModel], backend: Backend, dtype: str) -> str:
    """Compare scores and gradients of packed rows with those of plain ones, of a policy that `make` makes.

    In bfloat16 the gradients of both are compared with those of plain rows in float32, too: packing may add little to what
    rounding makes of them.
    """
    _require(bench, backend)
    if backend == "varlen" and dtype == "float32":
        msg = "flash attention computes in half precision"
        raise NotRun(msg)
    section, alone = _section(dtype, backend), SingleWorker()
    engine = _engine(make(bench, section), section)
    if backend == "varlen" and getattr(engine.policy.model.config, "attn_logit_softcapping", None):
        msg = "flash attention over sequences knows no cap on attention scores"
        raise NotRun(msg)
    groups = [*bench.groups[:3], _several_answers(engine.policy.model.config.vocab_size)]
    # Rows of several lengths, one below 128: torch has kernels of their own for short ones, and compiles for a length or for any.
    apart = max(check_packing(engine, row, section=section, workers=alone) for row in (groups, groups[:1], groups[-1:]))
    told = f"scores {apart:.1e} nat apart for the root of a token, gradients within the tolerance of the train job"
    if dtype == "float32":
        return told
    exact = score_plain(engine, groups, dtype="float32")
    packed, plain = (score(engine, groups, dtype=dtype).turned(exact, alone) for score in (score_packed, score_plain))
    if not packed <= _MORE_NOISE * plain:
        msg = f"the gradient of packed rows is {packed:.2%} from that of plain rows in float32, plain rows in {dtype} {plain:.2%}"
        raise TrainingError(msg)
    return f"{told}; {packed:.2%} from the gradient of plain rows in float32, plain rows in {dtype} {plain:.2%}"


def _require(bench: Bench, backend: str) -> None:
    """Raise NotRun where the backend needs a GPU that is not there."""
    if backend != "sdpa" and bench.device.type != "cuda":
        msg = "no GPU"
        raise NotRun(msg)


def resume(bench: Bench) -> str:
    """Train to the end at once, and with a checkpoint between, and compare the weights."""
    section = _section("float32", "sdpa")
    steps = list(step_groups(_scored(bench, section.dtype), _STEP_PAIRS))
    whole = _engine(_policy(bench, section), section)
    _optimise(whole, section, steps, len(steps), done=0)
    half = len(steps) // 2
    identity = RunIdentity("selftest-resume", "selftest", bench.model.digest, "selftest", bench.model.digest)
    first = _engine(_policy(bench, section), section)
    _optimise(first, section, steps[:half], len(steps), done=0)
    writer = Checkpoints(bench.home, identity, SingleWorker())
    writer.save(first, step=half)
    writer.finish()
    second = _engine(_policy(bench, section), section)
    done = Checkpoints(bench.home, identity, SingleWorker()).load_newest(second).step
    _optimise(second, section, steps[done:], len(steps), done=done)
    ours, theirs = (torch.cat([p.detach().flatten() for p in trainable(m.policy).values()]) for m in (second, whole))
    apart = float((ours - theirs).norm() / theirs.norm())
    # Kernels of a GPU may add up in another order each time.
    allowed = 0.0 if bench.device.type == "cpu" else 1e-5
    if not apart <= allowed:
        msg = f"weights differ by {apart:.1e} of their norm (allowed: {allowed:g})"
        raise TrainingError(msg)
    return f"weights after {len(steps)} steps differ by {apart:.1e} of their norm"


def job(bench: Bench, section: TrainSection) -> str:
    """Run the train job on Ray, with a worker for each of two GPUs (or CPUs), and compare its losses with one process.

    In slices the reference is a second sliced model, and one process has whole ones; both give the same numbers.
    """
    _require(bench, section.attention)
    gpus = torch.cuda.device_count()
    workers = min(2, gpus) if gpus else 2
    scored = global_order(_scored(bench, section.dtype), 0)
    loaded = bench.load("float32")
    binding = Binding(
        "selftest", loaded.template_digest, _PROMPT + _ANSWER, "drop", 0, bench.model.digest, section.dtype
    )
    snapshot = write_training_snapshot(
        bench.home, bench.ledger, scored, binding=binding, counts={}, rows_per_file=len(scored)
    )
    recipe = _recipe(bench, section, workers=workers, use_gpu=bool(gpus))
    run_id = f"selftest-{section.dtype}-{section.attention}-{section.sharding}"
    with ray_cluster(bench.home):
        result = train(bench.home, bench.ledger, recipe, snapshot.snapshot_id, run_id=run_id)
        backend = "NCCL" if gpus else "gloo"
    with bench.ledger.read() as session:
        rows = session.scalars(
            sa.select(RunStepRow).where(RunStepRow.run_id == result.run_id).order_by(RunStepRow.step)
        ).all()
    # One step holds all groups, so the order in which the job reads them is of no matter.
    engine = _engine(_policy(bench, section), section)
    expected = _optimise(engine, section, [scored] * len(rows), len(rows), done=0)
    apart = max(
        abs(row.metrics[name] - getattr(report, name)) / getattr(report, name)
        for row, report in zip(rows, expected, strict=True)
        for name in ("loss", "grad_norm")
    )
    allowed = _JOB_APART[section.dtype]
    if not apart <= allowed:
        msg = f"losses or gradient norms of {workers} workers ({backend}) differ by {apart:.1e} relative from one process (allowed: {allowed:g})"
        raise TrainingError(msg)
    return f"{workers} workers, {backend}: losses and gradient norms of {len(rows)} steps within {apart:.1e} relative"


def speed(bench: Bench) -> str:
    """Train the groups with ours and with TRL and tell both in pairs a second."""
    try:
        require_rival()
    except TrainingError as error:
        raise NotRun(str(error).splitlines()[0]) from None
    work = Work(
        home_uri=bench.home.uri,
        sft=bench.sft,
        model_id=bench.model.model_id,
        groups=bench.groups,
        adapter="full",
        dtype="bfloat16",
        max_length=_PROMPT + _ANSWER,
        batch_pairs=BATCH,
        micro_batch_tokens=TrainSection().token_budget(this_device().type),
        learning_rate=1e-5,
        threads=torch.get_num_threads(),
        epochs=1,
    )
    parity = run_parity(work)
    if not parity.passed:
        raise TrainingError(parity.line())
    ours = run_arm(work, Arm("prefloop", "prefloop", "online", work.dtype, batch=0))
    theirs = run_arm(work, Arm("trl", "trl", "online", work.dtype, batch=BATCH))
    return f"prefloop {ours.speed:.2f}, TRL {theirs.speed:.2f} ({ours.speed / theirs.speed:.2f}x; {parity.line()})"


def _check(name: str, run: Callable[[], str], say: Callable[[str], None]) -> Check:
    began = time.perf_counter()
    status: Literal["passed", "failed", "not run"] = "passed"
    try:
        detail = run()
    except NotRun as reason:
        status, detail = "not run", str(reason)
    except Exception as error:  # noqa: BLE001  what one check meets must not keep the others from the result
        status, detail = "failed", f"{type(error).__name__}: {error}"
    check = Check(name, status, detail, round(time.perf_counter() - began, 1))
    say(f"{status:<8} {name}: {detail}")
    return check


def _section(dtype: str, backend: Backend) -> TrainSection:
    return TrainSection.model_validate(
        {
            "adapter": "full",
            "dtype": dtype,
            "attention": backend,
            "learning_rate": _LEARNING_RATE,
            "batch_pairs": _PAIRS,
            "epochs": 2,
            "micro_batch_tokens": 512,
        }
    )


def _recipe(bench: Bench, section: TrainSection, *, workers: int, use_gpu: bool) -> Recipe:
    tree = {
        "name": "selftest",
        "model": {"sft": bench.sft},
        "pairs": {"min_pairs": 1},
        "prepare": {"max_length": _PROMPT + _ANSWER},
        "train": section.model_dump(mode="json", exclude_unset=True),
        "workers": {"workers": workers, "cpus_per_worker": 1, "use_gpu": use_gpu, "max_failures": 0},
    }
    return parse_recipe(tree, place="selftest")


def _scored(bench: Bench, dtype: str) -> list[Group]:
    reference = frozen(ScoringModel(bench.load(dtype).model), dtype)
    return with_reference_logps(bench.groups, lambda batch: reference(batch.to(bench.device)), token_budget=512)


def _policy(bench: Bench, section: TrainSection) -> ScoringModel:
    return build_policy(bench.load("float32"), section).to(bench.device)


def _windowed(bench: Bench, section: TrainSection) -> ScoringModel:
    """Make a small Mistral whose layers see so many tokens back as half a prompt has."""
    return _small(bench, section, "mistral", sliding_window=_PROMPT // 2)


def _capped(bench: Bench, section: TrainSection) -> ScoringModel:
    """Make a small Gemma 2, whose attention scores and logits are capped."""
    return _small(bench, section, "gemma2", sliding_window=_PROMPT)


def _small(bench: Bench, section: TrainSection, kind: str, *, sliding_window: int) -> ScoringModel:
    """Make a model of random weights with two query heads to a key."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=bench.load("bfloat16").model.config.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=sliding_window,
    )
    return ScoringModel(AutoModelForCausalLM.from_config(config), backend=section.attention).to(bench.device)


def _engine(policy: ScoringModel, section: TrainSection) -> Replicated:
    return Replicated(policy, learning_rate=_LEARNING_RATE, max_grad_norm=section.max_grad_norm, workers=SingleWorker())


def _optimise(
    engine: Replicated,
    section: TrainSection,
    steps: Sequence[Sequence[Group]],
    total: int,
    *,
    done: int,
) -> list[StepReport]:
    return list(
        optimise(
            engine,
            steps,
            objective=load_objective(section.objective, section.options),
            reference=precomputed,
            section=section,
            learning_rate=_LEARNING_RATE,
            total_steps=total,
            done_steps=done,
            workers=SingleWorker(),
        )
    )


def _machine() -> dict[str, Any]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "ray")}
    return {
        "gpus": names,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        **libraries,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-test."""
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.selftest")
    parser.add_argument("--model", default="embedded", help="`embedded`, a folder, a URI or a hub id")
    parser.add_argument("--json", type=Path, default=Path("selftest.json"), help="where the result is written")
    options = parser.parse_args(argv)
    console = Console()
    result = selftest(options.model, say=lambda line: console.print(line, highlight=False, markup=False))
    options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 1 if any(check["status"] == "failed" for check in result["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
