"""Says in words what blocks the next ship and what to do about it: a pure function of the loop's state.

It walks the loop from its end to its beginning: a trained candidate that is not shipped comes before new signals,
because its round is open. This module knows nothing of the screen or of where the state was read.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from app.ledger import EvaluationRow, RunRow
from dashboard.reads import Loop

Step = Literal["served", "signals", "pairs", "train", "gate", "ship"]
STEPS: tuple[Step, ...] = ("served", "signals", "pairs", "train", "gate", "ship")
_STALE = timedelta(minutes=30)


@dataclass(frozen=True)
class Advice:
    """The step that blocks the next ship, why, and what to do. `page` is the file of the page that helps, if one does."""

    step: Step
    blocks: str
    todo: str
    page: str | None = None


def advise(state: Loop, *, pairs: int, min_pairs: int, recipe: str, at: datetime) -> Advice:
    """Return what blocks the next ship.

    Args:
        state: the newest of each step.
        pairs: rows of the newest pair snapshot, 0 without one.
        min_pairs: fewer pairs than this refuse to train.
        recipe: name of the recipe file, for the commands in the words.
        at: the present.
    """
    run = state.run
    built_after_run = state.pairs is not None and (run is None or state.pairs.created_at > run.created_at)
    if run is not None and not built_after_run:
        advice = _open_round(state, run, recipe, at)
        if advice is not None:
            return advice
    if built_after_run and pairs >= min_pairs:
        return Advice(
            "train",
            f"{pairs:,} pairs are ready and no run has used them.",
            f"Run `prefloop train {recipe}`, or `prefloop loop {recipe}` for all remaining steps.",
        )
    return _collect(state, pairs=pairs if built_after_run else 0, min_pairs=min_pairs, recipe=recipe)


def age(moment: datetime, at: datetime) -> str:
    """Say how long ago a moment was, in the largest unit that fits."""
    seconds = max(0, int((at - moment).total_seconds()))
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def why_held(evaluation: EvaluationRow) -> str:
    """Say why the gate holds, in the words of its report."""
    reasons = evaluation.report.get("reasons") or [
        rule["name"] for rule in evaluation.report.get("rules", ()) if not rule.get("passed")
    ]
    return "; ".join(str(reason) for reason in reasons) or "its report gives no reason"


def _continued(run: RunRow, recipe: str) -> str:
    """Name the command that continues a run: the round that it belongs to, or the run itself."""
    in_a_round = run.run_id.endswith("-train") and "-loop-" in run.run_id
    return f"`prefloop loop {recipe}`" if in_a_round else f"`prefloop train {recipe} --run {run.run_id}`"


def _open_round(state: Loop, run: RunRow, recipe: str, at: datetime) -> Advice | None:
    if run.status == "running":
        if at - run.updated_at > _STALE:
            return Advice(
                "train",
                f"Run {run.run_id} says that it is running, but reported nothing since {age(run.updated_at, at)}.",
                f"Look at its job; {_continued(run, recipe)} continues it from its last checkpoint.",
                "runs.py",
            )
        total = run.metrics.get("total_steps")
        of_total = f" of {total:,}" if isinstance(total, int) else ""
        return Advice(
            "train", f"Run {run.run_id} trains: step {state.steps:,}{of_total}.", "Watch its curves.", "runs.py"
        )
    if run.status in {"failed", "stopped"}:
        why = (run.error or "no reason was recorded").strip().splitlines()[0]
        return Advice(
            "train",
            f"Run {run.run_id} {run.status}: {why}",
            f"Fix the cause; {_continued(run, recipe)} continues it from its last checkpoint.",
            "runs.py",
        )
    if state.candidate is None:
        return None
    champion = state.champion.model_id if state.champion else None
    candidate = state.candidate.model_id
    if candidate == champion:
        return None
    if state.evaluation is None:
        return Advice(
            "gate", f"{candidate} is trained and not evaluated.", f"Run `prefloop evaluate {recipe}`.", "models.py"
        )
    if state.evaluation.verdict == "SHIP":
        if state.champion and state.champion.previous_model_id == candidate:
            return None
        return Advice("ship", f"{candidate} passed the gate and is not shipped.", "Ship it on Models.", "models.py")
    if state.new_signals:
        return None
    return Advice(
        "gate",
        f"The gate holds {candidate}: {why_held(state.evaluation)}.",
        "Nothing is shipped. Collect more signals, then run the loop again.",
        "models.py",
    )


def _collect(state: Loop, *, pairs: int, min_pairs: int, recipe: str) -> Advice:
    if state.champion is None and not state.served.total:
        return Advice("served", "No model is served yet.", f"Start the service with `prefloop serve {recipe}`.")
    if not state.served.total:
        return Advice("served", "No answer has been served yet.", "Talk to the model.", "chat.py")
    if not state.signals.total:
        return Advice(
            "signals",
            f"{state.served.total:,} answers served, none of them judged.",
            "Judge answers: a thumb, an edit, or a comparison of two.",
            "chat.py",
        )
    if state.new_signals:
        return Advice(
            "pairs",
            f"{state.new_signals:,} signals are not in a pair snapshot yet.",
            "Build pairs.",
            "pairs.py",
        )
    if pairs:
        return Advice(
            "pairs",
            f"{pairs:,} of {min_pairs:,} pairs{_time_left(state, pairs, min_pairs)}.",
            "Judge more answers; edits and comparisons make a pair each.",
            "chat.py",
        )
    return Advice(
        "signals",
        "The last round is closed and nothing was judged since.",
        "Judge answers of the champion to begin the next round.",
        "chat.py",
    )


def _time_left(state: Loop, pairs: int, min_pairs: int) -> str:
    per_day = state.signals.per_day * pairs / max(1, state.signals.total)
    if per_day <= 0:
        return ""
    days = (min_pairs - pairs) / per_day
    return f": about {days:,.0f} days at this rate" if days >= 1 else ": less than a day at this rate"
