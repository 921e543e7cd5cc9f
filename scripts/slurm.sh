#!/bin/bash
#SBATCH --job-name=srpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Send it with `sbatch scripts/slurm.sh RUN` from the folder of this project;
# add the account and the partition that your cluster asks for. Each machine of the job runs multi_host.sh once, and
# that starts a process for each GPU; the first machine of the job is where they meet. When the time is up, send it
# again: training goes on from the newest checkpoint.
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
SCRIPT="$(dirname "$SELF")/multi_host.sh"
if [ ! -f "$SCRIPT" ]; then  # Slurm runs a copy
    SCRIPT="${SLURM_SUBMIT_DIR:?start this with sbatch, from the folder of this project}/scripts/multi_host.sh"
fi
export NNODES="$SLURM_JOB_NUM_NODES"
export NPROC_PER_NODE="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$PROCESSES}}"
mapfile -t NAMES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${NAMES[0]}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then  # srun no longer asks for as many as sbatch did
    export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
fi
export SCRIPT
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$SCRIPT" "$@"' srun ${ARGS[@]+"${ARGS[@]}"}
