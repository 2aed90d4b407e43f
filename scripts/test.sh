#!/usr/bin/env bash
# The README's second command: lint, types, the floors of the house and the whole test suite.
# Arguments go to pytest. --lowest, first: the suite alone, with the lowest versions that
# pyproject.toml allows. --real, first: the pipeline on a real model alone (docs/real-model.md),
# which fetches 93 MB and takes many minutes.
lowest=no real=no
if [ "${1:-}" = --lowest ]; then lowest=yes; shift; fi
if [ "${1:-}" = --real ]; then real=yes; shift; fi
source "$(dirname "$0")/setup.sh"
if [ "$real" = yes ]; then # one process, with all cores
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || echo 2)}"
    exec $venv/bin/python -m pytest tests/real/check_real_model.py -s "$@"
fi
# The report is tested in a real browser. Without one its tests say that they were skipped.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing Debian's chromium for the report's tests ..." >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
        --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "warning: chromium could not be installed" >&2
fi
# Processes that import the same modules compile them once, not each for itself.
unset PYTHONDONTWRITEBYTECODE
linted=
if [ "$lowest" = no ]; then # what lint and types say depends on the versions: the newest have the say
    $venv/bin/ruff check .
    $venv/bin/ruff format --check .
    # These take one core a minute: beside the first tests, and what they say comes at the end.
    said=$(mktemp)
    { $venv/bin/mypy && $venv/bin/lint-imports --no-cache --no-logo; } >"$said" 2>&1 &
    linted=$!
fi
# One worker a core and a file a worker (its fixtures run once), in the order of tests/conftest.py, which also
# keeps each to one thread of torch.
failed=0
$venv/bin/python -m pytest -n "$(nproc 2>/dev/null || echo 2)" --dist loadfile --no-loadscope-reorder "$@" ||
    failed=$?
if [ -n "$linted" ]; then
    wait "$linted" || failed=$?
    cat "$said"
    rm "$said"
fi
exit $failed
