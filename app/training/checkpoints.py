"""Resume checkpoints: what trains, the optimizer's state and the position, without a pickle.

A checkpoint is a storage artifact with a safetensors file of each rank that keeps something; it is valid exactly when its
manifest is signed with the home's key and every file matches it, and the newest valid one wins. The manifest is written
last, after every rank's file, and binds it to the run's snapshot, recipe and start model: another run's checkpoint is
refused. Tensors are stored whole or, where weights are sharded, as the slices of the ranks in their order, so a run goes
on with another number of workers too.

Training waits while the state is written to this machine's disk. A thread does the rest:

    every rank      hash its file -> bring it to the home -> leave a signed receipt of it
    first rank      wait for the receipts -> sign the manifest -> remove what is no longer kept

and training waits again only where the next checkpoint is due before the thread has ended, at most `STALL_S`. A folder
carries the attempt's name: what an attempt that was given up still writes is no part of another's checkpoint.
"""

import errno
import json
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.errors import DataError, TrainingError
from app.schemas import content_hash
from app.storage import (
    Artifact,
    Home,
    file_digest,
    remove_if_allowed,
    same_signature,
    signature,
    sync_folder,
    write_atomically,
)
from app.training.engine import Engine, Stored, Workers

STALL_S: Final = 480.0
"""How long a checkpoint may take to be written beside training before the run is given up; less than workers wait for one
another, so that the one that knows why says it."""
_STATE = "state"
_KEPT = 2
_PURPOSE: Final = b"prefloop checkpoint/1\n"
_POLL_S = 0.1


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to."""

    run_id: str
    snapshot_id: str
    start_digest: str
    recipe_digest: str
    reference_digest: str
    """Empty where the objective has no reference."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int = 0
    """Steps done; 0 without a checkpoint."""
    reports: tuple[dict[str, Any], ...] = ()
    """What the newest of these steps measured, in their order: who was killed may not have been heard."""
    skipped: tuple[str, ...] = ()
    """A line for each damaged checkpoint that was passed over."""


