"""Starts the dashboard: `python -m dashboard.launch RECIPE.yaml [--port 8501]`.

Streamlit runs in the folder that holds `.streamlit/config.toml`, so the secure defaults always apply, and everything
that depends on the caller's folder (home, recipe) is made absolute before. Knows nothing of the pages.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from app.config import load_recipe
from app.errors import PrefloopError, ServiceError
from app.storage import HOME_VARIABLE, Home

ADDRESS = "127.0.0.1"
RECIPE_VARIABLE = "PREFLOOP_RECIPE"
DEFAULT_PORT = 8501
ROOT = Path(__file__).resolve().parents[1]


def command(port: int) -> list[str]:
    """Return the command that serves the dashboard on a port of the loopback address; run it in `ROOT`."""
    script = str(Path(__file__).with_name("main.py"))
    options = ["--server.address", ADDRESS, "--server.port", str(port), "--server.headless", "true"]
    return [sys.executable, "-m", "streamlit", "run", script, *options]


def environment(recipe: Path | None, home: Home) -> dict[str, str]:
    """Return the environment of that command: this one, with the home and the recipe made absolute."""
    found = {**os.environ, HOME_VARIABLE: home.uri}
    found.pop(RECIPE_VARIABLE, None)
    if recipe is not None:
        found[RECIPE_VARIABLE] = str(recipe.expanduser().resolve())
    return found


def check_port(port: int) -> None:
    """Refuse a port that something listens on.

    Raises:
        ServiceError: names the port and the remedy.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            msg = f"the dashboard cannot use port {port} of {ADDRESS}: {error.strerror}\n\nHint: choose another one with `--port`."
            raise ServiceError(msg) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Check the recipe and the port, then serve until interrupted; returns only where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m dashboard.launch", description="Serve the prefloop dashboard.")
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe whose loop is shown and whose jobs are started")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    options = parser.parse_args(argv)
    try:
        if options.recipe is not None:
            load_recipe(options.recipe)
        check_port(options.port)
    except PrefloopError as error:
        print(f"dashboard: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    print(f"dashboard: http://{ADDRESS}:{options.port} (Ctrl-C ends it)", flush=True)  # noqa: T201
    surroundings = environment(options.recipe, Home.from_environment())
    os.chdir(ROOT)
    # Streamlit takes this process over, so that whoever stops the command stops the server.
    return os.execve(sys.executable, command(options.port), surroundings)  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
