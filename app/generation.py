"""Answers of a batch of requests, decoded together; a row that has ended leaves the batch, and others may join it.

transformers' own `generate` computes ended rows until the last one ends, which is half of the work when lengths differ
(and its continuous batching is slower still on a CPU), so the loop over tokens is here. Each row has its own
temperature, nucleus, token limit, seed and end, and its tokens are given out as they are sampled. A row draws from its
own generator, so its randomness does not depend on its company (its logits may, in the last bits: a batch is not
computed in the order of a single row). This module knows nothing of requests, text protocols or who waits for an
answer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from app.errors import ModelError
from app.schemas import FinishReason

_COMPACTION = 0.85
"""Ended rows are dropped once at most this share of the batch goes on."""
_COLDEST = 1e-5
"""Lower temperatures are greedy; in fp32 they would divide by nothing."""
_JOINING_SHARE = 8
"""Nothing joins before one in so many places is free: joining copies the cache too."""
_ROOM = 64
"""Tokens that a cache has room for beyond those it holds."""
_TRIES = 4
"""Draws from the whole vocabulary before the nucleus of a row is looked for by sorting."""


class Generator(Protocol):
    """What a loaded model must offer to answer."""

    @property
    def model(self) -> PreTrainedModel:
        """A causal language model in evaluation mode."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""


@dataclass(frozen=True)
class GenerationRequest:
    """One row of a batch. `temperature` 0 is greedy; without a seed a row cannot be repeated."""

    prompt_ids: tuple[int, ...]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: the answer without special tokens.
        token_ids: as sampled, with the end token if it was sampled.
        finish_reason: `stop`, `length`, or `unknown` for a row that was told to stop.
        logps: log-probability of each token under the model at temperature 1, whatever it was sampled with.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logps: tuple[float, ...]

    @property
    def logp(self) -> float:
        """Log-probability of the whole answer under the model at temperature 1."""
        return sum(self.logps)


def generate(
    loaded: Generator,
    requests: Sequence[GenerationRequest],
    *,
    on_tokens: Callable[[int, int], None] | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
    should_stop: Callable[[int], bool] | None = None,
    more: Callable[[int], Sequence[GenerationRequest]] | None = None,
    places: int | None = None,
) -> list[Completion]:
    """Answer all requests, and those that join, and return the completions in their order.

    Args:
        loaded: model, tokenizer and end tokens.
        requests: the rows.
        on_tokens: called with row and token id as soon as a token is sampled, in the calling thread.
        on_completion: called with row and completion as soon as a row ends, in the calling thread.
        should_stop: asked about each unfinished row after each of its tokens; True ends the row.
        more: asked, while one in eight places is free, for at most so many requests as are; what it returns joins, its
            rows are numbered on and its completions follow the others.
        places: rows that are decoded together at most; the others join as places become free. Default: as many as
            requests. A batch of a model with layers that keep less than all tokens (windows, convolutions) cannot be
            joined: there `more` is asked once, at the beginning, and the next rows begin when all before have ended.

    Raises:
        ModelError: a prompt is empty, or prompt and answer do not fit the model's context.
    """
    if not requests:
        return []
    window = context_window(loaded.model)
    rows = [_row(loaded, request, window) for request in requests]
    completions: dict[int, Completion] = {}
    with _contiguous_head(loaded.model):
        for i in _decode(loaded, rows, on_tokens, should_stop, more, places or len(requests)):
            completions[i] = rows[i].completion(loaded)
            if on_completion is not None:
                on_completion(i, completions[i])
    return [completions[i] for i in range(len(rows))]


