#!/usr/bin/env bash
# The main job on any machine: fine-tune the built-in miniature with SRPO, then export what it learned
# as a LoRA and as a whole transformer. About four minutes on two cores. Go on with an interrupted run: --resume.
# Usage: bash scripts/demo.sh [--resume] [settings, such as seed=1 optim.steps=20 output.dir=runs/other]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
run=runs/miniature
for setting in "$@"; do case $setting in output.dir=*) run=${setting#output.dir=} ;; esac; done
.venv/bin/srpo train miniature "$@"
.venv/bin/srpo export "$run" --overwrite
.venv/bin/srpo export "$run" --what transformer --overwrite
