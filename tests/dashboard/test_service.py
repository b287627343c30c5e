import itertools
import shlex
import stat

import pytest

from app.errors import ServiceError
from app.schemas import Message
from app.storage import Home
from dashboard.service import Gateway, Jobs
from tests.dashboard.stage import FakeService


@pytest.fixture
def jobs(service: FakeService, home: Home) -> Jobs:
    return Jobs(service.url, home, recipe="/recipes/a b.yaml", actor="dashboard:x")


def gateway(service: FakeService) -> Gateway:
    return Gateway(service.url, "key", subject="someone")


def test_an_answer_grows_until_it_is_complete(service: FakeService) -> None:
    service.replies = ["Zwölf Boxkämpfer 🥊 jagen"]
    seen = list(gateway(service).ask([Message("user", "?")], conversation_id="c"))
    assert [a.finish_reason for a in seen[:-1]] == [None] * (len(seen) - 1)
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(seen))
    assert (seen[-1].text, seen[-1].finish_reason) == ("Zwölf Boxkämpfer 🥊 jagen", "stop")


def test_a_stream_without_its_end_is_an_error(service: FakeService) -> None:
    service.finish_reason = None
    with pytest.raises(ServiceError, match="cut off"):
        list(gateway(service).ask([Message("user", "?")], conversation_id="c"))


@pytest.mark.parametrize("status, remedy", [(401, "same PREFLOOP_HOME"), (429, "try again"), (503, "try again")])
def test_a_refusal_names_the_status_and_the_remedy(service: FakeService, status: int, remedy: str) -> None:
    service.fail_with = status
    with pytest.raises(ServiceError, match=f"{status}.*(?s:.*){remedy}"):
        gateway(service).give_feedback("r", "thumb", "up", event_id="e")


def test_the_answers_and_the_feedback_carry_the_key_and_the_subject(service: FakeService) -> None:
    gateway(service).give_feedback("r", "thumb", "up", event_id="e")
    assert service.authorizations == ["Bearer key"]
    assert service.feedback[0]["user"] == "someone"
    assert service.feedback[0]["origin"] == "user"


def test_a_job_runs_a_fixed_command_with_quoted_arguments(jobs: Jobs, service: FakeService) -> None:
    jobs.ship("seen-1", submission_id="one")
    words = shlex.split(service.jobs["one"]["entrypoint"])
    assert words[1:] == ["-m", "ray_jobs.ship", "/recipes/a b.yaml", "--model", "seen-1", "--actor", "dashboard:x"]


@pytest.mark.parametrize("name", ["--rollback", "a;b", "a b", "$(a)", "../a", ""])
def test_a_name_that_is_no_model_id_is_never_submitted(jobs: Jobs, service: FakeService, name: str) -> None:
    with pytest.raises(ServiceError, match="no model id"):
        jobs.ship(name, submission_id="one")
    assert not service.jobs


def test_the_same_click_twice_is_one_job(jobs: Jobs, service: FakeService) -> None:
    assert jobs.build_pairs(submission_id="one") == jobs.build_pairs(submission_id="one") == "one"
    assert len(service.jobs) == 1


def test_no_secret_is_in_what_a_job_shows(jobs: Jobs, service: FakeService, home: Home) -> None:
    jobs.roll_back(submission_id="one")
    shown = str(service.jobs["one"])
    assert home.api_key() not in shown
    assert "token-of-the-cluster" not in shown


def test_without_a_recipe_no_job_starts(service: FakeService, home: Home) -> None:
    with pytest.raises(ServiceError, match="prefloop dashboard RECIPE.yaml"):
        Jobs(service.url, home, recipe=None, actor="x").build_pairs(submission_id="one")


def test_jobs_carry_the_token_of_the_cluster(jobs: Jobs, service: FakeService) -> None:
    jobs.build_pairs(submission_id="one")
    jobs.find("one")
    jobs.log_tail("one")
    assert service.authorizations == ["Bearer token-of-the-cluster"] * 3


def test_the_key_of_the_home_is_private(home: Home) -> None:
    home.api_key()
    assert stat.S_IMODE(home.local("api_key").stat().st_mode) == 0o600
