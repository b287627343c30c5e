"""The repository keeps its own promises: rooms, recipes, documented commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import app
from app.cli import cli
from app.config import Recipe, load_recipe
from app.demo.runner import _comments, _differences
from tests.reliability import Claim, merged, read_claims

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "RELIABILITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def commands_of_the_documents() -> set[str]:
    blocks = (block for path in DOCUMENTS for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL))
    return {name for block in blocks for name in re.findall(r"^prefloop ([a-z-]+)", block, re.MULTILINE)}


def test_the_installed_package_is_this_checkout():
    assert Path(app.__file__).parents[1] == ROOT


def test_rooms_import_only_what_they_may():
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_names_files_that_exist(path):
    recipe = load_recipe(path)
    for place in (recipe.evaluate.prompts, recipe.evaluate.judge_rules, recipe.evaluate.golden):
        assert (ROOT / place).is_file()


def test_every_command_in_the_documents_exists():
    wanted = commands_of_the_documents()
    assert wanted >= {"serve", "dashboard", "loop", "import"}
    for name in sorted(wanted):
        assert CliRunner().invoke(cli, [name, "--help"]).exit_code == 0, name


def test_the_help_lists_every_step_of_the_loop():
    shown = CliRunner().invoke(cli, ["--help"]).output
    steps = [
        "demo",
        "import",
        "build-pairs",
        "prepare",
        "train",
        "certify",
        "evaluate",
        "ship",
        "rollback",
        "loop",
        "jobs",
        "serve",
        "dashboard",
        "status",
        "ratings",
        "judges",
        "bench",
    ]
    for name in steps:
        assert re.search(rf"^\W*{name}\b", shown, re.MULTILINE), name


def test_every_value_of_a_recipe_says_what_it_is():
    def faults(model, place):
        for name, field in model.model_fields.items():
            nested = [
                a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(a, "model_fields")
            ]
            if nested:
                yield from faults(nested[0], f"{place}{name}.")
            elif not field.description:
                yield f"{place}{name}"

    assert list(faults(Recipe, "")) == []


def test_the_demo_gives_a_reason_for_every_default_it_overrides():
    path = ROOT / "recipes" / "demo_only.yaml"
    comments = _comments(path)
    places = [place for place, _, _ in _differences(load_recipe(path).model_dump(mode="json"))]
    assert len(places) > 10
    assert [place for place in places if not comments.get(place.rsplit(".", 1)[-1])] == []


def test_every_link_of_the_documents_leads_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_a_wrong_recipe_is_one_message_and_exit_code_1(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: x\ntrian: {}\npairs: {min_pair: 3}\n")
    result = subprocess.run(
        [str(Path(sys.executable).with_name("prefloop")), "build-pairs", str(wrong)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "2 fault(s)" in result.stderr
    assert "did you mean `train`?" in result.stderr
    assert "did you mean `min_pairs`?" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_row_that_is_found_again_takes_the_place_of_the_old_one():
    old = [Claim("one", "tests/a.py::test_a", "1 s", ""), Claim("two", "tests/a.py::test_a", "2 s", "7")]
    text = merged("# Head\n\n| claim | test | figure | seed |\n|---|---|---|---|\n", [], old)
    assert read_claims(text) == old
    found = [Claim("two", "tests/a.py::test_a", "3 s", "8")]
    assert read_claims(merged(text, read_claims(text), found)) == [old[0], *found]
    assert read_claims(merged(text, [], found)) == found
    assert text.startswith("# Head\n\n| claim ")


def test_every_claim_names_a_test_that_exists():
    claims = read_claims((ROOT / "RELIABILITY.md").read_text())
    assert claims
    for claim in claims:
        file, _, function = claim.test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), claim.test


@pytest.mark.full
def test_the_long_run_takes_what_the_short_one_leaves_and_every_test_of_a_claim(tmp_path):
    found = []
    for options in ([], ["-m", "not full"], [f"--reliability={tmp_path / 'claims.md'}"]):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-p",
            "no:cacheprovider",
            *options,
            "tests/training/test_checkpoints.py",
        ]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found.append({line.partition("::")[2].partition("[")[0] for line in told.splitlines() if "::" in line})
    every, short, long = found
    assert short | long == every
    source = (ROOT / "tests/training/test_checkpoints.py").read_text()
    assert short & long == {name for name in short if re.search(rf"def {name}\([^)]*\bclaim\b", source)} != set()
