"""`prefloop bench train`: our trainer against TRL's on the same work in the same run.

Four ratios of seconds, TRL over ours, each from arms that did the same rows in optimizer steps of as many pairs with the
same optimizer, clipping and type, one after the other in every round:

    online     the reference is asked in every step; TRL in random order, batches of 8 pairs
    cached     the reference scores all rows once; TRL with the best of several batch sizes and types, rows by length
    steady     a token of a pair in the cached arms, without the pass and without the first step
    headline   wall-clock from a pair snapshot to an exported model: `prefloop train` (Ray and all) and a TRL script

and one of bytes, `memory`: the peaks of the online arms.

Activations are kept on both sides. TRL recomputes them by default, which saves memory and costs operations, so one round
does that too: `as installed` (TRL recomputes, ours does not), `recomputing` (both do) and `memory, recomputing`.
Ratios count only where one fp32 step of both gives the same loss and gradient.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from app.bench.arms import Arm, Measured, this_device
from app.bench.flops import ModelShape, operations
from app.bench.parity import Parity
from app.bench.runner import run_arm, run_parity
from app.bench.work import Work
from app.errors import TrainingError

RIVAL_VERSION = "1.16.0"
BATCH = 8
"""Pairs of a forward of TRL by default (its per_device_train_batch_size)."""
_TUNED_BATCHES = (1, 2, 4, 8)
_TUNED_PAIRS = 16
_SLOWER = 1.1
"""Once a batch is so much slower than a smaller one, larger ones of its type are not tried."""
_SLOWER_TYPE = 3.0
"""A type whose matrix products take so many times as long as the other's is not tried: processors without bf16 emulate it."""
_FINAL = 2
"""Ways of setting TRL up that are tried twice, the fastest of the first trial."""
_LOSSES_APART = 0.05
"""Of one step in two bf16 runs; the noise of a reward margin is `beta` times some tenths of a nat."""
_LOGPS_APART = 0.01
"""Of the mean log-probability of chosen answers, relative: another row of a step would change it by a tenth."""

Say = Callable[[str], None]
"""Told of what is done."""


@dataclass(frozen=True)
class Ratio:
    """Seconds (or bytes) of TRL over ours, in each round."""

    name: str
    rounds: tuple[float, ...]
    predicted: float | None = None
    """By operations alone."""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    def line(self, expected: float | None) -> str:
        """Say it in one line, against what is expected."""
        told = "" if expected is None else f"  {'ok' if self.median >= expected else 'MISSED'}: {expected:g} expected"
        by = "" if self.predicted is None else f"  by operations {self.predicted:.2f}"
        return f"{self.name:<27} {self.median:5.2f}x  [{min(self.rounds):.2f}, {max(self.rounds):.2f}]{by}{told}"


@dataclass(frozen=True)
class Share:
    """A share of our time that is to be small."""

    name: str
    value: float

    def line(self, allowed: float | None) -> str:
        """Say it in one line, against what is allowed."""
        told = (
            ""
            if allowed is None
            else f"  {'ok' if self.value <= allowed else 'MISSED'}: at most {allowed:.1%} expected"
        )
        return f"{self.name:<27} {self.value:6.2%}{told}"


@dataclass(frozen=True)
class Comparison:
    """All that was measured on one work."""

    title: str
    parity: Parity
    measured: Mapping[str, tuple[Measured, ...]]
    """By arm, one for each round."""
    ratios: tuple[Ratio, ...]
    useful_tokens: int
    peaks: Mapping[str, float]
    """Operations a second of a matrix product, measured, by type."""
    rates: Mapping[str, float]
    """Share of the peak of its type that each arm reached, by its operations."""
    tuned: Arm
    """The way of setting TRL up that was the fastest."""

    def lines(self, expected: Mapping[str, float]) -> list[str]:
        """Return the report."""
        peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in self.peaks.items())
        told = [self.title, self.parity.line(), f"matrix products of this machine: {peaks}"]
        told.append(f"TRL, tuned: batches of {self.tuned.batch} pairs, {self.tuned.dtype}")
        for name, rounds in self.measured.items():
            pairs = sum(rounds[0].step_pairs)
            seconds = statistics.median(m.total for m in rounds)
            told.append(
                f"{name:<27} {pairs / seconds:6.3f} pairs/s  {seconds:7.1f} s (pass {statistics.median(m.score_seconds for m in rounds):.1f})  "
                f"tokens {rounds[0].computed_tokens} ({self.useful_tokens / rounds[0].computed_tokens:.0%} useful)  "
                f"peak {max(m.peak_pss for m in rounds) / 2**30:.2f} GiB  {self.rates[name]:.0%} of the machine"
            )
        return told + [ratio.line(expected.get(ratio.name)) for ratio in self.ratios]

    def tree(self) -> dict[str, Any]:
        """Return it as plain values."""
        ratios = {r.name: {"median": r.median, "rounds": r.rounds, "predicted": r.predicted} for r in self.ratios}
        measured = {name: [asdict(m) for m in rounds] for name, rounds in self.measured.items()}
        return asdict(replace(self, measured={}, ratios=())) | {"ratios": ratios, "measured": measured}


