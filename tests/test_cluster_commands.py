"""The commands of cluster.yaml as they stand, on three bare machines: every job of the product from a client of its own.

What the machines share is an object store and a database, as on AWS; each has an environment from the lock alone, a network
address, a home and a folder for temporary files (`tests.machines`). The client's environment is that of these tests; it
knows the cluster's token and its dashboard, and nothing of the store.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
import yaml
from safetensors.torch import load_file

from app.config import load_recipe
from app.ledger import AuditRow, Ledger, RunRow, RunStepRow
from app.storage import Home
from tests.conftest import free_ports
from tests.machines import HOST, NETWORK, Machine, machine, network
from tests.postgres import postgresql
from tests.ray_jobs.test_closed_loop import WORDS, prompts, write_recipe, write_sft

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]
ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
BUCKET = "prefloop"
SETUP_S, START_S, JOB_S = 900, 300, 600
REFUSED_S = 30
SILENT_S = 40
"""Half a minute by deploy/start-node.sh, and what the driver needs to be told; by Ray's own settings it would be over 60."""
END = "-- end of a command --"
EASY = {f"evaluate.gate.rules.{rule}": "null" for rule in ("win_rate_champion", "win_rate_sft", "judged_prompts")}
"""After the first round nothing is left to win from the champion."""
STEPS = 60
LONG = {
    "train.min_steps": STEPS,
    "train.max_steps": STEPS,
    "train.checkpoint_every": 5,
    # Policy and reference in slices: what a machine holds is lost with it.
    "train.sharding": "zero3",
    "train.reference": "sharded",
    # Not from the champion, which changes between these runs.
    "model.start": "sft",
    "model.reference_model": "sft",
}
BARE = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    # Where this machine finds packages.
    **{k: v for k, v in os.environ.items() if k.startswith("PIP_")},
}
ASK = """
import httpx, sys
url, *token = sys.argv[1:]
reply = httpx.get(url, headers={"authorization": f"Bearer {token[0]}"} if token else {}, timeout=10)
print(reply.status_code, reply.text)
"""


