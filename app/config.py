"""Every knob of the product: one frozen tree, read from a YAML recipe, changed by dotted overrides.

A job receives the section it uses, never the tree. Defaults live here only. This module knows nothing of where
things are stored or what a section's values do; it knows which keys and values exist and reports every fault of a
recipe at once, with the near miss.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.errors import RecipeError

SAME_STEPS = (
    "train.activation_checkpointing",
    "train.canary_every",
    "train.checkpoint_every",
    "train.held_out_every",
    "train.micro_batch_tokens",
    "train.offload",
    "train.sharding",
)
"""What of a recipe may change while a run goes on: its steps are the same ones, but for rounding."""
HALVINGS = 2
"""How often in one attempt the token budget of a micro-batch is halved where memory does not hold it."""
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Section(BaseModel):
    """A frozen part of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


TunedBy = Literal["answers", "preferences"]
"""What a model learned from before: answers to imitate (an SFT checkpoint), or preferences too (most instruct models)."""


class ModelSection(Section):
    """Which weights the loop starts from and which it is held against."""

    sft: str = Field(
        "embedded", description="The SFT checkpoint: `embedded`, a folder, a URI, a hub id or a model of the home."
    )
    sft_tuned_by: TunedBy = Field(
        "answers",
        description="What that checkpoint learned from; `preferences`, as most instruct models did: half the usual rate.",
    )
    start: Literal["champion", "sft"] = Field("champion", description="Where the policy starts.")
    reference_model: Literal["champion", "sft"] = Field("champion", description="The frozen reference.")


class PairSection(Section):
    """How signals become pairs (`build-pairs`) and which rows may train."""

    max_pairs_per_prompt: int = Field(4, ge=1, description="Cap of pairs kept for one prompt.")
    min_pairs: int = Field(1000, ge=1, description="Fewer pairs than this refuse to train.")
    held_out_fraction: float | None = Field(
        None, gt=0, lt=0.9, description="Share of prompt clusters held out; null: 0.15, of a small import more."
    )
    since: datetime | None = Field(None, description="Only events from this time on; default: all.")
    near_duplicate_threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity that joins prompts.")
    thumb_margin: int = Field(2, ge=1, description="Votes by which a disputed thumb must win.")
    edit_cosmetic_similarity: float = Field(0.98, gt=0, le=1, description="Edits at least this similar are cosmetic.")
    edit_rewrite_similarity: float = Field(0.30, ge=0, lt=1, description="Edits less similar than this are rewrites.")


class CollectSection(Section):
    """A *simulated* audience that stands for end users; its feedback is labelled as simulated everywhere."""

    audience: Literal["style", "random"] = Field("style", description="`random` gives feedback without meaning.")
    style: str = Field(..., description="JSON of the audience's style: name, rules, edits.")
    prompts: str = Field(..., description="JSONL of the prompts that it asks (`prompt`).")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of the answers it asks for.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the answers it asks for.")
    max_tokens: int = Field(96, ge=1, description="Token limit of an answer; cut answers are not judged.")
    max_prompts: int | None = Field(None, ge=1, description="Use the first N prompts.")
    concurrency: int = Field(16, ge=1, description="Requests in flight.")
    seed: int = Field(0, ge=0, description="Seed of what it asks, regenerates, compares and edits.")
    switch_requests: int = Field(100, ge=0, description="Requests sent across the switch to a new champion.")


class PrepareSection(Section):
    """How text becomes token ids and who scores the reference."""

    max_length: int = Field(2048, ge=8, description="Tokens of prompt and one response together.")
    too_long: Literal["drop", "truncate_response", "refuse"] = Field("drop", description="What becomes of longer rows.")
    seed: int = Field(0, ge=0, description="Seed of the fixed global shuffle.")
    rows_per_file: int = Field(4096, ge=1, description="Rows of one Parquet part file.")
    reuse_scores: bool = Field(True, description="Take what the same reference scored for one of the last snapshots.")


class LoraSection(Section):
    """Low-rank adapters (LoRA https://arxiv.org/abs/2106.09685, rsLoRA 2312.03732, DoRA 2402.09353)."""

    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="`rslora` scales by alpha / sqrt(r); `dora` also trains the norms of the weights."
    )
    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / r (`rslora`: / sqrt(r)).")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="Linear layers that get an adapter.",
    )


class NoOptions(Section):
    """Options of `sft`."""


