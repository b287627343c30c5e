"""The optimisation loop: a generator of step reports. No Ray, no tracker, no callbacks inside.

    for step of groups -> this rank's micro-batches -> policy -> objective -> backward -> sum over ranks -> clip -> step

An objective whose rows depend on one another is asked for the whole step first (`app.training.coupling`). Every rank is
given the same groups for a step and takes its share of them, so world size changes nothing about which rows make a
step. Losses are normalised by the global weight of the step. No update is made when the loss or the gradient norm is
not finite on any rank.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from app.config import TrainSection
from app.errors import TrainingError
from app.schemas import content_hash
from app.training.batch import PackedBatch, filler, micro_batches, rank_share
from app.training.coupling import couple
from app.training.engine import Engine, Workers
from app.training.judgements import Unit, divide
from app.training.objectives import Losses, Objective, Scored
from app.training.policy import Reference, autocast
from app.training.scoring import ScoringModel, without_noise
from app.training.tokenization import Group

_MAX_FAILURES = 3


@dataclass(frozen=True, slots=True)
class StepReport:
    """Means over the judgements of one optimizer step, over all ranks; log-probabilities and rewards are in nats.

    Chosen are the chosen answers of pairs and the liked ones of labels. What a step does not have, or what is not finite, is None.
    """

    step: int
    """Number of steps done, this one included."""
    loss: float | None
    reward_chosen: float | None
    reward_rejected: float | None
    reward_margin: float | None
    reward_accuracy: float | None
    """Share of pairs with a positive margin; exact zeros are ties and count in `reward_ties`."""
    reward_ties: float | None
    logp_chosen: float | None
    logp_rejected: float | None
    chosen_fell: float | None
    """Share of chosen answers that are less likely than under the reference; by rounding about half where nothing has moved yet."""
    kl: float | None
    """KTO's estimate of KL(policy, reference), before it is clamped to 0; a step without answers to other prompts has none."""
    grad_norm: float | None
    learning_rate: float
    pairs: int
    labels: int
    tokens: int
    seconds: float
    wait_seconds: float = 0.0
    """How long this rank waited for the groups of the step, which `seconds` leaves out."""
    skipped: tuple[str, ...] = ()
    """Ids of the rows that were not finite, where the step made no update."""


