#!/usr/bin/env bash
# Starts Ray on a node: `start-node.sh --head …` or `start-node.sh --address=HEAD:6379`; the arguments are those of
# `ray start`. What jobs need to know (~/.prefloop.env) is in the environment of everything that Ray starts here, and
# `python` is the one that setup-node.sh made.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
for file in ~/.ray/auth_token ~/.prefloop.env; do
    if [ ! -s "$file" ]; then
        echo "start-node: $file is missing or empty; cluster.yaml says what it holds" >&2
        exit 1
    fi
    chmod 600 "$file"
done
# Taken as they stand, as Kubernetes takes them: a password may hold what a shell would read as its own.
while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in
        '' | '#'*) ;;
        *=*) export "$line" ;;
        *) echo "start-node: ~/.prefloop.env has a line that is not NAME=VALUE" >&2; exit 1 ;;
    esac
done < ~/.prefloop.env
export PATH="$here/.venv/bin:$PATH" RAY_AUTH_MODE=token
# Torch's threads and Ray's sockets need more than the 1024 files that a login gives; what the system allows is enough.
ulimit -n "$(ulimit -Hn)"
# A machine that is gone without a word is given up after half a minute (4 x 7 s); Ray's own settings take 65 s.
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=4
# Not in the checkout: it would be the first place that Python looks for modules.
cd ~
exec ray start --disable-usage-stats "$@"
