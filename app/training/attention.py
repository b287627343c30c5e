"""Attention over packed groups, registered with transformers: one layout, three backends.

    sdpa     for each group two kinds of calls: the prompt with its first response, causal; every other response over the
             prompt's keys and its own. Every device.
    flex     FlexAttention with the layout as its mask. GPUs: on a CPU it has no backward.
    varlen   flash attention over sequences of different lengths: the prompt with its first response, every other
             response with the prompt's keys gathered before its own. GPUs, half precision, no softcap.

The layout reaches the function as the keyword argument `layout` of the model's forward. Stock `sdpa` on the same row is
silently wrong: it takes the restart of positions for a new document.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from app.errors import ModelError
from app.training.batch import Segment

Backend = Literal["sdpa", "flex", "varlen"]


@dataclass(frozen=True, slots=True)
class Sequences:
    """A packed row as sequences of queries, each with its keys; the last query of a sequence stands at its last key."""

    key_rows: Tensor
    """[K] int64: the token rows whose keys the sequences see, one sequence after the other."""
    query_ends: Tensor
    """[S + 1] int32: where the sequences' queries begin and end; together they are the row."""
    key_ends: Tensor
    """[S + 1] int32: the same of `key_rows`."""
    most_queries: int
    most_keys: int


class Layout:
    """What attention knows of a packed row, in the form that each backend asks for, made once for all layers."""

    def __init__(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self._masks: dict[int | None, BlockMask] = {}

    @cached_property
    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """[T] int64 each: the group of a token, its answer in the group (0: the prompt), its position."""
        groups: list[int] = []
        answers: list[int] = []
        positions: list[int] = []
        for number, segment in enumerate(self.segments):
            for answer, length in enumerate((segment.prompt_length, *segment.response_lengths)):
                groups += [number] * length
                answers += [answer] * length
                first = segment.prompt_length if answer else 0
                positions += range(first, first + length)
        return (
            torch.tensor(groups, device=self.device),
            torch.tensor(answers, device=self.device),
            torch.tensor(positions, device=self.device),
        )

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the layout as FlexAttention takes it; layers with the same window share one."""
        if window not in self._masks:
            tokens = len(self.labels[0])
            # Compiled, the mask of all tokens with all tokens is never in memory.
            make: Any = _compiled(create_block_mask) if self.device.type == "cuda" else create_block_mask
            self._masks[window] = make(sees(self.labels, window), None, None, tokens, tokens, self.device)
        return self._masks[window]

    @cached_property
    def sequences(self) -> Sequences:
        """The layout as flash attention takes it."""
        keys: list[int] = []
        queries: list[int] = []
        counts: list[int] = []
        for segment in self.segments:
            prompt = range(segment.start, segment.start + segment.prompt_length)
            begin = prompt.stop
            for number, length in enumerate(segment.response_lengths):
                own = range(begin, begin + length)
                queries.append(length if number else len(prompt) + length)
                counts.append(len(prompt) + length)
                keys += [*prompt, *own]
                begin = own.stop
        return Sequences(
            key_rows=torch.tensor(keys, device=self.device),
            query_ends=self._ends(queries),
            key_ends=self._ends(counts),
            most_queries=max(queries),
            most_keys=max(counts),
        )

    def _ends(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)


def sees(labels: tuple[Tensor, Tensor, Tensor], window: int | None) -> Callable[..., Tensor]:
    """Return which keys a query sees, as a mask function of FlexAttention: (batch, head, query, key) -> bool."""
    group, answer, position = labels
    # Tensors: of a captured number Inductor (torch 2.13) makes a size of graphs for rows of any length, which its kernels do not know.
    back = None if window is None else torch.full((), window, device=position.device)

    def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - position[key]
        own = (answer[key] == 0) | (answer[key] == answer[query])
        seen = (group[query] == group[key]) & own & (distance >= 0)
        return seen if back is None else seen & (distance < back)

    return mask


def attention_name(backend: Backend) -> str:
    """Return the name by which transformers knows a backend, and make it known; again changes nothing."""
    # A name that holds another's (`sdpa`, `flex`) would be taken for it.
    name = {"sdpa": "prefloop_loop", "flex": "prefloop_mask", "varlen": "prefloop_sequences"}[backend]
    # Because the name has no mask function, transformers makes no attention mask for it.
    AttentionInterface.register(name, partial(packed_attention, kernel=_KERNELS[backend]))
    return name


def packed_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: "Kernel",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Attend within groups.

    Args:
        module: the attention layer that calls.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, D].
        attention_mask: always None: the layout is in `layout`.
        kernel: one of the backends.
        scaling: factor on the scores.
        dropout: must be 0.
        sliding_window: a key farther back than this many positions is not seen.
        softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2.
        layout: the packed layout.
        kwargs: other arguments of the interface, which do not change the result.

    Returns:
        [1, T, heads, D], and no weights.

    Raises:
        ModelError: the layer asks for something that the backend does not compute exactly.
    """
    if layout is None or attention_mask is not None:
        msg = "packed attention needs `layout` and no attention mask; call the model through `ScoringModel`"
        raise ModelError(msg)
    if dropout:
        msg = f"attention dropout {dropout} cannot be packed exactly\n\nHint: set attention_dropout to 0 in the config."
        raise ModelError(msg)
    return kernel(query, key, value, layout, sliding_window, scaling, softcap), None


Kernel = Callable[[Tensor, Tensor, Tensor, Layout, int | None, float | None, float | None], Tensor]
"""(query, key, value, layout, window, scaling, softcap) -> [1, T, heads, D], shapes as in `packed_attention`."""


def _by_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    dtype, device = value.dtype, value.device.type
    # torch's CPU kernel takes twice as long in bf16 for 128 tokens, gains an eighth for 512, and rounds more.
    narrow = device == "cpu" and dtype == torch.bfloat16
    with torch.autocast(device, enabled=False) if narrow else nullcontext():
        if narrow:
            query, key, value = query.float(), key.float(), value.float()
        attend = partial(_attend, scaling=scaling, softcap=softcap)
        outputs = [_attend_group(query, key, value, segment, window, attend) for segment in layout.segments]
        return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype).contiguous()


