"""SFT checkpoints: what is brought in can be loaded; what cannot is refused with one clear message."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from app.errors import ModelError
from app.generation import GenerationRequest, generate
from app.ledger import ModelRow
from app.models import Lineage, check_descent, device_of, ensure_sft, is_out_of_memory, load_model, register_folder
from app.storage import Home
from app.training.scoring import own_attention


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "checkpoint")


def break_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def keep_half_of_the_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, folder / "model.safetensors", {"format": "pt"})


def pickle_the_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def change_json(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def take_the_template_away(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_json("tokenizer_config.json", chat_template=None)(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_weights, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (keep_half_of_the_weights, "lack 9 tensors"),
        (pickle_the_weights, r"only pickled weights \(pytorch_model.bin\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json of .* is no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a mapping"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json of .* is no JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
        (change_json("config.json", model_type="nonsense"), "cannot be loaded"),
        (change_json("config.json", auto_map={"AutoModel": "evil.Model"}), "`auto_map`"),
        (take_the_template_away, "no chat template"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"), "template cannot render"),
    ],
)
def test_a_checkpoint_that_cannot_serve_is_refused_and_can_be_brought_in_once_it_is_mended(
    home, ledger, folder, tiny_model, spoil, words
):
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        ensure_sft(home, ledger, str(folder))
    with ledger.read() as session:
        assert session.query(ModelRow).count() == 0
    shutil.rmtree(folder)
    shutil.copytree(tiny_model, folder)
    row = ensure_sft(home, ledger, str(folder))
    assert load_model(home, row.model_id, dtype="float32").digest == row.digest


def test_what_a_download_from_the_hub_brings_along_stays_outside(home, ledger, folder):
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("{}")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    torch.save({}, folder / "pytorch_model.bin")
    row = ensure_sft(home, ledger, str(folder))
    assert set(row.manifest["files"]) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_checkpoint_in_an_object_store_is_the_model_that_its_folder_would_be(home, ledger, folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("{}")
    torch.save({}, folder / "pytorch_model.bin")
    store, place = fsspec.filesystem("memory"), f"/sft-{folder.parent.name}"
    store.put(f"{folder}/", place, recursive=True)
    from_store = ensure_sft(home, ledger, f"memory:/{place}")
    assert from_store.digest == ensure_sft(home, ledger, str(folder)).digest
    assert load_model(home, from_store.model_id, dtype="float32").digest == from_store.digest


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("memory://nothing-here", "nothing is at `memory://nothing-here`"),
        ("s3://ana:secret@bucket/sft", "names an account in `s3://…/sft`"),
        ("nosuch://a/b", "`nosuch://a/b` cannot be brought to .*: Protocol not known: nosuch"),
    ],
)
def test_a_uri_without_a_checkpoint_is_refused(home, ledger, uri, words):
    with pytest.raises(ModelError, match=words):
        ensure_sft(home, ledger, uri)


@pytest.mark.parametrize(
    "change", [lambda f: (f / "added.json").write_text("{}"), lambda f: (f / "generation_config.json").unlink()]
)
def test_a_folder_that_gained_or_lost_a_file_is_brought_in_again(home, ledger, folder, change):
    before = ensure_sft(home, ledger, str(folder))
    assert ensure_sft(home, ledger, str(folder)).model_id == before.model_id
    change(folder)
    after = ensure_sft(home, ledger, str(folder))
    assert after.model_id != before.model_id
    assert after.manifest["files"].keys() != before.manifest["files"].keys()


def test_a_process_without_a_gpu_of_its_own_leaves_those_it_sees_alone(monkeypatch):
    assert device_of([]).type == "cpu"
    with pytest.raises(ModelError, match=r"given 1 GPU.*finds none\n\n.*CUDA build"):
        device_of(["0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert (device_of([]), device_of(["3"])) == (torch.device("cpu"), torch.device("cuda", 1))


def test_a_champion_of_another_checkpoint_is_refused_and_a_newer_checkpoint_of_the_same_place_is_not(
    home, ledger, folder, tiny_model, tmp_path
):
    other = ensure_sft(home, ledger, str(shutil.copytree(tiny_model, tmp_path / "other")))
    change_json("config.json", rope_theta=5000.0)(folder)
    sft = ensure_sft(home, ledger, str(folder))
    change_json("config.json", rms_norm_eps=1e-5)(folder)
    champion = register_folder(home, ledger, folder, name="run", lineage=Lineage(kind="merged", parent_id=sft.model_id))
    newer = ensure_sft(home, ledger, str(folder))
    assert newer.model_id != sft.model_id
    check_descent(ledger, champion.model_id, newer, deployment="default")
    with pytest.raises(
        ModelError, match=r"descends from the SFT checkpoint `.*checkpoint`, and model.sft is `.*other`"
    ):
        check_descent(ledger, champion.model_id, other, deployment="default")


def test_an_architecture_without_stock_sdpa_is_brought_in_and_answers(home, ledger, folder):
    """Gemma 2 caps its attention scores, which transformers' `sdpa` cannot."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = Gemma2Config(
        **sizes,
        vocab_size=vocabulary,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    row = ensure_sft(home, ledger, str(folder))
    loaded = load_model(home, row.model_id, dtype="float32")
    assert own_attention(loaded.model) == loaded.model.config._attn_implementation == "eager"
    request = GenerationRequest((3, 4, 5), temperature=0.0, top_p=1.0, max_tokens=3)
    (answer,) = generate(loaded, [request])
    assert len(answer.token_ids) >= 1


def test_a_model_of_an_object_store_is_loaded_like_one_of_a_folder(home, ledger, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    Path(tempfile.gettempdir()).mkdir()
    far = Home.at("memory://models")
    loaded = []
    for place, name in ((home, "near"), (far, "far")):
        folder = shutil.copytree(tiny_model, tmp_path / name)
        row = register_folder(place, ledger, folder, name="same", lineage=Lineage("sft"))
        loaded.append(load_model(place, row.model_id, dtype="float32"))
    ours, theirs = loaded
    assert ours.digest == theirs.digest
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(theirs.model.state_dict()[name], weight), name
    assert not list(tmp_path.glob("elsewhere/*/*/")), "a copy stayed"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 'out of memory'"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_kind_of_memory_that_is_short_is_known_as_such(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("the row is out of the memory of all who saw it"))


def heap_growth(**environment) -> float:
    """Megabytes that 200 shapes cost after the first 200."""
    command = [sys.executable, "-m", "tests.app.shapes_in_a_process", "200", "400"]
    clean = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=clean | environment, capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc how large the heap is")
def test_products_of_ever_new_shapes_do_not_grow_the_heap():
    usual = heap_growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024")
    if usual < 5:
        pytest.skip("this CPU compiles no kernels by shape, so there is nothing to bound")
    assert heap_growth() < usual / 10
