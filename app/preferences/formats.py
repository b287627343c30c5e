r"""Files of preference or instruction data become candidates; what cannot be read is named by line and field.

Parquet, JSONL and JSON, each also gzipped, told apart by content. Shapes, told apart row by row:

    prompt, chosen, rejected                    strings or messages; without `prompt` it is the common beginning, of
                                                strings to the last white space in it
    chosen, rejected                            HH-RLHF transcripts: "\n\nHuman: … \n\nAssistant: …"
    input, preferred_output, non_preferred_output   OpenAI, Azure, Together, Fireworks
    conversations, chosen, rejected             ShareGPT: {from, value}
    instruction, input, chosen, rejected        Alpaca
    messages | conversations | prompt, completion + label        unpaired answers (KTO)
    messages | conversations | instruction, input, output | prompt, completion   instruction data: unpaired, label true

This module does not know duplicates, splits or snapshots, and fetches nothing.
"""

import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import DataError
from app.preferences.candidates import Candidate, Rejection, answer_key, is_unstorable
from app.schemas import Message, Pair, Response, Source, ToolCall, canonical_json

_FIELDS: Final = (
    "prompt",
    "chosen",
    "rejected",
    "input",
    "preferred_output",
    "non_preferred_output",
    "conversations",
    "messages",
    "completion",
    "label",
    "instruction",
    "output",
    "system",
    "tools",
)
_WEIGHT: Final = "weight"
_SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_TURN: Final = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_BATCH: Final = 1024


@dataclass(frozen=True)
class FileRead:
    """A file that was read: its place, the sha256 of its bytes and its number of rows."""

    place: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Reading:
    """All rows of the files: each is a candidate or a rejection."""

    files: tuple[FileRead, ...]
    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]

    @property
    def rows(self) -> int:
        """Number of rows read."""
        return sum(file.rows for file in self.files)


def read_rows(paths: Sequence[Path]) -> Reading:
    """Read every row of every file.

    Raises:
        DataError: files are missing, empty, truncated or of no known kind or shape; all of them are listed.
    """
    files: list[FileRead] = []
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    faults: list[str] = []
    for path in paths:
        try:
            content = _content(path)
            rows = 0
            for row in _rows(path, content):
                rows += 1
                read = _candidate(row)
                if isinstance(read, Candidate):
                    candidates.append(read)
                else:
                    rejections.append(read)
            if not rows:
                _refuse_file("it holds no rows")
        except _UnreadableFile as fault:
            faults.append(f"  `{path}`: {fault}")
            continue
        files.append(FileRead(str(path), hashlib.sha256(content).hexdigest(), rows))
    if faults:
        msg = f"{len(faults)} of {len(paths)} file(s) cannot be read, nothing was imported:\n" + "\n".join(faults)
        raise DataError(msg)
    reading = Reading(tuple(files), tuple(candidates), tuple(rejections))
    assert len(candidates) + len(rejections) == reading.rows, "rows were lost"  # noqa: S101
    return reading


class _UnreadableFile(Exception):  # noqa: N818
    """A file cannot be read at all; the argument says why."""


