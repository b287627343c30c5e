"""Objectives that do not learn from pairs against a reference, through `prepare` and the train job."""

import io
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
import torch
from rich.console import Console

from app.config import PairSection, parse_recipe
from app.errors import DataError, ModelError, RecipeError
from app.evaluation.learning import Learning, Likelihood
from app.ledger import Ledger, RunRow, RunStepRow
from app.models import Lineage, check_descent, ensure_sft, load_model, save_model
from app.preferences.snapshots import write_pair_snapshot
from app.schemas import Message, Pair, Response, Split
from app.storage import Home
from app.training.batch import step_groups
from app.training.engine import Replicated, SingleWorker
from app.training.judgements import balanced, divide
from app.training.loop import optimise
from app.training.objectives import load_objective
from app.training.policy import build_policy, precomputed
from app.training.snapshots import SHUFFLE_WINDOW, epoch_files, epoch_stream, read_groups, train_files
from ray_jobs.prepare import prepare
from ray_jobs.train import train
from ray_jobs.worker import run_result
from tests.ray_jobs.local_ray import local_ray

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model):
    """A home with 60 pairs and 20 lone judgements, some of them on prompts that have pairs too."""
    home = Home.at(tmp_path_factory.mktemp("objectives") / "home")
    ledger = Ledger.open(home.ledger_url)
    ensure_sft(home, ledger, str(tiny_model))
    rows = []
    for i in range(60):
        good, bad = (Response(f"{word} number {i} " * (1 + (i + k) % 3)) for k, word in enumerate(("yes", "no")))
        rows.append(pair(prompt(i), good, bad))
    for i in range(20):
        liked = i % 3 == 0
        answer = Response(f"{'yes' if liked else 'no'} again {i}")
        lone = pair(prompt(2 * i + 40), *((answer, None) if liked else (None, answer)))
        rows.append(replace(lone, label=liked))
    row = write_pair_snapshot(
        home,
        ledger,
        rows,
        section=PairSection(held_out_fraction=0.35),
        quarantine=(),
        counts={},
        origin={"kind": "import"},
    )
    yield home, ledger, row.snapshot_id, str(tiny_model)
    ledger.close()


def prompt(number: int) -> str:
    """Return one of a hundred prompts of which no two are near-duplicates."""
    words = ("red", "blue", "tall", "small", "kind", "old", "new", "warm", "loud", "thin")
    return f"{words[number // 10]} {'abcdefghij'[number % 10]}?"


def pair(text: str, chosen: Response | None, rejected: Response | None) -> Pair:
    return Pair((Message("user", text),), chosen, rejected, source="import", split="", cluster="", created_at=MOMENT)


def recipe_for(sft: str, objective: str, **train_section):
    section = {
        "objective": objective,
        "dtype": "float32",
        "learning_rate": 1e-3,
        "epochs": 2,
        "batch_pairs": 12,
        "micro_batch_tokens": 128,
        **({} if train_section.get("adapter") == "full" else {"lora": {"r": 4, "alpha": 8}}),
    }
    tree = {
        "name": "tiny",
        "model": {"sft": sft},
        "pairs": {"min_pairs": 5},
        "prepare": {"max_length": 128},
        "train": section | train_section,
        "workers": {"workers": 2, "cpus_per_worker": 1},
    }
    return parse_recipe(tree, place="test")


def one_process(home, snapshot_id, recipe):
    """The same run by the bare loop."""
    section = recipe.train
    snapshot = home.artifact("training", snapshot_id)
    counts = snapshot.manifest()["splits"]["train"]
    options = balanced(section.options, liked=counts["liked_weight"], disliked=counts["disliked_weight"])
    objective = load_objective(section.objective, options)
    model = load_model(home, snapshot_model(home), dtype="float32")
    policy = build_policy(model, section, agreement="agreement" in objective.needs)
    groups, files = read_groups(snapshot, Split.TRAIN), train_files(snapshot)

    def rows():
        for epoch in range(section.epochs):
            ordered = epoch_files(files, seed=section.seed, epoch=epoch)
            stream = (groups[f.first + i] for f in ordered for i in range(len(f.judgements)))
            yield from epoch_stream(stream, ordered, seed=section.seed, epoch=epoch, window=SHUFFLE_WINDOW)

    steps = list(step_groups(rows(), section.batch_pairs))
    return list(
        optimise(
            Replicated(
                policy,
                learning_rate=section.learning_rate,
                max_grad_norm=section.max_grad_norm,
                workers=SingleWorker(),
            ),
            steps,
            objective=objective,
            reference=precomputed,
            section=section,
            learning_rate=section.learning_rate,
            total_steps=len(steps),
            workers=SingleWorker(),
        )
    )


