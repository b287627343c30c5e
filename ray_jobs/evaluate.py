"""Evaluate: candidate, champion and SFT model on held-out prompts -> measurements -> verdict of the gate.

    python -m ray_jobs.evaluate RECIPE.yaml [--set a.b=c] [--model ID]

The models answer (`ray_jobs.answers`), a judge compares (`ray_jobs.judging`); measuring and deciding is `app.evaluation`.
The verdict is stored in the ledger, signed and bound to the digest of the weights, and as JSON, Markdown and HTML under
`evaluations/ID`. The same inputs again return the stored verdict, unless its signature is wrong or the judge owes an
answer: then that alone is asked for. Exit code 3: the gate holds.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from rich.console import Console

from app.config import EvaluateSection, Recipe
from app.errors import HOLD_EXIT_CODE, DataError, ServiceError
from app.evaluation import suites
from app.evaluation.battery import Role
from app.evaluation.gate import decide
from app.evaluation.independence import independence
from app.evaluation.intervals import Resampling
from app.evaluation.judged import Judgement
from app.evaluation.judges import passes
from app.evaluation.learning import judge_learning, reward_accuracy
from app.evaluation.material import GOLDEN, PROMPTS, Material, file_digests, read_material, require_apart
from app.evaluation.measurements import Measurements, Sides
from app.evaluation.metrics import Metric
from app.evaluation.page import render_page
from app.evaluation.questions import Question
from app.evaluation.report import EvaluationReport, Look
from app.evaluation.signature import sign_report, signature_fault
from app.evaluation.suites import Answer
from app.ledger import EvaluationRow, Ledger, ModelRow, RunRow, now
from app.models import ensure_sft
from app.schemas import JUDGEMENT_SCHEMA, Split, content_hash
from app.storage import JUDGEMENTS, REPORT_PAGE, Home, write_atomically
from app.training.held_out import PairMeasure
from app.training.judgements import distinct
from app.training.snapshots import read_groups
from ray_jobs.answers import Decoding, Resources, Wanted, gather
from ray_jobs.judging import Answered, Judging, RewardJudge, judge, reward_scores, style_scores
from ray_jobs.preflight import preflight
from ray_jobs.progress import Meter
from ray_jobs.session import Session, ray_cluster, require_room, room, run_job
from ray_jobs.worker import run_result

_SEED = 0
_ROWS_PER_FILE = 4096


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs of the run, and by pair where its label came from."""

    pairs: tuple[PairMeasure, ...]
    sources: Mapping[str, str]


def evaluate(home: Home, ledger: Ledger, recipe: Recipe, model_id: str, run_id: str | None) -> EvaluationRow:
    """Measure a candidate, let the gate decide, and store the verdict.

    Args:
        home: where models and answers lie.
        ledger: holds models and the champion; gets the verdict.
        recipe: its sections `evaluate`, `serving` (compute type, deployment) and `workers` (resources) are used.
        model_id: the candidate.
        run_id: the run that trained it, for the held-out reward accuracy; None where there is none.

    Raises:
        DataError: prompts, rules, golden cases, neutral text or a model cannot be read, or there is no key to sign with.
        RecipeError: the recipe has no section `evaluate`, or the environment lacks the key of an endpoint.
        ServiceError: the cluster has no room for a model, or an endpoint refuses or is not there.
    """
    section = recipe.evaluation()
    material = read_material(section)
    key = home.signing_key()
    candidate = _model(ledger, model_id)
    sft = ensure_sft(home, ledger, recipe.model.sft)
    deployment = recipe.serving.deployment
    shipped = ledger.champion(deployment)
    champion = sft if shipped is None else _model(ledger, shipped.model_id)
    roles: dict[Role, ModelRow] = {"candidate": candidate, "champion": champion, "sft": sft}
    resampling = Resampling(section.gate.level, section.bootstrap_samples, _SEED)
    held_out = _held_out(home, ledger, run_id)
    reward = _reward_judge(ledger, section)
    independent = _independent(home, ledger, material, candidate, reward)
    decoding = Decoding(section.max_new_tokens, section.batch_size, recipe.serving.dtype)
    content = [
        deployment,
        # The ids too: equal weights may have two names, and each wants a verdict of its own.
        [[row.model_id, row.digest] for row in roles.values()],
        material.content,
        [] if reward is None else [reward.model.digest, reward.reference.digest],
        repr(independent),
        section.gate.model_dump(mode="json"),
        section.bootstrap_samples,
        repr(decoding),
        None if section.endpoint is None else section.endpoint.url,
        repr(held_out.pairs),
    ]
    identity = f"evaluation-{content_hash(content)[:16]}"
    with ledger.read() as session:
        known = session.get(EvaluationRow, identity)
    if known is not None and not _owed(known) and not signature_fault(known, key):
        return _asked_again(ledger, identity)
    looks = _look(ledger, identity, candidate, material)
    answered = _answers(home, recipe, material, decoding, roles)
    score = style_scores(material)
    if reward is not None:
        score = reward_scores(
            home, reward, material, answered, decoding=decoding, resources=lambda: _resources(recipe, models=2)
        )
    judged = judge(ledger, material, answered, resampling, score)
    measurements = _measure(material, answered, judged, resampling, held_out)
    report = EvaluationReport(
        evaluation_id=identity,
        model_id=candidate.model_id,
        champion_id=champion.model_id,
        sft_id=sft.model_id,
        judge=_judge_name(recipe, material, reward),
        answered_by="models that the job loaded"
        if section.endpoint is None
        else f"the endpoint {section.endpoint.url}",
        prompts=section.prompts,
        level=section.gate.level,
        measurements=measurements,
        suites=judged.results,
        unanswered=judged.unanswered,
        looks=looks,
        verdict=decide([*_metrics(measurements, judged), *independent], section.gate),
    )
    artifacts = {model: given.artifacts for model, given in answered.given.items()}
    return _store(home, ledger, report, judged.judgements, deployment, candidate, run_id, artifacts, key)


