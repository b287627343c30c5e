"""Bare machines for tests: namespaces of this one, each with what a machine has of its own.

A machine has a process table, a network address, a name, a home, a folder for temporary files and shared memory; it sees no
other machine's, and reaches what this one serves at `HOST`. Its name stands in /etc/hosts as Debian's installer writes it,
for 127.0.1.1. Code and programs outside of `/tmp` are this machine's. Needs root, iproute2 and util-linux.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HOST = "10.77.0.1"
NETWORK = "10.77.0.0/24"
_NAME = f"pl{os.getpid()}"
_BRIDGE = f"{_NAME}b"
_UNITS = itertools.count(2)
_SET_UP = """\
set -e
ip link set lo up
ip link set {inside} name eth0
ip addr add {address}/24 dev eth0
ip link set eth0 up
# Ray finds its own address by the route to a public one; it sends nothing there.
ip route add default via {host}
hostname {name}
mkdir -p ~/tmp
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > ~/tmp/hosts
: > ~/tmp/resolv.conf
mount --bind ~/tmp/hosts /etc/hosts
mount --bind ~/tmp/resolv.conf "$(readlink -f /etc/resolv.conf)"
mount -t tmpfs tmpfs /dev/shm
mount --bind ~/tmp /tmp
"""


@dataclass
class Machine:
    """One that runs."""

    name: str
    address: str
    home: Path
    process: "subprocess.Popen[bytes]"
    cable: str
    """Name of its network, and of the end of its cable on this machine."""

    def command(self, *arguments: str) -> list[str]:
        """Return a command that runs with this machine's network and this one's files: a tunnel's end."""
        return ["nsenter", f"--net=/run/netns/{self.cable}", *arguments]

    def inside(self, *arguments: str) -> list[str]:
        """Return a command that runs on this machine, as a shell of its own would."""
        theirs = f"/proc/{self.process.pid}/ns"
        kinds = ("mount=mnt", "uts=uts", "ipc=ipc", "net=net", "pid=pid_for_children")
        entered = [f"--{option}={theirs}/{name}" for option, name in (kind.split("=") for kind in kinds)]
        return ["nsenter", *entered, *arguments]

    def lose(self) -> None:
        """Take it away as a power cut does: nobody is told."""
        subprocess.run(["ip", "link", "set", self.cable, "down"], check=True)
        self.process.kill()
        self.process.wait()


@contextmanager
def network() -> Iterator[None]:
    """A bridge to which machines are attached; skips the test where this machine or this user cannot make one."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("namespaces with addresses of their own need root and Debian's package `iproute2`")
    made = subprocess.run(["ip", "link", "add", _BRIDGE, "type", "bridge"], capture_output=True, text=True, check=False)
    if "not supported" in made.stderr or "not permitted" in made.stderr:
        pytest.skip(f"this kernel makes no bridge: {made.stderr.strip()}")
    assert not made.returncode, made.stderr
    routes = subprocess.run(["ip", "route", "show", NETWORK], capture_output=True, text=True, check=True).stdout
    try:
        assert not routes, f"another run has {NETWORK}, or left it (`ip link del`): {routes}"
        subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", _BRIDGE], check=True)
        subprocess.run(["ip", "link", "set", _BRIDGE, "up"], check=True)
        yield
    finally:
        subprocess.run(["ip", "link", "del", _BRIDGE], check=False)


@contextmanager
def machine(
    name: str, home: Path, commands: Sequence[str], log: Path, *, hidden: Sequence[Path], environment: dict[str, str]
) -> Iterator[Machine]:
    """Run commands on a new machine, and keep what they started until the block ends.

    Args:
        name: its host name.
        home: its user's home.
        commands: what it runs, in a shell, in this order.
        log: where the output goes.
        hidden: folders of this machine that it must not see.
        environment: all the variables that the commands have.
    """
    number = next(_UNITS)
    cable, inside, address = f"{_NAME}v{number}", f"{_NAME}i{number}", f"10.77.0.{number}"
    script = [_SET_UP.format(inside=inside, address=address, host=HOST, name=name)]
    script += [f"mount -t tmpfs tmpfs {folder}" for folder in hidden]
    script += ["cd ~", *commands, "exec sleep infinity"]
    isolated = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
    made = None
    try:
        for command in (
            ["ip", "netns", "add", cable],
            ["ip", "link", "add", cable, "type", "veth", "peer", "name", inside],
            ["ip", "link", "set", inside, "netns", cable],
            ["ip", "link", "set", cable, "master", _BRIDGE, "up"],
        ):
            subprocess.run(command, check=True)
        with log.open("ab") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", cable, *isolated, "bash", "-c", "\n".join(script)],
                env=environment | {"HOME": str(home)},
                stdout=stream,
                stderr=stream,
            )
        made = Machine(name, address, home, process, cable)
        yield made
    finally:
        if made is not None and made.process.poll() is None:
            made.process.kill()
            made.process.wait()
        subprocess.run(["ip", "netns", "del", cable], check=False)
        subprocess.run(["ip", "link", "del", cable], check=False, capture_output=True)
