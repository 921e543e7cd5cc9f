"""A run's scripts: shell that is well formed, says what torchrun is to do, and really trains."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config
from toy_run import SETTINGS

from srpo_core.checkpoint import list_checkpoints
from srpo_core.files import write_atomic
from srpo_core.run_scripts import project_scripts, write_scripts
from srpo_core.run_state import read_state

ODD = "a run; $(touch x) 'quoted'"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(tmp_path, **settings):
    """A run's folder with its description and scripts."""
    folder = tmp_path / ODD
    config = tiny_config(folder, **settings)
    write_atomic(folder / "run.json", config.model_dump_json())
    return folder, write_scripts(config, folder)


def said(script, *words, **environment):
    """What the script would start: instead of Python it has `echo`."""
    place = script.with_name(f"said-{script.name}")
    place.write_text(re.sub(r"^PYTHON=.*$", "PYTHON=echo", script.read_text(), flags=re.MULTILINE))
    command = ["bash", str(place), *words]
    told = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return told.stdout.strip()


@pytest.mark.parametrize("settings", [{}, {"parallel": {"processes": 8, "gpus": "0,1, 2", "nodes": 2}}])
def test_they_are_well_formed(tmp_path, settings):
    folder, scripts = run(tmp_path, **settings)
    assert [path.name for path in scripts] == ["train.sh", "multi_host.sh", "slurm.sh"]
    for path in scripts:
        assert path.parent == folder / "scripts"
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert path.read_text().startswith("#!/bin/bash\n#")
        assert "{" not in path.read_text().replace("${", "")
    assert not (tmp_path / "x").exists()


def test_the_numbers_reach_torchrun(tmp_path):
    folder, (train, hosts, _) = run(tmp_path, parallel={"processes": 2, "rendezvous": "10.0.0.5:29501", "nodes": 2})
    told = said(train, "optim.steps=8")
    assert "--standalone --nproc-per-node=2" in told
    assert told.endswith(f"train {folder} --resume parallel.processes=2 parallel.nodes=1 optim.steps=8")
    assert "torch.distributed" not in said(train, NPROC_PER_NODE="1")
    told = said(hosts, NODE_RANK="0")
    assert "--nnodes=2 --node-rank=0 --nproc-per-node=2 --master-addr=10.0.0.5 --master-port=29501" in told
    told = said(hosts, NNODES="3", NODE_RANK="2", NPROC_PER_NODE="4", MASTER_ADDR="first", MASTER_PORT="1234")
    assert "--nnodes=3 --node-rank=2 --nproc-per-node=4 --master-addr=first --master-port=1234" in told
    assert told.endswith(
        f"train {folder} --resume parallel.processes=4 parallel.nodes=3 parallel.node_rank=2"
        " parallel.rendezvous=first:1234"
    )


def test_named_gpus(tmp_path):
    _, scripts = run(tmp_path, parallel={"gpus": "2, 3", "processes": 2})
    for script in scripts[:2]:
        script.write_text(script.read_text().replace("exec ", "echo $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER; exec "))
        assert said(script).startswith("2,3 PCI_BUS_ID\n")
        assert said(script, CUDA_VISIBLE_DEVICES="5").startswith("5 PCI_BUS_ID\n")


def test_settings_are_words_and_no_commands(tmp_path):
    """Whoever shares a graph or a description has nothing run by it."""
    trap = f"$(touch {tmp_path}/trap)`touch {tmp_path}/trap`\"; touch {tmp_path}/trap; '"
    _, (train, hosts, _) = run(tmp_path, parallel={"gpus": trap, "rendezvous": f"{trap}:{trap}"})
    said(train, NPROC_PER_NODE="2")
    assert "--master-port=" in said(hosts)
    assert not (tmp_path / "trap").exists()


def test_processes_share_the_cpus(tmp_path):
    """Where torchrun would give each of them one thread."""
    _, scripts = run(tmp_path, parallel={"processes": 2})
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "nproc").write_text("#!/bin/bash\necho 13\n")
    (programs / "nproc").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    for script in scripts[:2]:
        script.write_text(script.read_text().replace('exec "$PYTHON"', 'echo "$OMP_NUM_THREADS"; exec "$PYTHON"'))
        for processes, set_here, threads in (("2", "", "6"), ("4", "", "3"), ("16", "", "1"), ("2", "5", "5")):
            told = said(script, PATH=path, NPROC_PER_NODE=processes, OMP_NUM_THREADS=set_here)
            assert told.startswith(f"{threads}\n"), (script, processes, set_here)


