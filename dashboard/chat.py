"""Page: talk to the champion and judge its answers with a thumb, an edit, or a blind comparison of two."""

import random
import uuid

import streamlit as st

from app.errors import ServiceError
from dashboard import parts
from dashboard.conversation import TAGS, Comparison, Conversation, SideVerdict, Turn, word_diff
from dashboard.service import Answer, Gateway

_STATE = "conversation"
_PROBLEM = "chat-problem"
_REGENERATE_TEMPERATURE = 1.0


def page() -> None:
    """Draw the page."""
    where = parts.standing()
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.title("Chat", anchor=False)
        if st.button("New conversation", icon=":material/add:"):
            st.session_state.pop(_STATE, None)
    st.caption(
        "What you write, the answers and your judgements are stored in this home's ledger under a name derived from "
        "your account, and may be used to train the next model. Write nothing that must not be stored."
    )
    gateway = parts.gateway(where.home)
    if gateway is None:
        parts.no_service(where)
        return
    problem = st.session_state.pop(_PROBLEM, None)
    conversation: Conversation = st.session_state.setdefault(_STATE, Conversation())
    if not conversation.turns:
        parts.empty(
            "No message yet.",
            "Send one below, then judge the answer: a thumb, an edit, or a second answer to compare with.",
        )
    for index, turn in enumerate(conversation.turns):
        _turn(gateway, conversation, index, turn)
    if problem is not None:
        parts.show_problem(problem)
    prompt = st.chat_input("Message to the champion", max_chars=32_000)
    if prompt and prompt.strip():
        with st.chat_message("user", avatar=":material/person:"):
            st.text(prompt)
        with st.chat_message("assistant", avatar=":material/smart_toy:"):
            answer = _stream(gateway, conversation, prompt)
        if answer is not None:
            conversation.turns.append(Turn(prompt, answer))
            st.rerun()


def _stream(gateway: Gateway, conversation: Conversation, prompt: str) -> Answer | None:
    slot = st.empty()
    slot.text("…")
    answer: Answer | None = None
    try:
        for answer in gateway.ask(
            conversation.messages(prompt),
            conversation_id=conversation.conversation_id,
        ):
            slot.text(answer.text or "…")
    except ServiceError as error:
        slot.empty()
        parts.show_problem(error)
        return None
    return answer


def _turn(gateway: Gateway, conversation: Conversation, index: int, turn: Turn) -> None:
    with st.chat_message("user", avatar=":material/person:"):
        st.text(turn.prompt)
    with st.chat_message("assistant", avatar=":material/smart_toy:"):
        if turn.comparison is not None and turn.comparison.verdict is None:
            _compare(gateway, conversation, index, turn, turn.comparison)
            return
        if turn.editing:
            _edit(gateway, turn)
            return
        st.text(turn.kept_text)
        _origin(turn)
        _actions(gateway, conversation, index, turn)


def _origin(turn: Turn) -> None:
    answer = turn.answer
    with st.container(key=f"meta-{answer.response_id}"):
        ended = ", cut by the token limit" if answer.finish_reason == "length" else ""
        edited = ", edited by you and saved as better answer" if turn.edit is not None else ""
        compared = ""
        if turn.comparison is not None and turn.comparison.verdict is not None:
            compared = (
                f", compared with an answer of {turn.comparison.other.model_id}: {turn.comparison.verdict} (A is shown)"
            )
        st.text(f"{answer.model_id}{ended}{edited}{compared}")


def _actions(gateway: Gateway, conversation: Conversation, index: int, turn: Turn) -> None:
    key = turn.answer.response_id
    st.session_state.setdefault(f"thumb-{key}", None if turn.thumb is None else int(turn.thumb == "up"))
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.feedback("thumbs", key=f"thumb-{key}", on_change=_thumb, args=(gateway, turn))
        st.button(
            "Edit", key=f"edit-{key}", icon=":material/edit:", type="tertiary", on_click=_begin_edit, args=(turn,)
        )
        is_last = index == len(conversation.turns) - 1
        if (
            is_last
            and turn.comparison is None
            and turn.edit is None
            and st.button(
                "Regenerate and compare", key=f"regenerate-{key}", icon=":material/compare_arrows:", type="tertiary"
            )
        ):
            _regenerate(gateway, conversation, index, turn)
    if turn.thumb == "down" and not turn.reasons_sent:
        _reasons(gateway, turn)


