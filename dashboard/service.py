"""Speaks HTTP with what runs: the gateway (answers, feedback) and Ray's Jobs API (ship, roll back, build pairs).

Every action of the dashboard goes through here. A job is always one of the fixed commands below, never text from the
screen. This module knows nothing of Streamlit or of the ledger.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from app.errors import HOLD_EXIT_CODE, ServiceError
from app.schemas import Message
from app.services import is_near, ray_token
from app.storage import HOME_VARIABLE, Home

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LOG_TAIL = 20_000
_QUICK = httpx.Timeout(10.0)
# Time to the first token of a busy replica, and between two tokens.
_PATIENT = httpx.Timeout(10.0, read=300.0)


@dataclass(frozen=True)
class Answer:
    """What the gateway has sent of one answer so far; it is complete when `finish_reason` is set."""

    response_id: str
    model_id: str
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Health:
    """What the gateway says it serves. `status`: ok, switching, degraded or unavailable."""

    status: str
    model_id: str | None
    revision: int | None


@dataclass(frozen=True)
class Job:
    """A job of the dashboard on the cluster. `status` is Ray's: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    submission_id: str
    status: str
    message: str
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        """True when the status is final."""
        return self.status in {"SUCCEEDED", "FAILED", "STOPPED"}

    @property
    def held(self) -> bool:
        """True when the job ended with the verdict HOLD, which is no error."""
        return self.status == "FAILED" and self.exit_code == HOLD_EXIT_CODE


