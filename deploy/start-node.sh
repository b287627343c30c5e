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
# Torch's threads and Ray's sockets need more than the 1024 files that a login gives; what the system allows is enough.
ulimit -n "$(ulimit -Hn)"
# A machine that is gone without a word is given up after half a minute (4 x 7 s); Ray's own settings take 65 s.
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=4
# Not in the checkout: it would be the first place that Python looks for modules.
cd ~
exec bash "$here/deploy/run-here.sh" ray start --disable-usage-stats "$@"
