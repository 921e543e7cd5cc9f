"""A run as scripts in its folder: the same training from a terminal, a Slurm queue, or on several machines."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from srpo_core.config import RunConfig
from srpo_core.files import write_atomic

MAIN = Path(__file__).with_name("__main__.py")
NAMES = ("train.sh", "multi_host.sh", "slurm.sh")
HEAD = """\
#!/bin/bash
{comment}
set -euo pipefail
SELF="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)/$(basename "${{BASH_SOURCE[0]}}")"
ARGS=("$@")
{where}
"""
OF_RUN = """\
RUN="$(dirname "$(dirname "$SELF")")"
PYTHON={python}
SRPO={main}
PROCESSES={processes}"""
OF_PROJECT = """\
RUN="${{1:?name a run: a preset, a description or a folder, and then settings}}"
shift
PROJECT="${{PROJECT:-$(dirname "$(dirname "$SELF")")}}"
PYTHON="${{PYTHON:-$PROJECT/.venv/bin/python}}"
SRPO="$PROJECT/srpo_core/__main__.py"
GPUS_HERE="$({{ nvidia-smi -L 2>/dev/null || true; }} | wc -l)"
PROCESSES="$((GPUS_HERE > 0 ? GPUS_HERE : 1))\""""
TRAIN = """\
# Trains on this machine: goes on from the newest checkpoint, or starts where there is none. Settings may follow:
#   bash {call} optim.steps=80
# NPROC_PER_NODE (or HOST_GPU_NUM) is the number of processes, one for each GPU."""
TRAIN_BODY = """\
NPROC_PER_NODE="${{NPROC_PER_NODE:-${{HOST_GPU_NUM:-$PROCESSES}}}}"
{gpus}if [ "$NPROC_PER_NODE" = 1 ]; then
    exec "$PYTHON" "$SRPO" train "$RUN" --resume parallel.processes=1 parallel.nodes=1 "$@"
fi
{threads}exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$NPROC_PER_NODE" \\
    "$SRPO" train "$RUN" --resume parallel.processes="$NPROC_PER_NODE" parallel.nodes=1 "$@"
"""
HOSTS = """\
# Trains on several machines. Either from one of them, which starts the others by pdsh and ssh, in the same folder and
# with what is set of NCCL_*, GLOO_SOCKET_IFNAME, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS, HF_HOME, COMFYUI_PATH, PYTHON
# and PROJECT:
#   HOSTS=first,second bash {call}
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
# previews and curves; of a model in parts (parallel.strategy), every process writes its part of a checkpoint."""
HOSTS_BODY = """\
NPROC_PER_NODE="${{NPROC_PER_NODE:-${{HOST_GPU_NUM:-}}}}"
PORT={port}
MASTER_PORT="${{MASTER_PORT:-$PORT}}"
NODE_RANK="${{NODE_RANK:-${{INDEX:-}}}}"
HOST={host}
COUNT={known}
if [ -n "${{HOSTS:-}}" ]; then
    IFS=, read -r -a NAMES <<< "$HOSTS"
    HOST="${{NAMES[0]}}"
    COUNT="${{#NAMES[@]}}"
fi
MASTER_ADDR="${{MASTER_ADDR:-${{CHIEF_IP:-$HOST}}}}"
if [ -n "${{HOSTS:-}}" ] && [ -z "$NODE_RANK" ]; then
    given=(NNODES="$COUNT" MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" NPROC_PER_NODE="$NPROC_PER_NODE")
    names=(GLOO_SOCKET_IFNAME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS HF_HOME COMFYUI_PATH PYTHON PROJECT)
    for name in "${{!NCCL_@}}" "${{names[@]}}"; do
        [ -z "${{!name+set}}" ] || given+=("$name=${{!name}}")
    done
    folder="$(printf %q "$(pwd)")"  # ssh begins in the home folder, with hardly any environment
    command="$(printf '%q ' "${{given[@]}}" bash "$SELF" ${{ARGS[@]+"${{ARGS[@]}}"}})"
    # %h and %n: a host and its number
    exec pdsh -S -R exec -w "$HOSTS" ssh %h "cd ${{folder//%/%%}} && env NODE_RANK=%n ${{command//%/%%}}"
fi
NNODES="${{NNODES:-${{HOST_NUM:-$COUNT}}}}"
NPROC_PER_NODE="${{NPROC_PER_NODE:-$PROCESSES}}"
: "${{NNODES:?is not set, nor HOST_NUM: say how many machines there are, or name them all in HOSTS}}"
{own_rank}[ "$NNODES" -gt 1 ] || NODE_RANK="${{NODE_RANK:-0}}"
: "${{NODE_RANK:?is not set, nor INDEX: say which of NNODES=$NNODES machines this is (0, 1, ...) or name all in HOSTS}}"
if [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "NODE_RANK=$NODE_RANK: of NNODES=$NNODES machines the last one is $((NNODES - 1))" >&2
    exit 1
elif [ "$NODE_RANK" = 0 ]; then
    MASTER_ADDR="${{MASTER_ADDR:-${{HOSTNAME:-localhost}}}}"
fi
: "${{MASTER_ADDR:?is not set, nor CHIEF_IP: say by which name or address machine $NODE_RANK reaches machine 0}}"
{gpus}{threads}exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --node-rank="$NODE_RANK" \\
    --nproc-per-node="$NPROC_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \\
    "$SRPO" train "$RUN" --resume parallel.processes="$NPROC_PER_NODE" parallel.nodes="$NNODES" \\
    parallel.node_rank="$NODE_RANK" parallel.rendezvous="$MASTER_ADDR:$MASTER_PORT" "$@"
"""
SLURM = """\
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_each}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
# Send it with `sbatch {call}` from {folder};
# add the account and the partition that your cluster asks for. Each machine of the job runs multi_host.sh once, and
# that starts a process for each GPU; the first machine of the job is where they meet. When the time is up, send it
# again: training goes on from the newest checkpoint."""
SLURM_BODY = """\
SCRIPT="$(dirname "$SELF")/multi_host.sh"
if [ ! -f "$SCRIPT" ]; then  # Slurm runs a copy
    SCRIPT="${{SLURM_SUBMIT_DIR:?start this with sbatch, from {folder}}}/{beside}multi_host.sh"
fi
export NNODES="$SLURM_JOB_NUM_NODES"
export NPROC_PER_NODE="${{NPROC_PER_NODE:-${{SLURM_GPUS_ON_NODE:-$PROCESSES}}}}"
mapfile -t NAMES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${{NAMES[0]}}"
export MASTER_PORT="${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}}"
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then  # srun no longer asks for as many as sbatch did
    export SRUN_CPUS_PER_TASK="${{SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}}"
fi
export SCRIPT
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$SCRIPT" "$@"' srun ${{ARGS[@]+"${{ARGS[@]}}"}}
"""
THREADS = """\
CPUS="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"  # torchrun gives each of several processes one thread
THREADS="$((CPUS / NPROC_PER_NODE))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}"
"""


