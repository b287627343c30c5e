"""The data contract: the shape of every row that touches Parquet, versioned, and the typed rows themselves.

Writers cast to these schemas and readers check them; a reader refuses a newer version by name. Nothing here knows
where files live or how rows are made. Ids are content hashes, so that every job may be run again.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self

import pyarrow as pa

from app.errors import DataError

SCHEMA_VERSION = 1


class FinishReason(StrEnum):
    """Why a response ended; a response cut by `LENGTH` never trains an end token."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    UNKNOWN = "unknown"


class Source(StrEnum):
    """Where a pair comes from, in the order of trust."""

    EDIT = "edit"
    COMPARISON = "comparison"
    THUMBS = "thumbs"
    JUDGE = "judge"
    IMPORT = "import"


class Split(StrEnum):
    """Which side of the split a row is on; decided by the prompt's cluster."""

    TRAIN = "train"
    HELD_OUT = "held_out"


_TOOL_CALL = pa.struct([("id", pa.string()), ("type", pa.string()), ("name", pa.string()), ("arguments", pa.string())])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("name", pa.string()),
        ("tool_calls", pa.list_(_TOOL_CALL)),
        ("tool_call_id", pa.string()),
    ]
)
_RESPONSE = pa.struct(
    [
        ("content", pa.string()),
        ("tool_calls", pa.list_(_TOOL_CALL)),
        ("finish_reason", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("template_digest", pa.string()),
        ("model_id", pa.string()),
        ("response_id", pa.string()),
    ]
)


def _versioned(kind: str, fields: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata={"prefloop.kind": kind, "prefloop.schema_version": str(SCHEMA_VERSION)})


PAIR_SCHEMA = _versioned(
    "pairs",
    [
        ("pair_id", pa.string()),
        ("kind", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("tools", pa.string()),
        ("chosen", _RESPONSE),
        ("rejected", _RESPONSE),
        ("label", pa.bool_()),
        ("source", pa.string()),
        ("weight", pa.float32()),
        ("split", pa.string()),
        ("cluster", pa.string()),
        ("response_ids", pa.list_(pa.string())),
        ("event_ids", pa.list_(pa.string())),
        ("subject", pa.string()),
        ("simulated", pa.bool_()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ],
)

TRAINING_SCHEMA = _versioned(
    "training",
    [
        ("row_index", pa.int64()),
        ("group_id", pa.string()),
        ("cluster", pa.string()),
        ("split", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
        (
            "pairs",
            pa.list_(
                pa.struct(
                    [
                        ("chosen", pa.int32()),
                        ("rejected", pa.int32()),
                        ("weight", pa.float32()),
                        ("pair_id", pa.string()),
                        ("source", pa.string()),
                    ]
                )
            ),
        ),
        (
            "labels",
            pa.list_(
                pa.struct(
                    [
                        ("response", pa.int32()),
                        ("label", pa.bool_()),
                        ("weight", pa.float32()),
                        ("pair_id", pa.string()),
                        ("source", pa.string()),
                    ]
                )
            ),
        ),
        ("reference_logps", pa.list_(pa.float64())),
    ],
)

JUDGEMENT_SCHEMA = _versioned(
    "judgements",
    [
        ("suite", pa.string()),
        ("player", pa.string()),
        ("baseline", pa.string()),
        ("category", pa.string()),
        ("outcome", pa.int8()),
        ("request", pa.string()),
        ("answer", pa.string()),
        ("other", pa.string()),
        ("words", pa.list_(pa.string())),
    ],
)

QUARANTINE_SCHEMA = _versioned(
    "quarantine", [("place", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("raw", pa.string())]
)


def canonical_json(value: Any) -> str:
    """Encode plain values so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def content_hash(value: Any) -> str:
    """Return the sha256 of a plain value, 32 hex digits."""
    return _digest([canonical_json(value)])


def content_hash_of(first: Sequence[Any], rows: Iterable[Any]) -> str:
    """Return `content_hash([*first, [*rows]])` with one row after the other in memory."""
    head = "".join(f"{canonical_json(value)}," for value in first)
    return _digest(
        itertools.chain(
            [f"[{head}["], (f"{',' if i else ''}{canonical_json(row)}" for i, row in enumerate(rows)), ["]]"]
        )
    )


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant; `arguments` is JSON text as it was sent."""

    id: str | None
    name: str
    arguments: str
    type: str = "function"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, as it was sent."""

    role: str
    content: str | None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @classmethod
    def from_openai(cls, raw: dict[str, Any]) -> Self:
        """Read a message of the OpenAI chat format; raises DataError on a wrong shape."""
        if not isinstance(raw, dict):
            msg = f"a message must be a mapping, found {type(raw).__name__}"
            raise DataError(msg)
        role, content = raw.get("role"), raw.get("content")
        if not isinstance(role, str) or not role:
            msg = f"a message needs a `role`, found {role!r}"
            raise DataError(msg)
        if content is not None and not isinstance(content, str):
            msg = f"`content` of a {role} message must be text, found {type(content).__name__}"
            raise DataError(msg)
        for key in ("name", "tool_call_id"):
            if not isinstance(raw.get(key), str | None):
                msg = f"`{key}` of a {role} message must be text, found {type(raw[key]).__name__}"
                raise DataError(msg)
        calls = raw.get("tool_calls") or ()
        if not isinstance(calls, list | tuple):
            msg = f"`tool_calls` of a {role} message must be a list, found {type(calls).__name__}"
            raise DataError(msg)
        return cls(role, content, raw.get("name"), tuple(map(_tool_call, calls)), raw.get("tool_call_id"))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Read a message from a Parquet row."""
        calls = tuple(ToolCall(**call) for call in row["tool_calls"] or ())
        return cls(row["role"], row["content"], row["name"], calls, row["tool_call_id"])

    def to_openai(self) -> dict[str, Any]:
        """Return the OpenAI chat format, without empty fields: what a chat template expects."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            out["name"] = self.name
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        return out


@dataclass(frozen=True, slots=True)
class Response:
    """One answer. `token_ids` are those sampled (with the end token, if it was sampled), or None for foreign text."""

    content: str
    finish_reason: str = FinishReason.UNKNOWN.value
    token_ids: tuple[int, ...] | None = None
    template_digest: str | None = None
    model_id: str | None = None
    response_id: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Read a response from a Parquet row."""
        token_ids = row["token_ids"]
        return cls(
            content=row["content"],
            finish_reason=row["finish_reason"],
            token_ids=None if token_ids is None else tuple(token_ids),
            template_digest=row["template_digest"],
            model_id=row["model_id"],
            response_id=row["response_id"],
            tool_calls=tuple(ToolCall(**call) for call in row["tool_calls"] or ()),
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference (`rejected` < `chosen`), or one unpaired answer with a `label` (True: only `chosen` is set)."""

    prompt: tuple[Message, ...]
    chosen: Response | None
    rejected: Response | None
    source: str
    split: str
    cluster: str
    label: bool | None = None
    tools: str | None = None
    weight: float = 1.0
    response_ids: tuple[str, ...] = ()
    event_ids: tuple[str, ...] = ()
    subject: str | None = None
    simulated: bool = False
    """Whether a judgement of a simulated audience is behind it."""
    created_at: datetime = field(default_factory=lambda: datetime(1970, 1, 1, tzinfo=UTC))

    @property
    def kind(self) -> str:
        """`pair` or `unpaired`."""
        return "pair" if self.label is None else "unpaired"

    @property
    def pair_id(self) -> str:
        """Hash of what trains: prompt, tools, answers and label, not of where they came from."""
        return content_hash(
            [
                [m.to_openai() for m in self.prompt],
                self.tools,
                _trained(self.chosen),
                _trained(self.rejected),
                self.label,
            ]
        )

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Read a pair from a Parquet row (`pair_id` and `kind` are derived)."""
        return cls(
            prompt=tuple(Message.from_row(m) for m in row["prompt"]),
            chosen=None if row["chosen"] is None else Response.from_row(row["chosen"]),
            rejected=None if row["rejected"] is None else Response.from_row(row["rejected"]),
            source=row["source"],
            split=row["split"],
            cluster=row["cluster"],
            label=row["label"],
            tools=row["tools"],
            weight=row["weight"],
            response_ids=tuple(row["response_ids"] or ()),
            event_ids=tuple(row["event_ids"] or ()),
            subject=row["subject"],
            simulated=row["simulated"],
            created_at=row["created_at"],
        )

    def to_row(self) -> dict[str, Any]:
        """Return the Parquet row."""
        return {"pair_id": self.pair_id, "kind": self.kind, **asdict(self)}


def _tool_call(raw: Any) -> ToolCall:
    function = raw.get("function", raw) if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        msg = f"a tool call needs a function with a `name`, found {raw!r:.80}"
        raise DataError(msg)
    identifier, kind, arguments = raw.get("id"), raw.get("type") or "function", function.get("arguments", "{}")
    if not isinstance(identifier, str | None) or not isinstance(kind, str):
        msg = f"`id` and `type` of a tool call must be text, found {identifier!r:.40} and {kind!r:.40}"
        raise DataError(msg)
    return ToolCall(
        identifier, function["name"], arguments if isinstance(arguments, str) else canonical_json(arguments), kind
    )


def _trained(response: Response | None) -> list[Any] | None:
    if response is None:
        return None
    return [response.content, [asdict(c) for c in response.tool_calls], response.finish_reason, response.token_ids]


def prompt_key(prompt: tuple[Message, ...], tools: str | None) -> str:
    """Hash of the whole context of an answer: the same key means the same prompt."""
    return content_hash([[m.to_openai() for m in prompt], tools])


def check_schema(found: pa.Schema, expected: pa.Schema, *, place: str) -> None:
    """Refuse a file of another kind, a newer version or other columns.

    Raises:
        DataError: names the place, what was found and what was expected.
    """
    metadata = {k.decode(): v.decode() for k, v in (found.metadata or {}).items()}
    wanted = expected.metadata[b"prefloop.kind"].decode()
    kind, version = metadata.get("prefloop.kind"), metadata.get("prefloop.schema_version")
    if kind != wanted or version is None:
        msg = f"`{place}` is not a prefloop {wanted} file (its kind: {kind!r})\n\nHint: bring foreign files in with `prefloop import`."
        raise DataError(msg)
    if int(version) > SCHEMA_VERSION:
        msg = f"`{place}` has schema version {version}, this prefloop reads up to {SCHEMA_VERSION}\n\nHint: upgrade prefloop."
        raise DataError(msg)
    missing = [f.name for f in expected if f.name not in found.names]
    changed = [f.name for f in expected if f.name in found.names and found.field(f.name).type != f.type]
    if missing or changed:
        msg = f"`{place}`: columns missing: {missing or 'none'}; columns of another type: {changed or 'none'}"
        raise DataError(msg)
