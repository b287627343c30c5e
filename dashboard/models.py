"""Page: models with their lineage and the gate's verdict, and the buttons that ship and roll back."""

from typing import Any

import streamlit as st

from app.errors import DataError
from app.ledger import ChampionRow, EvaluationRow, Ledger, ModelRow, now
from dashboard import parts, reads
from dashboard.advice import age
from dashboard.parts import Standing
from dashboard.service import Jobs

_SHIP, _ROLL_BACK = "ship", "rollback"
_LIMIT = 200
_JUDGEMENTS = 500


def page() -> None:
    """Draw the page."""
    where = parts.standing()
    ledger = parts.ledger()
    running = parts.jobs(where)
    champion = ledger.champion(where.deployment)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.title("Models", anchor=False)
        _roll_back_button(where, running, champion)
    parts.follow_job(
        _SHIP,
        running,
        done="Shipped: the next answer comes from the new champion.",
        held="The gate holds this model. Nothing was shipped.",
    )
    parts.follow_job(
        _ROLL_BACK,
        running,
        done="Rolled back: the next answer comes from the previous champion.",
        held="There is no previous champion to go back to.",
    )
    found = reads.models(ledger, limit=_LIMIT)
    if not found:
        parts.empty("No model yet.", f"The service brings the SFT checkpoint in: prefloop serve {where.recipe_name}")
        return
    row = _choose(ledger, where, found, champion)
    _verdict(ledger, where, running, row, champion)
    _lineage(ledger, where, row)


def _choose(ledger: Ledger, where: Standing, found: list[ModelRow], champion: ChampionRow | None) -> ModelRow:
    at = now()
    verdicts = reads.verdicts(ledger, where.deployment, [row.model_id for row in found])
    event = st.dataframe(
        [
            {
                "model": row.model_id,
                "is": _role(row, champion),
                "gate": verdicts.get(row.model_id, "not evaluated"),
                "kind": row.kind,
                "made": age(row.created_at, at),
                "parent": row.parent_id or "",
                "run": row.run_id or "",
            }
            for row in found
        ],
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="models",
    )
    picked = event["selection"]["rows"]
    asked = st.query_params.get("model")
    row = found[picked[0]] if picked else (reads.model(ledger, asked) if asked else None) or found[0]
    st.query_params["model"] = row.model_id
    return row


def _role(row: ModelRow, champion: ChampionRow | None) -> str:
    if champion is None:
        return ""
    if row.model_id == champion.model_id:
        return "champion"
    return "previous" if row.model_id == champion.previous_model_id else ""


def _verdict(
    ledger: Ledger, where: Standing, running: Jobs | None, row: ModelRow, champion: ChampionRow | None
) -> None:
    st.subheader("Verdict of the gate", anchor=False)
    evaluation = reads.evaluation(ledger, where.deployment, row.model_id)
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            with st.container(horizontal=True, vertical_alignment="center", width="content"):
                _badge(evaluation)
                with st.container(key="says-model", width="content"):
                    st.text(row.model_id)
            obstacle = _obstacle(where, running, row, evaluation, champion)
            ship = st.button("Ship", icon=":material/rocket_launch:", type="primary", disabled=obstacle is not None)
            if ship and running is not None:
                _confirm_ship(row.model_id, champion.model_id if champion else None, running)
        with st.container(key="meta-verdict", gap="xxsmall"):
            if obstacle is not None:
                st.text(obstacle)
            if evaluation is not None:
                st.text(
                    f"evaluated {age(evaluation.created_at, now())} against champion {evaluation.champion_id} "
                    f"and SFT {evaluation.sft_id}"
                )
        if evaluation is None:
            st.text(f"No evaluation of these weights for deployment `{where.deployment}`.")
            st.text(f"Run: prefloop evaluate {where.recipe_name}")
        else:
            _rules(evaluation.report)
            for reason in evaluation.report.get("reasons", ()):
                st.text(f"It holds because: {reason}")
            _whole_report(where, evaluation)