class Checkpoints:
    """The checkpoints of one run, as one of its workers writes and reads them; every worker makes one.

    Raises:
        DataError: the home has no key to sign with.
    """

    def __init__(self, home: Home, identity: RunIdentity, workers: Workers) -> None:
        self._home, self._identity, self._workers = home, identity, workers
        self._kind = _kind(identity)
        self._key = home.signing_key()
        # The first rank's: ranks that write one checkpoint must agree on its name.
        self._attempt = workers.gather([uuid.uuid4().hex[:8]] if workers.rank == 0 else [])[0]
        self._writing: _Writing | None = None
        self._passed: set[str] = set()
        self.left: set[str] = set()
        """Names of those that are no longer kept, and that storage did not let go."""
        # A digest, or run `a` would remove what run `a-b` writes; of the home too, which another run may have its id in.
        self._scratch = f"prefloop-checkpoint-{content_hash([home.uri, identity.run_id])[:16]}-"
        for left in Path(tempfile.gettempdir()).glob(f"{self._scratch}*"):
            # Of workers that were killed; those of this attempt have not begun.
            shutil.rmtree(left, ignore_errors=True)

    def save(
        self, engine: Engine, *, step: int, reports: Sequence[dict[str, Any]] = (), score: float | None = None
    ) -> float:
        """Begin to write the state after `step` steps; every rank calls it. Returns the seconds that it took.

        Args:
            engine: what trains, with its optimizer.
            step: steps done.
            reports: what the newest steps measured.
            score: what the best checkpoint has most of; it is kept beside the newest.

        Raises:
            DataError: this checkpoint, or the one before, cannot be written. What was complete before is still there.
        """
        began = time.perf_counter()
        self.finish()
        artifact = self._home.artifact(self._kind, f"step-{step:08d}-{self._attempt}")
        tensors, name = dict(engine.state()), f"{_STATE}-{self._workers.rank:05d}.safetensors"
        writers = self._workers.gather([name] if tensors else [])
        if tensors:
            content = {
                "step": step,
                "identity": asdict(self._identity),
                # Copies: who reports may add to them while they are signed.
                "reports": [dict(report) for report in reports],
                "score": score,
            }
            local = self._save_here(artifact, name, tensors)
            self._writing = _Writing(self, artifact, local, name, writers, content)
            self._writing.thread.start()
        return time.perf_counter() - began

    def require_no_failure(self) -> None:
        """Raise what the checkpoint that is being written has met, as soon as it is known; every rank asks after each step.

        Raises:
            DataError: it cannot be written.
        """
        if self._writing is not None and self._writing.error is not None:
            raise self._writing.error

    def finish(self) -> None:
        """Wait until the checkpoint that was begun last is complete, as far as it is this rank's to write.

        Raises:
            DataError: it could not be written, or not in time.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.thread.join(STALL_S)
        if writing.thread.is_alive():
            msg = f"checkpoint `{writing.artifact.uri}` is not written after {STALL_S:.0f} s\n\nHint: is its storage slow, or full?"
            raise DataError(msg)
        if writing.error is not None:
            raise writing.error

    def load_newest(self, engine: Engine) -> Resumed:
        """Load the newest valid checkpoint of the run; the first rank says which one that is, for all of them.

        Raises:
            TrainingError: a checkpoint under this run id belongs to another snapshot, recipe, start model or reference, or
                there are some and none of them is signed with this home's key.
        """
        skipped: dict[str, str] = {}
        while True:
            # A rank that sees another one as the newest would go on with weights of another step.
            found = self._workers.gather([self._newest(skipped)] if self._workers.rank == 0 else [])[0]
            if found.refusal:
                raise TrainingError(found.refusal)
            skipped = found.skipped
            if found.name is None:
                self._passed = set(skipped)
                return Resumed(skipped=tuple(skipped.values()))
            artifact, names = self._home.artifact(self._kind, found.name), sorted(found.files)
            wanted = [names[rank] for rank in engine.ranks_to_read(len(names))]
            # Of a folder that all see each rank hashes a part, or the others would wait for one as long as it reads it all.
            shared = names[self._workers.rank :: self._workers.size]
            with ExitStack() as stack:
                folder, own = Path(), []
                try:
                    folder = stack.enter_context(artifact.verified_copy(found.files, wanted, shared=shared))
                except DataError as error:
                    own = [str(error)]
                faults = self._workers.gather(own)
                if not faults:
                    self._passed = set(skipped)
                    engine.restore(_reader(artifact, folder, names))
                    return Resumed(found.step, found.reports, tuple(skipped.values()))
            skipped = {**skipped, found.name: f"checkpoint {found.name} skipped: {faults[0]}"}

    def complete(self, writing: "_Writing", digests: dict[str, dict[str, Any]]) -> None:
        """Sign what all ranks wrote, and remove what is no longer kept; the first rank's thread calls it."""
        artifact, content = writing.artifact, {**writing.content, "ranks": len(digests)}
        artifact.write_manifest(content, files=digests, key=self._key, purpose=_PURPOSE)
        scores = {}
        for name in self._home.names(self._kind):
            if name in self._passed:
                continue  # what is damaged is neither counted nor removed
            with suppress(DataError):
                manifest = self._home.artifact(self._kind, name).manifest(key=self._key, purpose=_PURPOSE)
                scores[name] = manifest["score"]
        scored = {name: score for name, score in scores.items() if score is not None}
        best = [max(scored, key=scored.__getitem__)] if scored else []
        for name in sorted(scores.keys() - {artifact.name, *sorted(scores)[-_KEPT:], *best}):
            self._remove(name)

    def _remove(self, name: str) -> None:
        if remove_if_allowed(self._home.filesystem, self._home.artifact(self._kind, name).path):
            self.left.discard(name)
        else:
            self.left.add(name)

    def receipt(self, files: dict[str, Any]) -> bytes:
        """Return a signed note of what a rank wrote."""
        return json.dumps({"files": files, "signature": signature(files, self._key, purpose=_PURPOSE)}).encode()

    def read_receipt(self, text: bytes) -> dict[str, Any]:
        """Return the files of a receipt; raises DataError where it is nobody's of this home."""
        found = json.loads(text)
        files: dict[str, Any] = found["files"]
        if not same_signature(found["signature"], signature(files, self._key, purpose=_PURPOSE)):
            msg = "a worker's note of what it wrote is not signed with this home's key"
            raise DataError(msg)
        return files

    def _newest(self, passed: dict[str, str]) -> "Newest":
        """Find the newest checkpoint that is signed, for all ranks; `passed` are those with a damaged file."""
        self._remove_unfinished()
        try:
            return newest_checkpoint(self._home, self._identity, passed=passed)
        except TrainingError as error:
            return Newest(None, passed, refusal=str(error))

    def _remove_unfinished(self) -> None:
        """Remove what attempts before this one began and never completed."""
        filesystem, root = self._home.filesystem, self._home.path(self._kind)
        if not filesystem.exists(root):
            return
        complete = set(self._home.names(self._kind))
        for path in filesystem.ls(root, detail=False):
            if str(path).rstrip("/").rsplit("/", 1)[-1] not in complete:
                remove_if_allowed(filesystem, str(path))

    def _save_here(self, artifact: Artifact, name: str, tensors: dict[str, Tensor]) -> Path:
        """Write tensors to a temporary folder of this machine, for the thread to bring to the home; return the place.

        A home that is a folder may still be a slow file system of the network, which training must not wait for.

        Raises:
            DataError: the disk is full, or refuses.
        """
        folder: Path | None = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=self._scratch))
            save_file(tensors, folder / name)
        except (OSError, SafetensorError) as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise _unwritten(artifact, error) from None
        return folder / name


