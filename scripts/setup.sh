#!/usr/bin/env bash
# Make the virtual environment .venv with this project and pinned versions of all that it needs; quick when it is there already.
# Usage: bash scripts/setup.sh [extra of pyproject.toml, such as dev]    PYTHON chooses the interpreter (3.10 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: Python 3.10 or newer is needed, $("$python" --version) was found; set PYTHON" >&2; exit 1; }
wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
ready=.venv/ready${1:+-$1}  # a mark per extra: what one installed stays when another is asked for
[ "$(cat "$ready" 2>/dev/null)" = "$wanted" ] && exit 0
echo "setup: installing into .venv (a few minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check -c scripts/constraints.txt torch==2.13.0 numpy
.venv/bin/python -m pip install -q --disable-pip-version-check -c scripts/constraints.txt -e ".${1:+[$1]}"
printf %s "$wanted" > "$ready"
