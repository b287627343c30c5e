"""Evaluate: candidate, champion and SFT model on held-out prompts -> measurements -> verdict of the gate.

    python -m ray_jobs.evaluate RECIPE.yaml [--set a.b=c] [--model ID]

The models answer in Ray actors (`ray_jobs.answers`); then a judge behind an endpoint, where the recipe names one, is
asked what the suites want to know; measuring and deciding is `app.evaluation`. The verdict is stored in the ledger,
bound to the digest of the weights, and as JSON and Markdown under `evaluations/ID`. The same inputs again return the
stored verdict, unless the judge owes an answer: then it is asked for that alone. Exit code 3: the gate holds.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import fsspec
import sqlalchemy as sa
from rich.console import Console

from app.config import EvaluateSection, Recipe
from app.errors import HOLD_EXIT_CODE, DataError
from app.evaluation import suites
from app.evaluation.battery import (
    NullModelSuite,
    Role,
    Said,
    Suite,
    SuiteResult,
    WinRateSuite,
    build_battery,
    health_of,
    without_verdicts,
)
from app.evaluation.gate import decide
from app.evaluation.intervals import Resampling
from app.evaluation.judge_prompts import prompts_digest
from app.evaluation.judged import NULL_ANSWERS
from app.evaluation.judges import EndpointJudge
from app.evaluation.learning import judge_learning, reward_accuracy
from app.evaluation.measurements import Measurements, Sides
from app.evaluation.metrics import Metric
from app.evaluation.prompts import Prompt, load_prompts
from app.evaluation.questions import Question
from app.evaluation.report import EvaluationReport
from app.evaluation.rules import Style, load_style
from app.evaluation.suites import Answer, GoldenCase, RuleJudge, WinRate
from app.ledger import EvaluationRow, Ledger, ModelRow, RunRow, now
from app.models import ensure_sft
from app.schemas import content_hash
from app.storage import Home, write_atomically
from app.training.held_out import PairMeasure
from ray_jobs.answers import Decoding, Given, Resources, Wanted, gather
from ray_jobs.progress import Meter
from ray_jobs.session import Session, ray_cluster, require_room, run_job
from ray_jobs.worker import held_out_measures

_SEED = 0
_PROMPTS = "prompts"
_GOLDEN = "golden"


_Named = tuple[Given, tuple[str, ...]]
"""What a model gave, and the names of its sets of questions in the same order."""


@dataclass(frozen=True)
class Material:
    """What the recipe names to measure on, read before any model is loaded."""

    prompts: tuple[Question, ...]
    style: Style | None
    judge: EndpointJudge | None
    suites: tuple[Suite, ...]
    golden: tuple[GoldenCase, ...]
    neutral_text: str | None


def evaluate(home: Home, ledger: Ledger, recipe: Recipe, model_id: str, run_id: str | None) -> EvaluationRow:
    """Measure a candidate, let the gate decide, and store the verdict.

    Args:
        home: where models and answers lie.
        ledger: holds models and the champion; gets the verdict.
        recipe: its sections `evaluate`, `serving` (compute type, deployment) and `workers` (resources) are used.
        model_id: the candidate.
        run_id: the run that trained it, for the held-out reward accuracy; None where there is none.

    Raises:
        DataError: prompts, rules, golden cases, neutral text or the model cannot be read.
        RecipeError: the recipe has no section `evaluate`.
        ServiceError: the cluster has no room for a model.
    """
    section = recipe.evaluation()
    material = read_material(section)
    candidate = _model(ledger, model_id)
    sft = ensure_sft(home, ledger, recipe.model.sft)
    deployment = recipe.serving.deployment
    shipped = ledger.champion(deployment)
    champion = sft if shipped is None else _model(ledger, shipped.model_id)
    resampling = Resampling(section.gate.level, section.bootstrap_samples, _SEED)
    held_out = _held_out(home, run_id)
    decoding = Decoding(section.max_new_tokens, section.batch_size, recipe.serving.dtype)
    identity = _identity(deployment, candidate, champion, sft, material, section, decoding, held_out)
    with ledger.read() as session:
        known = session.get(EvaluationRow, identity)
    if known is not None and not _owed(known):
        return _asked_again(ledger, identity)
    roles: dict[Role, ModelRow] = {"candidate": candidate, "champion": champion, "sft": sft}
    given = _answers(home, recipe, material, decoding, roles)
    results, unanswered = _judge(ledger, material, roles, given, resampling)
    measurements = _measure(material, roles, given, results, resampling, held_out)
    report = EvaluationReport(
        evaluation_id=identity,
        model_id=candidate.model_id,
        champion_id=champion.model_id,
        sft_id=sft.model_id,
        judge=_judge_name(recipe, material),
        prompts=section.prompts,
        level=section.gate.level,
        measurements=measurements,
        suites=results,
        unanswered=unanswered,
        verdict=decide(_metrics(measurements, results), section.gate),
    )
    artifacts = {name: g.artifacts for name, (g, _) in given.items()}
    return _store(home, ledger, report, deployment, candidate, run_id, artifacts)


def read_material(section: EvaluateSection) -> Material:
    """Read everything that an evaluation needs beside models.

    Raises:
        DataError: something cannot be read.
        RecipeError: the judge's key is not in the environment.
    """
    neutral = None
    if section.neutral_text is not None:
        try:
            with fsspec.open(section.neutral_text, "rb") as stream:
                neutral = stream.read().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            msg = f"neutral text `{section.neutral_text}` cannot be read: {error}"
            raise DataError(msg) from None
    prompts = tuple(_question(p) for p in load_prompts(section.prompts).prompts[: section.max_prompts])
    return Material(
        prompts=prompts,
        style=None if section.judge_rules is None else load_style(section.judge_rules),
        judge=None if section.judge is None else EndpointJudge(section.judge),
        suites=tuple(build_battery(section, prompts)),
        golden=() if section.golden is None else tuple(suites.load_golden(section.golden)),
        neutral_text=neutral,
    )


def _question(prompt: Prompt) -> Question:
    return Question(prompt.id, prompt.cluster, "", (prompt.text,))


def _model(ledger: Ledger, model_id: str) -> ModelRow:
    with ledger.read() as session:
        row = session.get(ModelRow, model_id)
        if row is None:
            known = session.scalars(sa.select(ModelRow.model_id).order_by(ModelRow.created_at.desc()).limit(5)).all()
            msg = f"no model `{model_id}` in the ledger\n\nHint: the newest are {', '.join(known) or 'none'}."
            raise DataError(msg)
        return row


def _held_out(home: Home, run_id: str | None) -> tuple[PairMeasure, ...]:
    measures = held_out_measures(home, run_id) if run_id is not None else None
    return tuple(measures.pairs) if measures else ()


def _identity(
    deployment: str,
    candidate: ModelRow,
    champion: ModelRow,
    sft: ModelRow,
    material: Material,
    section: EvaluateSection,
    decoding: Decoding,
    held_out: Sequence[PairMeasure],
) -> str:
    content = [
        deployment,
        [candidate.digest, champion.digest, sft.digest],
        [[q.id, q.cluster, *q.turns] for q in material.prompts],
        None if material.style is None else [[r.name, r.pattern.pattern, r.weight] for r in material.style.rules],
        None if material.judge is None else material.judge.settings,
        [repr(suite) for suite in material.suites],
        [
            [g.id, g.prompt, [p.pattern for p in g.must], [p.pattern for p in g.must_not], g.exact, g.must_pass]
            for g in material.golden
        ],
        None if material.judge is None else [prompts_digest(), NULL_ANSWERS],
        material.neutral_text,
        section.gate.model_dump(mode="json"),
        section.bootstrap_samples,
        repr(decoding),
        repr(held_out),
    ]
    return f"evaluation-{content_hash(content)[:16]}"


def _owed(row: EvaluationRow) -> bool:
    """Say whether the judge did not reply to everything when this was measured."""
    return bool(row.report.get("unanswered"))


def _answers(
    home: Home, recipe: Recipe, material: Material, decoding: Decoding, roles: dict[Role, ModelRow]
) -> dict[str, _Named]:
    """Return by model id what it gave, and the names of the sets of questions in the same order."""
    golden = tuple(Question(case.id, case.id, "", (case.prompt,)) for case in material.golden)
    models = {row.model_id: row for row in roles.values()}
    wanted, names = [], []
    for model_id, row in models.items():
        held = {role for role, of_role in roles.items() if of_role.model_id == model_id}
        sets = {_PROMPTS: material.prompts}
        if golden and "candidate" in held:
            sets[_GOLDEN] = golden
        for suite in material.suites:
            if held & set(suite.roles) and not _asks_prompts(suite, material):
                sets[suite.name] = suite.questions
        names.append(tuple(sets))
        wanted.append(
            Wanted(
                model=row,
                sets=tuple(sets.values()),
                neutral_text=material.neutral_text if held & {"candidate", "champion"} else None,
            )
        )
    workers = recipe.workers
    resources = Resources(
        cpus=workers.cpus_per_worker,
        gpus=1 if workers.use_gpu else 0,
        threads=workers.threads_per_worker or max(1, int(workers.cpus_per_worker)),
    )
    with Meter(Console()) as meter:
        given = gather(
            home,
            wanted,
            decoding=decoding,
            resources=resources,
            # One model after another answers where there is no more room.
            before_start=lambda: require_room(workers, 1),
            on_progress=lambda model_id, done, total: meter.show(f"evaluate: answers of {model_id}", done, total),
        )
    return {model_id: (g, n) for model_id, g, n in zip(models, given, names, strict=True)}


def _asks_prompts(suite: Suite, material: Material) -> bool:
    """Say whether a suite asks the recipe's own prompts, which every model answers anyway."""
    return {q.id for q in suite.questions} <= {q.id for q in material.prompts} and suite.name in (
        WinRateSuite.name,
        NullModelSuite.name,
    )


