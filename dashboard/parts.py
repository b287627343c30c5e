"""What several pages share on the screen: where they stand, what went wrong, what to do next, and a job's progress.

Text that a user, a model or a log wrote goes through `st.text`, `st.code` and `st.dataframe` only, which render nothing.
"""

import getpass
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from app.config import PairSection, ServingSection, TrainSection, load_recipe
from app.errors import PrefloopError, ServiceError
from app.ledger import Ledger
from app.services import Services
from app.storage import Home
from dashboard.launch import RECIPE_VARIABLE
from dashboard.service import Gateway, Health, Job, Jobs

_POLL_S = 2.0


@dataclass(frozen=True)
class Standing:
    """Where the dashboard stands: the home, and what the recipe says about the loop."""

    home: Home
    recipe_path: str | None
    deployment: str
    min_pairs: int
    objective: str

    @property
    def recipe_name(self) -> str:
        """How the words of the screen name the recipe file."""
        return Path(self.recipe_path).name if self.recipe_path else "RECIPE.yaml"


def standing() -> Standing:
    """Read where the dashboard stands from its environment; a broken recipe stops the page with its faults."""
    path = os.environ.get(RECIPE_VARIABLE) or None
    pairs, serving, train = PairSection(), ServingSection(), TrainSection()
    if path is not None:
        try:
            recipe = load_recipe(path)
        except PrefloopError as error:
            show_problem(error)
            st.stop()
        pairs, serving, train = recipe.pairs, recipe.serving, recipe.train
    return Standing(Home.from_environment(), path, serving.deployment, pairs.min_pairs, train.objective)


def ledger() -> Ledger:
    """Return the ledger of the home, opened once for all sessions."""
    try:
        return _ledger(Home.from_environment().ledger_url)
    except PrefloopError as error:
        show_problem(error)
        st.stop()


def gateway(home: Home) -> Gateway | None:
    """Return the running gateway, or None where no service is recorded."""
    services = _services(home)
    return Gateway(services.gateway_url, home.api_key(), subject=actor()) if services else None


def health(home: Home) -> Health | None:
    """Ask the gateway what it serves, at most every few seconds; None where none answers."""
    services = _services(home)
    return _health(services.gateway_url) if services else None


def jobs(where: Standing) -> Jobs | None:
    """Return the cluster's Jobs API, or None where no service is recorded."""
    services = _services(where.home)
    if services is None:
        return None
    return Jobs(services.ray_dashboard_url, where.home, recipe=where.recipe_path, actor=actor())


def actor() -> str:
    """Name who acts: the account that runs the dashboard, which listens on the loopback address only."""
    try:
        return f"dashboard:{getpass.getuser()}"
    except (KeyError, OSError):
        return f"dashboard:{os.getuid()}"  # containers may run under an id without a name


def show_problem(error: PrefloopError) -> None:
    """Show an error in its own words."""
    with st.container(border=True):
        st.badge("Problem", icon=":material/error:", color="red")
        st.text(str(error))


def no_service(where: Standing) -> None:
    """Say that nothing runs, and how to start it."""
    empty("No running service is known in this home.", f"Start it: prefloop serve {where.recipe_name}")


def empty(why: str, todo: str) -> None:
    """Show an empty state: why there is nothing, and what to do next."""
    with st.container(border=True):
        st.text(why)
        st.text(todo)


def start_job(slot: str, submit: Callable[[str], str]) -> None:
    """Submit a job once for each click and remember it under `slot`."""
    try:
        st.session_state[slot] = submit(f"prefloop-{slot}-{uuid.uuid4().hex[:12]}")
        st.session_state.pop(_over(slot), None)
    except ServiceError as error:
        st.session_state[_failed(slot)] = error


def job_is_running(slot: str) -> bool:
    """True while the job of a slot has not ended."""
    return slot in st.session_state and _over(slot) not in st.session_state


def dismiss_job(slot: str) -> None:
    """Forget the job of a slot, which goes on if it has not ended."""
    for name in (slot, _over(slot), _failed(slot)):
        st.session_state.pop(name, None)


def follow_job(slot: str, running: Jobs | None, *, done: str, held: str) -> None:
    """Show the job of a slot until it is dismissed, and rerun the page when it ends.

    Args:
        slot: what `start_job` was given.
        running: the Jobs API.
        done: words for success.
        held: words for the verdict HOLD.
    """
    error = st.session_state.pop(_failed(slot), None)
    if error is not None:
        show_problem(error)
    if running is None or slot not in st.session_state:
        return
    st.fragment(_job_card, run_every=_POLL_S if job_is_running(slot) else None)(slot, running, done, held)


def _job_card(slot: str, running: Jobs, done: str, held: str) -> None:
    submission_id = st.session_state.get(slot)
    if submission_id is None:
        return
    try:
        job = running.find(submission_id)
        log = running.log_tail(submission_id)
    except ServiceError as error:
        show_problem(error)
        return
    if job.is_over and job_is_running(slot):
        st.session_state[_over(slot)] = True
        st.rerun()
    with st.container(border=True):
        words, badge = _job_words(job, done, held)
        with st.container(horizontal=True, vertical_alignment="center"):
            badge()
            st.text(words)
        with st.expander("Log of the job", expanded=job.status == "FAILED" and not job.held):
            st.code(log or job.message or "nothing yet", language=None, height=220)
        if job.is_over and st.button("Dismiss", key=f"{slot}-dismiss", type="tertiary"):
            dismiss_job(slot)
            st.rerun()


def _job_words(job: Job, done: str, held: str) -> tuple[str, Callable[[], object]]:
    if job.status == "SUCCEEDED":
        return done, lambda: st.badge("Done", icon=":material/check:", color="green")
    if job.held:
        return held, lambda: st.badge("Hold", icon=":material/block:", color="orange")
    if job.status == "FAILED":
        code = "" if job.exit_code is None else f" with exit code {job.exit_code}"
        return f"The job failed{code}.", lambda: st.badge("Failed", icon=":material/error:", color="red")
    if job.status == "STOPPED":
        return "The job was stopped.", lambda: st.badge("Stopped", icon=":material/stop_circle:", color="gray")
    words = "The job waits for a place on the cluster." if job.status == "PENDING" else "The job is running."
    return words, lambda: st.badge("Running", icon=":material/progress_activity:", color="blue")


def _services(home: Home) -> Services | None:
    try:
        return Services.read(home)
    except PrefloopError as error:
        show_problem(error)
        st.stop()


@st.cache_resource(show_spinner=False)
def _ledger(url: str) -> Ledger:
    return Ledger.open(url)


@st.cache_data(ttl=3, show_spinner=False)
def _health(url: str) -> Health | None:
    try:
        return Gateway(url, "", subject="").health()
    except ServiceError:
        return None


def _over(slot: str) -> str:
    return f"{slot}-over"


def _failed(slot: str) -> str:
    return f"{slot}-failed"
