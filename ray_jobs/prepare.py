"""Prepare: pair snapshot -> training snapshot (token ids, reference log-probabilities, fixed global order).

    python -m ray_jobs.prepare RECIPE.yaml [--set a.b=c]

Text is tokenised in the job; with `train.reference: precomputed` the frozen reference scores every response once in
Ray Data actors that hold it. What cannot train is counted by reason in the manifest. What the same reference
scored for one of the last snapshots is not scored again.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import pyarrow as pa
import ray
import torch
from rich.console import Console
from torch import Tensor

from app.config import HALVINGS, Recipe
from app.errors import DataError, OutOfMemory, RecipeError, said
from app.generation import context_window
from app.ledger import Ledger, ModelRow, SnapshotRow
from app.models import check_descent, device_of, ensure_sft, is_out_of_memory, load_architecture, load_model
from app.preferences.snapshots import read_pairs, resolve_snapshot
from app.schemas import TRAINING_SCHEMA
from app.storage import Home
from app.training.attention import Backend
from app.training.batch import PackedBatch
from app.training.judgements import distinct, divide, for_unit, in_rows, with_strangers
from app.training.objectives import Objective, load_objective
from app.training.policy import autocast
from app.training.scoring import AS_ASKED, ScoringModel, alike_up_to, no_effect, unpackable, with_reference_logps
from app.training.snapshots import (
    Binding,
    Scored,
    global_order,
    groups_of_table,
    known_scores,
    to_row,
    write_training_snapshot,
)
from app.training.tokenization import Group, encode_groups
from ray_jobs.actors import mortal, settle_ray_data, told_of_dead_actors
from ray_jobs.preflight import preflight
from ray_jobs.progress import Meter
from ray_jobs.session import Session, ray_cluster, require_room, run_job

_SCORE_BATCH = 64
"""Rows that an actor takes at once."""


def named_model(home: Home, ledger: Ledger, recipe: Recipe, which: str) -> ModelRow:
    """Return the model that `champion` or `sft` stands for; before the first ship the champion is the SFT model.

    Raises:
        ModelError: the SFT checkpoint cannot be loaded, or the champion descends from another one.
    """
    sft = ensure_sft(home, ledger, recipe.model.sft)
    champion = ledger.champion(recipe.serving.deployment)
    if which == "sft" or champion is None:
        return sft
    check_descent(ledger, champion.model_id, sft, deployment=recipe.serving.deployment)
    with ledger.read() as session:
        row = session.get(ModelRow, champion.model_id)
    assert row is not None  # noqa: S101  a foreign key
    return row


def prepare(
    home: Home, ledger: Ledger, recipe: Recipe, pair_snapshot_id: str, *, console: Console | None = None
) -> SnapshotRow:
    """Write the training snapshot of a pair snapshot and return its ledger row.

    Raises:
        ModelError: the attention of the recipe has no effect on this model, whose answers share no prompt.
        RecipeError: the recipe says something of a reference, and its objective has none; or that gives no loss.
        DataError: no row can train, a row is too long and the recipe refuses that, or rows may be longer than the model's
            context.
    """
    objective = load_objective(recipe.train.objective, recipe.train.options)
    require_reference_in_use(recipe, objective)
    start = named_model(home, ledger, recipe, recipe.model.start)
    reference = named_model(home, ledger, recipe, recipe.model.reference_model)
    loaded = load_architecture(home, start.model_id)
    window = context_window(loaded.model)
    if window is not None and recipe.prepare.max_length > window:
        msg = f"prepare.max_length = {recipe.prepare.max_length} exceeds the context of `{start.model_id}`, {window} tokens\n\nHint: lower prepare.max_length to {window}."
        raise DataError(msg)
    reason = AS_ASKED if recipe.train.attention == "plain" else unpackable(loaded.model)
    if reason is not None and recipe.train.attention in ("flex", "varlen"):
        raise no_effect(recipe.train.attention, reason)  # before anything is tokenized or a worker starts
    if reason is not None and console is not None:
        console.print(f"responses share no prompt, each is a row of its own: {reason}", highlight=False, markup=False)
    alike = alike_up_to(loaded.model)
    if reason is None and alike is not None and recipe.prepare.max_length > alike and console is not None:
        told = f"a prompt with an answer of more than {alike} tokens makes each response beside it a row of its own: the model turns all positions of a longer row otherwise"
        console.print(told, highlight=False, markup=False)
    pairs = read_pairs(home, pair_snapshot_id)
    groups, audit = encode_groups(
        pairs,
        loaded.tokenizer,
        template_digest=loaded.template_digest,
        end_ids=loaded.end_ids,
        max_length=recipe.prepare.max_length,
        too_long=recipe.prepare.too_long,
    )
    groups, left_out = for_unit(groups, objective.unit)
    if left_out:
        # Scoring what the objective learns nothing from costs as much as the rest.
        audit.dropped["unpaired" if objective.unit == "pairs" else "disliked"] += left_out
    if not groups:
        reasons = ", ".join(f"{n} {reason}" for reason, n in audit.dropped.items()) or "the snapshot is empty"
        msg = f"no row of pair snapshot `{pair_snapshot_id}` can train: {reasons}"
        raise DataError(msg)
    # As many answers as the pairs of a prompt may have.
    groups = in_rows(groups, answers=2 * recipe.pairs.max_pairs_per_prompt)
    ordered = global_order(groups, recipe.prepare.seed)
    if "kl" in objective.needs:
        ordered = with_strangers(ordered, max_length=recipe.prepare.max_length, seed=recipe.prepare.seed)
        if console is not None and not any(divide(group)[1] for group in ordered):
            told = f"warning: {objective.name} measures its KL on answers to other prompts, and here are none: all that trains belongs to one prompt, so the KL is taken for 0"
            console.print(told, highlight=False, markup=False)
    simulated = {pair.pair_id for pair in pairs if pair.simulated}
    precomputed = objective.has_reference and recipe.train.reference == "precomputed"
    if precomputed:
        scored = _with_reference(home, ledger, recipe, reference, ordered, console)
        ordered = [group for group in scored if _is_finite(group)]
        # One of them would take its whole step with it, in every epoch.
        if lost := {judged.pair_id for group in scored if not _is_finite(group) for judged in group.judgements}:
            left_out += len(lost)
            audit.dropped["reference_not_finite"] += len(lost)
            audit.examples["reference_not_finite"] = min(lost)
        if not ordered:
            msg = f"the reference `{reference.model_id}` gives no finite score to any row of pair snapshot `{pair_snapshot_id}`\n\nHint: does it answer at all? `--set train.dtype=float32` tells a rounding from a broken model."
            raise DataError(msg)
    return write_training_snapshot(
        home,
        ledger,
        ordered,
        binding=Binding(
            pair_snapshot_id=pair_snapshot_id,
            template_digest=loaded.template_digest,
            max_length=recipe.prepare.max_length,
            too_long=recipe.prepare.too_long,
            seed=recipe.prepare.seed,
            unit=objective.unit,
            strangers="kl" in objective.needs,
            reference_digest=reference.digest if precomputed else None,
            dtype=recipe.train.dtype if precomputed else None,
        ),
        counts={
            "kept": audit.kept - left_out,
            "dropped": dict(audit.dropped),
            "dropped_such_as": audit.examples,
            "truncated": audit.truncated,
            "without_begin": audit.without_begin,
            "sources": dict(Counter(distinct(ordered).values())),
            "simulated": len(simulated & distinct(ordered).keys()),
            "reference_model": reference.model_id if precomputed else None,
        },
        rows_per_file=recipe.prepare.rows_per_file,
    )


def _is_finite(group: Group) -> bool:
    return all(map(math.isfinite, group.reference_logps or ()))


def _with_reference(
    home: Home, ledger: Ledger, recipe: Recipe, reference: ModelRow, groups: list[Group], console: Console | None
) -> list[Group]:
    """Return the groups with the log-probabilities of the reference; only what it has not scored yet is computed."""
    wanted = {(group.prompt_ids, response) for group in groups for response in group.responses}
    known: Mapping[Scored, float] = {}
    if recipe.prepare.reuse_scores:
        before = known_scores(home, ledger, wanted, reference_digest=reference.digest, dtype=recipe.train.dtype)
        known = before.logps
        for snapshot_id, why in before.damaged.items():
            if console is not None:
                told = (
                    f"prepare: scores of the training snapshot `{snapshot_id}` are not used again, it is damaged: {why}"
                )
                console.print(told, highlight=False, markup=False)
    unknown = [
        # What is known of a prompt is not scored again beside an answer that is new.
        replace(group, responses=missing, pairs=(), labels=())
        for group in groups
        if (missing := tuple(r for r in group.responses if (group.prompt_ids, r) not in known))
    ]
    computed = score_reference(home, reference.model_id, unknown, recipe, console) if unknown else []
    if console is not None and len(unknown) < len(groups):
        console.print(f"prepare: {len(groups) - len(unknown)} prompts were scored before", highlight=False)
    found = {
        **known,
        **{
            (g.prompt_ids, r): logp
            for g in computed
            for r, logp in zip(g.responses, g.reference_logps or (), strict=True)
        },
    }
    return [replace(g, reference_logps=tuple(found[g.prompt_ids, r] for r in g.responses)) for g in groups]


def score_reference(
    home: Home, model_id: str, groups: list[Group], recipe: Recipe, console: Console | None
) -> list[Group]:
    """Score every response under the frozen reference with Ray Data actors; returns the groups in the same order.

    Raises:
        ServiceError: the cluster has no room for one actor, or actors die again and again.
        DataError: rows were lost.
    """
    workers = recipe.workers
    require_room(workers, 1)  # the others join as they find room
    settle_ray_data(in_order=True)
    # Each block is a step of the pass that is seen; all actors have one.
    length = min(_SCORE_BATCH, math.ceil(len(groups) / workers.workers))
    slices = [
        pa.Table.from_pylist(
            [to_row(group, start + i) for i, group in enumerate(groups[start : start + length])], schema=TRAINING_SCHEMA
        )
        for start in range(0, len(groups), length)
    ]
    scored = ray.data.from_arrow(slices).map_batches(
        ReferenceScorer,
        fn_constructor_kwargs={
            "home_uri": home.uri,
            "model_id": model_id,
            "dtype": recipe.train.dtype,
            "token_budget": recipe.train.token_budget(workers.device),
            "threads": workers.threads,
            "backend": recipe.train.attention,
        },
        batch_size=length,  # of a larger one Ray Data would put slices together again
        batch_format="pyarrow",
        num_cpus=workers.cpus_per_worker,
        num_gpus=1 if workers.use_gpu else 0,
        compute=ray.data.ActorPoolStrategy(size=workers.workers),
        ray_remote_args_fn=mortal,
    )
    found: dict[int, tuple[float, ...]] = {}
    with (
        told_of_dead_actors("that scores with the reference", workers.workers),
        Meter(console) if console is not None else nullcontext() as meter,
    ):
        for table in scored.iter_batches(batch_size=_SCORE_BATCH, batch_format="pyarrow"):
            indices, scores = (cast("pa.Table", table)[name].to_pylist() for name in ("row_index", "reference_logps"))
            found.update(zip(indices, map(tuple, scores), strict=True))
            if meter is not None:
                meter.show("prepare: prompts scored by the reference", len(found), len(groups))
    if found.keys() != set(range(len(groups))):
        msg = f"the reference pass returned {len(found)} of {len(groups)} rows"
        raise DataError(msg)
    return [replace(group, reference_logps=found[i]) for i, group in enumerate(groups)]


class ReferenceScorer:
    """A Ray Data actor that holds the frozen reference."""

    def __init__(
        self,
        home_uri: str,
        model_id: str,
        dtype: str,
        token_budget: int,
        threads: int,
        backend: Backend | Literal["plain"],
    ) -> None:
        torch.set_num_threads(threads)
        self.device = device_of(ray.get_gpu_ids())
        model = load_model(Home.at(home_uri), model_id, dtype=dtype, device=self.device).model
        self.scorer = ScoringModel(model, backend=backend)
        self.dtype = dtype
        self.token_budget, self.least = token_budget, token_budget >> HALVINGS

    def __call__(self, table: pa.Table) -> pa.Table:
        """Fill in `reference_logps`, by smaller micro-batches where memory does not hold them; raises OutOfMemory."""
        groups = groups_of_table(table)
        indices = table["row_index"].to_pylist()
        while True:
            try:
                scored = with_reference_logps(groups, self._score, token_budget=self.token_budget)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.token_budget <= self.least:
                    raise OutOfMemory(said(error, 0)) from None
            # Not where the error is handled, which holds on to what the pass had in hand.
            self.token_budget //= 2
        rows = [to_row(group, index) for group, index in zip(scored, indices, strict=True)]
        return pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA)

    def _score(self, batch: PackedBatch) -> Tensor:
        with autocast(self.device, self.dtype):
            logps: Tensor = self.scorer(batch.to(self.device)).logps
        return logps


def require_reference_in_use(recipe: Recipe, objective: Objective) -> None:
    """Refuse what a recipe says of the reference where the objective has none; raises RecipeError.

    Those that ship were refused as the recipe was read; one of the user's own says it when it is loaded.
    """
    said = ["train.reference"] if "reference" in recipe.train.model_fields_set else []
    said += ["model.reference_model"] if "reference_model" in recipe.model.model_fields_set else []
    if said and not objective.has_reference:
        msg = f"`{said[0]}` has no effect with `train.objective: {objective.name}`, which asks for no `reference_logps`: remove it"
        raise RecipeError(msg)


def _body(session: Session, options: argparse.Namespace) -> int:
    del options
    recipe = session.recipe
    pair_snapshot = resolve_snapshot(
        session.home, session.ledger, recipe.snapshot, kind="pairs", deployment=recipe.serving.deployment
    )
    console = Console()
    with ray_cluster(session.home):
        preflight(session.home, session.home.ledger_url)
        row = prepare(session.home, session.ledger, session.recipe, pair_snapshot.snapshot_id, console=console)
    print_summary(console, row)
    return 0


def print_summary(console: Console, row: SnapshotRow) -> None:
    """Print what a training snapshot holds and what was left out."""
    splits, counts = row.manifest["splits"], row.manifest["counts"]
    shown = ", ".join(
        f"{name}: {_judgements(n)} on {n['rows']} prompts ({n['tokens']} tokens)" for name, n in splits.items()
    )
    console.print(f"training snapshot [bold]{row.snapshot_id}[/bold]: {shown}", highlight=False)
    if counts["dropped"]:
        console.print(
            "left out of training: "
            + ", ".join(f"{n} {reason}{_such_as(counts, reason)}" for reason, n in counts["dropped"].items()),
            highlight=False,
        )
    if counts["truncated"]:
        console.print(f"answers cut at the window: {counts['truncated']}", highlight=False)
    if counts.get("without_begin"):
        console.print(
            f"prompts without the begin token that the tokenizer writes before plain text, as the chat template has it: {counts['without_begin']}",
            highlight=False,
        )


def _such_as(counts: dict[str, Any], reason: str) -> str:
    example = counts.get("dropped_such_as", {}).get(reason)
    return f" (such as pair {example})" if example else ""


def _judgements(split: dict[str, Any]) -> str:
    found = [
        f"{split[kind]} {word}" for kind, word in (("pairs", "pairs"), ("labels", "judged answers")) if split[kind]
    ]
    return " and ".join(found) or "nothing"


def main() -> int:
    """Run the job."""
    return run_job("prepare", _body)


if __name__ == "__main__":
    sys.exit(main())
