"""Prepare: the second round's reference is the champion that was served, to the number."""

import io
import json
import math
import os
import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import ray
import ray.data
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.config import PairSection, parse_recipe
from app.errors import DataError, OutOfMemory, ServiceError
from app.generation import GenerationRequest, generate
from app.models import Lineage, ensure_sft, load_model, render_prompt, save_model
from app.preferences.snapshots import write_pair_snapshot
from app.schemas import Message, Pair, Response, Split
from app.storage import Home
from app.training.snapshots import read_groups
from ray_jobs.prepare import ReferenceScorer, prepare, print_summary
from tests.conftest import write_tiny_model
from tests.ray_jobs.local_ray import local_ray

TEXTS = [f"{word} question about {word}s?" for word in ("tree", "river", "stone", "cloud", "lamp", "engine")]


@pytest.fixture(scope="module")
def cluster():
    with local_ray(store_bytes=100 * 2**20):
        yield


def recipe_for(sft, **model):
    tree = {
        "name": "tiny",
        "model": {"sft": str(sft), **model},
        "prepare": {"max_length": 256},
        "train": {"dtype": "float32", "micro_batch_tokens": 128},
        "workers": {"workers": 2, "cpus_per_worker": 1},
    }
    return parse_recipe(tree, place="test")


def ship_another_model(home, ledger, sft_folder):
    sft = ensure_sft(home, ledger, str(sft_folder))
    ledger.set_champion("default", sft.model_id, expected_revision=0, actor="test", reason="first")
    model = AutoModelForCausalLM.from_pretrained(sft_folder)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer = AutoTokenizer.from_pretrained(sft_folder)
    champion = save_model(home, ledger, model, tokenizer, name="round1", lineage=Lineage("merged", sft.model_id))
    ledger.set_champion("default", champion.model_id, expected_revision=1, actor="test", reason="better")
    return sft, champion


def served_pairs(home, model_id, count=6):
    """Two sampled answers to each prompt, as the gateway records them, with the log-probabilities it reports."""
    loaded = load_model(home, model_id, dtype="float32")
    pairs, logps = [], {}
    for i in range(count):
        prompt = (Message("user", f"Question number {i}, please"),)
        ids = tuple(render_prompt(loaded.tokenizer, prompt, None))
        asked = [GenerationRequest(ids, temperature=1.0, top_p=1.0, max_tokens=12, seed=10 * i + k) for k in range(2)]
        answers = generate(loaded, asked)
        logps |= {answer.token_ids: answer.logp for answer in answers}
        responses = [
            Response(a.text or "x", a.finish_reason, a.token_ids, loaded.template_digest, model_id) for a in answers
        ]
        pairs.append(
            Pair(
                prompt,
                *responses,
                source="comparison",
                split="",
                cluster="",
                created_at=datetime(2026, 1, 1, tzinfo=UTC),
            )
        )
    return pairs, logps


def write(home, ledger, pairs):
    section = PairSection(held_out_fraction=0.3)
    row = write_pair_snapshot(home, ledger, pairs, section=section, quarantine=(), counts={}, origin={"kind": "ledger"})
    return row.snapshot_id


def scored(home, snapshot_id):
    artifact = home.artifact("training", snapshot_id)
    groups = [group for split in Split for group in read_groups(artifact, split)]
    return {ids: logp for g in groups for ids, logp in zip(g.responses, g.reference_logps, strict=True)}


@pytest.mark.full
def test_the_reference_of_round_2_is_the_served_champion_and_not_the_sft_model(cluster, home, ledger, tiny_model):
    _, champion = ship_another_model(home, ledger, tiny_model)
    pairs, served = served_pairs(home, champion.model_id)
    pair_snapshot = write(home, ledger, pairs)
    row = prepare(home, ledger, recipe_for(tiny_model), pair_snapshot)
    assert row.manifest["binding"]["reference_digest"] == champion.digest
    found = scored(home, row.snapshot_id)
    assert found.keys() == served.keys()
    for ids, logp in served.items():
        assert found[ids] == pytest.approx(logp, abs=1e-3)
    other = prepare(home, ledger, recipe_for(tiny_model, reference_model="sft"), pair_snapshot)
    assert other.snapshot_id != row.snapshot_id
    against_sft = scored(home, other.snapshot_id)
    assert max(abs(against_sft[ids] - logp) for ids, logp in served.items()) > 0.5


