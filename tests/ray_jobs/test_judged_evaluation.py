"""The evaluate job with a judge behind HTTP: every suite to its end, nothing judged twice, an unusable judge holds."""

import csv
import json
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from transformers import LlamaForCausalLM

from app.config import parse_recipe
from app.errors import DataError, RecipeError, ServiceError
from app.evaluation.judged import NULL_ANSWERS
from app.evaluation.prompts import load_prompts
from app.evaluation.suites import ANSWER_SCHEMA
from app.ledger import EvaluationRow, ModelRow, SnapshotRow, now
from app.models import Lineage, load_model, register_folder, render_prompt
from app.schemas import JUDGEMENT_SCHEMA, Message
from app.storage import JUDGEMENTS, REPORT_PAGE
from ray_jobs.evaluate import evaluate
from ray_jobs.ship import ship
from tests.conftest import write_tiny_model
from tests.evaluation.scripted_judge import scripted_judge
from tests.ray_jobs.local_ray import local_ray

STYLE = {"name": "s", "rules": [{"name": "a", "pattern": "[a-m]", "weight": 1}]}


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


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
        *("refusal.safe.candidate", "refusal.judged_unsafe.champion", "refusal.safe.rise", "refusal.judged_safe.rise"),
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
    page = artifact.filesystem.cat_file(f"{artifact.path}/{REPORT_PAGE}").decode()
    compared = [a for a in judge.asked if "which of two answers" in a.system]
    assert page.count("Both have letters.") >= len(compared) > 0
    for words in (
        *("arena_hard: candidate against base", "arena_hard: champion against base", "alpaca: candidate against"),
        *("mt_bench: candidate against champion", "null_model: the constant `polite` against sft"),
    ):
        assert words in page
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
        read = home.artifact("evaluations", row.evaluation_id).read_table(JUDGEMENT_SCHEMA, stem=JUDGEMENTS)
        assert len(read) > 0
        assert set(read["outcome"].to_pylist()) == {None}


def test_sealed_prompts_are_opened_by_ship_alone_and_decide(cluster, stage, tmp_path):
    home, ledger, recipe, candidate = stage
    seen = rows(tmp_path / "seen.jsonl", [{"prompt": f"say {i} things about {'xyz' * i}"} for i in range(1, 17)])
    sealed = rows(tmp_path / "sealed.jsonl", [{"prompt": f"tell me {i} times of {'abc' * i}"} for i in range(1, 10)])

    def decisive(asked):
        first, second = (asked.block(f"answer {side}") for side in "AB")
        return f"[[{asked.nonce} {'A>B' if first > second else 'B>A'}]]"

    def named(judge, fewest):
        tree = recipe(judge).model_dump(mode="json")
        tree["evaluate"]["prompts"] = seen
        open_rules = dict.fromkeys(tree["evaluate"]["gate"]["rules"])
        enough = {"metric": "prompts", "comparison": ">=", "threshold": fewest}
        gate = {"rules": {**open_rules, "judged_prompts": enough}}
        for suite in ("arena_hard", "mt_bench", "alpaca", "refusal", "null_model_prompts"):
            tree["evaluate"][suite] = None
        return parse_recipe({**tree, "evaluate": {**tree["evaluate"], "sealed": sealed, "gate": gate}}, place="test")

    def newest():
        with ledger.read() as session:
            return session.scalars(sa.select(EvaluationRow).order_by(EvaluationRow.created_at.desc())).first()

    with scripted_judge(decisive) as judge:
        row = evaluate(home, ledger, named(judge, 10), candidate.model_id, None)
        assert (row.verdict, row.report["looks"][0]["times"]) == ("SHIP", 1)
        assert all(look["place"] != sealed for look in row.report["looks"])
        # Ten judged prompts are asked for, and only nine are sealed.
        held = ship(home, ledger, named(judge, 10), candidate.model_id, "ana")
        assert (held.shipped, ledger.champion("default")) == (False, None)
        assert "on the sealed prompts the gate says HOLD" in held.reason
        assert (newest().report["prompts"], newest().verdict) == (sealed, "HOLD")
        # Asked again, it is no other look, and the verdict stands.
        assert ship(home, ledger, named(judge, 10), candidate.model_id, "ana").reason == held.reason
        evaluate(home, ledger, named(judge, 6), candidate.model_id, None)
        assert ship(home, ledger, named(judge, 6), candidate.model_id, "ana").shipped
        assert ledger.champion("default").model_id == candidate.model_id
        assert {"name": "prompts", "place": sealed, "times": 2} in newest().report["looks"]
        # The champion would meet itself.
        opened = newest().evaluation_id
        assert ship(home, ledger, named(judge, 6), candidate.model_id, "ana").shipped
        assert newest().evaluation_id == opened
        with pytest.raises(DataError, match="9 of the 9 sealed prompts"):
            both = named(judge, 6).model_dump(mode="json")
            both["evaluate"]["prompts"] = sealed
            evaluate(home, ledger, parse_recipe(both, place="test"), candidate.model_id, None)


