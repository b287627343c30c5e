"""Simulated traffic across the switch to a new champion: short requests and open streams, all of them counted.

Every request goes through the gateway like a user's and is labelled as simulated. A stream counts as cut when it ends
without its final event. This module does not know how a champion is shipped.
"""

import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from app.config import CollectSection
from app.errors import ServiceError
from app.evaluation.prompts import load_prompts
from app.services import is_near

_CLIENTS = 12
STREAMS = 6
_SHORT_TOKENS = 12
_WAIT_S = 300.0


@dataclass
class _Record:
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    models: dict[str, int] = field(default_factory=dict)
    streams: list[tuple[float, float, str]] = field(default_factory=list)
    """Beginning, end and model of each."""


class Traffic:
    """A context in which clients talk to the gateway without a pause."""

    def __init__(self, gateway_url: str, api_key: str, section: CollectSection) -> None:
        self._url = f"{gateway_url}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._needed = section.switch_requests
        self._max_tokens = section.max_tokens
        self._prompts = itertools.cycle(prompt.text for prompt in load_prompts(section.prompts).prompts)
        self._record = _Record()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._switched: tuple[float, str] | None = None
        self._threads = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(_CLIENTS)]
        self._threads += [threading.Thread(target=self._stream_on, daemon=True) for _ in range(STREAMS)]

    def __enter__(self) -> Self:
        """Start the clients."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let every open request end, then stop."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=_WAIT_S)

    def wait_for_answers(self, *, from_model: str | None = None) -> None:
        """Wait for half of the requests, or for all of them with as many as that from a new model.

        Raises:
            ServiceError: they do not come within some minutes.
        """
        half = max(1, self._needed // 2)
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            with self._lock:
                seen = self._record.models.get(from_model, 0) if from_model else self._record.requests
                enough = seen >= half and (from_model is None or self._record.requests >= self._needed)
            if enough:
                return
            time.sleep(0.1)
        with self._lock:
            msg = f"after {_WAIT_S:.0f} s only {self._record.requests} simulated requests were answered (by {self._record.models}; failures: {self._record.failures[:3]})"
        raise ServiceError(msg)

    def mark_switch(self, *, to: str) -> None:
        """Note that the new champion serves from now on: the old one's streams that are open now cross the switch."""
        self._switched = (time.monotonic(), to)

    def report(self) -> dict[str, Any]:
        """Return what was counted."""
        record = self._record
        at, new = self._switched or (0.0, "")
        return {
            "requests_during_switch": record.requests,
            "failed_requests": len(record.failures),
            "failures": record.failures[:5],
            "models_seen": record.models,
            "streams": len(record.streams),
            "streams_across_switch": sum(began < at < ended and model != new for began, ended, model in record.streams),
        }

    def _ask_on(self) -> None:
        with httpx.Client(headers=self._headers, timeout=_WAIT_S, trust_env=not is_near(self._url)) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._url, json=self._body(_SHORT_TOKENS)).raise_for_status().json()
                except (httpx.HTTPError, ValueError) as error:
                    self._count(failure=repr(error))
                else:
                    self._count(model=str(answer["model"]))

    def _stream_on(self) -> None:
        with httpx.Client(headers=self._headers, timeout=_WAIT_S, trust_env=not is_near(self._url)) as client:
            while not self._stop.is_set():
                began = time.monotonic()
                model, finished, told = "", False, ""
                try:
                    body = {**self._body(self._max_tokens), "stream": True}
                    with client.stream("POST", self._url, json=body) as response:
                        response.raise_for_status()
                        for line in response.iter_lines():
                            finished = finished or line == "data: [DONE]"
                            if line.startswith("data: {"):
                                event = json.loads(line.removeprefix("data: "))
                                told = str(event.get("error", told))
                                model = str(event.get("model", model))
                except (httpx.HTTPError, ValueError) as error:
                    self._count(failure=repr(error))
                    continue
                if told or not finished:
                    self._count(failure=told or "a stream was cut")
                    continue
                with self._lock:
                    self._record.streams.append((began, time.monotonic(), model))
                self._count(model=model)

    def _body(self, max_tokens: int) -> dict[str, Any]:
        with self._lock:
            prompt = next(self._prompts)
        return {
            "model": "champion",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "user": "simulated-traffic",
            "metadata": {"origin": "simulated"},
        }

    def _count(self, *, model: str | None = None, failure: str | None = None) -> None:
        with self._lock:
            self._record.requests += 1
            if failure is not None:
                self._record.failures.append(failure)
            if model is not None:
                self._record.models[model] = self._record.models.get(model, 0) + 1
