"""The real service: Ray, Serve, gateway and replica as `serving.deploy` starts them, used over HTTP only.

The tests run in order on one service; each leaves it serving.
"""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import sqlalchemy as sa
import torch
import yaml

from app.config import Recipe, load_recipe
from app.errors import DataError, ServiceError
from app.ledger import EvaluationRow, FeedbackRow, Ledger, ModelRow, ResponseRow, now
from app.models import Lineage, ensure_sft, load_model, save_model
from app.services import ServeApi, Services
from app.storage import Home
from ray_jobs.ship import ShipResult, roll_back, ship
from serving.deploy import main
from tests.conftest import signed

ROOT = Path(__file__).parents[2]
PROMPT = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Stage:
    """A running service and what the tests need of it."""

    home: Home
    ledger: Ledger
    recipe: Recipe
    recipe_path: Path
    url: str
    process: subprocess.Popen
    token: Path
    models: dict[str, str]

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.home.api_key(), max_retries=0, **options)

    def get(self, path: str) -> dict:
        headers = {"authorization": f"Bearer {self.home.api_key()}"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30).json()

    def champion(self) -> tuple[str, int]:
        row = self.ledger.champion("default")
        return row.model_id, row.revision

    def served(self) -> list[tuple[str, int]]:
        return [(r["model_id"], r["revision"]) for r in self.get("/v1/admin/status")["replicas"]]

    def responses(self) -> dict[str, ResponseRow]:
        with self.ledger.read() as session:
            return {row.response_id: row for row in session.scalars(sa.select(ResponseRow))}

    def ship(self, model_id: str | None = None, **options) -> ShipResult:
        return ship(self.home, self.ledger, self.recipe, model_id, "tester", **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variant(home, ledger, sft, name, change):
    loaded = load_model(home, sft, dtype="float32")
    with torch.no_grad():
        change(loaded.model.lm_head.weight)
    return save_model(home, ledger, loaded.model, loaded.tokenizer, name=name, lineage=Lineage("merged", sft)).model_id


def judge(home, ledger, model_id, verdict, *, digest=None):
    champion = ledger.champion("default")
    with ledger.write() as session:
        row = EvaluationRow(
            evaluation_id=f"eval-{model_id}-{time.monotonic_ns()}",
            deployment="default",
            model_id=model_id,
            model_digest=digest or session.get_one(ModelRow, model_id).digest,
            champion_id=champion.model_id if champion else "none",
            sft_id="sft",
            verdict=verdict,
            report={},
            run_id=None,
            created_at=now(),
        )
        session.add(signed(home, row))


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("service")
    home, token, port = Home.at(folder / "home"), folder / "token", free_port()
    ledger = Ledger.open(f"sqlite:///{home.local('ledger.db')}")
    sft = ensure_sft(home, ledger, str(tiny_model)).model_id
    torch.manual_seed(1)
    models = {
        "sft": sft,
        "good": variant(home, ledger, sft, "good", lambda w: w.add_(torch.randn_like(w) * 0.01)),
        "next": variant(home, ledger, sft, "next", lambda w: w.add_(torch.randn_like(w) * 0.01)),
        "nan": variant(home, ledger, sft, "nan", lambda w: w.fill_(torch.nan)),
        "torn": variant(home, ledger, sft, "torn", lambda w: w.mul_(1.01)),
    }
    recipe_path = folder / "recipe.yaml"
    serving = {
        "port": port,
        "dtype": "float32",
        "threads_per_replica": 1,
        "cpus_per_replica": 0.5,
        "max_batch_size": 4,
        "max_queued_requests": 8,
        "max_tokens": 2000,
    }
    recipe_path.write_text(yaml.safe_dump({"name": "tiny", "model": {"sft": str(tiny_model)}, "serving": serving}))
    environment = {**os.environ, "PREFLOOP_HOME": home.uri, "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    patch = pytest.MonkeyPatch()
    patch.setenv("PREFLOOP_HOME", home.uri)
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.deploy", str(recipe_path)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    made = Stage(home, ledger, load_recipe(recipe_path), recipe_path, url, process, token, models)
    try:
        deadline = time.monotonic() + 240
        while (services := Services.read(home)) is None or services.pid is None:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the service did not start: {process.communicate()}")
            time.sleep(0.5)
        yield made
    finally:
        services = Services.read(home)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
        if services is not None and psutil.pid_exists(services.ray_pid):
            psutil.Process(services.ray_pid).terminate()
        patch.undo()
        ledger.close()


def test_ray_is_started_with_a_private_token_and_refuses_without_it(stage):
    services = Services.read(stage.home)
    assert stat.S_IMODE(stage.token.stat().st_mode) == 0o600
    assert httpx.get(f"{services.ray_dashboard_url}/api/serve/applications/").status_code == 401
    assert httpx.get(f"{services.ray_dashboard_url}/api/jobs/").status_code == 401
    assert stage.home.api_key() not in json.dumps(ServeApi(services.ray_dashboard_url).details())


def test_gateway_and_dashboard_listen_on_the_loopback_address_only(stage):
    services = Services.read(stage.home)
    ports = {int(services.gateway_url.rsplit(":", 1)[1]), int(services.ray_dashboard_url.rsplit(":", 1)[1])}
    listening = {c.laddr for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port in ports}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == ports


def test_the_first_champion_is_the_sft_checkpoint(stage):
    assert stage.champion() == (stage.models["sft"], 1)
    assert stage.served() == [stage.champion()]
    assert httpx.get(f"{stage.url}/healthz").json() == {"status": "ok", "model_id": stage.models["sft"], "revision": 1}
    [model] = stage.get("/v1/models")["data"]
    assert (model["id"], model["champion"]) == (stage.models["sft"], True)


def test_the_openai_client_works_whole_and_streamed(stage):
    client = stage.client()
    asked = {"model": "champion", "messages": PROMPT, "seed": 5, "max_tokens": 20}
    whole = client.chat.completions.create(**asked, logprobs=True)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert {c.model for c in chunks} == {whole.model} == {stage.models["sft"]}
    stored = stage.responses()
    assert stored[whole.id].text == stored[chunks[0].id].text == streamed
    assert stored[whole.id].logp == pytest.approx(sum(t.logprob for t in whole.choices[0].logprobs.content), abs=1e-4)
    assert [m.id for m in client.models.list()] == [stage.models["sft"]]


def test_errors_reach_the_openai_client_as_what_they_are(stage):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{stage.url}/v1", api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="`n`"):
        stage.client().chat.completions.create(model="champion", messages=PROMPT, n=2)
    with pytest.raises(openai.NotFoundError, match="is not served"):
        stage.client().chat.completions.create(model="gpt-5", messages=PROMPT)
    with pytest.raises(openai.BadRequestError, match="context holds"):
        long = [{"role": "user", "content": "x" * 4000}]
        stage.client().chat.completions.create(model="champion", messages=long)


def test_a_body_beyond_the_limit_is_refused_through_the_proxy(stage):
    headers = {"authorization": f"Bearer {stage.home.api_key()}", "content-type": "application/json"}
    reply = httpx.post(f"{stage.url}/v1/feedback", content=b"x" * (2 << 20), headers=headers)
    assert reply.status_code == 413


def test_the_request_id_is_echoed_once(stage):
    reply = httpx.get(f"{stage.url}/healthz", headers={"x-request-id": "mine-1"})
    assert reply.headers.get_list("x-request-id") == ["mine-1"]


def test_feedback_sent_by_many_at_once_is_stored_once_each(stage):
    response_id = stage.client().chat.completions.create(model="champion", messages=PROMPT, max_tokens=4).id
    headers = {"authorization": f"Bearer {stage.home.api_key()}"}

    def send(i):
        event = {
            "response_id": response_id,
            "kind": "thumb",
            "value": "up",
            "user": f"u{i % 10}",
            "event_id": f"f{i % 10}",
        }
        return httpx.post(f"{stage.url}/v1/feedback", json=event, headers=headers, timeout=30).status_code

    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(send, range(40))) == {201}
    with stage.ledger.read() as session:
        rows = session.scalars(sa.select(FeedbackRow).where(FeedbackRow.response_id == response_id)).all()
    assert sorted(row.event_id for row in rows) == [f"f{i}" for i in range(10)]


def test_a_client_that_leaves_frees_its_row_and_leaves_no_record(stage):
    before = len(stage.responses())
    long = {"model": "champion", "messages": PROMPT, "temperature": 0, "max_tokens": 2000}
    stream = stage.client().chat.completions.create(**long, stream=True)
    next(iter(stream))
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        stage.client(timeout=0.5).chat.completions.create(**long)
    started = time.monotonic()
    stage.client().chat.completions.create(model="champion", messages=PROMPT, max_tokens=2)
    assert time.monotonic() - started < 3
    time.sleep(0.5)
    assert len(stage.responses()) == before + 1


def test_a_full_queue_answers_429_and_nothing_fails(stage):
    client = stage.client(timeout=60)
    long = {"model": "champion", "messages": PROMPT, "temperature": 0, "max_tokens": 2000}
    # All places are taken, so what comes next can neither be answered nor join.
    places = [client.chat.completions.create(**long, stream=True) for _ in range(4)]
    for stream in places:
        next(stream)

    def send(_):
        try:
            client.chat.completions.create(model="champion", messages=PROMPT, max_tokens=2)
        except openai.RateLimitError as error:
            return error.response.headers["retry-after"]
        return "answered"

    with ThreadPoolExecutor(40) as pool:
        outcomes = list(pool.map(send, range(40)))
    for stream in places:
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    assert set(outcomes) == {"answered", "5"}
    assert outcomes.count("answered") >= 7


@pytest.mark.parametrize("verdict", [None, "HOLD"])
def test_without_a_verdict_nothing_is_shipped(stage, verdict):
    if verdict:
        judge(stage.home, stage.ledger, stage.models["good"], verdict)
    result = stage.ship(stage.models["good"])
    assert not result.shipped
    assert (verdict or "no evaluation") in result.reason
    assert stage.champion() == (stage.models["sft"], 1)


def test_a_verdict_on_other_weights_ships_nothing(stage):
    judge(stage.home, stage.ledger, stage.models["good"], "SHIP", digest="0" * 32)
    result = stage.ship(stage.models["good"])
    assert not result.shipped
    assert "other weights" in result.reason


def test_the_champion_changes_under_load_without_a_failed_or_cut_answer(stage):
    judge(stage.home, stage.ledger, stage.models["good"], "SHIP")
    client, done = stage.client(timeout=60), threading.Event()
    opened, answered, failures = threading.Barrier(3), [], []

    def stream():
        try:
            chunks = client.chat.completions.create(
                model="champion", messages=PROMPT, temperature=0, max_tokens=1500, stream=True
            )
            first = next(chunks)
            opened.wait(30)
            *_, last = chunks
            return first.model, last.model, last.choices[0].finish_reason, now()
        except (openai.OpenAIError, StopIteration) as error:
            failures.append(repr(error))
            raise

    def ask():
        while not done.is_set():
            try:
                reply = client.chat.completions.create(model="champion", messages=PROMPT, max_tokens=3)
                answered.append((reply.id, reply.model))
            except openai.OpenAIError as error:
                failures.append(repr(error))

    with ThreadPoolExecutor(5) as pool:
        askers = [pool.submit(ask) for _ in range(3)]
        deadline = time.monotonic() + 30
        while len(answered) < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        streams = [pool.submit(stream) for _ in range(2)]
        opened.wait(30)
        result = stage.ship()
        ends = [future.result(60) for future in streams]
        deadline = time.monotonic() + 30
        while sum(model == stage.models["good"] for _, model in answered) < 30 and time.monotonic() < deadline:
            time.sleep(0.05)
        done.set()
        for future in askers:
            future.result(60)
    assert failures == []
    assert result == ShipResult(
        shipped=True,
        model_id=stage.models["good"],
        champion_before=stage.models["sft"],
        revision=2,
        served=True,
        reason=result.reason,
    )
    assert stage.champion() == (stage.models["good"], 2)
    assert stage.served() == [stage.champion()]
    moved_at = stage.ledger.champion(stage.recipe.serving.deployment).updated_at
    for first, last, finish, ended in ends:
        assert (first, last, finish) == (stage.models["sft"], stage.models["sft"], "length")
        assert ended > moved_at
    models = [model for _, model in answered]
    assert set(models) == {stage.models["sft"], stage.models["good"]}
    stored = stage.responses()
    assert all(stored[response_id].model_id == model for response_id, model in answered)


def test_shipping_the_champion_again_changes_nothing(stage):
    result = stage.ship(stage.models["good"])
    assert (result.shipped, result.served, result.revision) == (True, True, 2)
    assert stage.champion() == (stage.models["good"], 2)


def test_a_damaged_artifact_is_refused_before_anything_moves(stage):
    judge(stage.home, stage.ledger, stage.models["torn"], "SHIP")
    weights = stage.home.local("models", stage.models["torn"], "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="differs from its manifest"):
        stage.ship(stage.models["torn"])
    assert stage.champion() == (stage.models["good"], 2)
    assert stage.served() == [stage.champion()]


def test_a_model_that_the_replicas_cannot_serve_is_undone(stage):
    judge(stage.home, stage.ledger, stage.models["nan"], "SHIP")
    with pytest.raises(ServiceError, match="no numbers"):
        stage.ship(stage.models["nan"])
    assert stage.champion() == (stage.models["good"], 4)
    assert stage.ledger.champion("default").previous_model_id == stage.models["sft"]
    deadline = time.monotonic() + 30
    while stage.served() != [stage.champion()] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert stage.served() == [stage.champion()]
    reply = stage.client().chat.completions.create(model="champion", messages=PROMPT, max_tokens=2)
    assert reply.model == stage.models["good"]
    assert stage.ledger.verify_audit() > 0


def test_rollback_is_the_same_act_without_a_verdict(stage):
    result = roll_back(stage.home, stage.ledger, stage.recipe, "tester")
    assert (result.shipped, result.served, result.model_id) == (True, True, stage.models["sft"])
    reply = stage.client().chat.completions.create(model="champion", messages=PROMPT, max_tokens=2)
    assert reply.model == stage.models["sft"]
    assert stage.ledger.champion("default").previous_model_id == stage.models["good"]


def test_no_replica_was_restarted_by_any_of_this(stage):
    deployments = ServeApi(Services.read(stage.home).ray_dashboard_url).details()["applications"]["prefloop"][
        "deployments"
    ]
    assert [r["state"] for r in deployments["Replica"]["replicas"]] == ["RUNNING"]
    assert deployments["Replica"]["recent_dead_replicas"] == []


def test_the_ship_job_prints_one_line_and_leaves_with_the_verdict(stage):
    judge(stage.home, stage.ledger, stage.models["next"], "SHIP")
    command = [sys.executable, "-m", "ray_jobs.ship", str(stage.recipe_path), "--model"]
    shipped = subprocess.run([*command, stage.models["next"]], cwd=ROOT, capture_output=True, text=True, check=False)
    held = subprocess.run([*command, "nobody-1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shipped.returncode == 0, shipped.stderr
    assert shipped.stdout.startswith(f"SHIP: `default` {stage.models['sft']} -> {stage.models['next']}")
    assert held.returncode == 3
    assert held.stdout.startswith("HOLD: ")


def test_the_same_home_is_not_served_twice(stage, capsys):
    assert main([str(stage.recipe_path)]) == 1
    assert f"running already at {stage.url}" in capsys.readouterr().err


def test_another_home_cannot_take_over_the_cluster(stage, tmp_path, monkeypatch, capsys):
    services = Services.read(stage.home)
    monkeypatch.setenv("PREFLOOP_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("RAY_ADDRESS", services.ray_dashboard_url)
    port = services.gateway_url.rsplit(":", 1)[1]
    assert main([str(stage.recipe_path), "--set", f"serving.port={free_port()}"]) == 1
    assert f"already with port {port}" in capsys.readouterr().err
    # A process of its own, because Ray reads the way of authentication when it is imported.
    environment = {**os.environ, "RAY_ADDRESS": services.ray_address}
    environment.pop("RAY_AUTH_MODE", None)
    command = [sys.executable, "-m", "serving.deploy", str(stage.recipe_path)]
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "serves `/` already" in refused.stderr
    assert Services.read(stage.home).healthy()


def test_a_port_in_use_is_named_before_anything_is_started(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFLOOP_HOME", str(tmp_path / "other"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([str(stage.recipe_path), "--set", f"serving.port={port}"]) == 1
    said = capsys.readouterr().err
    assert f"port {port}" in said
    assert "--set serving.port=" in said
    assert not (tmp_path / "other" / "models").exists()


def test_ctrl_c_stops_what_was_started_and_keeps_what_was_acknowledged(stage):
    services = Services.read(stage.home)
    ray = psutil.Process(services.ray_pid)
    family = [ray, *ray.children(recursive=True)]
    acknowledged = stage.client().chat.completions.create(model="champion", messages=PROMPT, max_tokens=2).id
    stage.process.send_signal(signal.SIGINT)
    out, err = stage.process.communicate(timeout=90)
    assert stage.process.returncode == 130
    assert err.strip().splitlines()[-1] == "serve: stopped; what was acknowledged is kept"
    assert "Traceback" not in err
    assert stage.home.api_key() not in out + err
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert Services.read(stage.home) is None
    assert acknowledged in stage.responses()


def test_without_a_service_only_the_pointer_moves(stage):
    result = roll_back(stage.home, stage.ledger, stage.recipe, "tester")
    assert (result.shipped, result.served, result.model_id) == (True, False, stage.models["sft"])
