"""Recorded rollout calls: the same numbers, recorded anew where they have to be, and given up where they don't fit.

A CPU has no graphs: there `Again` does recorded work once more when it is played, and what is tried is when something
is recorded. The last tests try CUDA graphs themselves, on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tiny import encode_text, tiny_config, tiny_flow

from srpo_core.assemble import assemble
from srpo_core.flow import shifted_sigmas
from srpo_core.metrics import Clock
from srpo_core.replay import CudaGraphs, Replay, addresses_of, can_record
from srpo_core.rollout import rollout

GIB = 2**30


@dataclass
class Again:
    """Records work by keeping it: played, it is done again and its result put where the first one was."""

    each: int = 100
    """Bytes that a recording takes."""
    fails: Exception | None = None
    taken: int = 0
    recorded: int = 0
    played: list[int] = field(default_factory=list)

    def record(self, work, again):
        if self.fails is not None:
            raise self.fails
        self.recorded += 1
        self.taken += 0 if again else self.each  # the same memory
        return _Again(self, work, self.recorded)

    def forget(self):
        self.taken = 0


class _Again:
    def __init__(self, owner, work, number):
        self.owner, self.work, self.number = owner, work, number
        self.out = torch.full((), torch.nan)

    def play(self):
        self.owner.played.append(self.number)
        self.out = self.work()


@dataclass
class Room:
    """Memory of a device with `free` bytes beside the most that was in use, of which a call takes some."""

    free: int = GIB
    call: int = 100
    measured: int = 0

    def spent(self, work):
        self.measured += 1
        return work(), self.call

    def allocated(self) -> int:
        return 10

    def peak(self) -> int:
        return 50

    def room(self) -> int:
        return self.free + self.peak() - self.allocated()


def replay_with(recorder, memory=None):
    told = []
    replay = Replay(recorder, memory or Room(), told.append)
    replay.ready = True
    return replay, told


def rolled_out(model, prompts=("a cat", "a dog"), steps=5, calls=0, seed=0, guidance=1.0):
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return rollout(model, encode_text(prompts), noise, shifted_sigmas(steps, 3.0), guidance, calls=calls).clean


@pytest.mark.parametrize("calls", [0, 3])
def test_played_calls_draw_what_calls_draw(calls):
    flow, recorder = tiny_flow(), Again()
    replay, _ = replay_with(recorder)
    for seed, prompts in enumerate([("a cat", "a dog"), ("a tree", "a boat"), ("a car", "a house")]):
        ours = rolled_out(replay.of(flow), prompts, calls=calls, seed=seed)
        assert torch.equal(ours, rolled_out(flow, prompts, calls=calls, seed=seed))
    # the first shows where the weights are, and the first call of the second that they are still there
    assert recorded_and_played(recorder) == (1, 2 * (calls or 5) - 1)


def recorded_and_played(recorder):
    return recorder.recorded, len(recorder.played)


def test_each_shape_and_guidance_has_a_recording_of_its_own():
    flow, recorder = tiny_flow(), Again()
    replay, _ = replay_with(recorder)
    rolled_out(replay.of(flow))
    model = replay.of(flow)
    ways = [{}, {"prompts": ("a cat",)}, {"guidance": 3.5}]
    for way in ways + ways[::-1]:
        assert torch.equal(rolled_out(model, **way), rolled_out(flow, **way))
    assert recorded_and_played(recorder) == (3, 4 + 2 * 3 + 3 * 5)  # one was measured before, the others are first
    assert set(recorder.played) == {1, 2, 3}
    assert replay.taken == 300


def test_moved_weights_are_recorded_where_they_are():
    """Changed in place they are read as they are now; elsewhere nothing recorded before is played."""
    flow, recorder = tiny_flow(), Again()
    replay, _ = replay_with(recorder)
    layer, before = flow.module.single_transformer_blocks[0].proj_mlp, []
    for moves, recorded, played in ((False, 0, 0), (False, 1, 4), (True, 1, 4), (False, 2, 8), (False, 2, 13)):
        before.append(layer.weight.data)  # kept, so that nothing else comes to be there
        with torch.no_grad():
            layer.weight.mul_(1.5)
        if moves:
            layer.weight.data = layer.weight.data * 2
        assert torch.equal(rolled_out(replay.of(flow)), rolled_out(flow))
        assert recorded_and_played(recorder) == (recorded, played)
    assert set(recorder.played[-9:]) == {2} and recorder.taken == 100


def test_where_weights_move_in_each_step_calls_are_made():
    """Recording anew takes longer than it saves."""
    flow, recorder = tiny_flow(), Again()
    replay, _ = replay_with(recorder)
    layer, before = flow.module.single_transformer_blocks[0].proj_mlp, []
    for _ in range(4):
        assert torch.equal(rolled_out(replay.of(flow)), rolled_out(flow))
        before.append(layer.weight.data)
        layer.weight.data = layer.weight.data * 2
    assert recorded_and_played(recorder) == (0, 0) and replay.taken == 0


def test_all_tensors_of_a_module_have_an_address():
    """Parameters, buffers and what a layer holds beside them, such as codes that are put there."""
    layer = torch.nn.BatchNorm1d(4)
    layer.table = torch.ones(3)
    tensors = [*layer.parameters(), *layer.buffers(), layer.table]
    assert sorted(addresses_of(layer)) == sorted(tensor.data_ptr() for tensor in tensors)


def test_no_recording_before_a_step_is_done():
    flow = tiny_flow()
    replay = Replay(Again(), Room(), lambda _: None)
    assert replay.of(flow) is flow


@pytest.mark.parametrize(
    ("room", "each", "recorded", "kept"),
    [(100, 100, 1, True), (99, 100, 0, False), (100, 101, 1, False)],
    ids=["fits", "its calls don't", "it doesn't"],
)
def test_what_would_leave_a_step_too_little_is_not_recorded(room, each, recorded, kept):
    flow, recorder = tiny_flow(), Again(each=each)
    memory = Room(room)
    replay, told = replay_with(recorder, memory)
    for _ in range(3):
        assert torch.equal(rolled_out(replay.of(flow)), rolled_out(flow))
    assert memory.measured == 1 and recorder.recorded == recorded  # neither is tried again
    assert replay.taken == (each if kept else 0) and not told
    assert bool(recorder.played) == kept


def test_a_shape_without_room_leaves_the_others_theirs():
    flow, recorder, memory = tiny_flow(), Again(), Room(150)
    replay, _ = replay_with(recorder, memory)
    for prompts in (("a cat",), ("a cat",), ("a cat", "a dog"), ("a cat", "a dog"), ("a cat",)):
        assert torch.equal(rolled_out(replay.of(flow), prompts), rolled_out(flow, prompts))
    assert memory.measured == 2 and recorded_and_played(recorder) == (1, 4 + 5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "not permitted when stream"),
        (torch.OutOfMemoryError("CUDA out of memory"), ""),
    ],
)
def test_what_can_not_be_recorded_is_called(error, said):
    flow, recorder = tiny_flow(), Again(fails=error)
    replay, told = replay_with(recorder)
    for _ in range(3):
        assert torch.equal(rolled_out(replay.of(flow)), rolled_out(flow))
    assert len(told) == bool(said) and all("rollout.cuda_graph=true" in one and said in one for one in told)


@pytest.mark.parametrize(
    ("settings", "device", "wanted"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"rollout__cuda_graph": False}, "cuda", False),
        ({"parallel": {"context": 2, "processes": 2}}, "cuda", False),
        ({"parallel": {"strategy": "shard", "processes": 2}}, "cuda", False),
        ({"parallel": {"strategy": "shard", "processes": 2, "gathered": "step"}}, "cuda", True),
        ({"parallel": {"strategy": "hybrid", "processes": 2, "gathered": "rollout"}}, "cuda", True),
        ({"parallel": {"processes": 2}}, "cuda", True),
    ],
)
def test_what_is_recorded(tmp_path, settings, device, wanted):
    """What sends messages to other processes isn't, nor a flow that doesn't say it can be."""
    config = tiny_config(tmp_path, **settings)

    class Other:
        module = tiny_flow().module

    assert can_record(config, tiny_flow(), torch.device(device)) == wanted
    assert not can_record(config, Other(), torch.device(device))


def trained(tmp_path, name, recorder=None, steps=4, **settings):
    """A learner after some steps, with its rollouts recorded by a recorder, if any, and what its last step told."""
    learner = assemble(tiny_config(tmp_path / name, **{"optim__steps": 6} | settings)).learner
    if recorder is not None:
        learner._replay = Replay(recorder, Room(), lambda _: None)
    told = None
    for step in range(1, steps + 1):
        told = learner.step(step, Clock(lambda: None))
    return learner, told


@pytest.mark.parametrize(
    ("settings", "recordings"),
    [
        ({}, 1),
        ({"lora__rank": 2, "optim__accumulation": 3, "rollout__at_once": 2}, 2),
        ({"rollout": {"num_steps": 4, "precision": "fp8"}}, None),  # its codes may come to be where others were
    ],
    ids=["plain", "two shapes", "fp8"],
)
def test_a_run_learns_the_same_with_its_rollouts_recorded(tmp_path, settings, recordings):
    recorder = Again()
    ours, told = trained(tmp_path, "ours", recorder, **settings)
    theirs, wanted = trained(tmp_path, "theirs", **settings)
    assert told.loss == wanted.loss
    assert all(torch.equal(p, theirs.trained[name]) for name, p in ours.trained.items())
    assert recordings is None or (recorder.recorded, recorder.taken) == (recordings, 100 * recordings)
    assert ours._aside() == recorder.taken  # which no activations can have


def test_a_step_that_runs_out_of_memory_is_tried_without_recordings(tmp_path, monkeypatch):
    recorder = Again()
    learner, _ = trained(tmp_path, "run", recorder, steps=3)
    real, asked = learner._add_gradients, []

    def full(*args):
        asked.append(recorder.taken)
        if recorder.taken:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(learner, "_add_gradients", full)
    told = learner.step(4, Clock(lambda: None))
    assert asked == [100, 0]
    assert told.loss == trained(tmp_path, "without")[1].loss
    recorder.taken = 1  # of nothing that could be given back
    learner._replay.stop = lambda: False
    with pytest.raises(torch.OutOfMemoryError):
        learner.step(5, Clock(lambda: None))


def test_a_step_that_runs_out_of_memory_with_weights_half_changed_ends_the_run(tmp_path, monkeypatch):
    """Tried again it would change some of them twice."""
    recorder = Again()
    learner, _ = trained(tmp_path, "run", recorder, steps=3)
    real, called = learner.optimizer.step, []

    def full():
        called.append(real())
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learner.optimizer, "step", full)
    with pytest.raises(torch.OutOfMemoryError):
        learner.step(4, Clock(lambda: None))
    assert len(called) == 1 and recorder.taken
    wanted = trained(tmp_path, "without")[0].trained
    assert all(torch.equal(p, wanted[name]) for name, p in learner.trained.items())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes an NVIDIA GPU")


@needs_gpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora__rank": 2, "optim__accumulation": 3, "model__dtype": "bfloat16", "rollout__at_once": 2},
        {"rollout": {"num_steps": 5, "calls": 3}, "model__dtype": "bfloat16", "optim__ema_decay": 0.5},
        {"model__dtype": "bfloat16", "model__trained_memory": "bfloat16", "optim__states": "8bit"},
        {"model__dtype": "bfloat16", "rollout": {"num_steps": 4, "precision": "fp8"}},
        {"model__compile": True, "model__dtype": "bfloat16"},
    ],
    ids=["plain", "lora", "calls", "8bit", "fp8", "compiled"],
)
def test_cuda_graphs_draw_what_calls_draw(tmp_path, settings):
    """To the last bit, with weights that have been trained since they were recorded."""
    learner, told = trained(tmp_path, "run", parallel={"device": "cuda"}, **settings)
    assert learner.config.rollout.precision == "fp8" or learner.recorded_bytes() > 0  # codes may move
    micros = range(learner.config.optim.accumulation)
    ours = learner._rollouts(5, micros)
    learner._replay = None
    theirs = learner._rollouts(5, micros)
    assert all(torch.equal(one.clean, other.clean) for one, other in zip(ours, theirs, strict=True))
    wanted = trained(tmp_path, "direct", **{"parallel": {"device": "cuda"}, "rollout__cuda_graph": False} | settings)
    assert told.loss == pytest.approx(wanted[1].loss, rel=1e-3)


@needs_gpu
def test_a_gpu_s_graphs_use_the_same_memory_again():
    """Recorded anew where weights have moved, they take no more than the first did; forgotten, they take none."""
    device = torch.device("cuda")
    flow, graphs = tiny_flow(), CudaGraphs(device)
    flow.module.to(device)
    noise = torch.randn(2, 4, 8, 8, device=device)
    prompts, sigmas = encode_text(("a cat", "a dog")).to(device), shifted_sigmas(4, 3.0)
    replay = Replay(graphs, Room(), lambda told: pytest.fail(told))
    replay.ready = True
    layer, seen, kept = flow.module.single_transformer_blocks[0].proj_mlp, [], []
    for _ in range(5):
        kept.append(layer.weight.data)  # what comes next is elsewhere
        layer.weight.data = layer.weight.data * 1.1
        for _ in range(2):
            ours = rollout(replay.of(flow), prompts, noise, sigmas, 1.0).clean
            assert torch.equal(ours, rollout(flow, prompts, noise, sigmas, 1.0).clean)
        seen.append(graphs.taken)
    assert seen[0] > 0 and len(set(seen)) == 1 and replay._spare() > 0
    before = torch.cuda.memory_reserved()
    assert replay.stop() and graphs.taken == 0
    assert torch.cuda.memory_reserved() < before


@needs_gpu
def test_what_a_gpu_can_not_record_is_called():
    """A call that asks the device a number breaks a recording off, and nothing else."""
    device = torch.device("cuda")
    flow, told = tiny_flow(), []
    flow.module.to(device)
    flow.module.proj_out.register_forward_hook(lambda _, __, out: out * (1.0 if float(out.sum()) else 2.0))
    replay = Replay(CudaGraphs(device), Room(), told.append)
    replay.ready = True
    noise, prompts = torch.randn(1, 4, 8, 8, device=device), encode_text(("a cat",)).to(device)
    for _ in range(3):
        ours = rollout(replay.of(flow), prompts, noise, shifted_sigmas(4, 3.0), 1.0).clean
        assert torch.equal(ours, rollout(flow, prompts, noise, shifted_sigmas(4, 3.0), 1.0).clean)
    assert len(told) == 1 and "rollout.cuda_graph=true" in told[0]
    before = torch.cuda.memory_reserved()
    held = torch.empty(2**28, device=device)
    del held
    torch.cuda.empty_cache()  # the allocator no longer records
    assert torch.cuda.memory_reserved() <= before
