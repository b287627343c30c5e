"""`prefloop jobs …`: the product's jobs on a cluster somewhere else, over Ray's Jobs API.

    python -m ray_jobs.jobs submit JOB RECIPE [--set a.b=c] [--id ID] [--home PLACE] [--follow] [-- ARGUMENTS]
    python -m ray_jobs.jobs list | logs ID [--follow] | stop ID

A job runs `python -m ray_jobs JOB RECIPE …` in a copy of the working directory. Its id makes it one job: the same id
again is the job that runs, succeeded or was held by the gate (and an error where the recipe or the home is another than
it had), and a new attempt (`ID-a2`) of one that failed or was stopped. A training job's
id is its run id too, so that the new attempt goes on from the last checkpoint. What jobs must know and nobody else
(PREFLOOP_LEDGER, PREFLOOP_SIGNING_KEY) is in the environment of the cluster's nodes: what is sent with a job, everyone
sees who sees Ray's dashboard.
"""

import argparse
import asyncio
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.config import load_recipe
from app.errors import HOLD_EXIT_CODE, Interrupted, PrefloopError, RecipeError, ServiceError
from app.schemas import content_hash
from app.services import Services, ray_token
from app.storage import HOME_VARIABLE, Home

JOBS = ("build_pairs", "prepare", "train", "evaluate", "ship", "loop")
_ADDRESS = "http://127.0.0.1:8265"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_STOP_WAIT_S = 60
"""How long a stopped job may take to leave in order; Ray's own 3 s are short for a service that answers to its end. A
checkpoint that is being written is lost, the one before it stays."""
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ATTEMPT = re.compile(r"-a([0-9]+)$")
_POLL_S = 1.0
_AGENT_S = 60.0
_WIDE = 240
_HELD = "HELD"
_KEPT_HERE = [".git", ".venv", ".prefloop", "*.env", ".ray"]
"""What is not sent: states, and files with secrets."""


@dataclass(frozen=True)
class JobRequest:
    """What is to run on the cluster."""

    job: str
    recipe: str
    """Path below the working directory."""
    overrides: tuple[str, ...] = ()
    job_id: str | None = None
    home: str | None = None
    """Where the state lies, as the nodes see it; default: what their environment says."""
    arguments: tuple[str, ...] = ()
    """Given to the job as they are."""
    recipe_digest: str = ""
    """Of what the recipe and the overrides say."""

    def checked(self) -> "JobRequest":
        """Return the request with an id.

        Raises:
            RecipeError: the job is unknown, the recipe is faulty or lies elsewhere, or the id or the home is unusable.
        """
        job = self.job.replace("-", "_")
        if job not in JOBS:
            msg = f"no job `{self.job}`\n\nHint: there are {', '.join(JOBS)}."
            raise RecipeError(msg)
        place = Path(self.recipe)
        if not place.resolve().is_relative_to(Path.cwd()):
            msg = f"recipe `{self.recipe}` lies outside of `{Path.cwd()}`, which is what a job gets a copy of\n\nHint: change to a folder that holds the recipe and the files it names."
            raise RecipeError(msg)
        recipe = load_recipe(place, self.overrides)
        if self.home is not None and "://" not in self.home and not Path(self.home).is_absolute():
            msg = f"--home `{self.home}` is relative, and a job runs in another folder on another machine\n\nHint: give an absolute path that all nodes see, or a URI."
            raise RecipeError(msg)
        if self.job_id is not None and (not _ID.fullmatch(self.job_id) or _ATTEMPT.search(self.job_id)):
            msg = f"--id `{self.job_id}` is unusable\n\nHint: at most 64 of a-z, 0-9, `.`, `_` and `-`, and no `-aN` at its end, which counts attempts."
            raise RecipeError(msg)
        job_id = self.job_id or f"{job.replace('_', '-')}-{uuid.uuid4().hex[:8]}"
        relative = str(place.resolve().relative_to(Path.cwd()))
        # Of what is written there: a newer prefloop may know more settings.
        digest = content_hash(recipe.model_dump(mode="json", exclude_unset=True))
        return JobRequest(job, relative, self.overrides, job_id, self.home, self.arguments, digest)

    def entrypoint(self) -> str:
        """Return the shell command that Ray runs."""
        command = ["python", "-m", "ray_jobs", self.job, self.recipe]
        for override in self.overrides:
            command += ["--set", override]
        command += self.arguments
        if self.job == "train" and "--run" not in self.arguments:
            command += ["--run", str(self.job_id)]
        return shlex.join(command)

    def metadata(self) -> dict[str, str]:
        """Return what the cluster keeps of the request: what makes it this job beside its command."""
        return {"prefloop_job": self.job, "recipe": self.recipe_digest, "home": self.home or ""}


