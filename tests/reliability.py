"""RELIABILITY.md: what the product claims to survive, each with the test that shows it and the figure it found last.

A test of a claim takes the fixture `claim` and says what it found; `pytest --reliability FILE` writes the table. Of a run
of all tests it is what was found and nothing else; in that of some tests, rows of those that did not run stay as they were.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_HEADER = "| claim | test | figure | seed |"
_ROW = re.compile(r"^\| (?P<claim>.+?) \| `(?P<test>[^`]+)` \| (?P<figure>.*?) \| (?P<seed>.*?) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Claim:
    """One row."""

    claim: str
    test: str
    """File and function."""
    figure: str
    seed: str

    def line(self) -> str:
        """As a row of the table."""
        return f"| {self.claim} | `{self.test}` | {self.figure} | {self.seed} |"


def read_claims(text: str) -> list[Claim]:
    """Return the rows of a table."""
    return [Claim(**found.groupdict()) for found in _ROW.finditer(text) if found["claim"] != "claim"]


def table(claims: Sequence[Claim]) -> str:
    """Return the table, in the order of tests and claims."""
    rows = [claim.line() for claim in sorted(claims, key=lambda c: (c.test, c.claim))]
    return "\n".join([_HEADER, "|---|---|---|---|", *rows])


def merged(text: str, old: Sequence[Claim], found: Sequence[Claim]) -> str:
    """Return the document with the rows that were found, and those old ones that they do not replace."""
    kept = {(claim.test, claim.claim): claim for claim in (*old, *found)}
    before = text.partition(_HEADER)[0]
    return f"{before}{table(list(kept.values()))}\n"
