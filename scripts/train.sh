#!/bin/bash
# Trains on this machine: goes on from the newest checkpoint, or starts where there is none. Settings may follow:
#   bash scripts/train.sh RUN optim.steps=80
# NPROC_PER_NODE (or HOST_GPU_NUM) is the number of processes, one for each GPU.
set -euo pipefail
SELF="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
ARGS=("$@")
RUN="${1:?name a run: a preset, a description or a folder, and then settings}"
shift
PROJECT="${PROJECT:-$(dirname "$(dirname "$SELF")")}"
PYTHON="${PYTHON:-$PROJECT/.venv/bin/python}"
SRPO="$PROJECT/srpo_core/__main__.py"
GPUS_HERE="$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)"
PROCESSES="$((GPUS_HERE > 0 ? GPUS_HERE : 1))"
NPROC_PER_NODE="${NPROC_PER_NODE:-${HOST_GPU_NUM:-$PROCESSES}}"
if [ "$NPROC_PER_NODE" = 1 ]; then
    exec "$PYTHON" "$SRPO" train "$RUN" --resume parallel.processes=1 parallel.nodes=1 "$@"
fi
CPUS="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"  # torchrun gives each of several processes one thread
THREADS="$((CPUS / NPROC_PER_NODE))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$NPROC_PER_NODE" \
    "$SRPO" train "$RUN" --resume parallel.processes="$NPROC_PER_NODE" parallel.nodes=1 "$@"
