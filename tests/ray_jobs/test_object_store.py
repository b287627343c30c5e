"""A home in an S3-compatible object store: training, a killed worker and the artifacts there, as in a folder."""

import os
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from app.ledger import Ledger
from app.storage import Home
from ray_jobs.train import train
from tests.conftest import free_ports
from tests.ray_jobs.local_ray import local_ray
from tests.ray_jobs.test_train import a_worker_killed_after, make_stage, recipe_for, stage, steps_of  # noqa: F401

pytestmark = pytest.mark.full
BUCKET = "prefloop-test"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """moto's S3 on a port of this machine; Ray's processes inherit where it is."""
    moto = pytest.importorskip("moto.server", reason="the extra `cluster-test` is not installed")
    import boto3
    from s3fs import S3FileSystem

    [port] = free_ports(1)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("PREFLOOP_SIGNING_KEY", "s" * 32)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}/home"
    server.stop()
    # fsspec keeps what was opened, with the address of then, for the next test that has another store.
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def far(bucket, tiny_model, tmp_path_factory):
    """The stage of the train job, in the bucket; its ledger is a file, since all nodes are of this machine."""
    scratch = tmp_path_factory.mktemp("far")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFLOOP_LEDGER", f"sqlite:///{scratch / 'ledger.db'}")
        home = Home.at(bucket)
        made = make_stage(home, Ledger.open(home.ledger_url), tiny_model, scratch)
        with local_ray(num_cpus=6):
            yield made
        made[1].close()


def test_a_run_in_an_object_store_ends_with_the_bits_of_one_in_a_folder(far, stage, claim):  # noqa: F811
    weights = {}
    for made, name in ((stage, "here"), (far, "there")):
        home, ledger, _, snapshot_id, sft = made
        if name == "there":
            with a_worker_killed_after(ledger, name, steps=5) as killed:
                result = train(home, ledger, recipe_for(sft), snapshot_id, run_id=name)
            assert len(killed) == 1
        else:
            result = train(home, ledger, recipe_for(sft), snapshot_id, run_id=name)
        with home.artifact("models", result.model.model_id).local_copy() as folder:
            weights[name] = load_file(folder / "model.safetensors")
        assert [s["step"] for s in steps_of(ledger, name)] == list(range(1, result.steps + 1))
    assert all(torch.equal(weights["here"][name], weights["there"][name]) for name in weights["here"])
    assert [name[:5] for name in far[0].names("runs/there/checkpoints")] == ["step-", "step-"]
    assert not os.path.exists("s3:"), "nothing of it became a folder"  # noqa: PTH110
    claim(
        "training in an S3-compatible store, a worker killed: the weights are those of a run in a folder",
        figure=f"{len(weights['here'])} tensors equal",
    )
