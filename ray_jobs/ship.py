"""Ship: verdict -> champion pointer, Serve update; rollback is the same act with the model before.

    python -m ray_jobs.ship RECIPE.yaml [--set a.b=c] [--model MODEL_ID | --rollback] [--actor NAME]

Where the recipe names sealed prompts (`evaluate.sealed`), they are opened now and the gate must say SHIP on them too.
The pointer moves by compare-and-set, then the running service is told through Serve's REST API and every replica is
asked until it serves the model. Where one cannot, the old configuration and the old pointer are put back. Without a
running service only the pointer moves. Exit code 3: no verdict allows it.
"""

import argparse
import getpass
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx
import sqlalchemy as sa

from app.config import Recipe
from app.errors import HOLD_EXIT_CODE, DataError, LedgerError, ServiceError
from app.evaluation.signature import signature_fault
from app.ledger import ChampionRow, EvaluationRow, Ledger, ModelRow
from app.services import APPLICATION, REPLICA, ServeApi, Services, is_near
from app.storage import UNDIGESTED, Home
from ray_jobs.session import Session, ray_cluster, run_job

_POLL_S = 0.5
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ShipResult:
    """What became of a ship or a rollback.

    Attributes:
        shipped: the champion is now the model that was asked for.
        model_id: that model, where one was found.
        champion_before: the champion before.
        revision: revision of the champion pointer now.
        served: every replica of a running service confirmed the model.
        reason: one sentence.
    """

    shipped: bool
    model_id: str | None
    champion_before: str | None
    revision: int
    served: bool
    reason: str


def ship(
    home: Home, ledger: Ledger, recipe: Recipe, model_id: str | None, actor: str, *, timeout_s: float = _TIMEOUT_S
) -> ShipResult:
    """Make a model the champion if its newest evaluation says SHIP and is signed with the home's key.

    Args:
        home: where artifacts and the record of the service are.
        ledger: where verdicts and the champion are.
        recipe: names the deployment, and sealed prompts where there are any.
        model_id: the candidate; None takes the model of the deployment's newest evaluation.
        actor: who ships, for the audit log.
        timeout_s: how long the replicas may take.

    Raises:
        DataError: the artifact differs from its manifest, or there is no key to check signatures with.
        LedgerError: somebody else shipped at the same time.
        ServiceError: the service did not take the model; the old champion is back.

    Answering sealed prompts raises as `evaluate` does.
    """
    deployment = recipe.serving.deployment
    before = ledger.champion(deployment)
    sealed = None if recipe.evaluate is None else recipe.evaluate.sealed
    evaluation = _newest_evaluation(ledger, deployment, model_id, sealed=sealed)
    if evaluation is None:
        whose = f"model `{model_id}` has" if model_id else "there is"
        return _held(before, model_id, f"{whose} no evaluation for deployment `{deployment}`; run `evaluate` first")
    model = _model(ledger, evaluation.model_id)
    if fault := signature_fault(evaluation, home.signing_key()):
        return _held(
            before,
            model.model_id,
            f"the newest evaluation of `{model.model_id}` ({evaluation.evaluation_id}) cannot be trusted: {fault}; run `evaluate` again, with the key that `ship` has",
        )
    if evaluation.verdict != "SHIP":
        return _held(
            before,
            model.model_id,
            f"the newest evaluation of `{model.model_id}` ({evaluation.evaluation_id}) says {evaluation.verdict}",
        )
    if evaluation.model_digest != model.digest:
        return _held(
            before,
            model.model_id,
            f"the evaluation {evaluation.evaluation_id} judged other weights (digest {evaluation.model_digest[:12]}) than `{model.model_id}` has ({model.digest[:12]})",
        )
    if before is not None and before.model_id not in (evaluation.champion_id, model.model_id):
        return _held(
            before,
            model.model_id,
            f"the evaluation {evaluation.evaluation_id} compared `{model.model_id}` with `{evaluation.champion_id}`, but the champion is `{before.model_id}` now; run `evaluate` again",
        )
    # A model that is the champion already would meet itself.
    if sealed is not None and (before is None or before.model_id != model.model_id):
        last = on_sealed(home, ledger, recipe, model.model_id, evaluation.run_id)
        if last.verdict != "SHIP":
            return _held(
                before,
                model.model_id,
                f"on the sealed prompts the gate says {last.verdict} ({last.evaluation_id}): {'; '.join(last.report['reasons'])}",
            )
    if before is None:
        # So that there is something to go back to.
        before = ledger.set_champion(
            deployment,
            evaluation.sft_id,
            expected_revision=0,
            actor=actor,
            reason="the SFT model is the first champion",
        )
    reason = f"evaluation {evaluation.evaluation_id} says SHIP"
    return _move(home, ledger, before, model, deployment=deployment, actor=actor, reason=reason, timeout_s=timeout_s)


