"""Page: runs of the jobs, and the curves of those that train, while they train."""

from typing import Any

import altair as alt
import pyarrow as pa
import streamlit as st

from app.ledger import Ledger, RunRow, now
from dashboard import parts, reads
from dashboard.advice import age

_LIMIT = 200
_LIVE_S = 3.0
_CHART_HEIGHT = 210
_LEGEND_HEIGHT = 40
_FEW_POINTS = 40


def page() -> None:
    """Draw the page."""
    where = parts.standing()
    ledger = parts.ledger()
    st.title("Runs", anchor=False)
    found = reads.runs(ledger, limit=_LIMIT)
    if not found:
        parts.empty("No run yet.", f"Start one: prefloop train {where.recipe_name}")
        return
    at = now()
    event = st.dataframe(
        [
            {
                "run": row.run_id,
                "job": row.kind,
                "status": row.status,
                "started": age(row.created_at, at),
                "snapshot": row.snapshot_id or "",
                "start": row.start_model_id or "",
                "reference": row.reference_model_id or "",
                "made": row.output_model_id or "",
            }
            for row in found
        ],
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="runs",
    )
    picked = event["selection"]["rows"]
    asked = st.query_params.get("run")
    row = found[picked[0]] if picked else (reads.run(ledger, asked) if asked else None) or _interesting(found)
    st.query_params["run"] = row.run_id
    st.fragment(_detail, run_every=_LIVE_S if row.status == "running" else None)(ledger, row.run_id)


def _interesting(found: list[RunRow]) -> RunRow:
    return next((row for row in found if row.kind == reads.TRAIN), found[0])


def _detail(ledger: Ledger, run_id: str) -> None:
    row = reads.run(ledger, run_id)
    if row is None:
        parts.empty("This run is not in the ledger.", "Choose another one.")
        return
    curves = reads.curves(ledger, run_id)
    _head(row, curves)
    if row.error:
        with st.container(border=True):
            st.badge("Stopped by an error", icon=":material/error:", color="red")
            st.text(row.error)
    if curves:
        _charts(curves)
    elif row.kind == reads.TRAIN:
        parts.empty("No optimizer step yet.", "The first one follows when the workers are up and the model is loaded.")
    left, right = st.columns(2, gap="medium")
    with left, st.expander("Result", expanded=not curves):
        _values(row.metrics)
    with right, st.expander("Recipe"):
        _values(row.recipe)


def _head(row: RunRow, curves: list[dict[str, Any]]) -> None:
    at = now()
    with st.container(horizontal=True, vertical_alignment="center"):
        if row.status == "running":
            st.badge("running", icon=":material/progress_activity:", color="blue")
        elif row.status == "succeeded":
            st.badge("succeeded", icon=":material/check:", color="green")
        elif row.status == "held":
            st.badge("held", icon=":material/block:", color="orange")
        else:
            st.badge("failed or stopped", icon=":material/error:", color="red")
        with st.container(key="says-run", width="content"):
            st.text(row.run_id)
        with st.container(key="meta-run", width="content"):
            attempt = f", attempt {row.attempt}" if row.attempt > 1 else ""
            st.text(f"{row.kind}, {row.status}, last heard of {age(row.updated_at, at)}{attempt}")
    if curves:
        newest = curves[-1]
        total = row.metrics.get("total_steps")
        of_total = f" of {total:,}" if _is_number(total) else ""
        with st.container(key="meta-newest"):
            st.text(
                ", ".join(
                    [f"step {newest['step']:,}{of_total}"]
                    + [f"{words} {newest[name]:.4g}" for name, words in _NEWEST if _is_number(newest.get(name))]
                )
            )


_NEWEST = (
    ("loss", "loss"),
    ("reward_accuracy", "reward accuracy"),
    ("reward_margin", "margin"),
    ("chosen_fell", "chosen fell"),
    ("kl", "KL"),
    ("grad_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("pairs", "pairs a step"),
    ("seconds", "seconds a step"),
)


def _charts(curves: list[dict[str, Any]]) -> None:
    top = st.columns(2, gap="small")
    bottom = st.columns(2, gap="small")
    with top[0]:
        st.caption(
            "Loss (by DPO a pair costs ln 2 = 0.693 while policy and reference are equal, without sft_weight and length_weight)"
        )
        _chart(curves, {"loss": "loss"}, alt.Scale(zero=False))
    with top[1]:
        st.caption("Reward accuracy: share of the step's pairs with a positive margin")
        _chart(curves, {"reward_accuracy": "accuracy"}, alt.Scale(domain=[0, 1]))
    with bottom[0]:
        st.caption("Rewards and their margin, in nats")
        rewards = {"reward_chosen": "chosen", "reward_rejected": "rejected", "reward_margin": "margin"}
        _chart(curves, rewards, alt.Scale(zero=True))
    with bottom[1]:
        st.caption("Log-probability of chosen and rejected answers, in nats")
        _chart(curves, {"logp_chosen": "chosen", "logp_rejected": "rejected"}, alt.Scale(zero=False))
    _charts_of_now_and_then(curves)


def _charts_of_now_and_then(curves: list[dict[str, Any]]) -> None:
    """Show what a run measures where its recipe says how often."""
    places = iter(st.columns(3, gap="small"))
    if any("held_out_loss" in row for row in curves):
        with next(places):
            st.caption("Loss of what is held out")
            _chart(curves, {"held_out_loss": "loss"}, alt.Scale(zero=False))
    if any("held_out_accuracy" in row for row in curves):
        with next(places):
            st.caption(
                "Held out: pairs with a positive margin, and chosen answers that are less likely than at the start"
            )
            names = {"held_out_accuracy": "reward accuracy", "held_out_chosen_fell": "chosen fell"}
            _chart(curves, names, alt.Scale(domain=[0, 1]))
    if any("canary_finished" in row for row in curves):
        with next(places):
            st.caption(
                "Canaries, greedy answers to a few prompts: share that ends by itself, and of 4-word runs that occurred before"
            )
            names = {"canary_finished": "finished", "canary_repetition": "repetition"}
            _chart(curves, names, alt.Scale(domain=[0, 1]))


def _chart(curves: list[dict[str, Any]], names: dict[str, str], scale: alt.Scale) -> None:
    points = [
        {"step": row["step"], "curve": words, "value": row[name]}
        for row in curves
        for name, words in names.items()
        if _is_number(row.get(name))
    ]
    if not points:
        st.text("not reported by this run")
        return
    legend = alt.Legend(orient="bottom", direction="horizontal", padding=0) if len(names) > 1 else None
    chart = (
        alt.Chart(pa.Table.from_pylist(points))
        .mark_line(
            point=alt.OverlayMarkDef(size=14) if len(points) < _FEW_POINTS * len(names) else False, strokeWidth=1.6
        )
        .encode(
            x=alt.X("step:Q", title=None, scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5)),
            color=alt.Color("curve:N", title=None, sort=list(names.values()), legend=legend),
            tooltip=["step:Q", "curve:N", "value:Q"],
        )
        .properties(height=_CHART_HEIGHT + (_LEGEND_HEIGHT if legend else 0))
    )
    st.altair_chart(chart)


def _values(tree: dict[str, Any]) -> None:
    rows = [{"key": key, "value": value} for key, value in _flat(tree)]
    if rows:
        st.dataframe(rows, hide_index=True)
    else:
        st.text("nothing recorded")


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else str(value)))
    return out


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    page()
