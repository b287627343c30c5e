"""Resume checkpoints: what trains, the optimizer's state and the position, without a pickle.

A checkpoint is a storage artifact with a safetensors file of each rank that keeps something; it is valid exactly when its
manifest matches it, and the newest valid one wins. The manifest is written last, after every rank's file, and binds it to
the run's snapshot, recipe and start model: another run's checkpoint is refused. Tensors are stored whole or, where weights
are sharded, as the slices of the ranks in their order, so a run goes on with another number of workers too.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.errors import DataError, TrainingError
from app.storage import MANIFEST, Home
from app.training.engine import Engine, Stored, Workers

_STATE = "state"
_RNG = "rng"
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
    engine: Engine,
    workers: Workers,
    *,
    step: int,
    reports: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the state after `step` steps and remove all but the newest checkpoints; every rank calls it.

    Args:
        home: where the run lies.
        identity: what the checkpoint is bound to.
        engine: what trains, with its optimizer.
        workers: the ranks.
        step: steps done.
        reports: what the newest steps measured.
    """
    kind = _kind(identity)
    artifact = home.artifact(kind, f"step-{step:08d}")
    filesystem = artifact.filesystem
    if workers.rank == 0:
        if filesystem.exists(artifact.path):
            filesystem.rm(artifact.path, recursive=True)
        filesystem.makedirs(artifact.path, exist_ok=True)
    workers.gather([None])
    tensors, name = dict(engine.state()), f"{_STATE}-{workers.rank:05d}.safetensors"
    if tensors:
        if workers.rank == 0:
            tensors[_RNG] = torch.get_rng_state()
        with tempfile.TemporaryDirectory(prefix="prefloop-checkpoint-") as scratch:
            local = Path(scratch, "state.safetensors")
            save_file(tensors, local)
            filesystem.put_file(str(local), f"{artifact.path}/{name}")
    written = [file for file in workers.gather([name if tensors else None]) if file is not None]
    if workers.rank == 0:
        filesystem.invalidate_cache()  # other processes wrote most of them
        manifest = artifact.write_manifest(
            {"step": step, "identity": asdict(identity), "reports": list(reports), "ranks": len(written)}
        )
        if not manifest["files"].keys() >= set(written):
            filesystem.rm_file(f"{artifact.path}/{MANIFEST}")
            msg = f"checkpoint `{artifact.uri}` shows {len(manifest['files'])} of the {len(written)} files that its workers wrote\n\nHint: is it a folder that all nodes see?"
            raise DataError(msg)
        for name in home.names(kind)[:-_KEPT]:
            filesystem.rm(home.artifact(kind, name).path, recursive=True)
    workers.gather([None])


def load_newest(home: Home, identity: RunIdentity, engine: Engine, workers: Workers) -> Resumed:
    """Load the newest valid checkpoint of the run; the first rank says which one that is, for all of them.

    Raises:
        TrainingError: a checkpoint under this run id belongs to another snapshot, recipe or start model.
    """
    # A rank that sees another one as the newest would go on with weights of another step.
    found = workers.gather([_newest(home, identity)] if workers.rank == 0 else [])[0]
    if found.refusal:
        raise TrainingError(found.refusal)
    if found.name is None:
        return Resumed(skipped=found.skipped)
    artifact = home.artifact(_kind(identity), found.name)
    with artifact.local_copy() as folder:
        stored = _reader(sorted(folder.glob(f"{_STATE}*.safetensors")))
        rng = stored(_RNG)
        assert rng is not None  # noqa: S101  every checkpoint has one
        torch.set_rng_state(rng.slice(0, rng.numel))
        engine.restore(stored)
    return Resumed(found.step, found.reports, found.skipped)


@dataclass(frozen=True)
class _Newest:
    name: str | None
    skipped: tuple[str, ...]
    step: int = 0
    reports: tuple[dict[str, Any], ...] = ()
    refusal: str = ""


def _newest(home: Home, identity: RunIdentity) -> _Newest:
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
            return _Newest(None, tuple(skipped), refusal=msg)
        return _Newest(name, tuple(skipped), int(manifest["step"]), tuple(manifest.get("reports", ())))
    return _Newest(None, tuple(skipped))


@dataclass(frozen=True)
class _Pieces:
    """A flat tensor whose parts lie in files one after the other."""

    name: str
    parts: tuple[tuple[Path, int], ...]
    """File and number of elements."""

    @property
    def numel(self) -> int:
        return sum(count for _, count in self.parts)

    def slice(self, start: int, stop: int) -> Tensor:
        found, offset = [], 0
        for path, count in self.parts:
            first, last = max(start - offset, 0), min(stop - offset, count)
            if first < last:
                with safe_open(path, framework="pt") as file:
                    shape = file.get_slice(self.name).get_shape()
                    # Only what lies flat can be cut without reading all of it.
                    piece = file.get_slice(self.name)[first:last] if len(shape) == 1 else file.get_tensor(self.name)
                    found.append(piece if len(shape) == 1 else piece.reshape(-1)[first:last])
            offset += count
        return torch.cat(found)


def _reader(files: Sequence[Path]) -> Stored:
    parts: dict[str, list[tuple[Path, int]]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                shape = file.get_slice(name).get_shape()
                parts.setdefault(name, []).append((path, int(torch.Size(shape).numel())))
    return lambda name: _Pieces(name, tuple(parts[name])) if name in parts else None


def _kind(identity: RunIdentity) -> str:
    return f"runs/{identity.run_id}/checkpoints"