def require_rival() -> None:
    """Refuse to begin without TRL, or with another version than the figures are about."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found != RIVAL_VERSION:
        msg = f"the rival is TRL {RIVAL_VERSION}, found: {found}\n\nHint: pip install 'trl=={RIVAL_VERSION}', or install prefloop with its extra `bench`."
        raise TrainingError(msg)


def compare_trainers(
    title: str, work: Work, *, shape: ModelShape, peaks: Mapping[str, float], rounds: int, say: Say
) -> Comparison:
    """Run all arms but the headline on a work.

    Raises:
        TrainingError: an arm failed, or the two trainers do not compute the same.
    """
    parity = run_parity(work)
    say(parity.line())
    if not parity.passed:
        msg = "the two trainers do not compute the same, so no ratio counts"
        raise TrainingError(msg)
    ours = Arm("prefloop", "prefloop", "online", work.dtype, batch=0)
    default = Arm("trl", "trl", "online", work.dtype, batch=BATCH)
    tuned = replace(_tuned(work, peaks, say), name="trl cached, tuned")
    arms = (
        replace(ours, name="prefloop online"),
        replace(default, name="trl online"),
        replace(ours, name="prefloop cached", reference="cached"),
        tuned,
    )
    measured: dict[str, tuple[Measured, ...]] = {arm.name: () for arm in arms}
    for number in range(rounds):
        for arm in arms:
            found = run_arm(work, arm)
            measured[arm.name] += (found,)
            say(f"round {number + 1} of {rounds}: {arm.name}: {found.total:.1f} s")
        _check_steps(measured["prefloop online"][-1], measured["trl online"][-1])
    recomputing = (
        replace(ours, name="prefloop, recomputing", checkpointing=True),
        replace(default, name="trl, recomputing", checkpointing=True),
    )
    for arm in recomputing:
        measured[arm.name] = (run_arm(work, arm),)
        say(f"{arm.name}: {measured[arm.name][0].total:.1f} s")
    compact = this_device().type == "cuda"
    everyone = (*arms, *recomputing)
    costs = {a.name: operations(shape, work, a, measured[a.name][0], compact=compact) for a in everyone}
    return Comparison(
        title=title,
        parity=parity,
        measured=measured,
        ratios=_ratios(measured, costs),
        useful_tokens=sum(group.num_tokens for group in work.groups),
        peaks=peaks,
        rates={
            a.name: costs[a.name] / statistics.median(m.total for m in measured[a.name]) / peaks[a.dtype]
            for a in everyone
        },
        tuned=tuned,
    )


def _tuned(work: Work, peaks: Mapping[str, float], say: Say) -> Arm:
    """Return the fastest way to let TRL do the work with a cached reference, by a trial on its first pairs."""
    few = -(-_TUNED_PAIRS // len(work.groups[0].pairs))
    groups = list(itertools.islice(work.groups, few))
    trial = replace(work, groups=tuple(groups), batch_pairs=sum(len(group.pairs) for group in groups))

    def seconds(arm: Arm) -> float:
        took = run_arm(trial, arm).total
        say(f"tuning TRL: batches of {arm.batch} pairs, {arm.dtype}: {took:.1f} s")
        return took

    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    first: dict[Arm, float] = {}
    for dtype in dtypes:
        slower = max(peaks.values()) / peaks[dtype]
        if slower > _SLOWER_TYPE:
            say(f"tuning TRL: {dtype} is left out, its matrix products take {slower:.0f} times as long")
            continue
        fastest = math.inf
        for batch in _TUNED_BATCHES:
            if trial.batch_pairs % batch or work.batch_pairs % batch:
                continue
            arm = Arm("trial", "trl", "cached", dtype, batch=batch, order="group_by_length")
            first[arm] = seconds(arm)
            if first[arm] > _SLOWER * fastest:
                break
            fastest = min(fastest, first[arm])
    best = sorted(first, key=first.__getitem__)[:_FINAL]
    return min(best, key=lambda arm: min(first[arm], seconds(arm)))


def _ratios(measured: Mapping[str, Sequence[Measured]], costs: Mapping[str, float]) -> tuple[Ratio, ...]:
    online = list(zip(measured["prefloop online"], measured["trl online"], strict=True))
    cached = list(zip(measured["prefloop cached"], measured["trl cached, tuned"], strict=True))
    (again,), (recomputing,) = measured["prefloop, recomputing"], measured["trl, recomputing"]
    by_online = costs["trl online"] / costs["prefloop online"]
    by_cached = costs["trl cached, tuned"] / costs["prefloop cached"]
    return (
        Ratio("online", tuple(trl.total / ours.total for ours, trl in online), by_online),
        Ratio("cached", tuple(trl.total / ours.total for ours, trl in cached), by_cached),
        Ratio("cached, 2 epochs, computed", tuple(_two_epochs(trl) / _two_epochs(ours) for ours, trl in cached)),
        Ratio("steady", tuple(trl.steady / ours.steady for ours, trl in cached)),
        Ratio("as installed", (recomputing.total / measured["prefloop online"][-1].total,)),
        Ratio(
            "recomputing",
            (recomputing.total / again.total,),
            costs["trl, recomputing"] / costs["prefloop, recomputing"],
        ),
        Ratio("memory", tuple(trl.peak_pss / ours.peak_pss for ours, trl in online)),
        Ratio("memory, recomputing", (recomputing.peak_pss / again.peak_pss,)),
    )


def _two_epochs(measured: Measured) -> float:
    # The second epoch costs what the first did: the same rows in steps of the same size.
    return measured.total + sum(measured.step_seconds)


def _check_steps(ours: Measured, rival: Measured) -> None:
    """The very runs that were timed took the same steps: the same rows, and as far as their type allows the same numbers."""
    faults = [
        f"{what} of step {step + 1}: {a:g} and {b:g}"
        for what, allowed, left, right in (
            ("tokens", 0.0, ours.step_tokens, rival.step_tokens),
            ("loss", _LOSSES_APART, ours.losses, rival.losses),
            ("log-probability", None, ours.logps, rival.logps),
        )
        for step, (a, b) in enumerate(zip(left, right, strict=True))
        if not abs(a - b) <= (_LOGPS_APART * abs(b) if allowed is None else allowed)
    ]
    if faults:
        msg = f"the timed runs did not do the same work: {'; '.join(faults[:3])}"
        raise TrainingError(msg)
