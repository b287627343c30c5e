"""The evaluate job on a real cluster: what is stored, what is not generated twice, how a fault is named."""

import json
import math
import shutil
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from app.config import parse_recipe
from app.errors import DataError, ModelError
from app.evaluation.perplexity import perplexity
from app.evaluation.prompts import load_prompts
from app.evaluation.questions import Question
from app.evaluation.signature import signature_fault
from app.generation import GenerationRequest, generate
from app.ledger import EvaluationRow, Ledger, RunRow, now
from app.models import Lineage, load_model, load_tokenizer, register_folder, render_prompt
from app.schemas import Message
from app.storage import Home
from app.training.held_out import PairMeasure
from ray_jobs import answers as answers_module
from ray_jobs.evaluate import evaluate, newest_trained
from ray_jobs.worker import RESULT
from tests.conftest import write_tiny_model
from tests.ray_jobs.local_ray import local_ray

MEASURES = [PairMeasure(f"p{i}", f"c{i // 2}", 1.0 if i % 10 else -1.0, 0.1, 5, 6) for i in range(40)]


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model):
    """A home with a tiny SFT model, another tiny model as candidate, and files to evaluate on."""
    root = tmp_path_factory.mktemp("evaluate")
    home = Home.at(root / "home")
    ledger = Ledger.open(home.ledger_url)
    sft_folder = shutil.copytree(tiny_model, root / "sft")
    sft = register_folder(
        home, ledger, sft_folder, name="sft", lineage=Lineage(kind="sft"), source=str(tiny_model.resolve())
    )
    other = write_tiny_model(root / "other", seed=1)
    candidate = register_folder(home, ledger, other, name="new", lineage=Lineage(kind="full", run_id="run-1"))
    with ledger.write() as session:
        session.add(
            RunRow(
                run_id="run-1",
                kind="train",
                status="succeeded",
                recipe={"serving": {"deployment": "default"}},
                metrics={},
                output_model_id=candidate.model_id,
                attempt=1,
                code_version="0",
                created_at=now(),
                updated_at=now(),
            )
        )
    result = {"measures": [asdict(m) for m in MEASURES]}
    (Path(home.artifact("runs", "run-1").path)).mkdir(parents=True)
    Path(home.artifact("runs", "run-1").path, RESULT).write_text(json.dumps(result))
    prompts = "".join(json.dumps({"prompt": f"say {i} things about {'xyz' * i}"}) + "\n" for i in range(1, 13))
    (root / "prompts.jsonl").write_text(prompts)
    style = {"name": "s", "rules": [{"name": "a", "pattern": "[a-m]", "weight": 1}], "edits": []}
    (root / "style.json").write_text(json.dumps(style))
    (root / "golden.jsonl").write_text('{"prompt": "anything", "must": ["."]}\n')
    (root / "neutral.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    recipe = parse_recipe(
        {
            "name": "judged",
            "model": {"sft": str(tiny_model.resolve())},
            "serving": {"dtype": "float32"},
            "evaluate": {
                "prompts": str(root / "prompts.jsonl"),
                "judge_rules": str(root / "style.json"),
                "golden": str(root / "golden.jsonl"),
                "neutral_text": str(root / "neutral.txt"),
                "max_new_tokens": 8,
                "batch_size": 2,
                "gate": {"rules": {"judged_prompts": {"threshold": 10}}},
            },
        },
        place="test",
    )
    yield home, ledger, recipe, sft, candidate
    ledger.close()


@pytest.fixture(scope="module")
def verdict(cluster, stage):
    home, ledger, recipe, _, candidate = stage
    return evaluate(home, ledger, recipe, candidate.model_id, "run-1")


def test_the_verdict_is_stored_beside_the_digest_of_the_weights(stage, verdict):
    home, ledger, _, sft, candidate = stage
    with ledger.read() as session:
        row = session.get_one(EvaluationRow, verdict.evaluation_id)
    assert (row.model_id, row.model_digest) == (candidate.model_id, candidate.digest)
    assert (row.champion_id, row.sft_id) == (sft.model_id, sft.model_id)
    assert row.verdict == "HOLD"
    measured = row.report["measurements"]["reward_accuracy"]
    assert (measured["value"], measured["n"], measured["n_clusters"], measured["level"]) == (0.9, 40, 20, 0.95)
    assert 0.75 < measured["low"] < 0.9
    artifact = home.artifact("evaluations", row.evaluation_id)
    artifact.verify()
    report = json.loads(artifact.filesystem.cat_file(f"{artifact.path}/report.json"))
    assert report == row.report
    assert {"win_rate", "ci_low", "ci_high", "n_prompts", "length_ratio", "golden"} <= report["figures"].keys()
    assert len(report["reasons"]) == sum(not rule["passed"] for rule in report["rules"]) > 0


