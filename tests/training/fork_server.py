"""The process that other processes of these tests are forked from: it has imported what takes long, and has run nothing.

There is one for all of them, so what it imports and in which environment it and they are is said once.
"""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

import pytest

RANKS = "tests.training.zero_ranks"
RUNS = "tests.training.killed_runs"


def fork_server() -> ForkServerContext:
    """Return where to start processes; they have one thread, and no programs."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([RANKS, RUNS])
    with pytest.MonkeyPatch.context() as environment:
        # Nothing may be compiled, by ninja or otherwise.
        environment.setenv("PATH", "/nowhere")
        environment.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return server