def roll_back(home: Home, ledger: Ledger, recipe: Recipe, actor: str, *, timeout_s: float = _TIMEOUT_S) -> ShipResult:
    """Make the previous champion the champion again; no verdict is needed. Raises as `ship` does."""
    deployment = recipe.serving.deployment
    before = ledger.champion(deployment)
    if before is None or before.previous_model_id is None:
        return _held(before, None, f"deployment `{deployment}` has no previous champion to go back to")
    model = _model(ledger, before.previous_model_id)
    reason = f"rollback from {before.model_id}"
    return _move(home, ledger, before, model, deployment=deployment, actor=actor, reason=reason, timeout_s=timeout_s)


def on_sealed(home: Home, ledger: Ledger, recipe: Recipe, model_id: str, run_id: str | None) -> EvaluationRow:
    """Return the verdict on the recipe's sealed prompts; the same inputs again return the one that was reached.

    Raises:
        ServiceError: the gate holds while the judge owes answers; they are asked for by the next call.

    Answering raises as `evaluate` does.
    """
    # Models answer here; a ship without sealed prompts need not wait for torch.
    from ray_jobs.evaluate import evaluate_sealed, require_answered

    with ray_cluster(home):
        row = evaluate_sealed(home, ledger, recipe, model_id, run_id)
    require_answered(row)
    return row


def _held(before: ChampionRow | None, model_id: str | None, reason: str) -> ShipResult:
    return ShipResult(
        shipped=False,
        model_id=model_id,
        champion_before=before.model_id if before else None,
        revision=before.revision if before else 0,
        served=False,
        reason=reason,
    )


def _newest_evaluation(
    ledger: Ledger, deployment: str, model_id: str | None, *, sealed: str | None
) -> EvaluationRow | None:
    """Return the newest evaluation that was asked for; one on sealed prompts is a part of a ship."""
    query = sa.select(EvaluationRow).where(EvaluationRow.deployment == deployment)
    query = query.order_by(EvaluationRow.created_at.desc())
    if model_id is not None:
        query = query.where(EvaluationRow.model_id == model_id)
    with ledger.read() as session:
        rows = session.scalars(query)
        return next((row for row in rows if sealed is None or row.report.get("prompts") != sealed), None)


def _model(ledger: Ledger, model_id: str) -> ModelRow:
    with ledger.read() as session:
        model = session.get(ModelRow, model_id)
    if model is None:
        raise LedgerError(f"no model `{model_id}` in the ledger")
    return model


def _move(
    home: Home,
    ledger: Ledger,
    before: ChampionRow | None,
    model: ModelRow,
    *,
    deployment: str,
    actor: str,
    reason: str,
    timeout_s: float,
) -> ShipResult:
    artifact = home.artifact("models", model.model_id)
    artifact.verify()
    # The manifest names the digest as well, but it is no part of itself.
    digest = artifact.content_digest(without=UNDIGESTED)
    if digest != model.digest:
        msg = f"the files of `{model.model_id}` have digest {digest[:12]}, the ledger says {model.digest[:12]}"
        raise DataError(msg)
    after = before
    if before is None or before.model_id != model.model_id:
        after = ledger.set_champion(
            deployment,
            model.model_id,
            expected_revision=before.revision if before else 0,
            actor=actor,
            reason=reason,
        )
    assert after is not None  # noqa: S101
    try:
        served = _serve(home, after, timeout_s=timeout_s)
    except ServiceError as error:
        if before is not None and after is not before:
            restored = ledger.restore_champion(
                before, expected_revision=after.revision, actor=actor, reason=f"undone: {error}"
            )
            try:
                _tell(home, restored)
            except ServiceError as silent:
                msg = f"{error}\n\nThe champion of the ledger is `{before.model_id}` again, but the service could not be told: {silent}\n\nHint: it may still change to `{model.model_id}`; start it again with `prefloop serve`."
                raise ServiceError(msg) from None
        raise
    return ShipResult(
        shipped=True,
        model_id=model.model_id,
        champion_before=before.model_id if before else None,
        revision=after.revision,
        served=served,
        reason=reason,
    )


