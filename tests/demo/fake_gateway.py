"""A gateway over real HTTP, in a thread: answers from a function, idempotent feedback, and trouble on demand."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "pl-test"


class FakeGateway:
    """Keeps what it was told; `answer(prompt, k)` gives text and finish reason of the k-th answer to a prompt."""

    def __init__(self, answer: Callable[[str, int], tuple[str, str]]) -> None:
        self.answer = answer
        self.responses: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.posts = 0
        self.in_flight = self.most_in_flight = 0
        self.trouble: Callable[[int], int | None] = lambda _number: None
        self.pause = 0.0
        self._asked: dict[str, int] = {}
        self._lock = threading.Lock()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = gateway.handle(self.path, body, self.headers.get("Authorization"))
                raw = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that was killed is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "FakeGateway":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, path: str, body: dict[str, Any], authorization: str | None) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.posts += 1
            number = self.posts
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.pause:
                time.sleep(self.pause)
            if authorization != f"Bearer {KEY}":
                return 401, {"error": {"message": "wrong key"}}
            status = self.trouble(number)
            if status is not None:
                return status, {"error": {"message": "trouble"}}
            with self._lock:
                return self._complete(body) if path == "/v1/chat/completions" else self._record(path, body)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = body["messages"][-1]["content"]
        n = self._asked.get(prompt, 0)
        self._asked[prompt] = n + 1
        text, reason = self.answer(prompt, n)
        name = f"resp-{len(self.responses)}"
        self.responses[name] = {**body, "text": text, "finish_reason": reason}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return 200, {"id": name, "model": "sft-abc", "choices": [choice]}

    def _record(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        named = [body[key] for key in ("response_id", "response_a", "response_b") if key in body]
        if any(name not in self.responses for name in named):
            return 404, {"error": {"message": "unknown response"}}
        known = self.events.get(body["event_id"])
        if known is not None and known != {"path": path, **body}:
            return 409, {"error": {"message": "another content"}}
        self.events[body["event_id"]] = {"path": path, **body}
        return 201, {"event_id": body["event_id"], "response_id": named[0], "revision": 1}