def _said(given: dict[str, _Named], row: ModelRow, name: str) -> Said:
    of_model, names = given[row.model_id]
    turns: dict[str, list[Answer]] = {}
    for answer in of_model.answers[names.index(name)]:
        turns.setdefault(answer.prompt_id, []).append(answer)
    return Said(row.model_id, {question: tuple(answers) for question, answers in turns.items()})


def _judge(
    ledger: Ledger,
    material: Material,
    roles: dict[Role, ModelRow],
    given: dict[str, _Named],
    resampling: Resampling,
) -> tuple[dict[str, SuiteResult], dict[str, int]]:
    """Ask the judge what all suites want to know, at once, and let them measure; count by reason what it did not answer."""
    said = {
        suite.name: {
            role: _said(given, roles[role], _PROMPTS if _asks_prompts(suite, material) else suite.name)
            for role in suite.roles
        }
        for suite in material.suites
    }
    judged = None
    if material.judge is not None:
        tasks = [task for suite in material.suites for task in suite.tasks(said[suite.name])]
        with Meter(Console()) as meter:
            judged = material.judge.judge(
                ledger, tasks, on_progress=lambda done, total: meter.show("evaluate: judgements", done, total)
            )
    results = {suite.name: suite.measure(said[suite.name], judged, resampling) for suite in material.suites}
    health = health_of(results, resampling)
    if health is not None and not health.usable:
        results = {name: without_verdicts(result, health) for name, result in results.items()}
    return results, dict(Counter(() if judged is None else judged.failures.values()))