class _Writing:
    """A checkpoint that one rank is writing, beside training."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        artifact: Artifact,
        local: Path,
        name: str,
        writers: Sequence[str],
        content: dict[str, Any],
    ) -> None:
        self.artifact, self.content = artifact, content
        self.error: DataError | None = None
        self._checkpoints, self._local, self._name = checkpoints, local, name
        self._others = [writer for writer in writers if writer != name] if name == min(writers) else []
        self._first = name == min(writers)
        # It dies with the process: a run that ends in an error leaves no half of a checkpoint behind as a whole one.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def _run(self) -> None:
        try:
            self._write()
        except DataError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001  stores raise many kinds, and a run must not go on without checkpoints
            self.error = _unwritten(self.artifact, error)

    def _write(self) -> None:
        filesystem, root = self.artifact.filesystem, self.artifact.path
        try:
            digest = file_digest(LocalFileSystem(), str(self._local))
            _bring(self._local, filesystem, f"{root}/{self._name}")
        finally:
            shutil.rmtree(self._local.parent, ignore_errors=True)
        if not self._first:
            receipt = self._checkpoints.receipt({self._name: digest})
            write_atomically(filesystem, f"{root}/{_receipt_name(self._name)}", receipt)
            return
        digests = {self._name: digest}
        end = time.monotonic() + STALL_S
        for writer in self._others:
            digests |= self._await_receipt(f"{root}/{_receipt_name(writer)}", end)
        self._checkpoints.complete(self, digests)

    def _await_receipt(self, path: str, end: float) -> dict[str, Any]:
        while True:
            try:
                return self._checkpoints.read_receipt(self.artifact.filesystem.cat_file(path))
            except FileNotFoundError:
                if time.monotonic() > end:
                    msg = f"checkpoint `{self.artifact.uri}` shows nothing of `{path.rsplit('/', 1)[-1]}` after {STALL_S:.0f} s\n\nHint: is it a place that all nodes see?"
                    raise DataError(msg) from None
                time.sleep(_POLL_S)


def _bring(local: Path, filesystem: AbstractFileSystem, target: str) -> None:
    """Bring a file to the home, so that a machine that loses its power has it or says that it has not."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(local), target)
        return
    place = Path(target)
    if not place.parent.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(place.parent.parent)
    try:
        local.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(local, place)
    with place.open("rb") as stream:
        os.fsync(stream.fileno())


