"""Starts a rank in a process that a fork server made: a hundred of them import torch and deepspeed once.

In a module of its own, so that the process of the tests imports no deepspeed.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.training.fork_server import RANKS


def start_rank(rank: int, world: int, settings: dict[str, Any], out: Path, log: Path) -> None:
    """Run one rank; what it finds goes into `out`, what it prints into `log`."""
    with log.open("w") as printed:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(printed.fileno(), stream.fileno())
    assert RANKS in sys.modules, "the fork server has not imported it"
    assert shutil.which("ninja") is None and shutil.which("cc") is None, "nothing may be compiled"
    out.write_text(json.dumps(sys.modules[RANKS].main(rank, world, settings)))