def _by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    on_cpu = query.device.type == "cpu"
    if on_cpu and query.requires_grad:
        msg = "FlexAttention has no backward on a CPU\n\nHint: set train.attention to `sdpa`."
        raise ModelError(msg)

    # A tensor, as in `sees`: Inductor fails to lower a captured fraction.
    cap = None if softcap is None else torch.full((), softcap, device=query.device)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert cap is not None  # noqa: S101  only asked where there is one
        return cap * torch.tanh(score / cap)

    kernel: Any = flex_attention if on_cpu else _compiled(flex_attention)
    attended: Tensor = kernel(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        score_mod=None if softcap is None else capped,
        block_mask=layout.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        # Left to choose, torch 2.13 takes its kernel for decoding where a row has less than 128 tokens; for many of these
        # lengths it has no configuration (`NoValidChoicesError`, pytorch #185349).
        kernel_options=None if on_cpu else {"BACKEND": "TRITON"},
    )
    return attended.transpose(1, 2).contiguous()


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        msg = "FlexAttention is compiled where it runs, and this machine has no C compiler\n\nHint: install gcc and the headers of Python (python3-dev), or set train.attention to `sdpa` or `varlen`."
        raise ModelError(msg)
    # Rows differ in length, and a kernel for each would be compiled for ever.
    return torch.compile(function, dynamic=True)


def _by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if softcap is not None:
        msg = "flash attention over sequences knows no cap on attention scores\n\nHint: set train.attention to `flex`."
        raise ModelError(msg)
    if value.dtype == torch.float32:
        msg = "flash attention computes in half precision only\n\nHint: set train.dtype to `bfloat16`, or train.attention to `flex`."
        raise ModelError(msg)
    sequences = layout.sequences
    # Rotary embeddings leave queries and keys in the type of fp32 weights, and autocast does not know this kernel.
    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    attended = varlen_attn(
        q.contiguous(),
        k[sequences.key_rows],
        v[sequences.key_rows],
        sequences.query_ends,
        sequences.key_ends,
        sequences.most_queries,
        sequences.most_keys,
        scale=scaling,
        # Keys up to so many positions back, and none ahead.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(attended, Tensor)  # noqa: S101  no second output was asked for
    return attended[None]


_KERNELS: Mapping[Backend, Kernel] = {"sdpa": _by_sdpa, "flex": _by_flex, "varlen": _by_varlen}


def _attend_group(
    query: Tensor, key: Tensor, value: Tensor, segment: Segment, window: int | None, attend: Callable[..., Tensor]
) -> Tensor:
    start, prompt = segment.start, segment.prompt_length
    first_end = start + prompt + segment.response_lengths[0]
    length = first_end - start
    q, k, v = (t[:, :, start:first_end] for t in (query, key, value))
    parts = [attend(q, k, v, None if window is None or length <= window else window)]
    begin = first_end
    for response in segment.response_lengths[1:]:
        end = begin + response
        k = torch.cat([key[:, :, start : start + prompt], key[:, :, begin:end]], dim=2)
        v = torch.cat([value[:, :, start : start + prompt], value[:, :, begin:end]], dim=2)
        parts.append(attend(query[:, :, begin:end], k, v, window))
        begin = end
    return torch.cat(parts, dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    *,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attend causally; the last query stands at the last key. Query [1, heads, Q, D], key and value [1, _, K, D]."""
    queries, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if softcap is not None:
        return _capped(query, key, value, _mask(queries, keys, window, query.device), scaling, softcap)
    causal = queries == keys and window is None
    # With fewer queries than keys `is_causal` aligns at the top left, so the mask is explicit.
    mask = None if causal else _mask(queries, keys, window, query.device)
    device = query.device.type
    by_flash = causal and (query.dtype != torch.float32 or torch.is_autocast_enabled(device))
    if grouped and device != "cpu" and not by_flash:
        # The kernel of a GPU that takes a mask, or fp32, takes no heads that share keys. Given both, torch writes all scores in
        # fp32, and keeps them for backward.
        key, value, grouped = _repeated(key, query), _repeated(value, query), False
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def _repeated(keys: Tensor, query: Tensor) -> Tensor:
    """Return keys or values with a head for each of the query's."""
    return keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    # torch's kernels know no cap.
    key, value = _repeated(key, query), _repeated(value, query)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=wide)
    return weights.to(value.dtype) @ value


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys]: which keys a query sees; the last query stands at the last key."""
    return _causal(1 << (keys - 1).bit_length(), window, device)[keys - queries : keys, :keys]


@lru_cache(maxsize=64)
def _causal(size: int, window: int | None, device: torch.device) -> Tensor:
    """[size, size], of which masks are parts: one for each length would fill the memory."""
    keys = torch.arange(size, device=device)
    queries = keys[:, None]
    # Comparisons make bytes; a matrix of distances would take eight for each.
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
