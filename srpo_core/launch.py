"""`srpo train` in processes of its own, which outlive the one that starts them; found again by their run's folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
from filelock import FileLock

from srpo_core import gpus, result
from srpo_core.at_work import work_folder
from srpo_core.config import ConfigError, ParallelConfig, RunConfig
from srpo_core.description import DIGEST
from srpo_core.device_locks import lock_folder, reserve
from srpo_core.files import write_atomic
from srpo_core.processes import is_running
from srpo_core.run_folder import check_start, load_folder
from srpo_core.run_scripts import write_scripts
from srpo_core.run_state import LOG_FILE, RunState, ask_to_stop, clear_stop, is_alive, read_state, write_state

MAIN = Path(__file__).with_name("__main__.py")
ENDING = 10.0
"""Seconds that a process which has said how its run ended may take to be gone."""
QUEUE = 2 * ENDING
"""Seconds that a start waits for another one, which may wait ENDING itself."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def train_command(
    run_file: Path | str, resume: bool = False, parallel: ParallelConfig | None = None, python: str = sys.executable
) -> list[str]:
    """The command that trains a run's description, a word each: for this process's Python, and for no shell.

    `parallel` of several processes or machines has torchrun start them. ConfigError if machines have no rendezvous.
    """
    words = [str(MAIN), "train", str(run_file), *(["--resume"] if resume else [])]
    if parallel is None or not is_several(parallel):
        return [python, *words]
    return [python, "-m", "torch.distributed.run", *_meeting(parallel), *words]


def is_several(parallel: ParallelConfig) -> bool:
    """Whether the run has more processes than one, on all its machines."""
    return parallel.processes * parallel.nodes > 1


def _meeting(parallel: ParallelConfig) -> list[str]:
    """torchrun's arguments: how many processes there are, and where they find each other."""
    count = f"--nproc-per-node={parallel.processes}"
    if parallel.nodes == 1:
        return ["--standalone", count]
    host, _, port = parallel.rendezvous.rpartition(":")
    if not re.fullmatch(r"[\w.:\[\]-]+", host) or not re.fullmatch(r"\d{1,5}", port) or int(port) >= 2**16:
        raise ConfigError(
            f"parallel.nodes={parallel.nodes}, parallel.rendezvous={parallel.rendezvous!r}: write host:port of machine"
            " 0, such as 10.0.0.5:29500"
        )
    if parallel.node_rank >= parallel.nodes:
        raise ConfigError(
            f"parallel.node_rank={parallel.node_rank}: of parallel.nodes={parallel.nodes} machines the last one is"
            f" {parallel.nodes - 1}"
        )
    where = [f"--master-addr={host.strip('[]')}", f"--master-port={port}"]
    return [f"--nnodes={parallel.nodes}", f"--node-rank={parallel.node_rank}", count, *where]


def start(config: RunConfig, resume: bool = False, environment: Mapping[str, str] | None = None) -> int:
    """Start a run's training in processes of its own; the first one's pid. What they print goes to train.log.

    The description is run.json in the run's folder (work_folder, on a further machine). ConfigError if the run can't
    start there, is at work already, or would share a GPU or the CPU with another one.
    """
    folder = work_folder(config)
    with _one_at_a_time():
        chosen = check(config, resume)
        command, digest = _prepare(config, resume)
        changes = {**gpus.environment(config.parallel, chosen), **digest, **(environment or {})}
        with (folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=child_environment(changes, config.parallel.processes), **_apart(),
            )  # fmt: skip
        state = read_state(folder)
        if state is None or process.pid not in (state.pid, state.launcher):  # it may have begun to tell of itself
            write_state(folder, "starting", config.optim.steps, process.pid)
        shared = gpus.shared_key(config.parallel, chosen)
        reserve([gpu.key for gpu in chosen] if shared is None else [shared], folder.absolute(), process.pid)
    threading.Thread(target=process.wait, daemon=True).start()  # so that nothing is left of it when it has ended
    return process.pid


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Inside the context nobody else starts a run here: of two that want one folder or GPU, one finds it taken."""
    lock = FileLock(lock_folder() / "starting.lock")
    with contextlib.suppress(OSError):  # a file system without locks, or one who stands still: the run is worth more
        lock_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=QUEUE)
    try:
        yield
    finally:
        lock.release()


def check(config: RunConfig, resume: bool = False, background: bool = True) -> list[gpus.Gpu]:
    """ConfigError if the run can't start now; else the GPUs that it would take, [] for the CPU. Starts nothing."""
    train_command("", resume, config.parallel)
    check_idle(config)
    if work_folder(config) == Path(config.output.dir):
        check_start(config, resume)
    result.check(config)
    return gpus.check_free(config) if background else gpus.find(config.parallel)


def _prepare(config: RunConfig, resume: bool) -> tuple[list[str], dict[str, str]]:
    """Write the description and the scripts; the command, and the description's digest for its environment."""
    folder = work_folder(config)
    run_file = folder.absolute() / "run.json"
    command = train_command(run_file, resume, config.parallel)
    text = config.model_dump_json(indent=1).encode()
    write_atomic(run_file, text)
    if folder == Path(config.output.dir):  # what they train is the folder that they are in
        write_scripts(config, folder)
    clear_stop(folder)
    return command, {DIGEST: hashlib.sha256(text).hexdigest()}


