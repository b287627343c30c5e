"""ZeRO-3 on two and four ranks: the numbers of one process, and no rank holds more of the reference than it may."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.models import Lineage, register_folder
from tests.conftest import free_ports, write_tiny_model
from tests.training.fork_server import fork_server
from tests.training.start_rank import start_rank
from tests.training.zero_ranks import TIMEOUT_S

BUFFERS = 256
"""Bytes: frequencies of the rotary embedding, whole on every rank."""


def run(folder: Path, world: int, settings: dict) -> list[dict]:
    """What every rank tells; a world of 0 is one process without DeepSpeed."""
    (port,) = free_ports(1)
    server = fork_server()
    places = [folder / f"rank-{world}-{rank}" for rank in range(max(1, world))]
    # Into files: a rank whose pipe is full would wait, and the others for it.
    outs, logs = ([place.with_suffix(suffix) for place in places] for suffix in (".json", ".log"))
    ranks = [
        server.Process(target=start_rank, args=(rank, world, {**settings, "port": port}, out, log))
        for rank, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    end = time.monotonic() + 240
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=max(0.0, end - time.monotonic()))
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
    assert [process.exitcode for process in ranks] == [0] * len(ranks), "\n".join(
        log.read_text()[-3000:] for log in logs
    )
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize(
    ("world", "section"),
    [
        (2, {"adapter": "full", "reference": "sharded"}),
        pytest.param(4, {"adapter": "full", "reference": "sharded"}, marks=pytest.mark.full),
        pytest.param(2, {"adapter": "full"}, marks=pytest.mark.full),
        pytest.param(
            2,
            {"adapter": "lora", "reference": "adapter_off", "lora": {"target_modules": ["q_proj", "v_proj"]}},
            marks=pytest.mark.full,
        ),
        pytest.param(
            2,
            {"adapter": "lora", "lora": {"target_modules": ["q_proj", "down_proj"], "variant": "rslora"}},
            marks=pytest.mark.full,
        ),
        pytest.param(
            2,
            {"adapter": "full", "reference": "sharded", "offload": ["optimizer", "reference"]},
            marks=pytest.mark.full,
        ),
    ],
    ids=["full-sharded-2", "full-sharded-4", "full-precomputed", "lora-adapter-off", "rslora-precomputed", "offload"],
)
def test_ranks_take_the_steps_of_one_process(home, ledger, tmp_path, world, section, claim):
    _, ranks = compare(home, ledger, tmp_path, world, section)
    if held := [rank["reference"] for rank in ranks if "reference" in rank]:
        peak, loading, total, largest = (
            max(rank[name] for rank in held) for name in ("peak", "loading", "total", "largest")
        )
        claim(
            f"{world} workers, offload {', '.join(section.get('offload', ['none']))}: each holds at most its share of the reference and the largest layer, while it loads the whole buffers too",
            figure=f"of {total} bytes at most {loading} while it loads and {peak} while it computes, largest layer {largest}",
        )


@pytest.mark.full
@pytest.mark.parametrize("sharding", ["none", "zero3"])
@pytest.mark.parametrize(
    "section",
    [
        {"adapter": "full"},
        {"adapter": "full", "reference": "sharded"},
        {"adapter": "lora"},
        {"adapter": "lora", "reference": "sharded"},
        {"adapter": "lora", "reference": "adapter_off"},
    ],
    ids=["full-precomputed", "full-sharded", "lora-precomputed", "lora-sharded", "lora-adapter-off"],
)
def test_ten_steps_of_sgd_are_those_of_one_process_on_one_two_and_four_workers(
    home, ledger, tmp_path, section, sharding, claim
):
    """By SGD: AdamW's steps make of the noise of a sum what they make of the sum."""
    settings = settings_of(home, ledger, tmp_path, {**section, "sharding": sharding}, sgd=True, rate=1.0, steps=10)

    def weights(world: int, **more) -> tuple[list[dict], torch.Tensor]:
        folder = tmp_path / f"export-{world}-{len(more)}"
        (place := folder / ("ranks" if world else "one")).mkdir(parents=True)
        told = run(tmp_path, world, {**settings, **more, "export": str(folder)})
        found = {name: tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()}
        return told, torch.cat([found[name].double().flatten() for name in sorted(found)])

    ((alone,), trained), ((still,), start) = weights(0), weights(0, rate=0.0)
    moved = [abs(a[1] - b[1]) for a, b in zip(alone["held_out"], still["held_out"], strict=True)]
    assert max(moved) > 1e-3, "the steps change nothing"
    expected = [step[:2] for step in alone["steps"]]
    assert len(expected) == 10
    apart, weights_apart = 0.0, 0.0
    for world in (1, 2, 4):
        ranks, ended = weights(world)
        # What ten steps of SGD add to the weights is their gradients, clipped, and nothing else.
        weights_apart = max(weights_apart, float((ended - trained).norm() / (trained - start).norm()))
        assert weights_apart <= 1e-5, world
        for rank in ranks:
            for found, wanted in zip(rank["steps"], expected, strict=True):
                assert found[:2] == pytest.approx(wanted, rel=1e-6), world
                apart = max(apart, *(abs(a / b - 1) for a, b in zip(found, wanted, strict=False)))
    reference = section.get("reference", "precomputed")
    claim(
        f"1, 2 and 4 workers, {section['adapter']}, reference {reference}, sharding {sharding}: loss, gradient norm and the sum of the gradients of ten steps are those of one process",
        figure=f"at most {apart:.1e} apart, the sum {weights_apart:.1e} (SGD, float32)",
    )


