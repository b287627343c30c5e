"""Traffic across a switch counts what happened: versions, failures, cut streams, streams that cross."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.config import CollectSection
from app.demo.traffic import STREAMS, Traffic


class Service:
    """Answers as `model`; `fails`, `cuts` and `breaks` make trouble; streams end only while `flows` is set."""

    def __init__(self):
        self.model, self.fails, self.cuts, self.breaks = "old", False, False, False
        self.flows, self.held = threading.Event(), threading.Semaphore(0)
        self.flows.set()


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    """Eighteen clients connect anew for each request; five places (the default) refuse some on a slow machine."""


@contextmanager
def served(service: Service):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["metadata"] == {"origin": "simulated"}
            model = service.model
            self.send_response(500 if service.fails else 200)
            self.end_headers()
            if not body.get("stream"):
                self.wfile.write(json.dumps({"model": model}).encode())
                return
            for _ in range(10):
                self.wfile.write(f"data: {json.dumps({'model': model})}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.02)
            if not service.flows.is_set():
                service.held.release()
                service.flows.wait(30)
            if service.breaks:
                self.wfile.write(b'data: {"error": {"message": "the model failed"}}\n\n')
            if not service.cuts:
                self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def section(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say hello"}\n{"prompt": "What is the time?"}\n')
    return CollectSection(style="unused", prompts=str(prompts), switch_requests=40)


def test_a_clean_switch_shows_both_versions_and_streams_that_cross_it(section):
    service = Service()
    with served(service) as url, Traffic(url, "key", section) as traffic:
        traffic.wait_for_answers()
        service.flows.clear()
        assert all(service.held.acquire(timeout=30) for _ in range(STREAMS)), "all streams are open"
        service.model = "new"
        traffic.mark_switch(to="new")
        service.flows.set()
        traffic.wait_for_answers(from_model="new")
    report = traffic.report()
    assert report["requests_during_switch"] >= 40
    assert report["failed_requests"] == 0, report["failures"]
    assert set(report["models_seen"]) == {"old", "new"}
    assert report["streams_across_switch"] == STREAMS


@pytest.mark.parametrize("trouble", ["fails", "cuts", "breaks"])
def test_a_refused_request_a_cut_stream_and_one_that_ends_in_an_error_are_failures(section, trouble):
    service = Service()
    with served(service) as url, Traffic(url, "key", section) as traffic:
        traffic.wait_for_answers()
        assert traffic.report()["failures"] == []
        setattr(service, trouble, True)
        time.sleep(0.6)
    assert traffic.report()["failed_requests"] > 0
