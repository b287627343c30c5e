from hypothesis import given
from hypothesis import strategies as st

from dashboard.conversation import Comparison, Conversation, Turn, word_diff
from dashboard.service import Answer

FIRST, SECOND = Answer("a", "model-1", "first", "stop"), Answer("b", "model-2", "second", "stop")


def compared(*, a_is_left: bool) -> Conversation:
    return Conversation(turns=[Turn("Which?", FIRST, comparison=Comparison(SECOND, a_is_left))])


def test_left_means_the_other_answer_where_the_sides_are_swapped() -> None:
    assert Comparison(SECOND, a_is_left=True).verdict_for("left>>") == "A>>B"
    assert Comparison(SECOND, a_is_left=False).verdict_for("left>>") == "B>>A"
    assert Comparison(SECOND, a_is_left=False).verdict_for("right>") == "A>B"


def test_ties_have_no_side() -> None:
    for a_is_left in (True, False):
        assert Comparison(SECOND, a_is_left).verdict_for("tie") == "A=B"
        assert Comparison(SECOND, a_is_left).verdict_for("both_bad") == "both_bad"


def test_both_orders_occur() -> None:
    assert {Comparison.shuffled(SECOND).a_is_left for _ in range(200)} == {True, False}


def test_the_conversation_goes_on_with_the_preferred_answer() -> None:
    lost = compared(a_is_left=True)
    lost.settle(0, "B>A")
    assert [m.content for m in lost.messages("Next?")] == ["Which?", "second", "Next?"]
    won = compared(a_is_left=True)
    won.settle(0, "A=B")
    assert [m.content for m in won.messages("Next?")] == ["Which?", "first", "Next?"]


def test_a_settled_comparison_reads_the_same_after_the_answers_changed_places() -> None:
    conversation = compared(a_is_left=True)
    conversation.settle(0, "B>>A")
    turn = conversation.turns[0]
    assert turn.answer == SECOND
    assert turn.comparison is not None
    assert turn.comparison.verdict == "A>>B"
    assert turn.comparison.other == FIRST


def test_regenerating_a_turn_asks_what_was_asked_then() -> None:
    conversation = Conversation(turns=[Turn("One?", FIRST), Turn("Two?", SECOND)])
    assert [m.content for m in conversation.messages("Two?", turn=1)] == ["One?", "first", "Two?"]


def test_an_edit_replaces_the_answer_in_what_is_sent_next() -> None:
    conversation = Conversation(turns=[Turn("One?", FIRST, edit="better")])
    assert [m.content for m in conversation.messages("Two?")] == ["One?", "better", "Two?"]


def test_a_diff_marks_what_was_taken_out_and_put_in() -> None:
    assert word_diff("two and two is five", "two and two is four") == "  two and two is\n- five\n+ four"


@given(st.text(alphabet="ab \n", max_size=40), st.text(alphabet="ab \n", max_size=40))
def test_a_diff_holds_every_word_of_both_texts(before: str, after: str) -> None:
    lines = word_diff(before, after).splitlines()
    assert " ".join(line[2:] for line in lines if line[0] in " -").split() == before.split()
    assert " ".join(line[2:] for line in lines if line[0] in " +").split() == after.split()
