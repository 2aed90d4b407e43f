#!/usr/bin/env bash
# The README's second command: lint, types and the whole test suite. Arguments go to pytest.
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One worker a core and a file a worker (its fixtures run once); each keeps torch to one thread (tests/conftest.py).
exec .venv/bin/python -m pytest -n "$(nproc 2>/dev/null || echo 2)" --dist loadfile "$@"
