"""A home with a ledger, and a running service, for each test."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st

from app.ledger import Ledger
from app.storage import Home
from tests.dashboard.stage import FakeService

RECIPE = """\
name: seen
pairs: {min_pairs: 4}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    recipe = tmp_path / "seen.yaml"
    recipe.write_text(RECIPE)
    monkeypatch.setenv("PREFLOOP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFLOOP_RECIPE", str(recipe))
    monkeypatch.delenv("PREFLOOP_LEDGER", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-of-the-cluster")
    st.cache_resource.clear()
    st.cache_data.clear()
    yield Home.from_environment()
    st.cache_resource.clear()


@pytest.fixture
def ledger(home: Home) -> Iterator[Ledger]:
    opened = Ledger.open(home.ledger_url)
    yield opened
    opened.close()


@pytest.fixture
def service(home: Home) -> Iterator[FakeService]:
    fake = FakeService()
    home.local().mkdir(parents=True, exist_ok=True)
    home.local("services.json").write_text(
        json.dumps({"gateway_url": fake.url, "ray_dashboard_url": fake.url, "ray_address": "127.0.0.1:6379", "pid": 1})
    )
    yield fake
    fake.close()
