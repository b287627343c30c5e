"""Resume checkpoints: what trains, the optimizer's state and the position, without a pickle.

A checkpoint is a storage artifact with one safetensors file; it is valid exactly when its manifest matches it, and the
newest valid one wins. The manifest binds it to the run's snapshot, recipe and start model: another run's checkpoint
is refused. Weights and optimizer are replicated, so one rank writes for all.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from app.errors import DataError, TrainingError
from app.storage import Home
from app.training.policy import trainable
from app.training.scoring import ScoringModel

_STATE = "state.safetensors"
_KEPT = 2


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to."""

    run_id: str
    snapshot_id: str
    start_digest: str
    recipe_digest: str


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int = 0
    """Steps done; 0 without a checkpoint."""
    reports: tuple[dict[str, Any], ...] = ()
    """What the newest of these steps measured, in their order: who was killed may not have been heard."""
    skipped: tuple[str, ...] = ()
    """A line for each damaged checkpoint that was passed over."""


def save_checkpoint(
    home: Home,
    identity: RunIdentity,
    policy: ScoringModel,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    reports: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the state after `step` steps and remove all but the newest checkpoints.

    Args:
        home: where the run lies.
        identity: what the checkpoint is bound to.
        policy: what trains.
        optimizer: its state.
        step: steps done.
        reports: what the newest steps measured.
    """
    tensors: dict[str, torch.Tensor] = {"rng": torch.get_rng_state()}
    for name, parameter in trainable(policy).items():
        tensors[f"parameter/{name}"] = parameter.detach().contiguous().cpu()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().contiguous().cpu()
    kind = _kind(identity)
    artifact = home.artifact(kind, f"step-{step:08d}")
    filesystem = artifact.filesystem
    if filesystem.exists(artifact.path):
        filesystem.rm(artifact.path, recursive=True)
    filesystem.makedirs(artifact.path, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prefloop-checkpoint-") as scratch:
        local = Path(scratch, _STATE)
        save_file(tensors, local)
        filesystem.put_file(str(local), f"{artifact.path}/{_STATE}")
    artifact.write_manifest({"step": step, "identity": asdict(identity), "reports": list(reports)})
    for name in home.names(kind)[:-_KEPT]:
        filesystem.rm(home.artifact(kind, name).path, recursive=True)


def load_newest(home: Home, identity: RunIdentity, policy: ScoringModel, optimizer: torch.optim.Optimizer) -> Resumed:
    """Load the newest valid checkpoint of the run.

    Raises:
        TrainingError: a checkpoint under this run id belongs to another snapshot, recipe or start model.
    """
    skipped: list[str] = []
    for name in reversed(home.names(_kind(identity))):
        artifact = home.artifact(_kind(identity), name)
        try:
            manifest = artifact.verify()
        except DataError as error:
            skipped.append(f"checkpoint {name} skipped: {error}")
            continue
        if manifest["identity"] != asdict(identity):
            differing = [k for k, v in asdict(identity).items() if manifest["identity"].get(k) != v]
            msg = f"run `{identity.run_id}` has checkpoints of another {', '.join(differing)}\n\nHint: start a new run id."
            raise TrainingError(msg)
        with tempfile.TemporaryDirectory(prefix="prefloop-checkpoint-") as scratch:
            local = Path(scratch, _STATE)
            artifact.filesystem.get_file(f"{artifact.path}/{_STATE}", str(local))
            _restore(load_file(local), policy, optimizer)
        return Resumed(int(manifest["step"]), tuple(manifest.get("reports", ())), tuple(skipped))
    return Resumed(skipped=tuple(skipped))


def _restore(tensors: dict[str, torch.Tensor], policy: ScoringModel, optimizer: torch.optim.Optimizer) -> None:
    torch.set_rng_state(tensors["rng"])
    states: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, field, name = key.split("/", 2)
            states.setdefault(name, {})[field] = tensor
    for name, parameter in trainable(policy).items():
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter/{name}"])
        if name in states:  # none before the first update
            # The count of steps too: a fused optimizer wants it beside its moments.
            optimizer.state[parameter] = {field: tensor.to(parameter.device) for field, tensor in states[name].items()}


def _kind(identity: RunIdentity) -> str:
    return f"runs/{identity.run_id}/checkpoints"
