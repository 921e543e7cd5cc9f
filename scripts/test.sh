#!/usr/bin/env bash
# Lint and tests on a machine with nothing but Python, up to four at once. Usage: bash scripts/test.sh [pytest arguments]
# One after the other, as a debugger wants them: bash scripts/test.sh -n 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