class BetaOptions(Section):
    """Options of `hinge`, `apo_zero` and `apo_down`."""

    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference.")


class DpoOptions(BetaOptions):
    """Options of `dpo`."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of flipped labels (cDPO).")
    sft_weight: float = Field(0.0, ge=0, description="Weight of the chosen answers' likelihood in the loss (RPO).")
    length_weight: float = Field(0.0, ge=0, description="Margin given to a chosen answer for each token more (R-DPO).")
    wpo: bool = Field(False, description="Weigh pairs by how likely the policy gives them itself (WPO).")


class RobustOptions(BetaOptions):
    """Options of `robust`."""

    label_smoothing: float = Field(0.1, gt=0, lt=0.5, description="Known share of flipped labels.")


class IpoOptions(BetaOptions):
    """Options of `ipo`."""

    normalize: Literal["token_mean", "sum"] = Field("token_mean", description="As in TRL, or as in the paper.")


class DpoNormOptions(Section):
    """Options of `dpo_norm`."""

    beta: float = Field(5.0, gt=0, description="Strength of the pull to the reference, for a mean over tokens.")


class DpopOptions(BetaOptions):
    """Options of `dpop`."""

    penalty: float = Field(5.0, ge=0, description="Weight of a chosen answer's fall below the reference.")


class SimpoOptions(Section):
    """Options of `simpo`."""

    beta: float = Field(2.0, gt=0, description="Scale of the mean log-probabilities.")
    gamma_beta_ratio: float = Field(0.5, ge=0, description="Margin that is asked for, in mean log-probability.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of flipped labels.")


class CpoOptions(Section):
    """Options of `cpo`."""

    beta: float = Field(0.1, gt=0, description="Scale of the log-probabilities.")
    nll_weight: float = Field(1.0, ge=0, description="Weight of the chosen answers' likelihood.")


class OrpoOptions(Section):
    """Options of `orpo`."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    lambda_: float = Field(0.1, gt=0, alias="lambda", description="Weight of the odds ratio.")
    nll_scope: Literal["response"] = Field("response", description="Whose likelihood: TRL's takes the prompt's too.")


class UnpairedOptions(BetaOptions):
    """Options of `kto` and `apo_zero_unpaired`."""

    desirable_weight: float | None = Field(None, ge=0, description="Weight of liked answers; null: balanced.")
    undesirable_weight: float | None = Field(None, ge=0, description="Weight of disliked ones; null: balanced.")

    @model_validator(mode="after")
    def _both_or_none(self) -> "UnpairedOptions":
        if (self.desirable_weight is None) != (self.undesirable_weight is None):
            msg = "give both `desirable_weight` and `undesirable_weight`, or neither: then they are balanced"
            raise ValueError(msg)
        return self


OBJECTIVE_OPTIONS: Mapping[str, type[Section]] = {
    "sft": NoOptions,
    "dpo": DpoOptions,
    "robust": RobustOptions,
    "ipo": IpoOptions,
    "hinge": BetaOptions,
    "dpo_norm": DpoNormOptions,
    "apo_zero": BetaOptions,
    "apo_down": BetaOptions,
    "dpop": DpopOptions,
    "simpo": SimpoOptions,
    "cpo": CpoOptions,
    "orpo": OrpoOptions,
    "kto": UnpairedOptions,
    "apo_zero_unpaired": UnpairedOptions,
}
"""The objectives that ship, with their options; the functions are those of `app.training.objectives`."""


_USUAL: Mapping[str, Mapping[str, tuple[float, float]]] = {
    # Zephyr 0.01, the paper's TL;DR 0.5, Together 0.05 to 0.9
    **{key: {"beta": (0.01, 0.9)} for key in ("dpo", "robust", "ipo", "hinge", "apo_zero", "apo_down", "dpop")},
    # Tulu 3 and OLMo 3: 5
    "dpo_norm": {"beta": (1.0, 15.0)},
    # its authors: beta 2 to 10, gamma / beta from 0 to 1
    "simpo": {"beta": (1.0, 10.0), "gamma_beta_ratio": (0.0, 1.0)},
    "cpo": {"beta": (0.01, 0.9)},
    "orpo": {"lambda": (0.01, 1.0)},
    **{key: {"beta": (0.01, 0.5)} for key in ("kto", "apo_zero_unpaired")},
}
"""Ranges of options in which published runs lie."""
_WEAKEST_PULL = 0.05