def test_slurm_gives_each_machine_its_number(tmp_path):
    """With programs named as Slurm's that do what they do on two machines."""
    folder, (_, hosts, slurm) = run(tmp_path, parallel={"processes": 4, "nodes": 2})
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/bash\nprintf 'first\\nsecond\\n'\n")
    (programs / "srun").write_text(
        "#!/bin/bash\nexport SLURM_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-1}\n"
        '[ "$1" = --kill-on-bad-exit=1 ] || exit 1; shift\n'  # one that fails doesn't leave the others waiting
        'for id in 0 1; do SLURM_NODEID=$id "$@" & wait; done\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    hosts.write_text(
        'echo "$NODE_RANK of $NNODES, $NPROC_PER_NODE each, $MASTER_ADDR:$MASTER_PORT, $SLURM_CPUS_PER_TASK CPUs, $*"\n'
    )
    copy = tmp_path / "spool" / "job"  # where Slurm runs it from
    copy.parent.mkdir()
    shutil.copy(slurm, copy)
    told = subprocess.run(
        ["bash", str(copy), "optim.steps=9"], capture_output=True, text=True, check=True,
        env={
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder / "scripts"),
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "77",
            "SLURM_CPUS_PER_TASK": "32",
        },
    )  # fmt: skip
    assert told.stdout == "".join(f"{rank} of 2, 4 each, first:20077, 32 CPUs, optim.steps=9\n" for rank in (0, 1))
    assert "#SBATCH --nodes=2\n" in slurm.read_text()
    assert "#SBATCH --job-name=a-run---" in slurm.read_text()


PUBLISHED = {"HOST_NUM": "3", "INDEX": "1", "HOST_GPU_NUM": "4", "CHIEF_IP": "10.0.0.9"}


def test_the_published_names_are_heeded_where_torchruns_are_not_there(tmp_path):
    _, (train, hosts, _) = run(tmp_path, parallel={"processes": 2, "rendezvous": "10.0.0.5:29501", "nodes": 2})
    assert "--nproc-per-node=4" in said(train, **PUBLISHED)
    told = said(hosts, **PUBLISHED)
    assert "--nnodes=3 --node-rank=1 --nproc-per-node=4 --master-addr=10.0.0.9 --master-port=29501" in told
    told = said(hosts, **PUBLISHED, NNODES="5", NODE_RANK="2", NPROC_PER_NODE="8", MASTER_ADDR="first")
    assert "--nnodes=5 --node-rank=2 --nproc-per-node=8 --master-addr=first --master-port=29501" in told


def refused(script, *words, **environment):
    """What the script says where it doesn't start: with nothing set but this."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": "echo", **environment}
    told = subprocess.run(["bash", str(script), *words], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode and not told.stdout, told
    return told.stderr


def test_no_machine_waits_for_one_that_it_cannot_know(tmp_path):
    _, (_, hosts, _) = run(tmp_path, parallel={"processes": 2, "nodes": 2})
    project = Path(__file__).parents[1] / "scripts" / "multi_host.sh"
    assert "NNODES: is not set, nor HOST_NUM: say how many" in refused(project, "flux-dev")
    assert "NNODES: is not set, nor HOST_NUM: say how many" in refused(
        project, "flux-dev", NODE_RANK="1", MASTER_ADDR="first", COUNT="2"
    )
    for script, words in ((project, ["flux-dev"]), (hosts, [])):
        for more in ({}, {"MASTER_ADDR": "first"}, {"NNODES": "3", "CHIEF_IP": "first", "NODE_RANK": ""}):
            told = refused(script, *words, **{"NNODES": "2"} | more)  # on every machine the same line
            count = more.get("NNODES", "2")
            assert f"NODE_RANK: is not set, nor INDEX: say which of NNODES={count} machines this is" in told
        for number in ("NODE_RANK", "INDEX"):
            told = refused(script, *words, NNODES="2", HOST="first", **{number: "1"})
            assert "MASTER_ADDR: is not set, nor CHIEF_IP: say by which name" in told
        told = refused(script, *words, HOST_NUM="2", NODE_RANK="2", CHIEF_IP="first")
        assert "NODE_RANK=2: of NNODES=2 machines the last one is 1" in told


def test_a_machine_knows_what_it_can(tmp_path):
    _, (_, hosts, _) = run(tmp_path, parallel={"processes": 2, "nodes": 2})
    assert "--nnodes=2 --node-rank=0" in said(hosts, INDEX="0")
    assert "--nnodes=1 --node-rank=0" in said(hosts, NNODES="1")
    assert "--nnodes=3 --node-rank=1 --nproc-per-node=2 --master-addr=a" in said(hosts, HOSTS="a,b,c", NODE_RANK="1")
    _, (_, hosts, _) = run(tmp_path, parallel={"nodes": 2, "node_rank": 1, "rendezvous": "10.0.0.5:29501"})
    assert "--node-rank=1 --nproc-per-node=1 --master-addr=10.0.0.5 --master-port=29501" in said(hosts)


PDSH = """#!/bin/bash
[ "$1 $2 $3 $4" = "-S -R exec -w" ] || exit 2
IFS=, read -r -a hosts <<< "$5"
for number in "${!hosts[@]}"; do
    words=()
    for word in "${@:6}"; do
        word="${word//%%/$'\\1'}"
        word="${word//%h/${hosts[$number]}}"
        word="${word//%n/$number}"
        words+=("${word//$'\\1'/%}")
    done
    "${words[@]}"
