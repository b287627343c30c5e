"""What is sent to a cluster, before anything is sent; `test_closed_loop` submits, follows, lists and stops real jobs."""

import shlex
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from app.errors import RecipeError, ServiceError
from ray_jobs.jobs import JOBS, Cluster, JobRequest, main
from tests.conftest import free_ports


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a recipe, which is the current one."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_is_a_module_with_its_recipe_and_its_overrides(project):
    for name in JOBS:
        request = JobRequest(name, "recipes/mine.yaml", ("train.epochs=2", "snapshot=it's mine")).checked()
        command = shlex.split(request.entrypoint())
        wanted = ["python", "-m", "ray_jobs", name, "recipes/mine.yaml"]
        assert command[:9] == [*wanted, "--set", "train.epochs=2", "--set", "snapshot=it's mine"]


def test_the_id_of_a_training_job_is_its_run_so_that_a_new_attempt_goes_on(project):
    named = JobRequest("train", "recipes/mine.yaml", job_id="monday").checked()
    assert named.entrypoint().endswith("--run monday")
    other = JobRequest("train", "recipes/mine.yaml", job_id="monday", arguments=("--run", "sunday")).checked()
    assert other.entrypoint().endswith("--run sunday")
    unnamed = JobRequest("train", "recipes/mine.yaml").checked()
    assert unnamed.entrypoint().endswith(f"--run {unnamed.job_id}")


def test_jobs_without_an_id_are_different_jobs(project):
    first, second = (JobRequest("build-pairs", "recipes/mine.yaml").checked() for _ in range(2))
    assert first.job == "build_pairs"
    assert first.job_id != second.job_id
    assert str(first.job_id).startswith("build-pairs-")


def test_arguments_after_two_dashes_are_the_jobs_own(project):
    request = JobRequest("ship", "recipes/mine.yaml", arguments=("--rollback",)).checked()
    assert request.entrypoint().endswith("recipes/mine.yaml --rollback")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"job": "trian"}, "no job `trian`"),
        ({"recipe": "../mine.yaml"}, "lies outside of"),
        ({"recipe": "recipes/other.yaml"}, "no recipe at `recipes/other.yaml`"),
        ({"overrides": ("trian.epochs=2",)}, "did you mean `train`?"),
        ({"home": "state"}, "--home `state` is relative"),
        ({"job_id": "Monday!"}, "--id `Monday!` is unusable"),
        ({"job_id": "monday-a2"}, "counts attempts"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_it_is_sent(project, wrong, told):
    with pytest.raises(RecipeError) as refused:
        JobRequest(**{"job": "train", "recipe": "recipes/mine.yaml", **wrong}).checked()
    assert told in str(refused.value)


def test_a_place_where_no_cluster_listens_is_named(project, capsys):
    [port] = free_ports(1)
    with pytest.raises(ServiceError, match=f"no Ray cluster answers at `http://127.0.0.1:{port}`"):
        Cluster(f"http://127.0.0.1:{port}")
    assert main(["list", "--address", f"http://127.0.0.1:{port}"]) == 1
    assert "ray dashboard cluster.yaml" in capsys.readouterr().err


class FakeJobs:
    """Ray's Jobs API with one job, in the state that a test gives it."""

    def __init__(self, request: JobRequest, status: str) -> None:
        self.sent: list[str] = []
        self.known = SimpleNamespace(
            submission_id=request.job_id,
            entrypoint=request.entrypoint(),
            metadata=request.metadata(),
            status=SimpleNamespace(value=status),
            driver_exit_code=None,
        )

    def list_jobs(self) -> list[SimpleNamespace]:
        return [self.known]

    def submit_job(self, *, submission_id: str, **_settings: object) -> None:
        self.sent.append(submission_id)


def cluster_of(jobs: FakeJobs) -> Cluster:
    cluster = Cluster.__new__(Cluster)
    cluster._address, cluster._client = "http://127.0.0.1:8265", jobs
    return cluster


@pytest.mark.parametrize("status", ["RUNNING", "SUCCEEDED"])
def test_an_id_whose_recipe_or_home_changed_is_no_longer_that_job(project, status):
    ask = partial(JobRequest, "loop", "recipes/mine.yaml", job_id="monday", home="/state")
    jobs = FakeJobs(ask().checked(), status)
    assert cluster_of(jobs).submit(ask().checked()) == ("monday", status)
    moved = replace(ask(), home="/another").checked()
    with pytest.raises(ServiceError, match=f"job `monday` is {status} with another home than now"):
        cluster_of(jobs).submit(moved)
    (project / "recipes" / "mine.yaml").write_text("name: mine\ntrain: {epochs: 2}\n")
    with pytest.raises(ServiceError, match=f"job `monday` is {status} with another recipe than now"):
        cluster_of(jobs).submit(ask().checked())
    assert jobs.sent == []


def test_a_job_that_failed_is_tried_again_with_its_mended_recipe(project):
    ask = partial(JobRequest, "loop", "recipes/mine.yaml", job_id="monday")
    jobs = FakeJobs(ask().checked(), "FAILED")
    (project / "recipes" / "mine.yaml").write_text("name: mine\ntrain: {epochs: 2}\n")
    assert cluster_of(jobs).submit(ask().checked()) == ("monday-a2", "FAILED")
    assert jobs.sent == ["monday-a2"]


def test_a_setting_that_nobody_wrote_is_no_part_of_what_a_job_is(project):
    ask = partial(JobRequest, "loop", "recipes/mine.yaml", job_id="monday")
    before = ask().checked().recipe_digest
    (project / "recipes" / "mine.yaml").write_text("name: mine\ntrain: {epochs: 2}\n")
    assert ask().checked().recipe_digest != before
    (project / "recipes" / "mine.yaml").write_text("# a comment\nname: mine\n")
    assert ask().checked().recipe_digest == before
    assert ask(overrides=("train.epochs=2",)).checked().recipe_digest != before