@dataclass
class Cluster:
    """Machines of the two groups, and the machine of somebody who submits: a folder, a home, the tests' environment."""

    root: Path
    token: str
    client: dict[str, str]
    ledger: Ledger
    stack: ExitStack
    machines: list[Machine] = field(default_factory=list)
    """Those that run; the first is the head."""

    @property
    def head(self) -> Machine:
        return self.machines[0]

    def jobs(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = self.head.command(str(Path(sys.executable).with_name("prefloop")), "jobs", *arguments)
        folder = self.root / "project"
        return subprocess.run(
            command, env=self.client, cwd=folder, capture_output=True, text=True, timeout=JOB_S, check=False
        )

    def submit(
        self, job: str, job_id: str, settings: dict[str, Any], *arguments: str
    ) -> "subprocess.CompletedProcess[str]":
        told = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        return self.jobs("submit", job, "recipe.yaml", "--id", job_id, *arguments, *told)

    def done(self, job: str, job_id: str, settings: dict[str, Any] | None = None) -> None:
        told = self.submit(job, job_id, settings or {}, "--follow")
        assert told.returncode == 0, f"{job}: {told.stdout[-4000:]}{told.stderr[-2000:]}"

    def ask(self, path: str, *, token: bool = True) -> tuple[int, str]:
        """Status and body of what the dashboard answers; 0 where it does not."""
        command = self.head.command(sys.executable, "-c", ASK, f"http://127.0.0.1:8265{path}")
        command += [self.token] if token else []
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        status, _, body = told.partition(" ")
        return int(status or 0), body

    def nodes(self) -> dict[str, str]:
        """Addresses of the nodes that are alive, by id."""
        status, body = self.ask("/nodes?view=summary")
        found = json.loads(body)["data"].get("summary", []) if status == 200 else []
        raylets = [node["raylet"] for node in found]
        return {r["nodeId"]: r["nodeManagerAddress"] for r in raylets if r.get("state") == "ALIVE"}

    def train_workers(self) -> list[str]:
        """Addresses of the nodes of the train workers that are alive."""
        found = json.loads(self.ask("/api/v0/actors?limit=1000&detail=1")[1])["data"]["result"]["result"]
        nodes = self.nodes()
        return [
            nodes.get(actor["node_id"], "")
            for actor in found
            if actor["class_name"] == "RayTrainWorker" and actor["state"] == "ALIVE"
        ]

    def start(self, name: str, home: Path) -> None:
        kind, address = ("worker", {"RAY_HEAD_IP": self.head.address}) if self.machines else ("head", {})
        hidden = [folder for folder in self.root.iterdir() if folder.is_dir() and folder != home]
        log, commands = self.root / f"{name}.log", CLUSTER[f"{kind}_start_ray_commands"]
        made = machine(name, home, commands, log, hidden=hidden, environment=BARE | address)
        self.machines.append(self.stack.enter_context(made))
        wait_for(f"`{name}` does not join", lambda: self.machines[-1].address in self.nodes().values(), log)

    def start_all(self, homes: Sequence[Path], *, called: str = "") -> None:
        for home in homes:
            self.start(f"{called}{home.name}", home)


def wait_for(what: str, done: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + START_S
    while not done():
        assert time.monotonic() < end, f"{what} after {START_S} s\n{log.read_text(errors='replace')[-3000:]}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    # Not below /tmp, which every machine has for itself.
    folder = Path(tempfile.mkdtemp(prefix="cluster-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bridge() -> Iterator[None]:
    with network():
        yield


@pytest.fixture(scope="module")
def project(root: Path) -> Path:
    """What somebody submits: a recipe, and the files it names by relative paths; no weights."""
    folder = root / "project"
    (folder / "recipes").mkdir(parents=True)
    [gateway] = free_ports(1)
    recipe = write_recipe(folder, write_sft(root / "sft"), port=gateway)
    recipe.write_text(recipe.read_text().replace(f"{folder}/", ""))
    return folder


@pytest.fixture(scope="module")
def homes(bridge: None, root: Path) -> list[Path]:
    """Of three machines: a copy of this checkout, and what `setup_commands` makes of it."""
    source = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [root / name for name in ("head", "one", "two")]
    for home in found:
        for name in filter(None, source.split("\0")):
            if (ROOT / name).is_file():
                target = home / "prefloop" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)

    def set_up(home: Path) -> None:
        for command in CLUSTER["setup_commands"]:
            bash(command, home, cwd=Path("/"))

    with ThreadPoolExecutor() as pool:  # as `ray up` does
        list(pool.map(set_up, found))
    return found


def bash(command: str, home: Path, *, cwd: Path) -> None:
    subprocess.run(["bash", "-c", command], env=BARE | {"HOME": str(home)}, check=True, timeout=SETUP_S, cwd=cwd)


@pytest.fixture(scope="module")
def store(bridge: None) -> Iterator[dict[str, str]]:
    """The object store and the database, as machines are told of them."""
    moto = pytest.importorskip("moto.server", reason="the extra `cluster-test` is not installed")
    import boto3
    from s3fs import S3FileSystem

    [port] = free_ports(1)
    with postgresql(address=HOST, clients=NETWORK) as database:
        server = moto.ThreadedMotoServer(ip_address=HOST, port=port, verbose=False)
        server.start()
        variables = {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "PREFLOOP_HOME": f"s3://{BUCKET}/state",
            "PREFLOOP_LEDGER": database,
            "PREFLOOP_SIGNING_KEY": secrets.token_hex(32),
            "PREFLOOP_API_KEY": secrets.token_hex(16),
        }
        try:
            with pytest.MonkeyPatch.context() as environment:
                for name, value in variables.items():
                    environment.setenv(name, value)
                boto3.client("s3").create_bucket(Bucket=BUCKET)
                yield variables
        finally:
            server.stop()
            # fsspec keeps what was opened, with the address of then.
            S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def cluster(root: Path, project: Path, homes: list[Path], store: dict[str, str]) -> Iterator[Cluster]:
    Home.at(store["PREFLOOP_HOME"]).filesystem.put(f"{root / 'sft'}/", f"{BUCKET}/sft", recursive=True)
    recipe = project / "recipe.yaml"
    tree = yaml.safe_load(recipe.read_text())
    tree["model"]["sft"] = f"s3://{BUCKET}/sft"
    # A machine holds one worker: they meet over the network.
    tree["workers"]["cpus_per_worker"] = 0.625 * len(os.sched_getaffinity(0))
    recipe.write_text(yaml.safe_dump(tree))
    mine = root / "client"
    mine.mkdir()
    client = {
        **{
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PREFLOOP_", "AWS_")) and k != "PYTHONPATH"
        },
        "HOME": str(mine),
    }
    generate = [str(Path(sys.executable).with_name("ray")), "get-auth-token", "--generate"]
    subprocess.run(generate, env=client, check=True, capture_output=True, umask=0o77)
    token = mine / ".ray" / "auth_token"
    # What `ray up` leaves for the autoscaler; this cluster has no cloud to ask for more.
    bootstrap = {"cluster_name": "test", "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}}
    for home in homes:
        # What `file_mounts` brings beside the checkout.
        (home / ".ray").mkdir(exist_ok=True)
        shutil.copy2(token, home / ".ray" / "auth_token")
        (home / ".prefloop.env").write_text("".join(f"{name}={value}\n" for name, value in store.items()))
        (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(bootstrap))
    with ExitStack() as stack:
        ledger = stack.enter_context(closing(Ledger.open(store["PREFLOOP_LEDGER"])))
        made = Cluster(root, token.read_text().strip(), client, ledger, stack)
        made.start_all(homes)
        yield made


def blocks(document: str, title: str) -> list[list[str]]:
    """The commands of a section of a document, a list for each block."""
    section = (ROOT / document).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)]


def test_the_commands_for_one_node_end_with_a_finished_run(root, project, homes, claim):
    home = homes[0]
    [*before, start], use = blocks("docs/cluster.md", "One node")
    for command in before:
        bash(command, home, cwd=home / "prefloop")
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    del recipe["collect"]
    checkout = shutil.copytree(project, home / "prefloop", dirs_exist_ok=True)
    (checkout / "recipes" / "mine.yaml").write_text(yaml.safe_dump(recipe))
    words = [(prompt, WORDS[number % len(WORDS)]) for number, prompt in enumerate(prompts(64, "mine"))]
    rows = ({"prompt": prompt, "chosen": f"{word}!", "rejected": f"{word}."} for prompt, word in words)
    (checkout / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    environment = BARE | {"HOME": str(home)}
    commands, log = ["cd ~/prefloop", start], root / "alone.log"
    hidden = [project, root / "one", root / "two"]
    with machine("alone", home, commands, log, hidden=hidden, environment=BARE) as alone:
        wait_for("the head does not answer", lambda: "started" in log.read_text(), log)
        # In one shell, as somebody types them; a line says where the output of each ends.
        typed = "\n".join(f"{command}\necho {END}" for command in use)
        done = subprocess.run(
            alone.command("bash", "-e", "-c", typed),
            env=environment, cwd=checkout, capture_output=True, text=True, timeout=JOB_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
        told = done.stdout.split(END)
    [submitted] = [number for number, command in enumerate(use) if " submit loop " in command]
    assert "SUCCEEDED" in told[submitted + 1]
    assert "SHIP" in told[submitted + 2]
    claim(
        "the commands of docs/cluster.md for one node, on a bare machine, end with a round that ships",
        figure=f"{len(before) + 1 + len(use)} commands",
    )


def test_nobody_without_the_token_is_heard(cluster):
    assert cluster.ask("/api/jobs/", token=False)[0] == 401
    status, body = cluster.ask("/api/jobs/")
    assert (status, json.loads(body)) == (200, [])


def test_every_job_of_the_product_succeeds_from_a_client_in_another_environment(cluster, claim):
    ended = ("loop", "build_pairs", "prepare", "train", "evaluate", "ship")
    for job in ended:
        cluster.done(job, f"first-{job.replace('_', '-')}", EASY if job in ("evaluate", "ship") else {})
    listed = cluster.jobs("list").stdout
    assert listed.count("SUCCEEDED") == len(ended), listed
    claim(
        "three bare machines that share an object store and PostgreSQL, made by cluster.yaml's setup and start commands as they stand: every job succeeds from a client elsewhere",
        figure=f"{len(ended)} jobs: {', '.join(ended)}",
    )


def test_the_commands_for_eight_nodes_are_those_of_these_three(cluster, project, tmp_path, claim):
    """But for what a cloud does: machines are started and files brought otherwise here, and the run takes two workers."""
    prepare, use = blocks("docs/cluster.md", "Eight nodes on AWS")
    settle, (status, *more), (import_, *rest), (submit, *others) = (
        [line.partition("  #")[0].strip() for line in (*prepare, *use) if begins(line)]
        for begins in (
            lambda line: line.startswith("mkdir"),
            lambda line: line.startswith("ray exec") and "ray status" in line,
            lambda line: line.startswith("ray exec") and "ray status" not in line,
            lambda line: line.startswith("prefloop "),
        )
    )
    assert more == rest == others == []
    left = {" ".join(line.split()[:2]) for line in (*prepare, *use)} - {"mkdir -p", "ray exec", "prefloop jobs"}
    # The first is one of cluster.yaml's setup commands, the second is for a person.
    by_cloud = {"ray up", "ray dashboard", "ray rsync-up", "ray down"}
    assert left == {"bash deploy/setup-node.sh", '"${EDITOR:-vi}" ~/.prefloop.env', *by_cloud}

    tools = f"{Path(sys.executable).parent}:{BARE['PATH']}"
    bash(f"export PATH={tools}; {settle[0]}", tmp_path, cwd=ROOT)
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o77 == 0
    assert (tmp_path / ".prefloop.env").stat().st_mode & 0o77 == 0

    def on_the_head(command: str, given: str = "") -> str:
        inner = command.removeprefix("ray exec cluster.yaml '").removesuffix("'")
        told = subprocess.run(
            cluster.head.inside("bash", "-c", inner),
            env=BARE | {"HOME": str(cluster.root / "head")},
            input=given, capture_output=True, text=True, timeout=JOB_S, check=False,
        )  # fmt: skip
        assert told.returncode == 0, f"{command}: {told.stdout[-3000:]}{told.stderr[-3000:]}"
        return told.stdout

    # It answers to the token; the table of nodes is the autoscaler's, which only a cloud has.
    on_the_head(status)
    words = [(prompt, WORDS[number % len(WORDS)]) for number, prompt in enumerate(prompts(64, "mine"))]
    rows = ({"prompt": prompt, "chosen": f"{word}!", "rejected": f"{word}."} for prompt, word in words)
    on_the_head("cat > /tmp/pairs.jsonl", "\n".join(map(json.dumps, rows)))
    on_the_head(import_)
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    del recipe["collect"], recipe["train"]["lora"]
    recipe["train"]["learning_rate"] = 1e-3
    section = (ROOT / "docs/cluster.md").read_text().partition("## Eight nodes on AWS")[2]
    said = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    written = project / "recipes" / "mine.yaml"
    written.write_text(yaml.safe_dump(recipe | {k: recipe.get(k, {}) | v for k, v in said.items()}))
    assert load_recipe(written).workers.workers == 8 * 4
    mine = recipe | {"train": recipe["train"] | said["train"], "name": "mine"}
    for rule in EASY:
        mine["evaluate"]["gate"]["rules"][rule.rpartition(".")[2]] = None
    written.write_text(yaml.safe_dump(mine))
    told = cluster.jobs(*shlex.split(submit)[2:])
    assert told.returncode == 0, f"{told.stdout[-4000:]}{told.stderr[-2000:]}"
    assert "reference in slices" in told.stdout
    claim(
        "the commands of docs/cluster.md for eight nodes that are not a cloud's, on three bare machines: import on the head, a round from a client, policy and reference in slices",
        figure=f"{len([*settle, status, import_, submit])} commands",
    )


@dataclass(frozen=True)
class Trained:
    """What a run left."""

    status: str
    model_id: str | None
    steps: dict[int, tuple[float, float]]
    """When a step was told last, and the seconds it took: a step that is told again took as long."""

    def weights(self) -> dict[str, torch.Tensor]:
        with Home.from_environment().artifact("models", self.model_id).local_copy() as folder:
            return load_file(folder / "model.safetensors")

    def newest(self) -> int:
        return max(self.steps, default=0)


def look(ledger: Ledger, run_id: str) -> Trained:
    with ledger.read() as session:
        run = session.get(RunRow, run_id)
        rows = session.scalars(sa.select(RunStepRow).where(RunStepRow.run_id == run_id)).all()
    steps = {row.step: (row.created_at.timestamp(), row.metrics["seconds"]) for row in rows}
    return Trained(run.status if run else "", run.output_model_id if run else None, steps)


def same_bits(ours: Trained, expected: Trained) -> bool:
    found, wanted = ours.weights(), expected.weights()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def some_steps_later(cluster: Cluster, run_id: str) -> Trained:
    """Submit a long run, and return what is known of it once it has made a checkpoint."""
    assert cluster.submit("train", run_id, LONG).returncode == 0
    log = cluster.root / "head.log"
    wait_for("no step is reported", lambda: look(cluster.ledger, run_id).newest() >= 8, log)
    seen = look(cluster.ledger, run_id)
    assert seen.status == "running"
    assert seen.newest() < STEPS
    return seen


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster) -> Trained:
    cluster.done("train", "unbroken", LONG)
    return look(cluster.ledger, "unbroken")


def test_a_run_that_loses_the_machine_of_a_worker_ends_with_the_bits_of_an_unbroken_one_and_ships(
    cluster, unbroken, claim
):
    some_steps_later(cluster, "broken")
    assert sorted(cluster.train_workers()) == sorted(node.address for node in cluster.machines[1:]), "one on each"
    lost = cluster.machines.pop()
    at = time.time()
    lost.lose()
    cluster.start("another", lost.home)
    log = cluster.root / "another.log"

    def failures() -> list[float]:
        with cluster.ledger.read() as session:
            query = sa.select(AuditRow.at).where(AuditRow.action == "workers_failed", AuditRow.target == "broken")
            return sorted(when.timestamp() for when in session.scalars(query))

    wait_for("nobody notices", lambda: failures() != [], log)
    # What was reported until then may be told again when the run goes on.
    before, noticed = look(cluster.ledger, "broken"), failures()[0] - at
    wait_for("it does not go on", lambda: look(cluster.ledger, "broken").newest() > before.newest(), log)
    followed = cluster.jobs("logs", "broken", "--follow")
    assert followed.returncode == 0, followed.stdout[-4000:]
    ended = look(cluster.ledger, "broken")
    assert same_bits(ended, unbroken)
    assert sorted(ended.steps) == list(range(1, STEPS + 1))
    assert noticed <= SILENT_S
    new = (when - at for step, (when, _) in ended.steps.items() if step > before.newest())
    going_on = min(after for after in new if after > noticed)
    for job in ("evaluate", "ship"):
        cluster.done(job, f"second-{job}", EASY)
    champion = cluster.ledger.champion("default")
    assert champion is not None
    assert champion.model_id == ended.model_id
    claim(
        "a machine that hosts a worker loses its power: training (policy and reference in slices) goes on with the one that takes its place, ends with the bits of an unbroken run, and its model is evaluated and shipped",
        figure=f"noticed after {noticed:.0f} s, the next new step after {going_on:.0f} s",
    )


def test_a_run_whose_head_is_lost_goes_on_by_the_same_command_on_a_new_cluster(cluster, unbroken, claim):
    some_steps_later(cluster, "headless")
    lost = list(cluster.machines)
    for node in lost:
        node.lose()
    before = look(cluster.ledger, "headless")
    assert before.newest() < STEPS
    cluster.machines.clear()
    cluster.start_all([node.home for node in lost], called="new-")
    cluster.done("train", "headless", LONG)
    ended = look(cluster.ledger, "headless")
    assert same_bits(ended, unbroken)
    assert sorted(ended.steps) == list(range(1, STEPS + 1))
    kept = [step for step, (_, seconds) in before.steps.items() if ended.steps[step][1] == seconds]
    assert kept, "every step was made again"
    claim(
        "head and nodes lose their power while a run trains: on a new cluster the same command goes on, with the bits of an unbroken run",
        figure=f"{before.newest()} steps before, {len(kept)} of them not made again",
    )


def test_a_machine_that_cannot_reach_the_store_or_has_another_version_is_named_before_a_run(cluster, claim):
    other = cluster.machines[1]

    def refused(run_id: str, why: str) -> float:
        began = time.monotonic()
        told = cluster.submit("train", run_id, {}, "--follow")
        took = time.monotonic() - began
        assert told.returncode == 1, told.stdout[-3000:]
        assert re.search(rf"node {re.escape(other.address)} \(\w+\) {why}", told.stdout), told.stdout[-3000:]
        assert look(cluster.ledger, run_id).status == "", "a run was begun"
        return took

    route = ["unreachable", f"{HOST}/32"]
    subprocess.run(other.command("ip", "route", "add", *route), check=True)
    try:
        seconds = [refused("no-store", r"(cannot use the home|did not answer within)")]
    finally:
        subprocess.run(other.command("ip", "route", "del", *route), check=True)
    installed = next((other.home / "prefloop" / ".venv" / "lib").glob("python3*/site-packages/app/__init__.py"))
    installed.write_text(installed.read_text() + "# another state of the same version\n")
    seconds.append(refused("other-version", r"has prefloop .*: install the same lock everywhere"))
    assert max(seconds) <= REFUSED_S
    claim(
        "a machine that cannot reach the store, or has another state of the code, is named before a run, within 30 s of `prefloop jobs submit`",
        figure=f"{seconds[0]:.0f} s and {seconds[1]:.0f} s",
    )
