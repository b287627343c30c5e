"""Evaluate: candidate, champion and SFT model on held-out prompts -> measurements -> verdict of the gate.

    python -m ray_jobs.evaluate RECIPE.yaml [--set a.b=c] [--model ID]

The models answer greedily in Ray actors (`ray_jobs.answers`); measuring and deciding is `app.evaluation`. The verdict
is stored in the ledger, bound to the digest of the weights, and as JSON and Markdown under `evaluations/ID`. The same
inputs again return the stored verdict. Exit code 3: the gate holds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import fsspec
import sqlalchemy as sa
from rich.console import Console

from app.config import EvaluateSection, Recipe
from app.errors import HOLD_EXIT_CODE, DataError
from app.evaluation import suites
from app.evaluation.gate import Measurements, Sides, decide
from app.evaluation.learning import reward_accuracy
from app.evaluation.prompts import Prompt, load_prompts
from app.evaluation.intervals import Estimate, Resampling
from app.evaluation.report import EvaluationReport
from app.evaluation.rules import Style, load_style
from app.evaluation.suites import Answer, GoldenCase, RuleJudge
from app.ledger import EvaluationRow, Ledger, ModelRow, RunRow, now
from app.models import ensure_sft
from app.schemas import content_hash
from app.storage import Home, write_atomically
from ray_jobs.answers import Decoding, Given, Resources, Wanted, gather
from ray_jobs.progress import Meter
from ray_jobs.session import Session, ray_cluster, require_room, run_job
from ray_jobs.worker import held_out_measures

_SEED = 0


@dataclass(frozen=True)
class Material:
    """What the recipe names to measure on, read before any model is loaded."""

    prompts: tuple[Prompt, ...]
    style: Style
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
    accuracy = _reward_accuracy(home, run_id, resampling)
    decoding = Decoding(section.max_new_tokens, section.batch_size, recipe.serving.dtype)
    identity = _identity(deployment, candidate, champion, sft, material, section, decoding, accuracy)
    with ledger.read() as session:
        known = session.get(EvaluationRow, identity)
    if known is not None:
        return _asked_again(ledger, identity)
    given = _answers(home, recipe, material, decoding, candidate, champion, sft)
    measurements = _measure(
        given[candidate.model_id], given[champion.model_id], given[sft.model_id], material, resampling, accuracy
    )
    report = EvaluationReport(
        evaluation_id=identity,
        model_id=candidate.model_id,
        champion_id=champion.model_id,
        sft_id=sft.model_id,
        judge=_judge_name(recipe, material.style),
        prompts=section.prompts,
        level=section.gate.level,
        measurements=measurements,
        verdict=decide(measurements, section.gate),
    )
    artifacts = {name: g.artifacts for name, g in given.items()}
    return _store(home, ledger, report, deployment, candidate, run_id, artifacts)


def read_material(section: EvaluateSection) -> Material:
    """Read everything that an evaluation needs beside models; raises DataError where something cannot be read."""
    neutral = None
    if section.neutral_text is not None:
        try:
            with fsspec.open(section.neutral_text, "rb") as stream:
                neutral = stream.read().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            msg = f"neutral text `{section.neutral_text}` cannot be read: {error}"
            raise DataError(msg) from None
    return Material(
        prompts=load_prompts(section.prompts).prompts[: section.max_prompts],
        style=load_style(section.judge_rules),
        golden=() if section.golden is None else tuple(suites.load_golden(section.golden)),
        neutral_text=neutral,
    )


def _model(ledger: Ledger, model_id: str) -> ModelRow:
    with ledger.read() as session:
        row = session.get(ModelRow, model_id)
        if row is None:
            known = session.scalars(sa.select(ModelRow.model_id).order_by(ModelRow.created_at.desc()).limit(5)).all()
            msg = f"no model `{model_id}` in the ledger\n\nHint: the newest are {', '.join(known) or 'none'}."
            raise DataError(msg)
        return row


def _reward_accuracy(home: Home, run_id: str | None, resampling: Resampling) -> Estimate | None:
    measures = held_out_measures(home, run_id) if run_id is not None else None
    return reward_accuracy(measures.pairs, resampling=resampling) if measures and measures.pairs else None


def _identity(
    deployment: str,
    candidate: ModelRow,
    champion: ModelRow,
    sft: ModelRow,
    material: Material,
    section: EvaluateSection,
    decoding: Decoding,
    accuracy: Estimate | None,
) -> str:
    content = [
        deployment,
        [candidate.digest, champion.digest, sft.digest],
        [[p.id, p.cluster, p.text] for p in material.prompts],
        [[r.name, r.pattern.pattern, r.weight] for r in material.style.rules],
        [[g.id, g.prompt, [p.pattern for p in g.must], [p.pattern for p in g.must_not]] for g in material.golden],
        material.neutral_text,
        section.gate.model_dump(mode="json"),
        section.bootstrap_samples,
        repr(decoding),
        repr(accuracy),
    ]
    return f"evaluation-{content_hash(content)[:16]}"


def _answers(
    home: Home,
    recipe: Recipe,
    material: Material,
    decoding: Decoding,
    candidate: ModelRow,
    champion: ModelRow,
    sft: ModelRow,
) -> dict[str, Given]:
    golden = tuple(Prompt(case.id, case.prompt, case.id) for case in material.golden)
    models = {row.model_id: row for row in (candidate, champion, sft)}
    compared = {candidate.model_id, champion.model_id}
    wanted = [
        Wanted(
            model=row,
            prompt_sets=(material.prompts, golden) if golden and name == candidate.model_id else (material.prompts,),
            neutral_text=material.neutral_text if name in compared else None,
        )
        for name, row in models.items()
    ]
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
    return dict(zip(models, given, strict=True))


def _measure(
    candidate: Given,
    champion: Given,
    sft: Given,
    material: Material,
    resampling: Resampling,
    accuracy: Estimate | None,
) -> Measurements:
    judge = RuleJudge(material.style)
    texts = {prompt.id: prompt.text for prompt in material.prompts}
    mine, theirs, base = candidate.answers[0], champion.answers[0], sft.answers[0]

    def both(number: Callable[[tuple[Answer, ...]], float]) -> Sides:
        return Sides(number(mine), number(theirs))

    return Measurements(
        over_champion=suites.win_rate(mine, theirs, judge, resampling=resampling),
        over_sft=suites.win_rate(mine, base, judge, resampling=resampling),
        length_ratio=suites.length_ratio(mine, theirs, resampling=resampling),
        finished=both(lambda answers: suites.share_finished(answers, resampling=resampling).value),
        looping=both(lambda answers: suites.share_looping(answers, resampling=resampling).value),
        distinct=both(suites.share_distinct),
        relevance=both(lambda answers: suites.relevance(answers, texts, seed=_SEED)),
        golden=tuple(suites.check_golden(material.golden, candidate.answers[1])) if material.golden else None,
        perplexity=None
        if candidate.perplexity is None or champion.perplexity is None
        else Sides(candidate.perplexity, champion.perplexity),
        reward_accuracy=accuracy,
        n_prompts=len(mine),
    )


def _judge_name(recipe: Recipe, style: Style) -> str:
    name = f"the rules of style `{style.name}`"
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
        session.add(row)
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