def settings_of(home, ledger, tmp_path, section, *, tied=True, **more):
    names = {
        name: register_folder(
            home, ledger, write_tiny_model(tmp_path / name, seed=seed, tied=tied), name=name, lineage=Lineage("sft")
        ).model_id
        for name, seed in (("start", 0), ("other", 1))
    }
    # Of the ranks behind the first: they read none.
    bare = shutil.copytree(home.local(), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return {
        "home": home.uri,
        "without_weights": str(bare),
        "model": names["start"],
        "reference": names["other"],
        "section": {"dtype": "float32", "micro_batch_tokens": 40, "sharding": "zero3", **section},
        **more,
    }


def compare(home, ledger, tmp_path, world, section, **more):
    settings = settings_of(home, ledger, tmp_path, section, **more)
    (alone,) = run(tmp_path, 0, settings)
    ranks = run(tmp_path, world, settings)
    for rank in ranks:
        # Every forward gathers the slices of every weight.
        given = rank["collectives"]["collective_bytes"]
        assert given >= len(rank["steps"]) * rank["parameter_bytes"] / world, given
        assert set(rank["timeouts"]) == {TIMEOUT_S}, "workers wait for one another for ever, or for another time"
        assert rank["packing"] < 1e-5
        for found, expected in zip(rank["steps"], alone["steps"], strict=True):
            numbers = [[math.inf if value is None else value for value in step[:4]] for step in (found, expected)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-5)
            assert found[4] == expected[4]
        assert len(rank["held_out"]) == 5
        for found, expected in zip(rank["held_out"], alone["held_out"], strict=True):
            assert found[0] == expected[0]
            assert found[1:] == pytest.approx(expected[1:], rel=1e-4, abs=2e-5)
        if "reference" in rank:
            held = rank["reference"]
            assert held["slices"] <= held["total"] / world * 1.01 + 64
            assert held["slices"] < held["peak"] <= held["slices"] + held["largest"]
            assert held["slices"] < held["loading"] <= held["slices"] + held["largest"] + BUFFERS
            # What the run itself says, of parameters alone.
            assert held["loading"] - BUFFERS <= held["watched"] <= held["slices"] + held["largest"]
    return alone, ranks


@pytest.mark.full
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_head_in_chunks_is_gathered_as_often_as_one_in_one_piece(home, ledger, tmp_path, adapter, tied):
    settings = settings_of(home, ledger, tmp_path, {"adapter": adapter, "reference": "sharded"}, tied=tied)
    whole, chunks = (run(tmp_path, 2, {**settings, "head_chunk": rows}) for rows in (1000, 2))
    one, other = (rank["chunks"] for rank in chunks)
    assert one != other, "ranks have as many chunks by chance"
    assert min(one, other) > 2 * max(rank["chunks"] for rank in whole)
    assert [rank["collectives"] for rank in chunks] == [rank["collectives"] for rank in whole]
    for ours, expected in zip(chunks, whole, strict=True):
        assert [s[:2] for s in ours["steps"]] == [pytest.approx(s[:2], rel=2e-5) for s in expected["steps"]]


@pytest.mark.full
@pytest.mark.parametrize(
    "spoil", ["lacks the tensor `model.layers.1.", "holds `stranger`, which the model does not know"]
)
def test_a_folder_that_is_not_the_models_is_refused_on_every_rank(home, ledger, tmp_path, spoil):
    """Only the first rank reads it; the others would wait for it."""
    settings = settings_of(home, ledger, tmp_path, {"adapter": "full"})
    folder = write_tiny_model(tmp_path / "spoilt")
    shutil.copytree(folder, folder / "without-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(folder / "model.safetensors")
    if spoil.startswith("lacks"):
        weights = {name: value for name, value in weights.items() if "layers.1." not in name}
    else:
        weights["stranger"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = [rank["told"] for rank in run(tmp_path, 2, {**settings, "refused": str(folder)})]
    assert all(spoil in text for text in told), told


@pytest.mark.full
def test_decay_recomputation_a_head_in_chunks_and_a_row_that_is_not_finite_change_nothing_either(
    home, ledger, tmp_path
):
    """The third step has a row that is not finite: no update on any rank, and the moments are those of before."""
    section = {"adapter": "full", "weight_decay": 0.3, "activation_checkpointing": True}
    folder = tmp_path / "export"
    for place in ("ranks", "one"):
        (folder / place).mkdir(parents=True)
    alone, _ = compare(home, ledger, tmp_path, 2, section, head_chunk=5, broken=[13], export=str(folder))
    assert [step[4] for step in alone["steps"]] == [[], [], ["p13"], []]
    files = sorted(path.name for path in (folder / "ranks").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max((folder / "ranks" / name).stat().st_size for name in files) < 60_000
    one, several = (AutoModelForCausalLM.from_pretrained(folder / place).state_dict() for place in ("one", "ranks"))
    assert one.keys() == several.keys()
    for name, weight in one.items():
        assert torch.allclose(several[name], weight, atol=1e-5), name