def _measure(
    material: Material,
    roles: dict[Role, ModelRow],
    given: dict[str, _Named],
    results: dict[str, SuiteResult],
    resampling: Resampling,
    held_out: Sequence[PairMeasure],
) -> Measurements:
    texts = {question.id: question.turns[0] for question in material.prompts}
    candidate, champion = given[roles["candidate"].model_id][0], given[roles["champion"].model_id][0]
    mine, theirs, base = (given[roles[role].model_id][0].answers[0] for role in ("candidate", "champion", "sft"))

    def both(number: Callable[[tuple[Answer, ...]], float]) -> Sides:
        return Sides(number(mine), number(theirs))

    def win_rate(role: Role, baseline: tuple[Answer, ...]) -> WinRate:
        if material.style is not None:
            return suites.win_rate(mine, baseline, RuleJudge(material.style), resampling=resampling)
        return suites.judged_win_rate(mine, baseline, results[WinRateSuite.name].outcomes[role], resampling=resampling)

    golden_answers = candidate.answers[1] if material.golden else ()
    return Measurements(
        over_champion=win_rate("champion", theirs),
        over_sft=win_rate("sft", base),
        length_ratio=suites.length_ratio(mine, theirs, resampling=resampling),
        finished=both(lambda answers: suites.share_finished(answers, resampling=resampling).value),
        looping=both(lambda answers: suites.share_looping(answers, resampling=resampling).value),
        distinct=both(suites.share_distinct),
        relevance=both(lambda answers: suites.relevance(answers, texts, seed=_SEED)),
        golden=tuple(suites.check_golden(material.golden, golden_answers)) if material.golden else None,
        perplexity=None
        if candidate.perplexity is None or champion.perplexity is None
        else Sides(candidate.perplexity, champion.perplexity),
        reward_accuracy=reward_accuracy(held_out, resampling=resampling) if held_out else None,
        judge=health_of(results, resampling),
        learning=judge_learning(held_out, level=resampling.level, seed=_SEED) if held_out else None,
        n_prompts=len(mine),
    )