def _look(ledger: Ledger, evaluation_id: str, candidate: ModelRow, material: Material) -> tuple[Look, ...]:
    """Note which files of prompts this evaluation uses, and how often each was used so far, this time included."""
    digests = file_digests(material)
    places = {digest: material.places[names[0]] for digest, names in digests.items()}
    times = ledger.record_looks(evaluation_id, candidate.model_id, places)
    return tuple(
        Look(name, material.places[name], times[digest]) for digest, names in digests.items() for name in names
    )


def _model(ledger: Ledger, model_id: str) -> ModelRow:
    with ledger.read() as session:
        row = session.get(ModelRow, model_id)
        if row is None:
            known = session.scalars(sa.select(ModelRow.model_id).order_by(ModelRow.created_at.desc()).limit(5)).all()
            msg = f"no model `{model_id}` in the ledger\n\nHint: the newest are {', '.join(known) or 'none'}."
            raise DataError(msg)
        return row


def _held_out(home: Home, ledger: Ledger, run_id: str | None) -> HeldOut:
    result = run_result(home, run_id) if run_id is not None else None
    if result is None:
        return HeldOut((), {})
    with ledger.read() as session:
        run = session.get(RunRow, run_id)
    snapshot = None if run is None or run.snapshot_id is None else home.artifact("training", run.snapshot_id)
    # Old snapshots may have been removed.
    groups = read_groups(snapshot, Split.HELD_OUT) if snapshot is not None and snapshot.exists() else []
    return HeldOut(tuple(result.measures.pairs), distinct(groups))


def _reward_judge(ledger: Ledger, section: EvaluateSection) -> RewardJudge | None:
    named = section.reward_judge
    return None if named is None else RewardJudge(_model(ledger, named.model), _model(ledger, named.reference))


def _independent(
    home: Home, ledger: Ledger, material: Material, candidate: ModelRow, reward: RewardJudge | None
) -> tuple[Metric, ...]:
    """Say whether the judge is a stranger to what the candidate learned from; nothing of rules, which learned nothing."""
    if material.judge is not None:
        return (independence(home, ledger, material.judge.section.model, candidate.model_id),)
    if reward is not None:
        return (independence(home, ledger, reward.model.model_id, candidate.model_id),)
    return ()


def _owed(row: EvaluationRow) -> bool:
    """Say whether the judge did not reply to everything when this was measured."""
    return bool(row.report.get("unanswered"))


def _answers(
    home: Home, recipe: Recipe, material: Material, decoding: Decoding, roles: dict[Role, ModelRow]
) -> Answered:
    golden = tuple(Question(case.id, case.id, "", (case.prompt,)) for case in material.golden)
    models = {row.model_id: row for row in roles.values()}
    wanted, names = [], {}
    for model_id, row in models.items():
        held = {role for role, of_role in roles.items() if of_role.model_id == model_id}
        sets = {PROMPTS: material.prompts}
        if golden and "candidate" in held:
            sets[GOLDEN] = golden
        for suite in material.suites:
            if held & set(suite.roles):
                sets.setdefault(material.set_of(suite), suite.questions)
        names[model_id] = tuple(sets)
        neutral = material.neutral_text if held & {"candidate", "champion"} else None
        wanted.append(Wanted(model=row, sets=tuple(sets.values()), neutral_text=neutral))
    with Meter(Console()) as meter:
        given = gather(
            home,
            wanted,
            decoding=decoding,
            endpoint=recipe.evaluation().endpoint,
            resources=lambda: _resources(recipe, models=len(wanted)),
            on_progress=lambda model_id, done, total: meter.show(f"evaluate: answers of {model_id}", done, total),
        )
    return Answered(roles, dict(zip(models, given, strict=True)), names)


def _resources(recipe: Recipe, *, models: int) -> Resources:
    workers = recipe.workers
    require_room(workers, 1)
    return Resources(
        cpus=workers.cpus_per_worker,
        gpus=1 if workers.use_gpu else 0,
        threads=workers.threads,
        # Each holds a whole model: as many as train side by side, or one for each model, where they find room.
        actors=min(room(workers), max(workers.workers, models)),
    )