def test_answers_are_what_the_model_says_greedily(stage, verdict):
    home, _, recipe, _, candidate = stage
    (name, _) = verdict.report["answers"][candidate.model_id]
    rows = home.artifact("answers", name).read_table(answers_module.ANSWER_SCHEMA).to_pylist()
    assert len(rows) == 12
    loaded = load_model(home, candidate.model_id, dtype="float32")
    prompts = [prompt.text for prompt in load_prompts(recipe.evaluation().prompts).prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        ids = tuple(render_prompt(loaded.tokenizer, [Message("user", prompt)], None))
        (alone,) = generate(loaded, [GenerationRequest(ids, 0.0, 1.0, 8, None)])
        assert (row["text"], row["n_tokens"]) == (alone.text, len(alone.token_ids))
        assert row["finish_reason"] == alone.finish_reason


def test_nothing_is_generated_twice(stage, verdict, monkeypatch):
    home, ledger, recipe, _, candidate = stage
    monkeypatch.setattr(answers_module, "_in_actors", lambda *_: pytest.fail("a model was asked again"))
    again = evaluate(home, ledger, recipe, candidate.model_id, "run-1")
    assert again.evaluation_id == verdict.evaluation_id
    # Other bounds: a new verdict from the answers that are kept.
    stricter = recipe.model_dump(mode="json")
    stricter["evaluate"]["gate"]["level"] = 0.99
    stricter["evaluate"]["gate"]["rules"]["judged_prompts"]["threshold"] = 500
    judged = evaluate(home, ledger, parse_recipe(stricter, place="test"), candidate.model_id, "run-1")
    assert judged.evaluation_id != verdict.evaluation_id
    assert any("500 is needed" in reason for reason in judged.report["reasons"])
    levels = [r.report["measurements"]["reward_accuracy"] for r in (verdict, judged)]
    assert levels[1]["level"] == 0.99
    assert levels[1]["low"] < levels[0]["low"]


def test_a_model_whose_answers_are_all_cut_wins_nothing_and_loses_nothing(cluster, stage):
    home, ledger, recipe, sft, _ = stage
    row = evaluate(home, ledger, recipe, sft.model_id, None)
    assert row.verdict == "HOLD"
    measured = row.report["measurements"]
    assert measured["over_champion"]["wins"] == measured["over_champion"]["losses"] == 0
    assert measured["over_champion"]["invalid_baseline"] == 12
    assert measured["over_champion"]["estimate"]["method"] == measured["length_ratio"]["method"] == "empty"
    assert measured["finished"] == {"candidate": 0.0, "champion": 0.0}
    assert measured["perplexity"]["candidate"] == measured["perplexity"]["champion"]


def test_a_prompt_that_fills_the_context_gets_an_answer_that_was_cut_and_a_long_one_what_room_is_left(stage):
    home, _, _, sft, _ = stage
    loaded = load_model(home, sft.model_id, dtype="float32")
    texts = {"fits": "hello", "long": "x" * (2048 - 60), "longer": "x" * 4000}
    prompts = [Question(name, name, "", (text,)) for name, text in texts.items()]
    fits, long, longer = answers_module.answer(loaded, prompts, answers_module.Decoding(64, 2, "float32"))
    window = 2048
    spent = len(render_prompt(load_tokenizer(home, sft.model_id), [Message("user", texts["long"])], None))
    assert 0 < window - spent < 64
    assert (fits.prompt_id, fits.n_tokens) == ("fits", 64)
    assert (long.finish_reason, long.n_tokens) == ("length", window - spent)
    assert (longer.text, longer.finish_reason, longer.n_tokens, longer.valid) == ("", "length", 0, False)


def test_what_a_model_refuses_is_told_without_a_trace(cluster, stage, tmp_path):
    home, ledger, recipe, _, _ = stage
    folder = write_tiny_model(tmp_path / "picky", seed=2)
    template = folder / "chat_template.jinja"
    refusal = "{% if 'say 7' in messages[0]['content'] %}{{ raise_exception('not that') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    picky = register_folder(home, ledger, folder, name="picky", lineage=Lineage(kind="full"))
    with pytest.raises(ModelError, match="not that") as told:
        evaluate(home, ledger, recipe, picky.model_id, None)
    assert "Traceback" not in str(told.value)
    assert type(told.value) is ModelError


def resources(actors=1):
    return answers_module.Resources(cpus=1, gpus=0, threads=1, actors=actors)


def ask(home, model, questions, *, actors=1, batch_size=1, progress=None):
    (given,) = answers_module.gather(
        home,
        [answers_module.Wanted(model, (tuple(questions),), None)],
        decoding=answers_module.Decoding(8, batch_size, "float32"),
        endpoint=None,
        resources=lambda: resources(actors),
        on_progress=lambda *told: None if progress is None else progress.append(told),
    )
    return given


def test_a_killed_job_goes_on_with_the_parts_that_are_missing_and_gives_the_same_answers(
    cluster, stage, tmp_path, monkeypatch
):
    home, _, _, _, candidate = stage
    questions = [Question(f"q{i}", f"q{i}", "", (f"count to {i} " * i,), temperature=0.9) for i in range(1, 8)]
    unbroken = ask(Home.at(shutil.copytree(home.local(), tmp_path / "other")), candidate, questions, actors=2)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(answers_module._Set, "_finish", lambda _: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            ask(home, candidate, questions, progress=seen)
    assert [told[1:] for told in seen] == [(2, 7), (4, 7), (6, 7)]
    kept = home.local("cache", "answers", f"{unbroken.artifacts[0]}-{candidate.model_id}")
    files = sorted(kept.glob("part-*.parquet"))
    assert len(files) == 4
    files[1].unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path != files[1]}
    told = []
    finish = answers_module._Set._finish

    def look(of_set):
        told.append({path: path.stat().st_mtime_ns for path in times})
        finish(of_set)

    monkeypatch.setattr(answers_module._Set, "_finish", look)
    again = ask(home, candidate, questions)
    assert told == [times]
    assert (again.answers, again.artifacts) == (unbroken.answers, unbroken.artifacts)
    assert [answer.prompt_id for answer in again.answers[0]] == [question.id for question in questions]
    assert not kept.exists()


def test_two_sets_of_the_same_questions_are_answered_once(cluster, stage):
    home, _, _, _, candidate = stage
    questions = tuple(Question(f"s{i}", f"s{i}", "", (f"say {i}",)) for i in range(3))
    (given,) = answers_module.gather(
        home,
        [answers_module.Wanted(candidate, (questions, questions), None)],
        decoding=answers_module.Decoding(4, 2, "float32"),
        endpoint=None,
        resources=resources,
        on_progress=lambda *_: None,
    )
    assert given.answers[0] == given.answers[1]
    assert len(given.answers[0]) == 3


def test_a_verdict_that_somebody_changed_is_reached_again(stage, verdict):
    home, ledger, recipe, _, candidate = stage
    with ledger.write() as session:
        row = session.get_one(EvaluationRow, verdict.evaluation_id)
        row.verdict, row.report = "SHIP", {**row.report, "verdict": "SHIP", "reasons": []}
    again = evaluate(home, ledger, recipe, candidate.model_id, "run-1")
    assert (again.evaluation_id, again.verdict) == (verdict.evaluation_id, "HOLD")
    assert signature_fault(again, home.signing_key()) == ""


def test_each_evaluation_counts_as_one_look_at_its_files_whatever_they_are_called(stage, verdict, tmp_path):
    home, ledger, recipe, _, candidate = stage
    tree = recipe.model_dump(mode="json")
    tree["evaluate"]["golden"] = str(shutil.copy(tree["evaluate"]["golden"], tmp_path / "renamed.jsonl"))
    before = {look["name"]: look["times"] for look in verdict.report["looks"]}
    looks = []
    for threshold in (700, 701, 701):
        tree["evaluate"]["gate"]["rules"]["judged_prompts"]["threshold"] = threshold
        row = evaluate(home, ledger, parse_recipe(tree, place="test"), candidate.model_id, "run-1")
        looks.append({look["name"]: look["times"] for look in row.report["looks"]})
    assert looks[0].keys() == before.keys() == {"prompts", "golden"}
    for name in before:
        assert looks[0][name] > before[name]
        assert looks[1][name] == looks[2][name] == looks[0][name] + 1


def test_a_verdict_that_is_asked_for_again_becomes_the_newest(stage, verdict):
    home, ledger, recipe, _, candidate = stage
    tree = recipe.model_dump(mode="json")
    tree["evaluate"]["gate"]["rules"]["judged_prompts"]["threshold"] = 600
    other = evaluate(home, ledger, parse_recipe(tree, place="test"), candidate.model_id, "run-1")
    again = evaluate(home, ledger, recipe, candidate.model_id, "run-1")
    assert again.evaluation_id == verdict.evaluation_id
    assert again.created_at > other.created_at


def test_a_model_and_a_verdict_belong_to_their_deployment(stage, verdict):
    home, ledger, recipe, _, candidate = stage
    assert newest_trained(ledger, "default") == (candidate.model_id, "run-1")
    with pytest.raises(DataError, match=r"no model was trained for deployment `support`.*\n\n.*--model"):
        newest_trained(ledger, "support")
    tree = recipe.model_dump(mode="json")
    tree["serving"]["deployment"] = "support"
    other = evaluate(home, ledger, parse_recipe(tree, place="test"), candidate.model_id, "run-1")
    assert (verdict.deployment, other.deployment) == ("default", "support")
    assert other.evaluation_id != verdict.evaluation_id


def test_the_newest_model_is_that_of_the_training_that_ended_last_not_of_the_one_that_began_last(ledger):
    def run(name: str, *, began: int, ended: int, model: str, status: str = "succeeded") -> RunRow:
        return RunRow(
            run_id=name,
            kind="train",
            status=status,
            recipe={"serving": {"deployment": "default"}},
            metrics={},
            output_model_id=model,
            attempt=1,
            code_version="0",
            created_at=now() - timedelta(hours=began),
            updated_at=now() - timedelta(hours=ended),
        )

    with ledger.write() as session:
        session.add(run("continued", began=9, ended=1, model="a"))
        session.add(run("later", began=5, ended=4, model="b"))
        session.add(run("again", began=8, ended=0, model="c", status="running"))
    assert newest_trained(ledger, "default") == ("a", "continued")


def test_a_model_that_cannot_be_loaded_is_told_without_a_trace(cluster, stage, tmp_path):
    home, ledger, recipe, _, _ = stage
    folder = write_tiny_model(tmp_path / "spoilt", seed=2)
    spoilt = register_folder(home, ledger, folder, name="spoilt", lineage=Lineage(kind="full"))
    Path(home.artifact("models", spoilt.model_id).path, "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config.json` differs from its manifest") as told:
        evaluate(home, ledger, recipe, spoilt.model_id, None)
    assert "Traceback" not in str(told.value)


def test_a_damaged_result_of_a_run_is_named(stage):
    home, ledger, recipe, _, candidate = stage
    damaged = Path(home.artifact("runs", "run-2").path, RESULT)
    damaged.parent.mkdir()
    damaged.write_text('{"measures": [{}]}')
    with pytest.raises(DataError, match=r"run-2/result.json` is damaged"):
        evaluate(home, ledger, recipe, candidate.model_id, "run-2")


def test_an_unknown_model_and_missing_files_are_named_before_anything_runs(stage):
    home, ledger, recipe, sft, _ = stage
    with pytest.raises(DataError, match=r"no model `nobody`.*\n\n.*new-"):
        evaluate(home, ledger, recipe, "nobody", None)
    for key in ("prompts", "judge_rules", "golden", "neutral_text"):
        tree = recipe.model_dump(mode="json")
        tree["evaluate"][key] = "/nowhere/file"
        with pytest.raises(DataError, match="/nowhere/file"):
            evaluate(home, ledger, parse_recipe(tree, place="test"), sft.model_id, None)


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood(stage):
    home, _, _, sft, _ = stage
    loaded = load_model(home, sft.model_id, dtype="float32")
    text = "abcdefgh" * 5
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    logps = loaded.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert perplexity(loaded, text, window=64) == pytest.approx(math.exp(-float(logps.mean())), rel=1e-5)
    first, second = (ids[:, :20], ids[:, 20:])
    parts = [loaded.model(p).logits[0, :-1].log_softmax(-1).gather(1, p[0, 1:, None]) for p in (first, second)]
    expected = math.exp(-float(torch.cat(parts).mean()))
    assert perplexity(loaded, text, window=20) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="too short"):
        perplexity(loaded, "a")