class _Rejected(Exception):  # noqa: N818
    """A row cannot train: reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    raw: str
    value: Any = None
    is_utf8: bool = True
    fault: str | None = None
    """Why there is no value."""


def _refuse_file(why: str) -> None:
    raise _UnreadableFile(why)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _UnreadableFile(error.strerror or str(error)) from None
    if not content:
        _refuse_file("it is empty (0 bytes)")
    if path.suffix == ".gz" or content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except EOFError:
            _refuse_file("the gzip stream is truncated")
        except (OSError, zlib.error) as error:
            _refuse_file(f"it is no gzip file, or damaged: {error}")
        if not content:
            _refuse_file("it is empty after decompression")
    return content


def _rows(path: Path, content: bytes) -> Iterator[_Row]:
    kind = _kind(path)
    if kind == "parquet":
        return _parquet_rows(path, content)
    # The signatures of what is most often handed over by mistake.
    for magic, name in ((b"PAR1", "Parquet"), (b"PK\x03\x04", "a zip archive"), (b"\xff\xfe", "UTF-16 text")):
        if content.startswith(magic):
            _refuse_file(f"it is {name}, not {kind.upper()}")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip()[:1] == b"[":
        return _array_rows(path, content)
    if kind == "json" and not _is_object(content.strip().split(b"\n", 1)[0]):
        return _array_rows(path, content)
    return _line_rows(path, content)


def _kind(path: Path) -> str:
    suffixes = path.with_suffix("").suffixes if path.suffix == ".gz" else path.suffixes
    suffix = suffixes[-1].lower() if suffixes else ""
    kinds = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
    if suffix not in kinds:
        _refuse_file(f"unknown file type `{suffix or path.name}`; known: {', '.join(kinds)}, each also with .gz")
    return kinds[suffix]


def _parquet_rows(path: Path, content: bytes) -> Iterator[_Row]:
    try:
        file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        names = file.schema_arrow.names
        columns = [name for name in (*_FIELDS, _WEIGHT) if name in names]
        if _shape(dict.fromkeys(columns, True)) is None:
            _refuse_file(f"its columns are no preference or instruction data: {', '.join(names)}")
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            for row in _batch_rows(batch):
                number += 1
                place = f"{path} row {number}"
                if row is None:
                    yield _Row(place, "", is_utf8=False)
                else:
                    yield _Row(place, json.dumps(row, ensure_ascii=False, default=str), row)
    except (pa.ArrowException, OSError) as error:
        _refuse_file(f"it is no readable Parquet file: {str(error).splitlines()[0]}")


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def _array_rows(path: Path, content: bytes) -> Iterator[_Row]:
    is_utf8, text = _decode(content)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _UnreadableFile(f"it is truncated or no JSON: {error}") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _Row(f"{path} row {number}", json.dumps(row, ensure_ascii=False), row, is_utf8)


def _line_rows(path: Path, content: bytes) -> Iterator[_Row]:
    first_fault, read = None, 0
    # Not splitlines: JSON strings may hold U+2028 and its like.
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.strip(b" \t\r")
        if not line:
            continue
        is_utf8, text = _decode(line)
        place = f"{path}:{number}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            first_fault = first_fault or f"line {number}: {error}"
            yield _Row(place, text, is_utf8=is_utf8, fault=str(error))
            continue
        read += 1
        yield _Row(place, text, value, is_utf8)
    if first_fault and not read:
        _refuse_file(f"no line of it is JSON ({first_fault})")


def _decode(content: bytes) -> tuple[bool, str]:
    try:
        return True, content.decode("utf-8")
    except UnicodeDecodeError:
        return False, content.decode("utf-8", "surrogateescape")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _candidate(row: _Row) -> Candidate | Rejection:
    try:
        if row.value is None and not row.is_utf8:
            raise _Rejected("not_utf8", "the row is not UTF-8")
        if row.fault is not None:
            raise _Rejected("unreadable_line", f"no JSON: {row.fault}")
        if not isinstance(row.value, dict):
            raise _Rejected("wrong_type", f"a row must be a mapping of fields, found {type(row.value).__name__}")
        fields = {name: row.value[name] for name in _FIELDS if name in row.value}
        if not fields:
            raise _Rejected("unknown_shape", f"no known shape has the fields {', '.join(row.value) or '(none)'}")
        for name, value in fields.items():
            _check_text(name, value, is_utf8=row.is_utf8)
        return Candidate(replace(_pair(fields), weight=_weight(row.value)), row.place)
    except _Rejected as fault:
        return Rejection(row.place, fault.reason, fault.detail, row.raw)


def _check_text(name: str, value: Any, *, is_utf8: bool) -> None:
    if isinstance(value, str):
        # Bytes that are not UTF-8 were decoded to the lone surrogates U+DC80 to U+DCFF.
        if not is_utf8 and any("\udc80" <= c <= "\udcff" for c in value):
            raise _Rejected("not_utf8", f"`{name}` is not UTF-8")
        if is_unstorable(value):
            raise _Rejected("nul_or_surrogate", f"`{name}` holds a NUL character or a lone surrogate")
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_text(name, key, is_utf8=is_utf8)
            _check_text(name, part, is_utf8=is_utf8)
    elif isinstance(value, list):
        for part in value:
            _check_text(name, part, is_utf8=is_utf8)


def _weight(row: dict[str, Any]) -> float:
    """Return what a judgement counts for: 1 where the row says nothing."""
    weight = row.get(_WEIGHT)
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise _Rejected("wrong_type", f"`weight` must be a number, found {weight!r:.40}")
    # What the schema stores it as.
    if not 2.0**-126 <= weight < 2.0**128:
        raise _Rejected("wrong_weight", f"`weight` must be finite and greater than 0, found {weight!r:.40}")
    return float(weight)


def _shape(row: dict[str, Any]) -> str | None:
    names = row.keys()
    if names & {"preferred_output", "non_preferred_output"}:
        return "preferred"
    if names & {"chosen", "rejected"}:
        return "pair"
    if names & {"messages", "conversations"} or {"instruction", "output"} <= names or {"prompt", "completion"} <= names:
        return "answer"
    return None


def _pair(row: dict[str, Any]) -> Pair:
    # A column of nulls says nothing where others say something: Parquet gives every row every column.
    shape = _shape({name: value for name, value in row.items() if value is not None}) or _shape(row)
    if shape == "preferred":
        given = row.get("input")
        if not isinstance(given, dict):
            raise _Rejected("null" if given is None else "wrong_type", "`input` must be a mapping with `messages`")
        return _preference(
            _messages(given.get("messages"), "input.messages"),
            _answers(row, "preferred_output"),
            _answers(row, "non_preferred_output"),
            _tools(given.get("tools"), "input.tools"),
        )
    tools = _tools(row.get("tools"), "tools")
    if shape == "pair":
        row = _with_implicit_prompt(row)
        prompt = _context(row)
        return _preference(prompt, _answers(row, "chosen"), _answers(row, "rejected"), tools)
    if shape == "answer":
        return _labelled(row, tools)
    raise _Rejected("unknown_shape", f"no known shape has the fields {', '.join(sorted(row)) or 'of this row'}")


def _with_implicit_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Take the common beginning of two strings for their prompt, where the row gives none and they are no transcripts."""
    sides = [row.get("chosen"), row.get("rejected")]
    given = any(row.get(name) is not None for name in ("prompt", "messages", "conversations", "instruction"))
    if given or not all(isinstance(side, str) and _transcript(side) is None for side in sides):
        return row
    chosen, rejected = map(str, sides)
    shared = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    end = max((i + 1 for i, c in enumerate(chosen[:shared]) if c.isspace()), default=0)
    if not chosen[:end].strip():
        return row
    return {**row, "prompt": chosen[:end].rstrip(), "chosen": chosen[end:], "rejected": rejected[end:]}


