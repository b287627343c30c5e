"""Attention over packed groups, registered with transformers under `ATTENTION_NAME`.

For each group two kinds of calls: the prompt with its first response, causal; every other response over the prompt's
keys and its own. The layout reaches the function as the keyword argument `segments` of the model's forward. Stock
`sdpa` on the same row is silently wrong: it takes the restart of positions for a new document.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from app.errors import ModelError
from app.training.batch import Segment

ATTENTION_NAME = "prefloop_packed"


def register() -> None:
    """Make the attention known to transformers; calling it again changes nothing."""
    # Because the name has no mask function, transformers makes no attention mask for it.
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def packed_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: tuple[Segment, ...] | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Attend within groups.

    Args:
        module: the attention layer that calls.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, D].
        attention_mask: always None: the layout is in `segments`.
        scaling: factor on the scores.
        dropout: must be 0.
        sliding_window: a key farther back than this many positions is not seen.
        softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2.
        segments: the packed layout.
        kwargs: other arguments of the interface, which do not change the result.

    Returns:
        [1, T, heads, D], and no weights.

    Raises:
        ModelError: the layer asks for something that this attention does not compute exactly.
    """
    if segments is None or attention_mask is not None:
        msg = f"{ATTENTION_NAME} needs `segments` and no attention mask; call the model through `ScoringModel`"
        raise ModelError(msg)
    if dropout:
        msg = f"attention dropout {dropout} cannot be packed exactly\n\nHint: set attention_dropout to 0 in the config."
        raise ModelError(msg)
    dtype, device = value.dtype, value.device.type
    # torch's CPU kernel takes twice as long in bf16 as in fp32, most of it in backward, and rounds more.
    narrow = device == "cpu" and dtype == torch.bfloat16
    with torch.autocast(device, enabled=False) if narrow else nullcontext():
        if narrow:
            query, key, value = query.float(), key.float(), value.float()
        attend = partial(_attend, scaling=scaling, softcap=softcap)
        outputs = [_attend_group(query, key, value, segment, sliding_window, attend) for segment in segments]
        return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype).contiguous(), None


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
    if queries == keys and window is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    # With fewer queries than keys `is_causal` aligns at the top left, so the mask is explicit.
    mask = _mask(queries, keys, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    # torch's kernels know no cap.
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
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
    positions = torch.arange(size, device=device)
    distance = positions[:, None] - positions[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
