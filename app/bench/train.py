"""`prefloop bench train`: our trainer against TRL's on the same work in the same run.

Four ratios of seconds, TRL over ours, each from arms that did the same rows in optimizer steps of as many pairs with the
same optimizer, clipping and type, one after the other in every round:

    online     the reference is asked in every step; both as they are installed: TRL in random order, batches of 8 pairs,
               and activations recomputed in backward, which ours keeps
    cached     the reference scores all rows once; TRL with rows by length and the best of several batch sizes and types, and
               of keeping activations or recomputing them
    steady     a token of a pair in the cached arms, without the pass and without the first step
    headline   wall-clock from a pair snapshot to an exported model: `prefloop train` (Ray and all) and a TRL script

and one of bytes, `memory`: the peaks of the online arms. By default TRL recomputes activations, which saves memory and
costs operations, and ours keeps them, so `online` and `memory` are told for both keeping and both recomputing them, too.
Ratios count only where one fp32 step of both gives the same loss and gradient.
"""

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
from app.bench.work import Work, by_length
from app.errors import OutOfMemory, TrainingError

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
_LOSSES_APART = {"bfloat16": 0.05, "float32": 2e-3}
"""Of one step in two runs; in bf16 the noise of a reward margin is `beta` times some tenths of a nat."""
_LOGPS_APART = 0.01
"""Of the mean log-probability of chosen answers of a step, relative: another row would change it by a tenth."""
_LOGPS_APART_REORDERED = 0.05
"""Of the mean over all steps of runs whose order differs: one sees as the policy was before it moved what the other sees after."""

Part = Literal["online", "cached", "headline"]
RATIOS: Mapping[Part, tuple[str, ...]] = {
    "online": tuple(
        f"{what}{how}" for what in ("online", "memory") for how in ("", ", both keeping", ", both recomputing")
    ),
    "cached": ("cached", "cached, epochs doubled", "steady"),
    "headline": ("headline", "ray overhead", "data wait"),
}
"""What is told of each part; the last two are shares of our time, the others ratios."""

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
    tuned: Arm | None
    """The way of setting TRL up that was the fastest; None where nothing is asked about a cached reference."""

    def lines(self, expected: Mapping[str, float]) -> list[str]:
        """Return the report."""
        peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in self.peaks.items())
        told = [self.title, self.parity.line(), f"matrix products of this machine: {peaks}"]
        if self.tuned is not None:
            how = "recomputed" if self.tuned.checkpointing else "kept"
            told.append(f"TRL, tuned: batches of {self.tuned.batch} pairs, {self.tuned.dtype}, activations {how}")
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
    title: str,
    work: Work,
    *,
    parts: Sequence[Part],
    shape: ModelShape,
    peaks: Mapping[str, float],
    rounds: int,
    say: Say,
) -> Comparison:
    """Run the arms of these parts but the headline on a work.

    Raises:
        TrainingError: an arm failed, or the two trainers do not compute the same.
    """
    parity = run_parity(work)
    say(parity.line())
    if not parity.passed:
        msg = "the two trainers do not compute the same, so no ratio counts"
        raise TrainingError(msg)
    ours = Arm("prefloop online", "prefloop", "online", work.dtype, batch=0)
    default = Arm("trl online", "trl", "online", work.dtype, batch=BATCH, checkpointing=True)
    tuned = replace(_tuned(work, peaks, say), name="trl cached, tuned") if "cached" in parts else None
    arms: list[Arm] = []
    if "online" in parts:
        keeping = replace(default, name="trl online, keeping", checkpointing=False)
        arms += [ours, default, keeping, replace(ours, name="prefloop online, recomputing", checkpointing=True)]
    if tuned is not None:
        arms += [replace(ours, name="prefloop cached", reference="cached"), tuned]
    measured: dict[str, tuple[Measured, ...]] = {arm.name: () for arm in arms}
    for number in range(rounds):
        for arm in arms:
            found = run_arm(work, arm)
            measured[arm.name] += (found,)
            say(f"round {number + 1} of {rounds}: {arm.name}: {found.total:.1f} s")
        if "online" in parts:
            for a, b in (("prefloop online", "trl online"), ("prefloop online, recomputing", "trl online, keeping")):
                _check_steps(measured[a][-1], measured[b][-1], dtype=work.dtype)
        if tuned is not None:
            _check_rows(measured["prefloop cached"][-1], measured[tuned.name][-1])
    compact = this_device().type == "cuda"
    costs = {a.name: operations(shape, work, a, measured[a.name][0], compact=compact) for a in arms}
    return Comparison(
        title=title,
        parity=parity,
        measured=measured,
        ratios=_ratios(measured, costs),
        useful_tokens=sum(group.num_tokens for group in work.groups) * work.epochs,
        peaks=peaks,
        rates={
            a.name: costs[a.name] / statistics.median(m.total for m in measured[a.name]) / peaks[a.dtype] for a in arms
        },
        tuned=tuned,
    )