class Cluster:
    """The Jobs API of one cluster.

    Raises:
        ServiceError: from every method, where the cluster does not answer or refuses.
    """

    def __init__(self, address: str) -> None:
        # Ray takes seconds to import, in which a wrong recipe could be told.
        from ray.job_submission import JobSubmissionClient

        token = ray_token()
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self._address = address
        self._client = self._asked(lambda: JobSubmissionClient(address, headers=headers))

    def submit(self, request: JobRequest) -> tuple[str, str]:
        """Submit a job unless it runs, succeeded or was held by the gate; return the id of its attempt, and its state before."""
        assert request.job_id is not None  # noqa: S101  `checked` gives one
        attempts = self._attempts(request.job_id)
        if attempts:
            number, newest = max(attempts.items())
            if newest.entrypoint != request.entrypoint():
                msg = f"job `{newest.submission_id}` is another one: `{newest.entrypoint}`, this is `{request.entrypoint()}`\n\nHint: choose another --id."
                raise ServiceError(msg)
            state, known = _state(newest), newest.metadata or {}
            if state not in ("FAILED", "STOPPED"):
                # One that failed may be mended; one that runs or is done did what its recipe said then.
                differing = [key for key, value in request.metadata().items() if known.get(key, value) != value]
                if differing:
                    msg = f"job `{newest.submission_id}` is {state} with another {' and '.join(differing)} than now\n\nHint: choose another --id."
                    raise ServiceError(msg)
                return newest.submission_id, state
            attempt, before = f"{request.job_id}-a{number + 1}", state
        else:
            attempt, before = request.job_id, ""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
        if request.home is not None:
            variables[HOME_VARIABLE] = request.home
        end = time.monotonic() + _AGENT_S
        while True:
            try:
                self._asked(
                    lambda: self._client.submit_job(
                        entrypoint=request.entrypoint(),
                        submission_id=attempt,
                        runtime_env={"working_dir": ".", "excludes": _KEPT_HERE, "env_vars": variables},
                        metadata=request.metadata(),
                    )
                )
            except ServiceError as error:
                # A head that was just started answers before it can take a job.
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(_POLL_S)
            else:
                return attempt, before

    def rows(self) -> list[tuple[str, ...]]:
        """Return id, job, state, start, seconds and message of every job of the product, the newest first."""
        found = []
        for job in self._listed():
            if "prefloop_job" not in (job.metadata or {}):
                continue
            began = (job.start_time or 0) / 1000
            seconds = ((job.end_time or time.time() * 1000) / 1000 - began) if began else 0.0
            told = (job.message or "").strip().splitlines()
            state = _state(job)
            told_last = told[-1] if told and state in ("FAILED", "STOPPED") else ""
            start = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began))
            row = (
                job.submission_id,
                job.metadata["prefloop_job"],
                state,
                start,
                f"{seconds:.0f}",
                told_last,
            )
            found.append((began, row))
        return [row for _, row in sorted(found, reverse=True)]

    def logs(self, job_id: str) -> str:
        """Return what the newest attempt of a job printed."""
        return str(self._asked(lambda: self._client.get_job_logs(self._newest(job_id).submission_id)))

    def follow(self, job_id: str) -> int:
        """Print what the newest attempt of a job prints until it ends; return its exit code."""
        attempt = self._newest(job_id).submission_id

        async def print_lines() -> None:
            async for text in self._client.tail_job_logs(attempt):
                sys.stdout.write(text)
                sys.stdout.flush()

        self._asked(lambda: asyncio.run(print_lines()))
        while (info := self._asked(lambda: self._client.get_job_info(attempt))).status.value not in _ENDED:
            time.sleep(_POLL_S)
        if info.status.value == "SUCCEEDED":
            return 0
        return int(info.driver_exit_code or 1)

    def stop(self, job_id: str) -> str:
        """Stop the newest attempt of a job, wait until it ended, and return its state."""
        attempt = self._newest(job_id).submission_id
        self._asked(lambda: self._client.stop_job(attempt))
        end = time.monotonic() + 2 * _STOP_WAIT_S
        while time.monotonic() < end:
            status = self._asked(lambda: self._client.get_job_status(attempt)).value
            if status in _ENDED:
                return str(status)
            time.sleep(_POLL_S)
        msg = f"job `{attempt}` still runs {2 * _STOP_WAIT_S} s after it was told to stop"
        raise ServiceError(msg)

    def _newest(self, job_id: str) -> Any:
        attempts = self._attempts(_ATTEMPT.sub("", job_id))
        exact = [job for job in attempts.values() if job.submission_id == job_id and _ATTEMPT.search(job_id)]
        if not attempts or (_ATTEMPT.search(job_id) and not exact):
            msg = f"no job `{job_id}` on the cluster at `{self._address}`\n\nHint: `prefloop jobs list` shows those that there are."
            raise ServiceError(msg)
        return exact[0] if exact else max(attempts.items())[1]

    def _attempts(self, job_id: str) -> dict[int, Any]:
        found = {}
        for job in self._listed():
            name = job.submission_id or ""
            match = _ATTEMPT.search(name)
            if name == job_id or (match and name[: match.start()] == job_id):
                found[int(match[1]) if match else 1] = job
        return found

    def _listed(self) -> list[Any]:
        return list(self._asked(self._client.list_jobs))

    def _asked(self, call: Any) -> Any:
        # Ray takes seconds to import, in which a wrong recipe could be told.
        from aiohttp import ClientError
        from ray.exceptions import RayError

        try:
            return call()
        except (ConnectionError, OSError) as error:
            msg = f"no Ray cluster answers at `{self._address}`: {error}\n\nHint: `ray dashboard cluster.yaml` makes a tunnel to its head; --address names another place."
            raise ServiceError(msg) from None
        except (RuntimeError, ValueError, RayError, ClientError) as error:
            refused = "401" in str(error) or "403" in str(error) or "authenticat" in str(error).lower()
            hint = (
                "\n\nHint: is the cluster's token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token of this machine?"
                if refused
                else ""
            )
            msg = f"the Ray cluster at `{self._address}` refused: {str(error).strip().splitlines()[0][:500]}{hint}"
            raise ServiceError(msg) from None