done
"""
SSH = """#!/bin/bash
[ $# = 2 ] && echo "on $1:" && cd "$(dirname "$0")" && exec env -i PATH="$PATH" bash -c "$2"
"""


def distant(tmp_path):
    """A PATH with programs named pdsh and ssh that do what they do, on this machine: elsewhere, with nothing set."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


def test_one_machine_starts_all_by_pdsh(tmp_path):
    _, (_, hosts, _) = run(tmp_path, parallel={"processes": 2})
    path = distant(tmp_path)
    told = said(hosts, "data.prompts=50% odd 'words'", HOSTS="first,second", PATH=path).splitlines()
    assert [line for line in told if line.startswith("on ")] == ["on first:", "on second:"]
    for number, line in enumerate(line for line in told if "torch.distributed" in line):
        assert f"--nnodes=2 --node-rank={number} --nproc-per-node=2 --master-addr=first --master-port=29500" in line
        assert line.endswith("parallel.rendezvous=first:29500 data.prompts=50% odd 'words'")
    assert not (tmp_path / "x").exists()


def test_the_others_start_in_this_folder_with_what_is_set_here(tmp_path):
    """Or relative paths aren't found there, and NCCL takes another network."""
    place = tmp_path / "100% $(touch x) 'here'"
    place.mkdir()
    python = tmp_path / "a python"
    python.write_text('#!/bin/bash\npwd\nprintf "%s\\n" "$0"\nenv\n')
    python.chmod(0o755)
    values = {
        "PYTHON": str(python), "PROJECT": "/a/project of 50%n", "NCCL_SOCKET_IFNAME": "=eth 0", "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth1,eth2",
        "HF_HOME": "/models $(touch x)", "COMFYUI_PATH": "", "CUDA_VISIBLE_DEVICES": "1,0", "OMP_NUM_THREADS": "3",
    }  # fmt: skip
    script = Path(__file__).parents[1] / "scripts" / "multi_host.sh"

    here = {"PATH": distant(tmp_path), "HOSTS": "first,second", "PYTHON": str(python)}

    def told(**environment):
        command = ["bash", str(script), "./my.yaml"]
        environment = here | environment
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    lines = told(**values)
    for line in (str(place), str(python), *(f"{name}={value}" for name, value in values.items())):
        assert lines.count(line) == 2, line
    assert not [line for line in told() if line.startswith(("NCCL_", "GLOO_", "HF_HOME=", "COMFYUI_", "CUDA_"))]
    assert not list(tmp_path.rglob("x"))


def test_the_projects_own_scripts_are_these_for_any_run(tmp_path):
    scripts = Path(__file__).parents[1] / "scripts"
    for name, text in project_scripts().items():
        assert (scripts / name).read_text() == text
        assert os.access(scripts / name, os.X_OK)
        subprocess.run(["bash", "-n", str(scripts / name)], check=True)

    def told(script, *words, **environment):
        command = ["bash", str(scripts / script), *words]
        environment = {**os.environ, "PYTHON": "echo", **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    said = told("train.sh", "flux-dev", "seed=2", HOST_GPU_NUM="8").stdout.strip()
    assert "--standalone --nproc-per-node=8" in said
    assert said.endswith("train flux-dev --resume parallel.processes=8 parallel.nodes=1 seed=2")
    said = told("multi_host.sh", "my run.yaml", "seed=2", **PUBLISHED).stdout.strip()
    assert "--nnodes=3 --node-rank=1 --nproc-per-node=4 --master-addr=10.0.0.9 --master-port=29500" in said
    assert "train my run.yaml --resume" in said
    refused = told("train.sh")
    assert refused.returncode and "name a run" in refused.stderr


def test_train_sh_trains_also_where_the_folder_was_moved_to(tmp_path):
    folder, _ = run(tmp_path, **SETTINGS)
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    words = ["bash", str(moved / "scripts" / "train.sh")]
    subprocess.run([*words, "optim.steps=2"], env=environment, check=True, cwd=tmp_path, capture_output=True)
    assert [path.name for path in list_checkpoints(moved)][-1] == "step-000002"
    words += ["optim.steps=4"]
    done = subprocess.run(words, env=environment, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "going on from" in done.stdout
    assert (read_state(moved).status, read_state(moved).step) == ("finished", 4)
    assert not folder.exists()
    assert not (tmp_path / "x").exists()


def test_they_name_this_python(tmp_path):
    _, scripts = run(tmp_path)
    assert all(f"PYTHON={sys.executable}\n" in path.read_text() for path in scripts)
