"""Start a job from a terminal: `python -m ray_jobs NAME ...`, where Ctrl-C is one message from the first moment on.

A job takes seconds to import what it needs, in which Python would answer Ctrl-C with a trace. Submitted to a cluster a
job is `python -m ray_jobs.NAME ...`; nobody presses Ctrl-C there.
"""

import importlib
import os
import signal
import sys
from types import FrameType

from app.errors import Interrupted

_JOBS = ("build_pairs", "prepare", "train", "evaluate", "ship", "loop")


def _leave(_signal: int, _frame: FrameType | None) -> None:
    # Libraries that are half imported cannot be unwound, and there is nothing to unwind yet.
    os.write(sys.stderr.fileno(), b"interrupted before anything was done\n")
    os._exit(Interrupted.exit_code)


def main() -> int:
    """Import the job that the first argument names, and run it with the others."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in _JOBS:
        sys.stderr.write(f"no job `{name}`; the jobs are {', '.join(_JOBS)}\n")
        return 2
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as it is for what a shell runs in the background
        signal.signal(signal.SIGINT, _leave)
    job = importlib.import_module(f"ray_jobs.{name}")
    signal.signal(signal.SIGINT, before)
    code: int = job.main()
    return code


if __name__ == "__main__":
    sys.exit(main())
