"""A job joins its cluster or says why not, and ends in order when the cluster stops it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from app.config import WorkerSection
from app.errors import ServiceError
from app.storage import HOME_VARIABLE
from ray_jobs import session
from ray_jobs.session import LOCAL_ENVIRONMENT, ray_cluster, require_room, warn_of_idle_gpus

JOB = """
import time
from ray_jobs.session import ray_cluster, run_job

def body(session, options):
    with ray_cluster(session.home):
        try:
            print("ready", flush=True)
            time.sleep(120)
        finally:
            print("unwound", flush=True)
    return 0

raise SystemExit(run_job("job", body))
"""


def test_sigterm_unwinds_a_job_that_has_joined_a_cluster_as_ctrl_c_does(home, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: stopped\n")
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", JOB, str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    ) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=60)
    assert (job.returncode, out) == (130, "unwound\n")
    assert err == "job: interrupted; what was acknowledged is kept\n"


@pytest.mark.parametrize("job", ["train", "loop", "ship"])
def test_ctrl_c_while_a_job_still_imports_what_it_needs_is_one_message(home, job):
    # Where the tests run in the background of a shell, SIGINT is ignored, and a child inherits that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from ray_jobs.__main__ import main;"
        "print('here', flush=True); sys.exit(main())"
    )
    command = [sys.executable, "-c", code, job, "recipes/demo_only.yaml"]
    environment = {**os.environ, HOME_VARIABLE: home.uri}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=environment
    ) as process:
        assert process.stdout.readline() == "here\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted before anything was done\n")


@pytest.mark.parametrize(("job", "asked"), [("train", True), ("evaluate", True), ("ship", False)])
def test_a_submitted_job_asks_its_nodes_before_it_imports_what_it_needs(home, job, asked):
    """By what it says of a cluster that is none."""
    code = "import sys; from ray_jobs.__main__ import main; code = main(); print(code, 'ray_jobs.NAME' in sys.modules)"
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"env_vars": {"A": "b"}}}'}
    environment = {**os.environ, HOME_VARIABLE: home.uri, **submitted, "RAY_ADDRESS": "http://127.0.0.1:9"}
    code = code.replace("NAME", job)
    command = [sys.executable, "-c", code, job, "nowhere.yaml", *(["--model", "none"] if job == "ship" else [])]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert ("HOST:PORT" in ended.stderr) == asked, ended.stderr
    assert ("nowhere.yaml" in ended.stderr) == (not asked), ended.stderr
    assert ended.stdout == f"1 {not asked}\n"


@pytest.mark.parametrize(
    ("free", "workers", "reading", "fits"),
    [
        ([{"CPU": 1.2}], 3, 0.0, True),  # 1.2 / 0.4 is a little less than 3
        ([{"CPU": 1.2}], 3, 0.25, False),
        ([{"CPU": 1.45}], 3, 0.25, True),
        ([{"CPU": 0.5}, {"CPU": 0.5}], 2, 0.2, False),  # enough in all, on no node beside a worker
        ([{"CPU": 0.6}, {"CPU": 0.5}], 2, 0.2, True),
        ([{"CPU": 0.9}, {}], 2, 0.0, True),
        ([{"CPU": 0.3}] * 5, 1, 0.0, False),
    ],
)
def test_workers_fit_where_each_has_a_node_and_reading_has_one_too(monkeypatch, free, workers, reading, fits):
    monkeypatch.setattr(session.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(session, "available_resources_per_node", lambda: dict(enumerate(free)))
    monkeypatch.setattr(session, "_FREED_S", 0.0)
    section = WorkerSection(cpus_per_worker=0.4)
    if fits:
        require_room(section, workers, reading=reading)
    else:
        with pytest.raises(ServiceError, match="do not fit"):
            require_room(section, workers, reading=reading)


@pytest.mark.parametrize(
    ("free", "used", "warned"),
    [({"GPU": 8.0}, False, True), ({"GPU": 8.0}, True, False), ({"GPU": 0.5}, False, False), ({}, False, False)],
)
def test_a_run_that_leaves_gpus_idle_says_so(monkeypatch, capsys, free, used, warned):
    monkeypatch.setattr(session.ray, "available_resources", lambda: {"CPU": 8.0, **free})
    warn_of_idle_gpus(WorkerSection(use_gpu=used), Console(width=200))
    told = "warning: the cluster has 8 GPU(s) free, and this run computes on CPUs: set workers.use_gpu\n"
    assert capsys.readouterr().out == (told if warned else "")


def test_the_address_of_a_dashboard_is_refused_with_a_word_on_which_one_is_meant(home, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="`HOST:PORT` of its head"), ray_cluster(home):
        pass


def test_a_local_cluster_keeps_no_idle_workers_which_take_time_from_training(home):
    script = """
import time
import psutil, ray
from app.storage import Home
from ray_jobs.session import ray_cluster

def idle():
    found = psutil.Process().children(recursive=True)
    return sum("ray::IDLE" in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]) if p in found)

with ray_cluster(Home.from_environment()):
    ray.get([ray.remote(lambda: time.sleep(1)).remote() for _ in range(3)])
    end = time.monotonic() + 30
    while (left := idle()) and time.monotonic() < end:
        time.sleep(0.5)
    print(left)
"""
    environment = {**os.environ, HOME_VARIABLE: home.uri}
    environment.pop("RAY_ADDRESS", None)
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert ended.stdout.split()[-1] == "0"


def test_a_local_cluster_asks_no_other_one_of_this_machine(home, monkeypatch):
    asked = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray_jobs.session._running_cluster", lambda home: None)
    monkeypatch.setattr("ray_jobs.session.ensure_ray_token", lambda: None)
    monkeypatch.setattr("ray.init", lambda *place, **arguments: asked.append((place, arguments["runtime_env"])))
    with ray_cluster(home):
        pass
    ((place, environment),) = asked
    assert place == ("local",)
    assert environment["env_vars"].items() >= LOCAL_ENVIRONMENT.items()
