"""Before a run asks for its workers: whether every node can do its part, told in one message within half a minute.

Ray would start what cannot end: workers that no node holds wait for ever, a node with another version breaks in a
collective, and one that sees another folder under the home's name trains to the end and loses the result. So each node
is asked for its versions, for a file that this process has put into the home, and for one that this process must then
see. It imports no torch: a process of Ray's that has to start for the question must answer in time. Room for workers is `ray_jobs.session.require_room`; snapshots and models are checked where they are read.
"""

import hashlib
import os
import platform
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Final, TypeVar

import ray
import sqlalchemy as sa
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import app
from app.errors import ServiceError, said
from app.storage import Home, write_atomically

T = TypeVar("T")

TIMEOUT_S: Final = 17.0
"""How long a node may take to answer."""
OWN_TIMEOUT_S: Final = 8.0
"""How long the home may take to answer this process; with the nodes' time, and what Ray takes to start, half a minute."""
STORE_S: Final = 6.0
"""How long it may take to answer a node, once the library that asks it is imported there."""
_PACKAGES: Final = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "safetensors")
_UNSAFE: Final = (
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
)
"""Variables that make Ray Data run code which a Parquet file brings (CVE-2023-47248, CVE-2026-41486)."""
_FOLDER: Final = "cache/preflight"


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself."""

    node: str
    """Its address, and the beginning of its id."""
    machine: str
    """Differs between machines; nodes that are processes of one machine share it."""
    versions: dict[str, str]
    sees: bool
    """It read what this process wrote."""
    wrote: str
    """Name of what it wrote into the home, for this process to see; empty where it could not."""
    fault: str
    """What storage or its key said where they refused."""
    key: str
    """Digest of the key that it would sign with."""
    unsafe: tuple[str, ...]
    """Variables that are set and must not be."""
    token: bool = True
    """Whether Ray there asks for a token. A node with an older prefloop does not say so, and is named for its version."""


def preflight(home: Home, ledger_url: str) -> None:
    """Ask every node of the cluster whether a run can work there.

    Raises:
        ServiceError: a node does not answer, has another version, does not see or cannot write the home, signs with
            another key, or sits on another machine than a ledger or a home that only this one has.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    nonce = secrets.token_hex(8)
    mark = home.path(_FOLDER, nonce)
    own = _within(OWN_TIMEOUT_S, lambda: _mark(home, nonce, mark))
    if own is None:
        msg = f"the home `{home.uri}` did not answer within {OWN_TIMEOUT_S:.0f} s\n\nHint: is its address right, and is it reached from this machine?"
        raise ServiceError(msg)
    # A single node is this machine, which the run itself will ask.
    others = nodes if len(nodes) > 1 else []
    written = [mark]
    try:
        probe = ray.remote(ask_node)
        asked = {}
        for node in others:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
            asked[name] = probe.options(num_cpus=0, scheduling_strategy=strategy, max_retries=0).remote(
                home.uri, nonce, name
            )
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=TIMEOUT_S)
        reports, silent = [], []
        for name, reference in asked.items():
            try:
                reports.append(ray.get(reference, timeout=0))
            except GetTimeoutError:
                silent.append(f"node {name} did not answer within {TIMEOUT_S:.0f} s")
            except RayError as error:
                silent.append(f"node {name} cannot run prefloop: {said(error, 0)}")
        written += [home.path(_FOLDER, report.wrote) for report in reports if report.wrote]
        unseen = [r.node for r in reports if r.wrote and not home.filesystem.exists(home.path(_FOLDER, r.wrote))]
        faults = [
            *silent,
            *node_faults(own, reports, unseen=unseen, home=home, ledger_url=ledger_url),
        ]
    finally:
        for path in written:
            with suppress(Exception):
                home.filesystem.rm_file(path)
    if faults:
        told = "\n".join(f"  {fault}" for fault in faults)
        msg = f"the cluster is not ready for a run:\n{told}"
        raise ServiceError(msg)


@dataclass(frozen=True)
class _Look:
    """What a process found of the home; the names are those of `NodeReport`."""

    sees: bool = False
    wrote: str = ""
    fault: str = ""
    key: str = ""


def ask_node(home_uri: str, nonce: str, node: str) -> NodeReport:
    """Report on the machine that this runs on; never raises."""
    try:
        home = Home.at(home_uri)
        _ = home.filesystem  # its library is imported here, which takes as long as the machine wants
    except Exception as error:  # noqa: BLE001  object stores raise many kinds
        return _report(node, _Look(fault=said(error, 0)))
    silent = _Look(fault=f"it did not answer within {STORE_S:.0f} s")
    return _report(node, _within(STORE_S, lambda: _look(home, nonce)) or silent)


