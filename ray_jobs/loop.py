"""The loop: every step from feedback to ship, in one job that can be interrupted anywhere and continues there.

    python -m ray_jobs.loop RECIPE.yaml [--set a.b=c]

With a section `collect` in the recipe a *simulated* audience first talks to the running service, and simulated traffic
runs across the switch to a new champion; without it the loop takes what real users left in the ledger, or the pair
snapshot that the recipe names. What a finished
stage made is kept in the run's row, so the same recipe again continues an unfinished run, or begins the next round.
Exit code 3: the gate holds.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from rich.console import Console

from app.config import Recipe, differing
from app.demo.audience import run_audience
from app.demo.traffic import Traffic
from app.errors import (
    HOLD_EXIT_CODE,
    DataError,
    OutOfMemory,
    PrefloopError,
    RecipeError,
    ServiceError,
    TrainingError,
    WorkersLost,
)
from app.evaluation.learning import Learning
from app.evaluation.material import read_material
from app.evaluation.prompts import load_prompts
from app.evaluation.rules import load_style
from app.ledger import TAKEN_OVER_S, EvaluationRow, Ledger, RunRow, now
from app.models import code_version, ensure_sft
from app.preferences.snapshots import resolve_snapshot
from app.services import Services
from app.storage import HOME_VARIABLE, Home
from ray_jobs.build_pairs import build_pairs
from ray_jobs.evaluate import evaluate, require_answered
from ray_jobs.prepare import prepare, print_summary
from ray_jobs.progress import Meter
from ray_jobs.session import Session, ray_cluster, run_job
from ray_jobs.ship import on_sealed, ship
from ray_jobs.train import look_ahead, print_measures, require_pairs, tell_unusual_options, train, usable_rows

_CROSSING_STREAMS = 2
"""Streams that must have been open while the champion changed, so that "none was cut" says something."""


class LoopRun:
    """One round of the loop: its row in the ledger, with what each finished stage made."""

    def __init__(self, ledger: Ledger, run_id: str, abandons: str = "") -> None:
        self.ledger = ledger
        self.run_id = run_id
        self.abandons = abandons
        """Which interrupted round of another recipe it takes the place of, and why; empty where there is none."""

    @classmethod
    def open(cls, ledger: Ledger, recipe: Recipe) -> "LoopRun":
        """Continue the newest round of this recipe if it was interrupted, else begin a new one.

        Other machines, or other ways to use them, make no other recipe: a round whose cluster shrank goes on.
        """
        tree = recipe.model_dump(mode="json")
        with ledger.write() as session:
            rows = session.scalars(sa.select(RunRow).where(RunRow.kind == "loop").order_by(RunRow.created_at.desc()))
            last, abandons = next((row for row in rows if row.recipe["name"] == recipe.name), None), ""
            if last is not None and last.status in ("running", "stopped"):
                changed = [name for name in differing(last.recipe, tree) if not name.startswith(_ANYWHERE)]
                if not changed:
                    last.recipe, last.attempt = tree, last.attempt + 1
                    last.status, last.updated_at, last.error = "running", now(), None
                    return cls(ledger, last.run_id)
                last.status, last.updated_at = "abandoned", now()
                last.error = f"the recipe has another {', '.join(changed)} now"
                abandons = f"round {last.run_id} is abandoned, with what it trained: {last.error}"
            run_id = f"{recipe.name}-loop-{uuid.uuid4().hex[:8]}"
            row = RunRow(
                run_id=run_id,
                kind="loop",
                status="running",
                recipe=tree,
                metrics={"stages": {}, "seconds": {}, "began": now().isoformat()},
                attempt=1,
                code_version=code_version(),
                created_at=now(),
                updated_at=now(),
            )
            session.add(row)
        return cls(ledger, run_id, abandons)

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stages made so far."""
        with self.ledger.read() as session:
            return dict(session.get_one(RunRow, self.run_id).metrics)

    @property
    def began(self) -> datetime:
        """When the round began: earlier feedback belongs to earlier rounds."""
        return datetime.fromisoformat(self.metrics["began"])

    def stage(self, name: str, body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage unless it is finished; return what it made."""
        metrics = self.metrics
        if name in metrics["stages"]:
            return dict(metrics["stages"][name])
        self._update(metrics={**metrics, "stage": name})
        start = time.monotonic()
        try:
            made = body()
        finally:
            metrics = self.metrics
            seconds = {**metrics["seconds"], name: metrics["seconds"].get(name, 0.0) + time.monotonic() - start}
            self._update(metrics={**metrics, "seconds": seconds})
        self._update(metrics={**self.metrics, "stages": {**metrics["stages"], name: made}})
        return made

    def forget(self, name: str) -> None:
        """Let the next attempt run a stage again."""
        metrics = self.metrics
        self._update(metrics={**metrics, "stages": {n: made for n, made in metrics["stages"].items() if n != name}})

    def end(self, status: str, *, error: str | None = None, output_model_id: str | None = None) -> None:
        """Close the round."""
        self._update(status=status, error=error, output_model_id=output_model_id)

    def _update(self, **values: Any) -> None:
        with self.ledger.write() as session:
            row = session.get_one(RunRow, self.run_id)
            for name, value in values.items():
                setattr(row, name, value)
            row.updated_at = now()


_ANYWHERE = ("workers.", "track.")
"""What of a recipe may change while a round goes on, with `SAME_STEPS`: where it runs, and who is told."""


def run_loop(session: Session, console: Console) -> int:
    """Run one round and return the exit code."""
    name = session.recipe.name
    with session.ledger.alone(f"loop-{name}", patience_s=TAKEN_OVER_S) as alone:
        if not alone:
            msg = f"a loop of recipe `{name}` is running in `{session.home.uri}` already\n\nHint: wait for it, or stop it."
            raise ServiceError(msg)
        return _run_round(session, console)


def _run_round(session: Session, console: Console) -> int:
    ledger, recipe = session.ledger, session.recipe
    _read_inputs(recipe)
    run = LoopRun.open(ledger, recipe)
    console.print(f"round [bold]{run.run_id}[/bold], home {session.home.uri}", highlight=False)
    if run.abandons:
        console.print(f"warning: {run.abandons}", highlight=False, markup=False)
    try:
        verdict = _stages(session, run, console)
    except KeyboardInterrupt:
        run.end("stopped", error="interrupted")
        raise
    except PrefloopError as error:
        # The same data would fail again, so the next call begins a new round; but no training is ever thrown away.
        hopeless = isinstance(error, DataError | TrainingError) and not isinstance(error, WorkersLost | OutOfMemory)
        run.end("failed" if hopeless and "train" not in run.metrics["stages"] else "stopped", error=str(error))
        raise
    shipped = run.metrics["stages"].get("ship", {})
    if failed := shipped.get("failed_requests", 0):
        msg = f"round `{run.run_id}` shipped, but {failed} simulated requests failed or were cut while the champion changed"
        raise ServiceError(msg)
    if shipped.get("switched_under_load") and (crossed := shipped["streams_across_switch"]) < _CROSSING_STREAMS:
        msg = f"round `{run.run_id}` shipped, but only {crossed} simulated streams were open while the champion changed, so nothing shows that none is cut\n\nHint: a larger collect.max_tokens makes them last longer; collect.switch_requests = 0 ships without simulated load."
        raise ServiceError(msg)
    return 0 if verdict == "SHIP" else HOLD_EXIT_CODE


def _read_inputs(recipe: Recipe) -> None:
    """Read what later stages will read, so that a typo costs a second and no training.

    Raises:
        DataError: something cannot be read.
        RecipeError: the recipe has no section `evaluate`, or collects feedback and names a snapshot that would be used in
            its place.
    """
    if recipe.collect is not None and recipe.snapshot is not None:
        msg = f"snapshot = `{recipe.snapshot}` would be used in place of the feedback that the section `collect` gathers\n\nHint: leave one of them out."
        raise RecipeError(msg)
    read_material(recipe.evaluation())
    if recipe.collect is not None:
        load_prompts(recipe.collect.prompts)
        if recipe.collect.audience == "style":
            load_style(recipe.collect.style)


def _stages(session: Session, run: LoopRun, console: Console) -> str:
    home, ledger, recipe = session.home, session.ledger, session.recipe
    if recipe.collect is not None:
        run.stage("serve", lambda: _served(session, console))
        # The service may have gone since an interruption, so it is looked after in every attempt.
        _ensure_service(session, console)
        run.stage("collect", lambda: _collect(session, run, console))
        recipe = recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"since": run.began})})
    pairs = run.stage("build_pairs", lambda: _made_pairs(home, ledger, recipe))
    _say(console, "build_pairs", f"{pairs['pairs']} pairs from {pairs['by_source']}")
    require_pairs(recipe, pairs["train_pairs"])
    with ray_cluster(home):
        prepared = run.stage("prepare", lambda: _prepared(home, ledger, recipe, pairs["snapshot"], console))
        _say(console, "prepare", f"training snapshot {prepared['snapshot']}")
        trained = run.stage("train", lambda: _trained(home, ledger, recipe, prepared["snapshot"], run, console))
        _say(console, "train", f"{trained['steps']} steps, model {trained['model']}")
        judged = run.stage("evaluate", lambda: _judged(home, ledger, recipe, trained))
        _say(console, "evaluate", judged["verdict"])
        if judged["verdict"] == "SHIP" and recipe.evaluation().sealed is not None:
            # Before the switch, which goes on under load and must not last as long as an evaluation.
            judged = run.stage("sealed", lambda: _judged_on_sealed(home, ledger, recipe, trained))
            _say(console, "evaluate on sealed prompts", judged["verdict"])
    if judged["verdict"] == "SHIP":
        run.stage("ship", lambda: _shipped(session, run, trained["model"], console))
        run.end("succeeded", output_model_id=trained["model"])
    else:
        run.end("held", output_model_id=trained["model"])
    return str(judged["verdict"])


def _collect(session: Session, run: LoopRun, console: Console) -> dict[str, Any]:
    section = session.recipe.collect
    assert section is not None  # noqa: S101
    services = _services(session.home)
    console.print("collect: a SIMULATED audience talks to the service", highlight=False)
    with Meter(console) as meter:
        return run_audience(
            gateway_url=services.gateway_url,
            api_key=session.home.api_key(),
            section=section,
            round_id=run.run_id,
            # On another machine a round that was killed would ask its audience again.
            journal=session.home.near("demo", f"{run.run_id}.jsonl"),
            on_progress=functools.partial(meter.show, "collect"),
        )


def _made_pairs(home: Home, ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    row = (
        build_pairs(home, ledger, recipe)
        if recipe.snapshot is None
        else resolve_snapshot(home, ledger, recipe.snapshot, kind="pairs")
    )
    return {
        "snapshot": row.snapshot_id,
        "pairs": row.manifest["counts"]["by_kind"].get("pair", 0),
        "train_pairs": usable_rows(recipe, row),
        "by_source": row.manifest["counts"]["by_source"],
        "dropped": row.manifest["counts"]["dropped"],
    }


def _prepared(home: Home, ledger: Ledger, recipe: Recipe, pair_snapshot_id: str, console: Console) -> dict[str, Any]:
    look_ahead(home, recipe, console)
    tell_unusual_options(home, ledger, recipe, console)
    row = prepare(home, ledger, recipe, pair_snapshot_id, console=console)
    print_summary(console, row)
    return {"snapshot": row.snapshot_id, "dropped": row.manifest["counts"]["dropped"]}


def _trained(
    home: Home, ledger: Ledger, recipe: Recipe, snapshot_id: str, run: LoopRun, console: Console
) -> dict[str, Any]:
    result = train(home, ledger, recipe, snapshot_id, run_id=f"{run.run_id}-train", console=console)
    print_measures(console, result)
    accuracy = result.learning.accuracy if isinstance(result.learning, Learning) else None
    return {
        "run": result.run_id,
        "model": result.model.model_id,
        "steps": result.steps,
        "reward_accuracy": accuracy,
        "learned": bool(result.learning and result.learning.learned),
    }


def _judged(home: Home, ledger: Ledger, recipe: Recipe, trained: dict[str, Any]) -> dict[str, Any]:
    row: EvaluationRow = evaluate(home, ledger, recipe, trained["model"], trained["run"])
    # A verdict of the judge's absence would end the round.
    require_answered(row)
    return {"evaluation": row.evaluation_id, "verdict": row.verdict}


def _judged_on_sealed(home: Home, ledger: Ledger, recipe: Recipe, trained: dict[str, Any]) -> dict[str, Any]:
    row = on_sealed(home, ledger, recipe, trained["model"], trained["run"])
    return {"evaluation": row.evaluation_id, "verdict": row.verdict}


def _shipped(session: Session, run: LoopRun, model_id: str, console: Console) -> dict[str, Any]:
    home, recipe = session.home, session.recipe
    services = Services.read(home)
    if recipe.collect is None or services is None or not recipe.collect.switch_requests:
        _ship(session, run, model_id)
        return {"requests_during_switch": 0, "failed_requests": 0}
    console.print("ship: the champion changes under simulated load", highlight=False)
    # Interrupted after the pointer moved, a stage has nothing left to switch.
    under_load = _champion_id(home, session.ledger, recipe) != model_id
    traffic = Traffic(services.gateway_url, home.api_key(), recipe.collect)
    with traffic:
        traffic.wait_for_answers()
        _ship(session, run, model_id)
        traffic.mark_switch(to=model_id)
        traffic.wait_for_answers(from_model=model_id)
    report = {**traffic.report(), "switched_under_load": under_load}
    if report["failed_requests"]:
        console.print(f"ship: {report['failed_requests']} requests FAILED: {report['failures']}", highlight=False)
    return report


def _ship(session: Session, run: LoopRun, model_id: str) -> None:
    result = ship(session.home, session.ledger, session.recipe, model_id, "loop")
    if not result.shipped:
        # The champion changed meanwhile, or another verdict came: the next attempt evaluates anew.
        run.forget("evaluate")
        run.forget("sealed")
        raise ServiceError(f"{result.reason}\n\nHint: the same command evaluates again and goes on from there.")


def _served(session: Session, console: Console) -> dict[str, Any]:
    _ensure_service(session, console)
    return {"champion": _champion_id(session.home, session.ledger, session.recipe)}


def _ensure_service(session: Session, console: Console) -> None:
    services = Services.read(session.home)
    if services is not None and services.healthy():
        wanted = session.recipe.serving.deployment
        if services.deployment != wanted:
            # A simulated audience would leave its feedback among that of another deployment's users.
            msg = f"the service at {services.gateway_url} serves deployment `{services.deployment}`, the recipe is for `{wanted}`\n\nHint: stop it with `prefloop serve --stop`, or use another home."
            raise ServiceError(msg)
        return
    console.print("serve: starting the service", highlight=False)
    settings = [part for override in session.overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "serving.deploy", session.recipe_path, *settings]
    command += ["--detach", "--started-by", "loop"]
    code = subprocess.run(command, env={**os.environ, HOME_VARIABLE: session.home.uri}, check=False).returncode
    if code:
        msg = f"the service did not start (exit code {code}; its message stands above)"
        raise ServiceError(msg)


def _services(home: Home) -> Services:
    services = Services.read(home)
    if services is None:
        msg = f"no service is recorded under `{home.uri}`\n\nHint: start one with `prefloop serve RECIPE --detach`."
        raise ServiceError(msg)
    return services


def _champion_id(home: Home, ledger: Ledger, recipe: Recipe) -> str:
    champion = ledger.champion(recipe.serving.deployment)
    return champion.model_id if champion else ensure_sft(home, ledger, recipe.model.sft).model_id


def _say(console: Console, stage: str, text: str) -> None:
    console.print(f"{stage}: {text}", highlight=False)


def _body(session: Session, options: argparse.Namespace) -> int:
    del options
    return run_loop(session, Console())


def main() -> int:
    """Run the job."""
    return run_job("loop", _body)


if __name__ == "__main__":
    sys.exit(main())