def _labelled(row: dict[str, Any], tools: str | None) -> Pair:
    label = row.get("label")
    if label is None and "label" in row:
        raise _Rejected("null", "`label` is null")
    if label is not None and not isinstance(label, bool):
        raise _Rejected("wrong_type", f"`label` must be true or false, found {label!r:.40}")
    name = "completion" if row.get("completion") is not None or "completion" in row else "output"
    if row.get("messages") is None and row.get("conversations") is None:
        conversation = [*(_context(row) or []), *_answers(row, name)]
    else:
        conversation = _context(row) or []
        name = "messages" if row.get("messages") is not None else "conversations"
    if not conversation or conversation[-1].role != "assistant":
        raise _Rejected("wrong_role_order", f"`{name}` must end with an answer of the assistant")
    *prompt, answer = conversation
    _check_prompt(prompt)
    response = _response(answer, name)
    wanted = label is not False
    return Pair(
        prompt=tuple(prompt),
        chosen=response if wanted else None,
        rejected=None if wanted else response,
        source=Source.IMPORT,
        split="",
        cluster="",
        label=wanted,
        tools=tools,
    )


def _preference(given: list[Message] | None, chosen: list[Message], rejected: list[Message], tools: str | None) -> Pair:
    prompt = given or []
    for side in (chosen, rejected):
        if not side:
            raise _Rejected("empty", "`chosen` or `rejected` holds no message")
    shared = _common(chosen, rejected)
    if len(prompt) == 1 and prompt[0] in shared and prompt[0] == shared[-1]:
        prompt = []  # the answers are whole conversations, the prompt is their last question once more
    elif prompt:
        chosen, rejected = (s[len(prompt) :] if s[: len(prompt)] == prompt else s for s in (chosen, rejected))
        if not chosen or not rejected:
            raise _Rejected("empty", "`chosen` or `rejected` holds nothing but the prompt")
        shared = _common(chosen, rejected)
    prompt = [*prompt, *shared]
    ends = chosen[len(shared) :], rejected[len(shared) :]
    if not prompt:
        raise _Rejected("no_prompt", "there is no `prompt`, and the answers share no beginning")
    if any(len(end) != 1 for end in ends):
        raise _Rejected("diverges_early", "`chosen` and `rejected` differ before their last answer")
    _check_prompt(prompt)
    better, worse = _response(ends[0][0], "chosen"), _response(ends[1][0], "rejected")
    if answer_key(better) == answer_key(worse):
        raise _Rejected("identical", "`chosen` and `rejected` are the same, white space aside")
    return Pair(
        prompt=tuple(prompt),
        chosen=better,
        rejected=worse,
        source=Source.IMPORT,
        split="",
        cluster="",
        tools=tools,
    )


