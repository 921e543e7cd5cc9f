"""Two runs never share a GPU unasked: pretended GPUs, real processes that hold their locks and die."""

import os
import re
import signal
import subprocess
import sys

import pytest
from tiny import tiny_config

from srpo_core import device_locks, gpus
from srpo_core.config import ConfigError, ParallelConfig
from srpo_core.device_locks import Holder

LISTED = """\
0, GPU-aaaa1111-0000, NVIDIA H100 80GB HBM3, 1000, 81559
1, GPU-bbbb2222-0000, NVIDIA H100 80GB HBM3, 80000, 81559
2, GPU-cccc3333-0000, "NVIDIA RTX 4090, Laptop", 20000, 24564
3, GPU-dddd4444-0000, NVIDIA H100 80GB HBM3, [N/A], 81559
"""
FOUR = gpus.parse_gpus(LISTED)
HOLD = """
import sys, time
from pathlib import Path
from srpo_core.config import ParallelConfig
from srpo_core.device_locks import held
with held(ParallelConfig(share_gpu=sys.argv[3] == "share"), sys.argv[1], Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv(device_locks.FOLDER, str(tmp_path / "locks"))


@pytest.fixture
def processes():
    """Starts processes that hold a key for a run; all are ended afterwards."""
    begun = []

    def start(key, run_dir, share="alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, key, str(run_dir), share], stdout=subprocess.PIPE, text=True
        )
        begun.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()


def chosen(parallel, held=None, seen=None):
    return [gpu.number for gpu in gpus.choose(parallel, FOUR, FOUR if seen is None else seen, held or {})]


def holder_of(*numbers):
    return {FOUR[number].key: Holder(f"/runs/of-{number}", 100 + number, 0.0) for number in numbers}


def test_what_nvidia_smi_prints():
    assert [gpu.number for gpu in FOUR] == [0, 1, 2, 3]
    assert FOUR[2].name == "NVIDIA RTX 4090, Laptop"
    assert FOUR[0].free == 1000 * 2**20
    assert FOUR[3].free is None
    assert gpus.parse_gpus("No devices were found\n") == []


def test_auto_takes_the_free_ones_with_the_most_free_memory():
    assert chosen(ParallelConfig()) == [1]
    assert chosen(ParallelConfig(processes=2)) == [1, 2]
    assert chosen(ParallelConfig(processes=2), holder_of(1)) == [0, 2]
    assert chosen(ParallelConfig(processes=4)) == [0, 1, 2, 3]


def test_shared_ones_come_last_and_only_if_asked_for():
    assert chosen(ParallelConfig(share_gpu=True), holder_of(1)) == [2]
    assert chosen(ParallelConfig(share_gpu=True), holder_of(0, 1, 2, 3)) == [1]
    with pytest.raises(ConfigError, match="processes=4: 3 of 4 GPUs here are free") as error:
        chosen(ParallelConfig(processes=4), holder_of(2))
    assert "/runs/of-2" in str(error.value)
    assert "parallel.share_gpu=true" in str(error.value)


def test_named_ones():
    assert chosen(ParallelConfig(gpus="3, 0", processes=2)) == [0, 3]
    with pytest.raises(ConfigError, match=r"GPU 3 .*process 103 trains on it \(/runs/of-3\)"):
        chosen(ParallelConfig(gpus="3"), holder_of(3))
    assert chosen(ParallelConfig(gpus="3", share_gpu=True), holder_of(3)) == [3]
    for names, processes, words in (("7", 1, "machine has 0"), ("0,0", 2, "write auto"), ("0,1", 1, "names 2 GPUs")):
        with pytest.raises(ConfigError, match=words):
            chosen(ParallelConfig(gpus=names, processes=processes))


def test_one_more_process_than_gpus():
    with pytest.raises(ConfigError, match=r"processes=5: 4 of 4 GPUs here are free; set parallel.processes=4"):
        chosen(ParallelConfig(processes=5))


def test_a_device_by_its_number_among_those_that_are_seen():
    assert chosen(ParallelConfig(device="cuda:1"), seen=FOUR[2:]) == [3]
    with pytest.raises(ConfigError, match="of-3"):
        chosen(ParallelConfig(device="cuda:1"), holder_of(3), FOUR[2:])
    with pytest.raises(ConfigError, match="both choose a GPU"):
        chosen(ParallelConfig(device="cuda:1", gpus="2"))


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (None, [0, 1, 2, 3]), ("2,0", [2, 0]), ("", []), ("-1", []), ("1,9,0", [1]), ("GPU-cccc", [2]),
        ("1,0,2,3,4,5,6", [1, 0, 2, 3]), ("MIG-1234", None),
    ],
)  # fmt: skip
def test_visible_devices_mean_what_cuda_makes_of_them(names, numbers):
    seen = gpus.visible(FOUR, names)
    assert (None if seen is None else [gpu.number for gpu in seen]) == numbers


def test_a_lock_is_held_and_freed_however_its_process_ends(tmp_path, processes):
    assert device_locks.holder("GPU-x") is None
    first = processes("GPU-x", tmp_path / "first")
    assert device_locks.holder("GPU-x").run_dir == str(tmp_path / "first")
    assert device_locks.holder("GPU-x").pid == first.pid
    assert device_locks.holder("GPU-y") is None
    with (
        pytest.raises(ConfigError, match=re.escape(str(tmp_path / "first"))),
        device_locks.held(ParallelConfig(), "GPU-x", tmp_path),
    ):
        pytest.fail("two runs on one GPU")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert device_locks.holder("GPU-x") is None
    with device_locks.held(ParallelConfig(), "GPU-x", tmp_path / "second"):
        assert device_locks.holder("GPU-x").run_dir == str(tmp_path / "second")
    assert device_locks.holder("GPU-x") is None


def test_shared_if_asked_for(tmp_path, processes):
    first = processes("GPU-x", tmp_path / "first")
    second = processes("GPU-x", tmp_path / "second", "share")
    assert device_locks.holder("GPU-x").pid == first.pid
    second.kill()
    second.wait()
    assert device_locks.holder("GPU-x").pid == first.pid


def test_a_started_run_has_its_gpu_before_it_holds_the_lock(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        device_locks.reserve(["GPU-x"], tmp_path / "run", child.pid)
        assert device_locks.holder("GPU-x").run_dir == str(tmp_path / "run")
        with (
            pytest.raises(ConfigError, match=f"process {child.pid} trains on it"),
            device_locks.held(ParallelConfig(), "GPU-x", tmp_path),
        ):
            pytest.fail("two runs on one GPU")
    finally:
        child.kill()
        child.wait()
    assert device_locks.holder("GPU-x") is None


def test_its_own_reservation_is_no_hindrance(tmp_path):
    device_locks.reserve(["GPU-x"], tmp_path / "run", os.getpid())
    with device_locks.held(ParallelConfig(), "GPU-x", tmp_path / "run"):
        pass
    device_locks.reserve(["GPU-x"], tmp_path / "run", os.getppid())  # of one of several processes
    with device_locks.held(ParallelConfig(), "GPU-x", tmp_path / "run"):
        pass


@pytest.mark.parametrize("whose", ["its own", "its launcher's", "another's"])
def test_a_started_run_finds_its_gpu_free_and_no_other_does(tmp_path, monkeypatch, whose):
    monkeypatch.setattr(gpus, "list_gpus", lambda: FOUR[:1])
    monkeypatch.setattr(gpus.torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        pid = {"its own": os.getpid(), "its launcher's": os.getppid(), "another's": other.pid}[whose]
        device_locks.reserve([FOUR[0].key], tmp_path / "run", pid)
        if whose == "another's":
            with pytest.raises(ConfigError, match=f"(?s)0 of 1 GPUs here are free.*process {pid} trains on it"):
                gpus.find(ParallelConfig())
        else:
            assert gpus.find(ParallelConfig()) == FOUR[:1]
    finally:
        other.kill()
        other.wait()


def test_the_cpu_is_shared_by_hand_and_not_in_the_background(tmp_path, processes):
    config = tiny_config(tmp_path / "new")
    assert gpus.check_free(config) == []
    processes("cpu", tmp_path / "first")
    processes("cpu", tmp_path / "second")
    with pytest.raises(ConfigError, match=r"the CPU is taken: .*first") as error:
        gpus.check_free(config)
    assert "srpo stop" in str(error.value)
    config.parallel.share_gpu = True
    assert gpus.check_free(config) == []


def test_looking_takes_no_lock_away(tmp_path, processes):
    """Someone who looks all the time doesn't keep a run from its device."""
    look = "from srpo_core import device_locks\nprint('looks', flush=True)\nwhile True: device_locks.holder('GPU-x')"
    looker = subprocess.Popen([sys.executable, "-c", look], stdout=subprocess.PIPE, text=True)
    try:
        assert looker.stdout.readline() == "looks\n"
        for _ in range(20):
            with device_locks.held(ParallelConfig(), "GPU-x", tmp_path):
                pass
    finally:
        looker.kill()
        looker.wait()