def write_scripts(config: RunConfig, run_dir: Path | str) -> list[Path]:
    """Write train.sh, multi_host.sh and slurm.sh into the run's scripts/; their paths. They use run.json beside them.

    The folder may be moved; this program and its Python are found where they are now.
    """
    parallel = config.parallel
    host, _, port = parallel.rendezvous.rpartition(":")
    named = parallel.gpus.replace(" ", "")
    export = 'export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$GPUS}" CUDA_DEVICE_ORDER=PCI_BUS_ID'
    values = {
        "gpus": "" if named == "auto" else f"GPUS={shlex.quote(named)}\n{export}\n",
        "gpus_each": parallel.processes,
        "nodes": parallel.nodes,
        "known": parallel.nodes,
        "own_rank": f'NODE_RANK="${{NODE_RANK:-{parallel.node_rank}}}"\n' if parallel.node_rank else "",
        "host": shlex.quote(host) if host else "",
        "port": shlex.quote(port or "29500"),
        "cpus": 8 * parallel.processes,
        "job": _job_name(Path(run_dir).absolute().name),
        "folder": "its folder",
        "beside": "",
    }
    main = shlex.quote(str(MAIN))
    where = OF_RUN.format(python=shlex.quote(sys.executable), main=main, processes=parallel.processes)
    texts = _texts(where, values, {name: name for name in NAMES})
    return [_script(Path(run_dir) / "scripts" / name, text) for name, text in texts.items()]


def project_scripts() -> dict[str, str]:
    """The same scripts for any run, which is named first: the files of this project's scripts/ by name."""
    values = {
        "gpus": "",
        "gpus_each": 8,
        "nodes": 2,
        "known": "",
        "own_rank": "",
        "host": "",
        "port": "29500",
        "cpus": 64,
        "job": "srpo",
        "folder": "the folder of this project",
        "beside": "scripts/",
    }
    return _texts(OF_PROJECT.format(), values, {name: f"scripts/{name} RUN" for name in NAMES})


def _texts(where: str, values: Mapping[str, object], calls: Mapping[str, str]) -> dict[str, str]:
    values = {**values, "threads": THREADS}
    parts = zip(NAMES, (TRAIN, HOSTS, SLURM), (TRAIN_BODY, HOSTS_BODY, SLURM_BODY), strict=True)
    return {
        name: HEAD.format(comment=comment.format(call=calls[name], **values), where=where) + body.format(**values)
        for name, comment, body in parts
    }


def _job_name(name: str) -> str:
    """A folder's name as a Slurm job's: without what would end the line or the word."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "srpo"


def _script(path: Path, text: str) -> Path:
    write_atomic(path, text, durable=False)
    os.chmod(path, 0o755)
    return path