def _decode(
    loaded: Generator,
    rows: list["_Row"],
    on_tokens: Callable[[int, int], None] | None,
    should_stop: Callable[[int], bool] | None,
    more: Callable[[int], Sequence[GenerationRequest]] | None,
    places: int,
) -> Iterator[int]:
    """Give every row its tokens and yield each row as it ends; `rows` grows by what `more` returns."""
    window, device = context_window(loaded.model), loaded.model.device

    def advance(batch: "_Batch") -> Iterator[int]:
        for place, (token_id, logp) in enumerate(batch.step(loaded.model, window)):
            i, row = batch.indices[place], batch.rows[place]
            if row.finish_reason is not None:
                continue
            ended = row.take(token_id, logp)
            if on_tokens is not None:
                on_tokens(i, token_id)
            if not ended and should_stop is not None and should_stop(i):
                row.finish_reason, ended = FinishReason.UNKNOWN.value, True
            if ended:
                yield i
        batch.compact()

    def begin(indices: range) -> "_Batch":
        joining = [rows[i] for i in indices]
        ids, mask = _left_padded([row.request.prompt_ids for row in joining], filler=loaded.end_ids[0])
        return _Batch(list(indices), joining, ids.to(device), mask.to(device))

    batch: _Batch | None = None
    begun = 0
    while True:
        open_ = batch.open if batch is not None else 0
        free = places - open_
        if not open_ or (batch is not None and batch.can_be_joined and free * _JOINING_SHARE >= places):
            if (
                more is not None
                and (batch is None or batch.can_be_joined)
                and (wanted := free - (len(rows) - begun)) > 0
            ):
                rows += [_row(loaded, request, window) for request in more(wanted)]
            if indices := range(begun, min(begun + free, len(rows))):
                begun = indices.stop
                newcomers = begin(indices)
                yield from advance(newcomers)
                if batch is None or not open_:
                    batch = newcomers
                    continue
                if newcomers.open:
                    batch = batch.joined_by(newcomers)
        if batch is None or not batch.open:
            return
        yield from advance(batch)