def test_locks_are_where_the_user_says_else_in_the_cache(tmp_path, monkeypatch):
    assert device_locks.lock_folder() == tmp_path / "locks"
    monkeypatch.delenv(device_locks.FOLDER)
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert device_locks.lock_folder() == tmp_path / "cache" / "srpo" / "devices"
    assert device_locks.lock_folder().is_dir()


def test_gpus_named_for_a_torch_without_them(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.version.hip", None)
    assert gpus.find(ParallelConfig()) == []
    with pytest.raises(ConfigError, match="has no GPU support"):
        gpus.find(ParallelConfig(gpus="0"))


def test_only_a_choice_among_several_changes_the_environment(monkeypatch):
    monkeypatch.setattr(gpus, "list_gpus", lambda: FOUR)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    parallel = ParallelConfig()
    assert gpus.environment(parallel, []) == {}
    assert gpus.environment(parallel, FOUR) == {}
    assert gpus.environment(parallel, FOUR[:1]) == {"CUDA_VISIBLE_DEVICES": FOUR[0].key}  # CUDA may count otherwise
    assert gpus.environment(parallel, FOUR[1:3]) == {"CUDA_VISIBLE_DEVICES": f"{FOUR[1].key},{FOUR[2].key}"}
    assert gpus.environment(ParallelConfig(device="cuda:1"), FOUR[1:2]) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert gpus.environment(parallel, FOUR[1:3]) == {}
