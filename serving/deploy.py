"""Starts and stops the service: `python -m serving.deploy RECIPE.yaml [--set a.b=c] [--detach]`, `… --stop`.

Joins the Ray cluster that `RAY_ADDRESS` or the home's record names, or starts one of its own (token authentication on,
loopback only); makes sure that there is a champion; deploys the application through Serve's REST API; waits until it
is healthy; records where it is. In the foreground it stays until Ctrl-C or SIGTERM. It stops only what it started.

The model is named by the replicas' `user_config` alone, so shipping another one restarts no process. Ray and torch take
seconds to import, in which Ctrl-C could not be answered in order, so they are imported where they are needed.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import psutil

from app.config import Recipe, ServingSection, load_recipe
from app.errors import Interrupted, PrefloopError, ServiceError
from app.ledger import ChampionRow, Ledger, ledger_name
from app.services import (
    APPLICATION,
    REPLICA,
    ServeApi,
    Services,
    ensure_ray_token,
    forget_services,
    ray_token,
    submitted_runtime_env,
)
from app.storage import API_KEY_VARIABLE, HOME_VARIABLE, Home

_LOOPBACK = "127.0.0.1"
_OWN_ERROR = f"{ServiceError.__module__}.{ServiceError.__qualname__}: "
# Replica, gateway, train workers and Ray Data's readers share a laptop's cores: logical CPUs must not run out.
_MIN_LOGICAL_CPUS = 4
_RAY_START_S = 120.0
_HEALTHY_S = 600.0
_DRAIN_S = 15.0
_RAY_STOP_S = 30.0


def start(home: Home, ledger: Ledger, recipe: Recipe, *, started_by: str = "user") -> Services:
    """Bring the service up, record it and return where it is.

    Raises:
        ServiceError: the port is taken, Ray does not start, or the application does not become healthy.
    """
    section = recipe.serving
    known = Services.read(home)
    if known is not None and known.healthy():
        msg = f"the service of this home is running already at {known.gateway_url}\n\nHint: stop it with `prefloop serve --stop`."
        raise ServiceError(msg)
    url = f"http://{section.host}:{section.port}"
    cluster = _find_cluster(known)
    # Before anything is recorded or started: what fails later is taken down again, and a service may run here already.
    running = {} if cluster is None else ServeApi(cluster.ray_dashboard_url).details()
    if running.get("proxies"):
        _check_http_options(section, running.get("http_options") or {})
    else:
        _check_port(section.host, section.port)
    champion = first_champion(home, ledger, recipe)
    if cluster is None:
        cluster = replace(_start_cluster(home), started_by=started_by)
    # Whoever started the cluster that was found is the one who may stop it.
    owner = started_by if cluster.ray_pid is None else cluster.started_by
    services = replace(cluster, gateway_url=url, deployment=section.deployment, started_by=owner)
    services.write(home)
    try:
        _deploy(home, section, champion, ServeApi(services.ray_dashboard_url))
        _wait_until_healthy(services)
    except BaseException:
        with _undisturbed(), suppress(ServiceError):  # the first error is the one to tell
            stop(home, services)
        raise
    return services


def stop(home: Home, services: Services) -> None:
    """Take the application down, and the Ray cluster with it where it was started for this service."""
    api = ServeApi(services.ray_dashboard_url)
    try:
        if api.reachable():
            _remove(home, api)
    except ServiceError:
        if services.ray_pid is None:
            raise
    process = _process(services.ray_pid, services.ray_started)
    if process is not None:
        # Workers of a raylet that dies first would be nobody's children, so all are remembered before.
        family = [process, *process.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=_RAY_STOP_S)
        for member in alive:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    forget_services(home)


def first_champion(home: Home, ledger: Ledger, recipe: Recipe) -> ChampionRow:
    """Return the champion of the deployment; before the first ship it is the SFT checkpoint.

    Raises:
        ModelError: the SFT checkpoint cannot be loaded, or the champion descends from another one.
    """
    from app.models import check_descent, ensure_sft

    deployment = recipe.serving.deployment
    champion = ledger.champion(deployment)
    sft = ensure_sft(home, ledger, recipe.model.sft)
    if champion is not None:
        check_descent(ledger, champion.model_id, sft, deployment=deployment)
        return champion
    return ledger.set_champion(
        deployment, sft.model_id, expected_revision=0, actor="serve", reason="the SFT checkpoint is the first champion"
    )


class _Stopped(BaseException):
    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def _find_cluster(known: Services | None) -> Services | None:
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("http"):
        return Services("", address.rstrip("/"), "auto")
    if address and address != "local":
        if ray_token() is not None:
            # Ray reads it when it is imported.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray

        try:
            host, _, port = address.rpartition(":")
            if port.isdigit():
                # Ray itself would try for minutes.
                socket.create_connection((host, int(port)), timeout=10).close()
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            msg = f"no Ray cluster answers at RAY_ADDRESS `{address}`: {error}\n\nHint: start it, or unset RAY_ADDRESS to get one of its own."
            raise ServiceError(msg) from None
        try:
            found, dashboard = str(ray.get_runtime_context().gcs_address), str(context.dashboard_url)
        finally:
            ray.shutdown()
        return Services("", f"http://{dashboard}", found)
    if known is not None and ServeApi(known.ray_dashboard_url).reachable():
        return replace(known, pid=None, pid_started=None)
    return None


def _start_cluster(home: Home) -> Services:
    ensure_ray_token()
    port, dashboard_port, client_port, agent_port = (_free_port(p) for p in (6379, 8265, 10001, 52365))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--num-cpus", str(max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1))]
    command += ["--port", str(port), "--dashboard-host", _LOOPBACK, "--dashboard-port", str(dashboard_port)]
    # Two Rays on one machine cannot share the agent's port; without an agent no job starts.
    command += ["--ray-client-server-port", str(client_port), "--dashboard-agent-listen-port", str(agent_port)]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        HOME_VARIABLE: home.uri,
        # Jobs run `python`: it must be this one.
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}",  # noqa: PTH120
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # The application is drained before Ray is stopped; a node that drains once more only waits.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    log = home.near("ray.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        # A session of its own: Ctrl-C in the terminal is for this process, which then stops Ray in order.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    import ray.util

    services = Services(
        gateway_url="",
        ray_dashboard_url=f"http://{_LOOPBACK}:{dashboard_port}",
        ray_address=f"{ray.util.get_node_ip_address()}:{port}",
        ray_pid=process.pid,
        ray_started=psutil.Process(process.pid).create_time(),
    )
    try:
        end = time.monotonic() + _RAY_START_S
        while not _started(services):
            if process.poll() is not None or time.monotonic() > end:
                state = "ended" if process.poll() is not None else f"did not answer within {_RAY_START_S:.0f} s"
                msg = f"Ray {state}; the end of `{log}`:\n{log.read_text(errors='replace')[-1500:]}"
                raise ServiceError(msg)
            time.sleep(0.3)
    except BaseException:
        with _undisturbed():
            stop(home, services)
        raise
    return services


def _started(services: Services) -> bool:
    try:
        return ServeApi(services.ray_dashboard_url).reachable()
    except ServiceError:
        return False  # it listens before it can answer


def _deploy(home: Home, section: ServingSection, champion: ChampionRow, api: ServeApi) -> None:
    running = api.details()
    # Started by a submitted job, the replicas run the code that was submitted; else what is installed.
    code = {key: value for key, value in submitted_runtime_env().items() if key == "working_dir"}
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "serving.application:build",
        "args": {
            "home": home.uri,
            "ledger": ledger_name(home.ledger_url),
            "serving": section.model_dump(mode="json"),
        },
        "runtime_env": code | {"env_vars": {HOME_VARIABLE: home.uri}},
        "deployments": [
            {"name": REPLICA, "user_config": {"model_id": champion.model_id, "revision": champion.revision}}
        ],
    }
    others = [a for a in api.config()["applications"] if not _is_ours(a, home)]
    taken = [a for a in others if a["name"] == APPLICATION or a.get("route_prefix") == "/"]
    if taken:
        whose = (taken[0].get("args") or {}).get("home", "unknown")
        msg = f"the application `{taken[0]['name']}` (home: {whose}) of this cluster serves `/` already\n\nHint: stop it, or use a cluster of its own."
        raise ServiceError(msg)
    api.put(
        {
            "proxy_location": running.get("proxy_location") or "HeadOnly",
            "http_options": _http_options(section),
            "applications": [*others, application],
        }
    )


def _http_options(section: ServingSection) -> dict[str, Any]:
    return {"host": section.host, "port": section.port, "request_timeout_s": section.request_timeout_s}


def _check_http_options(section: ServingSection, found: dict[str, Any]) -> None:
    """Refuse other values than those of a Serve that runs: it reads them when it starts and ignores later ones."""
    wanted = _http_options(section)
    # A timeout that it does not tell is none; another option that it does not tell is not known.
    known = {"request_timeout_s": None} | {key: value for key, value in found.items() if value is not None}
    differing = {key: known[key] for key in wanted if key in known and known[key] != wanted[key]}
    if not differing:
        return
    has = ", ".join(f"{key} {'none' if value is None else value}" for key, value in differing.items())
    asks = ", ".join(f"{key} {wanted[key]}" for key in differing)
    settings = " ".join(f"--set serving.{key}={value}" for key, value in differing.items() if value is not None)
    remedy = f"run with `{settings}`, or use" if settings and None not in differing.values() else "use"
    msg = f"Ray Serve runs in this cluster already with {has}, the recipe asks for {asks}\n\nHint: {remedy} a cluster of its own."
    raise ServiceError(msg)


def _wait_until_healthy(services: Services) -> None:
    api = ServeApi(services.ray_dashboard_url)
    end = time.monotonic() + _HEALTHY_S
    while time.monotonic() < end:
        application = api.details()["applications"].get(APPLICATION, {})
        if application.get("status") == "RUNNING" and services.healthy():
            return
        if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServiceError(f"the service does not become healthy: {_reason(application)}")
        time.sleep(0.3)
    msg = f"the service is not healthy after {_HEALTHY_S:.0f} s: {_reason(application)}"
    raise ServiceError(msg)


def _reason(application: dict[str, Any]) -> str:
    messages: list[str] = [d.get("message", "") for d in application.get("deployments", {}).values()]
    lines = [line.strip() for m in [*messages, application.get("message", "")] for line in m.splitlines()]
    own = [line.partition(_OWN_ERROR)[2] for line in lines if _OWN_ERROR in line]
    told = [line for line in lines if line]
    return str((own or told or ["no reason given"])[-1])


def _remove(home: Home, api: ServeApi) -> None:
    config = api.config()
    if not any(_is_ours(application, home) for application in config["applications"]):
        return
    api.put({**config, "applications": [a for a in config["applications"] if not _is_ours(a, home)]})
    end = time.monotonic() + _DRAIN_S
    while time.monotonic() < end and APPLICATION in api.details()["applications"]:
        time.sleep(0.3)


def _is_ours(application: dict[str, Any], home: Home) -> bool:
    return application["name"] == APPLICATION and (application.get("args") or {}).get("home") == home.uri


def _process(pid: int | None, started: float | None) -> psutil.Process | None:
    """Return the recorded process, or None where it has ended or its id is another's now."""
    if pid is None or started is None:
        return None
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - started) < 1 else None
    except psutil.NoSuchProcess:
        return None


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        msg = f"the gateway cannot use port {port} of {host}: {error.strerror}\n\nHint: choose another one with `--set serving.port=PORT`."
        raise ServiceError(msg) from None


