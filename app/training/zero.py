"""DeepSpeed ZeRO-3: weights, gradients and moments lie in slices over the workers (https://arxiv.org/abs/1910.02054).

A layer's weights are gathered while it computes and let go behind it; so every forward and backward is a row of
collectives, the same on every rank (`Workers.rounds`). A frozen reference is a second such module without optimizer. Its
settings keep nothing gathered: no small weights that stay, no layers that wait for their next use, nothing fetched ahead.

DeepSpeed averages gradients over workers, so losses are multiplied by their number; its own accumulation counts and
loss scales are off. It compiles nothing: the shared-memory operator of its CPU backend is marked as missing, because it
would ask for ninja and a compiler at start (`deepspeed/comm/torch.py`), and torch's own collectives do.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final, cast

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from app.errors import ModelError
from app.training.engine import MOMENTS, Stored, Workers, make_optimizer, set_learning_rate, slice_of
from app.training.policy import adapter_layers, merge_layer, trainable
from app.training.scoring import ScoringModel, causal_model

_FILE_BYTES: Final = 2 << 30
_DEVICE: Final = partition_parameters.DeepSpeedTensorOverride.device


_COLLECTIVES: Final = {
    "all_gather": ("tensor", 1),
    "all_gather_coalesced": ("input_tensors", 1),
    "all_gather_into_tensor": ("input_tensor", 1),
    "all_reduce": ("tensor", 0),
    "broadcast": ("tensor", 0),
    "reduce": ("tensor", 0),
    "reduce_scatter": ("input_list", 1),
    "reduce_scatter_tensor": ("input_tensor", 1),
}
"""Those that DeepSpeed asks torch for, with the name and the place of the argument that a worker gives to them."""


def join(device: torch.device, *, count: Callable[[int], None]) -> None:
    """Let DeepSpeed use the process group that is there; call it once, before any other function of this module.

    Args:
        device: where this worker computes.
        count: told the bytes that this worker gives to a collective, for each one; a broadcast counts on every worker.

    Raises:
        ModelError: DeepSpeed took another kind of device for its own; it looks for GPUs whoever they belong to, unless
            `DS_ACCELERATOR` says otherwise before it is imported.
    """
    if get_accelerator().device_name() != device.type:
        msg = f"DeepSpeed computes on `{get_accelerator().device_name()}` and this worker on `{device.type}`\n\nHint: set DS_ACCELERATOR={device.type} in the environment of the workers."
        raise ModelError(msg)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, dist_init_required=False)
    # DeepSpeed would make this clone of the group of all workers itself, in which they wait half an hour for one another.
    everyone: Any = torch.distributed.distributed_c10d._get_default_group()
    timeout = everyone._get_backend(device).options._timeout
    deepspeed.utils.groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)
    backend_of_torch = deepspeed.comm.comm.cdb
    for name, (given, place) in _COLLECTIVES.items():
        setattr(backend_of_torch, name, _counted(getattr(backend_of_torch, name), given, place, count))


def _counted(
    collective: Callable[..., Any], given: str, place: int, count: Callable[[int], None]
) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        # DeepSpeed's own decorators hide the signature.
        found = more[given] if given in more else arguments[place]
        count(sum(tensor.nbytes for tensor in ([found] if isinstance(found, Tensor) else found)))
        return collective(*arguments, **more)

    return call


class Zero3:
    """A policy in slices."""

    def __init__(
        self,
        policy: ScoringModel,
        *,
        learning_rate: float,
        max_grad_norm: float,
        workers: Workers,
        weight_decay: float = 0.0,
        offload: bool = False,
    ) -> None:
        keep_head(policy)
        names = trainable(policy)
        optimizer = make_optimizer(
            list(names.values()), learning_rate, weight_decay=weight_decay, dimensions=lambda p: len(_shape(p))
        )
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            config=_config(max_grad_norm=max_grad_norm, optimizer_on_cpu=offload),
            dist_init_required=False,
        )
        self._offload = offload
        self.policy = policy
        self._names = {id(parameter): name for name, parameter in names.items()}
        self._workers = workers

    @property
    def device(self) -> torch.device:
        """Where its batches belong."""
        return torch.device(self._engine.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss to that of the step; DeepSpeed averages, we add up."""
        self._engine.backward(loss * self._workers.size, scale_wrt_gas=False)
        # As `engine.forward` would before the next one: else each micro-batch's gradient replaces the one before.
        self._engine.optimizer.clear_backward_seen_flag()

    def step(self, learning_rate: float) -> float:
        """Clip, update and forget the gradients; return the norm before clipping."""
        set_learning_rate(self._engine.optimizer, learning_rate)
        self._engine.step()
        if self._engine.optimizer.overflow:
            return math.nan
        return float(self._engine.get_global_grad_norm())

    def gradients(self) -> list[Tensor]:
        """Return this rank's slices, added up over ranks."""
        zero = self._engine.optimizer
        if self._offload:
            zero.finalize_gradient_accumulation_boundary()
            get_accelerator().synchronize()  # they are on their way to the CPU
            return [flat.grad.clone() for flat in zero.fp32_partitioned_groups_flat]
        return [part.clone() for number in sorted(zero.averaged_gradients) for part in zero.averaged_gradients[number]]

    def discard(self) -> None:
        """Forget the gradients of the step."""
        self._engine.optimizer._overflow_clean_up(1.0)

    def state(self) -> dict[str, Tensor]:
        """Return this rank's slices of weights and moments."""
        kept: dict[str, Tensor] = {}
        for name, flat, start, stop in self._slices():
            kept[f"parameter/{name}"] = flat.detach()[start:stop].clone().cpu()
            moments = self._inner.state.get(flat, {})
            for key in MOMENTS:
                if key in moments:
                    kept[f"optimizer/{key}/{name}"] = moments[key][start:stop].clone().cpu()
            if "step" in moments and self._workers.rank == 0:
                kept[f"optimizer/step/{name}"] = torch.as_tensor(moments["step"]).reshape(1).clone().cpu()
        return kept

    def ranks_to_read(self, ranks: int) -> Iterable[int]:
        """Return this rank, and the first, which keeps the counts of steps; all, where slices were others."""
        return sorted({0, self._workers.rank}) if ranks == self._workers.size else range(ranks)

    def restore(self, stored: Stored) -> None:
        """Put this rank's slices back, from however many ranks they came."""
        for name, flat, start, stop in self._slices():
            self._fill(stored, f"parameter/{name}", flat.data, start, stop)
            if stored(f"optimizer/step/{name}") is None:
                continue
            if flat not in self._inner.state:
                self._inner.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._inner.state[flat]["step"] = slice_of(stored, f"optimizer/step/{name}", 0, 1).squeeze().to(flat.device)
            for key in MOMENTS:
                self._fill(stored, f"optimizer/{key}/{name}", self._inner.state[flat][key], start, stop)
        for number in range(len(self._engine.optimizer.fp16_groups)):
            self._engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return cast("torch.optim.Optimizer", self._engine.optimizer.optimizer)

    def _slices(self) -> Any:
        """Yield name, flat tensor of its sub-group, and where this rank's slice of the parameter lies in it."""
        zero = self._engine.optimizer
        for flat, members in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            start = 0
            for parameter in members:
                stop = start + parameter.partition_numel()
                yield self._names[id(parameter)], flat, start, stop
                start = stop

    def _fill(self, stored: Stored, name: str, into: Tensor, start: int, stop: int) -> None:
        tensor = stored(name)
        assert tensor is not None, name  # noqa: S101
        width = stop - start
        first = self._workers.rank * width
        if first >= tensor.numel:
            return  # this rank's slice is all filling
        found = tensor.slice(first, min(first + width, tensor.numel))
        into[start : start + len(found)].copy_(found)