def _measure(
    material: Material, answered: Answered, judged: Judging, resampling: Resampling, held_out: HeldOut
) -> Measurements:
    texts = {question.id: question.turns[0] for question in material.prompts}
    mine, theirs, base = (answered.answers(role, PROMPTS) for role in ("candidate", "champion", "sft"))
    perplexity, of_champion = answered.of("candidate").perplexity, answered.of("champion").perplexity
    golden = answered.answers("candidate", GOLDEN)

    def both(number: Callable[[tuple[Answer, ...]], float]) -> Sides:
        return Sides(number(mine), number(theirs))

    return Measurements(
        over_champion=suites.win_rate(mine, theirs, judged.outcomes["champion"], resampling=resampling),
        over_sft=suites.win_rate(mine, base, judged.outcomes["sft"], resampling=resampling),
        length_ratio=suites.length_ratio(mine, theirs, resampling=resampling),
        finished=both(lambda answers: suites.share_finished(answers, resampling=resampling).value),
        looping=both(lambda answers: suites.share_looping(answers, resampling=resampling).value),
        distinct=both(suites.share_distinct),
        relevance=both(lambda answers: suites.relevance(answers, texts, seed=_SEED)),
        golden=tuple(suites.check_golden(material.golden, golden, judged.met)) if material.golden else None,
        perplexity=None if perplexity is None or of_champion is None else Sides(perplexity, of_champion),
        reward_accuracy=reward_accuracy(held_out.pairs, resampling=resampling) if held_out.pairs else None,
        judge=judged.health,
        learning=judge_learning(held_out.pairs, level=resampling.level, seed=_SEED, sources=held_out.sources)
        if held_out.pairs
        else None,
        n_prompts=len(mine),
    )


def _metrics(measurements: Measurements, judged: Judging) -> list[Metric]:
    """Return everything by name; the win rates of the judge are among the measurements already."""
    measured = measurements.metrics()
    known = {metric.name for metric in measured}
    of_suites = [metric for result in judged.results.values() for metric in result.metrics if metric.name not in known]
    return [*measured, *of_suites]


def _judge_name(recipe: Recipe, material: Material, reward: RewardJudge | None) -> str:
    if material.judge is not None:
        return material.judge.name
    if reward is not None:
        return reward.name
    assert material.style is not None  # noqa: S101  the recipe has one of the three
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
    judgements: Sequence[Judgement],
    deployment: str,
    candidate: ModelRow,
    run_id: str | None,
    answers: dict[str, tuple[str, ...]],
    key: bytes,
) -> EvaluationRow:
    content = sign_report(
        {
            **report.as_json(),
            "model_digest": candidate.digest,
            "deployment": deployment,
            "answers": {name: list(artifacts) for name, artifacts in answers.items()},
        },
        key,
    )
    artifact = home.artifact("evaluations", report.evaluation_id)
    files = {
        "report.json": json.dumps(content, indent=1, ensure_ascii=False),
        "report.md": report.as_markdown(),
        REPORT_PAGE: render_page(content, judgements),
    }
    artifact.write_rows(map(asdict, judgements), JUDGEMENT_SCHEMA, rows_per_file=_ROWS_PER_FILE, stem=JUDGEMENTS)
    for name, text in files.items():
        # Models may say what is no Unicode text.
        write_atomically(artifact.filesystem, f"{artifact.path}/{name}", text.encode("utf-8", "backslashreplace"))
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
        # It is there already where the judge owed answers the last time, or somebody changed it.
        session.merge(row)
    Console().print(report.as_card())
    return row


def evaluate_sealed(home: Home, ledger: Ledger, recipe: Recipe, model_id: str, run_id: str | None) -> EvaluationRow:
    """Measure a candidate on the sealed prompts, which nobody chose it by: the last word before it ships.

    Everything else is the recipe's and was answered before. Raises as `evaluate` does.
    """
    section = recipe.evaluation()
    assert section.sealed is not None  # noqa: S101
    require_apart(section.prompts, section.sealed)
    opened = section.model_copy(update={"prompts": section.sealed, "sealed": None, "max_prompts": None})
    return evaluate(home, ledger, recipe.model_copy(update={"evaluate": opened}), model_id, run_id)


def require_answered(row: EvaluationRow) -> None:
    """Refuse to take a HOLD for a verdict while answers of the judge are on their way; raises ServiceError.

    What a judge refuses for good is no reason to wait.
    """
    owed = {reason: n for reason, n in row.report["unanswered"].items() if passes(reason)}
    if row.verdict != "SHIP" and owed:
        words = ", ".join(f"{n} {reason}" for reason, n in owed.items())
        msg = f"the gate says {row.verdict}, but the judge owes {sum(owed.values())} answers ({words})\n\nHint: the same command asks for these alone and goes on from there."
        raise ServiceError(msg)


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
        preflight(home, home.ledger_url)
        row = evaluate(home, ledger, recipe, candidate_id, run_id)
    Console().print(
        f"[bold]{row.verdict}[/bold] {row.model_id}: {home.uri}/evaluations/{row.evaluation_id}/{REPORT_PAGE}",
        highlight=False,
    )
    return 0 if row.verdict == "SHIP" else HOLD_EXIT_CODE


def main() -> int:
    """Run the job."""
    return run_job("evaluate", _body, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
