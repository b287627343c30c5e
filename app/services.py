"""Where the running service is found, and how what it serves is read and changed over HTTP.

`services.json` in the home is written by who started the service. It says where to look, not that something is there: a
machine may have gone down since. Knows nothing of how the service is built; only the names under which it is deployed
stand here, because jobs change what is deployed.
"""

import ipaddress
import json
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from app.errors import ServiceError
from app.storage import Home, same_signature, signature, write_atomically

APPLICATION = "prefloop"
"""Name of the application in Ray Serve."""
REPLICA = "Replica"
"""Name of the Serve deployment whose `user_config` names the model."""
_FILE = "services.json"
_PURPOSE = b"prefloop services/1\n"
_INNER_NAMES = (".svc", ".cluster.local", ".internal", ".local", ".localhost")


@dataclass(frozen=True)
class Services:
    """Addresses of a running service, and the processes that were started for it.

    Attributes:
        gateway_url: base URL of the HTTP API.
        ray_dashboard_url: base URL of Ray's dashboard, which serves the Jobs and Serve APIs.
        ray_address: `host:port` of the Ray cluster.
        deployment: whose champion is served, and under whose name feedback is recorded.
        started_by: `user`, or `loop` where a loop started it for its simulated audience.
        pid: the process that waits in the foreground, or None where the service is detached.
        pid_started: start time of that process (seconds), because process ids are used again.
        ray_pid: the `ray start --block` that was started for this service, or None where a cluster was joined.
        ray_started: start time of that process.
    """

    gateway_url: str
    ray_dashboard_url: str
    ray_address: str
    deployment: str = "default"
    started_by: str = "user"
    pid: int | None = None
    pid_started: float | None = None
    ray_pid: int | None = None
    ray_started: float | None = None

    @classmethod
    def read(cls, home: Home) -> "Services | None":
        """Return what is recorded in a home, or None; where the home is no folder of this machine, as it was signed.

        Raises:
            ServiceError: the file is damaged, or not signed with the home's key: a token goes where it points.
        """
        try:
            found = json.loads(home.filesystem.cat_file(home.path(_FILE)))
            if not home.is_local:
                expected = signature(found["record"], home.signing_key(), purpose=_PURPOSE)
                if not same_signature(found["signature"], expected):
                    msg = f"`{home.uri}/{_FILE}` is not signed with this home's key, so nobody is asked where it points\n\nHint: start the service again with `prefloop serve`."
                    raise ServiceError(msg)
                found = found["record"]
            return cls(**found)
        except FileNotFoundError:
            return None
        except (TypeError, ValueError, KeyError) as error:
            msg = f"`{home.uri}/{_FILE}` is damaged ({error})\n\nHint: remove it, and start the service again with `prefloop serve`."
            raise ServiceError(msg) from None

    def write(self, home: Home) -> None:
        """Record the service in a home."""
        record: dict[str, Any] = asdict(self)
        if not home.is_local:
            # Others may write to a store; a folder is its owner's.
            record = {"record": record, "signature": signature(record, home.signing_key(), purpose=_PURPOSE)}
        write_atomically(home.filesystem, home.path(_FILE), json.dumps(record, indent=1).encode())

    def healthy(self) -> bool:
        """Ask the gateway whether it can answer."""
        try:
            return (
                httpx.get(
                    f"{self.gateway_url}/healthz", timeout=10, trust_env=not is_near(self.gateway_url)
                ).status_code
                == httpx.codes.OK
            )
        except httpx.HTTPError:
            return False


def forget_services(home: Home) -> None:
    """Remove the record of a service that has ended."""
    with suppress(FileNotFoundError):
        home.filesystem.rm_file(home.path(_FILE))


class ServeApi:
    """Ray Serve's REST API on a dashboard's address, with Ray's token where there is one."""

    def __init__(self, dashboard_url: str) -> None:
        self.url = dashboard_url.rstrip("/")

    def reachable(self) -> bool:
        """Tell whether a dashboard is here; what refuses a connection is gone.

        Raises:
            ServiceError: nothing answers in time, or what listens refuses the token. That is not the same as nothing: a
                service may run behind it.
        """
        try:
            reply = self._request("GET", "/api/version")
        except httpx.ConnectError:
            return False
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        if reply.is_error:
            msg = f"what listens at `{self.url}` refused with {reply.status_code}: {reply.text.strip()[-300:]}\n\nHint: is Ray's token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token the one that the cluster was started with? If the recorded service is gone and another cluster listens there, remove `services.json` in the home."
            raise ServiceError(msg)
        return True

    def details(self) -> dict[str, Any]:
        """Return what Serve says of itself: HTTP options, and each application with its deployments and replicas.

        Raises:
            ServiceError: nothing answers, or it refuses.
        """
        details: dict[str, Any] = self._checked("GET").json()
        return details

    def config(self) -> dict[str, Any]:
        """Return the configuration that is deployed, in the form that `put` takes."""
        details = self.details()
        applications = [a["deployed_app_config"] for a in details["applications"].values() if a["deployed_app_config"]]
        kept = {k: details[k] for k in ("proxy_location", "http_options") if details.get(k)}
        return {**kept, "applications": applications}

    def put(self, config: dict[str, Any]) -> None:
        """Deploy a configuration; applications that it lacks are removed. Returns before it is in force."""
        self._checked("PUT", config)

    def _checked(self, method: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            reply = self._request(method, "/api/serve/applications/", body)
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        if reply.is_error:
            msg = f"Ray Serve at `{self.url}` refused with {reply.status_code}: {reply.text.strip()[-1000:]}"
            raise ServiceError(msg)
        return reply

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        token = ray_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(60, connect=10)
        return httpx.request(
            method,
            f"{self.url}{path}",
            json=body,
            headers=headers,
            timeout=timeout,
            trust_env=not is_near(self.url),
        )

    def _silent(self, error: httpx.HTTPError) -> ServiceError:
        return ServiceError(
            f"Ray's dashboard at `{self.url}` does not answer ({type(error).__name__})\n\nHint: start the service with `prefloop serve RECIPE.yaml`. If it is gone for good, remove `services.json` in the home."
        )


def is_near(url: str) -> bool:
    """Tell whether a URL is of this machine or a private network, for which no proxy of the environment is asked.

    Names are not resolved: near are this machine's, those without a dot, and those that end as inner names do.
    """
    host = httpx.URL(url).host
    try:
        return not ipaddress.ip_address(host).is_global  # loopback and private addresses
    except ValueError:
        return "." not in host or host.endswith(_INNER_NAMES) or host == socket.gethostname()


def submitted_runtime_env() -> dict[str, Any]:
    """Return the runtime environment with which Ray was asked to run this job, or an empty one outside of a job.

    What a job starts must be given the same code (`working_dir`), and Ray refuses variables that are named twice.
    """
    environment: dict[str, Any] = (
        json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    )
    return environment


def ray_token_path() -> Path:
    """Return where Ray looks for its token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def ray_token() -> str | None:
    """Return Ray's token, found where Ray itself looks for it, or None."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    try:
        return ray_token_path().read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def ensure_ray_token() -> None:
    """See to it that there is a token which only its owner can read; Ray would write one readable by everybody."""
    if ray_token() is None:
        path = ray_token_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(32))
    elif ray_token_path().exists():
        ray_token_path().chmod(0o600)
