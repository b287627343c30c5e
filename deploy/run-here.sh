#!/usr/bin/env bash
# Runs a command on a node as its jobs run: what they need to know (~/.prefloop.env) in its environment, and the `python`,
# `prefloop` and `ray` that setup-node.sh installed:  run-here.sh prefloop import pairs.jsonl --to mine
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
# Taken as they stand, as Kubernetes takes them: a password may hold what a shell would read as its own.
while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in
        '' | '#'*) ;;
        *=*) export "$line" ;;
        *) echo "run-here: ~/.prefloop.env has a line that is not NAME=VALUE" >&2; exit 1 ;;
    esac
done < ~/.prefloop.env
export PATH="$here/.venv/bin:$PATH" RAY_AUTH_MODE=token
exec "$@"
