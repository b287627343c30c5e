"""What the work costs: floating-point operations of an arm by its shapes, and what this machine can do.

Matrix products only, two operations for a multiplication with its addition; attention counts what is computed: a padded
batch computes the whole square, a packed group that of its prompt and first answer in steps of 512 keys up to the diagonal,
as PyTorch's kernel for CPUs does, and of each other answer the keys that its mask is about. With adapters the backward pass has no
weight gradients but the adapters' own, which are left out.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from app.bench.arms import Arm, Measured, this_device, tokens_of
from app.bench.work import Work
from app.training.tokenization import Group

_SHAPES = ((2048, 576, 1536), (2048, 1536, 576), (1024, 1024, 1024), (2048, 2048, 2048))
_MEASURE_S = 0.5
_CAUSAL_KEYS = 512
"""Steps in which PyTorch's kernel for CPUs leaves out what causality forbids."""


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


def operations(shape: ModelShape, work: Work, arm: Arm, measured: Measured, *, compact: bool) -> float:
    """Return the operations of an arm: reference, forward and backward, over all of its steps.

    Args:
        shape: of the model.
        work: what was done.
        arm: by whom.
        measured: the shapes of its batches.
        compact: whether TRL's head takes the rows that predict answers only, as it does on GPUs, or every row.
    """
    backward = 1 if work.adapter == "lora" else 2
    again = 1 if arm.checkpointing else 0
    if arm.trainer == "prefloop":
        backbone, head, attention = shape.forward(
            tokens=sum(group.num_tokens for group in work.groups),
            head_rows=sum(map(len, _responses(work.groups))),
            attended=sum(map(_attended, work.groups)),
        )
        scores = 1 if arm.reference == "cached" else work.epochs
        # Beyond 2048 rows of answers in one forward our head computes its logits again, which is left out.
        trained = backbone * (1 + backward + again) + head * (1 + backward) + attention * (3 + again)
        return float((backbone + head + attention) * scores + trained * work.epochs)
    answered = sum(len(g.responses[i]) for g in work.groups for p in g.pairs for i in (p.chosen, p.rejected))

    def forward(shapes: Sequence[tuple[int, int]], passes: int) -> tuple[int, int, int]:
        tokens = tokens_of(shapes)
        # A mask of padding makes attention compute the whole square.
        attended = sum(rows * length * length for rows, length in shapes)
        return shape.forward(tokens=tokens, head_rows=answered * passes if compact else tokens, attended=attended)

    scored = forward(measured.score_shapes, 1) if measured.score_shapes else forward(measured.shapes, work.epochs)
    backbone, head, attention = forward(measured.shapes, work.epochs)
    # Its backward computes the logits again. Attention has no weights: its backward is two products for each.
    trained = backbone * (1 + backward + again) + head * (2 + backward) + attention * (3 + again)
    return float(sum(scored) + trained)


def gemm_peak(dtype: str, threads: int) -> float:
    """Measure the best rate of a matrix product of the sizes that training has, in operations a second."""
    torch.set_num_threads(threads)
    kind, device = torch.bfloat16 if dtype == "bfloat16" else torch.float32, this_device()
    best = 0.0
    for rows, inner, columns in _SHAPES:
        left = torch.randn(rows, inner, dtype=kind, device=device)
        right = torch.randn(columns, inner, dtype=kind, device=device)
        left @ right.T
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < _MEASURE_S:
            left @ right.T
            if device.type == "cuda":
                torch.cuda.synchronize()
            count += 1
        best = max(best, 2 * rows * inner * columns * count / elapsed)
    return best


def _attended(group: Group) -> int:
    prompt, (first, *others) = len(group.prompt_ids), map(len, group.responses)
    row = prompt + first
    causal = sum(min(row, (query // _CAUSAL_KEYS + 1) * _CAUSAL_KEYS) for query in range(row))
    return causal + sum(n * (prompt + n) for n in others)


def _responses(groups: Iterable[Group]) -> list[tuple[int, ...]]:
    return [response for group in groups for response in group.responses]
