# Sourced by the other scripts: makes .venv, once, and installs the project into it.
# It needs Python >= 3.11 and a package registry; PYTHON names another interpreter.
# With lowest=yes it is .venv-lowest, with the lowest versions that are supported.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv constraints=constraints.txt extra=dev
pythons="python3 python3.14 python3.13 python3.12 python3.11 python"
if [ "${lowest:-}" = yes ]; then
    venv=.venv-lowest constraints=constraints-lowest.txt extra=test
    pythons="python3.11 python3.12 $pythons" # old releases have no builds for later ones
fi

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-$pythons}; do
        if is_recent "$name"; then echo "$name"; return; fi
    done
    echo "error: no Python >= 3.11 found: install one, or name it as PYTHON=/path/to/python" >&2
    return 1
}

if ! [ -x $venv/bin/python ] || ! is_recent $venv/bin/python; then
    python=$(find_python)
    rm -rf $venv
    "$python" -m venv $venv ||
        { echo "error: '$python -m venv' failed: install the venv package of your system" >&2; exit 1; }
fi

# Installed again only when what there is to install has changed.
stamp=$venv/installed.sha256
want=$(cat pyproject.toml $constraints scripts/setup.sh | $venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
    echo "installing into $venv (a few minutes the first time) ..." >&2
    # torch by its exact version first: a range would take the newest build the registry has.
    $venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c $constraints "$(grep '^torch==' $constraints)" >&2
    $venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c $constraints -e ".[$extra]" >&2
    echo "$want" > "$stamp"
fi
