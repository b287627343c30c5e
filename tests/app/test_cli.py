"""The command line as a user meets it: one message and an exit code."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.errors import RecipeError
from app.storage import HOME_VARIABLE


def test_ctrl_c_during_an_import_is_one_message_and_leaves_nothing_behind(home, tmp_path):
    source = tmp_path / "pairs.jsonl"
    os.mkfifo(source)
    # Where the tests run in the background of a shell, SIGINT is ignored, and a child inherits that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from app.cli import main; main()"
    command = [sys.executable, "-c", code, "import", str(source), "--to", "mine"]
    environment = {**os.environ, HOME_VARIABLE: home.uri}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        pipe = None
        while pipe is None and process.poll() is None:
            with suppress(OSError):  # nobody reads yet
                pipe = os.open(source, os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        os.close(pipe)
    assert process.returncode == 130
    assert told == "prefloop: interrupted; nothing was imported, the same command begins anew\n"
    assert not home.local("pairs").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["train", "--targets", "hh_rlhf", "--rounds", "2"],
            "--targets are of the median of 3 rounds at least, and --rounds is 2",
        ),
        (
            ["ablate", "--expect", "online=2"],
            "--expect, --targets, --only and --epochs have no effect on `bench ablate`",
        ),
        (["scale", "--epochs", "2"], "--expect, --targets, --only and --epochs have no effect on `bench scale`"),
        (["scale", "--groups", "4"], "--groups, --prompt-tokens and --rounds have no effect on `bench scale`"),
        (["train", "--json", "nowhere/found.json"], "`--json nowhere/found.json`: there is no folder"),
    ],
)
def test_what_has_no_effect_on_a_benchmark_is_refused_before_it_begins(home, tmp_path, arguments, told):
    what, *options = arguments
    result = CliRunner().invoke(cli, ["bench", what, "--data", str(tmp_path / "pairs.jsonl"), *options])
    assert isinstance(result.exception, RecipeError)
    assert told in str(result.exception)