def unusual_options(objective: str, options: Mapping[str, Any], *, tuned_by: TunedBy) -> list[str]:
    """Say which options lie outside of what published runs of the objective used; nothing for an objective of one's own.

    `tuned_by` is what the model that training begins with learned from.
    """
    usual = _USUAL.get(objective, {})
    found = [
        f"train.options.{name} = {options[name]:g} is outside of what {objective} is used with, {low:g} to {high:g}"
        for name, (low, high) in usual.items()
        if not low <= options[name] <= high
    ]
    pulled = "beta" in usual and objective not in REFERENCE_FREE
    if pulled and tuned_by == "preferences" and usual["beta"][0] <= options["beta"] < _WEAKEST_PULL:
        found.append(
            f"train.options.beta = {options['beta']:g} holds a model that was tuned by preferences before only loosely: 0.05 to 0.1 is usual"
        )
    return found


_PUBLISHED_WIDTH = 4096
_PUBLISHED_STEPS = 480
_MOST_FASTER = 8.0
_TUNED_BEFORE = 0.5
_FAR = 10.0
"""Published rates of one objective at one width lie within a tenth and ten times, but for CPO: its authors trained adapters of a
13B model at 1e-4 (their `cpo_ft.sh`), others at less than a tenth of that."""
_LEARNING_RATES: Mapping[str, tuple[float, float]] = {
    # (full, adapters) at the published width and steps
    "sft": (2e-5, 2e-4),  # TRL; with adapters ten times as much, https://thinkingmachines.ai/blog/lora
    "orpo": (5e-6, 5e-5),  # its authors' Mistral-ORPO
    "kto": (1e-6, 1e-5),  # its authors for beta = 0.1
    "apo_zero_unpaired": (1e-6, 1e-5),
    "simpo": (1e-6, 1e-5),  # its authors' Llama-3-Instruct, the upper end of their search from 3e-7
}
# DPO: Zephyr, Tulu 3; with adapters Zephyr and LLaMA-Factory
_OTHERS = (5e-7, 5e-6)


def usual_learning_rate(
    objective: str, adapter: Literal["lora", "full"], *, width: int, total_steps: int, tuned_by: TunedBy
) -> float:
    """Return the peak learning rate of a run whose recipe names none.

    It is the published one of the objective, carried over from runs of models of width 4096:

    - times 4096 / `width`: what Adam can take falls with the width (https://arxiv.org/abs/2203.03466), and published
      DPO follows that (2e-7 at 8192, Tulu 3 70B; 5e-7 at 4096, Tulu 3 8B and Zephyr; 1e-6 at 2048, SmolLM2 1.7B);
    - but for `sft`, times 480 / `total_steps`, from 1 to 8: preference training is published with rates so small that
      some 480 steps (61 thousand pairs, 128 a step) do not move the model too far, and a run of few steps at them hardly
      moves it at all. (ORPO's authors took 9500 steps, so for it that is on the careful side.)
    - but for `sft`, times a half where the model was `tuned_by` preferences before: most published rates are those of SFT
      models, and what such a model has to lose is more. The half is ours: OLMo 3's rates, 1e-6 and 8e-8, are further apart.
    """
    full, adapters = _LEARNING_RATES.get(objective, _OTHERS)
    faster = 1.0 if objective == "sft" else min(max(_PUBLISHED_STEPS / total_steps, 1.0), _MOST_FASTER)
    gentler = _TUNED_BEFORE if tuned_by == "preferences" and objective != "sft" else 1.0
    return (full if adapter == "full" else adapters) * faster * gentler * _PUBLISHED_WIDTH / width


def unusual_rate(learning_rate: float | None, usual: float) -> list[str]:
    """Say where a recipe's learning rate is further from the usual one of such a run than published rates are."""
    if learning_rate is None or usual / _FAR <= learning_rate <= usual * _FAR:
        return []
    return [
        f"train.learning_rate = {learning_rate:g} is far from {usual:.2g}, the usual one of this objective, adapter, width and number of steps"
    ]


REFERENCE_FREE = frozenset({"sft", "simpo", "cpo", "orpo"})
"""Objectives that hold the policy against no reference."""
TAKES_LONE_ANSWERS = frozenset({"sft", "kto", "apo_zero_unpaired"})
"""Objectives that learn from answers which were judged by themselves, too; the others from pairs only."""


