"""What every job does first and last: read the recipe, find the home and the ledger, reach a Ray cluster, exit well.

Exit codes: 0 done (or shipped), 3 the gate holds, 130 interrupted, 1 any other error. A job run by hand joins the
cluster of `RAY_ADDRESS` or of the running service, else it starts a local one for itself.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import Config  # type: ignore[attr-defined]
from rich.console import Console

from app.config import Recipe, WorkerSection, load_recipe
from app.errors import Interrupted, PrefloopError, ServiceError
from app.ledger import Ledger
from app.services import ServeApi, Services, ensure_ray_token, ray_token, submitted_runtime_env
from app.storage import HOME_VARIABLE, Home
from ray_jobs.preflight import preflight

_QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "TOKENIZERS_PARALLELISM": "false"}
LOCAL_ENVIRONMENT = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
"""Of the workers of a local cluster, which has no dashboard: nothing listens there. Ray Train's `PlacementGroupCleaner`
asks the dashboard whether its controller lives. Without an address it waits up to 40 s for one to appear, and every run
ends 12 s later; or it finds another cluster of this machine, which does not know the controller, and takes the places of
the run away (`is_actor_alive` in Ray 2.60). A local cluster ends with its driver and leaves nothing to clean."""
_FREED_S = 5.0
STALL_S = 60.0
"""A train worker that does not answer for so long is given up, and its run goes on from the newest checkpoint."""
COLLECTIVE_TIMEOUT_S = 600
"""How long workers wait for one another in a collective; the first rank may measure or hash alone meanwhile."""
START_TIMEOUT_S = 300
"""How long workers wait for room where a node was lost, each of the few times that they try."""
_CHATTY = (
    "ray.train",
    # Ray Data configures its own `ray.data` logger when it first runs; what lies below it keeps its level.
    "ray.data._internal.datasource.parquet_datasource",
    "ray.data._internal.progress",
    "ray.data._internal.execution.streaming_executor",
)


@dataclass(frozen=True)
class Session:
    """What a job works with."""

    home: Home
    ledger: Ledger
    recipe: Recipe
    recipe_path: str
    overrides: tuple[str, ...]


def run_job(
    name: str,
    body: Callable[[Session, argparse.Namespace], int],
    *,
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `RECIPE.yaml [--set a.b=c]`, run the body and return the exit code; errors are printed without a trace."""
    parser = argparse.ArgumentParser(prog=f"python -m ray_jobs.{name}")
    parser.add_argument("recipe", help="path of the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    if arguments is not None:
        arguments(parser)
    options = parser.parse_args(argv)
    # `ray job stop` sends SIGTERM: it must unwind like Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)

    def run() -> int:
        home = Home.from_environment()
        recipe = load_recipe(options.recipe, options.overrides)
        ledger = Ledger.open(home.ledger_url)
        session = Session(home, ledger, recipe, str(Path(options.recipe).resolve()), tuple(options.overrides))
        return body(session, options)

    return _told(name, run)


def ask_nodes(name: str, stack: ExitStack) -> int:
    """Join the cluster that a submitted job runs in, and ask its nodes; return the exit code, 0 where they are ready.

    A job imports its libraries for longer than nodes take to answer, so this comes before.

    Args:
        name: of the job.
        stack: keeps the cluster joined.
    """

    def ask() -> int:
        home = Home.from_environment()
        stack.enter_context(ray_cluster(home))
        stack.callback(_leave_in_peace)
        preflight(home, home.ledger_url)
        return 0

    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    for kind in handlers:
        # A job that is stopped meanwhile takes back what it wrote into the home.
        signal.signal(kind, _interrupt)
    try:
        return _told(name, ask)
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def _told(name: str, run: Callable[[], int]) -> int:
    """Run something, and say an error without a trace; return the exit code."""
    try:
        return run()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was acknowledged is kept", file=sys.stderr)  # noqa: T201
        return Interrupted.exit_code
    except PrefloopError as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


@contextmanager
def ray_cluster(home: Home) -> Any:
    """Join the running cluster, or start a local one that ends with the block."""
    if ray.is_initialized():
        yield
        return
    environment = {HOME_VARIABLE: home.uri, **_QUIET}
    submitted = submitted_runtime_env().get("env_vars", {})
    environment = {name: value for name, value in environment.items() if name not in submitted}
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    # Its controller takes one report from each worker at a time, and asks again after this many seconds (2 by default):
    # no run could be faster than one step in that time.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Its own are ten minutes for a worker that does not answer, and none for one that never reports.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{STALL_S:.0f}")
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", f"{2 * COLLECTIVE_TIMEOUT_S}")
    # Its own minute, four times, is short for a machine that a cloud puts in the place of a lost one.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{START_TIMEOUT_S}")
    arguments: dict[str, Any] = {
        # What a worker prints is in Ray's logs; an error of a worker reaches the driver as an exception.
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": environment},
    }
    address = _running_cluster(home)
    terminated = signal.getsignal(signal.SIGTERM)
    if address is None:
        ensure_ray_token()
        arguments["runtime_env"] = {"env_vars": {**environment, **LOCAL_ENVIRONMENT}}
        # Ray keeps an idle worker for each CPU, and each wakes a hundred times a second to look for signals: on two cores
        # a third of what Ray costs a step (docs/training.md). None is kept; a task that finds none starts one.
        os.environ.setdefault("RAY_num_workers_soft_limit", "0")
        # Train workers, Ray Data's readers and replicas share a laptop's cores: logical CPUs must not run out.
        ray.init("local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **arguments)
    else:
        if ray_token() is not None and "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            # Ray reads the mode when it is imported; this is how it reads it again itself.
            Config.initialize("")
        try:
            ray.init(address=address, **arguments)
        except (ConnectionError, RuntimeError, ValueError) as error:
            msg = f"the Ray cluster at `{address}` cannot be joined: {error}\n\nHint: is it running, is the address `HOST:PORT` of its head (not of its dashboard), and is its token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token?"
            raise ServiceError(msg) from None
    if threading.current_thread() is threading.main_thread():
        # Ray takes SIGTERM for itself, leaves without unwinding and prints a stack of its C++ code.
        signal.signal(signal.SIGTERM, terminated)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def warn_of_idle_gpus(workers: WorkerSection, console: Console) -> None:
    """Say where a run computes on CPUs beside GPUs that nobody uses: nobody wants that without a word."""
    gpus = ray.available_resources().get("GPU", 0.0)
    if gpus >= 1 and not workers.use_gpu:
        console.print(
            f"warning: the cluster has {gpus:g} GPU(s) free, and this run computes on CPUs: set workers.use_gpu",
            highlight=False,
            markup=False,
        )


def require_room(workers: WorkerSection, count: int, *, reading: float = 0.0) -> None:
    """Refuse to start what Ray would let wait for ever without a word.

    Args:
        workers: what one worker asks for.
        count: workers that must run at once.
        reading: CPUs that must be free beside them.

    Nodes that an autoscaler would add are not waited for.

    Raises:
        ServiceError: no node is large enough for one worker, or the nodes have too little that is free.
    """
    one = {"CPU": workers.cpus_per_worker, "GPU": 1.0 if workers.use_gpu else 0.0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not _places(nodes, one):
        largest = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        msg = f"a worker needs {one['CPU']:g} CPUs and {one['GPU']:g} GPUs on one node; the nodes have {largest}\n\nHint: lower workers.cpus_per_worker, or set workers.use_gpu to false."
        raise ServiceError(msg)
    end = time.monotonic() + _FREED_S
    while True:
        free = list(available_resources_per_node().values())
        cpus, places = sum(node.get("CPU", 0.0) for node in free), _places(free, one)
        if any(_places(left, one) >= count for left in _without(free, reading)):
            return
        if time.monotonic() > end:
            break
        time.sleep(0.2)  # what the stage before gave back may still be on its way
    gpus = " and 1 GPU" if workers.use_gpu else ""
    beside = f" and {reading:g} CPUs for reading" if reading else ""
    msg = f"{count} worker(s) with {one['CPU']:g} CPUs{gpus} each{beside} do not fit: the cluster has {cpus:g} CPUs free, with places for {places} of them\n\nHint: lower workers.workers or workers.cpus_per_worker, or wait for other jobs to end."
    raise ServiceError(msg)


def room(workers: WorkerSection) -> int:
    """Return how many workers find room now."""
    one = {"CPU": workers.cpus_per_worker, "GPU": 1.0 if workers.use_gpu else 0.0}
    return _places(list(available_resources_per_node().values()), one)


def _places(nodes: Sequence[dict[str, float]], one: dict[str, float]) -> int:
    """Count the workers that these nodes hold, each on one node."""
    asked = {kind: number for kind, number in one.items() if number}
    # 1.2 / 0.4 is a little less than 3.
    return sum(min(int(node.get(kind, 0.0) / number + 1e-6) for kind, number in asked.items()) for node in nodes)


def _without(nodes: Sequence[dict[str, float]], cpus: float) -> Iterator[list[dict[str, float]]]:
    """Yield what is left when one node gives these CPUs, for each node that has them."""
    for i, node in enumerate(nodes):
        left = node.get("CPU", 0.0) - cpus
        if left >= -1e-6:
            yield [*nodes[:i], {**node, "CPU": left}, *nodes[i + 1 :]]


def _running_cluster(home: Home) -> str | None:
    """Return the address of the cluster to join: the environment's, the recorded service's, or none."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    services = Services.read(home)
    if services is not None and ServeApi(services.ray_dashboard_url).reachable():
        return services.ray_address
    return None


def _leave_in_peace() -> None:
    """Let nothing interrupt what is left of a job, which has said how it ended: to leave the cluster."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.SIG_IGN)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
