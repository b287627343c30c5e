"""A verdict that anybody changed, in its report or in the columns that jobs act on, is not trusted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import DataError
from app.evaluation.signature import sign_report, signature_fault
from app.ledger import EvaluationRow, now
from app.storage import SIGNING_VARIABLE, Home
from tests.conftest import signed

KEY = b"k" * 32
COLUMNS = ("evaluation_id", "deployment", "model_id", "model_digest", "champion_id", "sft_id", "verdict")


def row(report=None):
    columns = {name: f"the {name}" for name in COLUMNS}
    return EvaluationRow(**columns, report=sign_report({**(report or {}), **columns}, KEY), created_at=now())


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_what_was_signed_is_trusted_whatever_it_holds(report):
    assert signature_fault(row(report), KEY) == ""


def test_a_report_with_another_word_or_of_another_key_is_not_trusted():
    changed = row({"rules": [{"passed": False}]})
    changed.report = {**changed.report, "rules": [{"passed": True}]}
    assert "not that of its report" in signature_fault(changed, KEY)
    assert "not that of its report" in signature_fault(row(), b"x" * 32)
    for wrong in ("", "0" * 64, 7, None):
        forged = row()
        forged.report = {**forged.report, "signature": wrong}
        assert signature_fault(forged, KEY)
    unsigned = row()
    unsigned.report = {}
    assert signature_fault(unsigned, KEY) == "it is not signed"


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_that_differs_from_the_signed_report_is_not_trusted(column):
    changed = row()
    setattr(changed, column, "SHIP")
    assert f"`{column}` is `SHIP`" in signature_fault(changed, KEY)


def test_numbers_as_keys_are_signed_as_they_are_read_back(home, ledger):
    stored = signed(home, row({"by_turn": {1: 7.25, 2: 1 / 3}}))
    with ledger.write() as session:
        session.add(stored)
    with ledger.read() as session:
        assert signature_fault(session.get_one(EvaluationRow, stored.evaluation_id), home.signing_key()) == ""


def test_the_key_is_that_of_the_environment_and_a_remote_home_has_no_other(home, monkeypatch):
    own = home.signing_key()
    assert (home.signing_key(), own == home.api_key().encode()) == (own, False)
    with pytest.raises(DataError, match=f"set {SIGNING_VARIABLE}"):
        Home("memory://elsewhere").signing_key()
    monkeypatch.setenv(SIGNING_VARIABLE, "s" * 32)
    assert home.signing_key() == Home("memory://elsewhere").signing_key() == b"s" * 32
    monkeypatch.setenv(SIGNING_VARIABLE, "short")
    with pytest.raises(DataError, match="has 5 characters, 32 are needed"):
        home.signing_key()


def test_a_key_that_others_can_read_or_write_signs_nothing(home):
    home.signing_key()
    home.local("signing_key").chmod(0o644)
    with pytest.raises(DataError, match="with mode 644, so others may have signed with it"):
        home.signing_key()
