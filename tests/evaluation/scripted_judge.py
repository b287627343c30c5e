"""A judge behind HTTP whose verdicts are a function of what it is asked: a fake of the model, not of the endpoint."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Asked:
    """One request as the judge sees it."""

    system: str
    user: str
    body: dict
    authorization: str | None

    @property
    def nonce(self) -> str:
        return re.search(r"carry the code (\w+)", self.system).group(1)

    def block(self, title: str) -> str:
        tag = f"{re.escape(title)} {self.nonce}"
        return re.search(rf"<{tag}>\n(.*?)\n</{tag}>", self.user, re.DOTALL).group(1)


Answering = Callable[[Asked], str]


@dataclass
class ScriptedJudge:
    """What to say, and a log of what was asked."""

    answer: Answering
    seconds: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next replies, before it answers."""
    finish_reason: str = "stop"
    model: str = ""
    """Who says that it answers; empty: whoever was asked."""
    error: str = "scripted"
    """What a reply with another status than 200 says."""
    usage: bool = True
    broken: set[int] = field(default_factory=set)
    """Numbers of the replies whose body is no JSON, though they say so."""
    most_at_once: int = 0
    url: str = ""


@contextmanager
def scripted_judge(answer: Answering, **options) -> Iterator[ScriptedJudge]:
    """Serve the judge on a port of 127.0.0.1 until the block ends."""
    judge = ScriptedJudge(answer, **options)
    lock = threading.Lock()
    at_once = [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            first, last = body["messages"][0], body["messages"][-1]
            system = first["content"] if first["role"] == "system" else ""
            asked = Asked(system, last["content"], body, self.headers["Authorization"])
            with lock:
                at_once[0] += 1
                judge.most_at_once = max(judge.most_at_once, at_once[0])
                judge.asked.append(asked)
                status = judge.statuses.pop(0) if judge.statuses else 200
            time.sleep(judge.seconds)
            with lock:
                at_once[0] -= 1
            self.reply(status, judge.answer(asked) if status == 200 else "", judge.model or body["model"])

        def reply(self, status, text, model):
            message = {"role": "assistant", "content": text}
            content = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": judge.finish_reason}],
            }
            if judge.usage:
                content["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            if len(judge.asked) - 1 in judge.broken:
                content = None
            payload = (
                b'{"choices": ['
                if content is None
                else json.dumps(content if status == 200 else {"error": {"message": judge.error}}).encode()
            )
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