def _metrics(measurements: Measurements, results: dict[str, SuiteResult]) -> list[Metric]:
    """Return everything by name; the win rates of the judge are among the measurements already."""
    measured = measurements.metrics()
    known = {metric.name for metric in measured}
    of_suites = [metric for result in results.values() for metric in result.metrics if metric.name not in known]
    return [*measured, *of_suites]


def _judge_name(recipe: Recipe, material: Material) -> str:
    if material.style is None:
        assert material.judge is not None  # noqa: S101  the recipe has one of both
        return material.judge.name
    name = f"the rules of style `{material.style.name}`"
    if (
        recipe.collect is not None
        and recipe.evaluate is not None
        and recipe.collect.style == recipe.evaluate.judge_rules
    ):
        # Not independent of the labels, and the report must say so.
        name += ", the style that the simulated audience asked for"
    return name


def _store(
    home: Home,
    ledger: Ledger,
    report: EvaluationReport,
    deployment: str,
    candidate: ModelRow,
    run_id: str | None,
    answers: dict[str, tuple[str, ...]],
) -> EvaluationRow:
    content = {
        **report.as_json(),
        "deployment": deployment,
        "answers": {name: list(artifacts) for name, artifacts in answers.items()},
    }
    artifact = home.artifact("evaluations", report.evaluation_id)
    files = {"report.json": json.dumps(content, indent=1, ensure_ascii=False), "report.md": report.as_markdown()}
    for name, text in files.items():
        write_atomically(artifact.filesystem, f"{artifact.path}/{name}", text.encode())
    artifact.write_manifest({"kind": "evaluation", "model": candidate.model_id, "digest": candidate.digest})
    row = EvaluationRow(
        evaluation_id=report.evaluation_id,
        deployment=deployment,
        model_id=candidate.model_id,
        model_digest=candidate.digest,
        champion_id=report.champion_id,
        sft_id=report.sft_id,
        verdict=report.verdict.decision,
        report=content,
        run_id=run_id,
        created_at=now(),
    )
    with ledger.write() as session:
        # It is there already where the judge owed answers the last time.
        session.merge(row)
    Console().print(report.as_card())
    return row


def _asked_again(ledger: Ledger, evaluation_id: str) -> EvaluationRow:
    """Make a stored verdict the newest: ship follows the evaluation that was asked for last."""
    with ledger.write() as session:
        row = session.get_one(EvaluationRow, evaluation_id)
        row.created_at = now()
    return row


def newest_trained(ledger: Ledger, deployment: str) -> tuple[str, str | None]:
    """Return model and run of the training for a deployment that ended last; raises DataError where there is none."""
    with ledger.read() as session:
        row = session.execute(
            # Not by the model's own run: equal weights of another run keep the row that was first.
            sa.select(RunRow.output_model_id, RunRow.run_id)
            .where(
                RunRow.kind == "train",
                RunRow.status == "succeeded",
                RunRow.recipe["serving"]["deployment"].as_string() == deployment,
            )
            .order_by(RunRow.updated_at.desc())
            .limit(1)
        ).one_or_none()
    if row is None:
        msg = f"no model was trained for deployment `{deployment}`\n\nHint: run `prefloop train`, or name a model with --model."
        raise DataError(msg)
    return str(row.output_model_id), row.run_id


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="model id of the candidate; default: the newest that was trained for the deployment"
    )


def _body(session: Session, options: argparse.Namespace) -> int:
    home, ledger, recipe = session.home, session.ledger, session.recipe
    if options.model is None:
        candidate_id, run_id = newest_trained(ledger, recipe.serving.deployment)
    else:
        named = _model(ledger, options.model)
        candidate_id, run_id = named.model_id, named.run_id
    with ray_cluster(home):
        row = evaluate(home, ledger, recipe, candidate_id, run_id)
    Console().print(
        f"[bold]{row.verdict}[/bold] {row.model_id}: {home.uri}/evaluations/{row.evaluation_id}/report.md",
        highlight=False,
    )
    return 0 if row.verdict == "SHIP" else HOLD_EXIT_CODE


def main() -> int:
    """Run the job."""
    return run_job("evaluate", _body, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
