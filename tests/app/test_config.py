"""Recipes: every fault at once, with the near miss, and values as YAML means them."""

import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from app.config import (
    OBJECTIVE_OPTIONS,
    SAME_STEPS,
    GateSection,
    PairSection,
    Recipe,
    differing,
    load_recipe,
    parse_recipe,
    unusual_options,
    unusual_rate,
    usual_learning_rate,
)
from app.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_that_ships_is_valid(path):
    assert load_recipe(path).name


def test_all_faults_are_listed_at_once_with_the_nearest_key(tmp_path):
    path = write(
        tmp_path,
        "name: x\ntrain:\n  learning_rte: 1e-4\n  options: {beta: -1, gama: 2}\nworkers:\n  worker: 2\ntrian: {}\nserving:\n  port: no\n",
    )
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, ["pairs.min_pairs=0"])
    message = str(refused.value)
    assert f"recipe `{path}` has 7 fault(s)" in message
    for fault in (
        "`train.learning_rte`: unknown key; did you mean `learning_rate`?",
        "`train.options.gama`: unknown key; known: beta, label_smoothing, length_weight, sft_weight, wpo",
        "`train.options.beta`: Input should be greater than 0 (got -1)",
        "`workers.worker`: unknown key; did you mean `workers`?",
        "`trian`: unknown key; did you mean `train`?",
        "`pairs.min_pairs`: Input should be greater than or equal to 1 (got 0)",
        "`serving.port`",
    ):
        assert fault in message


def test_an_unknown_key_without_a_near_miss_lists_the_known_ones():
    with pytest.raises(RecipeError, match="`model.zzz`: unknown key; known: reference_model, sft, sft_tuned_by, start"):
        parse_recipe({"name": "x", "model": {"zzz": 1}}, place="here")


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "0.0000005"])
def test_a_learning_rate_in_any_notation_is_a_float(tmp_path, text):
    """PyYAML reads `5e-7` as a string."""
    path = write(tmp_path, f"name: x\ntrain:\n  learning_rate: {text}\n")
    assert load_recipe(path).train.learning_rate == 5e-7
    overridden = load_recipe(write(tmp_path, "name: x\n"), [f"train.learning_rate={text}"])
    assert overridden.train.learning_rate == 5e-7


def test_overrides_reach_sections_that_the_file_does_not_have(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "name: x\ntrain:\n  options: {beta: 0.5}\n"),
        ["train.options.beta=0.2", "train.lora.r=4", "snapshot=hh", "train.lora.target_modules=[q_proj]"],
    )
    assert (recipe.train.options["beta"], recipe.train.lora.r, recipe.snapshot) == (0.2, 4, "hh")
    assert recipe.train.lora.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.beta", "is not of the form `section.key=value`"),
        ("=3", "is not of the form"),
        ("name.x=3", "`name` is a value, not a section"),
        ("train.beta=[", "the value is not YAML"),
    ],
)
def test_a_malformed_override_is_refused(tmp_path, override, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(tmp_path, "name: x\n"), [override])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "must be a mapping"), ("- a\n", "found list"), ("a: [", "cannot be read"), ("name: 'A b'\n", "`name`")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(tmp_path, text))
    assert message in str(refused.value)


def test_a_missing_recipe_names_its_neighbours(tmp_path):
    write(tmp_path, "name: x\n")
    with pytest.raises(RecipeError, match=r"no recipe at `.*other.yaml`(.|\n)*recipes here: recipe.yaml"):
        load_recipe(tmp_path / "other.yaml")


def test_options_without_effect_are_refused():
    with pytest.raises(RecipeError, match="needs `adapter: lora`"):
        parse_recipe({"name": "x", "train": {"adapter": "full", "reference": "adapter_off"}}, place="here")
    with pytest.raises(RecipeError, match="`lora` has no effect with `adapter: full`"):
        parse_recipe({"name": "x", "train": {"adapter": "full", "lora": {"r": 4}}}, place="here")
    with pytest.raises(RecipeError, match="must name the same model"):
        parse_recipe(
            {"name": "x", "train": {"reference": "adapter_off"}, "model": {"reference_model": "sft"}}, place="here"
        )
    with pytest.raises(RecipeError, match="`model.reference_model` has no effect with `train.objective: simpo`"):
        parse_recipe({"name": "x", "train": {"objective": "simpo"}, "model": {"reference_model": "sft"}}, place="here")


def test_more_steps_at_least_than_at_most_are_refused():
    with pytest.raises(RecipeError, match="`min_steps` = 9 is more than `max_steps` = 8"):
        parse_recipe({"name": "x", "train": {"min_steps": 9, "max_steps": 8}}, place="here")
    with pytest.raises(RecipeError, match="`epochs` = 2 and `min_steps` = 9 both say how often the rows are passed"):
        parse_recipe({"name": "x", "train": {"min_steps": 9, "epochs": 2}}, place="here")


