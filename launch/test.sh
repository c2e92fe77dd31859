#!/usr/bin/env bash
# Sets up .venv with the test extras, then runs ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test

# Networks of other packages, beside the environment and not in it: torchvision has no build for the CPU's torch, and tests/test_segmenters.py
# declares the operators that it then lacks.
zoo="torchvision==0.28.0 segmentation-models-pytorch==0.6.0 timm==1.0.31"
if [ "$(cat .venv/zoo/.installed 2>/dev/null)" != "$zoo" ]; then
    rm -rf .venv/zoo
    # shellcheck disable=SC2086
    if python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/zoo $zoo; then
        echo "$zoo" > .venv/zoo/.installed
    else
        echo "without $zoo the tests of networks of other packages are skipped" >&2
    fi
fi

ruff format --check .
ruff check .
mypy
exec python -m pytest "$@"
