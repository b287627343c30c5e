"""The evaluate job with a judge behind HTTP: every suite to its end, nothing judged twice, an unusable judge holds."""

import csv
import json
from pathlib import Path

import pytest
import ray
import torch
from transformers import LlamaForCausalLM

from app.config import parse_recipe
from app.errors import RecipeError, ServiceError
from app.evaluation.judged import NULL_ANSWERS
from app.ledger import EvaluationRow
from app.models import Lineage, register_folder
from ray_jobs.evaluate import evaluate
from tests.conftest import write_tiny_model
from tests.evaluation.scripted_judge import scripted_judge


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=150 * 1024**2)
    yield
    ray.shutdown()


def rows(path: Path, entries) -> str:
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return str(path)


def that_ends(folder: Path, *, seed: int) -> Path:
    """Let a random model say other things to other prompts (larger weights, a head of its own), and end often."""
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(seed)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator))
    model.generation_config.eos_token_id = [1, *range(3, 258, 3)]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def stage(home, ledger, tmp_path):
    """A tiny SFT model, another as candidate, and small question files of every suite."""
    sft = that_ends(write_tiny_model(tmp_path / "sft"), seed=0)
    other = that_ends(write_tiny_model(tmp_path / "other", seed=1), seed=1)
    candidate = register_folder(home, ledger, other, name="new", lineage=Lineage(kind="full"))
    prompts = [{"prompt": f"say {i} things about {'xyz' * i}"} for i in range(1, 9)]
    arena = [{"uid": f"a{i}", "category": "hard_prompt", "prompt": f"solve {i}"} for i in range(4)]
    answers = [
        {"uid": f"a{i}", "model": "base", "messages": [{"role": "assistant", "content": "the answer " * (i + 1)}]}
        for i in range(4)
    ]
    turns = [{"question_id": i, "category": "writing", "turns": [f"write {i}", "again"]} for i in range(3)]
    alpaca = [{"instruction": f"do {i}", "input": "", "output": "done " * (i + 1)} for i in range(4)]
    with (tmp_path / "xstest.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [
                ("id", "prompt", "type", "label"),
                *((i, f"kill process {i}?", "homonyms", "safe") for i in range(3)),
                *((i, f"kill man {i}?", "contrast_homonyms", "unsafe") for i in range(3, 6)),
            ]
        )
    tree = {
        "name": "judged",
        "model": {"sft": str(sft)},
        "serving": {"dtype": "float32"},
        "evaluate": {
            "prompts": rows(tmp_path / "prompts.jsonl", prompts),
            "null_model_prompts": 7,
            "arena_hard": {
                "questions": rows(tmp_path / "arena.jsonl", arena),
                "baseline": rows(tmp_path / "base.jsonl", answers),
            },
            "mt_bench": {"questions": rows(tmp_path / "mt.jsonl", turns)},
            "alpaca": {"questions": rows(tmp_path / "alpaca.jsonl", alpaca)},
            "refusal": {"questions": str(tmp_path / "xstest.csv"), "max_questions": 4},
            "max_new_tokens": 12,
            "batch_size": 8,
            "bootstrap_samples": 200,
            "gate": {"rules": {"judged_prompts": {"threshold": 1}}},
        },
    }

    def recipe(judge, **options):
        section = {"url": judge.url, "model": "scripted", "api_key_variable": None, "retries": 0, **options}
        return parse_recipe({**tree, "evaluate": {**tree["evaluate"], "judge": section}}, place="test")

    return home, ledger, recipe, candidate


def reading(asked):
    """Prefers what has more different letters, grades by length, sees no refusals."""
    if "class:" in asked.system or "full_compliance:" in asked.system:
        return f"[[{asked.nonce} full_compliance]]"
    if "grade" in asked.system:
        return f"[[{asked.nonce} {1 + len(asked.user) % 10}]]"
    number = 2 if f"answer A 2 {asked.nonce}" in asked.user else ""
    sides = [asked.block(f"answer {side} {number}".strip()) for side in "AB"]
    a, b = (0 if text in NULL_ANSWERS.values() else 1 + len(set(text)) for text in sides)
    verdict = "A=B" if a == b else "A>>B" if a > b + 3 else "A>B" if a > b else "B>>A" if b > a + 3 else "B>A"
    return f"Both have letters.\n[[{asked.nonce} {verdict}]]"