class Gateway:
    """The running gateway, as one user of it."""

    def __init__(self, url: str, key: str, *, subject: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._subject = subject

    def health(self) -> Health:
        """Ask what is served; raises ServiceError where nothing answers."""
        with _explained("the gateway", self._url):
            reply = httpx.get(f"{self._url}/healthz", timeout=_QUICK, trust_env=not is_near(self._url))
            if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                _checked(reply, "the gateway")
            body = reply.json()
        return Health(str(body.get("status")), body.get("model_id"), body.get("revision"))

    def ask(
        self,
        messages: Sequence[Message],
        *,
        conversation_id: str,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Answer]:
        """Stream the answer to a conversation: each item holds the whole text so far, the last one is complete.

        Raises:
            ServiceError: the gateway refuses, cannot be reached, or the stream ends before the answer does.
        """
        body: dict[str, Any] = {
            "model": "champion",
            "messages": [m.to_openai() for m in messages],
            "stream": True,
            "user": self._subject,
            "metadata": {"conversation_id": conversation_id, "origin": "served"},
        }
        body |= {k: v for k, v in (("temperature", temperature), ("seed", seed)) if v is not None}
        answer = Answer("", "", "")
        with (
            _explained("the gateway", self._url),
            httpx.stream(
                "POST",
                f"{self._url}/v1/chat/completions",
                json=body,
                headers=self._headers,
                timeout=_PATIENT,
                trust_env=not is_near(self._url),
            ) as reply,
        ):
            if reply.is_error:
                reply.read()
            for event in _events(_checked(reply, "the gateway")):
                if "error" in event:
                    raise ServiceError(f"the gateway stopped the answer: {_error_text(event)}")
                answer = _grown(answer, event)
                yield answer
        if answer.finish_reason is None:
            msg = "the answer was cut off before its end, so it is not kept\n\nHint: send the message again."
            raise ServiceError(msg)

    def give_feedback(
        self, response_id: str, kind: str, value: str, *, event_id: str, tags: Sequence[str] = (), comment: str = ""
    ) -> int:
        """Store a judgement (thumb: up, down; edit: the better text) and return its revision.

        Raises:
            ServiceError: the gateway refuses it or cannot be reached; the same `event_id` may be sent again.
        """
        body = {
            "response_id": response_id,
            "kind": kind,
            "value": value,
            "tags": list(tags),
            "comment": comment or None,
            "user": self._subject,
            "origin": "user",
            "event_id": event_id,
        }
        return int(self._post("/v1/feedback", body).get("revision", 1))

    def compare(
        self, response_a: str, response_b: str, verdict: str, *, shown_order: Sequence[str], event_id: str
    ) -> int:
        """Store which of two answers is better (`verdict` is one of `app.ledger.VERDICTS`, A = `response_a`)."""
        body = {
            "response_a": response_a,
            "response_b": response_b,
            "verdict": verdict,
            "shown_order": list(shown_order),
            "user": self._subject,
            "origin": "user",
            "event_id": event_id,
        }
        return int(self._post("/v1/comparisons", body).get("revision", 1))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _explained("the gateway", self._url):
            reply = httpx.post(
                f"{self._url}{path}", json=body, headers=self._headers, timeout=_QUICK, trust_env=not is_near(self._url)
            )
            content: dict[str, Any] = _checked(reply, "the gateway").json()
        return content


class Jobs:
    """Ray's Jobs API, restricted to the commands that the dashboard may run."""

    def __init__(self, url: str, home: Home, *, recipe: str | None, actor: str) -> None:
        self._url = url.rstrip("/")
        self._home = home
        self._recipe = recipe
        self._actor = actor

    def ship(self, model_id: str, *, submission_id: str) -> str:
        """Submit the job that ships a model; returns the submission id."""
        if not _MODEL_ID.fullmatch(model_id):
            raise ServiceError(f"`{model_id}` is no model id")
        return self._submit(submission_id, "ray_jobs.ship", "--model", model_id, "--actor", self._actor)

    def roll_back(self, *, submission_id: str) -> str:
        """Submit the job that ships the previous champion again."""
        return self._submit(submission_id, "ray_jobs.ship", "--rollback", "--actor", self._actor)

    def build_pairs(self, *, submission_id: str) -> str:
        """Submit the job that turns the signals of the ledger into a pair snapshot."""
        return self._submit(submission_id, "ray_jobs.build_pairs")

    def find(self, submission_id: str) -> Job:
        """Return the state of a job; raises ServiceError where Ray does not know it."""
        body = self._get(f"/api/jobs/{submission_id}").json()
        return Job(submission_id, str(body["status"]), str(body.get("message") or ""), body.get("driver_exit_code"))

    def log_tail(self, submission_id: str) -> str:
        """Return the end of a job's log."""
        return str(self._get(f"/api/jobs/{submission_id}/logs").json().get("logs") or "")[-_LOG_TAIL:]

    def _get(self, path: str) -> httpx.Response:
        with _explained("Ray", self._url):
            return _checked(
                httpx.get(
                    f"{self._url}{path}", headers=_ray_headers(), timeout=_QUICK, trust_env=not is_near(self._url)
                ),
                "Ray",
            )

    def _submit(self, submission_id: str, module: str, *arguments: str) -> str:
        if self._recipe is None:
            msg = "no recipe to run the job with\n\nHint: start the dashboard with `prefloop dashboard RECIPE.yaml`."
            raise ServiceError(msg)
        body = {
            "entrypoint": shlex.join([sys.executable, "-m", module, self._recipe, *arguments]),
            "submission_id": submission_id,
            # Seen by everyone who may see Ray's dashboard: no secrets here.
            "runtime_env": {"env_vars": {HOME_VARIABLE: self._home.uri}},
            "metadata": {"started_by": "dashboard", "actor": self._actor},
        }
        with _explained("Ray", self._url):
            reply = httpx.post(
                f"{self._url}/api/jobs/",
                json=body,
                headers=_ray_headers(),
                timeout=httpx.Timeout(60),
                trust_env=not is_near(self._url),
            )
            if reply.is_error and "already exists" in reply.text:
                return submission_id  # the same click, sent twice
            _checked(reply, "Ray")
        return submission_id


def _ray_headers() -> dict[str, str]:
    token = ray_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextmanager
def _explained(who: str, url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException:
        raise ServiceError(
            f"{who} at `{url}` did not answer in time\n\nHint: look at the log of `prefloop serve`."
        ) from None
    except httpx.HTTPError as error:
        msg = f"{who} at `{url}` cannot be reached ({type(error).__name__})\n\nHint: start it with `prefloop serve RECIPE.yaml`."
        raise ServiceError(msg) from None
    except ValueError:
        raise ServiceError(f"{who} at `{url}` sent something that is no JSON") from None


def _checked(reply: httpx.Response, who: str) -> httpx.Response:
    if not reply.is_error:
        return reply
    try:
        said = _error_text(reply.json())
    except ValueError:
        said = reply.text.strip().splitlines()[-1] if reply.text.strip() else "nothing"
    hints = {
        401: "the key or token of this dashboard is not the one of the running service; start both with the same PREFLOOP_HOME",
        403: "the key or token of this dashboard is not the one of the running service; start both with the same PREFLOOP_HOME",
        429: "the queue is full; try again in a moment",
        503: "the service is starting or overloaded; try again in a moment",
    }
    hint = f"\n\nHint: {hints[reply.status_code]}." if reply.status_code in hints else ""
    if "No available agent" in said:
        hint = "\n\nHint: Ray's job agent is not up; another Ray on that machine may hold its port. Look at `dashboard_agent.log` of the Ray session."
    raise ServiceError(f"{who} refused with {reply.status_code}: {said[:500]}{hint}")


def _error_text(body: Any) -> str:
    if isinstance(body, dict):
        error = body.get("error", body.get("detail", body))
        if isinstance(error, dict):
            return str(error.get("message", error))
        return str(error)
    return str(body)


def _events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if isinstance(event, dict):
            yield event


def _grown(answer: Answer, event: dict[str, Any]) -> Answer:
    answer = replace(
        answer,
        response_id=event.get("id") or answer.response_id,
        model_id=event.get("model") or answer.model_id,
    )
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        answer = replace(
            answer,
            text=answer.text + (delta.get("content") or ""),
            finish_reason=choice.get("finish_reason") or answer.finish_reason,
        )
    return answer