def _receipt_name(name: str) -> str:
    return f".{name}.json"


def _unwritten(artifact: Artifact, error: Exception) -> DataError:
    msg = f"checkpoint `{artifact.uri}` cannot be written: {error}\n\nHint: what was complete before is still there; make room, and the same run id goes on from it."
    return DataError(msg)


@dataclass(frozen=True)
class Newest:
    """The checkpoint that a run would go on from, as far as manifests tell."""

    name: str | None
    skipped: dict[str, str]
    """By name, why it is passed over."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    step: int = 0
    reports: tuple[dict[str, Any], ...] = ()
    refusal: str = ""


def newest_checkpoint(home: Home, identity: RunIdentity, *, passed: Mapping[str, str]) -> Newest:
    """Find the newest checkpoint of a run that is signed; its files are not looked at.

    Args:
        home: where the run lies.
        identity: of the run.
        passed: checkpoints with a damaged file, and what is wrong with it.

    Raises:
        TrainingError: it belongs to another run, snapshot, recipe or model, or there are checkpoints and none is signed with
            this home's key.
    """
    kind, key = _kind(identity), home.signing_key()
    skipped, foreign = dict(passed), ""
    for name in reversed(home.names(kind)):
        if name in passed:
            continue
        try:
            manifest = home.artifact(kind, name).manifest(key=key, purpose=_PURPOSE)
        except DataError as error:
            skipped[name] = f"checkpoint {name} skipped: {error}"
            foreign = foreign or str(error)
            continue
        # One from before there was a reference's digest says nothing of it; the run's row in the ledger does.
        differing = [k for k, v in asdict(identity).items() if manifest["identity"].get(k, v) != v]
        if differing:
            msg = f"run `{identity.run_id}` has checkpoints of another {', '.join(differing)}\n\nHint: start a new run id."
            raise TrainingError(msg)
        return Newest(name, skipped, manifest["files"], int(manifest["step"]), tuple(manifest["reports"]))
    if foreign and not passed:
        # Another key is likelier than that all of them are damaged, and to begin again would be hours, without a word.
        msg = f"run `{identity.run_id}` has checkpoints, and none that can be trusted: {foreign}\n\nHint: set PREFLOOP_SIGNING_KEY to the key that it began with, or start a new run id."
        raise TrainingError(msg)
    return Newest(None, skipped)


def _kind(identity: RunIdentity) -> str:
    return f"runs/{identity.run_id}/checkpoints"


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
                    found.append(file.get_slice(self.name)[first:last])
            offset += count
        return torch.cat(found)


def _reader(artifact: Artifact, folder: Path, names: Sequence[str]) -> Stored:
    """Return what finds tensors in the files of a folder; of those that were not brought there, only the sizes are asked."""
    parts: dict[str, list[tuple[Path, int]]] = {}
    for name in names:
        place = Artifact(str(folder)) if (folder / name).exists() else artifact
        for tensor, numel in _sizes(place.filesystem, f"{place.path}/{name}"):
            parts.setdefault(tensor, []).append((folder / name, numel))
    return lambda name: _Pieces(name, tuple(parts[name])) if name in parts else None


def _sizes(filesystem: AbstractFileSystem, path: str) -> Iterator[tuple[str, int]]:
    """Yield name and number of elements of each tensor in a safetensors file, from its header alone.

    The format is the length of a JSON text in 8 bytes, the text, then the tensors (https://github.com/huggingface/safetensors).
    """
    length = int.from_bytes(filesystem.cat_file(path, start=0, end=8), "little")
    header = json.loads(filesystem.cat_file(path, start=8, end=8 + length))
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, math.prod(tensor["shape"])