def frozen_in_slices(model: ScoringModel, *, on_cpu: bool = False) -> ScoringModel:
    """Slice a model that never trains: no optimizer, no gradients; its slices may wait in the memory of the CPU."""
    keep_head(model)
    model.requires_grad_(requires_grad=False).train(mode=False)
    settings = _config(max_grad_norm=0.0, parameters_on_cpu=on_cpu)
    if _slice(next(model.parameters())).dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
    assert not isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3), "moments and gradients of what never trains"  # noqa: S101
    return cast("ScoringModel", engine.module)


def keep_head(model: ScoringModel) -> None:
    """Have the head gathered once in a forward and once in a backward, however many chunks of rows it is called for."""
    for parameter in model.head_parameters():
        deepspeed.zero.register_external_parameter(model.head, parameter)


class _Slicing(deepspeed.zero.Init):  # type: ignore[misc]  # DeepSpeed has no annotations
    """Slices a model while it is made, module by module, and says what that takes."""

    def __init__(self, settings: Mapping[str, Any], watch: Callable[[int], None]) -> None:
        super().__init__(config_dict_or_path=settings, tensor_overrides=[_DEVICE])
        self._watch, self._slices = watch, 0

    def _post_init_method(self, module: nn.Module) -> None:
        made: list[Any] = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_tensor")]
        self._watch(self._slices + sum(p.nbytes for p in made))
        super()._post_init_method(module)
        self._slices += sum(p.ds_tensor.nbytes for p in made)


