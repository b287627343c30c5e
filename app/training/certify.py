"""Certify: objectives on given token log-probabilities against expected losses, through what the train job calls.

A case file is JSON, `{"format": 1, "cases": [...]}`; docs/training.md describes a case. Without a file the golden table
that ships is read; most of its values were computed by TRL's own code. A case passes if the mean loss over its pairs
(or judged responses) differs from the expected one by at most its relative tolerance. Knows neither models nor batches.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.config import parse_recipe
from app.errors import DataError, PrefloopError
from app.training.judgements import balanced
from app.training.objectives import Scored, load_objective

GOLDEN = Path(__file__).with_name("golden.json")
_KEYS = {"name", "objective", "options", "policy", "reference", "labels", "kl", "log_sum_sq", "expected", "tolerance", "source"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case."""

    name: str
    objective: str
    expected: float | None
    """None where the case gives no number."""
    found: float | None
    """None where the case could not be computed."""
    passed: bool
    source: str
    error: str | None = None

    def line(self) -> str:
        """Say it in one line."""
        found = self.error if self.found is None else f"{self.found:.10g}"
        expected = "a number" if self.expected is None else f"{self.expected:.10g}"
        return f"{'ok  ' if self.passed else 'MISS'}  {self.name}: {found}, expected {expected} ({self.source})"


def certify(path: Path = GOLDEN) -> list[Verdict]:
    """Judge every case of a file, in its order.

    Raises:
        DataError: the file cannot be read or is of another format, or has no case.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        cases = tree["cases"] if tree["format"] == 1 else None
    except FileNotFoundError:
        msg = f"no case file at `{path}`"
        raise DataError(msg) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"`{path}` is no case file: {error!r}\n\nHint: it is JSON with `format` = 1 and `cases`."
        raise DataError(msg) from None
    if not isinstance(cases, list) or not cases:
        msg = f"`{path}` has no cases of format 1"
        raise DataError(msg)
    return [_judge(case, index) for index, case in enumerate(cases)]


def _judge(case: Any, index: int) -> Verdict:
    named = case if isinstance(case, dict) else {}
    name, objective = str(named.get("name", f"case {index + 1}")), str(named.get("objective", "?"))
    source = str(named.get("source", "no source"))
    expected = named.get("expected")
    if not isinstance(expected, int | float) or not math.isfinite(expected):
        return Verdict(name, objective, None, None, False, source, "`expected` is no number")
    try:
        found = _mean_loss(case)
        passed = math.isclose(found, expected, rel_tol=float(case.get("tolerance", 1e-5)))
    except KeyError as error:
        return Verdict(name, objective, expected, None, False, source, f"the case has no {error}")
    except (PrefloopError, ValueError, TypeError, IndexError, RuntimeError) as error:
        told = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        return Verdict(name, objective, expected, None, False, source, told or repr(error))
    return Verdict(name, objective, expected, found, passed, source)


def _mean_loss(case: dict[str, Any]) -> float:
    if strange := sorted(case.keys() - _KEYS):
        msg = f"unknown key `{strange[0]}`; known: {', '.join(sorted(_KEYS))}"
        raise DataError(msg)
    train = {"objective": case["objective"], "options": case.get("options", {})}
    section = parse_recipe({"name": "certify", "train": train}, place="case").train
    labels = case.get("labels")
    liked = sum(map(bool, labels or ()))
    asked = {**section.options, **load_objective(section.objective, section.options).open_weights}
    options = balanced(asked, liked=liked, disliked=len(labels or ()) - liked)
    objective = load_objective(section.objective, options)
    policy = _Rows.read(case["policy"], "policy")
    reference = _Rows.read(case["reference"], "reference") if case.get("reference") is not None else None
    if reference is not None and reference.counts.tolist() != policy.counts.tolist():
        msg = "`policy` and `reference` differ in responses or tokens"
        raise DataError(msg)
    if (objective.unit == "labels" and labels is None) or (labels is not None and len(labels) != len(policy.counts)):
        msg = f"`{objective.name}` needs one label for each of {len(policy.counts)} responses"
        raise DataError(msg)
    if objective.unit == "pairs" and not policy.pairs:
        msg = f"`{objective.name}` needs `chosen` and as many `rejected`"
        raise DataError(msg)
    everything = torch.arange(len(policy.counts))
    first = everything[: policy.pairs] if policy.pairs else everything
    judged = torch.tensor(labels, dtype=torch.bool) if labels is not None else everything < len(first)
    responses = everything[judged] if objective.unit == "good" else everything
    scored = Scored(
        policy_logps=policy.sums,
        reference_logps=None if reference is None else reference.sums,
        token_counts=policy.counts,
        chosen=first,
        rejected=everything[policy.pairs :],
        responses=responses,
        desirable=judged,
        mean_tokens=float(policy.counts[first if objective.unit == "pairs" else responses].double().mean()),
        agreement=_agreement(case, policy),
        kl=_kl(case),
    )
    missing = [name for name in sorted(objective.needs) if getattr(scored, name) is None]
    if missing:
        msg = f"`{objective.name}` needs `{missing[0].removesuffix('_logps')}`, which the case does not have"
        raise DataError(msg)
    return float(objective(scored).losses.mean())


@dataclass(frozen=True, slots=True)
class _Rows:
    """Token log-probabilities of N responses; the first `pairs` are chosen, the others rejected, in the same order."""

    tokens: Sequence[Sequence[float]]
    pairs: int

    @classmethod
    def read(cls, tree: dict[str, Any], place: str) -> "_Rows":
        if set(tree) == {"chosen", "rejected"} and len(tree["chosen"]) == len(tree["rejected"]):
            rows, pairs = [*tree["chosen"], *tree["rejected"]], len(tree["chosen"])
        elif set(tree) == {"responses"}:
            rows, pairs = tree["responses"], 0
        else:
            msg = f"`{place}` needs `chosen` and as many `rejected`, or `responses`; found {sorted(tree)}"
            raise DataError(msg)
        if not rows or not all(rows):
            msg = f"`{place}` has a response without a token"
            raise DataError(msg)
        return cls([list(map(float, row)) for row in rows], pairs)

    @property
    def sums(self) -> Tensor:
        return torch.tensor([sum(row) for row in self.tokens], dtype=torch.float64)

    @property
    def counts(self) -> Tensor:
        return torch.tensor([len(row) for row in self.tokens])


def _agreement(case: dict[str, Any], policy: _Rows) -> Tensor | None:
    if case.get("log_sum_sq") is None:
        return None
    squares = _Rows.read(case["log_sum_sq"], "log_sum_sq")
    if squares.counts.tolist() != policy.counts.tolist():
        msg = "`policy` and `log_sum_sq` differ in responses or tokens"
        raise DataError(msg)
    return (policy.sums - squares.sums) / policy.counts


def _kl(case: dict[str, Any]) -> Tensor | None:
    if case.get("kl") is None:
        return None
    policy, reference = (torch.tensor(case["kl"][side], dtype=torch.float64) for side in ("policy", "reference"))
    if len(policy) != len(reference):
        msg = f"`kl` has {len(policy)} answers of the policy and {len(reference)} of the reference"
        raise DataError(msg)
    return (policy - reference).mean()
