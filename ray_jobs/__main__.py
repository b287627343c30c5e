"""Start a job: `python -m ray_jobs NAME ...`, which says what stands against it before it imports what it needs.

That takes seconds (a dozen on a slow machine), in which Python would answer Ctrl-C with a trace, and whoever submitted a job
to a cluster that cannot run it would wait to be told. `python -m ray_jobs.NAME ...` is the same job without this.
"""

import importlib
import os
import signal
import sys
from contextlib import ExitStack
from types import FrameType

from app.errors import Interrupted
from app.services import submitted_runtime_env

_JOBS = ("build_pairs", "prepare", "train", "evaluate", "ship", "loop")
_ON_ALL_NODES = ("prepare", "train", "evaluate", "loop")


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
    with ExitStack() as stack:
        if name in _ON_ALL_NODES and submitted_runtime_env():
            refused: int = importlib.import_module("ray_jobs.session").ask_nodes(name, stack)
            if refused:
                return refused
        job = importlib.import_module(f"ray_jobs.{name}")
        signal.signal(signal.SIGINT, before)
        code: int = job.main()
        return code


if __name__ == "__main__":
    sys.exit(main())
