#!/usr/bin/env bash
# Build the documentation into site/ (strict: a broken link fails); "serve" shows it while it is edited.
source "$(dirname "$0")/setup.sh"
exec $venv/bin/mkdocs "${1:-build}" --strict
