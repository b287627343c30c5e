"""What one rank of a run does; `start_rank` calls it in a process of its own."""

import gc
import math
import os
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", DS_SKIP_CUDA_CHECK="1")

import torch
import torch.distributed as dist

from app.config import TrainSection
from app.errors import ModelError
from app.models import is_no_weights, load_model
from app.storage import Home
from app.training import engine as engines
from app.training import scoring, zero
from app.training.engine import Replicated, SingleWorker
from app.training.held_out import measure_exported
from app.training.loop import optimise
from app.training.objectives import load_objective
from app.training.policy import adapter_off, build_policy, frozen, precomputed
from app.training.proofs import check_packing
from app.training.scoring import ScoringModel
from app.training.tokenization import Group, Preference
from ray_jobs.worker import DistributedWorkers

RATE = 1e-3
TIMEOUT_S = 200.0


def groups(count: int, *, seed: int = 1, reference: bool = True) -> list[Group]:
    """Pairs of random tokens, of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 258, (n,), generator=generator).tolist())

    return [
        Group(
            f"g{i}",
            f"c{i}",
            "train",
            ids(5 + i % 7),
            (ids(4 + i % 4), ids(3)),
            (Preference(0, 1, 1.0, f"p{i}", "import"),),
            reference_logps=(-20.0, -15.0) if reference else None,
        )
        for i in range(count)
    ]


def sgd(parameters, learning_rate, **_):
    """In place of AdamW, whose steps make of the noise of a sum what they make of the sum."""
    return torch.optim.SGD(parameters, lr=learning_rate)


class Loading:
    """The most that this process holds of new tensors while weights are brought in.

    It looks whenever one is gathered to be filled, and at the end; what is read of a file is mapped.
    """

    def __init__(self) -> None:
        self.peak, self.gathered = 0, zero.gathered
        gc.collect()
        gc.freeze()  # what is there already is neither counted nor looked through
        zero.gathered = self.look

    @staticmethod
    def live() -> int:
        gc.collect()
        storages = (t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor))
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    @contextmanager
    def look(self, *arguments, **more):
        with self.gathered(*arguments, **more):
            self.peak = max(self.peak, self.live())
            yield

    def end(self) -> int:
        zero.gathered = self.gathered
        peak = max(self.peak, self.live())
        gc.unfreeze()
        return peak


def main(rank: int, world: int, settings: dict) -> dict:
    torch.set_num_threads(1)
    rate = settings.get("rate", RATE)
    if settings.get("sgd"):
        engines.make_optimizer = zero.make_optimizer = sgd
    device = torch.device("cpu")
    section = TrainSection.model_validate(settings["section"])
    told = {}
    sliced = bool(world) and section.sharding == "zero3"
    home = Home.at(settings["without_weights"] if sliced and rank else settings["home"])
    if world:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(settings["port"]))
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S))
        workers = DistributedWorkers(device, sharded=sliced)
    else:
        workers = SingleWorker()
    if sliced:
        zero.join(device, count=workers.count)
    read = zero.load_in_slices if sliced else None
    if folder := settings.get("refused"):
        try:
            zero.load_in_slices(Path(folder) if rank == 0 else Path(folder, "without-weights"), torch.float32)
        except ModelError as error:
            return {"told": str(error)}
    wanted = is_no_weights if sliced and rank else lambda _: True
    start = load_model(home, settings["model"], dtype="float32", read=read, wanted=wanted)
    if sliced:
        scoring._HEAD_CHUNK = settings.get("head_chunk", scoring._HEAD_CHUNK)
        told["chunks"], score = 0, scoring._token_scores

        def counted(*arguments):
            told["chunks"] += 1
            return score(*arguments)

        scoring._token_scores = counted
    policy = build_policy(start, section)
    common = {"learning_rate": rate, "max_grad_norm": 1.0, "workers": workers, "weight_decay": section.weight_decay}
    offload = "optimizer" in section.offload
    engine = zero.Zero3(policy, **common, offload=offload) if sliced else Replicated(policy, **common)
    if section.reference == "sharded":
        watched: list[int] = []
        read = partial(zero.load_in_slices, on_cpu="reference" in section.offload, watch=watched.append)
        loading = Loading()
        other = ScoringModel(
            load_model(home, settings["reference"], dtype="float32", read=read if sliced else None, wanted=wanted).model
        )
        if sliced:
            other = zero.frozen_in_slices(other, on_cpu="reference" in section.offload)
        loaded = loading.end()
        if sliced:
            held = zero.Held(other)
        reference = frozen(other, "float32")
    else:
        reference = adapter_off(policy, "float32") if section.reference == "adapter_off" else precomputed
    told["packing"] = check_packing(engine, groups(3), section=section, workers=workers)
    count = settings.get("steps", 4)
    rows = groups(6 * count, reference=section.reference == "precomputed")
    for at in settings.get("broken", ()):
        rows[at] = replace(rows[at], reference_logps=(math.nan, math.nan))
    objective = load_objective("dpo", section.options)
    told["steps"] = [
        (report.loss, report.grad_norm, report.pairs, report.tokens, list(report.skipped))
        for report in optimise(
            engine,
            [rows[at : at + 6] for at in range(0, len(rows), 6)],
            objective=objective,
            reference=reference,
            section=section,
            learning_rate=rate,
            total_steps=count,
            workers=workers,
        )
    ]
    merge = {"merge": partial(zero.merge_in_slices, dtype=torch.float32)} if sliced else {}
    # Five rows on four ranks: one has two, none may wait.
    exported, measured = measure_exported(
        policy,
        groups(5, seed=2, reference=section.reference == "precomputed"),
        objective=objective,
        reference=reference,
        section=section,
        workers=workers,
        **merge,
    )
    if folder := settings.get("export"):
        place = Path(folder, "ranks" if world else "one")
        if sliced:
            zero._FILE_BYTES = 40_000
            zero.save_in_slices(exported, None if rank else place, dtype=torch.float32)
        elif not rank:
            exported.model.save_pretrained(place)
    told["collectives"] = workers.told() if world else {}
    if world:
        groups_of_all = dist.distributed_c10d._world.pg_map
        told["timeouts"] = [group._get_backend(device).options._timeout.total_seconds() for group in groups_of_all]
    told["parameter_bytes"] = sum(4 * getattr(p, "ds_numel", p.numel()) for p in start.model.parameters())
    told["held_out"] = [(row.pair_id, row.margin, row.chosen_logp) for row in measured.pairs]
    if sliced and section.reference == "sharded":
        told["reference"] = {name: getattr(held, name) for name in ("peak", "slices", "total", "largest")}
        told["reference"] |= {"loading": loaded, "watched": max(watched)}
    return told
