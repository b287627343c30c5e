"""Page: the loop at a glance, and in words what blocks the next ship."""

from datetime import datetime

import streamlit as st

from app.ledger import AuditRow, now
from dashboard import parts, reads
from dashboard.advice import STEPS, Advice, Step, advise, age
from dashboard.reads import Loop

_REFRESH_S = 15


def page() -> None:
    """Draw the page."""
    st.title("Loop", anchor=False)
    st.fragment(_state, run_every=_REFRESH_S)()


def _state() -> None:
    where = parts.standing()
    ledger = parts.ledger()
    state = reads.loop(ledger, where.deployment)
    at = now()
    pairs = reads.trainable_rows(state.pairs, where.objective) if state.pairs else 0
    advice = advise(state, pairs=pairs, min_pairs=where.min_pairs, recipe=where.recipe_name, at=at)
    _strip(state, advice, pairs, where.min_pairs, at)
    _next(advice)
    left, right = st.columns(2, gap="medium")
    with left:
        _champion(state, at)
        _moves(reads.champion_moves(ledger, where.deployment, limit=8), at)
    with right:
        _signals(state, at)


def _strip(state: Loop, advice: Advice, pairs: int, min_pairs: int, at: datetime) -> None:
    figures = _figures(state, pairs, min_pairs, at)
    for column, step in zip(st.columns(len(STEPS), gap="small"), STEPS, strict=True):
        with column, st.container(border=True, height="stretch", gap="xsmall"):
            with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
                _TITLES[step]()
                if step == advice.step:
                    st.badge("blocks", color="orange")
            figure, *notes = figures[step]
            with st.container(key=f"figure-{step}"):
                st.text(figure)
            with st.container(key=f"meta-{step}", gap="xxsmall"):
                for note in notes:
                    st.text(note)


_TITLES = {
    "served": lambda: st.caption("Served"),
    "signals": lambda: st.caption("Signals"),
    "pairs": lambda: st.caption("Pairs"),
    "train": lambda: st.caption("Train"),
    "gate": lambda: st.caption("Gate"),
    "ship": lambda: st.caption("Ship"),
}


def _figures(state: Loop, pairs: int, min_pairs: int, at: datetime) -> dict[Step, list[str]]:
    def when(moment: datetime | None) -> list[str]:
        return [age(moment, at)] if moment else []

    run, champion, evaluation = state.run, state.champion, state.evaluation
    return {
        "served": [f"{state.served.total:,}", f"{state.served.simulated:,} simulated", *when(state.served.newest)],
        "signals": [
            f"{state.signals.total:,}",
            f"{state.signals.simulated:,} simulated",
            f"{state.new_signals:,} since the last pairs",
            *when(state.signals.newest),
        ],
        "pairs": [f"{pairs:,}", f"{min_pairs:,} needed", *when(state.pairs.created_at if state.pairs else None)],
        "train": [run.status, f"{state.steps:,} steps", *when(run.updated_at)] if run else ["none", "no run yet"],
        "gate": [evaluation.verdict, *when(evaluation.created_at)] if evaluation else ["none", "nothing evaluated"],
        "ship": [f"{state.ships:,}", "ships and rollbacks", *when(champion.updated_at)]
        if champion
        else ["none", "no champion yet"],
    }


def _next(advice: Advice) -> None:
    with st.container(border=True, gap="xsmall"):
        st.caption("What blocks the next ship")
        with st.container(key="says-blocks"):
            st.text(advice.blocks)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.text(advice.todo)
            _link(advice.page)


def _link(page: str | None) -> None:
    if page == "chat.py":
        st.page_link("chat.py", label="Open Chat", icon=":material/chat:")
    elif page == "pairs.py":
        st.page_link("pairs.py", label="Open Pairs", icon=":material/compare_arrows:")
    elif page == "runs.py":
        st.page_link("runs.py", label="Open Runs", icon=":material/show_chart:")
    elif page == "models.py":
        st.page_link("models.py", label="Open Models", icon=":material/deployed_code:")


def _champion(state: Loop, at: datetime) -> None:
    st.subheader("Champion", anchor=False)
    champion = state.champion
    if champion is None:
        parts.empty("Nothing is shipped yet.", "The service puts the SFT checkpoint in place at its first start.")
        return
    with st.container(key="says-champion"):
        st.text(champion.model_id)
    with st.container(key="meta-champion", gap="xxsmall"):
        st.text(f"revision {champion.revision}, since {age(champion.updated_at, at)}")
        st.text(f"before it: {champion.previous_model_id or 'none'}")


def _moves(moves: list[AuditRow], at: datetime) -> None:
    if moves:
        st.dataframe(
            [
                {
                    "when": age(row.at, at),
                    "to": row.detail.get("to"),
                    "by": row.actor,
                    "why": row.detail.get("reason"),
                }
                for row in moves
            ],
            hide_index=True,
        )


def _signals(state: Loop, at: datetime) -> None:
    st.subheader("Signals by kind", anchor=False)
    if not state.signals.total:
        parts.empty("No answer was judged yet.", "Thumbs, edits and comparisons of the chat arrive here.")
        return
    st.dataframe(
        [
            {
                "kind": kind,
                "count": tally.total,
                "simulated": tally.simulated,
                "newest": age(tally.newest, at) if tally.newest else None,
            }
            for kind, tally in state.signals.by_kind.items()
        ],
        hide_index=True,
    )
    with st.container(key="meta-rate"):
        st.text(f"{state.signals.per_day:,.1f} a day over the last seven days")


if __name__ == "__main__":
    page()