def _unwatched(_: int) -> None:
    """Nobody wants to know."""


def load_in_slices(
    folder: Path,
    dtype: torch.dtype,
    *,
    on_cpu: bool = False,
    rounded: torch.dtype | None = None,
    watch: Callable[[int], None] = _unwatched,
) -> PreTrainedModel:
    """Load the weights of a model folder so that no worker ever holds more than its slices and one tensor beside them.

    Only the first worker reads weights, and needs their files, which are mapped into its memory (safetensors copies
    nothing); what it read is divided before the next one is. Where values are rounded, the first worker has them once more
    in that type. Buffers are whole on every worker.

    Args:
        folder: config, and on the first worker safetensors.
        dtype: of the slices.
        on_cpu: the slices wait in the memory of the CPU.
        rounded: a type that values are rounded to, though they lie in `dtype`.
        watch: told of the bytes of parameters on this worker whenever some of them are whole.

    Raises:
        ModelError: the files do not hold exactly the tensors of the model, or differ where it has one.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings = {**_config(max_grad_norm=0.0, parameters_on_cpu=on_cpu), "bf16": {"enabled": dtype == torch.bfloat16}}
    # Sliced as it is made, layer by layer; the random numbers that a new model begins with are never drawn. The type goes
    # by the settings: `Init(dtype=…)` is overruled by bf16 where there is no fp16 (`_set_dtype`, a missing parenthesis).
    # Buffers keep the type that the model gives them.
    with _Slicing(settings, watch), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    # Under `Init` a head is made apart from its embedding.
    model.tie_weights()
    parameters, kept = dict(model.named_parameters()), model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    first = deepspeed.comm.get_rank() == 0
    files = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)} if first else {}
    # The others would wait for the first worker in the collectives that follow.
    told = [_unlike(model, files, {*parameters, *buffers}, kept.keys()) if first else ""]
    torch.distributed.broadcast_object_list(told, src=0)
    if told[0]:
        msg = f"model folder `{folder}` {told[0]}, so it cannot be loaded slice by slice\n\nHint: set train.sharding to `none`."
        raise ModelError(msg)

    def stored(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    slices = sum(_slice(parameter).nbytes for parameter in parameters.values())
    for name, parameter in parameters.items():
        with gathered([parameter], changed=True):
            watch(slices + parameter.nbytes)
            if first:
                parameter.data.copy_(stored(name) if rounded is None else stored(name).to(rounded))
    for name, buffer in buffers.items():
        if first:
            buffer.copy_(stored(name))
        torch.distributed.broadcast(buffer, src=0)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _unlike(model: nn.Module, files: Mapping[str, Path], wanted: Set[str], known: Set[str]) -> str:
    """Return in what the files differ from the tensors of a model; empty where they hold exactly those."""
    if missing := sorted(wanted - files.keys()):
        return f"lacks the tensor `{missing[0]}`"
    if strangers := sorted(files.keys() - known):
        return f"holds `{strangers[0]}`, which the model does not know"
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in files and own[id(parameter)] != name and not _equal(files, name, own[id(parameter)]):
            return f"holds another `{name}` than the tensor it is tied to"
    return ""


def _equal(files: Mapping[str, Path], one: str, other: str) -> bool:
    """Say whether two stored tensors are one; where only one of them is stored they are."""
    if other not in files:
        return True
    with safe_open(files[one], framework="pt") as a, safe_open(files[other], framework="pt") as b:
        return bool(torch.equal(a.get_tensor(one), b.get_tensor(other)))


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def gathered(parameters: Sequence[nn.Parameter], *, changed: bool = False) -> Any:
    """Return a context in which the parameters are whole on every rank; what the first rank changed goes back."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None)


