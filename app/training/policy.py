"""The policy: a scoring model with something to train, its reference, and the weights it leaves behind.

With adapters the frozen base stays in the compute type and the adapters are fp32; full fine-tuning keeps fp32 master
weights and leaves them so, since a step at its learning rates is smaller than what bf16 can tell apart. The reference
is read from the snapshot (`precomputed`), scored with the adapters switched off (`adapter_off`), or a frozen model beside
the policy (`sharded`); all three give the same numbers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from app.config import TrainSection
from app.errors import ModelError, TrainingError
from app.models import LoadedModel
from app.training.batch import PackedBatch
from app.training.scoring import ScoringModel, without_noise


def build_policy(start: LoadedModel, section: TrainSection, *, agreement: bool = False) -> ScoringModel:
    """Make the trainable policy out of the start model; equal seeds give equal adapters on every worker.

    Args:
        start: the model that training begins with.
        section: adapters, checkpointing, seed.
        agreement: see `ScoringModel`.

    Raises:
        ModelError: one of `lora.target_modules` names no layer that can take an adapter. Embeddings cannot: where input
            and output share their weights, an adapter that was trained on one side would be merged into both.
    """
    torch.manual_seed(section.seed)
    if section.adapter == "full":
        model = start.model.requires_grad_(requires_grad=True)
        if section.activation_checkpointing:
            _recompute(model)
        return ScoringModel(model, agreement=agreement, backend=section.attention)
    config = LoraConfig(
        r=section.lora.r,
        lora_alpha=section.lora.alpha,  # type: ignore[arg-type]  # a float works, the annotation says int
        target_modules=list(section.lora.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=section.lora.variant == "rslora",
        use_dora=section.lora.variant == "dora",
    )
    head = start.model.get_output_embeddings()
    layers = {
        name: name.rsplit(".", 1)[-1]
        for name, module in start.model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    # peft passes over a name that fits nothing as long as another one fits.
    unknown = [t for t in section.lora.target_modules if not any(n == t or n.endswith(f".{t}") for n in layers)]
    if unknown:
        msg = f"`{start.model_id}` has no layer {', '.join(f'`{name}`' for name in unknown)} that can take an adapter, as lora.target_modules asks\n\nHint: its layers are {', '.join(sorted(set(layers.values())))}."
        raise ModelError(msg)
    try:
        adapted = get_peft_model(start.model, config)
    except ValueError as error:
        msg = f"adapters do not fit `{start.model_id}`: {error}"
        raise ModelError(msg) from None
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            # Autocast casts what an adapter computes with; peft would first copy its input to fp32.
            module.cast_input_dtype_enabled = False
    if section.activation_checkpointing:
        adapted.enable_input_require_grads()
        _recompute(adapted)
    return ScoringModel(adapted, agreement=agreement, backend=section.attention)


def _recompute(model: PreTrainedModel | PeftModel) -> None:
    """Keep no activations of its layers for backward.

    A layer does so while it is in training mode, in which some (OPT's, BioGPT's) also drop out at random; within their
    forward they are in the mode of the whole model, see `without_noise`.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer._gradient_checkpointing_func = _in_mode_of(model, layer, layer._gradient_checkpointing_func)


def _in_mode_of(model: torch.nn.Module, layer: torch.nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(forward: Callable[..., Any], *inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            layer.training = model.training
            try:
                return forward(*given)
            finally:
                layer.training = True

        return checkpoint(run, *inputs)

    return checkpointed


def trainable(policy: ScoringModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that train, by name, in a fixed order."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """Compute in bf16 where the recipe says so; fp32 is left alone."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


Reference = Callable[[PackedBatch], Tensor]
"""Batch (on the policy's device) -> [N] log-probabilities of the frozen reference, in nats, without gradients."""


def precomputed(batch: PackedBatch) -> Tensor:
    """Read what the reference gave when the snapshot was prepared; raises TrainingError where it is not there."""
    if batch.reference_logps is None:
        msg = "the training snapshot has no reference log-probabilities\n\nHint: run `prefloop prepare` with `train.reference: precomputed`."
        raise TrainingError(msg)
    return batch.reference_logps.to(torch.float32)


def adapter_off(policy: ScoringModel, dtype: str) -> Reference:
    """Score with the policy's own base: no second model, but two more forwards of it."""
    adapted = policy.model
    assert isinstance(adapted, PeftModel)  # noqa: S101  the recipe refuses adapter_off without adapters

    def score(batch: PackedBatch) -> Tensor:
        training = policy.training
        without_noise(policy)
        with torch.no_grad(), adapted.disable_adapter(), autocast(batch.input_ids.device, dtype):
            logps = _logps(policy, batch)
        if training:
            policy.train()
        return logps

    return score


def frozen(model: ScoringModel, dtype: str) -> Reference:
    """Score with a model of its own, which never trains and stays in evaluation mode."""
    model.requires_grad_(requires_grad=False).train(mode=False)

    def score(batch: PackedBatch) -> Tensor:
        with torch.no_grad(), autocast(batch.input_ids.device, dtype):
            return _logps(model, batch)

    return score


def merged(policy: ScoringModel) -> ScoringModel:
    """Fold the adapters into the base, layer by layer in fp32, and return what scores with the plain model."""
    adapted = policy.model
    if not isinstance(adapted, PeftModel):
        return policy
    for layer in adapter_layers(policy):
        merge_layer(layer)
    return ScoringModel(adapted.unload(), agreement=policy.agreement, backend=policy.backend)


def adapter_layers(policy: ScoringModel) -> list[LoraLayer]:
    """Return the layers that carry adapters."""
    return [module for module in policy.model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def merge_layer(layer: Any, dtype: torch.dtype | None = None) -> None:
    """Fold one layer's adapters into its weight, in fp32, and round it to a type; None: that of the weight."""
    weight: Tensor = layer.get_base_layer().weight
    merged = weight.float()
    for name in layer.active_adapters:
        merged = merged + layer.get_delta_weight(name).float()
        if name in layer.lora_magnitude_vector:
            outputs = 1 if isinstance(layer.get_base_layer(), Conv1D) else 0
            # peft rounds the norms to the base's type, those that the magnitudes began with too.
            norms = merged.norm(dim=1 - outputs, keepdim=True).to(weight.dtype).float()
            magnitude: Tensor = layer.lora_magnitude_vector[name].weight.float()
            merged = merged * (magnitude.view_as(norms) / norms)
    weight.copy_(merged.to(dtype or weight.dtype))


def _logps(policy: ScoringModel, batch: PackedBatch) -> Tensor:
    logps: Tensor = policy(batch).logps
    return logps
