"""The frame of the dashboard: navigation, what is served, and where the state lives. One file for each page beside it."""

import streamlit as st

from dashboard import parts

# Sizes only: colours come from the theme, so that light and dark both stay readable.
_STYLE = """<style>
[class*="st-key-figure"] [data-testid="stText"] {font-size: 1.5rem; font-weight: 600; line-height: 1.2;
  font-variant-numeric: tabular-nums;}
[class*="st-key-meta"] [data-testid="stText"] {font-size: 0.85rem; opacity: 0.7;}
[class*="st-key-says"] [data-testid="stText"] {font-size: 1.05rem; font-weight: 600;}
[data-testid="stMainBlockContainer"] {padding-top: 4.25rem; padding-bottom: 2rem; max-width: 80rem;}
</style>"""

# Inline, because Streamlit fetches the named icons of a browser tab from a foreign server.
_TAB_ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#1f6feb" stroke-width="2.5">
<path d="M4 12a8 8 0 0 1 14-5.3M20 12a8 8 0 0 1-14 5.3"/><path d="M18 2v5h-5M6 22v-5h5"/></svg>"""


def frame() -> None:
    """Draw the frame and run the page that was asked for."""
    st.set_page_config(page_title="prefloop", page_icon=_TAB_ICON, layout="wide")
    st.html(_STYLE)
    page = st.navigation(
        [
            st.Page("overview.py", title="Loop", icon=":material/sync:", default=True),
            st.Page("chat.py", title="Chat", icon=":material/chat:"),
            st.Page("pairs.py", title="Pairs", icon=":material/compare_arrows:"),
            st.Page("runs.py", title="Runs", icon=":material/show_chart:"),
            st.Page("models.py", title="Models", icon=":material/deployed_code:"),
        ]
    )
    with st.sidebar:
        _surroundings()
    page.run()


def _surroundings() -> None:
    where = parts.standing()
    health = parts.health(where.home)
    with st.container(key="meta-sidebar", gap="xsmall"):
        if health is None:
            st.badge("Gateway not reachable", icon=":material/cloud_off:", color="orange")
        elif health.model_id is None:
            st.badge("No replica is ready", icon=":material/hourglass:", color="orange")
        elif health.status == "switching":
            st.badge("Model is switching", icon=":material/swap_horiz:", color="blue")
        elif health.status == "degraded":
            st.badge("Gateway degraded", icon=":material/warning:", color="orange")
        else:
            st.badge("Gateway up", icon=":material/cloud_done:", color="green")
        if health is not None and health.model_id is not None:
            st.text(f"serves {health.model_id}")
        st.text(f"deployment {where.deployment}")
        st.text(f"recipe {where.recipe_name if where.recipe_path else 'none'}")
        st.text(f"home {where.home.uri}")


if __name__ == "__main__":
    frame()