def _tuned(work: Work, peaks: Mapping[str, float], say: Say) -> Arm:
    """Return the fastest way to let TRL do the work with a cached reference, by a trial on some of its pairs.

    They are whole steps of the work in order of length, at even distances, as those of the work are of all pairs.
    """
    pairs = len(work.groups[0].pairs)
    count = math.lcm(BATCH, pairs)
    count *= -(-_TUNED_PAIRS // count)
    # As many groups lie together as make a batch of any size that is tried.
    run = math.lcm(BATCH, pairs) // pairs
    ordered = by_length(work.groups)
    runs = [tuple(ordered[i : i + run]) for i in range(0, len(ordered) - run + 1, run)]
    wanted = min(count // pairs // run, len(runs))
    # Between two runs the longer one.
    groups = [group for i in range(wanted) for group in runs[-(-(2 * i + 1) * len(runs) // (2 * wanted)) - 1]]
    trial, longest = (
        replace(work, groups=tuple(chosen), batch_pairs=len(chosen) * pairs) for chosen in (groups, runs[0])
    )

    def seconds(arm: Arm, trial: Work) -> float:
        how = "recomputing" if arm.checkpointing else "keeping"
        what = f"tuning TRL: batches of {arm.batch} pairs, {arm.dtype}, {how} activations"
        try:
            took = run_arm(trial, arm).total
        except OutOfMemory:
            say(f"{what}: left out, memory does not hold it")
            return math.inf
        say(f"{what}: {took:.1f} s")
        return took

    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    first: dict[Arm, float] = {}
    for dtype in dtypes:
        slower = max(peaks.values()) / peaks[dtype]
        if slower > _SLOWER_TYPE:
            say(f"tuning TRL: {dtype} is left out, its matrix products take {slower:.0f} times as long")
            continue
        for checkpointing in (False, True):
            fastest = math.inf
            for batch in _TUNED_BATCHES:
                if trial.batch_pairs % batch or work.batch_pairs % batch:
                    continue
                arm = Arm("trial", "trl", "cached", dtype, batch, order="by_length", checkpointing=checkpointing)
                first[arm] = seconds(arm, trial)
                if first[arm] == math.inf or first[arm] > _SLOWER * fastest:
                    break
                fastest = min(fastest, first[arm])
    ranked = sorted((arm for arm, took in first.items() if took < math.inf), key=first.__getitem__)
    best = {arm: min(first[arm], seconds(arm, trial)) for arm in ranked[:_FINAL]}
    for arm in [*sorted(best, key=best.__getitem__), *ranked[_FINAL:]]:
        # The trial may have had none of the longest rows.
        if seconds(arm, longest) < math.inf:
            return arm
    msg = "memory does not hold TRL with a cached reference in any way that was tried\n\nHint: lower --max-length."
    raise TrainingError(msg)


def _ratios(measured: Mapping[str, Sequence[Measured]], costs: Mapping[str, float]) -> tuple[Ratio, ...]:
    def over(ours: str, trl: str, of: Callable[[Measured], float]) -> tuple[float, ...]:
        return tuple(of(b) / of(a) for a, b in zip(measured[ours], measured[trl], strict=True))

    found: list[Ratio] = []
    if "prefloop online" in measured:
        ways = {
            "": ("prefloop online", "trl online"),
            ", both keeping": ("prefloop online", "trl online, keeping"),
            ", both recomputing": ("prefloop online, recomputing", "trl online"),
        }
        found += [Ratio(f"online{w}", over(a, b, _total), costs[b] / costs[a]) for w, (a, b) in ways.items()]
        found += [Ratio(f"memory{w}", over(a, b, lambda m: m.peak_pss)) for w, (a, b) in ways.items()]
    if "prefloop cached" in measured:
        arms = ("prefloop cached", "trl cached, tuned")
        found += [
            Ratio("cached", over(*arms, _total), costs[arms[1]] / costs[arms[0]]),
            Ratio("cached, epochs doubled", over(*arms, _doubled)),
            Ratio("steady", over(*arms, lambda m: m.steady)),
        ]
    return tuple(found)


def _total(measured: Measured) -> float:
    return measured.total


def _doubled(measured: Measured) -> float:
    # Computed: as many epochs again cost what these did, and no pass.
    return measured.total + sum(measured.step_seconds)


def _check_rows(ours: Measured, rival: Measured) -> None:
    """The cached arms, whose order differs, took the same rows."""
    logps = [statistics.fmean(arm.logps) for arm in (ours, rival)]
    apart = abs(logps[0] - logps[1])
    if sum(ours.step_tokens) != sum(rival.step_tokens) or not apart <= _LOGPS_APART_REORDERED * abs(logps[1]):
        msg = f"the timed runs did not do the same work: tokens {sum(ours.step_tokens)} and {sum(rival.step_tokens)}, log-probability of chosen answers {logps[0]:g} and {logps[1]:g}"
        raise TrainingError(msg)


def _check_steps(ours: Measured, rival: Measured, *, dtype: str) -> None:
    """The very runs that were timed took the same steps: the same rows, and as far as their type allows the same numbers."""
    faults = [
        f"{what} of step {step + 1}: {a:g} and {b:g}"
        for what, allowed, left, right in (
            ("tokens", 0.0, ours.step_tokens, rival.step_tokens),
            ("loss", _LOSSES_APART[dtype], ours.losses, rival.losses),
            ("log-probability", None, ours.logps, rival.logps),
        )
        for step, (a, b) in enumerate(zip(left, right, strict=True))
        if not abs(a - b) <= (_LOGPS_APART * abs(b) if allowed is None else allowed)
    ]
    if faults:
        msg = f"the timed runs did not do the same work: {'; '.join(faults[:3])}"
        raise TrainingError(msg)