def test_what_the_reference_scored_before_is_not_scored_again(cluster, home, ledger, tiny_model):
    _, champion = ship_another_model(home, ledger, tiny_model)
    pairs, served = served_pairs(home, champion.model_id, count=6)

    def prepared(count, **settings):
        printed = io.StringIO()
        recipe = recipe_for(tiny_model)
        recipe = recipe.model_copy(update={"prepare": recipe.prepare.model_copy(update=settings)})
        snapshot = write(home, ledger, pairs[:count])
        row = prepare(home, ledger, recipe, snapshot, console=Console(file=printed, width=200))
        return row.snapshot_id, printed.getvalue()

    first, shown = prepared(4)
    assert "4 of 4" in shown
    assert prepared(4) == (first, "prepare: 4 prompts were scored before\n")
    assert "4 of 4" in prepared(4, reuse_scores=False)[1]
    more, shown = prepared(6)
    assert "2 of 2" in shown
    found = scored(home, more)
    for ids, logp in served.items():
        assert found[ids] == pytest.approx(logp, abs=1e-3)
    next(home.local("training", more).glob("train-*")).write_bytes(b"damaged")
    assert prepared(6)[0] == more
    home.artifact("training", more).verify()  # written again
    next(home.local("training", more).glob("train-*")).write_bytes(b"damaged")
    _, shown = prepared(5)
    assert f"scores of the training snapshot `{more}` are not used again, it is damaged" in " ".join(shown.split())
    assert "1 of 1" in shown, "the one before it had scored four of five"


class Dying(ReferenceScorer):
    """As one whose memory does not hold a batch."""

    def __call__(self, table):
        os._exit(9)


class Telling(ReferenceScorer):
    """Leaves a file in the home for each batch, named by its rows."""

    def __init__(self, home_uri, **settings):
        super().__init__(home_uri, **settings)
        self.folder = Home.at(home_uri).local("batches")

    def __call__(self, table):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{uuid.uuid4()}-{len(table)}").touch()
        return super().__call__(table)


def test_a_small_pass_of_the_reference_is_cut_for_all_actors(cluster, home, ledger, tiny_model, monkeypatch):
    pairs = [Pair((Message("user", t),), Response("a"), Response("b"), "import", "", "") for t in TEXTS]
    monkeypatch.setattr("ray_jobs.prepare.ReferenceScorer", Telling)
    prepare(home, ledger, recipe_for(tiny_model), write(home, ledger, pairs))
    rows = [int(path.name.rsplit("-", 1)[1]) for path in home.local("batches").iterdir()]
    assert sorted(rows) == [3, 3], "two actors"


def test_a_pass_of_the_reference_whose_actors_die_again_and_again_ends_with_a_remedy(
    cluster, home, ledger, tiny_model, monkeypatch
):
    _, champion = ship_another_model(home, ledger, tiny_model)
    pairs, _ = served_pairs(home, champion.model_id, count=1)
    monkeypatch.setattr("ray_jobs.prepare.ReferenceScorer", Dying)
    with pytest.raises(ServiceError, match=r"an actor that scores with the reference died more than twice(.|\n)*Hint"):
        prepare(home, ledger, recipe_for(tiny_model), write(home, ledger, pairs))


class Small(ReferenceScorer):
    """An actor whose memory holds one row of the tests' data."""

    fits = 150

    def _score(self, batch):
        if batch.input_ids.numel() > self.fits:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
        return super()._score(batch)


class TooSmall(Small):
    fits = 4