def _badge(evaluation: EvaluationRow | None) -> None:
    if evaluation is None:
        st.badge("not evaluated", color="gray")
    elif evaluation.verdict == "SHIP":
        st.badge("SHIP", icon=":material/check:", color="green")
    else:
        st.badge("HOLD", icon=":material/block:", color="orange")


def _obstacle(
    where: Standing,
    running: Jobs | None,
    row: ModelRow,
    evaluation: EvaluationRow | None,
    champion: ChampionRow | None,
) -> str | None:
    """Say why the Ship button is off; the ship job checks all of it again."""
    if champion is not None and champion.model_id == row.model_id:
        return "It is the champion already."
    if evaluation is None:
        return "Only a model that passed the gate is shipped."
    if evaluation.verdict != "SHIP":
        return "The gate holds it; the rules below say why."
    if evaluation.model_digest != row.digest:
        return "The verdict belongs to other weights: evaluate this model again."
    if running is None:
        return f"No running service: prefloop serve {where.recipe_name}"
    if where.recipe_path is None:
        return "Start this dashboard with a recipe to ship: prefloop dashboard RECIPE.yaml"
    if _moving():
        return "A ship or rollback is running."
    return None


def _rules(report: dict[str, Any]) -> None:
    rules = report.get("rules") or []
    if not rules:
        st.text("The report lists no rules.")
        return
    st.dataframe(
        [
            {
                "holds": "yes" if rule.get("passed") else "warns" if rule.get("decides") == "warn" else "NO",
                "rule": rule.get("name"),
                "value": _number(rule.get("value")),
                "interval": _interval(rule.get("low"), rule.get("high")),
                "wanted": f"{rule.get('comparison', '')} {_number(rule.get('threshold'))}".strip(),
                "n": rule.get("n"),
                "in words": rule.get("reason"),
            }
            for rule in rules
        ],
        hide_index=True,
        height="content",
    )
    with st.container(key="meta-judge"):
        st.text(
            f"Judged by {report.get('judge', 'an unnamed judge')}. Intervals: {report.get('level', 0.95):.0%}, "
            "bootstrap over prompt clusters."
        )


def _whole_report(where: Standing, evaluation: EvaluationRow) -> None:
    """Show everything behind a verdict: what was measured, and every judgement. The page of the evaluation holds the same."""
    if not st.toggle("Everything measured, and every judgement", key=f"whole-{evaluation.evaluation_id}"):
        return
    st.dataframe(
        [
            {
                "metric": metric["name"],
                "value": _number(metric["value"]),
                "interval": _interval(metric["low"], metric["high"]),
                "n": metric["n"],
                "": metric["note"],
            }
            for metric in reads.metrics(evaluation.report)
        ],
        hide_index=True,
    )
    try:
        page = reads.report_page(where.home, evaluation.evaluation_id)
        judgements = reads.judgements(where.home, evaluation.evaluation_id, limit=_JUDGEMENTS)
    except DataError as error:
        st.text(str(error))
        return
    st.download_button("Save it as a page", page, file_name=f"{evaluation.evaluation_id}.html", mime="text/html")
    _judgements(judgements)


def _judgements(judgements: list[dict[str, Any]]) -> None:
    if not judgements:
        st.text("Nothing was compared.")
        return
    words = {1: "won", 0: "tied", -1: "lost", None: "undecided"}
    event = st.dataframe(
        [
            {
                "suite": row["suite"],
                "first answer": row["player"],
                "against": row["baseline"],
                "category": row["category"],
                "first answer has": words[row["outcome"]],
                "request": row["request"],
            }
            for row in judgements
        ],
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="judgements",
    )
    picked = event["selection"]["rows"]
    if not picked:
        st.text("Choose one to read it.")
        return
    row = judgements[picked[0]]
    st.text(row["request"])
    left, right = st.columns(2)
    with left:
        st.text(row["player"])
        st.code(row["answer"], language=None, wrap_lines=True)
    with right:
        st.text(row["baseline"])
        st.code(row["other"], language=None, wrap_lines=True)
    for said in row["words"]:
        st.code(said, language=None, wrap_lines=True)


