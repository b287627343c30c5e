"""What a deployment refuses and stops, without a cluster."""

import signal
import subprocess
import sys

import pytest

from app.config import ServingSection
from app.errors import ServiceError
from app.services import Services
from app.storage import LEDGER_VARIABLE, Home
from serving.application import Gateway, ServiceArgs
from serving.deploy import _check_http_options, main


@pytest.fixture(autouse=True)
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def bystander():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) as process:
        yield process
        process.kill()


def test_stop_leaves_a_process_alone_that_took_over_a_recorded_id(tmp_path, monkeypatch, bystander):
    home = Home.at(tmp_path / "home")
    monkeypatch.setenv("PREFLOOP_HOME", home.uri)
    nowhere = "http://127.0.0.1:9"
    taken = {"pid": bystander.pid, "pid_started": 1.0, "ray_pid": bystander.pid, "ray_started": 1.0}
    Services(nowhere, nowhere, "127.0.0.1:9", **taken).write(home)
    assert main(["--stop"]) == 0
    assert bystander.poll() is None
    assert Services.read(home) is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"host": "127.0.0.1", "port": 8000, "request_timeout_s": 300.0}, None),
        ({"request_timeout_s": 300.0}, None),  # where it listens is not told
        ({"port": 8001, "request_timeout_s": 300.0}, "with port 8001, .* asks for port 8000.*--set serving.port=8001"),
        ({"port": 8000}, "with request_timeout_s none, .* asks for request_timeout_s 300.*use a cluster of its own"),
    ],
)
def test_options_that_a_running_serve_would_ignore_are_refused(found, words):
    if words is None:
        _check_http_options(ServingSection(), found)
        return
    with pytest.raises(ServiceError, match=f"(?s){words}"):
        _check_http_options(ServingSection(), found)


def test_a_gateway_that_would_write_to_another_ledger_than_the_jobs_read_is_refused_without_telling_a_password(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(LEDGER_VARIABLE, "postgresql://me:secret@here/feedback")
    args = ServiceArgs(
        home=str(tmp_path / "home"), ledger="postgresql://me:***@there/feedback", serving=ServingSection()
    )
    with pytest.raises(ServiceError, match=r"me:\*\*\*@here/feedback.*me:\*\*\*@there/feedback") as refusal:
        Gateway(args, None).__serve_build_asgi_app__()
    assert "secret" not in str(refusal.value)
