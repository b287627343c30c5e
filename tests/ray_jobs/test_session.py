"""A job joins its cluster or says why not, and ends in order when the cluster stops it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import ServiceError
from ray_jobs.session import ray_cluster

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


def test_the_address_of_a_dashboard_is_refused_with_a_word_on_which_one_is_meant(home, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="`HOST:PORT` of its head"), ray_cluster(home):
        pass
