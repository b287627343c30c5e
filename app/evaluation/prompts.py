"""Prompt files: read them, join near-duplicates to clusters, split them into train and held-out.

A prompt file is JSONL, a JSON list or CSV with `prompt` and optionally `id` and `cluster`. Where a prompt names no cluster, prompts whose
sets of 5-word runs overlap (MinHash) share one, so that no near-duplicate stands on both sides of a split and no
interval counts it twice. This module does not know what the prompts are for.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import DataError
from app.evaluation.rows import read_rows
from app.near_duplicates import cluster_texts
from app.schemas import content_hash

NEAR_DUPLICATE = 0.8
"""Estimated Jaccard similarity of 5-word runs from which two prompts count as the same."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's request; `cluster` is shared by near-duplicates."""

    id: str
    text: str
    cluster: str


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file, each text once, and how many repeated lines were left out."""

    prompts: tuple[Prompt, ...]
    repeated: int


@dataclass(frozen=True, slots=True)
class PromptSplit:
    """Prompts to collect on and prompts to evaluate on; no cluster is in both."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]


def load_prompts(place: str) -> PromptFile:
    """Read a prompt file from a path or URI.

    Raises:
        DataError: the file is missing or empty, or a line is no object with a non-empty text `prompt`; names the line.
    """
    entries: dict[str, tuple[str, str | None]] = {}
    texts: set[str] = set()
    repeated = 0
    for where, row in read_rows(place):
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            msg = f"{where}: `prompt` must be text that is not empty, found {text!r}"
            raise DataError(msg)
        if _plain(text) in texts:
            repeated += 1
            continue
        texts.add(_plain(text))
        # A blank cell of a CSV is no name.
        identity, cluster = (None if row.get(key) == "" else row.get(key) for key in ("id", "cluster"))
        name = content_hash(text)[:16] if identity is None else str(identity)
        if name in entries:
            msg = f"{where}: the id `{name}` is used by another prompt as well"
            raise DataError(msg)
        entries[name] = (text, None if cluster is None else str(cluster))
    if not entries:
        msg = f"`{place}` holds no prompts"
        raise DataError(msg)
    found = cluster_texts([text for text, _ in entries.values()], threshold=NEAR_DUPLICATE)
    prompts = (
        Prompt(name, text, f"near:{near}" if named is None else named)
        for (name, (text, named)), near in zip(entries.items(), found, strict=True)
    )
    return PromptFile(tuple(prompts), repeated)


def split_prompts(prompts: Sequence[Prompt], *, held_out: int, min_train: int, seed: int) -> PromptSplit:
    """Hold out whole clusters until at least `held_out` prompts are held out, chosen by a hash of cluster and seed.

    Raises:
        DataError: there are not enough prompts for both sides; names the number needed.
    """
    needed = held_out + min_train
    if len(prompts) < needed:
        msg = f"{len(prompts)} different prompts are too few: {held_out} are held out to judge and {min_train} are needed to collect feedback on\n\nHint: give at least {needed} prompts."
        raise DataError(msg)
    members: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        members.setdefault(prompt.cluster, []).append(prompt)
    chosen: set[str] = set()
    count = 0
    for cluster in sorted(members, key=lambda c: hashlib.sha256(f"{seed}/{c}".encode()).digest()):
        if count < held_out and len(prompts) - count - len(members[cluster]) >= min_train:
            chosen.add(cluster)
            count += len(members[cluster])
    if count < held_out:
        msg = f"{len(prompts)} prompts fall into only {len(members)} groups of near-duplicates, which cannot be divided into {held_out} prompts to judge and {min_train} to collect feedback on\n\nHint: give prompts that differ more from one another."
        raise DataError(msg)
    return PromptSplit(
        train=tuple(p for p in prompts if p.cluster not in chosen),
        held_out=tuple(p for p in prompts if p.cluster in chosen),
    )


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())) or text
