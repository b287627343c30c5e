"""Cutting groups to what an objective learns from, and pairing answers with other prompts."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import RecipeError
from app.training.judgements import balanced, distinct, divide, for_unit, in_rows, with_strangers
from app.training.objectives import load_objective
from app.training.tokenization import Group, Label, Preference


def group(name: str, answers: int, *, pairs=(), labels=(), split="train", scored=True) -> Group:
    responses = tuple((10 * int(name) + k, 1) for k in range(answers))
    logps = tuple(-float(k) for k in range(answers)) if scored else None
    return Group(name, f"c{name}", split, (int(name), 5), responses, tuple(pairs), tuple(labels), logps)


def pair(chosen: int, rejected: int, weight: float = 1.0) -> Preference:
    return Preference(chosen, rejected, weight, f"{chosen}>{rejected}", "import")


def label(response: int, liked: bool, weight: float = 1.0) -> Label:
    return Label(response, liked, weight, f"{response}{'+' if liked else '-'}", "thumbs")


MIXED = group("1", 4, pairs=[pair(2, 1)], labels=[label(3, True), label(0, False)])
LONE = group("2", 2, labels=[label(1, False), label(0, True)])


def test_a_pairwise_objective_keeps_pairs_and_drops_what_nothing_names():
    kept, left_out = for_unit([MIXED, LONE], "pairs")
    assert left_out == 4
    (only,) = kept
    assert only.responses == (MIXED.responses[1], MIXED.responses[2])
    assert only.reference_logps == (-1.0, -2.0)
    assert only.pairs == (Preference(1, 0, 1.0, "2>1", "import"),)
    assert only.labels == ()


def test_for_labels_the_chosen_answer_of_a_pair_is_liked_and_the_rejected_one_is_not():
    (mixed, lone), left_out = for_unit([MIXED, LONE], "labels")
    assert left_out == 0
    assert {(mixed.responses[x.response], x.label) for x in mixed.labels} == {
        (MIXED.responses[2], True),
        (MIXED.responses[1], False),
        (MIXED.responses[3], True),
        (MIXED.responses[0], False),
    }
    assert mixed.pairs == ()
    assert lone == LONE


def test_held_out_groups_keep_their_pairs_for_the_accuracy_of_the_reward():
    (held_out,), _ = for_unit([group("1", 2, pairs=[pair(0, 1)], split="held_out")], "labels")
    assert held_out.pairs == (pair(0, 1),)
    assert len(held_out.labels) == 2


def test_imitation_takes_good_answers_only_and_no_token_of_others():
    (mixed, lone), left_out = for_unit([MIXED, LONE], "good")
    assert mixed.responses == (MIXED.responses[2], MIXED.responses[3])
    assert lone.responses == (LONE.responses[0],)
    assert all(x.label for g in (mixed, lone) for x in g.labels)
    assert left_out == 2


def test_equal_judgements_become_one_with_the_sum_of_their_weights():
    both = group("1", 3, pairs=[pair(0, 1, 0.5), pair(0, 2, 2.0)])
    (only,), _ = for_unit([both], "labels")
    assert sorted((x.response, x.label, x.weight) for x in only.labels) == [
        (0, True, 2.5),
        (1, False, 0.5),
        (2, False, 2.0),
    ]


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@given(sizes=SIZES, seed=st.integers(0, 5))
def test_strangers_are_a_derangement_of_all_labelled_answers(sizes, seed):
    groups = [group(str(i), n, labels=[label(k, True) for k in range(n)], scored=False) for i, n in enumerate(sizes)]
    found = with_strangers(groups, max_length=99, seed=seed)
    strangers = []
    for before, after in zip(groups, found, strict=True):
        own, others = divide(after)
        assert own.responses == before.responses
        assert own.labels == before.labels
        mine = others.responses if others else ()
        assert not set(mine) & set(before.responses)
        strangers += mine
    answers = Counter(r for g in groups for r in g.responses)
    if max(sizes) * 2 <= sum(sizes):
        assert Counter(strangers) == answers
    assert not Counter(strangers) - answers


def test_a_prompt_of_many_lone_answers_becomes_rows_whose_judgements_are_all_there_once():
    many = group("1", 11, labels=[label(k, k % 2 == 0) for k in range(11)] + [label(0, False)])
    rows = in_rows([many, LONE], answers=4)
    assert [len(row.responses) for row in rows] == [4, 4, 3, 2]
    assert rows[3] == LONE
    assert len({row.group_id for row in rows}) == 4
    judged = Counter((row.responses[x.response], x.label, x.pair_id) for row in rows[:3] for x in row.labels)
    assert judged == Counter((many.responses[x.response], x.label, x.pair_id) for x in many.labels)
    assert [row.reference_logps for row in rows[:3]] == [many.reference_logps[i : i + 4] for i in (0, 4, 8)]


def test_pairs_that_are_measured_stay_in_one_row():
    held_out = group("1", 5, pairs=[pair(4, 1)], labels=[label(k, True) for k in range(5)], split="held_out")
    paired, *lone = in_rows([held_out], answers=2)
    assert paired.pairs == (Preference(1, 0, 1.0, "4>1", "import"),)
    assert paired.responses == (held_out.responses[1], held_out.responses[4])
    assert [(len(row.responses), row.pairs) for row in lone] == [(2, ()), (1, ())]
    assert in_rows([held_out], answers=3) == [held_out]


@given(sizes=SIZES, seed=st.integers(0, 5))
def test_no_row_of_a_prompt_meets_an_answer_of_another_row_of_it(sizes, seed):
    groups = [group(str(i), n, labels=[label(k, True) for k in range(n)], scored=False) for i, n in enumerate(sizes)]
    found = with_strangers(in_rows(groups, answers=2), max_length=99, seed=seed)
    for row in found:
        own, others = divide(row)
        mine = groups[int(row.group_id.split("-")[0])].responses
        assert set(own.responses) <= set(mine)
        assert not set(others.responses if others else ()) & set(mine)


def test_a_stranger_is_cut_to_the_window_and_held_out_groups_get_none():
    long = Group("1", "c", "train", (1, 2), ((3, 4, 5, 6),), labels=(label(0, True),))
    short = Group("2", "d", "train", (7,) * 5, ((8, 9),), labels=(label(0, True),))
    kept_apart = Group("3", "e", "held_out", (7,), ((8, 9),), labels=(label(0, True),))
    one, other, untouched = with_strangers([long, short, kept_apart], max_length=7, seed=0)
    assert one.responses[1] == (8, 9)
    assert other.responses[1] == (3, 4)
    assert untouched == kept_apart


def test_divide_gives_strangers_their_own_reference_scores():
    whole = group("1", 3, labels=[label(1, True)])
    own, strangers = divide(whole)
    assert (own.responses, own.reference_logps) == ((whole.responses[1],), (-1.0,))
    assert (strangers.responses, strangers.reference_logps) == ((whole.responses[0], whole.responses[2]), (0.0, -2.0))
    assert divide(own) == (own, None)


@pytest.mark.parametrize(
    ("liked", "disliked", "weights"),
    [(10, 10, (1.0, 1.0)), (12, 10, (1.0, 1.0)), (20, 10, (1.0, 1.5)), (5, 20, (4.0, 1.0)), (0, 5, (1.0, 1.0))],
)
def test_the_rarer_kind_is_weighed_up_until_the_shares_lie_within_1_and_4_thirds(liked, disliked, weights):
    options = balanced(
        {"beta": 0.1, "desirable_weight": None, "undesirable_weight": None}, liked=liked, disliked=disliked
    )
    assert (options["desirable_weight"], options["undesirable_weight"]) == pytest.approx(weights)
    if liked and disliked:
        assert (
            1 - 1e-9 <= liked * options["desirable_weight"] / (disliked * options["undesirable_weight"]) <= 4 / 3 + 1e-9
        )


def test_answers_that_are_shared_by_pairs_are_balanced_by_their_weights():
    """One answer that beats three has the weight of three."""
    (only,), _ = for_unit([group("1", 4, pairs=[pair(0, k) for k in (1, 2, 3)])], "labels")
    weights = {liked: sum(x.weight for x in only.labels if x.label == liked) for liked in (True, False)}
    options = balanced(
        {"desirable_weight": None, "undesirable_weight": None}, liked=weights[True], disliked=weights[False]
    )
    assert options == {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert len(distinct([only])) == 3


def test_weights_of_a_function_of_ones_own_are_balanced_too():
    name = "app.training.objectives:kto"
    objective = load_objective(name, {"beta": 0.2})
    options = balanced({"beta": 0.2, **objective.open_weights}, liked=5, disliked=20)
    assert options == {"beta": 0.2, "desirable_weight": 4.0, "undesirable_weight": 1.0}
    assert load_objective(name, options).open_weights == {}
    with pytest.raises(RecipeError, match="needs `desirable_weight` and `undesirable_weight`, or neither"):
        load_objective(name, {"desirable_weight": 1.0, "undesirable_weight": None})


def test_weights_that_a_recipe_gives_stay():
    given_ = {"desirable_weight": 1.0, "undesirable_weight": 2.0}
    assert balanced(given_, liked=1, disliked=9) == given_
    assert balanced({"beta": 0.1}, liked=1, disliked=9) == {"beta": 0.1}
