"""Run arms one after the other, each in a process of its own whose memory is watched."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import psutil

from app.bench.arms import Arm, Measured
from app.bench.parity import Parity
from app.bench.work import Work
from app.errors import OutOfMemory, TrainingError

_WATCH_S = 2.0
_TOLD = 2000
_GROWN = 1.01
CHILD: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # TRL refuses to see two GPUs without a launcher.
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
}
"""Environment of a child that trains."""


def run_arm(work: Work, arm: Arm) -> Measured:
    """Let an arm do the work; raises TrainingError with the end of its output where it fails."""
    with tempfile.TemporaryDirectory(prefix="prefloop-bench-") as scratch:
        folder = Path(scratch)
        work.save(folder / "work.json")
        (folder / "arm.json").write_text(json.dumps(asdict(arm)), encoding="utf-8")
        _, peak = watched([sys.executable, "-m", "app.bench.arms", scratch], name=arm.name, environment=CHILD)
        return replace(Measured.load(folder / "measured.json"), peak_pss=peak)


def run_parity(work: Work) -> Parity:
    """Compare one step of both trainers."""
    with tempfile.TemporaryDirectory(prefix="prefloop-bench-") as scratch:
        folder = Path(scratch)
        work.save(folder / "work.json")
        watched([sys.executable, "-m", "app.bench.parity", scratch], name="parity", environment=CHILD)
        return Parity(**json.loads((folder / "parity.json").read_text(encoding="utf-8")))


def watched(command: Sequence[str], *, name: str, environment: Mapping[str, str]) -> tuple[float, int]:
    """Run a command to its end; return its wall-clock seconds and the peak of its memory.

    Memory is the proportional set size, in bytes, of the process and all below it: pages that several share count once.
    Adding it up stops a process for a tenth of a second where it holds gigabytes, so that is done every two seconds at most,
    and only where its resident set, which the kernel counts by itself, has grown. (Five times a second cost an arm 5 to 10 %.)

    Raises:
        OutOfMemory: it wanted more memory than there is.
        TrainingError: it ended with another exit code than 0; the end of its output is in the message.
    """
    peak, ended = [0], threading.Event()
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        ) as child:
            watcher = threading.Thread(target=_watch, args=(child.pid, peak, ended), daemon=True)
            watcher.start()
            code = child.wait()
        seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
        if code:
            output.seek(0)
            told = output.read()
            msg = f"`{name}` ended with exit code {code}:\n{told[-_TOLD:]}"
            # The kernel kills who takes the last of a machine's memory; PyTorch says so of a GPU's, and where none was given.
            small = code == -signal.SIGKILL or any(word in told for word in ("OutOfMemoryError", "DefaultCPUAllocator"))
            raise (OutOfMemory if small else TrainingError)(msg)
    return seconds, peak[0]


def _watch(pid: int, peak: list[int], ended: threading.Event) -> None:
    resident = 0
    while not ended.wait(_WATCH_S):
        try:
            root = psutil.Process(pid)
            family = [root, *root.children(recursive=True)]
        except psutil.Error:
            continue
        now = sum(_bytes(process, "rss") for process in family)
        if now > resident * _GROWN:
            resident = now
            peak[0] = max(peak[0], sum(_bytes(process, "pss") for process in family))


def _bytes(process: psutil.Process, kind: Literal["rss", "pss"]) -> int:
    try:
        return int(process.memory_info().rss if kind == "rss" else process.memory_full_info().pss)
    except psutil.Error:
        return 0
