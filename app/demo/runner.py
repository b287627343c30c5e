"""The demo: one round of the loop on the embedded model with a simulated audience, and a report in words.

It uses what a user has: the service and the loop as child processes, the ledger to read what came of it. Run again it
makes another round on top; interrupted it continues at the stage it was in.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from sqlalchemy.orm import Session

from app.config import OBJECTIVE_OPTIONS, GateSection, Recipe, TrainSection, load_recipe
from app.errors import HOLD_EXIT_CODE, DataError, Interrupted, RecipeError
from app.evaluation.prompts import Prompt, PromptSplit, load_prompts, split_prompts
from app.evaluation.rules import load_style
from app.ledger import EvaluationRow, FeedbackRow, Ledger, ResponseRow, RunRow
from app.schemas import content_hash
from app.services import Services
from app.storage import HOME_VARIABLE, Home, write_atomically

REPORT = "report.json"
_MIN_HELD_OUT_PROMPTS = 60
_ENOUGH_HELD_OUT_PROMPTS = 130
_MAX_HELD_OUT_PROMPTS = 200
_MIN_TRAIN_PROMPTS = 60
_ENOUGH_TRAIN_PROMPTS = 80
_OUTSIDE_LIMIT = 256
"""Tokens at least of an answer to a prompt from outside, which seldom asks for one sentence as the demo's own do."""
_OUTSIDE_MIN_PROMPTS = 40
"""Judged prompts that are enough from outside: many answers are cut all the same, and the interval says how sure it is."""
_OUTSIDE_STEPS = 80
"""Steps of training on them; nobody said how long that may take."""
_OUTSIDE_REWARD_ACCURACY = 0.4
"""What the lower bound of held-out reward accuracy must exceed. Many prompts come to nothing, and on the twenty or
thirty held-out pairs that are left a policy that ranks two of three rightly seldom has one over 0.5. What was learned,
the win rate says."""


def run_demo(
    home: Home,
    *,
    recipe: Path,
    audience: str,
    style: Path | None,
    prompts: Path | None,
    overrides: Sequence[str],
) -> int:
    """Run one round and write `demo/report.json`; returns 0 = shipped, 3 = HOLD, others = errors.

    Raises:
        PrefloopError: an option, a style or a prompt file is wrong; nothing was started then.
    """
    console = Console()
    if audience not in ("style", "random"):
        msg = f"no audience `{audience}`\n\nHint: --audience is `style` or `random`."
        raise RecipeError(msg)
    asked = load_recipe(recipe, overrides)
    settings = [
        *_outside(home, style, prompts, asked),
        *_types(console, asked, overrides),
        *overrides,
        f"collect.audience={audience}",
    ]
    loaded = load_recipe(recipe, settings)
    print_overrides(console, recipe, loaded)
    path = home.local("demo", REPORT)
    # Ctrl-C leaves no report; the one before would be taken for this round's.
    path.unlink(missing_ok=True)
    began = time.time()
    arguments = [part for setting in settings for part in ("--set", setting)]
    try:
        code = _child([sys.executable, "-m", "ray_jobs", "loop", str(recipe), *arguments], home)
    finally:
        services = Services.read(home)
        # Also one that an earlier demo left when it was killed; never one that a user started.
        if services is not None and services.started_by == "loop":
            _child([sys.executable, "-m", "serving.deploy", "--stop"], home)
    ledger = Ledger.open(home.ledger_url)
    ended = code in (0, HOLD_EXIT_CODE) or _ended_since(ledger, loaded.name, began)
    report = {"exit_code": code, "error": None if code in (0, HOLD_EXIT_CODE) else _error(ledger, loaded.name, began)}
    if ended:
        report |= make_report(ledger, loaded.name, last_attempt_s=time.time() - began)
    write_atomically(home.filesystem, str(path), json.dumps(report, indent=1).encode())
    if ended:
        print_closing(console, report, path, recipe)
    else:
        console.print(f"the demo stopped with exit code {code}; the message stands above. Run it again to continue.")
    return code


def _newest_round(session: Session, recipe_name: str) -> RunRow | None:
    newest = sa.select(RunRow).where(RunRow.kind == "loop").order_by(RunRow.updated_at.desc())
    return next((row for row in session.scalars(newest) if row.recipe["name"] == recipe_name), None)


def _ended_since(ledger: Ledger, recipe_name: str, began: float) -> bool:
    """Whether a round came to its end, although with an error: it shipped, and requests failed meanwhile."""
    with ledger.read() as session:
        run = _newest_round(session, recipe_name)
    return run is not None and run.status == "succeeded" and run.updated_at.timestamp() >= began


def _error(ledger: Ledger, recipe_name: str, began: float) -> str:
    """Return what ended the round of this attempt, or where to look for it."""
    with ledger.read() as session:
        run = _newest_round(session, recipe_name)
    if run is None or run.updated_at.timestamp() < began:
        return "the loop stopped before its round began; the message stands on the terminal"
    if run.status != "succeeded":
        return run.error or f"the loop died in stage {run.metrics.get('stage')}"
    shipped = run.metrics["stages"].get("ship", {})
    return f"the round shipped, and its simulated load failed: {shipped.get('failed_requests', 0)} requests failed, {shipped.get('streams_across_switch', 0)} streams crossed the switch"


