"""Shipping where no service runs: only the champion pointer moves."""

import shutil

import pytest

from app.config import parse_recipe
from app.errors import DataError, ServiceError
from app.ledger import EvaluationRow, now
from app.models import Lineage, ensure_sft, register_folder
from app.services import ServeApi, Services
from ray_jobs import ship as shipping
from ray_jobs.ship import roll_back, ship
from tests.conftest import signed, write_tiny_model


def verdict(model, sft, says="SHIP"):
    return EvaluationRow(
        evaluation_id="e",
        deployment="default",
        model_id=model.model_id,
        model_digest=model.digest,
        champion_id=sft.model_id,
        sft_id=sft.model_id,
        verdict=says,
        report={},
        created_at=now(),
    )


def test_the_first_ship_can_be_rolled_back_to_the_sft_model(home, ledger, tiny_model, tmp_path, monkeypatch):
    sft = ensure_sft(home, ledger, str(shutil.copytree(tiny_model, tmp_path / "sft")))
    folder = write_tiny_model(tmp_path / "new", seed=1)
    model = register_folder(home, ledger, folder, name="new", lineage=Lineage(kind="merged", parent_id=sft.model_id))
    with ledger.write() as session:
        session.add(signed(home, verdict(model, sft)))
    # What serves another deployment is left alone; nothing listens there.
    Services("http://127.0.0.1:9", "http://127.0.0.1:9", "127.0.0.1:9", deployment="demo").write(home)
    monkeypatch.setattr(ServeApi, "reachable", lambda _: True)
    recipe = parse_recipe({"name": "first"}, place="test")
    elsewhere = parse_recipe({"name": "first", "serving": {"deployment": "support"}}, place="test")
    for asked in (None, model.model_id):
        refused = ship(home, ledger, elsewhere, asked, "ana")
        assert (refused.shipped, ledger.champion("support")) == (False, None)
        assert "no evaluation for deployment `support`" in refused.reason
    shipped = ship(home, ledger, recipe, None, "ana")
    assert (shipped.shipped, shipped.champion_before, shipped.served) == (True, sft.model_id, False)
    back = roll_back(home, ledger, recipe, "ana")
    assert (back.shipped, back.model_id) == (True, sft.model_id)
    assert ledger.champion("default").previous_model_id == model.model_id


def test_a_hold_that_was_made_a_ship_in_the_ledger_ships_nothing(home, ledger, tiny_model, tmp_path):
    sft = ensure_sft(home, ledger, str(shutil.copytree(tiny_model, tmp_path / "sft")))
    folder = write_tiny_model(tmp_path / "new", seed=1)
    model = register_folder(home, ledger, folder, name="new", lineage=Lineage(kind="merged", parent_id=sft.model_id))
    held = signed(home, verdict(model, sft, "HOLD"))
    recipe = parse_recipe({"name": "first"}, place="test")
    for changes in ({"verdict": "SHIP"}, {"verdict": "SHIP", "report": {**held.report, "verdict": "SHIP"}}):
        with ledger.write() as session:
            row = session.merge(held)
            for column, value in changes.items():
                setattr(row, column, value)
        refused = ship(home, ledger, recipe, model.model_id, "mallory")
        assert (refused.shipped, ledger.champion("default")) == (False, None)
        assert "cannot be trusted" in refused.reason


def test_weights_that_were_changed_together_with_their_manifest_are_not_shipped(home, ledger, tiny_model, tmp_path):
    sft = ensure_sft(home, ledger, str(shutil.copytree(tiny_model, tmp_path / "sft")))
    folder = write_tiny_model(tmp_path / "new", seed=1)
    model = register_folder(home, ledger, folder, name="new", lineage=Lineage(kind="merged", parent_id=sft.model_id))
    with ledger.write() as session:
        session.add(signed(home, verdict(model, sft)))
    artifact = home.artifact("models", model.model_id)
    shutil.copy(write_tiny_model(tmp_path / "evil", seed=2) / "model.safetensors", artifact.path)
    manifest = artifact.manifest()
    del manifest["files"]
    artifact.write_manifest(manifest)
    artifact.verify()
    with pytest.raises(DataError, match=f"the files of `{model.model_id}` have digest"):
        ship(home, ledger, parse_recipe({"name": "first"}, place="test"), model.model_id, "mallory")


def test_a_service_that_cannot_be_told_that_the_champion_is_back_is_not_said_to_serve_it(
    home, ledger, tiny_model, tmp_path, monkeypatch
):
    sft = ensure_sft(home, ledger, str(shutil.copytree(tiny_model, tmp_path / "sft")))
    folder = write_tiny_model(tmp_path / "new", seed=1)
    model = register_folder(home, ledger, folder, name="new", lineage=Lineage(kind="merged", parent_id=sft.model_id))
    recipe = parse_recipe({"name": "first", "model": {"sft": str(tmp_path / "sft")}}, place="test")
    ledger.set_champion("default", sft.model_id, expected_revision=0, actor="ana", reason="first")
    ledger.set_champion("default", model.model_id, expected_revision=1, actor="ana", reason="second")

    def fails(words):
        def fail(*_, **__):
            raise ServiceError(words)

        return fail

    monkeypatch.setattr(shipping, "_serve", fails("1 of 2 replicas serve it"))
    monkeypatch.setattr(shipping, "_tell", fails("the dashboard does not answer"))
    with pytest.raises(ServiceError) as told:
        roll_back(home, ledger, recipe, "ana")
    for words in ("1 of 2 replicas", "the dashboard does not answer", f"may still change to `{sft.model_id}`"):
        assert words in str(told.value)
    assert ledger.champion("default").model_id == model.model_id
