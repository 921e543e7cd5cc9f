"""Training with parts of a model on each process: the laws of several processes, and whole runs of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from background_runs import LIMIT, ended, no_process_left, run, until  # noqa: F401
from flux_runs import lora_file, save_flux
from safetensors.torch import load_file
from sharding_laws import STEPS
from test_launch_several import gone, ranks_of
from test_parallel import ENVIRONMENT, TESTS, train
from tiny import tiny_config, tiny_flow
from tiny_flux import tiny_transformer
from toy_run import SETTINGS

from srpo_core import last_words, launch
from srpo_core.assemble import assemble
from srpo_core.checkpoint import checkpoint_folder, latest, read_shapes, read_tensors
from srpo_core.checks import Footprint, check_sharing
from srpo_core.compact_adamw import CODES
from srpo_core.config import ConfigError, ParallelConfig
from srpo_core.devices import as_launched, training_world
from srpo_core.errors import NotFiniteError
from srpo_core.export import export_run
from srpo_core.metrics import read_metrics
from srpo_core.models import load_model
from srpo_core.models.flux import FluxFlow
from srpo_core.models.flux_context import nearest_size
from srpo_core.parallel import OthersError, World
from srpo_core.processes import birth
from srpo_core.run_state import read_state
from srpo_core.sharded_checkpoint import open_saved
from srpo_core.weights.tensors import WeightsError

SHARDED = {"device": "cpu", "processes": 2, "strategy": "shard"}


@pytest.mark.parametrize("processes", [2, 4])
def test_what_processes_with_parts_of_a_model_can_rely_on(tmp_path, processes):
    """4 are 2 on each of two machines; both go on with what one process began, be it with moments in 8 bits."""
    rely_on_laws(tmp_path, processes, "cpu")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_what_two_gpus_can_rely_on(tmp_path):
    """The same by NCCL."""
    rely_on_laws(tmp_path, 2, "cuda")


def rely_on_laws(folder: Path, processes: int, device: str) -> None:
    narrow = {"model__dtype": "bfloat16", "model__trained_memory": "bfloat16", "optim__states": "8bit"}
    for name, more in (("one", {}), ("narrow", narrow)):
        assemble(tiny_config(folder / name, **STEPS | {"optim__steps": 2} | more)).train()
    assert any(name.endswith(CODES[0]) for name in read_shapes(checkpoint_folder(folder / "narrow", 2), "optimizer"))
    save_flux(folder / "flux")
    lora_file(folder / "flux" / "lora.safetensors", folder / "flux")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(TESTS / "sharding_laws.py"), str(folder)],
        env=os.environ | ENVIRONMENT | {"LAWS_DEVICE": device}, capture_output=True, text=True, timeout=2 * LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("rank-*"))) == processes


def test_the_reason_outlives_the_group_that_was_broken_off(monkeypatch):
    """A process that no longer waits for another one, as it has left its last words, has these as its error."""
    monkeypatch.setattr(last_words, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(last_words, "GRACE", 0.01)
    monkeypatch.setattr(last_words, "_heard", [])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World(0, 2, torch.device("cpu"), keeps_step=True)
    with last_words.watched():
        last_words.tell_last("rank 1 of 2: no room")
        deadline = time.monotonic() + LIMIT
        while dist.is_initialized() and time.monotonic() < deadline:
            time.sleep(0.01)
        for call in (lambda: world.exchange(None), lambda: world.as_main(torch.zeros(()))):
            with pytest.raises(OthersError, match="rank 1 of 2: no room") as told:
                call()
            assert told.value.known_to_all
    monkeypatch.setattr(last_words, "_heard", [])
    with pytest.raises(ValueError, match="process group"):  # where nobody said anything it is a mistake of ours
        world.exchange(None)


def test_one_of_another_machine_that_is_silent_counts_as_gone(monkeypatch):
    """One that was killed leaves no words; as long as it gives signs of life it is waited for."""
    for name, seconds in (("LOOK_EVERY", 0.01), ("GRACE", 0.01), ("BEAT_EVERY", 0.02), ("SILENCE", 0.6)):
        monkeypatch.setattr(last_words, name, seconds)
    monkeypatch.setattr(last_words, "_heard", [])
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    world = World(0, 2, torch.device("cpu"), keeps_step=True)
    shared = dist.distributed_c10d._get_default_store()
    with last_words.watched(0, 2):
        for count in range(20):  # longer than one may be silent
            shared.set(f"{last_words.ALIVE}/1", str(count))
            time.sleep(0.06)
        assert dist.is_initialized() and last_words.told_last() is None
        assert int(shared.get(f"{last_words.ALIVE}/0")) > 5  # so does this one
        deadline = time.monotonic() + LIMIT
        while dist.is_initialized() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(OthersError, match="rank 1 of 2 has given no sign of life"):
            world.exchange(None)
    monkeypatch.setattr(last_words, "_heard", [])


@pytest.mark.parametrize("leaves", [False, True], ids=["killed", "left by itself"])
def test_one_of_the_same_machine_that_is_killed_is_gone_at_once(monkeypatch, leaves):
    """The system knows: no torchrun has to end the others, which takes it half a minute where they wait in NCCL."""
    for name, seconds in (("LOOK_EVERY", 0.01), ("GRACE", 0.01)):
        monkeypatch.setattr(last_words, name, seconds)
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(last_words, "_heard", [])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World(2, 4, torch.device("cpu"), keeps_step=True)  # the second machine's first
    shared = dist.distributed_c10d._get_default_store()
    other = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LIMIT})"])

    def unlucky() -> None:
        raise NotFiniteError("the gradient is not finite")  # as what was broken off may be

    try:
        with last_words.watched(2, 4):
            assert shared.get(f"{last_words.PROCESS}/2").decode() == f"{os.getpid()} {birth()}"
            shared.set(f"{last_words.PROCESS}/3", f"{other.pid} {birth(other.pid)}")
            time.sleep(0.3)
            assert dist.is_initialized() and last_words.told_last() is None
            if leaves:
                shared.set(f"{last_words.LEFT}/3", "")
            other.kill()
            other.wait()
            deadline = time.monotonic() + (1 if leaves else LIMIT)
            while dist.is_initialized() and time.monotonic() < deadline:
                time.sleep(0.01)
            if leaves:
                assert dist.is_initialized()
            else:
                for call in (lambda: world.exchange(None), unlucky):
                    with pytest.raises(OthersError, match="rank 3 of 4 was killed without a word"), world.together():
                        call()
        assert shared.check([f"{last_words.LEFT}/2"])
    finally:
        other.kill()
        if dist.is_initialized():
            dist.destroy_process_group()
        monkeypatch.setattr(last_words, "_heard", [])


def test_processes_that_are_done_leave_each_other_together(monkeypatch):
    """The first waits for the last, but not for ever."""
    store, left = dist.HashStore(), []
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def leave(rank: int, size: int, seconds: float) -> None:
        last_words.leave_together(rank, size, timedelta(seconds=seconds))
        left.append(rank)

    first = threading.Thread(target=leave, args=(0, 2, LIMIT), daemon=True)
    first.start()
    first.join(0.3)
    assert not left
    leave(1, 2, LIMIT)
    first.join(LIMIT)
    assert sorted(left) == [0, 1]
    leave(2, 4, 0.1)  # one that doesn't come
    assert left[-1] == 2


def test_a_sharded_run_is_read_by_one_process_that_goes_on_with_it(tmp_path):
    folder, one = tmp_path / "two", tmp_path / "one"
    course = STEPS | {"optim__steps": 2, "output__evaluate_prompts": 3}
    result = str(tmp_path / "result.safetensors")
    told = train(tiny_config(folder, parallel=SHARDED, output__result=result, **course), tmp_path / "two.json")
    assert told.count("finished after step 2") == told.count("Done: ") == 1
    assert (folder / "report.html").is_file()
    assemble(tiny_config(one, **course | {"optim__accumulation": 2})).train()
    ours, theirs = (read_tensors(checkpoint_folder(of, 2), "weights") for of in (folder, one))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    for mine, other in zip(read_metrics(folder), read_metrics(one), strict=True):
        assert mine.get("preview") == pytest.approx(other.get("preview"), abs=1e-4)
        for name in ("loss", "grad_norm", "velocity_drift") if mine["step"] else ():
            assert mine[name] == pytest.approx(other[name], rel=1e-3)

    averages = read_tensors(checkpoint_folder(folder, 2), "ema")
    for path in (Path(result), export_run(folder, tmp_path / "again.safetensors", dtype="float32")):
        written = load_file(path)
        assert written.keys() == averages.keys()
        assert all(torch.equal(written[name], averages[name].to(written[name].dtype)) for name in averages)

    alone = tiny_config(folder, **course | {"optim__steps": 3})
    assert assemble(alone).train(resume=True).finished
    assert (latest(folder) / "weights.safetensors").is_file()


def damage(index: Path, kind: str) -> None:
    part = index.parent / "part-0001.safetensors"
    if kind == "missing":
        part.unlink()
    elif kind == "cut":
        part.write_bytes(part.read_bytes()[:-4])
    elif kind == "elsewhere":
        index.write_text(index.read_text().replace("part-0001", "../part-0001"))
    else:
        index.write_text(index.read_text().replace('"shape": [', '"shape": [1, '))


@pytest.mark.parametrize("kind", ["missing", "cut", "elsewhere", "misfit"])
def test_damaged_parts_are_told(tmp_path, kind):
    from safetensors.torch import save_file

    folder = tmp_path / "weights"
    folder.mkdir()
    for part in (0, 1):
        save_file({"a": torch.full((2, 3), float(part))}, folder / f"part-000{part}.safetensors")
    index = folder / "index.json"
    parts = {"part-0000.safetensors": [0, 0], "part-0001.safetensors": [2, 0]}
    index.write_text(json.dumps({"a": {"shape": [4, 3], "parts": parts}}))
    assert open_saved(tmp_path, "weights").read("a").tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    damage(index, kind)
    with pytest.raises(WeightsError, match=r"part-0001|index.json"):
        open_saved(tmp_path, "weights")


def test_a_killed_process_of_a_sharded_run_ends_it(tmp_path):
    folder = tmp_path / "run"
    launch.start(run(folder, 9999, output__checkpoint_every=1, parallel=SHARDED))
    family = ranks_of(until(folder, lambda state: latest(folder) is not None))
    family[1].kill()
    assert gone(family)
    state = until(folder, ended)
    assert state.status == "failed"
    assert "another process of this run is gone" in state.error
    assert f"the last good checkpoint is {latest(folder)}" in state.error


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("toy_run:load_broken", "rank 1 of 2: ValueError: broken"),  # inside the model
        ("toy_run:load_killed", "another process of this run is gone"),  # inside torch.distributed.checkpoint
    ],
)
def test_what_ends_one_process_where_others_wait_for_it_is_told(tmp_path, family, told):
    folder = tmp_path / "run"
    settings = SETTINGS | {"model": SETTINGS["model"] | {"family": family}}
    launch.start(tiny_config(folder, **settings, parallel=SHARDED))
    state = until(folder, ended)
    assert state.status == "failed"
    assert told in state.error
    assert "there is no checkpoint yet" in state.error and latest(folder) is None


def test_a_request_stops_a_sharded_run_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    launch.start(run(folder, 9999, parallel=SHARDED))
    until(folder, lambda state: state.step >= 2)
    state = launch.stop(folder, LIMIT)
    assert state.status == "stopped", state.error
    assert latest(folder) == checkpoint_folder(folder, state.step)
    assert (latest(folder) / "weights" / "index.json").is_file()
    assert read_state(folder).status == "stopped"


def test_groups_that_processes_cannot_form(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"parallel\.context=2 with 3 processes"):
        training_world(ParallelConfig(device="cpu", context=2))


def test_a_size_whose_tokens_can_be_shared_is_named():
    """Of the sizes around it the one nearest to it in its shape, and it works."""
    flow = FluxFlow(tiny_transformer())
    step = 2 * flow.downscale
    for context, size, nearest in ((2, (45, 45), (44, 44)), (2, (45, 43), (46, 44)), (2, (1, 1), (2, 2))):
        wide, there = (tuple(step * side for side in one) for one in (size, nearest))
        with pytest.raises(ConfigError, match=f"the nearest that can be shared is {there[1]} x {there[0]}$"):
            flow.check_context(context, [wide])
        flow.check_context(context, [there])
    for context in (2, 3, 4, 8):
        for rows, columns in ((45, 45), (7, 5), (1, 3), (64, 43)):
            near = nearest_size(rows, columns, context)
            assert near[0] * near[1] % context == 0
            assert max(abs(near[0] - rows), abs(near[1] - columns)) < context


LAUNCHER = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        ({}, {"processes": 1}),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}, {"processes": 1}),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "RANK": "3", "GROUP_RANK": "0"}, {"processes": 8}),
        ({"WORLD_SIZE": "8", "RANK": "3"}, {"processes": 8}),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "GROUP_RANK": "1", "MASTER_ADDR": "first",
             "MASTER_PORT": "29511"},
            {"processes": 4, "nodes": 2, "node_rank": 1, "rendezvous": "first:29511"},
        ),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "7"}, {"processes": 4, "nodes": 2, "node_rank": 1}),
    ],
)  # fmt: skip
def test_processes_that_a_launcher_started_are_the_runs(tmp_path, monkeypatch, told, settings):
    """Whatever the description says of their number: checks and the record go by what is there."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    parallel = ParallelConfig(device="cpu", strategy="shard")
    config = as_launched(tiny_config(tmp_path, parallel=parallel.model_dump()))
    assert config.parallel == parallel.model_copy(update=settings)
    count = settings["processes"] * settings.get("nodes", 1)
    assert Footprint(16, 0, 0).least_bytes(config) == 16 * 16 / count
    named = {"nodes": 3, "processes": 2, "rendezvous": "here:1"}
    if told.get("WORLD_SIZE", "1") == "1":  # those are still to be started
        assert as_launched(tiny_config(tmp_path, parallel=named)).parallel == ParallelConfig(**named)
    else:
        assert as_launched(tiny_config(tmp_path, parallel=named)).parallel.rendezvous == "here:1"


