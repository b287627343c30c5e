"""Every suite on the embedded model, with published questions: a scripted judge behind HTTP, then our own gateway.

The questions are the benchmarks' own and may not be copied here; `test_judged_evaluation` runs the same suites on made ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch

from app.config import parse_recipe
from app.ledger import EvaluationRow
from app.models import Lineage, ensure_sft, load_model, save_model
from app.services import Services
from ray_jobs.evaluate import evaluate
from tests.conftest import free_ports
from tests.evaluation.scripted_judge import scripted_judge
from tests.ray_jobs.test_judged_evaluation import reading

PROMPTS = Path(__file__).parents[2] / "app/demo/data/prompts_held_out.jsonl"


@pytest.fixture
def candidate(home, ledger):
    """The embedded model with noise on its weights: it says other things."""
    sft = ensure_sft(home, ledger, "embedded")
    loaded = load_model(home, sft.model_id, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=generator))
    lineage = Lineage("full", sft.model_id)
    return save_model(home, ledger, loaded.model, loaded.tokenizer, name="noisy", lineage=lineage)


def recipe(published, judge, **suites):
    evaluation = {
        "prompts": str(PROMPTS),
        "judge": {"api_key_variable": None, **judge},
        "max_prompts": 8,
        "max_new_tokens": 48,
        "bootstrap_samples": 500,
        **suites,
    }
    return parse_recipe({"name": "published", "evaluate": evaluation}, place="test")


def battery(published):
    arena = published / "arena_hard" / "v0.1"
    return {
        "null_model_prompts": 6,
        "arena_hard": {
            "questions": str(arena / "question.jsonl"),
            "baseline": str(arena / "answer_gpt-4-0314.jsonl.gz"),
            "max_questions": 4,
        },
        "mt_bench": {
            "questions": str(published / "mt_bench" / "question.jsonl"),
            "references": str(published / "mt_bench" / "reference_answer_gpt-4.jsonl"),
            "max_questions": 3,
        },
        "alpaca": {
            "questions": str(published / "llamafactory_demo" / "alpaca_en_demo.json.gz"),
            "max_questions": 6,
        },
        "refusal": {"questions": str(published / "xstest" / "xstest_prompts.csv"), "max_questions": 6},
    }


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_suite_runs_to_its_end_on_the_embedded_model_with_published_questions(home, ledger, candidate, published):
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        with scripted_judge(reading) as judge:
            asked = recipe(published, {"url": judge.url, "model": "scripted"}, **battery(published))
            row = evaluate(home, ledger, asked, candidate.model_id, None)
            known = len(judge.asked)
            evaluate(home, ledger, asked, candidate.model_id, None)
            assert len(judge.asked) == known > 0
    finally:
        ray.shutdown()
    metrics = {m["name"]: m for suite in row.report["suites"].values() for m in suite["metrics"]}
    for name in (
        *("win_rate.champion", "win_rate.sft", "null_model", "null_model.polite", "null_model.forged"),
        *("arena_hard.all.score.candidate", "arena_hard.all.style_score.champion", "arena_hard.gain"),
        *("mt_bench.score.candidate", "mt_bench.score.champion", "mt_bench.gain", "mt_bench.win_rate"),
        *("alpaca.win_rate.candidate", "alpaca.length_matched.champion"),
        *("refusal.safe.candidate", "refusal.unsafe.champion", "refusal.judged_safe.candidate", "refusal.safe.rise"),
    ):
        assert name in metrics, name
    assert row.report["unanswered"] == {}
    assert metrics["mt_bench.score.candidate"]["n"] == 6
    assert {look["name"] for look in row.report["looks"]} == {"prompts", "arena_hard", "mt_bench", "alpaca", "refusal"}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_our_own_gateway_judges_through_the_same_path_and_a_small_model_is_told_to_be_unusable(
    home, ledger, candidate, published, tmp_path, monkeypatch
):
    (port,) = free_ports(1)
    path = tmp_path / "serve.yaml"
    serving = {"port": port, "max_tokens": 128, "cpus_per_replica": 1, "request_timeout_s": 600}
    path.write_text(json.dumps({"name": "judge", "serving": serving}))
    subprocess.run([sys.executable, "-m", "serving.deploy", str(path), "--detach"], check=True, timeout=600)
    try:
        monkeypatch.setenv("GATEWAY_KEY", home.api_key())
        judge = {
            "url": f"{Services.read(home).gateway_url}/v1",
            "model": ensure_sft(home, ledger, "embedded").model_id,
            "api_key_variable": "GATEWAY_KEY",
            "max_tokens": 96,
            "concurrency": 4,
            "timeout_s": 600,
        }
        named = recipe(published, judge, null_model_prompts=6, refusal=battery(published)["refusal"])
        code = path.with_name("evaluate.yaml")
        code.write_text(named.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", "ray_jobs.evaluate", str(code), "--model", candidate.model_id],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=1500,
        )
    finally:
        subprocess.run([sys.executable, "-m", "serving.deploy", "--stop"], check=True, timeout=120)
    assert done.returncode == 3, done.stderr
    with ledger.read() as session:
        row = session.query(EvaluationRow).one()
    assert row.verdict == "HOLD"
    found = {rule["name"]: rule for rule in row.report["rules"]}
    assert not found["judge"]["passed"]
    assert "unusable" in found["judge"]["reason"]
    assert all(m["value"] is None for m in row.report["suites"]["win_rate"]["metrics"])
    assert row.report["measurements"]["over_champion"]["estimate"]["n"] == 0