def test_a_recipe_is_frozen_and_survives_json():
    recipe = Recipe(name="x", pairs=PairSection(since="2026-01-01T00:00:00Z"))
    with pytest.raises(ValidationError):
        recipe.train.epochs = 3
    assert parse_recipe(recipe.model_dump(mode="json"), place="json") == recipe


def test_every_key_says_what_it_is():
    def walk(model, place):
        for name, field in model.model_fields.items():
            nested = [
                a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(a, "model_fields")
            ]
            if nested:
                yield from walk(nested[0], f"{place}{name}.")
            else:
                yield f"{place}{name}", field.description

    undocumented = [place for place, description in walk(Recipe, "") if not description and place != "name"]
    assert undocumented == []


@pytest.mark.parametrize(
    ("objective", "options", "told"),
    [
        ("dpo", {"beta": 5}, ["train.options.beta = 5 is outside of what dpo is used with, 0.01 to 0.9"]),
        ("dpo_norm", {"beta": 5}, []),
        ("simpo", {"beta": 0.1, "gamma_beta_ratio": 5}, ["train.options.beta = 0.1", "gamma_beta_ratio = 5"]),
        ("orpo", {"lambda": 3}, ["train.options.lambda = 3 is outside of what orpo is used with, 0.01 to 1"]),
        ("my.module:loss", {"beta": 99}, []),
    ],
)
def test_an_option_outside_of_what_its_objective_is_used_with_is_told(objective, options, told):
    train = parse_recipe({"name": "x", "train": {"objective": objective, "options": options}}, place="x").train
    found = unusual_options(train.objective, train.options, tuned_by="answers")
    assert len(found) == len(told)
    assert all(words in line for words, line in zip(told, found, strict=True))


@pytest.mark.parametrize("name", OBJECTIVE_OPTIONS)
def test_no_default_is_outside_of_what_its_objective_is_used_with(name):
    train = parse_recipe({"name": "x", "train": {"objective": name}}, place="x").train
    for tuned_by in ("answers", "preferences"):
        assert unusual_options(train.objective, train.options, tuned_by=tuned_by) == []


def test_a_model_that_was_tuned_by_preferences_is_trained_gently():
    rate = partial(usual_learning_rate, adapter="full", width=4096, total_steps=480)
    for objective in OBJECTIVE_OPTIONS:
        before, after = (rate(objective, tuned_by=tuned_by) for tuned_by in ("answers", "preferences"))
        assert after == (before if objective == "sft" else before / 2)
    train = parse_recipe({"name": "x", "train": {"options": {"beta": 0.02}}}, place="x").train
    assert unusual_options("dpo", train.options, tuned_by="answers") == []
    (warning,) = unusual_options("dpo", train.options, tuned_by="preferences")
    assert warning.startswith(
        "train.options.beta = 0.02 holds a model that was tuned by preferences before only loosely"
    )
    assert unusual_options("cpo", {"beta": 0.02}, tuned_by="preferences") == []


def test_a_micro_batch_is_as_large_as_the_device_wants_it_unless_a_recipe_says_otherwise():
    recipe = parse_recipe({"name": "x"}, place="x")
    assert recipe.train.token_budget(recipe.workers.device) == recipe.train.token_budget("cpu") == 512
    on_gpus = parse_recipe({"name": "x", "workers": {"use_gpu": True}}, place="x")
    assert on_gpus.train.token_budget(on_gpus.workers.device) == on_gpus.train.token_budget("cuda") == 8192
    given = parse_recipe({"name": "x", "train": {"micro_batch_tokens": 64}}, place="x").train
    assert given.token_budget("cpu") == given.token_budget("cuda") == 64


def test_a_rate_nobody_gave_is_the_published_one_carried_over_to_width_and_steps():
    full, lora = (partial(usual_learning_rate, adapter=adapter, tuned_by="answers") for adapter in ("full", "lora"))
    for objective in ("dpo", "cpo", "my.module:loss"):
        assert full(objective, width=4096, total_steps=480) == 5e-7
    assert full("simpo", width=4096, total_steps=480) == 1e-6
    assert full("dpo", width=4096, total_steps=10_000) == 5e-7
    assert full("dpo", width=2048, total_steps=240) == pytest.approx(2e-6)
    assert full("dpo", width=4096, total_steps=1) == pytest.approx(4e-6)
    assert full("sft", width=4096, total_steps=1) == 2e-5
    for objective in OBJECTIVE_OPTIONS:
        assert lora(objective, width=512, total_steps=99) == pytest.approx(
            10 * full(objective, width=512, total_steps=99)
        )


