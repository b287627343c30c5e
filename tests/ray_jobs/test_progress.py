import io

from rich.console import Console

from app.ledger import RunStepRow
from ray_jobs.progress import Meter
from ray_jobs.train import _show


def test_a_log_gets_one_line_for_every_tenth_part():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, no_color=True)
    with Meter(console) as meter:
        for done in range(1, 101):
            meter.show("train: steps", done, 100, f"loss {done}")
            meter.show("other", 1, 100)
    lines = console.file.getvalue().splitlines()
    assert lines == [f"train: steps: {n} of 100, loss {n}" for n in range(10, 101, 10)]


def test_what_is_measured_now_and_then_is_a_line_at_its_step():
    console = Console(file=io.StringIO(), width=200)
    usual = {"loss": 0.5, "reward_accuracy": 0.75, "pairs": 16, "labels": 0, "seconds": 8.0}
    measured = {"held_out_accuracy": 0.6, "held_out_loss": 0.66, "canary_finished": 0.5, "canary_repetition": 0.125}
    with Meter(console) as meter:
        for step, metrics in ((1, usual), (2, usual | measured), (10, usual)):
            _show(meter, RunStepRow(run_id="run", step=step, metrics=metrics), total=100)
    assert console.file.getvalue().splitlines() == [
        "train: step 2: held-out accuracy 60.0%, held-out loss 0.66, canaries 50.0% finished, 12.5% repeated",
        "train: steps: 10 of 100, loss 0.500, reward accuracy 75%, 2.0 pairs/s",
    ]


def test_work_that_turns_out_to_be_more_goes_on_in_the_log():
    console = Console(file=io.StringIO(), width=120)
    with Meter(console) as meter:
        for done, total in ((10, 10), (11, 15), (15, 15)):
            meter.show("collect", done, total)
    lines = console.file.getvalue().splitlines()
    assert lines == ["collect: 10 of 10", "collect: 11 of 15", "collect: 15 of 15"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_for_each_piece_of_work(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=Terminal(), width=120)
    with Meter(console) as meter:
        meter.show("answers of a", 3, 10)
        meter.show("answers of b", 7, 10, "slow")
    shown = console.file.getvalue()
    assert "answers of a" in shown
    assert "7/10" in shown
    assert "slow" in shown