def test_a_pass_of_the_reference_goes_on_with_smaller_micro_batches_where_memory_does_not_hold_them(
    cluster, home, ledger, tiny_model, monkeypatch
):
    pairs = [Pair((Message("user", t),), Response(f"{t}!"), Response(f"{t}?"), "import", "", "") for t in TEXTS]
    snapshot_id = write(home, ledger, pairs)
    changes = {"prepare": {"max_length": 256, "reuse_scores": False}, "train": {"micro_batch_tokens": 512}}
    recipe = parse_recipe(
        {**recipe_for(tiny_model).model_dump(mode="json", exclude_unset=True), **changes}, place="test"
    )
    usual = scored(home, prepare(home, ledger, recipe, snapshot_id).snapshot_id)
    monkeypatch.setattr("ray_jobs.prepare.ReferenceScorer", Small)
    assert scored(home, prepare(home, ledger, recipe, snapshot_id).snapshot_id) == pytest.approx(usual, abs=1e-4)
    monkeypatch.setattr("ray_jobs.prepare.ReferenceScorer", TooSmall)
    with pytest.raises(
        OutOfMemory, match=r"an actor that scores with the reference did not hold a quarter(.|\n)*Hint: lower"
    ):
        prepare(home, ledger, recipe, snapshot_id)


def test_a_pass_of_the_reference_may_take_longer_for_a_block_than_ray_data_waits_for_one(
    cluster, home, ledger, tiny_model, monkeypatch
):
    _, champion = ship_another_model(home, ledger, tiny_model)
    pairs, served = served_pairs(home, champion.model_id, count=1)
    # Shorter than an actor takes to start.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.2)
    row = prepare(home, ledger, recipe_for(tiny_model), write(home, ledger, pairs))
    assert scored(home, row.snapshot_id).keys() == served.keys()


def test_scores_are_found_in_older_snapshots_where_data_sets_are_trained_on_in_turn(cluster, home, ledger, tiny_model):
    _, champion = ship_another_model(home, ledger, tiny_model)
    pairs, served = served_pairs(home, champion.model_id, count=6)

    def shown(members):
        printed = io.StringIO()
        snapshot = write(home, ledger, members)
        row = prepare(home, ledger, recipe_for(tiny_model), snapshot, console=Console(file=printed, width=200))
        return row.snapshot_id, printed.getvalue()

    first, told = shown(pairs[:3])
    assert "3 of 3" in told
    assert "3 of 3" in shown(pairs[3:])[1]
    assert shown(pairs[:3]) == (first, "prepare: 3 prompts were scored before\n")
    both, told = shown(pairs)
    assert told == "prepare: 6 prompts were scored before\n"
    found = scored(home, both)
    for ids, logp in served.items():
        assert found[ids] == pytest.approx(logp, abs=1e-3)


def test_a_snapshot_of_which_nothing_fits_the_window_says_why(cluster, home, ledger, tiny_model):
    pairs = [Pair((Message("user", "x" * 400),), Response("a"), Response("b"), "import", "", "")]
    pair_snapshot = write(home, ledger, pairs)
    with pytest.raises(DataError, match="can train: 1 prompt_longer_than_window"):
        prepare(home, ledger, recipe_for(tiny_model), pair_snapshot)


def test_rows_that_may_be_longer_than_the_context_are_refused_before_anything_is_tokenised(
    cluster, home, ledger, tiny_model
):
    tree = recipe_for(tiny_model).model_dump(mode="json")
    tree["prepare"]["max_length"] = 2049
    with pytest.raises(DataError, match=r"max_length = 2049 exceeds the context of `sft-\w+`, 2048 tokens"):
        prepare(home, ledger, parse_recipe(tree, place="test"), "no-snapshot")


def recipe_with(sft, **sections):
    tree = recipe_for(sft).model_dump(mode="json", exclude_unset=True)
    return parse_recipe(tree | {name: tree[name] | keys for name, keys in sections.items()}, place="test")


def test_of_answers_to_one_prompt_only_the_new_one_is_scored(home, ledger, tiny_model, monkeypatch):
    asked = []

    def scores(home, model_id, groups, recipe, console):
        asked.extend(response for group in groups for response in group.responses)
        return [replace(g, reference_logps=tuple(-float(sum(r)) for r in g.responses)) for g in groups]

    monkeypatch.setattr("ray_jobs.prepare.score_reference", scores)
    pairs = [Pair((Message("user", t),), Response("a"), Response("b"), "import", "", "") for t in TEXTS]
    prepare(home, ledger, recipe_for(tiny_model), write(home, ledger, pairs))
    assert len(asked) == 2 * len(pairs)
    asked.clear()
    more = [*pairs, Pair((Message("user", TEXTS[0]),), Response("c"), Response("b"), "import", "", "")]
    row = prepare(home, ledger, recipe_for(tiny_model), write(home, ledger, more))
    assert len(asked) == 1
    found = scored(home, row.snapshot_id)
    assert len(found) == 3
    assert all(logp == -sum(ids) for ids, logp in found.items())