def _common(left: list[Message], right: list[Message]) -> list[Message]:
    """Return the messages that both conversations begin with; their last messages are answers and do not count."""
    shared = []
    for one, other in zip(left[:-1], right[:-1], strict=False):
        if one != other:
            break
        shared.append(one)
    return shared


def _context(row: dict[str, Any]) -> list[Message] | None:
    """Return the conversation that the row gives apart from its answers, or None."""
    messages: list[Message] | None = None
    for name in ("messages", "conversations", "prompt"):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, str):
            if not value.strip():
                raise _Rejected("no_prompt", f"`{name}` is empty")
            messages = _transcript(value) or [Message("user", value)]
            if messages[-1] == Message("assistant", ""):
                messages.pop()  # "\n\nAssistant:" only asks for the answer
        else:
            messages = _messages(value, name)
        break
    else:
        instruction = row.get("instruction")
        if instruction is not None:
            more = row.get("input")
            for name, value in (("instruction", instruction), ("input", more)):
                if value is not None and not isinstance(value, str):
                    raise _Rejected("wrong_type", f"`{name}` must be text, found {type(value).__name__}")
            text = "\n".join(part for part in (instruction, more) if part and part.strip())
            if not text:
                raise _Rejected("no_prompt", "`instruction` is empty")
            messages = [Message("user", text)]
        elif "prompt" in row or "instruction" in row:
            raise _Rejected("no_prompt", "the prompt is null")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise _Rejected("wrong_type", f"`system` must be text, found {type(system).__name__}")
    if system and messages and messages[0].role not in ("system", "developer"):
        messages = [Message("system", system), *messages]
    return messages


