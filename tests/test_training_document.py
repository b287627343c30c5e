"""docs/training.md: every objective and option is in its tables, its case holds, its function is what it says."""

import re
from pathlib import Path

import pytest
import torch

from app.config import OBJECTIVE_OPTIONS, load_recipe, usual_learning_rate
from app.training import certify, objectives

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `([a-z_]+)` \|(.*)\|$", TEXT, re.MULTILINE))


@pytest.mark.parametrize("name", OBJECTIVE_OPTIONS)
def test_every_objective_is_told_with_its_options_and_their_defaults(name):
    row = ROWS[name]
    if name == "apo_zero_unpaired":
        assert "as `kto`" in row
        return
    for option, field in OBJECTIVE_OPTIONS[name].model_fields.items():
        shown = field.alias or option
        assert f"`{shown}`" in row
        # What is off by default needs no figure.
        if isinstance(field.default, float) and field.default:
            assert re.search(rf"`{shown}`[^,|]*\({field.default:g}\)", row), shown


def test_the_example_recipes_are_whole(tmp_path):
    recipes = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    for number, block in enumerate(recipes):
        (tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
    found = [load_recipe(tmp_path / f"{number}.yaml") for number in range(len(recipes))]
    assert [recipe.train.objective for recipe in found] == ["dpo", "kto", "sft"]


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("SFT", "sft"),
        ("ORPO", "orpo"),
        ("KTO", "kto"),
        ("KTO", "apo_zero_unpaired"),
        ("SimPO", "simpo"),
        ("all", "dpo"),
    ],
)
def test_the_usual_rates_are_those_of_the_table(name, objective):
    full, adapters = re.search(rf"^\| {name}[^|]*\| ([0-9e-]+) \| ([0-9e-]+) \|", TEXT, re.MULTILINE).groups()
    published = {"width": 4096, "total_steps": 480, "tuned_by": "answers"}
    assert usual_learning_rate(objective, "full", **published) == pytest.approx(float(full))
    assert usual_learning_rate(objective, "lora", **published) == pytest.approx(float(adapters))
    run = {"width": 576, "total_steps": 122, "tuned_by": "preferences"}
    factor = 4096 / 576 * (1 if objective == "sft" else 480 / 122 / 2)
    assert usual_learning_rate(objective, "full", **run) == pytest.approx(float(full) * factor)


def test_the_example_case_holds(tmp_path):
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "cases.json").write_text(block, encoding="utf-8")
    (verdict,) = certify.certify(tmp_path / "cases.json")
    assert verdict.passed, verdict.line()


def test_the_example_function_is_dpo():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope: dict = {}
    exec(compile(block, "docs/training.md", "exec"), scope)
    policy, reference = torch.tensor([-1.7, -1.5]), torch.tensor([-1.6, -1.2])
    pair = (torch.tensor([0]), torch.tensor([1]))
    found = scope["dpo_by_hand"](policy, reference, *pair, beta=0.3).losses
    expected = objectives.dpo(policy, reference, *pair, torch.tensor([2, 1]), 2.0, beta=0.3).losses
    assert torch.equal(found, expected)
