"""What must hold before the first step: the policy is its reference, and packed rows are plain rows.

Both are shown on a few groups with the very weights, types and attention of the run. How far numbers may be apart is
what rounding makes of them; a wrong mask or another model is an order of magnitude beyond.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from app.config import TrainSection
from app.errors import TrainingError
from app.training.batch import PackedBatch
from app.training.engine import Engine, Workers
from app.training.policy import Reference, autocast
from app.training.scoring import ScoringModel, by_own_attention, plain_logps, without_noise
from app.training.tokenization import Group

NOISE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Nats for the square root of a token, root mean square over responses.

Rounding errors of tokens are independent, so they grow with the square root of a response's length: SmolLM2-135M in
bf16 is 0.04 to 0.05 from fp32, by plain rows as well as packed. Measured on four groups of the demo: packed against plain
rows 0.08, the SFT model against the first champion 1.3, stock attention on the packed row 6.8.
"""

_GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Norm of the difference of two gradients, as a share of the norm."""


def check_step_zero(
    policy: ScoringModel, groups: Sequence[Group], *, reference: Reference, section: TrainSection
) -> float:
    """Compare the untrained policy with its reference on a few groups and return how far they are apart, see `_noise`.

    Raises:
        TrainingError: the reference log-probabilities do not come from the model that the policy starts from.
    """
    device = next(policy.parameters()).device
    tolerance = NOISE_TOLERANCE[section.dtype]
    policy.train(mode=False)
    batch = PackedBatch.pack(groups).to(device)
    with torch.no_grad(), autocast(device, section.dtype):
        logps: Tensor = policy(batch).logps
    apart = _noise(logps, reference(batch), batch)
    if not apart <= tolerance:
        msg = f"policy and reference differ by {apart:.4f} nats for the root of a token before the first step (allowed: {tolerance}), so they are not the same model\n\nHint: name another model.reference_model, or score it again with `--set prepare.reuse_scores=false`."
        raise TrainingError(msg)
    return apart


@dataclass(frozen=True, slots=True)
class Trial:
    """What a few groups score, and the gradient of that."""

    logps: Tensor
    """[N], detached."""
    gradients: list[Tensor]
    """Of the log-probabilities with alternating signs for the groups: answers to one prompt are much alike, and with
    opposite signs little would be left but noise."""

    def turned(self, expected: Self, workers: Workers) -> float:
        """Return the norm of the difference of the gradients, as a share of the norm of those expected, over all ranks."""
        pairs = list(zip(expected.gradients, self.gradients, strict=True))
        squares = torch.tensor(
            [
                sum(float(theirs.double().square().sum()) for theirs, _ in pairs),
                sum(float((theirs - ours).double().square().sum()) for theirs, ours in pairs),
            ],
            dtype=torch.float64,
            device=self.logps.device,
        )
        workers.sum_(squares)
        length, apart = squares.sqrt().tolist()
        return float(apart / max(length, 1e-12))


def score_packed(engine: Engine, groups: Sequence[Group], *, dtype: str) -> Trial:
    """Score groups as one packed row."""
    without_noise(engine.policy)
    batch = PackedBatch.pack(groups).to(engine.device)
    signs = [sign for group, sign in _signed(groups) for _ in group.responses]
    with autocast(engine.device, dtype):
        logps: Tensor = engine.policy(batch).logps
    engine.backward((logps * torch.tensor(signs, device=engine.device)).sum())
    gradients = engine.gradients()
    engine.discard()
    return Trial(logps.detach(), gradients)


def score_plain(engine: Engine, groups: Sequence[Group], *, dtype: str) -> Trial:
    """Score groups as plain rows, by the model's own attention."""
    without_noise(engine.policy)
    logps = []
    rows = [
        (replace(group, responses=(response,)), sign) for group, sign in _signed(groups) for response in group.responses
    ]
    with by_own_attention(engine.policy.model):
        for row, sign in rows:
            # One graph at a time: its logits are those of all tokens.
            with autocast(engine.device, dtype):
                logp = plain_logps(engine.policy.model, [row]).sum()
            engine.backward(sign * logp)
            logps.append(logp.detach())
    gradients = engine.gradients()
    engine.discard()
    return Trial(torch.stack(logps), gradients)


def _signed(groups: Sequence[Group]) -> list[tuple[Group, float]]:
    return [(group, 1.0 - 2.0 * (number % 2)) for number, group in enumerate(groups)]


def check_packing(engine: Engine, groups: Sequence[Group], *, section: TrainSection, workers: Workers) -> float:
    """Compare packed scores and their gradients with plain rows on a few groups and return how far the scores are apart.

    Every rank compares the same groups; see `_noise`.

    Raises:
        TrainingError: the packed attention does not compute what this model's own attention does.
    """
    packed = score_packed(engine, groups, dtype=section.dtype)
    plain = score_plain(engine, groups, dtype=section.dtype)
    apart = _noise(packed.logps, plain.logps, PackedBatch.pack(groups).to(engine.device))
    turned = packed.turned(plain, workers)
    allowed, allowed_turn = NOISE_TOLERANCE[section.dtype], _GRADIENT_TOLERANCE[section.dtype]
    if not (apart <= allowed and turned <= allowed_turn):
        differ = f"differ by {apart:.4f} nats for the root of a token (allowed: {allowed}) and by {turned:.2%} of their gradient (allowed: {allowed_turn:.2%})"
        if engine.policy.plain_because is not None:
            msg = f"scores of this model and what its own head gives {differ}: its answers cannot be scored\n\nHint: report this architecture."
            raise TrainingError(msg)
        msg = f"packed rows and plain rows of this model {differ}: its layers cannot be packed\n\nHint: set train.attention to `plain`, then each response is a row of its own (not with train.sharding; where `prepare` scored by packed rows, `--set prepare.reuse_scores=false` too), and report this architecture."
        raise TrainingError(msg)
    return apart


def _noise(found: Tensor, expected: Tensor, batch: PackedBatch) -> float:
    """Return the root mean square over responses of their difference divided by the root of their tokens, in nats."""
    return float(((found - expected).double().square() / batch.token_counts).mean().sqrt())