def _serve(home: Home, champion: ChampionRow, *, timeout_s: float) -> bool:
    """Make every replica serve the champion; False where no service of its deployment runs."""
    services = Services.read(home)
    if services is None or services.deployment != champion.deployment:
        return False
    if not ServeApi(services.ray_dashboard_url).reachable():
        return False
    replicas = _tell(home, champion)
    wanted = (champion.model_id, champion.revision)
    end = time.monotonic() + timeout_s
    missing = "no replica answered"
    while time.monotonic() < end:
        found = _replicas(services, home.api_key())
        settled = [r for r in found if (r["model_id"], r["revision"]) == wanted]
        if len(found) >= replicas and len(settled) == len(found):
            return True
        for replica in found:
            if replica["error"] and (replica["target_model_id"], replica["target_revision"]) == wanted:
                msg = f"replica {replica['replica']} cannot serve `{champion.model_id}`: {replica['error']}\n\nHint: the champion before serves on."
                raise ServiceError(msg)
        missing = f"{len(settled)} of {max(replicas, len(found))} replicas serve it"
        time.sleep(_POLL_S)
    msg = f"`{champion.model_id}` is not served by every replica after {timeout_s:.0f} s ({missing})\n\nHint: the champion before serves on; look at the replicas' logs in Ray's dashboard."
    raise ServiceError(msg)


def _tell(home: Home, champion: ChampionRow) -> int:
    """Name the champion in the deployed configuration; returns the number of replicas that must follow."""
    services = Services.read(home)
    if services is None:
        return 0
    api = ServeApi(services.ray_dashboard_url)
    config = api.config()
    application = next((a for a in config["applications"] if a["name"] == APPLICATION), None)
    if application is None:
        raise ServiceError(f"Ray Serve at `{api.url}` has no application `{APPLICATION}`")
    deployments = application.setdefault("deployments", [])
    replica = next((d for d in deployments if d["name"] == REPLICA), None)
    if replica is None:  # a manifest leaves out what it does not change
        replica = {"name": REPLICA}
        deployments.append(replica)
    replica["user_config"] = {"model_id": champion.model_id, "revision": champion.revision}
    api.put(config)
    details = api.details()["applications"][APPLICATION]["deployments"].get(REPLICA, {})
    return int(details.get("target_num_replicas") or 1)


def _replicas(services: Services, key: str) -> list[dict[str, Any]]:
    try:
        reply = httpx.get(
            f"{services.gateway_url}/v1/admin/status",
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
            trust_env=not is_near(services.gateway_url),
        )
        found: list[dict[str, Any]] = reply.json()["replicas"] if reply.is_success else []
    except (httpx.HTTPError, ValueError):
        return []
    return found


def _arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="candidate; default: the model of the deployment's newest evaluation")
    which.add_argument("--rollback", action="store_true", help="go back to the previous champion")
    parser.add_argument("--actor", help="who ships, for the audit log; default: the user")


def _body(session: Session, options: argparse.Namespace) -> int:
    actor = options.actor or _user()
    if options.rollback:
        result = roll_back(session.home, session.ledger, session.recipe, actor)
    else:
        result = ship(session.home, session.ledger, session.recipe, options.model, actor)
    print(describe(result, session.recipe.serving.deployment))  # noqa: T201
    return 0 if result.shipped else HOLD_EXIT_CODE


def describe(result: ShipResult, deployment: str) -> str:
    """Say in one line what happened."""
    if not result.shipped:
        return f"HOLD: nothing shipped to `{deployment}`: {result.reason}"
    where = (
        "every replica serves it"
        if result.served
        else "no service of its deployment is running, only the pointer moved"
    )
    if result.champion_before == result.model_id:
        where = "every replica serves it" if result.served else "no service of its deployment is running"
        return f"SHIP: `{result.model_id}` is the champion of `{deployment}` already; {where}"
    return f"SHIP: `{deployment}` {result.champion_before or 'nothing'} -> {result.model_id} (revision {result.revision}; {result.reason}); {where}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())  # containers may run under an id without a name


def main() -> int:
    """Run the job."""
    return run_job("ship", _body, arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
