"""Page: pair snapshots: how signals became pairs, what was dropped and why, and the rows themselves."""

from datetime import UTC, datetime

import streamlit as st

from app.errors import DataError
from app.ledger import SnapshotRow, now
from app.schemas import Pair, Source, Split
from app.storage import Home
from dashboard import parts, reads
from dashboard.advice import age
from dashboard.conversation import word_diff

_JOB = "build-pairs"
_PAGE_ROWS = 50
_PREVIEW = 160
_SNAPSHOTS = 200
_EVER = datetime(1970, 1, 1, tzinfo=UTC)


def page() -> None:
    """Draw the page."""
    where = parts.standing()
    ledger = parts.ledger()
    running = parts.jobs(where)
    newest = reads.pair_snapshots(ledger, limit=_SNAPSHOTS)
    built = reads.newest_built(ledger, where.deployment)
    waiting = reads.signals_since(ledger, where.deployment, built.created_at if built else _EVER)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.title("Pairs", anchor=False)
        off = running is None or where.recipe_path is None or parts.job_is_running(_JOB) or not (waiting or built)
        build = st.button("Build pairs", icon=":material/build:", type="primary", disabled=off)
    with st.container(key="meta-waiting"):
        st.text(f"{waiting:,} signals {'since the newest snapshot' if built else 'wait for the first snapshot'}")
    if build and running is not None:
        parts.start_job(_JOB, lambda submission_id: running.build_pairs(submission_id=submission_id))
        st.rerun()
    parts.follow_job(
        _JOB, running, done="Pairs are built: the newest snapshot is below.", held="No pairs could be built."
    )
    if running is None:
        parts.no_service(where)
    elif where.recipe_path is None:
        parts.empty("Without a recipe no job can start.", "Start this dashboard with: prefloop dashboard RECIPE.yaml")
    if not newest:
        parts.empty(
            "No pair snapshot yet.", "Judge some answers in Chat, then press Build pairs; or: prefloop import FILE..."
        )
        return
    chosen = _choose(newest)
    try:
        _show(where.home, chosen)
    except DataError as error:
        parts.show_problem(error)


def _choose(newest: list[SnapshotRow]) -> SnapshotRow:
    at = now()
    ids = [row.snapshot_id for row in newest]
    by_id = {row.snapshot_id: row for row in newest}
    asked = st.query_params.get("snapshot")
    picked = st.selectbox(
        "Snapshot",
        ids,
        index=ids.index(asked) if asked in by_id else 0,
        format_func=lambda i: f"{i}, {reads.manifest_rows(by_id[i]):,} rows, {age(by_id[i].created_at, at)}",
    )
    st.query_params["snapshot"] = picked
    return by_id[picked]