def resume(
    run_dir: Path | str,
    steps: int | None = None,
    environment: Mapping[str, str] | None = None,
    check: Callable[[RunConfig], None] | None = None,
) -> int:
    """Go on with a run by its folder, which may have been moved, to `steps` in all if given; its pid.

    `check` may refuse its description by an error. ConfigError if there is nothing left to do, or for the reasons of
    `start`.
    """
    config = load_folder(run_dir, [] if steps is None else [f"optim.steps={steps}"])
    if check is not None:
        check(config)
    state = read_state(work_folder(config))
    if state is not None and state.status == "finished" and state.step >= config.optim.steps:
        raise ConfigError(f"{run_dir} is finished at step {state.step}; give more steps to go on with it")
    return start(config, resume=True, environment=environment)


def foreground(config: RunConfig, resume: bool = False) -> RunState | None:
    """Train in several processes and wait for them, with their output here; the run's state then.

    SIGINT, SIGTERM and a terminal that closes ask the run to stop; a second signal ends it. ConfigError as for `start`.
    """
    folder = work_folder(config)
    with contextlib.ExitStack() as queue:
        queue.enter_context(_one_at_a_time())
        chosen = check(config, resume, background=False)
        command, digest = _prepare(config, resume)
        changes = {**gpus.environment(config.parallel, chosen), **digest}
        with _heeding_signals(folder):
            process = subprocess.Popen(command, env=child_environment(changes, config.parallel.processes), **_apart())
            try:
                write_state(folder, "starting", config.optim.steps, process.pid)
                reserve([gpu.key for gpu in chosen], folder.absolute(), process.pid)
                queue.close()
                process.wait()
            finally:
                state = read_state(folder)
                if state is not None:
                    kill(state)
                process.kill()  # where its state is gone
                process.wait()
    return read_state(folder)


@contextlib.contextmanager
def _heeding_signals(folder: Path) -> Iterator[None]:
    """Inside the context a first signal that would end this process asks the run in a folder to stop."""
    asked = False

    def heed(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask_to_stop(folder)

    there = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, heed) for number in there if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_idle(config: RunConfig) -> None:
    """ConfigError if a process works on the run; one that has said how it ended may take a moment to be gone."""
    folder, end = work_folder(config), time.monotonic() + ENDING
    while (state := read_state(folder)) is not None and state.pid != os.getpid() and is_alive(state):
        if state.active or time.monotonic() > end:
            raise ConfigError(
                f"output.dir={config.output.dir!r}: process {state.pid} is at work on this run; stop it first, or name"
                " another folder"
            )
        time.sleep(0.05)


def child_environment(changes: Mapping[str, str], processes: int = 1) -> dict[str, str]:
    """This process's environment for some that train: without the CUDA allocator that ComfyUI chose for itself."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    for name in ALLOCATOR:
        parts = [part for part in environment.pop(name, "").split(",") if part]
        kept = [part for part in parts if not re.fullmatch(r"\s*backend\s*:\s*cudaMallocAsync\s*", part)]
        if kept:
            environment[name] = ",".join(kept)
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if os.name == "nt":
        environment.setdefault("USE_LIBUV", "0")  # torch for Windows is built without it
    return environment | dict(changes)


def _apart() -> dict[str, object]:
    """What keeps a process alive, and out of its parent's Ctrl-C, when the parent ends."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def stop(run_dir: Path, patience: float = 60.0) -> RunState | None:
    """Have a run save and end; after `patience` seconds end its processes. Its state then.

    ConfigError if it runs on another machine and is not done by then.
    """
    run_dir = Path(run_dir)
    state = read_state(run_dir)
    if state is None or not state.active:
        return state
    ask_to_stop(run_dir)
    end = time.monotonic() + patience
    while state is not None and is_alive(state) and time.monotonic() < end:
        time.sleep(0.05)
        state = read_state(run_dir) or state
    kill(state)
    return read_state(run_dir)


def kill(state: RunState) -> None:
    """End a run's processes and all that they started, now. ConfigError if it runs on another machine.

    A state that names a process which trains nothing is not believed.
    """
    if not is_alive(state):
        return
    if state.host != socket.gethostname():
        raise ConfigError(f"process {state.pid} runs on {state.host}, and can be ended only there")
    family: list[psutil.Process] = []
    for pid, created in ((state.launcher, state.launcher_created), (state.pid, state.created)):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid) if pid else None
            if process is not None and is_running(pid, created) and _trains(process):
                family += [process, *process.children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.Error):  # it is gone, or on its way, where Windows says "access denied"
            one.kill()
    psutil.wait_procs(family, timeout=10)


def _trains(process: psutil.Process) -> bool:
    """Whether a process is `srpo train`, in whatever way it was started, or torchrun of it."""
    words = process.cmdline()
    return "train" in words and any("srpo" in word for word in words) and process.pid != os.getpid()