def _reasons(gateway: Gateway, turn: Turn) -> None:
    key = turn.answer.response_id
    with st.container(border=True):
        st.caption("What is wrong with it? Optional. An edit teaches most.")
        tags = st.pills("Reasons", TAGS, selection_mode="multi", key=f"tags-{key}", label_visibility="collapsed")
        comment = st.text_input("Comment", key=f"comment-{key}", max_chars=2_000, placeholder="In your words")
        if st.button("Send reasons", key=f"reasons-{key}") and (tags or comment):
            try:
                gateway.give_feedback(key, "thumb", "down", event_id=uuid.uuid4().hex, tags=tags, comment=comment or "")
            except ServiceError as error:
                parts.show_problem(error)
                return
            turn.reasons_sent = True
            st.rerun()


def _edit(gateway: Gateway, turn: Turn) -> None:
    key = turn.answer.response_id
    edited = st.text_area("Better answer", turn.kept_text, key=f"text-{key}", height=180, max_chars=64_000) or ""
    changed = edited.strip() != turn.answer.text.strip()
    st.caption("Your changes, by words. They update when you leave the field or press Ctrl+Enter.")
    st.code(word_diff(turn.answer.text, edited) if changed else "no change yet", language="diff", wrap_lines=True)
    with st.container(horizontal=True):
        save = st.button("Save as better answer", key=f"save-{key}", type="primary")
        st.button("Cancel", key=f"cancel-{key}", type="tertiary", on_click=_end_edit, args=(turn,))
    if not save:
        return
    if not changed or not edited.strip():
        with st.container(border=True):
            st.text("Nothing to save: the text is empty or the same as the answer.")
        return
    try:
        gateway.give_feedback(key, "edit", edited, event_id=uuid.uuid4().hex)
    except ServiceError as error:
        parts.show_problem(error)
        return
    turn.edit, turn.editing = edited, False
    st.rerun()


def _compare(gateway: Gateway, conversation: Conversation, index: int, turn: Turn, comparison: Comparison) -> None:
    st.caption("Which answer is better? The order is random; the models are named after your choice.")
    shown = [turn.answer, comparison.other] if comparison.a_is_left else [comparison.other, turn.answer]
    left, right = st.columns(2, gap="small")
    for column, answer in zip((left, right), shown, strict=True):
        with column, st.container(border=True, height="stretch"):
            st.text(answer.text)
    side: SideVerdict | None = None
    key = turn.answer.response_id
    with st.container(horizontal=True, gap="small"):
        if st.button("Left much better", key=f"left2-{key}", shortcut="1"):
            side = "left>>"
        if st.button("Left better", key=f"left-{key}", shortcut="2"):
            side = "left>"
        if st.button("Equally good", key=f"tie-{key}", shortcut="3"):
            side = "tie"
        if st.button("Both bad", key=f"bad-{key}", shortcut="4"):
            side = "both_bad"
        if st.button("Right better", key=f"right-{key}", shortcut="5"):
            side = "right>"
        if st.button("Right much better", key=f"right2-{key}", shortcut="6"):
            side = "right>>"
    if side is None:
        return
    verdict = comparison.verdict_for(side)
    try:
        gateway.compare(
            turn.answer.response_id,
            comparison.other.response_id,
            verdict,
            shown_order=[answer.response_id for answer in shown],
            event_id=comparison.event_id,
        )
    except ServiceError as error:
        parts.show_problem(error)
        return
    conversation.settle(index, verdict)
    st.rerun()


def _regenerate(gateway: Gateway, conversation: Conversation, index: int, turn: Turn) -> None:
    try:
        with st.spinner("Asking for a second answer"):
            *_, other = gateway.ask(
                conversation.messages(turn.prompt, turn=index),
                conversation_id=conversation.conversation_id,
                temperature=_REGENERATE_TEMPERATURE,
                seed=random.SystemRandom().getrandbits(31),
            )
    except ServiceError as error:
        parts.show_problem(error)
        return
    if other.text == turn.answer.text:
        parts.empty("The second answer is the same as the first.", "There is nothing to compare; try again.")
        return
    turn.comparison = Comparison.shuffled(other)
    st.rerun()


def _thumb(gateway: Gateway, turn: Turn) -> None:
    key = f"thumb-{turn.answer.response_id}"
    chosen = st.session_state.get(key)
    if chosen is None:
        # A second click would clear the thumb on the screen only: what was sent is kept, and can be turned over.
        st.session_state[key] = None if turn.thumb is None else int(turn.thumb == "up")
        return
    value = "up" if chosen else "down"
    try:
        gateway.give_feedback(turn.answer.response_id, "thumb", value, event_id=uuid.uuid4().hex)
    except ServiceError as error:
        st.session_state[_PROBLEM] = error
        st.session_state[key] = None if turn.thumb is None else int(turn.thumb == "up")
        return
    turn.thumb, turn.reasons_sent = value, False


def _begin_edit(turn: Turn) -> None:
    turn.editing = True


def _end_edit(turn: Turn) -> None:
    turn.editing = False


if __name__ == "__main__":
    page()
