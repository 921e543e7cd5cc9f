"""A run as scripts in its folder: the same training from a terminal, a Slurm queue, or on several machines."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from srpo_core.config import RunConfig
from srpo_core.files import write_atomic

MAIN = Path(__file__).with_name("__main__.py")
HEAD = """\
#!/bin/bash
{comment}
set -euo pipefail
RUN="$(cd "$(dirname "${{BASH_SOURCE[0]}}")/.." && pwd)"
PYTHON={python}
SRPO={main}
"""
TRAIN = """\
# Goes on from the newest checkpoint in this folder, or starts where there is none. Settings may follow:
#   bash train.sh optim.steps=80
# NPROC_PER_NODE is the number of processes, one for each GPU."""
TRAIN_BODY = """\
NPROC_PER_NODE="${{NPROC_PER_NODE:-{processes}}}"
{gpus}if [ "$NPROC_PER_NODE" = 1 ]; then
    exec "$PYTHON" "$SRPO" train "$RUN" --resume parallel.processes=1 parallel.nodes=1 "$@"
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$NPROC_PER_NODE" \\
    "$SRPO" train "$RUN" --resume parallel.processes="$NPROC_PER_NODE" parallel.nodes=1 "$@"
"""
HOSTS = """\
# Run this on every machine at about the same time, with the same numbers but for NODE_RANK:
#   NNODES          how many machines there are
#   NODE_RANK       which of them this one is: 0, 1, ...
#   NPROC_PER_NODE  processes on each machine, one for each GPU
#   MASTER_ADDR     name or address of machine 0, as the others reach it
#   MASTER_PORT     a port on machine 0 that is free and that no firewall closes
# The machines find each other at MASTER_ADDR:MASTER_PORT: machine 0 listens there, the others come to it, and training
# begins when all are there. This folder, the models and this program must be at the same paths on all of them; only
# machine 0 writes checkpoints, previews and curves."""
HOSTS_BODY = """\
NNODES="${{NNODES:-{nodes}}}"
NODE_RANK="${{NODE_RANK:-{node_rank}}}"
NPROC_PER_NODE="${{NPROC_PER_NODE:-{processes}}}"
HOST={host}
PORT={port}
MASTER_ADDR="${{MASTER_ADDR:-$HOST}}"
MASTER_PORT="${{MASTER_PORT:-$PORT}}"
{gpus}exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --node-rank="$NODE_RANK" \\
    --nproc-per-node="$NPROC_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \\
    "$SRPO" train "$RUN" --resume parallel.processes="$NPROC_PER_NODE" parallel.nodes="$NNODES" \\
    parallel.node_rank="$NODE_RANK" parallel.rendezvous="$MASTER_ADDR:$MASTER_PORT" "$@"
"""
SLURM = """\
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={processes}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
# Send it with `sbatch slurm.sh` from this folder; add the account and the partition that your cluster asks for. Each
# machine of the job runs multi_host.sh once, and that starts a process for each GPU; the first machine of the job is
# where they meet. When the time is up, send it again: training goes on from the newest checkpoint."""
SLURM_BODY = """\
if [ ! -f "$RUN/scripts/multi_host.sh" ]; then
    RUN="$(cd "${{SLURM_SUBMIT_DIR:?start this with sbatch, from its folder}}/.." && pwd)"  # Slurm runs a copy
fi
export NNODES="$SLURM_JOB_NUM_NODES"
export NPROC_PER_NODE="${{NPROC_PER_NODE:-{processes}}}"
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${{HOSTS[0]}}"
export MASTER_PORT="${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}}"
export RUN
srun bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$RUN/scripts/multi_host.sh" "$@"' srun "$@"
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
        "python": shlex.quote(sys.executable),
        "main": shlex.quote(str(MAIN)),
        "gpus": "" if named == "auto" else f"GPUS={shlex.quote(named)}\n{export}\n",
        "processes": parallel.processes,
        "nodes": parallel.nodes,
        "node_rank": parallel.node_rank,
        "host": shlex.quote(host) if host else '"${HOSTNAME:-localhost}"',
        "port": shlex.quote(port or "29500"),
        "cpus": 8 * parallel.processes,
        "job": _job_name(Path(run_dir).absolute().name),
    }
    texts = {
        "train.sh": HEAD.format(comment=TRAIN, **values) + TRAIN_BODY.format(**values),
        "multi_host.sh": HEAD.format(comment=HOSTS, **values) + HOSTS_BODY.format(**values),
        "slurm.sh": HEAD.format(comment=SLURM.format(**values), **values) + SLURM_BODY.format(**values),
    }
    return [_script(Path(run_dir) / "scripts" / name, text) for name, text in texts.items()]


def _job_name(name: str) -> str:
    """A folder's name as a Slurm job's: without what would end the line or the word."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "srpo"


def _script(path: Path, text: str) -> Path:
    write_atomic(path, text, durable=False)
    os.chmod(path, 0o755)
    return path
