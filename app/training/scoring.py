"""One module for backbone and head: token ids in, summed log-probability of each response out.

`ScoringModel` is what gets wrapped, sharded and compiled; logits never leave it. The head runs only on the rows that
predict response tokens, in chunks, with the log-softmax in fp32. `plain_logps` is the oracle: one row for each response
through the model's own attention, as any other library would do it.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from app.errors import ModelError
from app.training.attention import Backend, Layout, attention_name
from app.training.batch import PackedBatch, Segment, filler, token_bins
from app.training.tokenization import Group

AS_ASKED = "train.attention is `plain`"
"""Why a model is not packed that could be."""
_HEAD_CHUNK = 2048
_DROPOUTS = ("dropout", "pdrop", "dropout_rate", "dropout_prob", "layerdrop")
_HEAD_DROPOUTS = ("classifier", "summary", "scheduled")
_STATEFUL = re.compile(
    r"Mamba|SSM|DeltaNet|LinearAttention|LightningAttention|[sm]LSTM|Rwkv|RecurrentBlock|Rglru|ShortConv"
)


@dataclass(frozen=True)
class ResponseScores:
    """[N] each: summed log-probability (fp32) and number of tokens of every response.

    Without slots: DeepSpeed's hook behind a forward looks through `vars` of what it returns.
    """

    logps: Tensor
    token_counts: Tensor
    agreement: Tensor | None = None
    """Mean over a response's tokens of log p(token) - log sum_v p(v)^2, without gradient; where it was asked for."""


class ScoringModel(nn.Module):
    """Scores the responses of packed batches with a causal language model (which may carry adapters).

    A model that cannot be packed exactly is run on plain rows instead, one for each response; `plain_because` says why. So is
    a batch with a row that is longer than `alike_up_to`, behind which a model turns all positions of a row otherwise.

    Args:
        model: the model.
        agreement: whether the scores hold `agreement`, which costs another pass over the logits.
        backend: what computes the attention of packed rows; `plain`: there are none.

    Raises:
        ModelError: transformers finds no decoder in the model, or the backend has no effect on it.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        agreement: bool = False,
        backend: Backend | Literal["plain"] = "sdpa",
    ) -> None:
        super().__init__()
        causal = causal_model(model)
        if causal.get_decoder() is causal:
            # So it is with Llama 4, whose `base_model_prefix` names no part of it (transformers 5.23).
            msg = f"transformers finds no decoder in `{causal.config.model_type}` ({type(causal).__name__}), so its answers cannot be scored"
            raise ModelError(msg)
        self.agreement = agreement
        self.backend = backend
        self.plain_because = AS_ASKED if backend == "plain" else unpackable(model)
        self.alike_up_to = alike_up_to(model)
        if self.plain_because is None and backend != "plain":
            model.set_attn_implementation(attention_name(backend))
        elif backend not in ("sdpa", "plain"):
            raise no_effect(backend, self.plain_because)
        else:
            model.set_attn_implementation(own_attention(model))
        model.config.use_cache = False
        self.model = model
        self.head = _Head()

    def head_parameters(self) -> list[nn.Parameter]:
        """Return what `head` computes with and does not own."""
        causal = causal_model(self.model)
        return list(causal.get_output_embeddings().parameters())

    def forward(self, batch: PackedBatch) -> ResponseScores:
        """Return the scores of `batch`; every rank issues the same collectives for one call."""
        causal = causal_model(self.model)
        decoder = causal.get_decoder()
        if self.plain_because is not None:
            rows = _plain_rows(decoder, batch, None)
        elif self.alike_up_to is not None and _longest_row(batch) > self.alike_up_to:
            rows = _plain_rows(decoder, batch, Layout)
        else:
            rows = _packed_rows(decoder, batch)
        config = causal.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        project = causal.get_output_embeddings().forward
        token_scores = self.head(rows, batch.target_ids, project, _logit_scale(config), cap, self.agreement)
        summed = token_scores.new_zeros(len(token_scores), batch.num_responses)
        summed = summed.index_add(1, batch.response_of_target, token_scores)
        agreement = summed[1] / batch.token_counts if self.agreement else None
        return ResponseScores(summed[0], batch.token_counts, agreement)


def causal_model(model: nn.Module) -> Any:
    """Return the model that peft's wrapper stands around, its layers with what adapters they carry; without one, the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def without_noise(policy: nn.Module) -> None:
    """Switch off dropout and whatever else is random in a forward, but let layers compute again in backward what they did not keep.

    transformers ties both to `training`.
    """
    policy.train(mode=False)
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True


@contextmanager
def generating(policy: ScoringModel) -> Iterator[PreTrainedModel]:
    """Lend the model, adapters and all, to who generates with it: its own attention, a cache, no dropout."""
    model = policy.model
    causal = causal_model(model)
    attention_before, training = causal.config._attn_implementation, policy.training
    causal.set_attn_implementation(own_attention(causal))
    causal.config.use_cache = True
    policy.train(mode=False)
    try:
        yield causal
    finally:
        causal.set_attn_implementation(attention_before)
        causal.config.use_cache = False
        policy.train(mode=training)