def _show(home: Home, snapshot: SnapshotRow) -> None:
    counts = _counts(home, snapshot.snapshot_id)
    _funnel(snapshot, counts)
    st.subheader("Rows", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        source = st.selectbox("Source", [None, *Source], format_func=lambda s: "all sources" if s is None else str(s))
        split = st.selectbox("Split", [None, *Split], format_func=lambda s: "both splits" if s is None else str(s))
        number = int(st.number_input("Page", min_value=1, value=1, step=1))
    rows = reads.pair_page(
        home,
        snapshot.snapshot_id,
        source=source,
        split=split,
        offset=(number - 1) * _PAGE_ROWS,
        limit=_PAGE_ROWS,
    )
    if not rows:
        parts.empty("No rows here.", "Choose another source, split or page.")
        return
    event = st.dataframe(
        [_row(pair) for pair in rows],
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key=f"rows-{snapshot.snapshot_id}-{source}-{split}-{number}",
        column_config={name: st.column_config.TextColumn(width="medium") for name in ("prompt", "chosen", "rejected")},
    )
    picked = event["selection"]["rows"]
    if picked:
        _detail(rows[picked[0]])
        return
    asked = st.query_params.get("pair")
    pair = reads.find_pair(home, snapshot.snapshot_id, asked) if asked else None
    if pair is not None:
        _detail(pair)
    else:
        with st.container(key="meta-hint"):
            st.text("Select a row to read it whole.")


@st.cache_data(max_entries=32, show_spinner=False)
def _counts(_home: Home, snapshot_id: str) -> reads.PairCounts:
    return reads.pair_counts(_home, snapshot_id)  # a snapshot never changes


def _funnel(snapshot: SnapshotRow, counts: reads.PairCounts) -> None:
    dropped = reads.manifest_dropped(snapshot)
    funnel = reads.manifest_funnel(snapshot)
    if funnel:
        with st.container(key="meta-funnel"):
            st.text(" → ".join(f"{n:,} {step}" for step, n in funnel))
    left, middle, right = st.columns(3, gap="small")
    with left, st.container(border=True, height="stretch"):
        st.caption("Rows by source")
        with st.container(key="figure-rows"):
            st.text(f"{counts.total:,}")
        with st.container(key="meta-events"):
            st.text(f"from {counts.events:,} judgements")
        _table("source", counts.by_source)
    with middle, st.container(border=True, height="stretch"):
        st.caption("By kind and split")
        with st.container(key="figure-pairs"):
            st.text(f"{counts.by_kind.get('pair', 0):,}")
        with st.container(key="meta-pairs"):
            st.text(f"pairs, {counts.by_split.get(Split.HELD_OUT, 0):,} rows held out for evaluation")
        _table("part", counts.by_kind | counts.by_split)
    with right, st.container(border=True, height="stretch"):
        st.caption("Dropped, by reason")
        with st.container(key="figure-dropped"):
            st.text(f"{sum(dropped.values()):,}")
        with st.container(key="meta-dropped"):
            st.text("rows and judgements, all kept in quarantine")
        _table("reason", dropped)


def _table(name: str, counts: dict[str, int]) -> None:
    if counts:
        st.dataframe([{name: key, "count": n} for key, n in counts.items()], hide_index=True)


def _row(pair: Pair) -> dict[str, object]:
    return {
        "source": pair.source,
        "split": pair.split,
        "prompt": _short(pair.prompt[-1].content if pair.prompt else ""),
        "chosen": _short(pair.chosen.content if pair.chosen else ""),
        "rejected": _short(pair.rejected.content if pair.rejected else ""),
        "weight": pair.weight,
        "simulated": pair.simulated,
        "model": next((r.model_id for r in (pair.rejected, pair.chosen) if r and r.model_id), None),
        "judged": pair.created_at,
    }


def _short(text: str | None) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= _PREVIEW else flat[: _PREVIEW - 1] + "…"


def _detail(pair: Pair) -> None:
    with st.container(border=True):
        with st.container(key="meta-pair"):
            simulated = ", judged by a SIMULATED audience" if pair.simulated else ""
            st.text(f"pair {pair.pair_id}, {pair.source}, {pair.split}, weight {pair.weight:g}{simulated}")
        for message in pair.prompt:
            st.text(f"{message.role}: {message.content or ''}")
        left, right = st.columns(2, gap="small")
        with left, st.container(border=True, height="stretch"):
            st.badge("chosen", color="green")
            st.text(pair.chosen.content if pair.chosen else "none")
        with right, st.container(border=True, height="stretch"):
            st.badge("rejected", color="red")
            st.text(pair.rejected.content if pair.rejected else "none")
        if pair.source == Source.EDIT and pair.chosen and pair.rejected:
            st.caption("The edit, by words")
            st.code(word_diff(pair.rejected.content, pair.chosen.content), language="diff", wrap_lines=True)
        with st.expander("Where it comes from"):
            st.dataframe(
                [
                    {"what": what, "id": value}
                    for what, values in (
                        ("response", pair.response_ids),
                        ("judgement", pair.event_ids),
                        ("who", (pair.subject,) if pair.subject else ()),
                        ("prompt cluster", (pair.cluster,)),
                    )
                    for value in values
                ],
                hide_index=True,
            )


if __name__ == "__main__":
    page()
