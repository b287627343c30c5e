"""One step of the actual train job, two workers, equals one step of TRL 1.16 on the same rows, for each shared objective."""

import re
from dataclasses import replace

import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import load_file

from app.config import REFERENCE_FREE, PairSection
from app.ledger import Ledger, RunStepRow, SnapshotRow
from app.models import Lineage, ensure_sft, load_model, save_model
from app.preferences.snapshots import write_pair_snapshot
from app.schemas import Response, Split
from app.storage import Home
from app.training.judgements import divide
from app.training.snapshots import Binding, read_groups, write_training_snapshot
from ray_jobs.prepare import prepare
from ray_jobs.train import train
from tests.bench.trl_steps import OBJECTIVES, trl_step
from tests.ray_jobs.local_ray import local_ray
from tests.ray_jobs.test_objectives import pair, prompt, recipe_for

IN_CI = ("dpo", "orpo")
FIRST_MOMENT = 0.1
"""Share of a gradient that AdamW's first step keeps of it."""


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model):
    """A home whose champion, where training starts, is some way off the SFT model, which is the reference."""
    home = Home.at(tmp_path_factory.mktemp("job") / "home")
    ledger = Ledger.open(home.ledger_url)
    sft = ensure_sft(home, ledger, str(tiny_model))
    loaded = load_model(home, sft.model_id, dtype="float32")
    with torch.no_grad():
        for seed, parameter in enumerate(loaded.model.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    champion = save_model(
        home, ledger, loaded.model, loaded.tokenizer, name="moved", lineage=Lineage("full", sft.model_id)
    )
    ledger.set_champion("default", champion.model_id, expected_revision=0, actor="test", reason="to start from")
    rows = [
        pair(prompt(i), *(Response(f"{word} {i}" * (1 + (i + k) % 2)) for k, word in enumerate(("yes", "no"))))
        for i in range(24)
    ]
    pairs = write_pair_snapshot(
        home, ledger, rows, section=PairSection(), quarantine=(), counts={}, origin={"kind": "import"}
    )
    yield home, ledger, pairs.snapshot_id, sft.model_id, champion.model_id
    ledger.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_CI else pytest.mark.full) for name in OBJECTIVES]
)
def test_a_step_of_the_job_has_the_loss_and_the_gradient_of_trl(cluster, stage, tiny_model, tmp_path, name):
    home, ledger, pairs, sft, champion = stage
    objective, options = name.split()[0], OBJECTIVES[name]
    section = {"adapter": "full", "batch_pairs": 1000, "epochs": 1, "max_grad_norm": 1e9}
    recipe = recipe_for(str(tiny_model), objective, options=options, **section)
    policy, reference = champion, sft
    if objective == "kto":
        # The other way round, or its KL is below 0 here, which counts as 0.
        policy, reference = sft, champion
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"start": "sft"})})
    elif objective not in REFERENCE_FREE:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"reference_model": "sft"})})
    prepared = prepare(home, ledger, recipe, pairs)
    if objective == "orpo":
        prepared = with_prompts_of_one_token(home, ledger, prepared)
    run_id = f"run-{re.sub(r'[^a-z_]+', '-', name)}"
    assert train(home, ledger, recipe, prepared.snapshot_id, run_id=run_id).steps == 1
    with ledger.read() as session:
        row = session.scalars(sa.select(RunStepRow).where(RunStepRow.run_id == run_id)).one()
    divided = [divide(g) for g in read_groups(home.artifact("training", prepared.snapshot_id), Split.TRAIN)]
    rival = load_model(home, policy, dtype="float32")
    loss, gradients = trl_step(
        objective,
        recipe.train.options,
        policy=rival.model.requires_grad_(requires_grad=True),
        reference=load_model(home, reference, dtype="float32").model,
        tokenizer=rival.tokenizer,
        groups=[own for own, _ in divided],
        strangers=[others for _, others in divided if others is not None],
        folder=tmp_path,
    )
    assert row.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert objective != "kto" or row.metrics["kl"] > 0.01
    moments = moments_of(home, run_id)
    assert moments.keys() == gradients.keys()
    ours, theirs = (
        torch.cat([found[n].double().flatten() for n in sorted(gradients)])
        for found in ({n: moment / FIRST_MOMENT for n, moment in moments.items()}, gradients)
    )
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-4
    assert row.metrics["grad_norm"] == pytest.approx(float(theirs.norm()), rel=1e-4)


def moments_of(home: Home, run_id: str) -> dict[str, torch.Tensor]:
    """What the job's own checkpoint has of the first moments after its one step, by the names of the plain model."""
    [*_, newest] = home.names(f"runs/{run_id}/checkpoints")
    files = home.local("runs", run_id, "checkpoints", newest).glob("state-*.safetensors")
    kept = {name: tensor for path in files for name, tensor in load_file(path).items()}
    prefix = "optimizer/exp_avg/model."
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}


def with_prompts_of_one_token(home: Home, ledger: Ledger, prepared: SnapshotRow) -> SnapshotRow:
    """TRL's ORPO counts the likelihood of the prompt too, but for its first token."""
    artifact = home.artifact("training", prepared.snapshot_id)
    groups = [replace(g, prompt_ids=g.prompt_ids[-1:]) for split in Split for g in read_groups(artifact, split)]
    binding = Binding(**artifact.manifest()["binding"])
    return write_training_snapshot(home, ledger, groups, binding=binding, counts={}, rows_per_file=1000)
