"""What was held out, scored: rows for every pair and answer, which `app.evaluation.learning` judges.

A run measures the weights that leave it, adapters merged and rounded, and not those that it trained. Nothing here knows
what was learned or whether it is enough.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch

from app.config import TrainSection
from app.training.batch import filler, micro_batches, rank_share
from app.training.coupling import couple
from app.training.engine import Workers
from app.training.loop import Totals, score_batch
from app.training.objectives import Objective
from app.training.policy import Reference, merged, precomputed
from app.training.scoring import ScoringModel, with_reference_logps
from app.training.tokenization import Group


@dataclass(frozen=True, slots=True)
class PairMeasure:
    """One held-out pair: its reward margin and the lengths of its answers, in tokens."""

    pair_id: str
    cluster: str
    margin: float
    loss: float | None
    """None where the objective judges answers one by one."""
    chosen_tokens: int
    rejected_tokens: int
    chosen_logp: float | None = None
    """Log-probability of the chosen answer, in nats."""
    before_logp: float | None = None
    """The same under the reference, or under the model that training began with where that is another."""
    before_margin: float = 0.0
    """Margin of the model that training began with; 0 where it is the reference, and the margin what the policy added."""

    @property
    def gain(self) -> float:
        """What training added to the margin."""
        return self.margin - self.before_margin

    @property
    def chosen_change(self) -> float | None:
        """How much more likely the chosen answer became, in nats a token; None where it is not known how likely it was."""
        if self.chosen_logp is None or self.before_logp is None:
            return None
        return (self.chosen_logp - self.before_logp) / self.chosen_tokens


@dataclass(frozen=True, slots=True)
class AnswerMeasure:
    """One held-out answer that is judged by itself."""

    pair_id: str
    cluster: str
    desirable: bool
    reward: float
    logp: float
    tokens: int
    loss: float
    start_logp: float | None = None
    """Of the model that training began with, where that is not the reference."""
    before_reward: float = 0.0
    """Reward of that model; 0 where it is the reference, and the reward what the policy added."""

    @property
    def gain(self) -> float:
        """What training added to the reward."""
        return self.reward - self.before_reward


@dataclass(frozen=True, slots=True)
class Measures:
    """What was measured on held-out groups, sorted by id."""

    pairs: list[PairMeasure]
    answers: list[AnswerMeasure]

    def finite(self) -> Self:
        """Return those whose loss and reward are numbers, before and after: of others nothing can be said, and no database keeps them."""
        return replace(
            self,
            pairs=[row for row in self.pairs if math.isfinite(row.gain + (row.loss or 0.0))],
            answers=[row for row in self.answers if math.isfinite(row.gain + row.loss)],
        )


def measure(
    policy: ScoringModel,
    groups: Sequence[Group],
    *,
    objective: Objective,
    reference: Reference,
    section: TrainSection,
    workers: Workers,
) -> Measures:
    """Score held-out groups without training; every rank returns what all ranks measured, sorted by id.

    Held-out answers come from their own prompts only, so KTO's KL is not known: its losses are those of kl = 0.
    """
    device = next(policy.parameters()).device
    policy.train(mode=False)
    pairs: list[PairMeasure] = []
    answers: list[AnswerMeasure] = []
    totals = Totals.of(groups, objective.unit)
    kl = torch.zeros((), device=device)
    mine = rank_share(groups, rank=workers.rank, world_size=workers.size)
    batches = micro_batches(mine, section.token_budget(device.type))
    idle = [filler(groups) for _ in range(workers.rounds(len(batches)) - len(batches))]
    score = partial(score_batch, policy, objective, reference, section=section, mean_tokens=totals.mean_tokens, kl=kl)
    # All that is held out is one step of such an objective.
    shares = (
        couple(score, batches, objective=objective, weight=totals.weight, workers=workers, device=device, idle=idle)
        if objective.coupled
        else None
    )
    with torch.no_grad():
        for number, batch in enumerate(batches if shares is not None else [*batches, *idle]):
            batch = batch.to(device)
            scored = score(batch) if shares is None else shares[number].scored
            if number >= len(batches):
                continue
            result = objective(scored) if shares is None else shares[number].result
            rewards, losses = result.rewards, result.losses.tolist()
            if objective.unit != "good":
                pairs += map(
                    PairMeasure,
                    batch.pair_ids,
                    batch.clusters,
                    (rewards[batch.chosen] - rewards[batch.rejected]).tolist(),
                    losses if objective.unit == "pairs" else itertools.repeat(None),
                    batch.token_counts[batch.chosen].tolist(),
                    batch.token_counts[batch.rejected].tolist(),
                    scored.policy_logps[batch.chosen].tolist(),
                    itertools.repeat(None)
                    if scored.reference_logps is None
                    else scored.reference_logps[batch.chosen].tolist(),
                )
            if objective.unit != "pairs":
                answers += map(
                    AnswerMeasure,
                    batch.label_ids,
                    batch.label_clusters,
                    batch.desirable.tolist(),
                    rewards[batch.responses].tolist(),
                    scored.policy_logps[batch.responses].tolist(),
                    batch.token_counts[batch.responses].tolist(),
                    losses,
                )
    return Measures(
        sorted(workers.gather(pairs), key=lambda row: row.pair_id),
        sorted(workers.gather(answers), key=lambda row: (row.pair_id, not row.desirable)),
    )


def with_start(measures: Measures, before: Measures) -> Measures:
    """Add what the model that training began with gave to the same pairs and answers, where it is not the reference."""
    pairs = [
        replace(after, before_logp=start.chosen_logp, before_margin=start.margin)
        for after, start in zip(measures.pairs, before.pairs, strict=True)
    ]
    answers = [
        replace(after, start_logp=start.logp, before_reward=start.reward)
        for after, start in zip(measures.answers, before.answers, strict=True)
    ]
    return Measures(pairs, answers)


def measure_exported(
    policy: ScoringModel,
    groups: Sequence[Group],
    *,
    objective: Objective,
    reference: Reference,
    section: TrainSection,
    workers: Workers,
    merge: Callable[[ScoringModel], ScoringModel] = merged,
) -> tuple[ScoringModel, Measures]:
    """Merge the adapters, and score held-out groups with the very weights that leave the run.

    Merging rounds to the type of the base, so the policy before it is a model that nobody will serve. (Weights of full
    fine-tuning leave as they are, in fp32; a replica rounds them to `serving.dtype` as it loads them.) The base
    may be the reference, so that is asked before the merge. The policy is of no use afterwards.

    Returns:
        what leaves the run, and its measures as `measure` returns them.
    """
    if objective.has_reference:
        device = next(policy.parameters()).device
        policy.train(mode=False)
        # `measure` divides them in the same way, so what other ranks score needs no reference here.
        mine = with_reference_logps(
            rank_share(groups, rank=workers.rank, world_size=workers.size),
            lambda batch: reference(batch.to(device)),
            token_budget=section.token_budget(device.type),
            rounds=workers.rounds,
            idle=groups,
        )
        scored = {group.group_id: group for group in mine}
        groups = [scored.get(group.group_id, group) for group in groups]
    exported = merge(policy)
    measured = measure(exported, groups, objective=objective, reference=precomputed, section=section, workers=workers)
    return exported, measured