def _interval(low: object, high: object) -> str:
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _number(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}"
    return "" if value is None else str(value)


@st.dialog("Ship this model?", icon=":material/rocket_launch:")
def _confirm_ship(model_id: str, champion_id: str | None, running: Jobs) -> None:
    st.text(f"{model_id} becomes the champion")
    st.text(f"in place of {champion_id or 'nothing'}.")
    st.caption("Running answers end on the old model. The old model is kept for a rollback.")
    if st.button("Ship it", type="primary", on_click=_ship, args=(running, model_id)):
        st.rerun()


def _roll_back_button(where: Standing, running: Jobs | None, champion: ChampionRow | None) -> None:
    previous = champion.previous_model_id if champion else None
    off = previous is None or running is None or where.recipe_path is None or _moving()
    pressed = st.button("Roll back", icon=":material/undo:", disabled=off)
    if pressed and champion and previous and running:
        _confirm_roll_back(champion.model_id, previous, running)


@st.dialog("Roll back?", icon=":material/undo:")
def _confirm_roll_back(champion_id: str, previous_id: str, running: Jobs) -> None:
    st.text(f"{previous_id} becomes the champion again")
    st.text(f"in place of {champion_id}.")
    if st.button("Roll it back", type="primary", on_click=_roll_back, args=(running,)):
        st.rerun()


def _ship(running: Jobs, model_id: str) -> None:
    parts.dismiss_job(_ROLL_BACK)
    parts.start_job(_SHIP, lambda submission_id: running.ship(model_id, submission_id=submission_id))


def _roll_back(running: Jobs) -> None:
    parts.dismiss_job(_SHIP)
    parts.start_job(_ROLL_BACK, lambda submission_id: running.roll_back(submission_id=submission_id))


def _moving() -> bool:
    return parts.job_is_running(_SHIP) or parts.job_is_running(_ROLL_BACK)


def _lineage(ledger: Ledger, where: Standing, row: ModelRow) -> None:
    st.subheader("Where it comes from", anchor=False)
    at = now()
    lines: list[str] = []
    for ancestor in reads.ancestors(ledger, row.model_id):
        lines.append(f"{ancestor.model_id}  {ancestor.kind}, made {age(ancestor.created_at, at)}")
        run = reads.run(ledger, ancestor.run_id) if ancestor.run_id else None
        if run is not None:
            held_to = f"reference {run.reference_model_id}" if run.reference_model_id else "without a reference"
            lines.append(f"  run {run.run_id}  {run.status}, {held_to}")
        pairs = reads.pair_snapshot_of(ledger, ancestor.snapshot_id)
        if pairs is not None:
            simulated = reads.manifest_simulated(pairs)
            lines.append(
                f"    pairs {pairs.snapshot_id}  {reads.manifest_rows(pairs):,} rows"
                + (f", {simulated:,} of them of a SIMULATED audience" if simulated else "")
            )
            lines.append(f"      {_signals(where, pairs.snapshot_id)}")
    st.code("\n".join(lines), language=None, wrap_lines=True)
    nearest = reads.pair_snapshot_of(ledger, row.snapshot_id)
    with st.container(horizontal=True):
        if nearest is not None:
            st.page_link(
                "pairs.py",
                label="The pairs it learned from",
                icon=":material/compare_arrows:",
                query_params={"snapshot": nearest.snapshot_id},
            )
        if row.run_id:
            st.page_link("runs.py", label="Its run", icon=":material/show_chart:", query_params={"run": row.run_id})
    with st.expander("Identity"):
        st.code(f"digest {row.digest}\n{row.uri}", language=None, wrap_lines=True)


def _signals(where: Standing, snapshot_id: str) -> str:
    try:
        counts = reads.pair_counts(where.home, snapshot_id)
    except DataError:
        return "its files are not in this home"
    by_source = ", ".join(f"{n:,} {source}" for source, n in counts.by_source.items())
    return f"{counts.events:,} judgements ({by_source})"


if __name__ == "__main__":
    page()
