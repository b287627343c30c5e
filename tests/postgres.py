"""A PostgreSQL server for tests, in a folder of its own. Debian's package `postgresql` brings the programs."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.conftest import free_ports

_START_S = 60


def _program(name: str) -> str:
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))[-1:]), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: Debian's package `postgresql` has it")
    return str(found)


@contextmanager
def postgresql(*, address: str = "127.0.0.1", clients: str = "127.0.0.1/32") -> Iterator[str]:
    """Serve until the block ends; yields the URL of an empty database, with its password.

    Args:
        address: where it listens.
        clients: who may log in, as a network.
    """
    initdb, postgres = _program("initdb"), _program("postgres")
    # It refuses to run as root, and reads nothing below a folder of root's.
    user = "postgres" if os.geteuid() == 0 else None
    folder, password, [port] = Path(tempfile.mkdtemp(prefix="postgres-")), secrets.token_hex(8), free_ports(1)
    try:
        secret = folder / "password"
        secret.write_text(password)
        if user is not None:
            for path in (folder, secret):
                shutil.chown(path, user, user)
        data = folder / "data"
        make = [initdb, "--pgdata", data, "--username", "prefloop", "--pwfile", secret, "--encoding", "UTF8"]
        subprocess.run(
            [*make, "--no-sync", "--auth", "scram-sha-256"],
            user=user,
            group=user,
            cwd=folder,
            check=True,
            capture_output=True,
        )
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {clients} scram-sha-256\n")
        settings = {"listen_addresses": address, "port": port, "unix_socket_directories": "", "fsync": "off"}
        serve = [postgres, "-D", str(data), *(part for k, v in settings.items() for part in ("-c", f"{k}={v}"))]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(serve, user=user, group=user, cwd=folder, stdout=log, stderr=log)
        try:
            url = f"postgresql://prefloop:{password}@{address}:{port}/postgres"
            end = time.monotonic() + _START_S
            while True:
                try:
                    psycopg.connect(url).close()
                    break
                except psycopg.OperationalError:
                    assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                    time.sleep(0.1)
            yield url
        finally:
            # Closes connections that are open.
            server.send_signal(signal.SIGINT)
            try:
                server.wait(_START_S)
            finally:
                server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