def make_report(ledger: Ledger, recipe_name: str, *, last_attempt_s: float) -> dict[str, Any]:
    """Collect the figures of the newest finished round from the ledger; its stages may have taken several attempts."""
    with ledger.read() as session:
        run = _newest_round(session, recipe_name)
        assert run is not None  # noqa: S101  a round just ended
        stages: dict[str, Any] = run.metrics["stages"]
        evaluation = session.get_one(EvaluationRow, stages["evaluate"]["evaluation"])
        kinds = session.execute(
            sa.select(FeedbackRow.kind, sa.func.count())
            .join(ResponseRow, ResponseRow.response_id == FeedbackRow.response_id)
            .where(
                FeedbackRow.created_at >= run.created_at,
                ResponseRow.deployment == run.recipe["serving"]["deployment"],
            )
            .group_by(FeedbackRow.kind)
        ).all()
    shipped = stages.get("ship", {})
    before = stages["serve"]["champion"]
    figures = evaluation.report["figures"]
    stages_s: dict[str, float] = run.metrics["seconds"]
    total_s = max(last_attempt_s, sum(stages_s.values()))
    return {
        "seconds": {"total": round(total_s, 1), **{k: round(v, 1) for k, v in stages_s.items()}},
        "run": run.run_id,
        "simulated_audience": run.recipe["collect"]["audience"],
        "responses": stages["collect"]["answers"],
        "feedback_events": {kind: count for kind, count in kinds},  # noqa: C416  rows are not tuples to dict()
        "pairs": stages["build_pairs"]["by_source"],
        "dropped": dict(Counter(stages["build_pairs"]["dropped"]) + Counter(stages["prepare"]["dropped"])),
        "train_steps": stages["train"]["steps"],
        "reward_accuracy": stages["train"]["reward_accuracy"],
        **{key: figures[key] for key in ("win_rate", "ci_low", "ci_high", "n_prompts", "length_ratio", "golden")},
        "verdict": evaluation.verdict,
        "reasons": [
            rule["reason"]
            for rule in evaluation.report["rules"]
            if not rule["passed"] and rule.get("decides") != "warn"
        ],
        "champion_before": before,
        "champion_after": stages["train"]["model"] if shipped else before,
        "requests_during_switch": shipped.get("requests_during_switch", 0),
        "failed_requests": shipped.get("failed_requests", 0),
        "streams_across_switch": shipped.get("streams_across_switch", 0),
        "switched_under_load": shipped.get("switched_under_load", False),
        "models_seen": shipped.get("models_seen", {}),
    }


def print_overrides(console: Console, path: Path, recipe: Recipe) -> None:
    """Say which defaults the recipe overrides, with the comment beside each."""
    console.print(f"recipe {path}: values that differ from the defaults", highlight=False)
    comments = _comments(path)
    for place, value, default in _differences(recipe.model_dump(mode="json")):
        why = comments.get(place.rsplit(".", 1)[-1], "")
        console.print(
            f"  {place} = {value!r} (default {default!r}){'  ' + why if why else ''}", highlight=False, markup=False
        )


def print_closing(console: Console, report: Mapping[str, Any], path: Path, recipe: Path) -> None:
    """Say what happened, what to open and what to do next."""
    pairs = sum(report["pairs"].values())
    events = sum(report["feedback_events"].values())
    win = f"{report['win_rate']:.0%} [{report['ci_low']:.0%}, {report['ci_high']:.0%}] on {report['n_prompts']} prompts"
    console.rule(f"{report['verdict']}")
    console.print(
        f"A SIMULATED audience ({report['simulated_audience']}) saw {report['responses']} answers and gave {events} "
        f"judgements, which made {pairs} pairs. Training took {report['train_steps']} steps; held-out reward accuracy "
        f"{'not known' if report['reward_accuracy'] is None else format(report['reward_accuracy'], '.0%')}. The new model wins {win} against the champion "
        f"(length ratio {report['length_ratio']:.2f}).",
        highlight=False,
    )
    if report["verdict"] == "SHIP":
        console.print(
            f"{report['champion_before']} was replaced by {report['champion_after']}"
            + (
                f" under {report['requests_during_switch']} requests, of which {report['failed_requests']} failed."
                if report["switched_under_load"]
                else "."
            ),
            highlight=False,
        )
    else:
        console.print(f"Nothing was shipped; {report['champion_before']} stays:", highlight=False)
        for reason in report["reasons"]:
            console.print(f"  - {reason}", highlight=False, markup=False)
    console.print(
        f"Report: {path}\n"
        f"Open:   .venv/bin/prefloop serve {recipe}, and beside it .venv/bin/prefloop dashboard {recipe}\n"
        f"Next:   make demo again for a second round on top; .venv/bin/prefloop status; "
        f".venv/bin/prefloop rollback {recipe}",
        highlight=False,
    )