def merge_in_slices(policy: ScoringModel, *, dtype: torch.dtype) -> ScoringModel:
    """Fold the adapters into the base, a layer at a time, round to a type, and return what scores with the plain model.

    Slices of an engine that computes in fp32 are fp32; the type is that of the model which leaves the run.
    """
    adapted = policy.model
    if not isinstance(adapted, PeftModel):
        return policy
    for layer in adapter_layers(policy):
        with gathered(list(cast("nn.Module", layer).parameters()), changed=True):
            if deepspeed.comm.get_rank() == 0:
                merge_layer(layer, dtype)
    cast("Any", adapted.base_model).disable_adapter_layers()
    return policy


def save_in_slices(policy: ScoringModel, folder: Path | None, *, dtype: torch.dtype) -> None:
    """Write the plain model of a policy, adapters left out, as a model folder of files of at most two gigabytes.

    Every rank calls it; the first one writes, and holds one file's tensors at a time.

    Args:
        policy: its weights are gathered one after the other.
        folder: where the first rank writes; None on the others.
        dtype: of what is written.
    """
    model = causal_model(policy.model)
    plain = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}
    kept = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    files = _files({name: _shape(p).numel() * dtype.itemsize for name, p in plain.items()})
    for number, names in enumerate(files, start=1):
        held: dict[str, Tensor] = {}
        for name in names:
            with gathered([plain[name]]):
                if folder is not None:
                    held[name] = plain[name].detach().to(device="cpu", dtype=dtype, copy=True)
        if folder is not None:
            last = {name: buffer.detach().cpu() for name, buffer in buffers.items()} if number == len(files) else {}
            save_file({**held, **last}, folder / _file(number, len(files)), metadata={"format": "pt"})
    if folder is None:
        return
    if len(files) > 1:
        where = {name: _file(number, len(files)) for number, names in enumerate(files, start=1) for name in names}
        where |= dict.fromkeys(buffers, _file(len(files), len(files)))
        total = sum(_shape(p).numel() for p in plain.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _files(sizes: Mapping[str, int]) -> list[list[str]]:
    """Divide tensors, in their order, into files of at most two gigabytes; a larger one has its own."""
    files: list[list[str]] = [[]]
    size = 0
    for name, count in sizes.items():
        if files[-1] and size + count > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += count
    return files


def _file(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


class Held:
    """How much of a sliced model a rank holds: its slices, and what is gathered beside them."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters: list[Any] = list(model.parameters())
        self.slices = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in self._parameters)
        self.total = sum(p.ds_numel * p.ds_tensor.element_size() for p in self._parameters)
        self.largest = max(
            sum(cast("Any", p).ds_numel * _slice(p).element_size() for p in module.parameters(recurse=False))
            for module in model.modules()
        )
        self.peak = self.slices
        self._hooks = [module.register_forward_pre_hook(self._look) for module in model.modules()]

    def _look(self, *_: object) -> None:
        beside = sum(p.data.numel() * p.data.element_size() for p in self._parameters)
        self.peak = max(self.peak, self.slices + beside)

    def close(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()


def _config(
    *, max_grad_norm: float, optimizer_on_cpu: bool = False, parameters_on_cpu: bool = False, bucket: int = 1
) -> dict[str, Any]:
    """Return DeepSpeed's settings; `bucket` is how many elements of gradients may wait to be divided."""
    offload: dict[str, Any] = {}
    if optimizer_on_cpu:
        offload["offload_optimizer"] = {"device": "cpu"}
    if parameters_on_cpu:
        offload["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            # By default a gradient stays whole until 5e8 elements wait, and as many are set aside for it.
            "contiguous_gradients": False,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            **offload,
        },
    }


def _slice(parameter: nn.Parameter) -> Tensor:
    """Return this rank's slice of a parameter."""
    return cast("Tensor", cast("Any", parameter).ds_tensor)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return cast("torch.Size", getattr(parameter, "ds_shape", parameter.shape))
