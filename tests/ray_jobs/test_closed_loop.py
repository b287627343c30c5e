"""The whole loop as a user runs it: a cluster, one command, a driver killed while it trains, and a second round on top.

    ray start --head   ->  prefloop jobs submit loop R.yaml --id round-1  ->  SIGKILL  ->  the same  ->  ... --id round-2

Nothing is replaced by a fake but the people, whom the simulated audience of the recipe stands for. The SFT model has
27 thousand weights and says one of three words with a full stop or, less often, an exclamation mark; the audience
wants the latter. So the first round has something to win and ships; the second round's reference is that champion, and
its numbers must be those which the champion reported when it served the very answers.
"""

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sqlalchemy as sa
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.ledger import Ledger, ModelRow, ResponseRow, RunRow, RunStepRow, SnapshotRow
from app.models import load_model, render_prompt
from app.schemas import Message, Split
from app.storage import Home
from app.training.scoring import ScoringModel, with_reference_logps
from app.training.snapshots import read_groups
from app.training.tokenization import Group
from tests.conftest import free_ports, write_tiny_model

ROOT = Path(__file__).parents[2]
WORDS = ("tea", "milk", "rain")
STEPS = 6
START_S, JOB_S, STOP_S = 120, 300, 60
FLOAT32_NOISE = 1e-3
"""Nats of a whole answer; packed and cached forward passes add in another order."""


@dataclass(frozen=True)
class Cluster:
    """A running head node, and the home and the recipe of this test."""

    home: Home
    ledger: Ledger
    recipe: Path
    address: str
    environment: dict[str, str]
    process: psutil.Process


@dataclass(frozen=True)
class Seen:
    """What the ledger holds of the newest round, and of everything beside it."""

    run_id: str
    status: str
    attempt: int
    metrics: dict[str, Any]
    trained: tuple[str, int]
    """Status and attempt of the round's training run."""
    steps: dict[int, dict[str, Any]]
    """What was measured at each step, its seconds among it."""
    responses: frozenset[str]
    snapshots: frozenset[str]
    champion: tuple[str, int]

    @property
    def stages(self) -> dict[str, Any]:
        return dict(self.metrics["stages"])


def prompts(count: int, seed: str) -> list[str]:
    """Questions of three nonsense words, no two of which are near-duplicates."""
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices("abdefgiklmnoprstu", k=5)) for _ in range(3)) + "?" for _ in range(count)]