def _outside(home: Home, style: Path | None, prompts: Path | None, recipe: Recipe) -> list[str]:
    settings = []
    if style is not None:
        load_style(str(style))
        settings += [
            f"collect.style={json.dumps(str(style.resolve()))}",
            f"evaluate.judge_rules={json.dumps(str(style.resolve()))}",
        ]
    if prompts is not None:
        found = load_prompts(str(prompts))
        split = _split(found.prompts)
        folder = home.local("demo", "prompts", content_hash([p.text for p in found.prompts])[:12])
        for name, part in (("collect", split.train), ("evaluate", split.held_out)):
            path = folder / f"{name}.jsonl"
            write_atomically(home.filesystem, str(path), _jsonl(part))
            settings.append(f"{name}.prompts={json.dumps(str(path))}")
        room = min(_OUTSIDE_LIMIT, recipe.serving.max_tokens)
        settings += [
            f"collect.max_tokens={max(room, recipe.collect.max_tokens if recipe.collect else 0)}",
            f"evaluate.max_new_tokens={max(room, recipe.evaluate.max_new_tokens if recipe.evaluate else 0)}",
            f"evaluate.gate.rules.judged_prompts.threshold={_OUTSIDE_MIN_PROMPTS}",
            f"train.min_steps={_OUTSIDE_STEPS}",
            f"train.max_steps={_OUTSIDE_STEPS}",
        ]
        asked = recipe.evaluate.gate.rules.get("reward_accuracy") if recipe.evaluate else None
        if asked is not None:
            threshold = min(asked.threshold, _OUTSIDE_REWARD_ACCURACY)
            settings.append(f"evaluate.gate.rules.reward_accuracy.threshold={threshold}")
    return settings


def _types(console: Console, recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """Return overrides that compute in fp32 where the demo runs on a CPU that has no bf16, and nobody named a type."""
    if any("dtype" in override for override in overrides):
        return []
    # transformers takes seconds to import, in which a wrong option could be told.
    from app.models import computes_bfloat16

    if recipe.workers.use_gpu or recipe.serving.gpus_per_replica or computes_bfloat16():
        return []
    console.print("this CPU computes in bfloat16 several times slower than in float32: using float32", highlight=False)
    return ["train.dtype=float32", "serving.dtype=float32"]


def _split(prompts: Sequence[Prompt]) -> PromptSplit:
    """Hold out half, more of few prompts, or as few as will do where near-duplicates stand in the way.

    Answers that are cut are not judged, so more prompts are held out than the gate asks for.
    """
    few = min(_ENOUGH_HELD_OUT_PROMPTS, len(prompts) - _ENOUGH_TRAIN_PROMPTS)
    held_out = min(max(len(prompts) // 2, few, _MIN_HELD_OUT_PROMPTS), _MAX_HELD_OUT_PROMPTS)
    split = functools.partial(split_prompts, prompts, min_train=_MIN_TRAIN_PROMPTS, seed=0)
    try:
        return split(held_out=held_out)
    except DataError:
        return split(held_out=_MIN_HELD_OUT_PROMPTS)


def _jsonl(prompts: Sequence[Prompt]) -> bytes:
    rows = ({"id": p.id, "prompt": p.text, "cluster": p.cluster} for p in prompts)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _child(command: Sequence[str], home: Home) -> int:
    with subprocess.Popen(list(command), env={**os.environ, HOME_VARIABLE: home.uri}) as child:
        previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait()  # the terminal sent Ctrl-C to the child too
            msg = "interrupted; what was acknowledged is kept, and the same command continues"
            raise Interrupted(msg) from None
        finally:
            signal.signal(signal.SIGTERM, previous)


def _differences(tree: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []

    def walk(node: Mapping[str, Any], model: Any, place: str) -> None:
        for name, field in model.model_fields.items():
            key = field.alias or name
            value, where = node.get(key), f"{place}.{key}" if place else key
            nested = [
                a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(a, "model_fields")
            ]
            if model is TrainSection and key == "options":
                nested = [OBJECTIVE_OPTIONS.get(node["objective"])]
            if model is GateSection and isinstance(value, Mapping):
                usual = GateSection().model_dump(mode="json")[key]
                changed = [rule for rule in value if value[rule] != usual.get(rule)]
                found.extend(
                    (f"{where}.{rule}", _changes(value[rule], usual.get(rule)), _changes(usual.get(rule), value[rule]))
                    for rule in changed
                )
            elif any(nested) and isinstance(value, Mapping):
                walk(value, nested[0], where)
            elif not field.is_required() and value != _plain(field.get_default()):
                found.append((where, value, _plain(field.get_default())))

    walk(tree, Recipe, "")
    return found


def _changes(rule: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Any:
    """Return what a rule of the gate says otherwise than another."""
    if rule is None or other is None:
        return rule
    return {key: value for key, value in rule.items() if value != other[key]}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _comments(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    parts = (line.partition("#") for line in lines if ":" in line and "#" in line)
    return {before.split(":")[0].strip(): comment.strip() for before, _, comment in parts if before}