def _state(job: Any) -> str:
    """Return a job's state; Ray knows no verdict, and calls the exit code of a gate that holds a failure."""
    return _HELD if job.driver_exit_code == HOLD_EXIT_CODE else str(job.status.value)


def _address(given: str | None) -> str:
    if given is not None:
        return given
    if address := os.environ.get("RAY_API_SERVER_ADDRESS"):
        return address
    home = Home.from_environment()
    services = Services.read(home)
    return services.ray_dashboard_url if services is not None else _ADDRESS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefloop jobs", description="Run the product's jobs on a Ray cluster, over its Jobs API."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser("submit", help="submit a job, or find the one with this id")
    submit.add_argument("job", help=f"one of {', '.join(JOBS)}")
    submit.add_argument("recipe", help="path of the recipe, below the current folder")
    submit.add_argument("arguments", nargs="*", help="after `--`: given to the job", default=[])
    submit.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    submit.add_argument("--id", dest="job_id", help="makes the job one job; default: a new one")
    submit.add_argument("--home", help="absolute path or URI of the state, as the nodes see it; default: theirs")
    submit.add_argument("--follow", action="store_true", help="print what it prints, leave with its exit code")
    listed = commands.add_parser("list", help="the jobs, the newest first")
    logs = commands.add_parser("logs", help="what a job printed")
    logs.add_argument("job_id")
    logs.add_argument("--follow", action="store_true", help="until it ends; leave with its exit code")
    stop = commands.add_parser("stop", help="stop a job; what was acknowledged is kept")
    stop.add_argument("job_id")
    for command in (submit, listed, logs, stop):
        command.add_argument("--address", help=f"dashboard of the head; default: the running service's, or {_ADDRESS}")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.command == "submit":
        request = JobRequest(
            options.job,
            options.recipe,
            tuple(options.overrides),
            options.job_id,
            options.home,
            tuple(options.arguments),
        ).checked()
        cluster = Cluster(_address(options.address))
        attempt, before = cluster.submit(request)
        new = before in ("", "FAILED", "STOPPED")
        told = "submitted" if not before else f"submitted again: it {before.lower()} before"
        print(f"job {attempt}: {told if new else f'{before.lower()} already, nothing was submitted'}", flush=True)  # noqa: T201
        return cluster.follow(attempt) if options.follow else 0
    cluster = Cluster(_address(options.address))
    if options.command == "list":
        table = Table("id", "job", "state", "start (UTC)", "seconds", "message", box=None)
        for row in cluster.rows():
            table.add_row(*row)
        # Into a file or a pipe, an id must not be broken by the width of a terminal that is not there.
        Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    elif options.command == "stop":
        print(f"job {options.job_id}: {cluster.stop(options.job_id).lower()}")  # noqa: T201
    elif options.follow:
        return cluster.follow(options.job_id)
    else:
        print(cluster.logs(options.job_id), end="")  # noqa: T201
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("jobs: interrupted; a job that was submitted goes on", file=sys.stderr)  # noqa: T201
        return Interrupted.exit_code
    except PrefloopError as error:
        print(f"jobs: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
