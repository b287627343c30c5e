"""What an objective learns from: groups of pairs and labels are cut to pairs, to labels, or to good answers.

    pairs    pairs stay, lone labels are left out
    labels   the chosen answer of a pair counts as liked, the rejected one as not
    good     the chosen and the liked answers; what nobody is to imitate costs no token

Equal judgements of one answer become one, with the sum of their weights. Held-out groups of `labels` keep their pairs
too, since the accuracy of a reward is measured on pairs. This module does not know tokenizers, models or losses.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from app.schemas import Split
from app.training.tokenization import Group, Label

Unit = Literal["pairs", "labels", "good"]


def distinct(groups: Sequence[Group]) -> dict[str, str]:
    """Return the source of each judgement by its id; a pair that became two labels is one judgement."""
    return {judged.pair_id: judged.source for group in groups for judged in group.judgements}


def for_unit(groups: Sequence[Group], unit: Unit) -> tuple[list[Group], int]:
    """Return the groups as an objective of this unit learns from them, and how many judgements were left out."""
    if unit == "pairs":
        kept = [_only(g, pairs=True) for g in groups if g.pairs]
        return kept, sum(len(g.labels) for g in groups)
    labelled = [replace(g, labels=_labels(g, good_only=unit == "good")) for g in groups]
    left_out = sum(not label.label for g in groups for label in g.labels) if unit == "good" else 0
    return [
        g if unit == "labels" and g.split == Split.HELD_OUT else _only(g, pairs=False) for g in labelled if g.labels
    ], left_out


def in_rows(groups: Sequence[Group], *, answers: int) -> list[Group]:
    """Divide groups with more than so many lone answers, whose losses do not depend on one another; pairs stay together.

    A popular prompt may have hundreds of judged answers, and a group is one row of a forward, whatever memory there is.
    """
    return [row for group in groups for row in _in_rows(group, answers)]


def _in_rows(group: Group, answers: int) -> list[Group]:
    paired = {i for p in group.pairs for i in (p.chosen, p.rejected)}
    lone = [i for i in range(len(group.responses)) if i not in paired]
    if len(lone) <= answers:
        return [group]
    rows = [sorted(paired)] if paired else []
    rows += [lone[start : start + answers] for start in range(0, len(lone), answers)]
    return [
        _cut(
            replace(
                group,
                group_id=f"{group.group_id}-{number}",
                pairs=tuple(p for p in group.pairs if p.chosen in row),
                labels=tuple(label for label in group.labels if label.response in row),
            ),
            row,
        )
        for number, row in enumerate(rows)
    ]


def with_strangers(groups: Sequence[Group], *, max_length: int, seed: int) -> list[Group]:
    """Give every labelled answer of the train split a partner: another prompt's answer, to this prompt.

    The partners are one derangement of all labelled answers of the split: each of them is used once, none with its own
    prompt (https://arxiv.org/abs/2402.01306, section 4.2: the KL is estimated on mismatched pairs). They are cut to
    `max_length` tokens with the prompt. Where one prompt has more than half of the labels some of its labels have none.

    Args:
        groups: groups with labels.
        max_length: tokens of a prompt and one answer together.
        seed: of the order in which answers are paired.
    """
    train = [g for g in groups if g.split == Split.TRAIN]
    slots = [index for index, group in enumerate(train) for _ in group.labels]
    answers = [group.responses[label.response] for group in train for label in group.labels]
    # A prompt may have several rows.
    first: dict[tuple[int, ...], int] = {}
    prompts = [first.setdefault(train[slot].prompt_ids, slot) for slot in slots]
    partners: dict[str, list[tuple[int, ...]]] = {}
    for slot, answer in zip(slots, _deranged(prompts, answers, seed), strict=True):
        if answer is not None:
            room = max(1, max_length - len(train[slot].prompt_ids))
            partners.setdefault(train[slot].group_id, []).append(answer[:room])
    return [
        replace(g, responses=(*g.responses, *partners.get(g.group_id, ()))) if g.split == Split.TRAIN else g
        for g in groups
    ]


def balanced(options: Mapping[str, Any], *, liked: float, disliked: float) -> dict[str, Any]:
    """Fill in `desirable_weight` and `undesirable_weight` where a recipe leaves them open.

    KTO's authors want desirable_weight * liked / (undesirable_weight * disliked) in [1, 4/3], as TRL quotes them. The
    rarer kind is weighed up as far as that takes, the other stays at 1.

    Args:
        options: of an objective, with None for what is open; all others are returned as they are.
        liked: sum of the weights of liked answers of the train split.
        disliked: the same of disliked ones.
    """
    ratio = liked / disliked if liked and disliked else 1.0
    weights = {"desirable_weight": max(1.0, 1 / ratio), "undesirable_weight": max(1.0, ratio * 3 / 4)}
    return {name: weights.get(name) if value is None else value for name, value in options.items()}


def divide(group: Group) -> tuple[Group, Group | None]:
    """Separate a group from the answers to other prompts in it, see `with_strangers`."""
    named = {i for p in group.pairs for i in (p.chosen, p.rejected)} | {label.response for label in group.labels}
    strangers = [i for i in range(len(group.responses)) if i not in named]
    if not strangers:
        return group, None
    return _cut(group, sorted(named)), _cut(replace(group, pairs=(), labels=()), strangers)


def _labels(group: Group, *, good_only: bool) -> tuple[Label, ...]:
    found: dict[tuple[int, bool], Label] = {}
    judged = [
        *group.labels,
        *(Label(p.chosen, True, p.weight, p.pair_id, p.source) for p in group.pairs),
        *(Label(p.rejected, False, p.weight, p.pair_id, p.source) for p in group.pairs),
    ]
    for label in judged:
        if label.label or not good_only:
            known = found.get((label.response, label.label))
            found[label.response, label.label] = replace(label, weight=label.weight + known.weight) if known else label
    return tuple(found.values())


def _only(group: Group, *, pairs: bool) -> Group:
    """Drop pairs or labels, and the responses that nothing names any more."""
    rest = replace(group, labels=()) if pairs else replace(group, pairs=())
    named = {i for p in rest.pairs for i in (p.chosen, p.rejected)} | {label.response for label in rest.labels}
    return _cut(rest, sorted(named))


def _cut(group: Group, kept: Sequence[int]) -> Group:
    place = {old: new for new, old in enumerate(kept)}
    return replace(
        group,
        responses=tuple(group.responses[i] for i in kept),
        reference_logps=group.reference_logps and tuple(group.reference_logps[i] for i in kept),
        pairs=tuple(replace(p, chosen=place[p.chosen], rejected=place[p.rejected]) for p in group.pairs),
        labels=tuple(replace(label, response=place[label.response]) for label in group.labels),
    )


def _deranged(prompts: Sequence[int], answers: Sequence[tuple[int, ...]], seed: int) -> list[tuple[int, ...] | None]:
    """Give slot i the answer of a slot of another prompt; a permutation wherever no prompt owns more than half."""
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)  # noqa: S311  an order, not a secret
    # Sorted by prompt and rotated by what the largest owns, no slot meets its own prompt while that is at most half.
    order.sort(key=lambda i: prompts[i])
    largest = max(Counter(prompts).values(), default=0)
    partners: list[tuple[int, ...] | None] = [None] * len(prompts)
    for position, slot in enumerate(order):
        other = order[(position + largest) % len(order)]
        partners[slot] = answers[other] if prompts[other] != prompts[slot] else None
    return partners
