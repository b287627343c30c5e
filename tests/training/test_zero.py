"""ZeRO-3 on two and four ranks: the numbers of one process, and no rank holds more of the reference than it may."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.models import Lineage, register_folder
from tests.conftest import free_ports, write_tiny_model

SCRIPT = Path(__file__).with_name("zero_ranks.py")
ROOT = Path(__file__).parents[2]


def run(folder: Path, world: int, settings: dict) -> list[dict]:
    """What every rank tells; a world of 0 is one process without DeepSpeed."""
    (port,) = free_ports(1)
    place = folder / f"settings-{world}.json"
    place.write_text(json.dumps({**settings, "port": port}))
    outs = [folder / f"out-{world}-{rank}.json" for rank in range(max(1, world))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Into files: a rank whose pipe is full would wait, and the others for it.
    logs = [out.with_suffix(".log") for out in outs]
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(world), place, out],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    try:
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * len(ranks), "\n".join(log.read_text()[-3000:] for log in logs)
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
def test_ranks_take_the_steps_of_one_process(home, ledger, tmp_path, world, section):
    compare(home, ledger, tmp_path, world, section)


def compare(home, ledger, tmp_path, world, section, **more):
    names = {
        name: register_folder(
            home, ledger, write_tiny_model(tmp_path / name, seed=seed), name=name, lineage=Lineage("sft")
        ).model_id
        for name, seed in (("start", 0), ("other", 1))
    }
    settings = {
        "home": home.uri,
        "model": names["start"],
        "reference": names["other"],
        "section": {"dtype": "float32", "micro_batch_tokens": 40, "sharding": "zero3", **section},
        **more,
    }
    (alone,) = run(tmp_path, 0, settings)
    ranks = run(tmp_path, world, settings)
    for rank in ranks:
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
    return alone, ranks


@pytest.mark.full
def test_decay_recomputation_several_calls_of_the_head_and_a_row_that_is_not_finite_change_nothing_either(
    home, ledger, tmp_path
):
    """The third step has a row that is not finite: no update on any rank, and the moments are those of before."""
    section = {"adapter": "full", "weight_decay": 0.3, "activation_checkpointing": True}
    folder = tmp_path / "export"
    for place in ("ranks", "one"):
        (folder / place).mkdir(parents=True)
    alone, _ = compare(home, ledger, tmp_path, 2, section, head_calls=3, broken=[13], export=str(folder))
    assert [step[4] for step in alone["steps"]] == [[], [], ["p13"], []]
    files = sorted(path.name for path in (folder / "ranks").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max((folder / "ranks" / name).stat().st_size for name in files) < 60_000
    one, several = (AutoModelForCausalLM.from_pretrained(folder / place).state_dict() for place in ("one", "ranks"))
    assert one.keys() == several.keys()
    for name, weight in one.items():
        assert torch.allclose(several[name], weight, atol=1e-5), name
