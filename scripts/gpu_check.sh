#!/usr/bin/env bash
# What abliterate does on this machine's accelerator, each figure beside its floor, as one JSON
# document on stdout: at most eight minutes, and nothing is fetched.
#
#     scripts/gpu_check.sh -o docs/measurements/NAME.json    # PYTHON names an interpreter
#
# The interpreter needs a torch that sees the accelerator, and this project's dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
# The script leaves out what its own clock has no time for; this ends what hangs.
limit=$(command -v timeout >/dev/null && echo "timeout --kill-after=5 475" || true)
exec $limit "$python" scripts/gpu_check.py "$@"