def with_reference_logps(
    groups: Sequence[Group],
    score: Callable[[PackedBatch], Tensor],
    *,
    token_budget: int,
    rounds: Callable[[int], int] = lambda batches: batches,
    idle: Sequence[Group] = (),
) -> list[Group]:
    """Return the groups, in their order, with what `score` says of each response as its reference log-probability.

    Args:
        groups: what is scored, in packed batches of at most `token_budget` tokens.
        score: PackedBatch (on the CPU) -> [N] log-probabilities; called without gradients.
        token_budget: tokens of a batch; a longer group is a batch of its own.
        rounds: batches -> how often `score` is called, see `Workers.rounds`.
        idle: groups to score where it is called more often than there are batches.
    """
    scored: dict[str, Group] = {}
    bins = token_bins(groups, token_budget)
    more = rounds(len(bins)) - len(bins)  # agreed on before the first, or ranks would wait for one another's forwards
    with torch.no_grad():
        for members in bins:
            logps = iter(score(PackedBatch.pack(members)).double().tolist())
            for group in members:
                scored[group.group_id] = replace(group, reference_logps=tuple(next(logps) for _ in group.responses))
        for _ in range(more):
            score(filler(idle))
    return [scored[group.group_id] for group in groups]


def plain_logps(model: PreTrainedModel | PeftModel, groups: Sequence[Group]) -> Tensor:
    """Score every response of the groups in a row of its own, with the model's own attention.

    Returns:
        [N] summed log-probabilities, in the order of a packed batch of the same groups.
    """
    device = next(model.parameters()).device
    causal = causal_model(model)
    keeps = "logits_to_keep" in inspect.signature(causal.forward).parameters
    sums = []
    with by_own_attention(model):
        for prompt, response in ((group.prompt_ids, response) for group in groups for response in group.responses):
            ids, kept = torch.tensor([prompt + response], device=device), len(response) + 1
            # Training computes no logits of prompts, so the memory for them may not be there.
            few = {"logits_to_keep": kept} if keeps else {}
            logits = model(input_ids=ids, use_cache=False, **few).logits[0, -kept:-1]
            sums.append(_wide(logits).log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(sums)


@contextmanager
def by_own_attention(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let the model attend as transformers itself would; around backward too, where it may compute again what it did not keep."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(own_attention(model))
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def no_effect(backend: str, reason: str | None) -> ModelError:
    """Return the error for a backend of packed attention where, for the `reason`, there are no packed rows."""
    msg = f"attention `{backend}` has no effect: {reason}, so each response is a row of its own\n\nHint: set train.attention to `sdpa`."
    return ModelError(msg)


def unpackable(model: PreTrainedModel | PeftModel) -> str | None:
    """Return why responses of this model must be scored in rows of their own, or None where they can share a prompt."""
    config = model.config.get_text_config()
    for module in model.modules():
        kind = type(module).__name__
        if _STATEFUL.search(kind) or isinstance(module, nn.Conv1d):
            return f"`{config.model_type}` has layers ({kind}) whose state would run from one response into the next"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return f"`{config.model_type}` has attention sinks, which the packed attention does not compute"
    if not model.is_backend_compatible():
        return f"`{config.model_type}` does not let its attention be computed by another"
    if getattr(config, "attention_chunk_size", None):
        return f"`{config.model_type}` attends within chunks, which the packed attention does not compute"
    for module in model.modules() if getattr(config, "sliding_window", None) else ():
        # Without a mask of transformers, a window is what the layer tells of it; Qwen2-MoE's and PhiMoE's tell nothing.
        layer = type(module)
        if layer.__name__.endswith("Attention") and "sliding_window=" not in inspect.getsource(layer.forward):
            return f"`{config.model_type}` has a window of which its layers ({layer.__name__}) tell nothing"
    for name, value in config.to_dict().items():
        # `classifier_dropout` and the like belong to heads that a causal language model does not have.
        if value and name.endswith(_DROPOUTS) and not name.startswith(_HEAD_DROPOUTS):
            return f"`{config.model_type}` has {name} = {value}, which the packed attention does not compute"
    return None


def alike_up_to(model: PreTrainedModel | PeftModel) -> int | None:
    """Return the length in tokens up to which a row's positions are turned by the same frequencies; None: whatever it is.

    Phi-3's LongRoPE takes others for *all* positions of a forward that holds a longer row (`dynamic_rope_update` in
    transformers), so one long answer would change the scores of whatever is packed beside it. (Dynamic NTK does so beyond the
    model's whole context, where no row may be.)
    """
    config: Any = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    # One set of them, or one for each kind of layer.
    sets = [given] if "rope_type" in given else [each for each in given.values() if isinstance(each, dict)]
    lengths = [
        int(each.get("original_max_position_embeddings") or config.max_position_embeddings)
        for each in sets
        if each.get("rope_type") == "longrope" or "dynamic" in str(each.get("rope_type"))
    ]
    return min(lengths, default=None)


def own_attention(model: PreTrainedModel | PeftModel) -> str:
    """Return the attention that transformers itself gives the model."""
    # Gemma 2 has no `sdpa`, which knows no cap on attention scores; neither have models without attention.
    return "sdpa" if model._supports_sdpa else "eager"


def _packed_rows(decoder: nn.Module, batch: PackedBatch) -> Tensor:
    """Return [R, D]: the hidden state that predicts each response token."""
    hidden: Tensor = decoder(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        layout=Layout(batch.segments, batch.input_ids.device),
    ).last_hidden_state[0]
    return hidden[batch.predictor_rows]


def _longest_row(batch: PackedBatch) -> int:
    return max(segment.prompt_length + max(segment.response_lengths) for segment in batch.segments)


def _plain_rows(decoder: nn.Module, batch: PackedBatch, layout: type[Layout] | None) -> Tensor:
    """Return the same, with a forward for each response; `layout` where the attention is ours, which must be told one."""
    rows = []
    for segment in batch.segments:
        begin = prompt_end = segment.start + segment.prompt_length
        for length in segment.response_lengths:
            ids = torch.cat(
                [batch.input_ids[:, segment.start : prompt_end], batch.input_ids[:, begin : begin + length]], dim=1
            )
            row = Segment(0, segment.prompt_length, (length,))
            told = {} if layout is None else {"layout": layout((row,), ids.device)}
            hidden: Tensor = decoder(input_ids=ids, use_cache=False, **told).last_hidden_state[0]
            rows.append(hidden[segment.prompt_length - 1 : -1])
            begin += length
    return torch.cat(rows)


def _logit_scale(config: Any) -> float:
    """Return the factor on the head's output: Cohere names it, Granite names what divides it, HyperCLOVA X names it as Granite does."""
    scaling = float(getattr(config, "logits_scaling", 1))
    named = scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    return float(getattr(config, "logit_scale", None) or named)


class _Head(nn.Module):
    """Scores of all rows of a forward, a chunk at a time.

    A module, so that a weight which lies in slices can be gathered once for all chunks (`zero.keep_head`) and ranks may
    have different numbers of them. The model's head is called by its `forward` alone: hooks would gather it for each.
    """

    def forward(
        self,
        rows: Tensor,
        targets: Tensor,
        project: Callable[[Tensor], Tensor],
        scale: float,
        cap: float | None,
        agreement: bool,  # noqa: FBT001
    ) -> Tensor:
        """Return [1, R], or [2, R] with the agreement."""
        parts, chunks = [], max(1, -(-len(rows) // _HEAD_CHUNK))
        for part, wanted in zip(rows.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
            arguments = (project, part, wanted, scale, cap, agreement)
            if rows.requires_grad and chunks > 1:
                parts.append(checkpoint(_token_scores, *arguments, use_reentrant=False))
            else:
                parts.append(_token_scores(*arguments))
        return torch.cat(parts, dim=1)


def _token_scores(
    project: Callable[[Tensor], Tensor],
    rows: Tensor,
    targets: Tensor,
    scale: float,
    cap: float | None,
    agreement: bool,  # noqa: FBT001
) -> Tensor:
    """Return [1, R] log-probabilities of the targets, or [2, R] with how far they agree with the policy's own choice."""
    logits = project(rows)
    if scale != 1:
        logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logps: Tensor = _TargetLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    if not agreement:
        return logps[None]
    with torch.no_grad():
        wide = (_wide(part) for part in _row_parts(logits))
        # log sum_v p(v)^2 = logsumexp(2 z) - 2 logsumexp(z)
        squares = torch.cat([(2 * z).logsumexp(dim=-1) - 2 * z.logsumexp(dim=-1) for z in wide])
        own = logps.detach() - squares
    return torch.stack([logps, own])


class _TargetLogps(torch.autograd.Function):
    """Log-probability of one token in each row of logits: [R, V], [R] -> [R], in at least fp32.

    The same numbers as `log_softmax(logits, dtype=float32).gather(…)` and its gradient, but no fp32 copy of all logits
    is ever made or kept: rows are taken a few at a time, on a CPU as many as stay in its cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalisers = torch.cat([_wide(part).logsumexp(dim=-1) for part in _row_parts(logits)])
        ctx.save_for_backward(logits, targets, normalisers)
        return _wide(logits.gather(1, targets[:, None])).squeeze(1) - normalisers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalisers = ctx.saved_tensors
        gradient = gradients[0][:, None]
        result = torch.empty_like(logits)
        for into, part, normaliser, scale in zip(
            *map(_row_parts, (result, logits, normalisers[:, None], -gradient)), strict=True
        ):
            into.copy_(_wide(part).sub(normaliser).exp_().mul_(scale))
        # (1 - p) g is rounded once: rounded -p g plus rounded g would lose a likely token's gradient.
        logps = _wide(logits.gather(1, targets[:, None])) - normalisers[:, None]
        result.scatter_(1, targets[:, None], (-torch.expm1(logps) * gradient).to(result.dtype))
        return result, None


def _row_parts(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, 8 if rows.device.type == "cpu" else 1024)


def _wide(logits: Tensor) -> Tensor:
    # At least fp32; fp64 logits of a parity test stay fp64.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
