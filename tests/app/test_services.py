"""What is said of a recorded service: gone, running, or not to be known."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.errors import ServiceError
from app.services import ServeApi


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


def test_what_listens_here_is_not_asked_through_a_proxy(dashboard, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ServeApi(dashboard.url).reachable() is True
