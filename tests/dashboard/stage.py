"""What the dashboard's tests play with: a service that speaks real HTTP in place of the real one, and rows to read."""

import json
import threading
from collections import Counter
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from app.ledger import EvaluationRow, Ledger, ModelRow, ResponseRow, RunRow, RunStepRow, SnapshotRow, now
from app.schemas import PAIR_SCHEMA, Message, Pair, Response, content_hash
from app.storage import Home


class FakeService:
    """The gateway and Ray's Jobs API on one port: OpenAI shaped, streaming, and it remembers what it was sent."""

    def __init__(self) -> None:
        self.model_id = "sft-000000000000"
        self.revision = 1
        self.health_status = "ok"
        self.replies: list[str] = []
        self.finish_reason: str | None = "stop"
        self.asked: list[dict[str, Any]] = []
        self.feedback: list[dict[str, Any]] = []
        self.comparisons: list[dict[str, Any]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.job_end: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0}
        self.authorizations: list[str | None] = []
        self.fail_with: int | None = None
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _json(self, status: int, body: Any) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                service.authorizations.append(self.headers.get("Authorization"))
                if self.path == "/healthz":
                    ready = service.health_status != "unavailable"
                    model = {"model_id": service.model_id, "revision": service.revision} if ready else {}
                    self._json(200 if ready else 503, {"status": service.health_status, **model})
                elif self.path.endswith("/logs"):
                    self._json(200, {"logs": f"log of {self.path.split('/')[3]}"})
                elif self.path.startswith("/api/jobs/") and self.path.split("/")[3] in service.jobs:
                    job = service.jobs[self.path.split("/")[3]]
                    job["polls"] += 1
                    end = service.job_end if job["polls"] > 1 else {"status": "RUNNING"}
                    self._json(200, {"message": "", **end})
                else:
                    self._json(404, {"error": {"message": f"no {self.path}"}})

            def do_POST(self) -> None:
                service.authorizations.append(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if service.fail_with is not None:
                    self._json(service.fail_with, {"error": {"message": "the test wants it so"}})
                elif self.path == "/v1/chat/completions":
                    service.asked.append(body)
                    self._stream(len(service.asked))
                elif self.path == "/v1/feedback":
                    service.feedback.append(body)
                    self._json(201, {"event_id": body["event_id"], "response_id": body["response_id"], "revision": 1})
                elif self.path == "/v1/comparisons":
                    service.comparisons.append(body)
                    self._json(201, {"event_id": body["event_id"], "revision": 1})
                elif self.path == "/api/jobs/":
                    known = body["submission_id"] in service.jobs
                    service.jobs.setdefault(body["submission_id"], {**body, "polls": 0})
                    self._json(500, "job already exists") if known else self._json(200, {})
                else:
                    self._json(404, {})

            def _stream(self, number: int) -> None:
                text = service.replies[number - 1] if number <= len(service.replies) else f"Answer number {number}."
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                head = {"id": f"response-{number}", "model": service.model_id, "object": "chat.completion.chunk"}
                for start in range(0, len(text), 7):
                    delta = {"content": text[start : start + 7]}
                    chunk = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                if service.finish_reason is not None:
                    last = {"index": 0, "delta": {}, "finish_reason": service.finish_reason}
                    self.wfile.write(f"data: {json.dumps({**head, 'choices': [last]})}\n\ndata: [DONE]\n\n".encode())
                self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def add_response(ledger: Ledger, number: int, text: str = "An answer.", **changes: Any) -> str:
    response_id = f"response-{number}"
    fields: dict[str, Any] = {
        "response_id": response_id,
        "deployment": "default",
        "conversation_id": f"conversation-{number}",
        "turn": 0,
        "messages": [{"role": "user", "content": f"Question {number}?"}],
        "tools": None,
        "prompt_key": content_hash(number),
        "text": text,
        "tool_calls": None,
        "prompt_digest": None,
        "token_ids": [1, 2],
        "logp": -1.0,
        "finish_reason": "stop",
        "template_digest": "template",
        "model_id": "sft-000000000000",
        "arm": "champion",
        "sampling": {},
        "shown_order": None,
        "subject": "someone",
        "origin": "served",
        "created_at": now(),
    }
    ledger.record_response(ResponseRow(**{**fields, **changes}))
    return response_id


def add_model(ledger: Ledger, model_id: str, *, verdict: str | None = None, **changes: Any) -> ModelRow:
    digest = content_hash(model_id)
    fields: dict[str, Any] = {
        "model_id": model_id,
        "digest": digest,
        "uri": f"models/{model_id}",
        "kind": "merged",
        "parent_id": None,
        "run_id": None,
        "snapshot_id": None,
        "manifest": {},
        "created_at": now(),
    }
    row = ModelRow(**{**fields, **changes})
    with ledger.write() as session:
        session.add(row)
        if verdict is not None:
            session.add(evaluation(row, verdict))
    return row


def evaluation(model: ModelRow, verdict: str, **changes: Any) -> EvaluationRow:
    ships = verdict == "SHIP"
    rules = [
        {
            "name": "win_rate_over_champion",
            "metric": "win rate",
            "value": 0.71 if ships else 0.49,
            "low": 0.63 if ships else 0.41,
            "high": 0.79 if ships else 0.57,
            "n": 120,
            "comparison": ">",
            "threshold": 0.5,
            "passed": ships,
            "reason": "beats the champion" if ships else "the lower bound does not exceed 50 %",
        },
        {
            "name": "golden",
            "metric": "share of golden prompts",
            "value": 1.0,
            "low": None,
            "high": None,
            "n": 20,
            "comparison": ">=",
            "threshold": 1.0,
            "passed": True,
            "reason": "20 of 20 golden prompts pass",
        },
    ]
    fields: dict[str, Any] = {
        "evaluation_id": f"evaluation-{model.model_id}",
        "deployment": "default",
        "model_id": model.model_id,
        "model_digest": model.digest,
        "champion_id": "sft-000000000000",
        "sft_id": "sft-000000000000",
        "verdict": verdict,
        "report": {"rules": rules, "judge": "the rules of style `demo`", "level": 0.95},
        "run_id": None,
        "created_at": now(),
    }
    return EvaluationRow(**{**fields, **changes})


def add_run(ledger: Ledger, run_id: str, *, steps: int = 0, **changes: Any) -> RunRow:
    fields: dict[str, Any] = {
        "run_id": run_id,
        "kind": "train",
        "status": "succeeded",
        "recipe": {"name": "seen", "train": {"beta": 0.1}, "serving": {"deployment": "default"}},
        "snapshot_id": None,
        "start_model_id": "sft-000000000000",
        "reference_model_id": "sft-000000000000",
        "output_model_id": None,
        "metrics": {"total_steps": steps},
        "error": None,
        "job_id": None,
        "attempt": 1,
        "code_version": "0",
        "created_at": now(),
        "updated_at": now(),
    }
    row = RunRow(**{**fields, **changes})
    with ledger.write() as session:
        session.add(row)
        session.flush()
        session.add_all(
            RunStepRow(
                run_id=run_id,
                step=step,
                metrics={
                    "loss": 0.7 - 0.01 * step,
                    "reward_accuracy": 0.5 + 0.01 * step,
                    "reward_margin": 0.02 * step,
                    "reward_chosen": 0.01 * step,
                    "reward_rejected": -0.01 * step,
                    "logp_chosen": -40.0 + step,
                    "logp_rejected": -42.0,
                },
                created_at=now(),
            )
            for step in range(1, steps + 1)
        )
    return row


def pair(number: int, *, source: str = "edit", split: str = "train", text: str = "") -> Pair:
    return Pair(
        prompt=(Message("user", f"Question {number}? {text}"),),
        chosen=Response(f"A better answer {number}. {text}"),
        rejected=Response(f"An answer {number}. {text}", response_id=f"response-{number}"),
        source=source,
        split=split,
        cluster=f"cluster-{number}",
        response_ids=(f"response-{number}",),
        event_ids=(f"event-{number}",),
        subject="subject-hash",
    )


def add_pairs(
    home: Home, ledger: Ledger, pairs: list[Pair], *, snapshot_id: str = "pairs-1", age_s: float = 0, **manifest: Any
) -> str:
    artifact = home.artifact("pairs", snapshot_id)
    rows = artifact.write_rows((p.to_row() for p in pairs), PAIR_SCHEMA, rows_per_file=1000)
    kinds = Counter(p.kind for p in pairs)
    counts = {
        "responses": 9,
        "events": {"thumb": 5, "edit": 4},
        "simulated_events": 3,
        "candidates": {"pairs": {"edit": rows}, "unpaired": {}},
        "by_kind": dict(kinds),
    }
    content = artifact.write_manifest(
        {
            "rows": rows,
            "dropped": {},
            "counts": counts,
            "origin": {"kind": "ledger", "deployment": "default"},
            **manifest,
        }
    )
    with ledger.write() as session:
        session.add(
            SnapshotRow(
                snapshot_id=snapshot_id,
                kind="pairs",
                uri=artifact.uri,
                manifest=content,
                parent_id=None,
                created_at=now() - timedelta(seconds=age_s),
            )
        )
    return snapshot_id
