"""What the gateway and the replicas say to each other: plain frozen values, cheap to send between processes.

Knows neither HTTP nor models, and imports neither.
"""

from dataclasses import dataclass

from app.schemas import Message


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation to answer. `model_id` is None where any version of the model may answer."""

    messages: tuple[Message, ...]
    tools: str | None
    model_id: str | None
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    deltas: bool
    """Send text as it grows (`Delta`), not only the whole answer."""


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of an answer: which version of the model gives it."""

    model_id: str
    revision: int


@dataclass(frozen=True, slots=True)
class Delta:
    """More text. The last piece is never sent this way: it comes with the `Answer`."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The last event: the whole answer."""

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """Text of each token on its own."""
    logps: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int
    prompt_digest: str
    template_digest: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Instead of an answer: an HTTP status, a machine-readable code and a sentence without user data."""

    status: int
    code: str
    message: str


Event = Started | Delta | Answer | Refusal


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What one replica serves and what it was told to serve. `error` says why the two differ for good."""

    replica: str
    model_id: str | None
    revision: int | None
    target_model_id: str | None
    target_revision: int | None
    error: str | None


class Busy(Exception):  # noqa: N818
    """The queue is full."""


class Unavailable(Exception):  # noqa: N818
    """No replica can answer."""