def test_a_rate_far_from_the_usual_one_is_warned_of():
    assert unusual_rate(None, 5e-7) == unusual_rate(4e-6, 5e-7) == unusual_rate(6e-8, 5e-7) == []
    (warning,) = unusual_rate(2e-5, 5e-7)
    assert warning.startswith("train.learning_rate = 2e-05 is far from 5e-07, the usual one of this objective")
    assert unusual_rate(1e-8, 5e-7)


def test_an_option_of_the_objective_is_told_its_place():
    with pytest.raises(RecipeError, match=r"`train.beta`: unknown key; it is `train.options.beta`"):
        parse_recipe({"name": "x", "train": {"beta": 0.1}}, place="x")
    with pytest.raises(RecipeError, match=r"`train.lambda`: unknown key; it is `train.options.lambda`"):
        parse_recipe({"name": "x", "train": {"objective": "orpo", "lambda": 0.1}}, place="x")
    with pytest.raises(RecipeError, match=r"`train.betta`: unknown key; "):
        parse_recipe({"name": "x", "train": {"objective": {"name": "dpo"}, "betta": 0.1}}, place="x")
    with pytest.raises(RecipeError, match=r"`train.gamma_beta_ratio`: unknown key; known: "):
        parse_recipe({"name": "x", "train": {"gamma_beta_ratio": 0.1}}, place="x")


def test_recipes_differ_by_what_decides_the_steps_of_a_run():
    def tree(**changes):
        return parse_recipe({"name": "x", **changes}, place="x").model_dump(mode="json")

    assert differing(tree(), tree(train={"seed": 1, "options": {"beta": 0.2}})) == ["train.options.beta", "train.seed"]
    same = {"train": {"micro_batch_tokens": 64, "checkpoint_every": 3, "activation_checkpointing": True}}
    assert differing(tree(), tree(**same)) == []
    every = tree()
    for name in SAME_STEPS:
        section, key = name.split(".")
        assert key in every[section]


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        ({"attention": "flex"}, "`train.attention: flex` needs a GPU: set `workers.use_gpu`"),
        ({"attention": "varlen", "dtype": "float32"}, "`attention: varlen` computes in half precision only"),
        ({"attention": "plain", "sharding": "zero3"}, "`attention: plain` cannot be had with `sharding: zero3`"),
        ({"sharding": "zero3", "offload": ["optimizer"]}, "`train.offload` has no effect on CPUs"),
    ],
)
def test_what_this_machine_cannot_do_or_has_no_effect_is_refused(train, fault):
    with pytest.raises(RecipeError, match=re.escape(fault)):
        parse_recipe({"name": "x", "train": train}, place="test")


EVALUATE = {"name": "x", "evaluate": {"prompts": "p", "judge_rules": "r"}}


def gate(**section):
    return (
        parse_recipe({**EVALUATE, "evaluate": {**EVALUATE["evaluate"], "gate": section}}, place="x").evaluation().gate
    )


def test_a_rule_of_the_gate_is_changed_left_out_or_added_and_the_others_stay():
    usual = gate().rules
    changed = gate(
        rules={
            "judged_prompts": {"threshold": 40},
            "perplexity": None,
            "mine": {"metric": "m", "comparison": ">", "threshold": 1},
        }
    ).rules
    assert (changed["judged_prompts"].threshold, changed["judged_prompts"].metric) == (40, "prompts")
    assert changed["perplexity"] is None
    assert (changed["mine"].bound, changed["mine"].decides, changed["mine"].absent) == ("value", "must", "hold")
    assert changed["win_rate_sft"] == usual["win_rate_sft"]
    again = GateSection.model_validate(gate(rules={"perplexity": None}).model_dump(mode="json"))
    assert again.rules["perplexity"] is None


def test_faults_of_a_gate_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"evaluate.gate.rules.mine.comparison"):
        gate(rules={"mine": {"metric": "m", "threshold": 1}})
    with pytest.raises(RecipeError, match=r"`evaluate.gate.min_prompts`: unknown key; known: "):
        gate(min_prompts=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({**EVALUATE, "evaluate": {**EVALUATE["evaluate"], "gate": str(tmp_path / "gate.yaml")}})
    )
    with pytest.raises(RecipeError, match=r"the gate .*gate.yaml` \(evaluate.gate\) cannot be read"):
        load_recipe(path)
    (tmp_path / "gate.yaml").write_text("level: 0.9\nrules: {judged_prompts: {threshold: 7}}\n")
    found = load_recipe(path, ["evaluate.gate.rules.judged_prompts.decides=warn"]).evaluation().gate
    assert (found.level, found.rules["judged_prompts"].threshold, found.rules["judged_prompts"].decides) == (
        0.9,
        7,
        "warn",
    )
