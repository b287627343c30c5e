"""A person's round in a real browser on the live service: ask, judge, build pairs, ship, roll back.

The models are real Llama checkpoints of a few thousand weights, made so that each says one sentence of its own: the
answer on the screen shows which weights spoke.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import torch
from playwright.sync_api import Page, expect, sync_playwright
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.ledger import FeedbackRow, Ledger, ModelRow, ResponseRow
from app.models import Lineage, register_folder
from app.storage import Home
from tests.conftest import free_ports, signed
from tests.dashboard import stage

ROOT = Path(__file__).parents[2]
OLD_WORDS = "the first model says that tea is best when it boils for long"
NEW_WORDS = "my successor answers now and every cup of coffee tastes fresh"
EDIT = " and never any longer than four minutes"
PAYLOAD = "<img src='http://evil.example/x.png' onerror=alert(1)>"
START_S, JOB_S, STEP_S = 180, 120, 20
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-sync",
    "--no-first-run",
]


@dataclass(frozen=True)
class Live:
    home: Home
    ledger: Ledger
    dashboard_url: str
    old_id: str
    new_id: str


def write_checkpoint(folder: Path, sentence: str) -> Path:
    """Save a Llama whose every layer is silent and whose head maps each word to the next one of the sentence."""
    specials = ["<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {w: i for i, w in enumerate([*specials, *dict.fromkeys(f"{OLD_WORDS} {NEW_WORDS}".split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=specials[2:],
        chat_template=(
            "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
    )
    size = 2 * -(-len(vocabulary) // 2)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=size,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            eos_token_id=vocabulary["<end>"],
            bos_token_id=None,
            pad_token_id=vocabulary["<end>"],
        )
    )
    spoken = ["<assistant>", *sentence.split(), "<end>"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(vocabulary), size))
        model.lm_head.weight.zero_()
        for before, after in itertools.pairwise(spoken):
            model.lm_head.weight[vocabulary[after], vocabulary[before]] = 10.0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("live")
    home = Home.at(root / "home")
    checkpoint = write_checkpoint(root / "old", OLD_WORDS)
    ports = free_ports(2)
    recipe = root / "live.yaml"
    recipe.write_text(
        f"name: live\nmodel: {{sft: {checkpoint}}}\npairs: {{min_pairs: 1}}\n"
        f"serving: {{port: {ports[0]}, max_tokens: 32, dtype: float32, cpus_per_replica: 0.5, threads_per_replica: 1}}\n"
    )
    environment = {**os.environ, "PREFLOOP_HOME": home.uri}
    environment.pop("PREFLOOP_LEDGER", None)
    with (
        running([sys.executable, "-m", "serving.deploy", str(recipe)], environment, root / "service.log") as service,
        running(
            [sys.executable, "-m", "dashboard.launch", str(recipe), "--port", str(ports[1])],
            environment,
            root / "dashboard.log",
        ) as dashboard,
    ):
        wait_for(dashboard, f"http://127.0.0.1:{ports[1]}/_stcore/health", root / "dashboard.log")
        wait_for(service, f"http://127.0.0.1:{ports[0]}/healthz", root / "service.log")
        ledger = Ledger.open(home.ledger_url)
        with ledger.read() as session:
            old = session.scalars(sa.select(ModelRow)).one()
        lineage = Lineage(kind="merged", parent_id=old.model_id)
        new = register_folder(home, ledger, write_checkpoint(root / "new", NEW_WORDS), name="live", lineage=lineage)
        with ledger.write() as session:
            session.add(signed(home, stage.evaluation(new, "SHIP", champion_id=old.model_id, sft_id=old.model_id)))
        yield Live(home, ledger, f"http://127.0.0.1:{ports[1]}", old.model_id, new.model_id)
        ledger.close()


@pytest.fixture
def page(live: Live, tmp_path: Path) -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("no `chromium` on this machine: run `make browser` as root, or install Debian's package chromium")
    expect.set_options(timeout=STEP_S * 1000)
    outside: list[str] = []
    dialogs: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1360, "height": 1000})
        page.set_default_timeout(STEP_S * 1000)
        page.on("request", lambda r: outside.append(r.url) if not is_local(r.url) else None)
        page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
        try:
            yield page
        finally:
            page.screenshot(path=str(tmp_path / "last.png"))
            browser.close()
    assert outside == [], "the dashboard asks nobody but this machine"
    assert dialogs == [], "text of a user was run"


def test_a_person_judges_ships_and_rolls_back(live: Live, page: Page) -> None:
    page.goto(f"{live.dashboard_url}/chat")
    ask(page, f"How do I make tea? {PAYLOAD}", turn=1)
    expect(page.get_by_text(OLD_WORDS, exact=True)).to_be_visible()
    expect(page.get_by_text(PAYLOAD)).to_be_visible()
    assert spoken_by(page) == live.old_id

    page.get_by_test_id("stFeedback").locator("button").nth(1).click()
    expect(page.get_by_role("button", name="Send reasons")).to_be_visible()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Better answer").fill(OLD_WORDS + EDIT)
    page.get_by_label("Better answer").press("Control+Enter")
    expect(page.get_by_test_id("stCode")).to_contain_text(f"+{EDIT}")
    page.get_by_role("button", name="Save as better answer").click()
    expect(page.get_by_text("edited by you and saved as better answer")).to_be_visible()
    assert judgements(live) == {("thumb", "down"), ("edit", OLD_WORDS + EDIT)}

    open_page(page, "Pairs")
    page.get_by_role("button", name="Build pairs").click()
    expect(page.get_by_text("Pairs are built")).to_be_visible(timeout=JOB_S * 1000)
    # By its key: the pair that a click opens brings a table of its own below this one.
    rows = page.locator("[class*='st-key-rows-']").get_by_test_id("stDataFrame")
    rows.scroll_into_view_if_needed()
    expect(rows.locator("td", has_text=OLD_WORDS + EDIT)).to_be_attached()
    rows.click(position={"x": 15, "y": 55})
    expect(page.get_by_test_id("stText").get_by_text(OLD_WORDS + EDIT, exact=True)).to_be_visible()
    expect(page.get_by_text("The edit, by words")).to_be_visible()

    open_page(page, "Models")
    page.get_by_role("button", name="Ship", exact=True).click()
    page.get_by_role("button", name="Ship it").click()
    expect(page.get_by_text("Shipped:")).to_be_visible(timeout=JOB_S * 1000)
    open_page(page, "Chat")
    ask(page, "And now?", turn=2)
    expect(page.get_by_text(NEW_WORDS, exact=True)).to_be_visible()
    assert spoken_by(page) == live.new_id

    open_page(page, "Models")
    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("button", name="Roll it back").click()
    expect(page.get_by_text("Rolled back:")).to_be_visible(timeout=JOB_S * 1000)
    open_page(page, "Chat")
    ask(page, "Who speaks?", turn=3)
    expect(page.get_by_test_id("stChatMessage").last).to_contain_text(OLD_WORDS)
    assert spoken_by(page) == live.old_id

    with live.ledger.read() as session:
        models_that_spoke = session.scalars(sa.select(ResponseRow.model_id).order_by(ResponseRow.created_at)).all()
    assert models_that_spoke == [live.old_id, live.new_id, live.old_id]
    champion = live.ledger.champion("default")
    assert champion is not None
    assert (champion.model_id, champion.revision) == (live.old_id, 3)


def ask(page: Page, message: str, *, turn: int) -> None:
    # The answers before must stand there first: a page that still draws would take the message and lose it.
    expect(page.get_by_test_id("stFeedback")).to_have_count(turn - 1)
    field = page.get_by_test_id("stChatInputTextArea")
    field.fill(message)
    field.press("Enter")
    expect(page.get_by_test_id("stFeedback")).to_have_count(turn)


def spoken_by(page: Page) -> str:
    last = page.get_by_test_id("stChatMessage").last
    return last.locator("[class*='st-key-meta-'] [data-testid='stText']").first.inner_text().split(",")[0]


def open_page(page: Page, title: str) -> None:
    page.get_by_test_id("stSidebarNav").get_by_role("link", name=title).click()
    expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()


def judgements(live: Live) -> set[tuple[str, str]]:
    with live.ledger.read() as session:
        return {(kind, value) for kind, value in session.execute(sa.select(FeedbackRow.kind, FeedbackRow.value))}


def is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


class running:  # noqa: N801
    """A child process in a session of its own, interrupted and waited for at the end."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, environment, log

    def __enter__(self) -> "subprocess.Popen[bytes]":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        return self._process

    def __exit__(self, *_: Any) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


def wait_for(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"{process.args} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            reply = httpx.get(url, timeout=2)
            if reply.is_success and (not url.endswith("/healthz") or json.loads(reply.text).get("model_id")):
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.2)
    pytest.fail(f"{url} did not come up in {START_S} s:\n{log.read_text()[-3000:]}")
