"""Answers of one static batch, through the loop of transformers' `generate`.

Each row has its own temperature, nucleus, token limit, seed and end, and its tokens are given out as they are sampled.
A row draws from its own generator, so its randomness does not depend on its company (its logits may, in the last bits:
a batch is not computed in the order of a single row). This module knows nothing of requests, text protocols or who
waits for an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from app.errors import ModelError
from app.schemas import FinishReason

# A model folder may bring habits of its own (a repetition penalty is common): what is sampled here is the model alone.
_NO_HABITS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
}
# Nearly every nucleus is narrower than this, so that the whole vocabulary need not be sorted.
_NUCLEUS_WIDTH = 1024


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
) -> list[Completion]:
    """Answer all requests together and return the completions in their order.

    Args:
        loaded: model, tokenizer and end tokens.
        requests: the rows of the batch; the longest one decides how long it takes.
        on_tokens: called with row and token id as soon as a token is sampled, in the calling thread.
        on_completion: called with row and completion as soon as a row ends, in the calling thread.
        should_stop: asked about each unfinished row after each of its tokens; True ends the row.

    Raises:
        ModelError: a prompt is empty, or prompt and answer do not fit the model's context.
    """
    if not requests:
        return []
    window = context_window(loaded.model)
    for request in requests:
        _check(request, window)
    device = loaded.model.device
    rows = [_Row(request, loaded.end_ids, device) for request in requests]
    completions: dict[int, Completion] = {}

    def announce(i: int) -> None:
        completions[i] = rows[i].completion(loaded)
        if on_completion is not None:
            on_completion(i, completions[i])

    width = max(len(request.prompt_ids) for request in requests)
    # Padding is masked, so any id will do.
    filler = loaded.end_ids[0]
    ids = torch.full((len(requests), width), filler, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, request in enumerate(requests):
        ids[i, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[i, width - len(request.prompt_ids) :] = 1
    model: Any = loaded.model  # generate comes from a mixin that the declared class does not name
    model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max(request.max_tokens for request in requests),
            eos_token_id=list(loaded.end_ids),
            pad_token_id=filler,
            **_NO_HABITS,
        ),
        logits_processor=LogitsProcessorList([_SampleRows(rows, on_tokens, device)]),
        stopping_criteria=StoppingCriteriaList([_EndRows(rows, should_stop, announce)]),
    )
    return [completions[i] for i in range(len(rows))]


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
    vocabulary = probabilities.shape[-1]
    for width in (min(_NUCLEUS_WIDTH, vocabulary), vocabulary):
        likeliest = probabilities.topk(width, dim=-1).values
        inside = (likeliest.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True)
        if width == vocabulary or not ((inside == width) & (top_p < 1)).any():
            break
    cutoff = likeliest.gather(-1, inside.clamp(max=likeliest.shape[-1] - 1))
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

    def take(self, token_id: int, logp: float) -> None:
        self.token_ids.append(token_id)
        self.logps.append(logp)
        if token_id in self.end_ids:
            self.finish_reason = FinishReason.STOP.value
        elif len(self.token_ids) >= self.request.max_tokens:
            self.finish_reason = FinishReason.LENGTH.value

    def completion(self, loaded: Generator) -> Completion:
        ended = self.finish_reason == FinishReason.STOP.value
        return Completion(
            text=answer_text(loaded.tokenizer, self.token_ids[:-1] if ended else self.token_ids),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or FinishReason.UNKNOWN.value,
            logps=tuple(self.logps),
        )


class _SampleRows(LogitsProcessor):
    """Chooses each row's next token and leaves `generate`'s argmax nothing but that choice.

    All rows are drawn at once from one uniform number of each row's own generator (inverse transform sampling): a
    multinomial call for each row, and the full sort of transformers' nucleus, cost as much as the model at 16 rows.
    """

    def __init__(self, rows: list[_Row], on_tokens: Callable[[int, int], None] | None, device: torch.device) -> None:
        self._rows = rows
        self._on_tokens = on_tokens
        self._sampled = torch.tensor([i for i, row in enumerate(rows) if row.request.temperature > 0], device=device)
        requests = [rows[i].request for i in self._sampled.tolist()]
        self._temperature = torch.tensor([[r.temperature] for r in requests], device=device)
        self._top_p = torch.tensor([[r.top_p] for r in requests], device=device)
        self._generators = [rows[i].randomness for i in self._sampled.tolist()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Take fp32 logits [rows, vocabulary] and return them with all but one masked in each row."""
        chosen = scores.argmax(dim=-1)
        if self._generators:
            probabilities = (scores[self._sampled] / self._temperature).softmax(dim=-1)
            if (self._top_p < 1).any():
                probabilities = nucleus(probabilities, self._top_p)
            cumulative = probabilities.double().cumsum(dim=-1)
            uniform = torch.cat(
                [torch.rand(1, 1, generator=g, device=g.device, dtype=torch.float64) for g in self._generators]
            )
            drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
            # A product that rounds up to the total would point behind the last token that has any probability.
            last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
            chosen[self._sampled] = torch.minimum(drawn, last)[:, 0]
        logps = scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(dim=-1)
        for i, (token_id, logp) in enumerate(zip(chosen.tolist(), logps.tolist(), strict=True)):
            if self._rows[i].finish_reason is None:
                self._rows[i].take(token_id, logp)
                if self._on_tokens is not None:
                    self._on_tokens(i, token_id)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _EndRows(StoppingCriteria):
    """Ends the rows that have their last token, and those that nobody waits for any more."""

    def __init__(
        self, rows: list[_Row], should_stop: Callable[[int], bool] | None, announce: Callable[[int], None]
    ) -> None:
        self._rows = rows
        self._should_stop = should_stop
        self._announce = announce
        self._open = set(range(len(rows)))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Return one flag for each row."""
        for i in sorted(self._open):
            row = self._rows[i]
            if row.finish_reason is None and self._should_stop is not None and self._should_stop(i):
                row.finish_reason = FinishReason.UNKNOWN.value
            if row.finish_reason is not None:
                self._open.remove(i)
                self._announce(i)
        done = [row.finish_reason is not None for row in self._rows]
        return torch.tensor(done, device=input_ids.device)


def _check(request: GenerationRequest, window: int | None) -> None:
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
