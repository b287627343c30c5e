"""What clients may send: bodies of chat completions, feedback and comparisons, in OpenAI's shape.

A field that is not understood is refused, because an option without effect would mislead; so is text that no file or
database could hold. Knows nothing of HTTP or of who answers.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.schemas import Message

MAX_BODY_BYTES = 256 * 1024
CHAMPION = "champion"
"""Model name by which a client asks for whatever is shipped."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _clean(text: str) -> str:
    if "\x00" in text:
        msg = "text must not hold NUL characters"
        raise ValueError(msg)
    if _SURROGATE.search(text):
        msg = "text must be valid Unicode (it holds half of a surrogate pair)"
        raise ValueError(msg)
    return text


def _clean_tree(value: Any) -> Any:
    if isinstance(value, str):
        _clean(value)
    elif isinstance(value, float) and not math.isfinite(value):
        msg = "numbers must be finite"
        raise ValueError(msg)
    elif isinstance(value, dict):
        for key, item in value.items():
            _clean(key)
            _clean_tree(item)
    elif isinstance(value, list):
        for item in value:
            _clean_tree(item)
    return value


def _must_be_neutral(*allowed: Any) -> BeforeValidator:
    """Accept an OpenAI field that this service does not implement, as long as it asks for nothing."""

    def check(value: Any) -> None:
        if value is not None and value not in allowed:
            msg = "this field is not supported; leave it out"
            raise ValueError(msg)

    return BeforeValidator(check)


Text = Annotated[str, AfterValidator(_clean)]
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_clean)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_clean_tree)]
Unset = Annotated[None, _must_be_neutral()]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TextPart(_Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class FunctionCall(_Body):
    """Name and JSON arguments of a call."""

    name: Name
    arguments: Text


class ToolCallIn(_Body):
    """A tool call of an earlier answer."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: Name | None = None
    refusal: Unset = None
    audio: Unset = None
    function_call: Unset = None
    annotations: Annotated[None, _must_be_neutral([])] = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            msg = f"a {self.role} message needs `content`"
            raise ValueError(msg)
        return self

    def message(self) -> Message:
        """Return the message as it is stored and rendered; the parts of a text are joined."""
        raw = self.model_dump(include={"role", "name", "tool_calls", "tool_call_id"}, exclude_none=True)
        parts = self.content
        raw["content"] = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        return Message.from_openai(raw)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatMetadata(_Body):
    """Where an answer belongs (OpenAI's free `metadata`, with the keys that mean something here)."""

    conversation_id: Name | None = None
    turn: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    origin: Literal["served", "simulated"] = "served"


class ChatRequest(_Body):
    """Body of `/v1/chat/completions`; what OpenAI knows and this service does not must be left out or neutral."""

    model: Name = CHAMPION
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    tools: Annotated[list[JsonObject], Field(max_length=128)] | None = None
    tool_choice: Literal["auto"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Name | None = None
    metadata: ChatMetadata | None = None
    logprobs: bool | None = None
    n: Annotated[None, _must_be_neutral(1)] = None
    top_logprobs: Annotated[None, _must_be_neutral(0)] = None
    stop: Annotated[None, _must_be_neutral([])] = None
    presence_penalty: Annotated[None, _must_be_neutral(0)] = None
    frequency_penalty: Annotated[None, _must_be_neutral(0)] = None
    logit_bias: Annotated[None, _must_be_neutral({})] = None
    response_format: Annotated[None, _must_be_neutral({"type": "text"})] = None
    parallel_tool_calls: Annotated[None, _must_be_neutral(True, False)] = None
    store: Annotated[None, _must_be_neutral(False)] = None
    service_tier: Annotated[None, _must_be_neutral("auto", "default")] = None
    modalities: Annotated[None, _must_be_neutral(["text"])] = None
    functions: Unset = None
    function_call: Unset = None
    audio: Unset = None
    prediction: Unset = None
    reasoning_effort: Unset = None
    verbosity: Unset = None
    web_search_options: Unset = None
    safety_identifier: Unset = None
    prompt_cache_key: Unset = None
    prompt_cache_retention: Unset = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            msg = "give `max_tokens` or `max_completion_tokens`, not both"
            raise ValueError(msg)
        if self.stream_options is not None and not self.stream:
            msg = "`stream_options` needs `stream: true`"
            raise ValueError(msg)
        if self.logprobs and self.stream:
            msg = "`logprobs` is not supported in a stream"
            raise ValueError(msg)
        return self


class _Judgement(_Body):
    """What every judgement says beside its verdict."""

    tags: Annotated[list[Name], Field(max_length=32)] = []
    comment: Text | None = None
    user: Name | None = None
    origin: Literal["user", "simulated"] = "user"
    event_id: Name | None = None


class FeedbackRequest(_Judgement):
    """Body of `/v1/feedback`: a thumb (up, down), an edit (the better text) or a rating (a number)."""

    response_id: Name
    kind: Literal["thumb", "edit", "rating"]
    value: Annotated[Text, Field(max_length=MAX_BODY_BYTES)] | Finite

    @model_validator(mode="after")
    def _fits(self) -> "FeedbackRequest":
        if self.kind == "rating":
            try:
                finite = math.isfinite(float(self.value))
            except ValueError:
                finite = False
            if not finite:
                msg = "a rating is a finite number"
                raise ValueError(msg)
        elif not isinstance(self.value, str):
            msg = f"the value of a {self.kind} is text"
            raise ValueError(msg)
        return self


class ComparisonRequest(_Judgement):
    """Body of `/v1/comparisons`; the verdict speaks of A = `response_a` and B = `response_b`."""

    response_a: Name
    response_b: Name
    verdict: Literal["A>>B", "A>B", "A=B", "both_bad", "B>A", "B>>A"]
    shown_order: Annotated[list[Name], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ComparisonRequest":
        answers = {self.response_a, self.response_b}
        if len(answers) != 2:
            msg = "`response_a` and `response_b` are the same answer"
            raise ValueError(msg)
        if self.shown_order is not None and set(self.shown_order) != answers:
            msg = "`shown_order` must name both answers, from left to right"
            raise ValueError(msg)
        return self
