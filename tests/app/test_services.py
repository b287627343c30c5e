"""What is said of a recorded service: gone, running, or not to be known."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from app.errors import ServiceError
from app.services import ServeApi, is_near


@pytest.fixture
def dashboard():
    """A dashboard that answers with `status`, and is asked through no proxy."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status = 200
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_only_a_refused_connection_means_that_nothing_runs(dashboard):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert ServeApi(f"http://127.0.0.1:{unused.getsockname()[1]}").reachable() is False
    assert ServeApi(dashboard.url).reachable() is True
    for status in (401, 503):
        dashboard.status = status
        with pytest.raises(ServiceError, match=f"refused with {status}"):
            ServeApi(dashboard.url).reachable()


def test_a_silence_is_not_a_refusal(monkeypatch):
    def silent(*_, **__):
        raise httpx.ConnectTimeout("nothing came back")

    monkeypatch.setattr(httpx, "request", silent)
    with pytest.raises(ServiceError, match=r"does not answer \(ConnectTimeout\)(?s:.*)remove `services.json`"):
        ServeApi("http://192.0.2.1:8265").reachable()


@pytest.mark.parametrize(
    ("host", "near"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("[::1]", True),
        ("10.1.2.3", True),
        ("100.64.0.7", True),
        ("ray-head", True),
        ("ray-head.team.svc", True),
        ("ray-head.team.svc.cluster.local", True),
        ("ray.example.com", False),
        ("8.8.8.8", False),
    ],
)
def test_only_what_is_far_is_asked_through_the_proxy_of_the_environment(host, near):
    assert is_near(f"http://{host}:8265/x") == near


def test_what_listens_here_is_not_asked_through_a_proxy(dashboard, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ServeApi(dashboard.url).reachable() is True