def snapshot_model(home) -> str:
    (model,) = (path.name for path in home.local("models").iterdir() if path.is_dir())
    return model


def train_and_compare(stage, objective: str, **train_section):
    home, ledger, pairs, sft = stage
    recipe = recipe_for(sft, objective, **train_section)
    prepared = prepare(home, ledger, recipe, pairs)
    expected = one_process(home, prepared.snapshot_id, recipe)
    result = train(home, ledger, recipe, prepared.snapshot_id, run_id=f"run-{objective.rpartition(':')[2]}")
    with ledger.read() as session:
        rows = session.scalars(
            sa.select(RunStepRow).where(RunStepRow.run_id == result.run_id).order_by(RunStepRow.step)
        ).all()
    assert len(rows) == len(expected) >= 4
    for row, report in zip(rows, expected, strict=True):
        assert row.metrics["loss"] == pytest.approx(report.loss, rel=1e-4)
        assert (row.metrics["pairs"], row.metrics["labels"]) == (report.pairs, report.labels)
        assert row.metrics["kl"] == (None if report.kl is None else pytest.approx(report.kl, rel=1e-3, abs=1e-6))
    return prepared, result, rows


@pytest.fixture
def of_first_models(stage):
    """Every run here starts from the one SFT model; what it made is removed, so that the next finds one model."""
    import shutil

    yield
    home = stage[0]
    for path in home.local("models").iterdir():
        if path.name.startswith("tiny-"):
            shutil.rmtree(path)