def write_sft(folder: Path) -> Path:
    """Teach the tiny random model to answer with a word and a mark, and to end: 120 small steps."""
    write_tiny_model(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    for step in range(120):
        rows = []
        for prompt in prompts(8, f"sft-{step}"):
            asked = render_prompt(tokenizer, [Message("user", prompt)], None)
            answer = draw.choice(WORDS) + draw.choices(".!", (5, 4))[0]
            spoken = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            rows.append((asked, spoken))
        width = max(len(asked) + len(spoken) for asked, spoken in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for i, (asked, spoken) in enumerate(rows):
            ids[i, : len(asked) + len(spoken)] = torch.tensor([*asked, *spoken])
            labels[i, len(asked) : len(asked) + len(spoken)] = torch.tensor(spoken)
        # Padding is on the right and not a target, so no mask is needed.
        loss = model(ids, labels=labels, attention_mask=torch.ones_like(ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, sft: Path, *, port: int) -> Path:
    """A recipe with small numbers; the gate asks for a won comparison, and little of a model that knows three words."""
    for name, count in (("collect", 48), ("evaluate", 20)):
        lines = (json.dumps({"prompt": prompt}) for prompt in prompts(count, name))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    style = {
        "name": "lively",
        "rules": [{"name": "exclaims", "pattern": "!$", "weight": 1}],
        "edits": [{"pattern": r"\.$", "replace": "!"}],
    }
    (folder / "style.json").write_text(json.dumps(style))
    tree = {
        "name": "closed",
        "model": {"sft": str(sft)},
        "collect": {
            "style": str(folder / "style.json"),
            "prompts": str(folder / "collect.jsonl"),
            "max_tokens": 16,
            # Answers of five tokens are too short for a stream to be open across the switch.
            "switch_requests": 0,
        },
        "pairs": {"min_pairs": 20, "held_out_fraction": 0.3},
        "prepare": {"max_length": 128},
        "train": {
            "dtype": "float32",
            "learning_rate": 1e-2,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "options": {"sft_weight": 1.0},
            "lora": {"r": 8, "alpha": 16},
            "batch_pairs": 16,
            "micro_batch_tokens": 512,
            "min_steps": STEPS,
            "max_steps": STEPS,
            "checkpoint_every": 1,
        },
        "workers": {"workers": 2, "cpus_per_worker": 0.5, "threads_per_worker": 1},
        "evaluate": {
            "prompts": str(folder / "evaluate.jsonl"),
            "judge_rules": str(folder / "style.json"),
            "max_new_tokens": 16,
            "gate": {
                "rules": {
                    "judged_prompts": {"threshold": 10},
                    "win_rate_champion": {"threshold": 0.5},
                    "distinct": None,
                    "relevance": None,
                    "reward_accuracy": None,
                }
            },
        },
        "serving": {
            "port": port,
            "dtype": "float32",
            "max_tokens": 16,
            "cpus_per_replica": 0.5,
            "threads_per_replica": 1,
        },
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` with a token, on ports and under a user's home of its own; ended by process id."""
    root = tmp_path_factory.mktemp("closed")
    home = Home.at(root / "home")
    gateway, head, dashboard, client, agent = free_ports(5)
    recipe = write_recipe(root, write_sft(root / "sft"), port=gateway)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PREFLOOP_")) and k != "PYTHONPATH"},
        "HOME": str(root),
        "RAY_AUTH_MODE": "token",
        # The service is stopped before Ray; a node that drains once more only waits.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # The code is what the nodes have; a job brings its recipe.
        "PYTHONPATH": str(ROOT),
        # One step a second: tiny steps would be over before anybody could kill them.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    }
    subprocess.run(
        ["ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True, umask=0o77
    )
    ledger = Ledger.open(f"sqlite:///{home.local('ledger.db')}")
    # Ray's sockets need a short path.
    with (
        tempfile.TemporaryDirectory(prefix="closed-", ignore_cleanup_errors=True) as scratch,
        (root / "ray.log").open("wb") as log,
    ):
        command = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--temp-dir", scratch]
        command += ["--num-cpus", "4", "--object-store-memory", str(150 * 1024**2), "--port", str(head)]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        made = Cluster(home, ledger, recipe, f"http://127.0.0.1:{dashboard}", environment, psutil.Process(child.pid))
        try:
            wait_until_it_answers(made, child, root / "ray.log")
            yield made
        finally:
            stop = [sys.executable, "-m", "serving.deploy", "--stop"]
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    stop, env=environment | {"PREFLOOP_HOME": home.uri}, cwd=ROOT, check=False, timeout=STOP_S
                )
            family = [made.process, *made.process.children(recursive=True)]
            child.terminate()
            _, alive = psutil.wait_procs(family, timeout=STOP_S)
            for process in alive:
                process.kill()
            ledger.close()


@pytest.fixture(scope="module")
def killed(cluster: Cluster) -> Seen:
    """The first round, whose driver was killed while it trained, with no chance to say a word."""
    with submitted(cluster, "round-1") as job:
        end = time.monotonic() + JOB_S
        driver = None
        while (seen := look(cluster)) is None or seen.metrics.get("stage") != "train" or not seen.steps:
            if job.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the round never trained: {seen}\n{log_of(cluster)}")
            if driver is None and seen is not None:
                [driver] = drivers(cluster)
            time.sleep(0.05)
        assert driver is not None
        driver.kill()
        assert job.wait(JOB_S) != 0
    seen = look(cluster)
    assert seen is not None
    assert "train" not in seen.stages, "the round trained to its end before its driver was killed"
    return seen


@pytest.fixture(scope="module")
def first(cluster: Cluster, killed: Seen) -> Seen:
    """The first round after the same command again."""
    return round_to_the_end(cluster, "round-1", code=0)


@pytest.fixture(scope="module")
def second(cluster: Cluster, first: Seen) -> Seen:
    """The second round: the same command once more."""
    return round_to_the_end(cluster, "round-2", code=3)


def test_a_killed_driver_leaves_a_round_that_the_same_command_ends_with_ship(killed: Seen, first: Seen) -> None:
    assert (killed.status, killed.attempt, killed.trained) == ("running", 1, ("running", 1))
    assert (first.run_id, first.status, first.attempt) == (killed.run_id, "succeeded", 2)
    assert first.trained == ("succeeded", 2)
    assert first.champion == (first.stages["train"]["model"], 2)


def test_a_job_is_one_job_by_its_id(cluster: Cluster, second: Seen) -> None:
    again = asked(cluster, "submit", "loop", cluster.recipe.name, "--home", cluster.home.uri, "--id", "round-1")
    assert again == "job round-1-a2: succeeded already, nothing was submitted\n"
    again = asked(cluster, "submit", "loop", cluster.recipe.name, "--home", cluster.home.uri, "--id", "round-2")
    assert again == "job round-2: held already, nothing was submitted\n"
    other = jobs("submit", "evaluate", cluster.recipe.name, "--id", "round-2", "--address", cluster.address)
    refused = subprocess.run(
        other, env=cluster.environment, cwd=cluster.recipe.parent, capture_output=True, text=True, timeout=STOP_S
    )
    assert refused.returncode == 1
    assert "job `round-2` is another one" in refused.stderr
    listed = [line.split()[:3] for line in asked(cluster, "list").splitlines()[1:] if "round" in line]
    assert listed == [
        ["round-2", "loop", "HELD"],
        ["round-1-a2", "loop", "SUCCEEDED"],
        ["round-1", "loop", "FAILED"],
    ]
    assert "SHIP" in asked(cluster, "logs", "round-1")
    assert "HOLD" in asked(cluster, "logs", "round-2")


@pytest.mark.full
def test_a_job_that_is_stopped_says_so_and_leaves_in_order(cluster: Cluster, first: Seen) -> None:
    before = look(cluster)
    assert before is not None
    asked(cluster, "submit", "loop", cluster.recipe.name, "--home", cluster.home.uri, "--id", "round-3")
    end = time.monotonic() + JOB_S
    while (seen := look(cluster)) is None or seen.run_id == before.run_id:
        assert time.monotonic() < end, asked(cluster, "logs", "round-3")
        time.sleep(0.1)
    assert asked(cluster, "stop", "round-3") == "job round-3: stopped\n"
    assert "interrupted; what was acknowledged is kept" in asked(cluster, "logs", "round-3")
    stopped = look(cluster)
    assert stopped is not None
    assert (stopped.status, stopped.champion) == ("stopped", first.champion)


def test_what_was_finished_when_the_driver_was_killed_is_not_done_again(killed: Seen, first: Seen) -> None:
    assert list(killed.stages) == ["serve", "collect", "build_pairs", "prepare"]
    assert {name: first.stages[name] for name in killed.stages} == killed.stages
    assert {name: first.metrics["seconds"][name] for name in killed.stages} == killed.metrics["seconds"]
    assert first.responses == killed.responses
    assert first.snapshots == killed.snapshots
    assert len(killed.responses) >= 48


def test_training_goes_on_from_where_the_killed_driver_left_it(killed: Seen, first: Seen) -> None:
    assert 1 <= len(killed.steps) < STEPS
    assert {step: first.steps[step] for step in killed.steps} == killed.steps


def test_the_ledger_holds_every_step_of_a_run_whose_driver_was_killed(first: Seen) -> None:
    assert list(first.steps) == list(range(1, STEPS + 1))


def test_the_next_round_starts_from_the_champion_and_is_held_where_nothing_is_left_to_win(
    cluster: Cluster, first: Seen, second: Seen
) -> None:
    assert (second.status, second.attempt) == ("held", 1)
    assert second.run_id != first.run_id
    assert second.champion == first.champion
    assert second.stages["serve"] == {"champion": first.stages["train"]["model"]}
    assert set(second.stages["collect"]["models"]) == {first.stages["train"]["model"]}
    with cluster.ledger.read() as session:
        run = session.get_one(RunRow, second.stages["train"]["run"])
    assert (run.start_model_id, run.reference_model_id) == (first.champion[0], first.champion[0])


def test_the_second_reference_is_the_champion_that_was_served_to_the_number(
    cluster: Cluster, first: Seen, second: Seen
) -> None:
    champion = first.champion[0]
    with cluster.ledger.read() as session:
        rows = session.scalars(sa.select(ResponseRow).where(ResponseRow.model_id == champion)).all()
        digest = session.get_one(ModelRow, champion).digest
    served = {(row.prompt_digest, tuple(row.token_ids or ())): row.logp for row in rows}
    artifact = cluster.home.artifact("training", second.stages["prepare"]["snapshot"])
    assert artifact.manifest()["binding"]["reference_digest"] == digest
    groups = [group for split in Split for group in read_groups(artifact, split)]
    by_sft = scored_by(cluster.home, first.stages["serve"]["champion"], groups)
    reference, reported, before = [], [], []
    for group, base in zip(groups, by_sft, strict=True):
        edited = {pair.chosen for pair in group.pairs if pair.source == "edit"}
        scores = zip(group.responses, group.reference_logps or (), base.reference_logps or (), strict=True)
        for i, (response, logp, sft_logp) in enumerate(scores):
            told = served.get((digest_of(group.prompt_ids), response))
            if told is None:
                assert i in edited, "only what a person wrote was never served"
                continue
            reference.append(logp)
            reported.append(told)
            before.append(sft_logp)
    assert len(reported) >= 40
    assert reference == pytest.approx(reported, abs=FLOAT32_NOISE)
    assert statistics.fmean(abs(a - b) for a, b in zip(reported, before, strict=True)) > 100 * FLOAT32_NOISE


@contextmanager
def submitted(cluster: Cluster, job_id: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The loop on the cluster; prints what the job prints until it ends, and leaves with its exit code."""
    command = [*jobs("submit", "loop", cluster.recipe.name, "--address", cluster.address)]
    command += ["--home", cluster.home.uri, "--id", job_id, "--follow"]
    with job_log(cluster).open("wb") as log:
        process = subprocess.Popen(command, env=cluster.environment, cwd=cluster.recipe.parent, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def jobs(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("prefloop")), "jobs", *arguments]


def asked(cluster: Cluster, *arguments: str) -> str:
    command = jobs(*arguments, "--address", cluster.address)
    told = subprocess.run(
        command, env=cluster.environment, cwd=cluster.recipe.parent, capture_output=True, text=True, timeout=STOP_S
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def round_to_the_end(cluster: Cluster, job_id: str, *, code: int) -> Seen:
    with submitted(cluster, job_id) as job:
        ended = job.wait(JOB_S)
    assert ended == code, log_of(cluster)
    seen = look(cluster)
    assert seen is not None
    return seen


def log_of(cluster: Cluster) -> str:
    return job_log(cluster).read_text(errors="replace")[-6000:]


def job_log(cluster: Cluster) -> Path:
    return cluster.recipe.with_name("job.log")


def drivers(cluster: Cluster) -> list[psutil.Process]:
    """The loops that run in this test's cluster: Python itself, not the shell that Ray started it with."""
    found = []
    for process in cluster.process.children(recursive=True):
        try:
            if process.cmdline()[1:4] == ["-m", "ray_jobs", "loop"]:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def look(cluster: Cluster) -> Seen | None:
    with cluster.ledger.read() as session:
        newest = sa.select(RunRow).where(RunRow.kind == "loop").order_by(RunRow.created_at.desc()).limit(1)
        run = session.scalar(newest)
        if run is None:
            return None
        training = session.get(RunRow, f"{run.run_id}-train")
        steps = sa.select(RunStepRow).where(RunStepRow.run_id == f"{run.run_id}-train").order_by(RunStepRow.step)
        champion = cluster.ledger.champion("default")
        return Seen(
            run_id=run.run_id,
            status=run.status,
            attempt=run.attempt,
            metrics=run.metrics,
            trained=(training.status, training.attempt) if training else ("", 0),
            steps={row.step: row.metrics for row in session.scalars(steps)},
            responses=frozenset(session.scalars(sa.select(ResponseRow.response_id))),
            snapshots=frozenset(session.scalars(sa.select(SnapshotRow.snapshot_id))),
            champion=(champion.model_id, champion.revision) if champion else ("", 0),
        )


def scored_by(home: Home, model_id: str, groups: Sequence[Group]) -> list[Group]:
    scorer = ScoringModel(load_model(home, model_id, dtype="float32").model)
    unscored = [replace(group, reference_logps=None) for group in groups]
    return with_reference_logps(unscored, lambda batch: scorer(batch).logps, token_budget=512)


def digest_of(prompt_ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, prompt_ids)).encode()).hexdigest()


def wait_until_it_answers(cluster: Cluster, child: "subprocess.Popen[bytes]", log: Path) -> None:
    token = Path(cluster.environment["HOME"], ".ray", "auth_token").read_text().strip()
    end = time.monotonic() + START_S
    while child.poll() is None and time.monotonic() < end:
        try:
            reply = httpx.get(f"{cluster.address}/api/jobs/", headers={"authorization": f"Bearer {token}"}, timeout=5)
            if reply.is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(f"Ray did not start:\n{log.read_text()[-3000:]}")