def test_golden_cases_may_be_judged_and_a_judge_of_the_pairs_does_not_gate(cluster, stage, tmp_path):
    home, ledger, recipe, candidate = stage
    cases = [{"id": f"g{i}", "prompt": f"say {i}", "judge": f"is {'right' if i else 'wrong'}"} for i in range(3)]

    def tree(judge):
        tree = recipe(judge).model_dump(mode="json")
        return {**tree, "evaluate": {**tree["evaluate"], "golden": rows(tmp_path / "golden.jsonl", cases)}}

    def strict(asked):
        if "meets a requirement" in asked.system:
            return f"[[{asked.nonce} {'met' if 'right' in asked.block('requirement') else 'not_met'}]]"
        return reading(asked)

    with ledger.write() as session:
        fields = {"uri": "", "created_at": now()}
        session.add(
            SnapshotRow(snapshot_id="pairs", kind="pairs", manifest={"origin": {"judge": "acme/scripted"}}, **fields)
        )
        session.add(SnapshotRow(snapshot_id="training", kind="training", manifest={}, parent_id="pairs", **fields))
        session.get_one(ModelRow, candidate.model_id).snapshot_id = "training"
    with scripted_judge(strict) as judge:
        row = evaluate(home, ledger, parse_recipe(tree(judge), place="test"), candidate.model_id, None)
    golden = {result["id"]: result for result in row.report["measurements"]["golden"]}
    assert not golden["g0"]["passed"]
    for name in ("g1", "g2"):
        assert golden[name]["passed"] or "cut by the token limit" in golden[name]["reason"]
    assert any(result["passed"] for result in golden.values())
    found = {r["name"]: r for r in row.report["rules"]}
    assert not found["judge_independent"]["passed"]
    assert "the judge `scripted` labelled pairs" in found["judge_independent"]["reason"]
    without = tree(judge)
    without["evaluate"] = {**without["evaluate"], "judge": None, "judge_rules": rows(tmp_path / "style.json", [STYLE])}
    for suite in ("arena_hard", "mt_bench", "alpaca", "null_model_prompts"):
        without["evaluate"][suite] = None
    with pytest.raises(DataError, match="`g0`.*wants a judge"):
        evaluate(home, ledger, parse_recipe(without, place="test"), candidate.model_id, None)


@pytest.mark.full
def test_an_implicit_reward_judges_by_what_an_answer_gained_over_the_reference(cluster, stage, tmp_path):
    home, ledger, recipe, candidate = stage
    folders = {name: write_tiny_model(tmp_path / name, seed=seed) for name, seed in (("r", 7), ("b", 8))}
    rows_of = {n: register_folder(home, ledger, f, name=n, lineage=Lineage(kind="full")) for n, f in folders.items()}
    with scripted_judge(reading) as judge:
        tree = recipe(judge).model_dump(mode="json")
    for suite in ("judge", "arena_hard", "mt_bench", "alpaca", "null_model_prompts"):
        tree["evaluate"][suite] = None
    tree["evaluate"]["reward_judge"] = {"model": rows_of["r"].model_id, "reference": rows_of["b"].model_id}
    row = evaluate(home, ledger, parse_recipe(tree, place="test"), candidate.model_id, None)
    assert row.report["judge"].startswith("the implicit reward of `r-")
    by_model = {
        model: home.artifact("answers", names[0]).read_table(ANSWER_SCHEMA).to_pylist()
        for model, names in row.report["answers"].items()
    }
    requests = {prompt.id: prompt.text for prompt in load_prompts(tree["evaluate"]["prompts"]).prompts}
    loaded = [load_model(home, rows_of[name].model_id, dtype="float32") for name in ("r", "b")]

    def reward(answer):
        ids = [
            torch.tensor([render_prompt(one.tokenizer, [Message("user", requests[answer["prompt_id"]])], None)])
            for one in loaded
        ]
        said = torch.tensor([[*loaded[0].tokenizer.encode(answer["text"], add_special_tokens=False), 1]])
        logps = []
        for one, prompt in zip(loaded, ids, strict=True):
            whole = torch.cat([prompt, said], dim=1)
            with torch.no_grad():
                rows = one.model(whole).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            logps.append(float(rows.gather(1, said[0][:, None]).sum()))
        return logps[0] - logps[1]

    mine, other = (by_model[name] for name in (candidate.model_id, row.champion_id))
    expected = [
        reward(a) > reward(b)
        for a, b in zip(mine, other, strict=True)
        if all(x["finish_reason"] == "stop" and x["text"].strip() for x in (a, b)) and a["text"] != b["text"]
    ]
    over = row.report["measurements"]["over_champion"]
    assert len(expected) > 3
    assert (over["wins"], over["losses"]) == (sum(expected), len(expected) - sum(expected))
    page = home.artifact("evaluations", row.evaluation_id)
    assert "implicit reward" in page.filesystem.cat_file(f"{page.path}/{REPORT_PAGE}").decode()
    found = {r["name"]: r for r in row.report["rules"]}
    assert found["judge_independent"]["passed"]
    tree["evaluate"]["reward_judge"]["model"] = candidate.model_id
    own = evaluate(home, ledger, parse_recipe(tree, place="test"), candidate.model_id, None)
    found = {r["name"]: r for r in own.report["rules"]}
    assert (found["judge_independent"]["passed"], own.verdict) == (False, "HOLD")