def _look(home: Home, nonce: str, *, own: bool = False) -> _Look:
    sees, wrote, key = False, "", ""
    try:
        sees = bool(home.filesystem.exists(home.path(_FOLDER, nonce)))
        if sees:
            # Elsewhere it would make a folder of the home's name, and a key in it.
            name = f"{nonce}-{secrets.token_hex(4)}"
            write_atomically(home.filesystem, home.path(_FOLDER, name), b"")
            wrote = name
        if sees or own:
            key = hashlib.sha256(home.signing_key()).hexdigest()
    except Exception as error:  # noqa: BLE001  object stores raise many kinds
        return _Look(sees, wrote, said(error, 0), key)
    return _Look(sees, wrote, "", key)


def _report(node: str, look: _Look) -> NodeReport:
    versions = {name: _version(name) for name in _PACKAGES}
    versions |= {"python": platform.python_version(), "prefloop": _own_version()}
    unsafe = tuple(name for name in _UNSAFE if os.environ.get(name))
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = platform.node()
    token = bool(is_token_auth_enabled())
    return NodeReport(node, machine, versions, look.sees, look.wrote, look.fault, look.key, unsafe, token)


def _mark(home: Home, nonce: str, path: str) -> NodeReport:
    """Report on this process, and write what the nodes must see."""
    own = _report("this process", _look(home, nonce, own=True))
    return own if own.fault else replace(own, fault=_write(home, path))


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """Return what is replied in time; a store that does not answer is asked by its library again and again."""
    replies: Queue[T | Exception] = Queue()

    def run() -> None:
        try:
            replies.put(ask())
        except Exception as error:  # noqa: BLE001  raised again below
            replies.put(error)

    Thread(target=run, name="preflight", daemon=True).start()
    try:
        reply = replies.get(timeout=seconds)
    except Empty:
        return None
    if isinstance(reply, Exception):
        raise reply
    return reply


def _write(home: Home, path: str) -> str:
    """Write an empty file; return what stands against it."""
    try:
        write_atomically(home.filesystem, path, b"")
    except Exception as error:  # noqa: BLE001  object stores raise many kinds
        return said(error, 0)
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _own_version() -> str:
    """Return the version with a digest of the source: nodes may have one version in two states."""
    digest = hashlib.sha256()
    for package in (Path(app.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"{app.__version__} (source {digest.hexdigest()[:8]})"


def node_faults(
    own: NodeReport, reports: Sequence[NodeReport], *, unseen: Sequence[str], home: Home, ledger_url: str
) -> list[str]:
    """Return what stands against a run, a line each: the pure part of `preflight`.

    Args:
        own: this process.
        reports: the nodes that answered.
        unseen: nodes that wrote what this process does not see.
        home: the home.
        ledger_url: SQLAlchemy URL of the ledger.
    """
    faults = [f"{name} is set, with which a Parquet file can run code: unset it" for name in own.unsafe]
    if own.fault:
        faults.append(f"{own.node}: {own.fault}")
    for report in reports:
        faults += [f"node {report.node}: {name} is set, unset it" for name in report.unsafe if name not in own.unsafe]
        differing = [
            f"{name} {found} instead of {own.versions[name]}"
            for name, found in report.versions.items()
            if found != own.versions[name]
        ]
        if differing:
            faults.append(f"node {report.node} has {', '.join(differing)}: install the same lock everywhere")
        if report.fault:
            faults.append(f"node {report.node} cannot use the home `{home.uri}`: {report.fault}")
        elif not report.sees:
            faults.append(
                f"node {report.node} does not see the home `{home.uri}`: mount it there too, or set PREFLOOP_HOME to an object store"
            )
        elif report.node in unseen:
            faults.append(f"what node {report.node} writes to `{home.uri}` is not seen here: is it the same place?")
        elif report.key != own.key:
            faults.append(f"node {report.node} would sign with another key: set PREFLOOP_SIGNING_KEY alike everywhere")
    elsewhere = [report.node for report in reports if report.machine != own.machine]
    if elsewhere and sa.make_url(ledger_url).get_backend_name() == "sqlite":
        faults.append(
            f"the ledger is a SQLite file, and {elsewhere[0]} is another machine: set PREFLOOP_LEDGER to a PostgreSQL URL"
        )
    # Whether this process sends a token tells nothing of whether they ask for one.
    open_to_all = [report.node for report in reports if not report.token]
    if elsewhere and open_to_all and os.environ.get("RAY_AUTH_MODE") != "disabled":
        faults.append(
            f"Ray on node {open_to_all[0]} asks nobody for a token, so whoever reaches it can run code there: start it with RAY_AUTH_MODE=token (RAY_AUTH_MODE=disabled says that you want it so)"
        )
    return faults