def test_a_number_of_processes_that_is_none_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    for local, told in (("many", r"LOCAL_WORLD_SIZE='many'"), ("0", r"LOCAL_WORLD_SIZE=0, WORLD_SIZE=8")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        with pytest.raises(ConfigError, match=told):
            as_launched(tiny_config(tmp_path))


def test_a_run_in_parts_may_be_started_by_hand(tmp_path):
    """Of a description that says nothing of its processes; its record does, and so may go on by itself."""
    folder, description = tmp_path / "run", tmp_path / "run.json"
    parts = {"device": "cpu", "strategy": "shard", "gathered": "step"}
    description.write_text(tiny_config(folder, **SETTINGS, optim__steps=1, parallel=parts).model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(launch.MAIN),
         "train", str(description)],
        env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    recorded = json.loads((folder / "run.json").read_text())["parallel"]
    assert (recorded["processes"], recorded["nodes"]) == (2, 1)
    assert read_state(folder).status == "finished"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__frozen_memory": "8bit", "lora__rank": 2}, r"model.frozen_memory='8bit' with parallel.strategy"),
        ({"optim__states": "8bit"}, r"optim.states='8bit'.*set optim.states=float32 or parallel.strategy=replicate"),
        ({"rollout__precision": "fp8"}, r"rollout.precision='fp8' with parallel.strategy='shard'"),
        ({"parallel": {"offload": True}}, r"parallel.offload=True.*set parallel.strategy=shard"),
        ({"parallel": {"gathered": "step", "processes": 2}}, r"parallel.gathered='step'.*set parallel.strategy=shard"),
        ({"parallel": {"gradients": "bfloat16"}}, r"parallel.gradients='bfloat16'.*set parallel.strategy=shard"),
        ({"parallel": {"context": 2}, "model__family": "toy_run:load"}, r"can't share a picture.*\(choices: 1\)"),
        ({"parallel": {"context": 3}}, r"parallel.context=3: the model's 2 attention heads.*\(choices: 1, 2\)"),
        ({"parallel": {"context": 2}, "model__attention": "flash-attn-3"}, r"attention='flash-attn-3' with"),
        ({"parallel": {"context": 2}, "data__height": 20, "data__width": 20}, r"20 x 20 .* 25 tokens, no multiple"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(tmp_path, settings, message):
    config = tiny_config(tmp_path, **{"parallel": SHARDED} | settings)
    flow = load_model(config.model, "cpu").outline()
    with pytest.raises(ConfigError, match=message):
        check_sharing(config, flow, [(config.data.height, config.data.width)])
    check_sharing(tiny_config(tmp_path, parallel=SHARDED | {"context": 2}), tiny_flow(), [(16, 16)])