def _free_port(preferred: int) -> int:
    for candidate in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    msg = "no free port was found"
    raise ServiceError(msg)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let a second Ctrl-C not interrupt the cleaning up that the first one began."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_stopped(number: int, _frame: object) -> None:
    # One signal is enough; another must not interrupt the cleaning up.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    raise _Stopped(number)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _stay(services: Services) -> None:
    """Wait for a signal; raises ServiceError when Ray ends on its own."""
    while True:
        time.sleep(1)
        if services.ray_pid is not None:
            process = _process(services.ray_pid, services.ray_started)
            if process is None or process.status() == psutil.STATUS_ZOMBIE:
                msg = "Ray ended, and the service with it\n\nHint: look at `ray.log` in the home, and start again."
                raise ServiceError(msg)


def _stop_recorded(home: Home) -> int:
    services = Services.read(home)
    if services is None:
        _say(f"serve: no service is recorded in {home.uri}")
        return 0
    waiting = _process(services.pid, services.pid_started)
    if waiting is not None:
        with suppress(psutil.NoSuchProcess):
            waiting.terminate()
        psutil.wait_procs([waiting], timeout=_DRAIN_S + _RAY_STOP_S)
    else:
        stop(home, services)
    _say("serve: stopped")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 when stopped in order, 130 after Ctrl-C, 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m serving.deploy", description="Start or stop the service.")
    parser.add_argument("recipe", nargs="?", help="path of the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--detach", action="store_true", help="return when the service is healthy, and leave it running"
    )
    parser.add_argument("--started-by", choices=("user", "loop"), default="user", help="who starts it, for the record")
    parser.add_argument("--stop", action="store_true", help="stop the service that is recorded in the home")
    options = parser.parse_args(argv)
    if options.stop == (options.recipe is not None):
        parser.error("give a recipe, or --stop")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_stopped)
    try:
        home = Home.from_environment()
        if options.stop:
            return _stop_recorded(home)
        recipe = load_recipe(options.recipe, options.overrides)
        ledger = Ledger.open(home.ledger_url)
        _say("serve: starting (Ray, the champion, the gateway)")
        services = start(home, ledger, recipe, started_by=options.started_by)
        key = API_KEY_VARIABLE if API_KEY_VARIABLE in os.environ else home.local("api_key")
        _say(f"serve: {services.gateway_url} answers; the key is in {key}")
        if options.detach:
            _say("serve: detached; stop it with `prefloop serve --stop`")
            return 0
        services = replace(services, pid=os.getpid(), pid_started=psutil.Process().create_time())
        services.write(home)
        try:
            _stay(services)
        finally:
            with _undisturbed():
                stop(home, services)
    except _Stopped as stopped:
        _complain("serve: stopped; what was acknowledged is kept")
        return 0 if stopped.signal_number == signal.SIGTERM else Interrupted.exit_code
    except PrefloopError as error:
        _complain(f"serve: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