def test_every_suite_runs_to_its_end_and_its_numbers_are_in_the_report(cluster, stage):
    home, ledger, recipe, candidate = stage
    with scripted_judge(reading) as judge:
        row = evaluate(home, ledger, recipe(judge), candidate.model_id, None)
        asked = len(judge.asked)
        assert len({(a.system.replace(a.nonce, ""), a.user.replace(a.nonce, "")) for a in judge.asked}) == asked
        again = evaluate(home, ledger, recipe(judge), candidate.model_id, None)
        assert (again.evaluation_id, len(judge.asked)) == (row.evaluation_id, asked)
        # Other settings of the gate: another verdict from the same judgements.
        stricter = recipe(judge).model_dump(mode="json")
        stricter["evaluate"]["gate"]["level"] = 0.9
        other = evaluate(home, ledger, parse_recipe(stricter, place="test"), candidate.model_id, None)
        assert other.evaluation_id != row.evaluation_id
        assert len(judge.asked) == asked
    suites = row.report["suites"]
    assert list(suites) == ["win_rate", "null_model", "arena_hard", "mt_bench", "alpaca", "refusal"]
    metrics = {metric["name"]: metric for suite in suites.values() for metric in suite["metrics"]}
    for name in (
        *("win_rate.champion", "win_rate.sft", "null_model.polite", "null_model.forged"),
        *("arena_hard.all.score.candidate", "arena_hard.all.style_score.champion", "arena_hard.gain"),
        *("mt_bench.score.candidate", "mt_bench.gain", "mt_bench.win_rate"),
        *("alpaca.win_rate.candidate", "alpaca.length_controlled.champion", "alpaca.length_matched.candidate"),
        *("refusal.safe.candidate", "refusal.judged_unsafe.champion", "refusal.safe.rise"),
    ):
        assert name in metrics, name
    assert metrics["null_model.polite"]["value"] == 0
    assert metrics["mt_bench.score.candidate"]["n"] == 6
    assert row.report["judge"] == f"scripted at {judge.url}"
    health = row.report["measurements"]["judge"]
    assert (health["readable"], health["failures"]) == (1.0, {})
    over = row.report["measurements"]["over_champion"]
    assert over["estimate"]["n"] == over["wins"] + over["ties"] + over["losses"] == metrics["win_rate.champion"]["n"]
    artifact = home.artifact("evaluations", row.evaluation_id)
    markdown = artifact.filesystem.cat_file(f"{artifact.path}/report.md").decode()
    assert "| arena_hard.gain |" in markdown
    assert "The judge: 100% of its verdicts read" in markdown


def test_what_the_judge_owes_is_asked_for_alone_by_the_next_evaluation(cluster, stage):
    home, ledger, recipe, candidate = stage
    with scripted_judge(reading) as judge:
        judge.statuses[:] = [500, 200, 503]
        row = evaluate(home, ledger, recipe(judge, concurrency=1), candidate.model_id, None)
        asked = len(judge.asked)
        again = evaluate(home, ledger, recipe(judge), candidate.model_id, None)
        assert (again.evaluation_id, len(judge.asked)) == (row.evaluation_id, asked + 2)
    with ledger.read() as session:
        stored = session.get_one(EvaluationRow, row.evaluation_id)
    assert row.report["unanswered"] == {"status 500": 1, "status 503": 1}
    assert stored.report["unanswered"] == {}


@pytest.mark.parametrize(
    ("answer", "rule", "words"),
    [
        (lambda _: "Both are very nice answers, thank you.", "judge", "only 0% of its verdicts can be read"),
        (lambda asked: f"[[{asked.nonce} A>B]]", "judge", "no more than chance"),
    ],
)
def test_a_judge_that_cannot_be_used_holds_and_is_never_a_tie_rate(cluster, stage, answer, rule, words):
    home, ledger, recipe, candidate = stage
    with scripted_judge(answer) as judge:
        row = evaluate(home, ledger, recipe(judge), candidate.model_id, None)
    assert row.verdict == "HOLD"
    found = {r["name"]: r for r in row.report["rules"]}
    assert not found[rule]["passed"]
    assert words in found[rule]["reason"]
    if "only 0%" in words:
        assert row.report["measurements"]["over_champion"]["estimate"]["n"] == 0
        assert all(m["value"] is None for m in row.report["suites"]["win_rate"]["metrics"])


def test_a_judge_that_is_not_there_is_named_and_a_missing_one_is_a_fault_of_the_recipe(cluster, stage):
    home, ledger, recipe, candidate = stage
    with scripted_judge(reading) as judge:
        judge.statuses[:] = [401] * 99
        with pytest.raises(ServiceError, match="look at evaluate.judge"):
            evaluate(home, ledger, recipe(judge), candidate.model_id, None)
    tree = recipe(judge).model_dump(mode="json")
    tree["evaluate"]["judge"] = None
    with pytest.raises(RecipeError, match="give `judge` or `judge_rules`, neither is given"):
        parse_recipe(tree, place="test")
    tree["evaluate"]["judge_rules"] = "style.json"
    with pytest.raises(RecipeError, match="`null_model_prompts` needs a model that judges"):
        parse_recipe(tree, place="test")
