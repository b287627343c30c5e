"""What the work costs: floating-point operations of an arm by its shapes, and what this machine can do.

Matrix products only, two operations for a multiplication with its addition; attention counts what is computed: a padded
batch computes the whole square, a packed group only what lies under the diagonal. With adapters the backward pass has no
weight gradients but the adapters' own, which are left out. See `notes` in docs/training.md for what the two trainers do.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from app.bench.arms import Arm, Measured
from app.bench.work import Work
from app.training.tokenization import Group

_SHAPES = ((2048, 576, 1536), (2048, 1536, 576), (1024, 1024, 1024), (2048, 2048, 2048))
_MEASURE_S = 0.5


@dataclass(frozen=True)
class ModelShape:
    """Parameters that a token passes through in matrix products."""

    backbone: int
    head: int
    attention: int
    """Layers x heads x dimension of a head: multiplications of a query with a key, once for scores and once for values."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelShape":
        """Read it off a model."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            backbone=sum(m.weight.numel() for m in linear),
            head=head.weight.numel(),
            attention=config.num_hidden_layers * config.num_attention_heads * width,
        )

    def forward(self, *, tokens: int, head_rows: int, attended: int) -> tuple[int, int, int]:
        """Return the operations of a forward pass: backbone, head, attention (`attended`: pairs of query and key)."""
        return 2 * self.backbone * tokens, 2 * self.head * head_rows, 4 * self.attention * attended


def operations(shape: ModelShape, work: Work, arm: Arm, measured: Measured) -> float:
    """Return the operations of an arm: reference, forward and backward, over all of its steps."""
    backward = 1 if work.adapter == "lora" else 2
    if arm.trainer == "prefloop":
        backbone, head, attention = shape.forward(
            tokens=sum(group.num_tokens for group in work.groups),
            head_rows=sum(map(len, _responses(work.groups))),
            attended=sum(map(_attended, work.groups)),
        )
        recompute = 0
    else:
        # On a CPU TRL's head takes every row, and its backward computes the logits again; a mask of padding makes
        # attention compute the whole square.
        backbone, head, attention = shape.forward(
            tokens=measured.computed_tokens,
            head_rows=measured.computed_tokens,
            attended=sum(rows * length * length for rows, length in measured.shapes),
        )
        recompute = 1
    # Attention has no weights: its backward is two products for each, whatever trains.
    units = (2 + backward, 2 + backward + recompute, 4)
    again = 1 if arm.checkpointing else 0
    return float(backbone * (units[0] + again) + head * units[1] + attention * (units[2] + again))


def gemm_peak(dtype: str, threads: int) -> float:
    """Measure the best rate of a matrix product of the sizes that training has, in operations a second."""
    torch.set_num_threads(threads)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    best = 0.0
    for rows, inner, columns in _SHAPES:
        left, right = torch.randn(rows, inner, dtype=kind), torch.randn(columns, inner, dtype=kind)
        left @ right.T
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < _MEASURE_S:
            left @ right.T
            count += 1
        best = max(best, 2 * rows * inner * columns * count / elapsed)
    return best


def _attended(group: Group) -> int:
    prompt = len(group.prompt_ids)
    shared = prompt * (prompt + 1) // 2
    return shared + sum(n * prompt + n * (n + 1) // 2 for n in map(len, group.responses))


def _responses(groups: Iterable[Group]) -> list[tuple[int, ...]]:
    return [response for group in groups for response in group.responses]
