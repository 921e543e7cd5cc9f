#!/bin/bash
# Trains on several machines. Either from one of them, which starts the others by pdsh and ssh, in the same folder and
# with what is set of NCCL_*, GLOO_SOCKET_IFNAME, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS, HF_HOME, COMFYUI_PATH, PYTHON
# and PROJECT:
#   HOSTS=first,second bash scripts/multi_host.sh RUN
# or by running it on every machine at about the same time, with the same numbers but for NODE_RANK:
#   NNODES          how many machines there are                              (or HOST_NUM)
#   NODE_RANK       which of them this one is: 0, 1, ...; on each another    (or INDEX)
#   NPROC_PER_NODE  processes on each machine, one for each GPU              (or HOST_GPU_NUM)
#   MASTER_ADDR     name or address of machine 0, as the others reach it     (or CHIEF_IP)
#   MASTER_PORT     a port on machine 0 that is free and that no firewall closes
# The rendezvous: torchrun on machine 0 listens at MASTER_ADDR:MASTER_PORT, the others' come to it, and training begins
# when all are there; until then, each waits for the others. From then on processes talk to each other directly, over
# InfiniBand where NCCL finds it: NCCL_SOCKET_IFNAME names the network (GLOO_SOCKET_IFNAME that of what goes between
# CPUs), NCCL_DEBUG=INFO says what was found.
# The run's folder, the models and this program must be at the same paths on all machines. Only machine 0 writes
# previews and curves; of a model in parts (parallel.strategy), every process writes its part of a checkpoint.
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
NPROC_PER_NODE="${NPROC_PER_NODE:-${HOST_GPU_NUM:-}}"
PORT=29500
MASTER_PORT="${MASTER_PORT:-$PORT}"
NODE_RANK="${NODE_RANK:-${INDEX:-}}"
HOST=
COUNT=
if [ -n "${HOSTS:-}" ]; then
    IFS=, read -r -a NAMES <<< "$HOSTS"
    HOST="${NAMES[0]}"
    COUNT="${#NAMES[@]}"
fi
MASTER_ADDR="${MASTER_ADDR:-${CHIEF_IP:-$HOST}}"
if [ -n "${HOSTS:-}" ] && [ -z "$NODE_RANK" ]; then
    given=(NNODES="$COUNT" MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" NPROC_PER_NODE="$NPROC_PER_NODE")
    names=(GLOO_SOCKET_IFNAME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS HF_HOME COMFYUI_PATH PYTHON PROJECT)
    for name in "${!NCCL_@}" "${names[@]}"; do
        [ -z "${!name+set}" ] || given+=("$name=${!name}")
    done
    folder="$(printf %q "$(pwd)")"  # ssh begins in the home folder, with hardly any environment
    command="$(printf '%q ' "${given[@]}" bash "$SELF" ${ARGS[@]+"${ARGS[@]}"})"
    # %h and %n: a host and its number
    exec pdsh -S -R exec -w "$HOSTS" ssh %h "cd ${folder//%/%%} && env NODE_RANK=%n ${command//%/%%}"
fi
NNODES="${NNODES:-${HOST_NUM:-$COUNT}}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$PROCESSES}"
: "${NNODES:?is not set, nor HOST_NUM: say how many machines there are, or name them all in HOSTS}"
[ "$NNODES" -gt 1 ] || NODE_RANK="${NODE_RANK:-0}"
: "${NODE_RANK:?is not set, nor INDEX: say which of NNODES=$NNODES machines this is (0, 1, ...) or name all in HOSTS}"
if [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "NODE_RANK=$NODE_RANK: of NNODES=$NNODES machines the last one is $((NNODES - 1))" >&2
    exit 1
elif [ "$NODE_RANK" = 0 ]; then
    MASTER_ADDR="${MASTER_ADDR:-${HOSTNAME:-localhost}}"
fi
: "${MASTER_ADDR:?is not set, nor CHIEF_IP: say by which name or address machine $NODE_RANK reaches machine 0}"
CPUS="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"  # torchrun gives each of several processes one thread
THREADS="$((CPUS / NPROC_PER_NODE))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}"
exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --node-rank="$NODE_RANK" \
    --nproc-per-node="$NPROC_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
    "$SRPO" train "$RUN" --resume parallel.processes="$NPROC_PER_NODE" parallel.nodes="$NNODES" \
    parallel.node_rank="$NODE_RANK" parallel.rendezvous="$MASTER_ADDR:$MASTER_PORT" "$@"
