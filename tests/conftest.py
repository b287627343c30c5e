"""Fixtures shared by the rooms: a home of its own, and a tiny random model with tokenizer and chat template."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

# A thread that Ray Data leaves behind may call Ray after a module has shut it down, and would start it again.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.evaluation.signature import sign_report
from app.ledger import EvaluationRow, Ledger
from app.storage import Home
from tests.reliability import Claim, merged, read_claims, table

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(folder: Path, *, seed: int = 0, tied: bool = True) -> Path:
    """A two-layer random Llama in fp32 with a byte tokenizer: 258 tokens, 0 = <|im_start|>, 1 = <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nothing listens now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def signed(home: Home, row: EvaluationRow) -> EvaluationRow:
    """The row with a report that repeats and signs it, as `evaluate` stores it."""
    columns = ("evaluation_id", "deployment", "model_id", "model_digest", "champion_id", "sft_id", "verdict")
    row.report = sign_report({**row.report, **{name: getattr(row, name) for name in columns}}, home.signing_key())
    return row


# How long an example takes says how busy the machine is.
settings.register_profile("prefloop", deadline=None)
settings.load_profile("prefloop")
# Tiny models gain nothing from threads, and threads of several processes get in each other's way.
torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    monkeypatch.setenv("PREFLOOP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFLOOP_LEDGER", raising=False)
    return Home.from_environment()


@pytest.fixture
def ledger(home):
    opened = Ledger.open(home.ledger_url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def published() -> Path:
    """Files that others published, which may not be copied into this repository; tests on made data stand beside."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no published files beside the checkout")
    return folder


_CLAIMS = pytest.StashKey[list[Claim]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability",
        metavar="FILE",
        help="run the long tests and those that show a claim, and write the claims into this document",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--reliability"):
        chosen = {item: "claim" in item.fixturenames or item.get_closest_marker("full") for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not chosen[item]])
        items[:] = [item for item in items if chosen[item]]


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Say what a test of a claim found: the claim, the figure, and the seed of what is random."""

    def found(text: str, *, figure: str, seed: object = "") -> None:
        test = request.node.nodeid.partition("[")[0]
        request.config.stash.setdefault(_CLAIMS, []).append(Claim(text, test, figure, str(seed)))

    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    claims = config.stash.get(_CLAIMS, [])
    if not claims:
        return
    terminalreporter.section("claims that were shown")
    terminalreporter.write_line(table(claims))
    if place := config.getoption("--reliability"):
        document = Path(place)
        text = document.read_text(encoding="utf-8")
        chosen = (
            config.args_source is not pytest.Config.ArgsSource.TESTPATHS
            or config.option.keyword
            or config.option.markexpr
        )
        document.write_text(merged(text, read_claims(text) if chosen else [], claims), encoding="utf-8")
