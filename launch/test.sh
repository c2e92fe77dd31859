#!/usr/bin/env bash
# Sets up .venv with the test extras, then runs ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test

ruff format --check .
ruff check .
mypy
exec python -m pytest "$@"
