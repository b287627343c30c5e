"""The commands of cluster.yaml as they stand, on bare nodes: then every job of the product from a client of its own.

Each node has a process table, a home, a folder for Ray and an environment of its own (Linux namespaces), because `ray stop`
ends all of Ray that it sees. The nodes share a folder for the state, which they find by `~/.prefloop.env`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from ray.util import get_node_ip_address

from tests.conftest import free_ports
from tests.ray_jobs.test_closed_loop import write_recipe, write_sft

pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
DASHBOARD = "http://127.0.0.1:8265"
SETUP_S, START_S, JOB_S = 900, 120, 400
BARE = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    # Where this machine finds packages.
    **{k: v for k, v in os.environ.items() if k.startswith("PIP_")},
}


@dataclass(frozen=True)
class Client:
    """The machine of somebody who submits: a folder with a recipe, a home with the token, the tests' environment."""

    folder: Path
    environment: dict[str, str]
    state: Path

    def jobs(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("prefloop")), "jobs", *arguments, "--address", DASHBOARD]
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=JOB_S, check=False
        )


def mounted(home: Path, token: Path, state: Path) -> None:
    """What `file_mounts` brings to a node."""
    source = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, source.split("\0")):
        if (ROOT / name).is_file():
            target = home / "prefloop" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    (home / ".ray").mkdir()
    shutil.copy2(token, home / ".ray" / "auth_token")
    (home / ".prefloop.env").write_text(f"PREFLOOP_HOME={state}\n")
    # What `ray up` leaves for the autoscaler; this cluster has no cloud to ask for more.
    bootstrap = {"cluster_name": "test", "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}}
    (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(bootstrap))


@contextmanager
def node(home: Path, commands: list[str], log: Path, **variables: str) -> Iterator[None]:
    """Run the start commands in namespaces of their own, and keep what they started until the block ends."""
    # A folder of its own for Ray: nodes that share one remove each other's copies of a job's working directory.
    own = ["mkdir -p ~/ray /tmp/ray", "mount --bind ~/ray /tmp/ray"]
    script = "\n".join(["set -e", *own, *commands, "exec sleep infinity"])
    isolated = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*isolated, "bash", "-c", script], env=BARE | {"HOME": str(home)} | variables, stdout=stream, stderr=stream
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for(what: str, done, log: Path) -> None:
    end = time.monotonic() + START_S
    while not done():
        assert time.monotonic() < end, f"{what} after {START_S} s\n{log.read_text(errors='replace')[-3000:]}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    probe = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this kernel gives no namespaces to this user")
    root = Path(tempfile.mkdtemp(prefix="cluster-"))
    state, folder, mine = root / "state", root / "project", root / "client"
    folder.mkdir()
    mine.mkdir()
    [gateway] = free_ports(1)
    write_recipe(folder, write_sft(root / "sft"), port=gateway)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PREFLOOP_")) and k != "PYTHONPATH"},
        "HOME": str(mine),
    }
    generate = [str(Path(sys.executable).with_name("ray")), "get-auth-token", "--generate"]
    subprocess.run(generate, env=environment, check=True, capture_output=True, umask=0o77)
    token = mine / ".ray" / "auth_token"
    homes = [root / "head", root / "data"]
    for home in homes:
        home.mkdir()
        mounted(home, token, state)
        for command in CLUSTER["setup_commands"]:
            subprocess.run(
                ["bash", "-c", command], env=BARE | {"HOME": str(home)}, check=True, timeout=SETUP_S, cwd="/"
            )
    headers = {"authorization": f"Bearer {token.read_text().strip()}"}

    def answers() -> bool:
        try:
            return httpx.get(f"{DASHBOARD}/api/version", headers=headers, timeout=5).is_success
        except httpx.HTTPError:
            return False

    def nodes() -> int:
        found = httpx.get(f"{DASHBOARD}/nodes?view=summary", headers=headers, timeout=10).json()
        return sum(n["raylet"]["state"] == "ALIVE" for n in found["data"]["summary"])

    logs = [root / "head.log", root / "data.log"]
    with node(homes[0], CLUSTER["head_start_ray_commands"], logs[0]):
        wait_for("the head does not answer", answers, logs[0])
        address = {"RAY_HEAD_IP": get_node_ip_address()}
        with node(homes[1], CLUSTER["worker_start_ray_commands"], logs[1], **address):
            wait_for("the second node does not join", lambda: nodes() == 2, logs[1])
            yield Client(folder, environment, state)
    shutil.rmtree(root, ignore_errors=True)


def test_nobody_without_the_token_is_heard(client):
    assert httpx.get(f"{DASHBOARD}/api/jobs/", timeout=10).status_code == 401


def test_every_job_of_the_product_succeeds_from_a_client_in_another_environment(client, claim):
    # The second evaluation finds a champion that nothing is left to win from.
    easy = [f"evaluate.gate.rules.{rule}=null" for rule in ("win_rate_champion", "win_rate_sft", "judged_prompts")]
    settings = [part for value in easy for part in ("--set", value)]
    ended = []
    for job in ("loop", "build_pairs", "prepare", "train", "evaluate", "ship"):
        own = settings if job in ("evaluate", "ship") else []
        told = client.jobs("submit", job, "recipe.yaml", "--id", f"first-{job.replace('_', '-')}", "--follow", *own)
        assert told.returncode == 0, f"{job}: {told.stdout[-3000:]}{told.stderr[-2000:]}"
        ended.append(job)
    listed = client.jobs("list").stdout
    assert listed.count("SUCCEEDED") == len(ended), listed
    claim(
        "setup and start commands of cluster.yaml run as they stand on two bare nodes; every job succeeds from a client elsewhere",
        figure=f"{len(ended)} jobs: {', '.join(ended)}",
    )