@dataclass
class _Batch:
    """Rows that are decoded together, padded on the left."""

    indices: list[int]
    rows: list["_Row"]
    fed: torch.Tensor
    """[rows, tokens] that the model has not seen yet: the prompts, then the last token of each row."""
    attended: torch.Tensor
    """[rows, all tokens]: 1 where a token is the row's own."""
    cache: Any = None

    @property
    def open(self) -> int:
        """Rows that go on."""
        return sum(row.finish_reason is None for row in self.rows)

    @property
    def can_be_joined(self) -> bool:
        """Whether the cache holds keys and values of all tokens and nothing else (no window, no convolution)."""
        return type(self.cache) is DynamicCache and all(type(layer) is _RoomyLayer for layer in self.cache.layers)

    @torch.no_grad()
    def step(self, model: Any, window: int | None) -> list[tuple[int, float]]:
        """Feed the model; returns each row's next token and its log-probability."""
        # A row that has ended may wait in the batch beyond the model's last position.
        last = None if window is None else window - 1
        positions = (self.attended.cumsum(dim=-1) - 1).clamp(min=0, max=last)[:, -self.fed.shape[1] :]
        output = model(
            input_ids=self.fed,
            attention_mask=self.attended,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if self.cache is None:
            self.cache = _roomy(output.past_key_values)
        chosen, logps = _sample(output.logits[:, -1].float(), self.rows)
        self.fed = chosen[:, None]
        self.attended = torch.cat([self.attended, self.attended.new_ones(len(self.rows), 1)], dim=1)
        return list(zip(chosen.tolist(), logps.tolist(), strict=True))

    def compact(self) -> None:
        """Drop ended rows; copying the cache costs about a token's worth of time, so it waits until it is worth it."""
        if 0 < self.open <= _COMPACTION * len(self.rows):
            self._only_open()

    def _only_open(self) -> "_Batch":
        open_ = [place for place, row in enumerate(self.rows) if row.finish_reason is None]
        if len(open_) < len(self.rows):
            kept = torch.tensor(open_, device=self.fed.device)
            self.cache.reorder_cache(kept)
            self.attended, self.fed = self.attended[kept], self.fed[kept]
            self.indices = [self.indices[place] for place in open_]
            self.rows = [self.rows[place] for place in open_]
        return self

    def joined_by(self, other: "_Batch") -> "_Batch":
        """Return what is open of both as one batch, as wide as its longest row.

        Both have open rows, and have been fed all but the last token of each row.
        """
        batches = self._only_open(), other._only_open()
        width = max(_used(batch.attended) for batch in batches)
        for layer, joining in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = torch.cat([_fitted(states, width - 1, dim=-2) for states in (layer.keys, joining.keys)])
            layer.values = torch.cat([_fitted(states, width - 1, dim=-2) for states in (layer.values, joining.values)])
        return _Batch(
            [index for batch in batches for index in batch.indices],
            [row for batch in batches for row in batch.rows],
            torch.cat([batch.fed for batch in batches]),
            torch.cat([_fitted(batch.attended, width, dim=-1) for batch in batches]),
            self.cache,
        )


class _RoomyLayer(DynamicLayer):
    """Keys and values, [rows, heads, tokens, width], in front of room into which those of new tokens are written.

    transformers' own layer copies all that it holds for each new token, which is a fifth of a token's time on a CPU.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._rooms: tuple[torch.Tensor, ...] = ()
        self._shown: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append those of new tokens and return all."""
        del args, kwargs
        length, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        # Whoever chooses or moves rows leaves other tensors here, which have no room.
        if self._shown is not self.keys or end > self._rooms[0].shape[-2]:
            self._rooms = tuple(_with_room(held, end + _ROOM) for held in (self.keys, self.values))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, length:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        self._shown = self.keys
        return self.keys, self.values


def _with_room(held: torch.Tensor, capacity: int) -> torch.Tensor:
    rows, heads, length, width = held.shape
    room = held.new_empty(rows, heads, capacity, width)
    room[:, :, :length] = held
    return room


def _roomy(cache: Any) -> Any:
    """Give the layers of a filled cache room; layers that keep anything else than all tokens stay as they are."""
    if type(cache) is DynamicCache:
        cache.layers = [
            _RoomyLayer(layer.keys, layer.values)
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
            else layer
            for layer in cache.layers
        ]
    return cache


def _used(attended: torch.Tensor) -> int:
    """Return how many columns, counted from the right, any row uses."""
    return attended.shape[1] - int(attended.any(dim=0).int().argmax())


def _fitted(states: torch.Tensor, length: int, *, dim: int) -> torch.Tensor:
    """Cut or pad a dimension on the left to a length."""
    missing = length - states.shape[dim]
    if missing <= 0:
        return states.narrow(dim, -missing, length)
    shape = list(states.shape)
    shape[dim] = missing
    return torch.cat([states.new_zeros(shape), states], dim=dim)


def _left_padded(prompts: Sequence[tuple[int, ...]], *, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, [rows, longest]; what pads is masked, so any id will do."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), filler, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids, mask


def context_window(model: PreTrainedModel) -> int | None:
    """Return how many tokens of prompt and answer the model can hold, or None where it names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of an answer's tokens, without special tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero everything outside the smallest set of likeliest tokens that holds `top_p` (https://arxiv.org/abs/1904.09751).

    Args:
        probabilities: [rows, vocabulary], each row sums to 1.
        top_p: [rows, 1] in (0, 1]; 1 keeps everything.
    """
    likeliest = probabilities.sort(dim=-1, descending=True).values
    inside = (likeliest.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True)
    cutoff = likeliest.gather(-1, inside.clamp(max=probabilities.shape[-1] - 1))
    return probabilities.masked_fill((probabilities < cutoff) & (top_p < 1), 0.0)


@dataclass
class _Row:
    request: GenerationRequest
    end_ids: tuple[int, ...]
    device: torch.device
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.randomness = torch.Generator(device=self.device)
        if self.request.seed is None:
            self.randomness.seed()
        else:
            self.randomness.manual_seed(self.request.seed)

    def take(self, token_id: int, logp: float) -> bool:
        """Append a token; returns whether it is the last."""
        self.token_ids.append(token_id)
        self.logps.append(logp)
        if token_id in self.end_ids:
            self.finish_reason = FinishReason.STOP.value
        elif len(self.token_ids) >= self.request.max_tokens:
            self.finish_reason = FinishReason.LENGTH.value
        return self.finish_reason is not None

    def completion(self, loaded: Generator) -> Completion:
        ended = self.finish_reason == FinishReason.STOP.value
        return Completion(
            text=answer_text(loaded.tokenizer, self.token_ids[:-1] if ended else self.token_ids),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or FinishReason.UNKNOWN.value,
            logps=tuple(self.logps),
        )


def _sample(logits: torch.Tensor, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each row's next token: [rows] ids and their log-probabilities at temperature 1.

    Args:
        logits: [rows, vocabulary], fp32.
        rows: whose they are.
    """
    chosen = logits.argmax(dim=-1)
    sampled = [i for i, row in enumerate(rows) if row.request.temperature > _COLDEST]
    if sampled:
        # Choosing all rows would only copy them.
        hot = logits if len(sampled) == len(rows) else logits[sampled]
        temperature, top_p = (
            torch.tensor(values, device=logits.device)[:, None]
            for values in zip(*((rows[i].request.temperature, rows[i].request.top_p) for i in sampled), strict=True)
        )
        probabilities = (hot / temperature).softmax(dim=-1)
        chosen[sampled] = _draw(probabilities, top_p, [rows[i].randomness for i in sampled])[:, 0]
    return chosen, logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _draw(
    probabilities: torch.Tensor, top_p: torch.Tensor, generators: list[torch.Generator], *, tries: int = _TRIES
) -> torch.Tensor:
    """Draw a token of each row from its nucleus: [rows, 1].

    All rows are drawn at once from one uniform number of each row's own generator (inverse transform sampling), out of
    the whole vocabulary; a token outside of the nucleus, which is one that likelier tokens with a mass of `top_p` stand
    before, is drawn again. That is the same distribution, and sorting the vocabulary for each token, or a multinomial
    call for each row, costs as much as the model.
    """
    if not tries:
        probabilities, top_p = nucleus(probabilities, top_p), torch.ones_like(top_p)
    cumulative = probabilities.double().cumsum(dim=-1)
    uniform = torch.cat([torch.rand(1, 1, generator=g, device=g.device, dtype=torch.float64) for g in generators])
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # A product that rounds up to the total would point behind the last token that has any probability.
    drawn = torch.minimum(drawn, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
    if bool((top_p < 1).any()):
        before = probabilities.masked_fill(probabilities <= probabilities.gather(-1, drawn), 0.0).sum(-1, keepdim=True)
        again = ((before >= top_p) & (top_p < 1))[:, 0].nonzero()[:, 0]
        if len(again):
            generators = [generators[i] for i in again.tolist()]
            drawn[again] = _draw(probabilities[again], top_p[again], generators, tries=tries - 1)
    return drawn


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Hand the last position to the output embedding as a tensor of its own.

    As a slice of all positions, [rows, 1, width] with gaps between the rows, torch multiplies it by a copy of the
    embedding for each row: 3 s for 64 rows of a 135M model.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: tuple(tensor.contiguous() for tensor in inputs))
    try:
        yield
    finally:
        hook.remove()


def _row(loaded: Generator, request: GenerationRequest, window: int | None) -> _Row:
    if not request.prompt_ids:
        msg = "a prompt without tokens cannot be answered"
        raise ModelError(msg)
    if request.max_tokens < 1 or not 0 < request.top_p <= 1 or request.temperature < 0:
        msg = f"sampling needs max_tokens >= 1, 0 < top_p <= 1, temperature >= 0; got {request.max_tokens}, {request.top_p}, {request.temperature}"
        raise ModelError(msg)
    needed = len(request.prompt_ids) + request.max_tokens
    if window is not None and needed > window:
        msg = f"a prompt of {len(request.prompt_ids)} tokens and an answer of up to {request.max_tokens} do not fit the model's context of {window} tokens\n\nHint: shorten the prompt or lower the token limit."
        raise ModelError(msg)
    return _Row(request, loaded.end_ids, loaded.model.device)
