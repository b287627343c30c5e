"""A report as `evaluate` stores it, of made answers: twelve prompts, of which the candidate wins most."""

from app.config import GateSection
from app.evaluation import suites
from app.evaluation.gate import decide
from app.evaluation.intervals import Resampling
from app.evaluation.measurements import Measurements, Sides
from app.evaluation.report import EvaluationReport, Look
from app.evaluation.rules import parse_style
from app.evaluation.scored import compare, style_score
from app.evaluation.signature import sign_report
from app.evaluation.suites import Answer

STYLE = parse_style({"name": "s", "rules": [{"name": "says well", "pattern": "well", "weight": 1}]}, place="test")
RESAMPLING = Resampling(0.95, 200, 0)


def answers(model_id, texts):
    return [
        Answer(f"p{i}", f"c{i}", text, "stop" if text else "length", len(text), model_id)
        for i, text in enumerate(texts)
    ]


def made_report(key, *, said=()):
    """The signed report and its judgements; `said` are the candidate's first answers."""
    mine = answers("new", [*said, *["well said"] * (8 - len(said)), "plain", "plain", "badly", ""])
    theirs = answers("old", ["plain"] * 9 + ["well, well"] * 2 + ["plain"])
    requests = {f"p{i}": f"request number {i}" for i in range(12)}
    compared = compare(mine, theirs, style_score(STYLE), against="champion", requests=requests)
    over = suites.win_rate(mine, theirs, compared.outcomes, resampling=RESAMPLING)
    measurements = Measurements(
        over_champion=over,
        over_sft=over,
        length_ratio=suites.length_ratio(mine, theirs, resampling=RESAMPLING),
        finished=Sides(11 / 12, 1.0),
        looping=Sides(0.0, 0.0),
        distinct=Sides(0.4, 0.2),
        relevance=Sides(0.0, 0.0),
        golden=None,
        perplexity=None,
        reward_accuracy=None,
        n_prompts=12,
    )
    report = EvaluationReport(
        evaluation_id="evaluation-made",
        model_id="new",
        champion_id="old",
        sft_id="old",
        judge="the rules of style `s`",
        answered_by="models that the job loaded",
        prompts="prompts.jsonl",
        level=0.95,
        measurements=measurements,
        suites={},
        unanswered={},
        looks=(Look("prompts", "prompts.jsonl", 3),),
        verdict=decide(measurements.metrics(), GateSection()),
    )
    return sign_report({**report.as_json(), "model_digest": "d" * 64}, key), compared.judgements
