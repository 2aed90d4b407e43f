#!/usr/bin/env bash
# The README's first command: the whole pipeline on the bundled demo model.
source "$(dirname "$0")/setup.sh"
exec $venv/bin/abliterate demo "$@"
