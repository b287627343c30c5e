"""Parity: one step of both trainers from the same weights gives the same loss and gradient, in fp32, or no ratio counts.

    python -m app.bench.parity FOLDER

reads `work.json` and writes `parity.json`. The policy is moved away from the reference first (else every DPO loss is ln 2),
by the same noise on both sides.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from app.bench.arms import Arm, section_of, this_device
from app.bench.rival import pinned_trainer
from app.bench.work import Work
from app.models import load_model
from app.storage import Home
from app.training.engine import Replicated, SingleWorker
from app.training.loop import optimise
from app.training.objectives import load_objective
from app.training.policy import build_policy, frozen, precomputed, trainable
from app.training.scoring import ScoringModel, with_reference_logps
from app.training.tokenization import Group

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
_NOISE = 1e-3
_PAIRS = 4


@dataclass(frozen=True)
class Parity:
    """How far apart one step of the two trainers is."""

    loss: float
    rival_loss: float
    gradient_apart: float
    """Norm of the difference of the two gradients, as a share of the norm."""
    pairs: int

    @property
    def passed(self) -> bool:
        """Whether both are within the tolerances."""
        close = abs(self.loss - self.rival_loss) <= LOSS_TOLERANCE * abs(self.rival_loss)
        return close and self.gradient_apart <= GRADIENT_TOLERANCE

    def line(self) -> str:
        """Say it in one line."""
        return f"parity (fp32, {self.pairs} pairs): loss {self.loss:.8f}, TRL {self.rival_loss:.8f} (allowed: {LOSS_TOLERANCE:g} relative); gradients {self.gradient_apart:.1e} apart (allowed: {GRADIENT_TOLERANCE:g})"


def compare(work: Work) -> Parity:
    """Let both trainers take the loss and gradient of the first groups of the work, as many as hold a few pairs."""
    torch.set_num_threads(work.threads)
    # TRL takes all of them in one forward.
    few: list[Group] = []
    for group in work.groups:
        if sum(len(g.pairs) for g in few) >= _PAIRS:
            break
        few.append(group)
    work = replace(work, dtype="float32", groups=tuple(few), batch_pairs=sum(len(group.pairs) for group in few))
    loss, ours = _our_gradient(work)
    rival_loss, theirs = _rival_gradient(work)
    apart = float((ours - theirs).norm() / theirs.norm())
    return Parity(loss, rival_loss, apart, work.batch_pairs)


def _our_gradient(work: Work) -> tuple[float, Tensor]:
    # Without a bound on its norm, the gradient is what `optimise` leaves in the parameters.
    section = section_of(work).model_copy(update={"max_grad_norm": 1e9})
    home, device = Home.at(work.home_uri), this_device()
    score = frozen(ScoringModel(load_model(home, work.model_id, dtype="float32", device=device).model), "float32")
    groups = with_reference_logps(
        work.groups, lambda batch: score(batch.to(device)), token_budget=work.micro_batch_tokens
    )
    policy = build_policy(load_model(home, work.model_id, dtype="float32", device=device), section).to(device)
    parameters = trainable(policy)
    _move(parameters)
    workers = SingleWorker()
    still = torch.optim.SGD(parameters.values(), lr=0.0)
    (report,) = optimise(
        Replicated(policy, learning_rate=0.0, max_grad_norm=section.max_grad_norm, workers=workers, optimizer=still),
        [groups],
        objective=load_objective(section.objective, section.options),
        reference=precomputed,
        section=section,
        learning_rate=0.0,
        total_steps=1,
        workers=workers,
    )
    assert report.loss is not None  # noqa: S101  a step that is not finite has no parity
    return report.loss, _flat({name: p.grad for name, p in parameters.items() if p.grad is not None})


def _rival_gradient(work: Work) -> tuple[float, Tensor]:
    arm = Arm("parity", "trl", "online", "float32", batch=work.batch_pairs)
    with tempfile.TemporaryDirectory(prefix="prefloop-parity-") as scratch:
        trainer = pinned_trainer(work, arm, work.groups, folder=scratch)
        parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        _move(parameters)
        batch = {
            name: t.to(trainer.model.device) for name, t in trainer.data_collator(list(trainer.train_dataset)).items()
        }
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        return float(loss.detach()), _flat({name: p.grad for name, p in parameters.items() if p.grad is not None})


def _move(parameters: Mapping[str, Tensor]) -> None:
    """Add the same noise to equal parameters; their names differ by a prefix, which leaves their order."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(parameters.items())):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(noise.to(parameter.device), alpha=_NOISE)


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten().cpu() for _, gradient in sorted(gradients.items())])


def main() -> None:
    """Compare on the first groups of a work."""
    folder = Path(sys.argv[1])
    found = compare(Work.load(folder / "work.json"))
    (folder / "parity.json").write_text(json.dumps(asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