def test_kto_trains_on_pairs_and_lone_judgements_with_the_kl_of_the_whole_step(cluster, stage, of_first_models):
    prepared, result, rows = train_and_compare(stage, "kto", canary_every=2)
    manifest = prepared.manifest
    assert (manifest["binding"]["unit"], manifest["binding"]["strangers"]) == ("labels", True)
    assert manifest["splits"]["train"]["pairs"] == 0
    assert manifest["splits"]["held_out"]["pairs"] > 0
    groups = read_groups(stage[0].artifact("training", prepared.snapshot_id), Split.TRAIN)
    assert sum(len(strangers.responses) for _, strangers in map(divide, groups) if strangers) == sum(
        len(g.labels) for g in groups
    )
    assert rows[0].metrics["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-1].metrics["kl"] != 0.0
    # A model of random weights goes on until its limit.
    assert [row.metrics["canary_finished"] for row in rows[1::2]] == [0.0] * len(rows[1::2])
    assert {row.metrics["canary_tokens"] for row in rows[1::2]} == {128}
    assert all(0 <= row.metrics["canary_repetition"] <= 1 for row in rows[1::2])
    assert "canary_finished" not in rows[0].metrics
    assert isinstance(result.learning, Learning)
    assert result.learning.pairs == manifest["splits"]["held_out"]["pairs"]


@pytest.mark.full
def test_a_run_that_adds_nothing_to_a_champion_is_not_learned_though_the_reference_is_another(
    cluster, stage, of_first_models
):
    """The champion's rewards against the SFT model are what the rounds before it made."""
    home, ledger, pairs, sft = stage
    start = ensure_sft(home, ledger, sft)
    loaded = load_model(home, start.model_id, dtype="float32")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    lineage = Lineage("merged", start.model_id)
    champion = save_model(home, ledger, loaded.model, loaded.tokenizer, name="tiny-champion", lineage=lineage)
    # Of a deployment of its own: the other runs here begin with the SFT model.
    ledger.set_champion("other", champion.model_id, expected_revision=0, actor="test", reason="better")
    recipe = recipe_for(sft, "kto", learning_rate=1e-12, held_out_every=2)
    changes = {
        "model": recipe.model.model_copy(update={"reference_model": "sft"}),
        "serving": recipe.serving.model_copy(update={"deployment": "other"}),
    }
    recipe = recipe.model_copy(update=changes)
    prepared = prepare(home, ledger, recipe, pairs)
    result = train(home, ledger, recipe, prepared.snapshot_id, run_id="adds-nothing")
    measured = run_result(home, result.run_id).measures
    assert max(abs(row.before_margin) for row in measured.pairs) > 1e-3
    assert max(abs(row.before_reward) for row in measured.answers) > 1e-3
    assert max(abs(row.gain) for row in (*measured.pairs, *measured.answers)) < 1e-4
    assert not result.learning.learned
    # Nor is it a fall of the chosen answers, though they are another model's.
    with ledger.read() as session:
        moved = [
            row.metrics["held_out_chosen_change"]
            for row in session.scalars(sa.select(RunStepRow).where(RunStepRow.run_id == "adds-nothing"))
            if row.step % 2 == 0 and row.step < result.steps
        ]
    assert moved
    assert max(map(abs, moved)) < 1e-5


@pytest.mark.full
def test_imitation_is_measured_against_the_model_that_it_started_from(cluster, stage, of_first_models):
    prepared, result, rows = train_and_compare(stage, "sft", learning_rate=2e-2)
    assert prepared.manifest["binding"]["reference_digest"] is None
    assert rows[-1].metrics["loss"] < rows[0].metrics["loss"]
    assert isinstance(result.learning, Likelihood)
    assert result.learning.learned, result.learning.table()
    # DPO on top of it: the start and the reference are what imitation made, and the lineage says so.
    home, ledger, pairs, sft = stage
    recipe = recipe_for(result.model.model_id, "dpo", learning_rate=1e-4)
    prepared = prepare(home, ledger, recipe, pairs)
    assert prepared.manifest["binding"]["reference_digest"] == result.model.digest
    tuned = train(home, ledger, recipe, prepared.snapshot_id, run_id="dpo-on-sft")
    with ledger.read() as session:
        first = session.get_one(RunStepRow, ("dpo-on-sft", 1)).metrics["loss"]
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert tuned.model.parent_id == result.model.model_id
    check_descent(ledger, tuned.model.model_id, ensure_sft(home, ledger, sft), deployment="any")
    check_descent(ledger, tuned.model.model_id, result.model, deployment="any")
    with pytest.raises(
        ModelError, match=f"descends from the SFT checkpoint `.*`, and model.sft is `{tuned.model.model_id}`"
    ):
        check_descent(ledger, result.model.model_id, tuned.model, deployment="any")


@pytest.mark.full
@pytest.mark.parametrize("objective", ["simpo", "orpo", "app.training.objectives:cpo", "apo_zero_unpaired"])
def test_other_objectives_train_in_the_job_as_in_one_process(cluster, stage, of_first_models, objective):
    _, result, rows = train_and_compare(stage, objective, held_out_every=2)
    assert isinstance(result.learning, Learning)
    free = objective != "apo_zero_unpaired"
    with stage[1].read() as session:
        assert (session.get_one(RunRow, result.run_id).reference_model_id is None) == free
    assert (rows[0].metrics["chosen_fell"] is None) == free
    assert all((row.before_margin != 0) == free for row in run_result(stage[0], result.run_id).measures.pairs)
    assert result.learning.chosen_change is not None
    # With a reference or without one, against the model of step 0.
    assert all(0 <= row.metrics["held_out_chosen_fell"] <= 1 for row in rows[1:-1:2])
    assert rows[1].metrics["held_out_chosen_change"] != rows[3].metrics["held_out_chosen_change"] != 0


@pytest.mark.full
def test_imitation_that_a_reference_holds_back_is_measured_against_the_start_too(cluster, stage, of_first_models):
    objective = "tests.ray_jobs.tethered:tethered"
    _, result, rows = train_and_compare(stage, objective, options={"pull": 1e-4}, learning_rate=2e-2, held_out_every=2)
    assert rows[-1].metrics["loss"] < rows[0].metrics["loss"]
    assert isinstance(result.learning, Likelihood)
    assert result.learning.learned, result.learning.table()


def test_what_is_said_of_a_reference_that_an_objective_of_ones_own_has_not_is_refused(cluster, stage):
    home, ledger, pairs, sft = stage
    recipe = recipe_for(sft, "app.training.objectives:cpo", reference="sharded")
    with pytest.raises(RecipeError, match=r"`train.reference` has no effect with .*:cpo`, which asks for no"):
        prepare(home, ledger, recipe, pairs)
    prepared = prepare(home, ledger, recipe_for(sft, "app.training.objectives:cpo"), pairs)
    with pytest.raises(RecipeError, match="`train.reference` has no effect"):
        train(home, ledger, recipe, prepared.snapshot_id, run_id="no-reference")


def test_a_backend_without_effect_is_refused_before_a_worker_starts(cluster, stage, monkeypatch):
    home, ledger, pairs, sft = stage
    monkeypatch.setattr("ray_jobs.prepare.unpackable", lambda model: "it has a state")
    recipe = recipe_for(sft, "dpo")
    changed = {"train": recipe.train.model_copy(update={"attention": "flex"})}
    with pytest.raises(ModelError, match="attention `flex` has no effect: it has a state"):
        prepare(home, ledger, recipe.model_copy(update=changed), pairs)


def test_a_snapshot_of_another_kind_of_objective_is_refused(cluster, stage):
    home, ledger, pairs, sft = stage
    prepared = prepare(home, ledger, recipe_for(sft, "simpo"), pairs, console=Console(file=io.StringIO()))
    with pytest.raises(DataError, match=r"holds pairs, the objective needs labels with answers to other prompts"):
        train(home, ledger, recipe_for(sft, "kto"), prepared.snapshot_id, run_id="wrong")
