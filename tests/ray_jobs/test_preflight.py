"""What a cluster is asked before a run, and what is said where it is not ready."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from app.errors import ServiceError
from app.storage import Home
from ray_jobs import preflight as module
from ray_jobs.preflight import ask_node, node_faults, preflight

SQLITE, POSTGRES = "sqlite:////home/ledger.db", "postgresql://user@database/prefloop"


@pytest.fixture
def own(home):
    home.local("cache", "preflight").mkdir(parents=True)
    home.local("cache", "preflight", "nonce").touch()
    return ask_node(home.uri, "nonce", "this process")


def told(own, *reports, home, unseen=(), ledger_url=POSTGRES):
    return node_faults(own, reports, unseen=unseen, home=home, ledger_url=ledger_url)


def test_nodes_that_are_alike_and_share_the_home_have_no_fault(own, home):
    assert own.sees
    assert home.local("cache", "preflight", own.wrote).exists()
    alike = replace(own, token=True)
    assert told(own, replace(alike, node="a"), replace(alike, node="b", machine="another"), home=home) == []


def test_a_node_that_does_not_see_the_home_makes_no_folder_and_no_key_there(home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    report = ask_node(str(elsewhere), "nonce", "10.0.0.7 (ab12)")
    assert (report.sees, report.wrote, report.key) == (False, "", "")
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "1.0"}}, "node a has torch 1.0 instead of "),
        ({"sees": False}, "node a does not see the home"),
        ({"fault": "[Errno 30] Read-only file system"}, "node a cannot use the home"),
        ({"key": "another"}, "node a would sign with another key"),
        ({"unsafe": ("RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",)}, "node a: RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE is set"),
    ],
)
def test_a_node_that_cannot_do_its_part_is_named_with_the_reason(own, home, change, words):
    versions = {"versions": {**own.versions, **change.get("versions", {})}} if "versions" in change else {}
    [fault] = told(own, replace(own, node="b"), replace(own, node="a", **{**change, **versions}), home=home)
    assert words in fault


def test_a_node_with_an_older_prefloop_that_says_nothing_of_its_token_is_named_for_its_version(own, home):
    old = replace(own, node="old", machine="another", versions={**own.versions, "prefloop": "0.0"})
    object.__delattr__(old, "token")
    [fault] = told(own, old, home=home)
    assert "node old has prefloop 0.0" in fault


def test_a_place_that_only_one_side_sees_is_refused(own, home):
    [fault] = told(own, replace(own, node="a"), home=home, unseen=["a"])
    assert "what node a writes to" in fault


def test_another_machine_wants_a_ledger_that_is_no_file_and_a_token(own, home):
    far = replace(own, node="far", machine="another", token=False)
    near = replace(own, node="near", token=True)
    assert told(own, replace(near, token=False), home=home, ledger_url=SQLITE) == []
    [ledger, token] = told(own, near, far, home=home, ledger_url=SQLITE)
    assert "the ledger is a SQLite file, and far is another machine" in ledger
    assert "Ray on node far asks nobody for a token" in token
    assert "RAY_AUTH_MODE=token" in token


def test_a_home_that_does_not_answer_is_told_in_bounded_time(home, monkeypatch):
    held, look = threading.Event(), module._look

    def slow(*arguments, **options):
        held.wait(30)
        return look(*arguments, **options)

    monkeypatch.setattr(module, "OWN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(module, "STORE_S", 0.2)
    monkeypatch.setattr(module, "_look", slow)
    assert ask_node(home.uri, "nonce", "a node").fault == "it did not answer within 0 s"
    monkeypatch.setattr(module.ray, "nodes", list)
    with pytest.raises(ServiceError, match=r"did not answer within 0 s[\s\S]*is it reached from this machine"):
        preflight(home, SQLITE)
    held.set()


def test_a_cluster_is_asked_node_by_node_and_refused_in_bounded_time(tmp_path, monkeypatch):
    """Two nodes of one machine; one of them has another transformers in front of its path."""
    strange = tmp_path / "strange" / "transformers-99.0.dist-info"
    strange.mkdir(parents=True)
    (strange / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 99.0\n")
    home = Home.at(tmp_path / "home")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        preflight(home, f"sqlite:///{home.local('ledger.db')}")
        path = f"{strange.parent}:{Path(__file__).parents[2]}"
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", path)
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        cluster.wait_for_nodes()
        began = time.monotonic()
        with pytest.raises(ServiceError, match=r"not ready for a run:\n  node .* has transformers 99\.0 instead of"):
            preflight(home, f"sqlite:///{home.local('ledger.db')}")
        assert time.monotonic() - began < 30
        # Every process has a memory of its own.
        nowhere = Home.at("memory://nowhere")
        monkeypatch.setenv("PREFLOOP_SIGNING_KEY", "k" * 32)
        with pytest.raises(ServiceError, match="does not see the home `memory://nowhere`"):
            preflight(nowhere, POSTGRES)
        assert not list(home.local("cache", "preflight").iterdir()), "nothing is left behind"
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.full
def test_a_node_that_may_read_the_home_and_not_write_it_is_named(tmp_path, claim):
    """The node's own view of the home is mounted without the right to write."""
    if os.getuid() or shutil.which("unshare") is None:
        pytest.skip("mounts need root and util-linux")
    home = Home.at(tmp_path / "home")
    home.local().mkdir()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20},
    )
    ray_command = Path(sys.executable).with_name("ray")
    start = f"{ray_command} start --address={cluster.address} --num-cpus=1 --object-store-memory={80 * 2**20} --block"
    place = home.local()
    mounted = f"mount --bind {place} {place} && mount -o remount,ro,bind {place} && exec {start}"
    log = (tmp_path / "node.log").open("w")
    node = subprocess.Popen(["unshare", "--mount", "bash", "-c", mounted], stdout=log, stderr=log)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        end = time.monotonic() + 60
        while len([node for node in ray.nodes() if node["Alive"]]) < 2:
            assert time.monotonic() < end, (tmp_path / "node.log").read_text()
            time.sleep(0.2)
        began = time.monotonic()
        with pytest.raises(ServiceError, match=rf"node .* cannot use the home `{place}`: .*Read-only file system"):
            preflight(home, f"sqlite:///{home.local('ledger.db')}")
        took = time.monotonic() - began
        assert took <= 30
        claim("refused within 30 s: storage that one node cannot write", figure=f"{took:.1f} s")
    finally:
        ray.shutdown()
        node.terminate()
        node.wait(60)
        cluster.shutdown()
        log.close()