def learning_rate_factor(step: int, *, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Return the factor on the peak learning rate for the 0-based `step`: linear warm-up, then decay to zero."""
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress


def optimise(
    engine: Engine,
    steps: Iterable[Sequence[Group]],
    *,
    objective: Objective,
    reference: Reference,
    section: TrainSection,
    learning_rate: float,
    total_steps: int,
    done_steps: int = 0,
    workers: Workers,
) -> Iterator[StepReport]:
    """Train, one report for each step.

    Args:
        engine: the policy, and what makes a step of gradients.
        steps: the groups of each remaining step, the same on every rank.
        objective: losses of pairs or of judged answers.
        reference: asked where the objective has one.
        section: schedule, token budget, dtype.
        learning_rate: at its peak.
        total_steps: steps of the whole run, for the schedule.
        done_steps: steps done before a resume.
        workers: the ranks.

    A step whose loss or gradient norm is not finite on any rank makes no update; its report names the rows.

    Raises:
        TrainingError: three steps in a row were not finite; the weights are those before them.
    """
    policy, device, failures = engine.policy, engine.device, 0
    for step, (groups, waited) in enumerate(_waited_for(steps), start=done_steps):
        began = time.perf_counter()
        # Of what is random in a forward nothing has to be kept for a resume.
        seed = int(content_hash([section.seed, step, workers.rank])[:15], 16)
        torch.manual_seed(seed)
        if objective.unit == "good":
            policy.train()
        else:
            without_noise(policy)  # a preference is a difference of scores, and that of two draws of a dropout is none
        totals = Totals.of(groups, objective.unit)
        # Strangers are of no use to an objective without a KL, though its snapshot may hold them.
        own, strangers = _divided(rank_share(groups, rank=workers.rank, world_size=workers.size))
        measured = (
            _kl(engine, strangers, groups, reference, section=section, workers=workers)
            if "kl" in objective.needs
            else None
        )
        kl = torch.zeros((), device=device) if measured is None else measured
        sums = _Sums(device)
        odd: list[str] = []
        batches = micro_batches(own, section.token_budget(device.type))
        # Agreed on before the first, or ranks would wait for one another's forwards.
        idle = [filler(groups) for _ in range(workers.rounds(len(batches)) - len(batches))]
        score = partial(
            score_batch, policy, objective, reference, section=section, mean_tokens=totals.mean_tokens, kl=kl
        )
        shares = None
        if objective.coupled:
            weight = totals.weight
            shares = couple(
                score, batches, objective=objective, weight=weight, workers=workers, device=device, idle=idle
            )
            torch.manual_seed(seed)  # the same dropout in both forwards
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            scored = score(batch)
            result = objective(scored) if shares is None else shares[number].result
            loss = (result.losses * _weights(batch, objective)).sum() / totals.weight
            engine.backward(loss if shares is None else (shares[number].slopes * scored.policy_logps).sum())
            sums.add(batch, objective.unit, result, scored, float(loss.detach()))
            odd += itertools.compress(_ids(batch, objective), (~result.losses.isfinite()).tolist())
        for batch in idle:
            engine.backward(0.0 * score(batch.to(device)).policy_logps.sum())
        workers.sum_(sums.values)
        rate = learning_rate * learning_rate_factor(
            step, total_steps=total_steps, warmup_ratio=section.warmup_ratio, schedule=section.schedule
        )
        norm = math.nan
        # The sums are the same on every rank, so all of them do the same here.
        if sums.finite:
            norm = engine.step(rate)
        else:
            engine.discard()
        report = sums.report(
            step=step + 1,
            kl=None if measured is None else _finite(float(measured)),
            grad_norm=norm,
            learning_rate=rate,
            seconds=time.perf_counter() - began,
            wait_seconds=waited,
        )
        if report.loss is None or report.grad_norm is None:
            rows = workers.gather(odd) or [judged.pair_id for group in groups for judged in group.judgements]
            failures += 1
            if failures == _MAX_FAILURES:
                msg = f"{failures} steps in a row, up to step {step + 1}, had a loss or a gradient that is not finite; no update was made. Rows of the last: {', '.join(rows[:8])}{' …' if len(rows) > 8 else ''}\n\nHint: lower train.learning_rate, or look at these rows."
                raise TrainingError(msg)
            yield replace(report, skipped=tuple(rows))
            continue
        failures = 0
        yield report


def _waited_for(steps: Iterable[Sequence[Group]]) -> Iterator[tuple[Sequence[Group], float]]:
    """Yield each step with the seconds that it was waited for."""
    iterator = iter(steps)
    while True:
        asked = time.perf_counter()
        groups = next(iterator, None)
        if groups is None:
            return
        yield groups, time.perf_counter() - asked


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all judgements of a step, on every rank."""

    weight: float
    mean_tokens: float
    """Mean tokens of the chosen (or of the judged) responses, weighted."""

    @classmethod
    def of(cls, groups: Sequence[Group], unit: Unit) -> Self:
        """Add up the judgements of all groups of a step."""
        weight = tokens = 0.0
        for group in groups:
            if unit == "pairs":
                judged = [(pair.chosen, pair.weight) for pair in group.pairs]
            else:
                judged = [(label.response, label.weight) for label in group.labels]
            for response, share in judged:
                weight += share
                tokens += share * len(group.responses[response])
        return cls(weight or 1.0, tokens / weight if weight else 1.0)


def _ids(batch: PackedBatch, objective: Objective) -> tuple[str, ...]:
    return batch.pair_ids if objective.unit == "pairs" else batch.label_ids


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weights(batch: PackedBatch, objective: Objective) -> Tensor:
    return batch.weights if objective.unit == "pairs" else batch.label_weights


def _divided(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Separate the answers to other prompts, on which the KL is estimated, from those that are judged."""
    divided = [divide(group) for group in groups]
    return [own for own, _ in divided], [strangers for _, strangers in divided if strangers is not None]


def _kl(
    engine: Engine,
    strangers: Sequence[Group],
    groups: Sequence[Group],
    reference: Reference,
    *,
    section: TrainSection,
    workers: Workers,
) -> Tensor | None:
    """Estimate KL(policy, reference) on the answers to other prompts of a whole step: (), not clamped; None where there are none."""
    policy, device = engine.policy, engine.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    batches = micro_batches(strangers, section.token_budget(device.type))
    idle = workers.rounds(len(batches)) - len(batches)
    with torch.no_grad():
        for number, batch in enumerate([*batches, *(filler(groups) for _ in range(idle))]):
            batch = batch.to(device)
            with autocast(device, section.dtype):
                logps: Tensor = policy(batch).logps
            ratios = (logps - reference(batch)).double()
            if number < len(batches):
                sums += torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
    workers.sum_(sums)
    return (sums[0] / sums[1]).float() if sums[1] else None


def score_batch(
    policy: ScoringModel,
    objective: Objective,
    reference: Reference,
    batch: PackedBatch,
    *,
    section: TrainSection,
    mean_tokens: float,
    kl: Tensor | None,
) -> Scored:
    """Score a batch for an objective."""
    reference_logps = reference(batch) if objective.has_reference else None
    with autocast(batch.input_ids.device, section.dtype):
        scores = policy(batch)
    return Scored(
        policy_logps=scores.logps,
        reference_logps=reference_logps,
        token_counts=batch.token_counts,
        chosen=batch.chosen,
        rejected=batch.rejected,
        responses=batch.responses,
        desirable=batch.desirable,
        mean_tokens=mean_tokens,
        agreement=scores.agreement,
        kl=kl,
    )


class _Sums:
    """Sums and counts of a step, added up over ranks in one collective."""

    _NAMES = (
        "loss",
        "chosen",
        "rejected",
        "accurate",
        "ties",
        "logp_chosen",
        "logp_rejected",
        "fell",
        "referred",
        "good",
        "bad",
        "pairs",
        "labels",
        "tokens",
    )

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(self._NAMES), dtype=torch.float64, device=device)

    @property
    def finite(self) -> bool:
        """Whether the loss, added up over the ranks, is."""
        return math.isfinite(float(self.values[0]))

    def add(self, batch: PackedBatch, unit: Unit, result: Losses, scored: Scored, loss: float) -> None:
        logps, reference = scored.policy_logps.detach(), scored.reference_logps
        if unit == "pairs":
            good, bad = batch.chosen, batch.rejected
            margins = result.rewards[good] - result.rewards[bad]
        else:
            good, bad = batch.responses[batch.desirable], batch.responses[~batch.desirable]
            margins = result.rewards.new_zeros(0)
        row = (
            loss,
            float(result.rewards[good].sum()),
            float(result.rewards[bad].sum()),
            float((margins > 0).sum()),
            float((margins == 0).sum()),
            float(logps[good].sum()),
            float(logps[bad].sum()),
            0.0 if reference is None else float((logps[good] < reference[good]).sum()),
            0.0 if reference is None else float(len(good)),
            float(len(good)),
            float(len(bad)),
            float(len(margins)),
            float(len(batch.responses)),
            float(batch.input_ids.numel()),
        )
        self.values += torch.tensor(row, dtype=torch.float64, device=self.values.device)

    def report(
        self,
        *,
        step: int,
        kl: float | None,
        grad_norm: float,
        learning_rate: float,
        seconds: float,
        wait_seconds: float,
    ) -> StepReport:
        total = dict(zip(self._NAMES, self.values.tolist(), strict=True))

        def mean(name: str, count: str) -> float | None:
            return _finite(total[name] / total[count]) if total[count] else None

        chosen, rejected = mean("chosen", "good"), mean("rejected", "bad")
        return StepReport(
            step=step,
            loss=_finite(total["loss"]),
            reward_chosen=chosen,
            reward_rejected=rejected,
            reward_margin=None if chosen is None or rejected is None else chosen - rejected,
            reward_accuracy=mean("accurate", "pairs"),
            reward_ties=mean("ties", "pairs"),
            logp_chosen=mean("logp_chosen", "good"),
            logp_rejected=mean("logp_rejected", "bad"),
            chosen_fell=mean("fell", "referred"),
            kl=kl,
            grad_norm=_finite(grad_norm),
            learning_rate=learning_rate,
            pairs=int(total["pairs"]),
            labels=int(total["labels"]),
            tokens=int(total["tokens"]),
            seconds=seconds,
            wait_seconds=wait_seconds,
        )