@pytest.mark.full
def test_answers_may_come_from_an_endpoint_that_serves_the_models_by_their_ids(cluster, stage, tmp_path, monkeypatch):
    home, ledger, recipe, candidate = stage

    def answering(asked):
        return reading(asked) if asked.system else f"{asked.body['model'][:3]} says {asked.user}"

    def named(judge, **suites):
        tree = recipe(judge).model_dump(mode="json")
        for suite in ("arena_hard", "alpaca", "refusal", "null_model_prompts"):
            tree["evaluate"][suite] = None
        endpoint = {"url": judge.url, "api_key_variable": None, "retries": 0, "concurrency": 1}
        return parse_recipe(
            {**tree, "evaluate": {**tree["evaluate"], "batch_size": 1, "endpoint": endpoint}}, place="test"
        )

    with scripted_judge(answering) as server:
        # The third part fails: what was finished is kept and not asked for again.
        server.statuses[:] = [200] * 5 + [500]
        with pytest.raises(ServiceError, match=r"gave no answer of `new-.*` to question"):
            evaluate(home, ledger, named(server), candidate.model_id, None)
        before = [asked.user for asked in server.asked if not asked.system]
        row = evaluate(home, ledger, named(server), candidate.model_id, None)
        after = [asked.user for asked in server.asked if not asked.system][len(before) :]
    assert not {user for user in before[:4] if before.count(user) == 1} & set(after[:8])
    assert row.report["answered_by"] == f"the endpoint {server.url}"
    (prompts, turns) = row.report["answers"][candidate.model_id]
    said = home.artifact("answers", prompts).read_table(ANSWER_SCHEMA).to_pylist()
    assert len(said) == 8
    assert all(answer["text"].startswith("new says say") and answer["n_tokens"] == 10 for answer in said)
    assert [a["turn"] for a in home.artifact("answers", turns).read_table(ANSWER_SCHEMA).to_pylist()] == [1, 2] * 3
    # Everything is kept, so no key is needed.
    monkeypatch.delenv("NO_KEY", raising=False)
    keyless = named(server).model_dump(mode="json")
    keyless["evaluate"]["endpoint"]["api_key_variable"] = "NO_KEY"
    assert evaluate(home, ledger, parse_recipe(keyless, place="test"), candidate.model_id, None).verdict == row.verdict


def test_a_judge_that_is_not_there_is_named_and_a_missing_one_is_a_fault_of_the_recipe(cluster, stage):
    home, ledger, recipe, candidate = stage
    with scripted_judge(reading) as judge:
        judge.statuses[:] = [401] * 99
        with pytest.raises(ServiceError, match="look at evaluate.judge"):
            evaluate(home, ledger, recipe(judge), candidate.model_id, None)
    tree = recipe(judge).model_dump(mode="json")
    tree["evaluate"]["judge"] = None
    with pytest.raises(RecipeError, match="give `judge`, `judge_rules` or `reward_judge`, none is given"):
        parse_recipe(tree, place="test")
    tree["evaluate"]["judge_rules"] = "style.json"
    with pytest.raises(RecipeError, match="`null_model_prompts` needs a model that judges"):
        parse_recipe(tree, place="test")