_CPU_TOKENS, _GPU_TOKENS = 512, 8192


class TrainSection(Section):
    """The optimisation of one run."""

    objective: str = Field("dpo", description="The loss: one that ships, or `package.module:function`.")
    options: dict[str, Any] = Field({}, validate_default=True, description="Options of the objective.")
    adapter: Literal["lora", "full"] = Field("lora", description="What is trained.")
    lora: LoraSection = LoraSection()
    reference: Literal["sharded", "adapter_off", "precomputed"] = Field(
        "precomputed", description="Where reference log-probabilities come from."
    )
    sharding: Literal["none", "zero3"] = Field(
        "none", description="Whether each worker holds all weights, or a slice of them (DeepSpeed ZeRO-3)."
    )
    offload: tuple[Literal["optimizer", "reference"], ...] = Field(
        (), description="What lies in the memory of the CPU while a GPU trains; with `zero3`."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of AdamW; null: the usual one of such a run."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of matrices.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="After warm-up: to zero, or none.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of steps with a rising learning rate.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    epochs: int | None = Field(None, ge=1, description="Passes over the training rows; null: as `min_steps` says.")
    min_steps: int | None = Field(
        None, ge=1, description="As many passes as make this many steps; null: 32, where `epochs` is null too."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps.")
    batch_pairs: int = Field(16, ge=1, description="Pairs of one optimizer step, over all workers.")
    micro_batch_tokens: int | None = Field(
        None, ge=16, description="Token budget of one forward pass of one worker; null: 512 on CPUs, 8192 on GPUs."
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute type; adapters stay fp32.")
    attention: Literal["sdpa", "flex", "varlen", "plain"] = Field(
        "sdpa",
        description="Backend of packed attention; `flex` and `varlen` need a GPU. `plain`: each response is a row of its own.",
    )
    seed: int = Field(0, ge=0, description="Seed of adapters, order and dropout.")
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    held_out_every: int | None = Field(None, ge=1, description="Steps between held-out measurements; last step always.")
    canary_every: int | None = Field(None, ge=1, description="Steps between greedy answers to a few held-out prompts.")
    activation_checkpointing: bool = Field(False, description="Recompute activations in backward.")

    @field_validator("objective")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OBJECTIVE_OPTIONS and not _FUNCTION.fullmatch(name):
            near = difflib.get_close_matches(name, OBJECTIVE_OPTIONS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(OBJECTIVE_OPTIONS)}"
            msg = f"unknown objective `{name}`; {hint} (a function of your own is `package.module:function`)"
            raise ValueError(msg)
        return name

    @field_validator("options")
    @classmethod
    def _complete(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Check the options of an objective that ships, and fill in its defaults."""
        known = OBJECTIVE_OPTIONS.get(info.data.get("objective", ""))
        return options if known is None else known.model_validate(options).model_dump(by_alias=True)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSection":
        if self.attention == "varlen" and self.dtype == "float32":
            msg = "`attention: varlen` computes in half precision only: set `dtype: bfloat16`, or `attention: flex`"
            raise ValueError(msg)
        if self.adapter == "full" and self.reference == "adapter_off":
            msg = "`reference: adapter_off` needs `adapter: lora`: full fine-tuning has no adapter to switch off"
            raise ValueError(msg)
        if self.objective in REFERENCE_FREE and "reference" in self.model_fields_set:
            msg = f"`reference` has no effect with `objective: {self.objective}`: remove it"
            raise ValueError(msg)
        if self.adapter == "full" and "lora" in self.model_fields_set:
            msg = "`lora` has no effect with `adapter: full`: remove it"
            raise ValueError(msg)
        if self.epochs is not None and self.min_steps is not None:
            msg = f"`epochs` = {self.epochs} and `min_steps` = {self.min_steps} both say how often the rows are passed: remove one"
            raise ValueError(msg)
        if self.min_steps is not None and self.max_steps is not None and self.min_steps > self.max_steps:
            msg = f"`min_steps` = {self.min_steps} is more than `max_steps` = {self.max_steps}"
            raise ValueError(msg)
        if self.sharding == "zero3" and self.adapter == "lora" and self.lora.variant == "dora":
            # Its layers read the weight of the base outside of the base's own forward, where it is a slice (peft, dora.py).
            msg = "`lora.variant: dora` cannot be trained with `sharding: zero3`: use `lora` or `rslora`, or `sharding: none`"
            raise ValueError(msg)
        if self.sharding == "zero3" and self.attention == "plain":
            # A forward for each answer, and workers have different numbers of them.
            msg = "`attention: plain` cannot be had with `sharding: zero3`: remove one"
            raise ValueError(msg)
        if self.sharding == "zero3" and self.canary_every is not None:
            # Workers whose answers end at different tokens would wait for one another.
            msg = "`canary_every` cannot be had with `sharding: zero3`: remove it"
            raise ValueError(msg)
        if self.offload and self.sharding != "zero3":
            msg = "`offload` has no effect without `sharding: zero3`: remove it"
            raise ValueError(msg)
        if "reference" in self.offload and self.reference != "sharded":
            msg = f"`offload: [reference]` has no effect with `reference: {self.reference}`: remove it"
            raise ValueError(msg)
        return self

    def token_budget(self, device: str) -> int:
        """Return the tokens of a micro-batch on this type of device, `cpu` or another.

        A CPU computes 512 tokens as fast as 2048, in 60 % of the memory (docs/training.md). A GPU starves on so few; its 8192
        is half of what TRL's batch holds at most by default. It was not measured, and is halved where memory does not hold it.
        """
        return self.micro_batch_tokens or (_CPU_TOKENS if device == "cpu" else _GPU_TOKENS)


class WorkerSection(Section):
    """What the train job asks of the cluster."""

    workers: int = Field(1, ge=1, description="Train workers.")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of one train worker.")
    threads_per_worker: int | None = Field(None, ge=1, description="Torch threads; default: cpus_per_worker.")
    use_gpu: bool = Field(False, description="One GPU for each worker (NCCL).")
    max_failures: int = Field(3, ge=0, description="Restarts of the worker group before the run fails.")

    @property
    def device(self) -> str:
        """The type of device that a worker computes on."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def threads(self) -> int:
        """Threads with which a worker computes."""
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))


class RuleSection(Section):
    """One rule of the gate: what it looks at, and what that must be."""

    metric: str = Field(..., min_length=1, description="Name of what was measured, as reports have it.")
    bound: Literal["value", "low", "high"] = Field("value", description="The number itself, or an end of its interval.")
    comparison: Literal[">", ">=", "<", "<="] = Field(..., description="How it must stand to the threshold.")
    threshold: float = Field(..., description="What it is held against.")
    decides: Literal["must", "warn"] = Field("must", description="`must` holds the model where it fails.")
    absent: Literal["hold", "pass"] = Field("hold", description="What it says where the recipe measures no such thing.")


GATE_RULES: Mapping[str, Mapping[str, Any]] = {
    "judged_prompts": {"metric": "prompts", "comparison": ">=", "threshold": 100},
    "judge": {"metric": "judge.usable", "comparison": ">=", "threshold": 1, "absent": "pass"},
    "judge_independent": {"metric": "judge.independent", "comparison": ">=", "threshold": 1, "absent": "pass"},
    "null_model": {"metric": "null_model", "bound": "high", "comparison": "<", "threshold": 0.5, "absent": "pass"},
    "win_rate_champion": {"metric": "win_rate.champion", "bound": "low", "comparison": ">", "threshold": 0.5},
    "win_rate_sft": {"metric": "win_rate.sft", "bound": "low", "comparison": ">", "threshold": 0.5},
    "reward_accuracy": {"metric": "reward_accuracy", "bound": "low", "comparison": ">", "threshold": 0.5},
    "length_ratio_min": {"metric": "length_ratio", "comparison": ">=", "threshold": 0.7},
    "length_ratio_max": {"metric": "length_ratio", "comparison": "<=", "threshold": 1.4},
    "golden_pass_rate": {"metric": "golden.must_pass", "comparison": ">=", "threshold": 1.0, "absent": "pass"},
    "finished": {"metric": "finished.change", "comparison": ">=", "threshold": -0.1},
    "repetition": {"metric": "repetition.change", "comparison": "<=", "threshold": 0.1},
    "distinct": {"metric": "distinct.ratio", "comparison": ">=", "threshold": 0.5},
    "relevance": {"metric": "relevance.ratio", "comparison": ">=", "threshold": 0.5},
    "perplexity": {"metric": "perplexity.ratio", "comparison": "<=", "threshold": 1.25, "absent": "pass"},
    "over_refusal": {"metric": "refusal.safe.rise", "comparison": "<=", "threshold": 0.05, "absent": "pass"},
    "displacement": {
        "metric": "chosen_change",
        "comparison": ">=",
        "threshold": -0.5,
        "decides": "warn",
        "absent": "pass",
    },
}
"""The rules that hold where a recipe says nothing; it changes a value of one, adds its own, or sets one to null."""


class GateSection(Section):
    """The rules that decide SHIP or HOLD."""

    level: float = Field(0.95, gt=0.5, lt=1, description="Confidence level of every interval.")
    rules: dict[str, RuleSection | None] = Field(
        {}, validate_default=True, description="By name, on top of the usual ones; null: without this one."
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _on_top(cls, rules: Any) -> Any:
        if not isinstance(rules, Mapping):
            return rules
        changed = {
            name: {**GATE_RULES.get(name, {}), **rule} if isinstance(rule, Mapping) else rule
            for name, rule in rules.items()
        }
        return {**GATE_RULES, **changed}


class EndpointSection(Section):
    """An OpenAI-compatible endpoint."""

    url: str = Field(..., pattern=r"^https?://", description="Base of the endpoint, with its /v1.")
    api_key_variable: str | None = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key; null: the endpoint wants none."
    )
    concurrency: int = Field(8, ge=1, description="Requests side by side.")
    timeout_s: float = Field(120, gt=0, description="A request that takes longer is repeated.")
    retries: int = Field(4, ge=0, description="Repetitions of a request that failed, with growing pauses.")


class JudgeSection(EndpointSection):
    """A model that judges, behind an OpenAI-compatible endpoint."""

    model: str = Field(..., min_length=1, description="The judge, as the endpoint names it.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of a judgement.")
    max_tokens: int = Field(2048, ge=16, description="Token limit of a judgement; one that is cut has no verdict.")
    requests_per_minute: float | None = Field(None, gt=0, description="Pace of requests; null: not limited.")
    budget_tokens: int | None = Field(
        None, ge=1, description="The evaluation stops where its judgements took this many tokens; null: no limit."
    )


class RewardJudgeSection(Section):
    """A model that was trained on preferences judges by its implicit reward (https://arxiv.org/abs/2305.18290, eq. 5)."""

    model: str = Field(..., description="Id of a model of the home: its log-probability of an answer is one side.")
    reference: str = Field(..., description="Id of the model that it was trained against: the other side.")


class ArenaHardSection(Section):
    """Arena-Hard: both games on every question, against the answers of a baseline."""

    questions: str = Field(..., description="JSONL of questions, as Arena-Hard has them.")
    baseline: str | dict[str, str] = Field(..., description="JSONL of the baseline's answers, or one by category.")
    max_questions: int | None = Field(None, ge=1, description="Use the first N questions.")


class MtBenchSection(Section):
    """MT-Bench: two turns, graded from 1 to 10, and in pairs against the champion."""

    questions: str = Field(..., description="JSONL of questions, as FastChat has them.")
    references: str | None = Field(None, description="JSONL of right answers, for questions that have one.")
    max_questions: int | None = Field(None, ge=1, description="Use the first N questions.")


class AlpacaSection(Section):
    """AlpacaEval: win rate over given outputs, raw and at equal length."""

    questions: str = Field(..., description="JSON of `instruction`, `input`, `output`, as AlpacaEval has them.")
    max_questions: int | None = Field(None, ge=1, description="Use the first N instructions.")


class RefusalSection(Section):
    """XSTest: what is refused of safe and of unsafe requests."""

    questions: str = Field(..., description="CSV of prompts, as XSTest has them.")
    max_questions: int | None = Field(None, ge=2, description="Use N prompts, half of them safe.")


class EvaluateSection(Section):
    """What the candidate is measured on."""

    prompts: str = Field(..., description="JSONL of held-out prompts (`prompt`, optional `id`, `cluster`).")
    sealed: str | None = Field(
        None, description="JSONL of prompts that `ship` alone opens: the gate must say SHIP on them too."
    )
    judge_rules: str | None = Field(None, description="JSON of rules that stand in for a judge: name, rules, edits.")
    judge: JudgeSection | None = Field(None, description="A model that judges, in place of rules.")
    reward_judge: RewardJudgeSection | None = Field(
        None, description="A model whose implicit reward judges, in place of rules."
    )
    endpoint: EndpointSection | None = Field(
        None, description="Where the models answer, served by their ids; null: they are loaded by the job."
    )
    null_model_prompts: int | None = Field(None, ge=6, description="Prompts on which constant answers are judged.")
    arena_hard: ArenaHardSection | None = Field(None, description="Suite; left out by default.")
    mt_bench: MtBenchSection | None = Field(None, description="Suite; left out by default.")
    alpaca: AlpacaSection | None = Field(None, description="Suite; left out by default.")
    refusal: RefusalSection | None = Field(None, description="Suite; left out by default.")
    golden: str | None = Field(None, description="JSONL of golden prompts with `must` / `must_not` patterns.")
    neutral_text: str | None = Field(None, description="Text file for perplexity.")
    max_prompts: int | None = Field(None, ge=1, description="Use the first N prompts.")
    max_new_tokens: int = Field(256, ge=1, description="Token limit of an answer; cut answers are invalid.")
    batch_size: int = Field(16, ge=1, description="Answers generated together.")
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples of the prompt-cluster bootstrap.")
    gate: GateSection = GateSection()

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateSection":
        ways = ("judge", "judge_rules", "reward_judge")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            msg = f"the win rate needs one judge: give `judge`, `judge_rules` or `reward_judge`, {' and '.join(given) or 'none'} is given"
            raise ValueError(msg)
        judged = [name for name in ("null_model_prompts", "arena_hard", "mt_bench", "alpaca") if getattr(self, name)]
        if self.judge is None and judged:
            msg = f"`{judged[0]}` needs a model that judges: add `judge`, nothing else reads other people's questions"
            raise ValueError(msg)
        return self


class ServingSection(Section):
    """The gateway and the replicas behind it."""

    host: str = Field("127.0.0.1", description="Address the gateway binds to.")
    port: int = Field(8000, ge=1, le=65535, description="Port of the gateway.")
    deployment: str = Field("default", description="Name of the deployment whose champion is served.")
    replicas: int = Field(1, ge=1, description="Replicas of the champion; production recipes use at least 2.")
    cpus_per_replica: float = Field(1, ge=0, description="CPUs of one replica.")
    threads_per_replica: int | None = Field(None, ge=1, description="Torch threads of one replica.")
    gpus_per_replica: float = Field(0, ge=0, description="GPUs of one replica.")
    max_batch_size: int = Field(16, ge=1, description="Requests generated together.")
    batch_wait_s: float = Field(0.05, ge=0, description="How long the first request of a batch waits for company.")
    max_queued_requests: int = Field(256, ge=1, description="More waiting requests than this get 429.")
    max_tokens: int = Field(256, ge=1, description="Default and upper limit of tokens of an answer.")
    request_timeout_s: float = Field(300, gt=0, description="A request older than this ends with 408.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute type of a replica.")


class TrackSection(Section):
    """Sinks for the metrics of a run, beside the ledger; address and key are in their own environment variables."""

    to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field((), description="Which; none by default.")
    project: str | None = Field(None, description="MLflow's experiment, W&B's project; default: `prefloop`.")

    @model_validator(mode="after")
    def _consistent(self) -> "TrackSection":
        if self.project is not None and not {"mlflow", "wandb"} & set(self.to):
            msg = "`project` has no effect without `mlflow` or `wandb` in `to`: remove it"
            raise ValueError(msg)
        return self


class Recipe(Section):
    """One recipe drives every job."""

    name: str = Field(..., pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Names runs and models.")
    model: ModelSection = ModelSection()
    collect: CollectSection | None = Field(None, description="Simulated audience; without it real users are awaited.")
    pairs: PairSection = PairSection()
    prepare: PrepareSection = PrepareSection()
    train: TrainSection = TrainSection()
    workers: WorkerSection = WorkerSection()
    evaluate: EvaluateSection | None = None
    serving: ServingSection = ServingSection()
    track: TrackSection = TrackSection()
    snapshot: str | None = Field(None, description="Pair snapshot to use; default: built from the ledger.")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.train.reference == "adapter_off" and self.model.start != self.model.reference_model:
            msg = (
                "`train.reference: adapter_off` scores the reference with the policy's own base, so `model.start` and "
                "`model.reference_model` must name the same model; use `train.reference: precomputed`"
            )
            raise ValueError(msg)
        if self.train.objective in REFERENCE_FREE and "reference_model" in self.model.model_fields_set:
            msg = f"`model.reference_model` has no effect with `train.objective: {self.train.objective}`: remove it"
            raise ValueError(msg)
        if self.train.attention in ("flex", "varlen") and not self.workers.use_gpu:
            msg = f"`train.attention: {self.train.attention}` needs a GPU: set `workers.use_gpu`, or `train.attention: sdpa`"
            raise ValueError(msg)
        if self.train.offload and not self.workers.use_gpu:
            msg = "`train.offload` has no effect on CPUs, where all is in their memory already: remove it, or set `workers.use_gpu`"
            raise ValueError(msg)
        if self.collect is not None and self.collect.max_tokens > self.serving.max_tokens:
            msg = f"`collect.max_tokens` = {self.collect.max_tokens} is more than `serving.max_tokens` = {self.serving.max_tokens}, which the gateway refuses"
            raise ValueError(msg)
        return self

    def evaluation(self) -> EvaluateSection:
        """Return the `evaluate` section; raises RecipeError where the recipe has none."""
        if self.evaluate is None:
            msg = f"recipe `{self.name}` has no section `evaluate`\n\nHint: add `evaluate: {{prompts: …, judge_rules: …}}`."
            raise RecipeError(msg)
        return self.evaluate


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as ``train.epochs=2``.

    Raises:
        RecipeError: the file is missing or no mapping, an override is malformed, or keys or values are wrong (all of
            them are listed, with the nearest known key).
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        msg = f"no recipe at `{path}`\n\nHint: recipes here: {', '.join(known) or 'none'}."
        raise RecipeError(msg) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"recipe `{path}` cannot be read: {error}"
        raise RecipeError(msg) from None
    if not isinstance(tree, dict):
        msg = f"recipe `{path}` must be a mapping of sections, found {type(tree).__name__}"
        raise RecipeError(msg)
    evaluation = tree.get("evaluate")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("gate"), str):
        evaluation["gate"] = _gate_file(evaluation["gate"])
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, place=str(path))


def _gate_file(place: str) -> Any:
    """Read the gate from a file of its own, which several recipes may share."""
    try:
        return yaml.safe_load(Path(place).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"the gate `{place}` (evaluate.gate) cannot be read: {error}"
        raise RecipeError(msg) from None


def parse_recipe(tree: dict[str, Any], *, place: str) -> Recipe:
    """Validate a tree of plain values; raises RecipeError with every fault of it."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault, tree)}" for fault in error.errors())
        msg = f"recipe `{place}` has {error.error_count()} fault(s):\n{faults}"
        raise RecipeError(msg) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        msg = f"override `{override}` is not of the form `section.key=value`"
        raise RecipeError(msg)
    *sections, key = dotted.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            msg = f"override `{override}`: `{section}` is a value, not a section"
            raise RecipeError(msg)
        node = child
    try:
        node[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        msg = f"override `{override}`: the value is not YAML: {error}"
        raise RecipeError(msg) from None


def deciding(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe (plain values) by name, such as `train.seed`, without those of `SAME_STEPS`."""
    return {name: value for name, value in _flat(tree).items() if name not in SAME_STEPS}


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings in which two recipes differ; those of `SAME_STEPS` do not count."""
    before, after = deciding(old), deciding(new)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return found


def _describe(fault: Any, tree: Mapping[str, Any]) -> str:
    location = [str(part) for part in fault["loc"]]
    place = ".".join(location) or "recipe"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], tree)
        if location[:-1] == ["train"] and location[-1] in _known_keys(["train", "options"], tree):
            return f"`{place}`: unknown key; it is `train.options.{location[-1]}`"
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known) or 'none'}"
        return f"`{place}`: unknown key{hint}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    value = fault.get("input")
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool | None) else ""
    return f"`{place}`: {message}{shown}"


def _options_of(tree: Mapping[str, Any]) -> type[Section]:
    name = tree["train"].get("objective", "dpo")
    return OBJECTIVE_OPTIONS.get(name, Section) if isinstance(name, str) else Section


def _known_keys(sections: Sequence[str], tree: Mapping[str, Any]) -> list[str]:
    node: type[BaseModel] = Recipe
    for section in sections:
        if (node, section) == (TrainSection, "options"):
            node = _options_of(tree)
            continue
        annotation = node.model_fields[section].annotation if section in node.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        node = nested[0]
    return sorted(field.alias or name for name, field in node.model_fields.items())
