"""Where the tests of the training core begin: the tiny model, registered."""

import shutil
from functools import partial

import pytest

from app.models import Lineage, load_model, register_folder


@pytest.fixture
def start(home, ledger, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    row = register_folder(home, ledger, folder, name="tiny", lineage=Lineage(kind="sft"))
    return partial(load_model, home, row.model_id, dtype="float32")
