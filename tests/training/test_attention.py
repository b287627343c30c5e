"""The layouts for GPU kernels say what the packed batch means, and each backend gives the numbers of the first."""

import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from app.errors import ModelError
from app.training import attention
from app.training.attention import Layout, sees
from app.training.batch import PackedBatch
from app.training.scoring import ScoringModel
from tests.training.test_packing import GROUPS, group, tiny_model

CPU = torch.device("cpu")
SIZES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=5
)
WINDOW = st.one_of(st.none(), st.integers(1, 8))


def packed(sizes) -> PackedBatch:
    return PackedBatch.pack([group(f"g{i}", prompt, tuple(lengths)) for i, (prompt, lengths) in enumerate(sizes)])


def by_definition(batch: PackedBatch, window: int | None) -> torch.Tensor:
    """Every query sees its prompt and its own answer, up to its own position."""
    tokens = batch.input_ids.numel()
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for segment in batch.segments:
        prompt = list(range(segment.start, segment.start + segment.prompt_length))
        begin = segment.start + segment.prompt_length
        for length in segment.response_lengths:
            row = [*prompt, *range(begin, begin + length)]
            begin += length
            for at, query in enumerate(row):
                first = 0 if window is None else max(0, at - window + 1)
                mask[query, row[first : at + 1]] = True
    return mask


@settings(max_examples=60)
@given(sizes=SIZES, window=WINDOW)
def test_the_mask_of_flex_is_the_definition(sizes, window):
    batch = packed(sizes)
    tokens = batch.input_ids.numel()
    layout = Layout(batch.segments, CPU)
    mask = create_mask(sees(layout.labels, window), None, None, tokens, tokens, "cpu")[0, 0]
    assert torch.equal(mask, by_definition(batch, window))
    assert torch.equal(layout.labels[2], batch.position_ids[0])


@settings(max_examples=60)
@given(sizes=SIZES, window=WINDOW)
def test_the_sequences_of_varlen_are_the_definition(sizes, window):
    batch = packed(sizes)
    tokens = batch.input_ids.numel()
    found = Layout(batch.segments, CPU).sequences
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    queries, keys = found.query_ends.tolist(), found.key_ends.tolist()
    assert queries[-1] == tokens, "the queries of all sequences are the row"
    for (begin, end), (first, last) in zip(pairwise(queries), pairwise(keys), strict=True):  # fmt: skip
        rows = found.key_rows[first:last].tolist()
        for at, query in enumerate(range(begin, end)):
            stands = len(rows) - (end - begin) + at  # the last query stands at the last key
            start = 0 if window is None else max(0, stands - window + 1)
            mask[query, rows[start : stands + 1]] = True
    assert torch.equal(mask, by_definition(batch, window))
    assert found.most_queries == max(b - a for a, b in pairwise(queries))
    assert found.most_keys == max(b - a for a, b in pairwise(keys))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3"])
def test_flex_scores_like_sdpa(kind):
    batch = PackedBatch.pack(GROUPS)
    with torch.no_grad():
        expected = ScoringModel(tiny_model(kind))(batch).logps
        found = ScoringModel(tiny_model(kind).float(), backend="flex")(batch).logps
    assert torch.allclose(found.double(), expected, atol=2e-5)


def one_by_one(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch documents of `varlen_attn`, sequence by sequence; its kernel runs on GPUs only."""
    parts, (back, ahead) = [], window_size
    assert ahead == 0
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        stands = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        distance = stands - torch.arange(d - c)[None]
        mask = (distance >= 0) & ((distance <= back) | torch.tensor(back == -1))
        q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3", "phi3"])
def test_varlen_is_asked_for_the_scores_and_gradients_of_sdpa(kind, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", one_by_one)
    batch, weights = PackedBatch.pack(GROUPS), torch.linspace(-1, 1, 6, dtype=torch.float64)
    scores, gradients = [], []
    for backend in ("sdpa", "varlen"):
        model = tiny_model(kind)
        logps = ScoringModel(model, backend=backend)(batch).logps
        (logps * weights).sum().backward()
        scores.append(logps)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*scores, atol=1e-10, rtol=0)
    assert (gradients[0] - gradients[1]).norm() <= 1e-8 * gradients[0].norm()


def test_varlen_gets_one_half_precision_type_where_weights_are_fp32(monkeypatch):
    """Rotary embeddings leave queries and keys in fp32 there, which no flash kernel takes."""
    seen = []

    def kernel(query, key, value, *arguments, **named):
        seen.append({query.dtype, key.dtype, value.dtype})
        return one_by_one(query, key, value, *arguments, **named)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    batch = PackedBatch.pack(GROUPS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ScoringModel(tiny_model().float(), backend="varlen")(batch)
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.parametrize(
    ("dtype", "autocast", "shared"),
    [(torch.bfloat16, False, True), (torch.float32, True, True), (torch.float32, False, False)],
)
def test_on_a_gpu_heads_share_keys_only_where_flash_attention_computes_it(dtype, autocast, shared, monkeypatch):
    """What takes a mask, or fp32, there and no groups would else be torch's own formula, with all scores in memory."""
    calls = []

    def kernel(query, key, value, *, attn_mask, is_causal, scale, enable_gqa):
        assert is_causal is (attn_mask is None)
        calls.append((is_causal, key.shape[1], value.shape[1], enable_gqa))
        return query

    monkeypatch.setattr(attention, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: autocast)
    batch = packed([(4, [2, 3])])
    layout = Layout(batch.segments, torch.device("meta"))
    query, key = (torch.empty(1, heads, 9, 8, dtype=dtype, device="meta") for heads in (4, 2))
    attention._by_sdpa(query, key, key, layout, None, None, None)
    assert calls == [(True, 2, 2, True) if shared else (True, 4, 4, False), (False, 4, 4, False)]


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++")
def test_the_mask_and_the_cap_of_flex_compile_for_rows_of_any_length(monkeypatch):
    """On a CPU as far as a forward pass goes, with what a GPU's kernel is built from, too."""
    monkeypatch.setattr(attention, "flex_attention", attention._compiled(attention.flex_attention))
    for length in (9, 140, 70):
        batch = packed([(length, [5, 3])])
        query, key, value = (torch.randn(1, heads, batch.input_ids.numel(), 16) for heads in (4, 2, 2))
        for window, cap in ((None, None), (6, 3.0)):
            given = (query, key, value, Layout(batch.segments, CPU), window, None, cap)
            assert torch.allclose(attention._by_flex(*given), attention._by_sdpa(*given), atol=1e-5)


def test_flex_without_a_compiler_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ModelError, match="no C compiler\n\nHint: install gcc"):
        attention._compiled(print)


def test_a_backend_has_no_effect_on_plain_rows_and_is_refused():
    model = tiny_model()
    model.config.attention_dropout = 0.1
    with pytest.raises(ModelError, match=r"attention `flex` has no effect: .*attention_dropout(?s:.)*`sdpa`"):
        ScoringModel(model, backend="flex")


def test_what_a_backend_does_not_compute_is_refused():
    batch = PackedBatch.pack(GROUPS)
    with pytest.raises(ModelError, match="no cap on attention scores\n\nHint: set train.attention to `flex`"):
        ScoringModel(tiny_model("gemma2"), backend="varlen")(batch)
    with pytest.raises(ModelError, match="no backward on a CPU\n\nHint: set train.attention to `sdpa`"):
        ScoringModel(tiny_model(), backend="flex")(batch)
    with pytest.raises(ModelError, match="half precision only"):
        ScoringModel(tiny_model().float(), backend="varlen")(batch)
