"""The examples of docs/formats.md are read by the product's own readers, and what it says of defaults is so."""

import json
import re
from pathlib import Path

from app.config import GateSection, Recipe, load_recipe
from app.evaluation.prompts import load_prompts
from app.evaluation.rules import load_style
from app.evaluation.suites import load_golden
from app.preferences.formats import read_rows
from app.preferences.quality import usual_held_out
from serving.bodies import ChatRequest, ComparisonRequest, FeedbackRequest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
PROMPTS, STYLE, GOLDEN, JUDGEMENTS, IMPORTS = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_files_are_read(tmp_path):
    for name, content in (("p.jsonl", PROMPTS), ("s.json", STYLE), ("g.jsonl", GOLDEN)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert [p.id for p in load_prompts(str(tmp_path / "p.jsonl")).prompts if p.cluster == "cats"] == ["h001"]
    style = load_style(str(tmp_path / "s.json"))
    assert style.score("You may, you might.") == 1.0
    assert style.apply_edits("people") == "you"
    assert [case.id for case in load_golden(str(tmp_path / "g.jsonl"))] == ["water"]


def test_the_example_requests_are_taken():
    asked = re.search(r"ask chat/completions '(.*)'", TEXT)
    assert asked is not None
    ChatRequest.model_validate_json(asked[1])
    for line in JUDGEMENTS.strip().splitlines():
        (ComparisonRequest if "verdict" in line else FeedbackRequest).model_validate_json(line)


def test_every_example_of_an_import_is_a_row_as_json_and_as_jsonl(tmp_path):
    rows = json.loads(IMPORTS)
    (tmp_path / "i.json").write_text(IMPORTS, encoding="utf-8")
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for file in ("i.json", "i.jsonl"):
        reading = read_rows([tmp_path / file])
        assert (len(reading.candidates), reading.rejections) == (len(rows), ())
    assert [c.pair.kind for c in reading.candidates] == ["pair"] * 7 + ["unpaired"] * 2


def test_every_recipe_value_that_is_named_exists_and_has_the_default_that_is_told():
    tree = load_recipe(ROOT / "recipes" / "lora.yaml").model_dump(mode="json")
    for place in set(re.findall(r"`((?:model|evaluate|pairs|serving|prepare|train)\.[a-z_.]+)`", TEXT)):
        node = tree
        for part in place.split("."):
            assert part in node, place
            node = node[part]
    defaults = Recipe(name="d")
    assert (defaults.pairs.min_pairs, defaults.pairs.held_out_fraction) == (1000, None)
    assert [usual_held_out(clusters) for clusters in (300, 667)] == [1 / 3, 0.15]
    assert (defaults.prepare.max_length, defaults.prepare.too_long) == (2048, "drop")
    assert (defaults.serving.max_tokens, defaults.serving.request_timeout_s) == (256, 300)
    assert tree["evaluate"]["max_new_tokens"] == 256


def test_every_rule_of_the_gate_is_told_with_its_metric_and_threshold():
    told = re.findall(r"^\| `(\w+)` \| (.*?) \| ([<>]=?) ([-0-9.]+) \|$", TEXT, re.MULTILINE)
    rules = GateSection().rules
    assert [name for name, *_ in told] == list(rules)
    for name, what, comparison, threshold in told:
        rule = rules[name]
        assert (comparison, float(threshold)) == (rule.comparison, rule.threshold), name
        assert f"`{rule.metric}`" in what or what == "the same", name
        assert (rule.bound == "value") == ("lower end" not in what and "upper end" not in what), name
        assert (rule.decides == "warn") == ("warns only" in what), name
