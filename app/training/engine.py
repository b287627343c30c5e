"""The workers that train together, and how their gradients become a step.

    Replicated   every worker holds all weights; gradients are added up in one collective
    ZeRO-3       (`app.training.zero`) every worker holds a slice of each weight, of its gradient and of its moments

Both clip by the global norm, take one AdamW step and make no update where the norm is not finite on any worker. Losses
come normalised by the weight of the whole step, so gradients are added up over workers and never averaged. This module
knows no losses and no batches.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from app.training.policy import trainable
from app.training.scoring import ScoringModel

Row = TypeVar("Row")

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter beside the count of its steps."""

Stored = Callable[[str], "StoredTensor | None"]
"""Name -> the tensor of a checkpoint, None where it has none of that name."""


class Workers(Protocol):
    """The ranks that train together."""

    rank: int
    size: int

    def sum_(self, tensor: Tensor) -> None:
        """Add a tensor up over all ranks, in place."""

    def gather(self, rows: list[Row]) -> list[Row]:
        """Return the rows of all ranks."""

    def rounds(self, batches: int) -> int:
        """Return how many forwards this rank makes for so many batches.

        Where weights are sharded a forward is a collective, so every rank makes as many as the busiest.
        """


class SingleWorker:
    """One process."""

    rank = 0
    size = 1

    def sum_(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def gather(self, rows: list[Row]) -> list[Row]:
        """The rows are all there."""
        return rows

    def rounds(self, batches: int) -> int:
        """Nobody waits."""
        return batches


class StoredTensor(Protocol):
    """A flat tensor in a checkpoint, of which a slice can be read alone."""

    @property
    def numel(self) -> int:
        """Number of elements; slices of several ranks end with what fills the last one up."""
        ...

    def slice(self, start: int, stop: int) -> Tensor:
        """Return the elements from `start` to `stop`, [stop - start]."""


class Engine(Protocol):
    """What the loop asks of the policy beside its scores."""

    @property
    def policy(self) -> ScoringModel:
        """What is trained."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its batches belong."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss to that of the step."""

    def step(self, learning_rate: float) -> float:
        """Add the gradients of all workers up, clip, update and forget them; return the norm before clipping.

        Where it is not finite there was no update.
        """

    def gradients(self) -> list[Tensor]:
        """Return this worker's share of the gradient so far, in a fixed order; parts of it, or what it computed alone."""

    def discard(self) -> None:
        """Forget the gradients of the step."""

    def state(self) -> Mapping[str, Tensor]:
        """Return what this worker keeps of weights and optimizer for a resume, on the CPU; nothing where another does."""

    def ranks_to_read(self, ranks: int) -> Iterable[int]:
        """Return whose parts of a state that so many ranks kept `restore` reads on this worker."""

    def restore(self, stored: Stored) -> None:
        """Put back what `state` gave, on however many workers."""


class Replicated:
    """Every worker holds everything; the first one keeps it."""

    def __init__(
        self,
        policy: ScoringModel,
        *,
        learning_rate: float,
        max_grad_norm: float,
        workers: Workers,
        weight_decay: float = 0.0,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.policy = policy
        self._parameters = trainable(policy)
        self.optimizer = optimizer or make_optimizer(
            list(self._parameters.values()), learning_rate, weight_decay=weight_decay
        )
        self._max_grad_norm, self._workers = max_grad_norm, workers
        self._begun = False

    @property
    def device(self) -> torch.device:
        """Where its batches belong."""
        return next(iter(self._parameters.values())).device

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss to that of the step."""
        if not self._begun:
            self.optimizer.zero_grad(set_to_none=False)  # their memory is kept
            self._begun = True
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Add the gradients of all workers up, clip and update; return the norm before clipping."""
        if not self._begun:
            self.optimizer.zero_grad(set_to_none=False)  # this rank has no rows
        parameters = list(self._parameters.values())
        _sum_gradients(parameters, self._workers)
        norm = float(nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        self.discard()
        return norm

    def gradients(self) -> list[Tensor]:
        """Return what this worker computed."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._parameters.values()]

    def discard(self) -> None:
        """Forget the gradients, which stay where they are until the next step begins."""
        self._begun = False

    def state(self) -> dict[str, Tensor]:
        """Return all weights that train with their moments, on the first worker."""
        if self._workers.rank:
            return {}
        kept: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            kept[f"parameter/{name}"] = parameter.detach().reshape(-1).cpu()
            for key, value in self.optimizer.state[parameter].items():
                kept[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().reshape(-1).cpu()
        return kept

    def ranks_to_read(self, ranks: int) -> Iterable[int]:
        """Return all ranks."""
        return range(ranks)

    def restore(self, stored: Stored) -> None:
        """Put weights and moments back."""
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(slice_of(stored, f"parameter/{name}", 0, parameter.numel()).view_as(parameter))
            if stored(f"optimizer/step/{name}") is None:
                continue  # before the first update
            self.optimizer.state[parameter] = {
                # A fused optimizer wants the count of steps beside its moments.
                "step": slice_of(stored, f"optimizer/step/{name}", 0, 1).squeeze().to(parameter.device),
                **{
                    key: slice_of(stored, f"optimizer/{key}/{name}", 0, parameter.numel())
                    .view_as(parameter)
                    .to(parameter.device)
                    for key in MOMENTS
                },
            }


def make_optimizer(
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    dimensions: Callable[[nn.Parameter], int] = lambda parameter: parameter.ndim,
) -> torch.optim.AdamW:
    """Return AdamW with this peak learning rate; only matrices decay, as everywhere.

    Args:
        parameters: what trains.
        learning_rate: at its peak.
        weight_decay: decoupled, of matrices.
        dimensions: of a parameter as the model sees it; a sharded one is flat.
    """
    groups = (
        ([p for p in parameters if dimensions(p) > 1], weight_decay),
        ([p for p in parameters if dimensions(p) <= 1], 0.0),
    )
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for members, decay in groups if members],
        lr=learning_rate,
        betas=(0.9, 0.999),
        fused=True,  # one pass over weights and moments instead of ten
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Let the next step be made at this rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def slice_of(stored: Stored, name: str, start: int, stop: int) -> Tensor:
    """Read a slice of a tensor that a checkpoint of the same policy has."""
    tensor = stored(name)
    assert tensor is not None, name  # noqa: S101  the identity of the run has the same parameters
    return tensor.slice(start, stop)


def _sum_gradients(parameters: Sequence[nn.Parameter], workers: Workers) -> None:
    if workers.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            # A rank without rows still takes part, with zeros.
            parameter.grad = torch.zeros_like(parameter)
    # One flat buffer is one collective instead of hundreds of small ones.
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    workers.sum_(flat)
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
