#!/usr/bin/env bash
# Installs prefloop and the locked packages into ~/prefloop/.venv of a node; run again it changes what differs.
# It needs Python 3.11 or newer and a package index, no compiler (training with `train.attention: flex` does: gcc and python3-dev). torch is a CUDA build where the index has one.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, python3 is {sys.version.split()[0]}" if sys.version_info < (3, 11) else 0)'
if [ ! -x .venv/bin/pip ] && ! python3 -m venv .venv 2>/dev/null; then
    # Ubuntu's and Debian's python3 make no environment with pip until python3-venv is there.
    $([ "$(id -u)" = 0 ] || echo sudo) apt-get update -qq
    $([ "$(id -u)" = 0 ] || echo sudo) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv
    python3 -m venv --clear .venv
fi
install="python -m pip install --quiet --disable-pip-version-check"
export PATH="$PWD/.venv/bin:$PATH"
# torch first: with it in place no other package pulls another build of it.
$install torch==2.13.0 setuptools wheel
$install --constraint requirements.lock ".[cluster]"
