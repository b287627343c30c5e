"""The work of a benchmark: the same rows from the same weights in the same optimizer steps, for every arm.

A row whose prompt fills the window is dropped for all, a longer answer is cut at the window, and a prompt gives one group.
Rows are shuffled once, here, so that arms which take them in order take them in the same random order. Knows neither
how an arm trains nor how long it takes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from fsspec.implementations.local import LocalFileSystem

from app.errors import DataError
from app.generation import GenerationRequest, generate
from app.models import LoadedModel
from app.preferences.formats import read_rows
from app.preferences.quality import resolve
from app.schemas import Message, Pair, content_hash
from app.storage import write_atomically
from app.training.snapshots import from_row, global_order, to_row
from app.training.tokenization import Group, Preference, encode_groups

SAMPLED_TOKENS = 128
"""Token limit of a sampled answer."""
_POOL = 400
"""Pairs among which TRL puts those of like length together on real data: 50 steps of 8 (transformers' `LengthGroupedSampler`)."""
_SPARE_PROMPTS = 8
"""A prompt to which two answers are the same is left out."""


@dataclass(frozen=True)
class Work:
    """What every arm does."""

    home_uri: str
    """A home of the benchmark's own, which holds the model."""
    sft: str
    """What a recipe calls the model."""
    model_id: str
    groups: tuple[Group, ...]
    adapter: Literal["lora", "full"]
    dtype: Literal["float32", "bfloat16"]
    max_length: int
    batch_pairs: int
    """Pairs of one optimizer step; the groups divide into such steps without rest."""
    micro_batch_tokens: int
    """Token budget of our forward."""
    learning_rate: float
    threads: int
    epochs: int
    """Passes over the groups, each in the same order."""

    @property
    def pairs(self) -> int:
        """Pairs of all groups."""
        return sum(len(group.pairs) for group in self.groups)

    def save(self, path: Path) -> None:
        """Write the work for an arm in another process."""
        tree = asdict(replace(self, groups=())) | {"groups": [to_row(g, i) for i, g in enumerate(self.groups)]}
        path.write_text(json.dumps(tree), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        return cls(**tree | {"groups": tuple(map(from_row, tree["groups"]))})


def pair_tokens(group: Group) -> int:
    """Return the tokens of a group's pairs, the prompt once in each: a measure of work that layout does not change."""
    responses = group.responses
    return sum(len(group.prompt_ids) + len(responses[p.chosen]) + len(responses[p.rejected]) for p in group.pairs)


def longest_pair(group: Group) -> int:
    """Return the tokens of the longest row that a pair of this group is to trainers that know no groups."""
    return len(group.prompt_ids) + max(map(len, group.responses))


def by_length(groups: Sequence[Group]) -> list[Group]:
    """Return the groups in the order of trainers that put rows of like length together: the longest first."""
    return sorted(groups, key=longest_pair, reverse=True)


def pair_rows(group: Group) -> list[dict[str, list[int]]]:
    """Return the pairs of a group as trainers that know no groups take them, the prompt in each."""
    return [
        {
            "prompt_ids": list(group.prompt_ids),
            "chosen_ids": list(group.responses[pair.chosen]),
            "rejected_ids": list(group.responses[pair.rejected]),
        }
        for pair in group.pairs
    ]


def read_work(
    data: Path, loaded: LoadedModel, *, max_length: int, pairs: int, batch_pairs: int, prompt_tokens: int | None = None
) -> tuple[list[Pair], list[Group]]:
    """Read preference data and return as many pairs, one of each prompt, as rows and as groups in the same random order.

    They are whole steps of a trainer that goes by length: a pool of some hundred random pairs is sorted by length and cut
    into steps, and of these as many are taken as are asked for, at even distances. So a few pairs can be put together as
    well as a whole data set could, and have its lengths; of prompts that are cut to `prompt_tokens` those after the cut.

    Raises:
        DataError: the file cannot be read, or has fewer usable pairs than asked for.
    """
    kept, _ = resolve(read_rows([data]).candidates, max_pairs_per_prompt=1)
    groups = _encoded([pair for pair in kept if pair.label is None], loaded, max_length)
    groups = [group for group in groups if len(group.pairs) == 1]
    count = pairs - pairs % batch_pairs
    if len(groups) < count:
        msg = f"`{data}` has {len(groups)} pairs on prompts shorter than {max_length} tokens, fewer than --pairs {pairs} (in steps of {batch_pairs})\n\nHint: lower --pairs, or raise --max-length."
        raise DataError(msg)
    if prompt_tokens is not None:
        groups = cut_prompts(groups, prompt_tokens)
    pool = by_length(global_order(groups, seed=0)[: max(_POOL, count)])
    steps = [pool[i : i + batch_pairs] for i in range(0, len(pool) - batch_pairs + 1, batch_pairs)]
    wanted = count // batch_pairs
    taken = [steps[(2 * i + 1) * len(steps) // (2 * wanted)] for i in range(wanted)]
    chosen = global_order((group for step in taken for group in step), seed=0)
    by_id = {pair.pair_id: pair for pair in kept}
    return [by_id[group.pairs[0].pair_id] for group in chosen], chosen


def sampled_groups(
    data: Path, loaded: LoadedModel, *, answers: int, prompts: int, max_length: int, kept_in: Path
) -> list[Group]:
    """Let the model answer prompts of the data `answers` times each, once: what it gave is kept in a folder.

    The groups have no pairs yet, see `best_against_rest` and `all_pairs`; their first answer counts as the best.

    Raises:
        DataError: the data has too few prompts, or too few whose answers all differ.
    """
    key = content_hash([hashlib.sha256(data.read_bytes()).hexdigest(), loaded.digest, answers, prompts, max_length])
    kept = kept_in / f"groups-{key}.json"
    if kept.exists():
        return [from_row(row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    room = max_length - SAMPLED_TOKENS
    pairs, _ = resolve(read_rows([data]).candidates, max_pairs_per_prompt=1)
    short = [group for group in _encoded(pairs, loaded, max_length) if len(group.prompt_ids) <= room]
    if len(short) < prompts:
        msg = f"`{data}` has {len(short)} prompts that leave room for an answer, fewer than the {prompts} asked for"
        raise DataError(msg)
    chosen = global_order(short, seed=0)[: prompts + _SPARE_PROMPTS]
    requests = [
        GenerationRequest(group.prompt_ids, temperature=1.0, top_p=1.0, max_tokens=SAMPLED_TOKENS, seed=answers * i + k)
        for i, group in enumerate(chosen)
        for k in range(answers)
    ]
    given = iter(generate(loaded, requests, places=16))
    groups = [
        replace(group, responses=tuple(next(given).token_ids for _ in range(answers)), pairs=()) for group in chosen
    ]
    groups = [group for group in groups if len(set(group.responses)) == answers][:prompts]
    if len(groups) < prompts:
        msg = f"{len(groups)} prompts of `{data}` have {answers} answers that all differ, {prompts} were asked for"
        raise DataError(msg)
    kept_in.mkdir(parents=True, exist_ok=True)
    write_atomically(LocalFileSystem(), str(kept), json.dumps([to_row(g, i) for i, g in enumerate(groups)]).encode())
    return groups


def cut_prompts(groups: Sequence[Group], tokens: int) -> list[Group]:
    """Leave the last tokens of every prompt: what sharing it is worth depends on its length."""
    return [replace(group, prompt_ids=group.prompt_ids[-tokens:]) for group in groups]


def best_against_rest(groups: Sequence[Group]) -> list[Group]:
    """Pair the first answer of each group with each of the others: K - 1 pairs."""
    return [_paired(group, [(0, k) for k in range(1, len(group.responses))]) for group in groups]


def all_pairs(groups: Sequence[Group]) -> list[Group]:
    """Pair all answers of each group, the earlier one chosen: K (K - 1) / 2 pairs."""
    return [_paired(group, list(combinations(range(len(group.responses)), 2))) for group in groups]


def _paired(group: Group, indices: Sequence[tuple[int, int]]) -> Group:
    pairs = (Preference(a, b, 1.0, f"{group.group_id}-{a}-{b}", "sampled") for a, b in indices)
    return replace(group, pairs=tuple(pairs))


def _encoded(pairs: Sequence[Pair], loaded: LoadedModel, max_length: int) -> list[Group]:
    groups, _ = encode_groups(
        pairs,
        loaded.tokenizer,
        template_digest=loaded.template_digest,
        end_ids=loaded.end_ids,
        max_length=max_length,
        too_long="truncate_response",
    )
    return groups


def plain_messages(pair: Pair) -> dict[str, Any]:
    """Return a pair as other trainers read it: lists of messages."""
    assert pair.chosen is not None  # noqa: S101  a pair has both
    assert pair.rejected is not None  # noqa: S101
    return {
        "prompt": [m.to_openai() for m in pair.prompt],
        "chosen": [Message("assistant", pair.chosen.content, tool_calls=pair.chosen.tool_calls).to_openai()],
        "rejected": [Message("assistant", pair.rejected.content, tool_calls=pair.rejected.tool_calls).to_openai()],
        "tools": pair.tools,
    }
