"""The packed batch gives the numbers of plain rows: log-probabilities and gradients."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from app.errors import DataError, ModelError
from app.training import scoring
from app.training.batch import PackedBatch, micro_batches, rank_share, step_groups
from app.training.scoring import ScoringModel, plain_logps, unpackable
from app.training.tokenization import Group, Preference

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny_model(kind: str = "llama"):
    torch.manual_seed(0)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **SIZES, **layers, query_pre_attn_scalar=8, attn_logit_softcapping=0.02, final_logit_softcapping=0.05
            )
        ),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **layers, query_pre_attn_scalar=8)),
        "granite": lambda: GraniteForCausalLM(
            GraniteConfig(**SIZES, logits_scaling=3.0, attention_multiplier=0.2, residual_multiplier=0.7)
        ),
        "hyperclovax": lambda: HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SIZES, logits_scaling=3.0)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3, pad_token_id=0)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0, sliding_window=5)),
    }
    model = models[kind]().double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # The library's norm rounds to fp32 inside, which would hide an error below 1e-7.
            module.forward = partial(exact_norm, module)
    return model


def exact_norm(module, hidden):
    gemma = hasattr(module, "eps")
    epsilon, weight = (module.eps, 1 + module.weight) if gemma else (module.variance_epsilon, module.weight)
    return weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch):
    """The library's capped attention rounds its weights to fp32, which would hide an error below 1e-7."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def group(name: str, prompt: int, responses: tuple[int, ...], seed: int = 0) -> Group:
    generator = torch.Generator().manual_seed(seed + prompt)
    draw = lambda n: tuple(torch.randint(1, 97, (n,), generator=generator).tolist())  # noqa: E731
    pairs = tuple(Preference(0, k, 1.0, f"{name}-{k}", "import") for k in range(1, len(responses)))
    return Group(name, name, "train", draw(prompt), tuple(draw(n) for n in responses), pairs)


GROUPS = [group("a", 7, (5, 3)), group("b", 1, (1, 9, 4)), group("c", 12, (6,))]


KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "granite", "hyperclovax"]


