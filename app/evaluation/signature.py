"""The signature of a verdict: what ships is what the gate said of these weights, and nobody changed a word since.

A report is signed as a whole (HMAC-SHA256, RFC 2104): digest of the weights, baselines, every rule and number. Whoever
can write to the ledger or to storage, but has not the key, can make no SHIP of a HOLD. This module does not know where
the key comes from; `Home.signing_key` does.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from app.ledger import EvaluationRow
from app.storage import same_signature, signature

_PURPOSE: Final = b"prefloop verdict/1\n"
_COLUMNS: Final = ("evaluation_id", "deployment", "model_id", "model_digest", "champion_id", "sft_id", "verdict")
"""What a ledger row repeats of its report, and jobs act on."""


def sign_report(report: Mapping[str, Any], key: bytes) -> dict[str, Any]:
    """Return the report as it will be read back (plain JSON), with its signature."""
    plain: dict[str, Any] = json.loads(json.dumps({**report, "signature": None}))
    del plain["signature"]
    return {**plain, "signature": signature(plain, key, purpose=_PURPOSE)}


def signature_fault(row: EvaluationRow, key: bytes) -> str:
    """Say why a stored verdict cannot be trusted; empty where it can."""
    report = dict(row.report)
    given = report.pop("signature", None)
    if given is None:
        return "it is not signed"
    if not same_signature(given, signature(report, key, purpose=_PURPOSE)):
        return "its signature is not that of its report and of this home's key"
    changed = [name for name in _COLUMNS if report.get(name) != getattr(row, name)]
    if changed:
        name = changed[0]
        return f"the ledger's `{name}` is `{getattr(row, name)}`, the signed report says `{report.get(name)}`"
    return ""
