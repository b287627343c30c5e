"""The train job with ZeRO-3: one process's losses, a killed worker's run ends like an unbroken one, also on other workers."""

from dataclasses import replace

import pytest
import torch

from app.errors import TrainingError
from app.models import load_model
from app.schemas import Split
from app.training.judgements import for_unit, with_strangers
from app.training.snapshots import Binding, read_groups, write_training_snapshot
from ray_jobs.train import train
from tests.ray_jobs.test_train import (  # noqa: F401  fixtures
    a_worker_killed_after,
    cluster,
    one_process,
    recipe_for,
    stage,
    steps_of,
    weights_of,
)

pytestmark = pytest.mark.full
FULL = {"adapter": "full", "learning_rate": 1e-4, "held_out_every": 4}


def sliced(sft, *, workers=2, max_failures=3, **train_section):
    recipe = recipe_for(sft, **(FULL | {"reference": "sharded", "sharding": "zero3"} | train_section))
    settings = {"workers": workers, "max_failures": max_failures}
    return recipe.model_copy(update={"workers": recipe.workers.model_copy(update=settings)})


@pytest.fixture(scope="module")
def unbroken(cluster, stage):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    return train(home, ledger, sliced(sft), snapshot_id, run_id="sliced")


def test_two_workers_with_slices_train_like_one_process(unbroken, stage):  # noqa: F811
    ledger, sft = stage[1], stage[4]
    expected = one_process(stage, recipe_for(sft, **FULL))
    found = steps_of(ledger, "sliced")
    assert len(found) == len(expected) >= 10
    for step, (ours, reference) in enumerate(zip(found, expected, strict=True)):
        assert ours["loss"] == pytest.approx(reference.loss, rel=2e-5), step
        assert ours["grad_norm"] == pytest.approx(reference.grad_norm, rel=1e-3), step
        assert ours["pairs"] == reference.pairs
    assert "held_out_loss" in found[3]
    memory = unbroken.worker_result.reference_memory
    assert memory["workers"] == 2
    assert memory["held"] <= memory["total"] / 2 + 64
    assert memory["held"] < memory["peak"] <= memory["held"] + memory["largest"]
    assert memory["held"] < memory["loading"] <= memory["held"] + memory["largest"]
    assert unbroken.learning.pairs == sum(1 + i % 2 for i in range(40, 48))


def test_a_run_with_slices_whose_worker_is_killed_ends_with_the_bits_of_an_unbroken_one(unbroken, stage):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    with a_worker_killed_after(ledger, "sliced-killed", steps=5) as killed:
        result = train(home, ledger, sliced(sft), snapshot_id, run_id="sliced-killed")
    assert len(killed) == 1
    ours, expected = weights_of(home, result.model), weights_of(home, unbroken.model)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_adapters_in_bf16_and_an_objective_of_whole_steps_train_in_slices_as_they_do_without(cluster, stage):  # noqa: F811
    home, ledger, model, _, sft = stage
    snapshot = home.artifact("training", stage[3])
    splits = (Split.TRAIN, Split.HELD_OUT)
    groups = [replace(g, reference_logps=None) for split in splits for g in read_groups(snapshot, split)]
    loaded = load_model(home, model.model_id, dtype="float32")
    labelled, _ = for_unit(groups, "labels")
    strangers = with_strangers(labelled, max_length=64, seed=0)
    binding = Binding("pairs", loaded.template_digest, 64, "drop", 0, None, None, unit="labels", strangers=True)
    row = write_training_snapshot(home, ledger, strangers, binding=binding, counts={}, rows_per_file=12)
    section = {"objective": "kto", "adapter": "lora", "reference": "adapter_off", "dtype": "bfloat16"}
    found = {}
    for sharding in ("zero3", "none"):
        result = train(
            home, ledger, sliced(sft, **section, sharding=sharding), row.snapshot_id, run_id=f"kto-{sharding}"
        )
        found[sharding] = [step["loss"] for step in steps_of(ledger, result.run_id)], weights_of(home, result.model)
    (losses, weights), (expected, plain) = found["zero3"], found["none"]
    assert losses == pytest.approx(expected, rel=5e-3)
    assert {name: w.dtype for name, w in weights.items()} == {name: w.dtype for name, w in plain.items()}
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for name, weight in weights.items():
        assert torch.allclose(weight.float(), plain[name].float(), atol=2e-2), name


@pytest.mark.parametrize(("workers", "sharding"), [(3, "zero3"), (1, "none")], ids=["three", "whole"])
def test_a_run_with_slices_goes_on_with_another_number_of_workers_or_without_slices(
    unbroken,
    stage,  # noqa: F811
    workers,
    sharding,
):
    home, ledger, _, snapshot_id, sft = stage
    run_id = f"sliced-then-{workers}"
    with (
        a_worker_killed_after(ledger, run_id, steps=5),
        pytest.raises(TrainingError, match="the same run id continues"),
    ):
        train(home, ledger, sliced(sft, max_failures=0), snapshot_id, run_id=run_id)
    assert home.names(f"runs/{run_id}/checkpoints")
    result = train(home, ledger, sliced(sft, workers=workers, sharding=sharding), snapshot_id, run_id=run_id)
    found, expected = (steps_of(ledger, name) for name in (run_id, "sliced"))
    assert [step["step"] for step in found] == list(range(1, result.steps + 1))
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], rel=5e-5)