@pytest.mark.parametrize(("kind", "chunk"), [*((kind, 2048) for kind in KINDS), ("llama", 5), ("gemma2", 5)])
def test_packed_scores_and_gradients_equal_plain_rows_in_fp64(kind, chunk, monkeypatch):
    """Also where the head scores its rows in several chunks, as it does for many answers."""
    monkeypatch.setattr("app.training.scoring._HEAD_CHUNK", chunk)
    model = tiny_model(kind)
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    plain = plain_logps(model, GROUPS)
    (plain * weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    packed = ScoringModel(model)(PackedBatch.pack(GROUPS))
    (packed.logps * weights).sum().backward()
    assert torch.allclose(packed.logps, plain, atol=1e-10, rtol=0)
    assert packed.token_counts.tolist() == [5, 3, 1, 9, 4, 6]
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-8 * scale, name


def stretched():
    """A Phi-3 that turns all positions of a row by other frequencies where the row has more than 14 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = 14
    sizes = {**SIZES, "max_position_embeddings": 56, "original_max_position_embeddings": 14}
    model = Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0, rope_parameters=rope)).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(exact_norm, module)
    return model


def test_a_long_row_does_not_turn_the_positions_of_what_is_packed_beside_it():
    model = stretched()
    plain = plain_logps(model, GROUPS)
    (plain * torch.arange(6)).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    policy = ScoringModel(model)
    assert policy.alike_up_to == 14
    scores = policy(PackedBatch.pack(GROUPS)).logps
    (scores * torch.arange(6)).sum().backward()
    assert torch.allclose(scores, plain, atol=1e-10, rtol=0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-8 * expected[name].abs().max(), name
    policy.alike_up_to = None
    turned = (policy(PackedBatch.pack(GROUPS)).logps - plain).abs()
    assert turned[:5].max() > 1e-6, "beside the long row of the last group the others are scored otherwise"


def test_short_rows_of_a_model_with_another_turn_for_long_ones_are_packed(monkeypatch):
    model = stretched()
    plain = plain_logps(model, GROUPS[:2])
    monkeypatch.setattr(scoring, "_plain_rows", lambda *_: pytest.fail("they fit"))
    assert torch.allclose(ScoringModel(model)(PackedBatch.pack(GROUPS[:2])).logps, plain, atol=1e-10, rtol=0)


def test_rows_are_plain_where_a_recipe_says_so(monkeypatch):
    model = tiny_model("mistral")
    plain = plain_logps(model, GROUPS)
    monkeypatch.setattr(scoring, "_packed_rows", lambda *_: pytest.fail("packed"))
    policy = ScoringModel(model, backend="plain")
    assert policy.plain_because == "train.attention is `plain`"
    assert torch.allclose(policy(PackedBatch.pack(GROUPS)).logps, plain, atol=1e-10, rtol=0)


def test_the_oracle_computes_no_logits_of_a_prompt():
    model, rows = tiny_model(), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, found: rows.append(found.shape[1]))
    plain_logps(model, GROUPS)
    assert rows == [6, 4, 2, 10, 5, 7]


def test_the_head_computes_those_rows_alone_that_predict_an_answer():
    model, rows = tiny_model(), []
    head = model.get_output_embeddings()
    project = head.forward
    head.forward = lambda given: rows.append(len(given)) or project(given)
    batch = PackedBatch.pack(GROUPS)
    ScoringModel(model)(batch)
    assert sum(rows) == sum(len(response) for group in GROUPS for response in group.responses)
    assert sum(rows) < batch.input_ids.numel()


# Cohere's norm rounds to fp32 and has no exact stand-in here.
@pytest.mark.parametrize("kind", [*KINDS, "cohere"])
def test_packed_scores_and_gradients_equal_plain_rows_in_fp32(kind):
    model = tiny_model(kind).float()
    weights = torch.linspace(-1, 1, 6)
    plain = plain_logps(model, GROUPS)
    (plain * weights).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    packed = ScoringModel(model)(PackedBatch.pack(GROUPS)).logps
    (packed * weights).sum().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(packed, plain, rtol=1e-5, atol=0)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_stock_attention_on_the_packed_row_would_be_wrong():
    """Shows that the parity test can fail: without our attention a restarted position begins a new document."""
    model = tiny_model()
    batch = PackedBatch.pack(GROUPS)
    plain = plain_logps(model, GROUPS)
    model.set_attn_implementation("sdpa")
    hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    logps = (
        model.lm_head(hidden[0][batch.predictor_rows]).log_softmax(-1).gather(1, batch.target_ids[:, None]).squeeze()
    )
    wrong = torch.zeros(6, dtype=torch.float64).index_add(0, batch.response_of_target, logps)
    assert (wrong - plain).abs().max() > 1e-3


def test_no_response_sees_another():
    model = tiny_model()
    scorer = ScoringModel(model)
    whole = scorer(PackedBatch.pack([GROUPS[1]])).logps
    for k, response in enumerate(GROUPS[1].responses):
        alone = Group("b", "b", "train", GROUPS[1].prompt_ids, (response,))
        assert torch.allclose(scorer(PackedBatch.pack([alone])).logps[0], whole[k], atol=1e-12, rtol=0)


def test_an_empty_response_is_refused_by_name():
    with pytest.raises(DataError, match="`empty` has an empty prompt or response"):
        PackedBatch.pack([Group("empty", "c", "train", (1,), ((),))])


def test_a_model_with_dropout_runs_on_plain_rows_and_says_why():
    for name in ("attention_dropout", "resid_pdrop", "embed_dropout", "dropout", "hidden_dropout_prob"):
        model = tiny_model()
        setattr(model.config, name, 0.1)
        assert f"has {name} = 0.1" in ScoringModel(model).plain_because
    model = tiny_model()
    model.config.classifier_dropout = 0.1  # of a head that it does not have
    assert ScoringModel(model).plain_because is None


def unpackable_model(kind: str):
    torch.manual_seed(0)
    if kind == "gpt_oss":
        config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, sliding_window=5)
        return GptOssForCausalLM(config).eval()
    if kind == "qwen2_moe":
        config = Qwen2MoeConfig(
            **SIZES,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=48,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=0,
        )
        return Qwen2MoeForCausalLM(config).eval()  # torch's grouped product has no fp64
    if kind == "gpt_neo":
        config = GPTNeoConfig(
            vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        )
        return GPTNeoForCausalLM(config).double().eval()
    if kind == "mamba":
        return (
            MambaForCausalLM(
                MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4, use_mambapy=False)
            )
            .double()
            .eval()
        )
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = Qwen3NextConfig(
        **SIZES, **linear, num_experts=0, mlp_only_layers=[0, 1], layer_types=["linear_attention", "full_attention"]
    )
    return Qwen3NextForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "has layers (MambaForCausalLM) whose state would run"),
        ("qwen3_next", "has layers (Qwen3NextGatedDeltaNet) whose state would run"),
        ("gpt_oss", "has attention sinks"),
        ("gpt_neo", "does not let its attention be computed by another"),
        ("qwen2_moe", "has a window of which its layers (Qwen2MoeAttention) tell nothing"),
    ],
)
def test_what_cannot_be_packed_runs_on_plain_rows_with_the_right_numbers(kind, reason):
    model = unpackable_model(kind)
    plain = plain_logps(model, GROUPS)
    scorer = ScoringModel(model)
    assert f"`{kind}` {reason}" in scorer.plain_because
    weights = torch.linspace(-1, 1, 6, dtype=plain.dtype)
    (plain * weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = scorer(PackedBatch.pack(GROUPS)).logps.to(plain.dtype)
    (found * weights).sum().backward()
    noise = 1e-10 if plain.dtype == torch.float64 else 1e-5  # Mamba's own head rounds to fp32
    assert torch.allclose(found, plain, atol=noise, rtol=0)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-6, atol=noise), name


def test_a_model_whose_decoder_transformers_does_not_find_is_refused_by_name():
    config = Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=5, pad_token_id=0
    )
    model = Llama4ForCausalLM(config)
    with pytest.raises(ModelError, match="finds no decoder in `llama4_text`"):
        ScoringModel(model)
    # Where it finds one some day, its chunks are known.
    assert "attends within chunks" in unpackable(model)


GROUP_SIZES = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 10), min_size=2, max_size=4)), min_size=1, max_size=20
)


@settings(deadline=None, max_examples=50)
@given(sizes=GROUP_SIZES, budget=st.integers(1, 60), batch_pairs=st.integers(1, 8), world=st.integers(1, 5))
def test_every_pair_is_in_exactly_one_micro_batch_of_one_rank(sizes, budget, batch_pairs, world):
    groups = [group(f"g{i}", prompt, tuple(lengths)) for i, (prompt, lengths) in enumerate(sizes)]
    seen = [
        pair_id
        for step in step_groups(groups, batch_pairs)
        for rank in range(world)
        for batch in micro_batches(rank_share(step, rank=rank, world_size=world), budget)
        for pair_id in batch.pair_ids
    ]
    assert sorted(seen) == sorted(p.pair_id for g in groups for p in g.pairs)


@settings(deadline=None, max_examples=50)
@given(sizes=GROUP_SIZES, budget=st.integers(1, 60))
def test_a_micro_batch_exceeds_its_budget_only_for_a_single_group(sizes, budget):
    groups = [group(f"g{i}", prompt, tuple(lengths)) for i, (prompt, lengths) in enumerate(sizes)]
    for batch in micro_batches(groups, budget):
        assert batch.input_ids.shape[1] <= budget or len(batch.segments) == 1


def target_logps(logits, targets):
    return scoring._token_scores(torch.nn.Identity(), logits, targets, 1.0, None, False)[0]


def test_a_likely_tokens_gradient_survives_bf16():
    torch.manual_seed(0)
    logits = torch.randn(40, 97) * 4
    targets = logits.argmax(-1)
    logits[range(40), targets] += torch.linspace(0, 8, 40)
    half = logits.bfloat16().requires_grad_()
    wide = half.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(target_logps(half, targets).sum(), half)
    (expected,) = torch.autograd.grad(wide.log_softmax(-1).gather(1, targets[:, None]).sum(), wide)
    assert torch.allclose(
        found.gather(1, targets[:, None]).double(), expected.gather(1, targets[:, None]), rtol=1e-2, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_target_logps_are_those_of_a_log_softmax_with_its_gradient(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(70, 97) * 4).to(dtype).requires_grad_()
    targets, weights = torch.randint(97, (70,)), torch.randn(70).double()
    wide = torch.promote_types(dtype, torch.float32)
    plain = logits.to(wide).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    ours = target_logps(logits, targets)
    assert ours.dtype == wide
    assert torch.allclose(ours, plain, rtol=1e-6)
    (expected,) = torch.autograd.grad((plain * weights.to(wide)).sum(), logits)
    (found,) = torch.autograd.grad((ours * weights.to(wide)).sum(), logits)
    # A bf16 gradient is rounded to 8 bits whichever way it is made.
    assert torch.allclose(
        found, expected, rtol=1e-10 if dtype == torch.float64 else 1e-2, atol=1e-10 if dtype == torch.float64 else 1e-3
    )