def test_what_was_cut_or_left_out_is_shown_with_an_example(home, ledger, tiny_model):
    pairs = [Pair((Message("user", t),), Response("yes"), Response("no"), "import", "", "") for t in TEXTS]
    pairs += [Pair((Message("user", "How long?"),), Response("x" * 300), Response("y"), "import", "", "")]
    pairs += [Pair((Message("user", "z" * 400),), Response("yes"), Response("no"), "import", "", "")]
    recipe = recipe_with(tiny_model, train={"objective": "simpo"}, prepare={"too_long": "truncate_response"})
    row = prepare(home, ledger, recipe, write(home, ledger, pairs))
    printed = io.StringIO()
    print_summary(Console(file=printed, width=500), row)
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith(f"training snapshot {row.snapshot_id}: held_out: ")
    (dropped,) = [line for line in lines if line.startswith("left out of training: ")]
    assert re.fullmatch(r"left out of training: 1 prompt_longer_than_window \(such as pair [0-9a-f]{32}\)", dropped)
    assert "answers cut at the window: 1" in lines


def test_a_model_whose_answers_share_no_prompt_is_told_with_the_reason(home, ledger, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    pairs = [Pair((Message("user", t),), Response("a"), Response("b"), "import", "", "") for t in TEXTS]
    printed = io.StringIO()
    recipe = recipe_with(folder, train={"objective": "simpo"})
    prepare(home, ledger, recipe, write(home, ledger, pairs), console=Console(file=printed, width=500))
    assert printed.getvalue().splitlines() == [
        "responses share no prompt, each is a row of its own: `llama` has attention_dropout = 0.1, which the packed attention does not compute"
    ]


def test_kto_on_a_single_prompt_says_that_its_kl_is_not_measured(home, ledger, tiny_model, monkeypatch):
    monkeypatch.setattr(
        "ray_jobs.prepare.score_reference",
        lambda home, model_id, groups, recipe, console: [
            replace(g, reference_logps=(-1.0,) * len(g.responses)) for g in groups
        ],
    )
    told = []
    for texts in (TEXTS[:1], TEXTS):
        pairs = [Pair((Message("user", t),), Response("a"), Response("b"), "import", "", "") for t in texts]
        printed = io.StringIO()
        recipe = recipe_with(tiny_model, train={"objective": "kto"})
        prepare(home, ledger, recipe, write(home, ledger, pairs), console=Console(file=printed, width=500))
        told.append("warning: kto measures its KL on answers to other prompts, and here are none" in printed.getvalue())
    assert told == [True, False]


@pytest.mark.parametrize("broken", [1, 6])
def test_rows_to_which_the_reference_gives_no_number_are_left_out_and_counted(
    home, ledger, tiny_model, monkeypatch, broken
):
    def with_faults(home, ledger, recipe, reference, groups, console):
        given = [math.nan] * broken + [-1.0] * (len(groups) - broken)
        return [replace(g, reference_logps=(-2.0, logp)) for g, logp in zip(groups, given, strict=True)]

    monkeypatch.setattr("ray_jobs.prepare._with_reference", with_faults)
    pairs = [Pair((Message("user", t),), Response("a"), Response("b"), "import", "", "") for t in TEXTS]
    pair_snapshot = write(home, ledger, pairs)
    if broken == len(pairs):
        with pytest.raises(DataError, match="gives no finite score to any row"):
            prepare(home, ledger, recipe_for(tiny_model), pair_snapshot)
        return
    counts = prepare(home, ledger, recipe_for(tiny_model), pair_snapshot).manifest["counts"]
    assert (counts["kept"], counts["dropped"]) == (5, {"reference_not_finite": 1})
    assert counts["dropped_such_as"]["reference_not_finite"] in {pair.pair_id for pair in pairs}