def _answers(row: dict[str, Any], name: str) -> list[Message]:
    """Return one side of a pair: its answer, or the conversation that ends with it."""
    value = row.get(name)
    if value is None:
        raise _Rejected("null", f"`{name}` is {'null' if name in row else 'missing'}")
    if isinstance(value, str):
        turns = _transcript(value)
        if turns is not None:
            return turns
        prompt = row.get("prompt")
        if isinstance(prompt, str) and _transcript(prompt) is not None:
            value = value.strip()
        return [Message("assistant", value)]
    if isinstance(value, dict):
        value = [value]
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if value is None:
        raise _Rejected("null", f"`{name}` is null")
    if not isinstance(value, list):
        raise _Rejected("wrong_type", f"`{name}` must be text or messages, found {type(value).__name__}")
    if not value:
        raise _Rejected("no_prompt" if name != "chosen" and name != "rejected" else "empty", f"`{name}` has no message")
    found = []
    for number, raw in enumerate(value):
        try:
            if isinstance(raw, dict) and raw.get("role") is None and "from" in raw:
                found.append(_sharegpt(raw))
            else:
                found.append(Message.from_openai(raw))
        except DataError as error:
            raise _Rejected("wrong_type", f"`{name}[{number}]`: {error}") from None
    return found


def _sharegpt(raw: dict[str, Any]) -> Message:
    speaker, value = raw["from"], raw.get("value")
    if speaker != "function_call":
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise _Rejected("wrong_role_order", f"`from` is {speaker!r:.40}; known: {', '.join(_SHAREGPT_ROLES)}")
        return Message.from_openai({"role": role, "content": value})
    try:
        call = json.loads(str(value))
        name, arguments = call["name"], call["arguments"]
    except (ValueError, TypeError, KeyError):
        msg = f"a function_call must be JSON with `name` and `arguments`, found {value!r:.80}"
        raise DataError(msg) from None
    text = arguments if isinstance(arguments, str) else canonical_json(arguments)
    return Message("assistant", None, tool_calls=(ToolCall(None, str(name), text),))


def _transcript(text: str) -> list[Message] | None:
    r"""Read "\n\nHuman: …\n\nAssistant: …", or return None where the text is no transcript."""
    first, *turns = _TURN.split(text.lstrip())
    if first or "Human" not in turns[::2]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _tools(value: Any, name: str) -> str | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _Rejected("wrong_type", f"`{name}` is no JSON: {error}") from None
    if not value:
        return None
    if not isinstance(value, list):
        raise _Rejected("wrong_type", f"`{name}` must be a list, found {type(value).__name__}")
    return canonical_json(value)


def _check_prompt(prompt: list[Message]) -> None:
    """Refuse a prompt after which the assistant would not answer."""
    previous = "start"
    for message in prompt:
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        followers = {
            "start": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user",),
            "assistant with tool calls": ("tool",),
            "tool": ("tool", "assistant"),
        }[previous]
        if role not in followers:
            raise _Rejected("wrong_role_order", f"`{message.role}` follows {previous} in the prompt")
        if message.content is None and not message.tool_calls:
            raise _Rejected("null", f"a {message.role} message of the prompt has no content")
        previous = "assistant with tool calls" if message.tool_calls else role
    if previous in ("start", "system"):
        raise _Rejected("no_prompt", "the prompt holds no question")
    if previous not in ("user", "tool"):
        raise _Rejected("wrong_role_order", f"the prompt ends with {previous}")
    last = prompt[-1].content or ""
    if not last.strip() and previous == "user":
        raise _Rejected("no_prompt", "the last question of the prompt is empty")


def _response(message: Message, name: str) -> Response:
    if message.role != "assistant":
        raise _Rejected("wrong_role_order", f"the answer of `{name}` comes from `{message.role}`, not the assistant")
    if not message.tool_calls:
        if message.content is None:
            raise _Rejected("null", f"`{name}` is null")
        if not message.content:
            raise _Rejected("empty", f"`{name}` is empty")
        if not message.content.strip():
            raise _Rejected("whitespace_only", f"`{name}` holds white space only")
    return Response(message.content or "", tool_calls=message.tool_calls)
