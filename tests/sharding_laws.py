"""What processes that hold parts of one model can rely on, asserted in all: `torchrun ... sharding_laws.py DIR`."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import conftest  # one thread, and the first import of srpo_core
import torch
from parallel_laws import full, raised, trainer_of
from safetensors.torch import save_file
from tiny import tiny_config, tiny_flow
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from srpo_core import assemble, checkpoint, sharding
from srpo_core.assemble import _sharded
from srpo_core.attention import Attention
from srpo_core.checkpoint import checkpoint_folder, load_weights, read_tensors
from srpo_core.config import ParallelConfig
from srpo_core.devices import training_world
from srpo_core.errors import NotFiniteError, TrainingError
from srpo_core.finite import FiniteChecks
from srpo_core.flow import per_sample
from srpo_core.interfaces import PromptBatch, TrainableFlow
from srpo_core.learner import Learner
from srpo_core.metrics import Clock
from srpo_core.models import load_model
from srpo_core.parallel import OthersError, World, ends_all
from srpo_core.sharding import is_part, part_of, shares_memory
from srpo_core.speed import TOKENS_SHARED
from srpo_core.stopping import StopRequested
from srpo_core.tally import Tally
from srpo_core.trainer import Trainer

STEPS = {"optim__ema_decay": 0.5, "rollout__same_noise": False, "align__draws_per_rollout": 2, "optim__eps": 1e-6}
LORA = {"lora__rank": 2}
DEVICE = os.environ.get("LAWS_DEVICE", "cpu")
"""Where the laws are tried: "cuda" takes a GPU for each process."""
ON_CPU = DEVICE == "cpu"
CLOSE = 1e-5 if ON_CPU else 1e-4
"""A step moves a weight by 1e-3; sums in another order differ in the last digits, and a GPU has another each time."""


def sharded(folder: Path, strategy: str, **settings: object) -> Trainer:
    parallel = {"device": DEVICE, "strategy": strategy, **settings.pop("parallel", {})}
    return trainer_of(folder, training_world(ParallelConfig(**parallel)), **STEPS | settings, parallel=parallel)


def single(folder: Path, processes: int, **settings: object) -> Trainer:
    """One process that does what `processes` do."""
    alone = World(0, 1, training_world(ParallelConfig(device=DEVICE)).device)
    return trainer_of(folder, alone, **STEPS | settings, optim__accumulation=processes, parallel={"device": DEVICE})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if is_part(tensor) else tensor.detach()


def far(ours: Learner, theirs: Learner, kind: str = "weights") -> float:
    """The largest difference between two learners' weights or averages."""
    mine, other = ours.tensors()[kind], theirs.tensors()[kind]
    assert mine.keys() == other.keys()
    return max(float((whole(mine[name]).cpu() - other[name].cpu()).abs().max()) for name in other)


def learns(folder: Path, strategy: str, **settings: object) -> Trainer:
    """Processes with parts of a model learn what one with all of it does, from all their micro-batches."""
    ours = sharded(folder / "ours", strategy, **settings)
    compare(ours, single(folder / "theirs", ours.world.size, **settings))
    if not settings.get("lora__rank"):
        assert all(map(is_part, ours.learner.trained.values()))
        held = sum(part_of(p).numel() for p in ours.learner.trained.values())
        total = sum(p.numel() for p in ours.learner.trained.values())
        assert 0.45 < held / total < 0.55  # of two, or of two on each machine
    return ours


def compare(ours: Trainer, theirs: Trainer) -> None:
    """They learn the same, and draw the same."""
    for step in (1, 2):
        told, wanted = (trainer.learner.step(step, Clock(lambda: None)) for trainer in (ours, theirs))
        for name in ("loss", "sigma", "grad_norm", "lr"):
            assert abs(getattr(told, name) - getattr(wanted, name)) <= CLOSE * abs(getattr(wanted, name)), name
        assert told.source == wanted.source
    for kind in ("weights", "ema"):
        assert far(ours.learner, theirs.learner, kind) < CLOSE, kind
    draws(ours, theirs)


def draws(ours: Trainer, theirs: Trainer) -> None:
    """Pictures and scores of the averaged weights, with more processes than batches or fewer; then all is as before."""
    before = [part_of(p).detach().clone() for p in ours.learner.trained.values()]
    for count in (1, 3):
        with ours.learner.averaged():
            images, scores = replace(ours._gallery(count), batch_size=1).draw(ours.flow, ours.world)
        with theirs.learner.averaged():
            wanted, wanted_scores = replace(theirs._gallery(count), batch_size=1).draw(theirs.flow, theirs.world)
        if ours.world.is_main:
            assert torch.allclose(images, wanted, atol=1e-4)
        assert scores.keys() == wanted_scores.keys()
        for name, values in scores.items():
            assert torch.allclose(torch.tensor(values), torch.tensor(wanted_scores[name]), atol=1e-4), name
    assert all(map(torch.equal, before, (part_of(p) for p in ours.learner.trained.values())))


def reads_its_part(folder: Path, world: World) -> None:
    """Of FLUX's files, with a LoRA merged in, each process reads its part, without the whole model in memory."""
    for dtype, settings in (("float32", {}), ("bfloat16", LORA)):
        model = {"family": "flux", "path": str(folder), "dtype": dtype, "lora": str(folder / "lora.safetensors")}
        config = tiny_config(folder / "run", model=model, parallel={"device": DEVICE, "strategy": "shard"}, **settings)
        parts, one = (load_model(config.model, "cpu") for _ in range(2))
        parts.full_precision = one.full_precision = not settings
        with mock.patch("srpo_core.models.flux_files.Part.load", side_effect=AssertionError("loaded whole")):
            ours = dict(_sharded(config, parts, world).module.named_parameters())
        theirs = dict(one.flow.module.named_parameters())
        assert ours.keys() == theirs.keys() and all(map(is_part, ours.values()))
        assert all(torch.equal(whole(ours[name]).cpu(), parameter) for name, parameter in theirs.items())
        assert {p.dtype for p in ours.values()} == {torch.bfloat16 if settings else torch.float32}


def is_called_before(folder: Path) -> None:
    """What calls the model before it is trained, as a GPU's choice of kernels does, leaves all of it to be trained.

    What is outside of its blocks stays gathered after a call without gradient.
    """
    with mock.patch("srpo_core.speed.choose_attention", side_effect=called) as calls:
        learns(folder, "shard")
    assert calls.call_count == 2


def tells_who_fails_to_load(folder: Path, world: World, strategy: str) -> None:
    """What ends one process before it is trained is told to those that go on to build or to call the model."""

    def fails(wanted: Callable[..., object]) -> Callable[..., object]:
        def then(*args: object, **options: object) -> object:
            done = wanted(*args, **options)
            if world.rank == 1:
                raise TrainingError("there is no room here")
            return done

        return then

    for name in ("load_rewards", "trained_flow"):
        with mock.patch(f"srpo_core.assemble.{name}", fails(getattr(assemble, name))):
            error = raised(TrainingError, functools.partial(assembled, folder / name, strategy))
        assert "there is no room here" in str(error)
        assert isinstance(error, OthersError) == (world.rank != 1)


def assembled(folder: Path, strategy: str) -> None:
    world = training_world(ParallelConfig(device=DEVICE, strategy=strategy))
    with world.together(), mock.patch("srpo_core.speed.choose_attention", called):
        sharded(folder, strategy)


def called(
    _: str, flow: TrainableFlow, prompts: PromptBatch, latents: torch.Tensor, guidance: float, *__: bool
) -> tuple:
    """As a GPU's choice of kernels, which calls the model."""
    with torch.no_grad():
        flow.velocity(latents, per_sample(0.9, latents), prompts, guidance)
    return Attention(), ""


def computes_narrowly(folder: Path) -> None:
    """Weights are gathered in model.dtype and trained in float32; as with autocast, but for the norms' scales."""
    ours = sharded(folder / "ours", "shard", model__dtype="bfloat16")
    theirs = single(folder / "theirs", ours.world.size, model__dtype="bfloat16")
    block = ours.flow.module.transformer_blocks[0]
    seen = []
    block.attn.register_forward_pre_hook(lambda layer, _: seen.append(layer.to_q.weight.dtype))
    told, wanted = (trainer.learner.step(1, Clock(lambda: None)) for trainer in (ours, theirs))
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in ours.learner.trained.values()} == {torch.float32}
    assert abs(told.loss - wanted.loss) < 0.01 * abs(wanted.loss)
    assert abs(told.grad_norm - wanted.grad_norm) < 0.05 * wanted.grad_norm


def hands_over_narrowly(folder: Path, strategy: str) -> None:
    """Gradients summed up over processes in bfloat16 are off by what rounding them to it makes."""
    found = []
    for name in ("float32", "bfloat16"):
        learner = sharded(folder / name, strategy, parallel={"gradients": name}).learner
        tally = Tally(learner.rewards)
        learner._add_all(1, learner.words.pair(1), tally, FiniteChecks(), Clock(lambda: None))
        gradients = [p.grad for p in learner.trained.values()]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found.append(torch.cat([whole(gradient).flatten() for gradient in gradients]))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 1e-4 < error < 5e-3, error


def seen_gpus() -> contextlib.AbstractContextManager[object]:
    """Inside the context tokens can be shared on the CPU too, where diffusers sees no GPU."""
    return mock.patch("torch.accelerator.device_count", return_value=1) if ON_CPU else contextlib.nullcontext()


def shares_tokens(folder: Path, strategy: str) -> None:
    """Two processes that share each picture learn what one does; each pair has pictures of its own."""
    parallel, family = {"context": 2}, {"model__family": "tiny:load_even"}
    with seen_gpus():
        ours = sharded(folder / "ours", strategy, parallel=parallel, model__compile=True, **family)
    world = ours.world
    assert TOKENS_SHARED in ours.notes  # what can't be compiled runs without
    assert world.exchange(world.part) == [rank // 2 for rank in range(world.size)]
    compare(ours, single(folder / "theirs", world.parts, **family))


def rolls_out_in_parts(folder: Path) -> None:
    """The copy in fp8 shares each picture's tokens too, and draws what one process's does."""
    settings = {"model__family": "tiny:load_even", "rollout__precision": "fp8"}
    with seen_gpus():
        ours = sharded(folder / "ours", "replicate", parallel={"context": 2}, **settings)
    theirs = single(folder / "theirs", 1, **settings)
    shapes = []
    with ours.learner._copy.filled() as flow:
        flow.module.single_transformer_blocks[0].register_forward_pre_hook(
            lambda _, args, named: shapes.append(named["hidden_states"].shape), with_kwargs=True
        )
    told, wanted = (trainer.learner._rollout(1, 0) for trainer in (ours, theirs))
    assert {shape[1] for shape in shapes} == {16 // 2}  # 8 x 8 latents in squares of four
    assert torch.equal(told.noise, wanted.noise)
    assert (told.clean - wanted.clean).norm() < 1e-3 * wanted.clean.norm()  # rounding to codes may turn at a hair
    told, wanted = (trainer.learner.step(1, Clock(lambda: None)) for trainer in (ours, theirs))
    assert abs(told.loss - wanted.loss) <= 1e-3 * abs(wanted.loss)
    assert abs(told.grad_norm - wanted.grad_norm) <= 1e-2 * wanted.grad_norm


class Unlike:
    """Memory of a device that has room for everything, or for nothing."""

    def __init__(self, room: int) -> None:
        self.free = room

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def room(self) -> int:
        return self.free


def keeps_the_same_blocks(folder: Path, world: World) -> None:
    """Processes that share a picture keep what fits the fullest of them: tokens are traded in what is recomputed."""
    settings = {"model__family": "tiny:load_even", "model__recompute": "auto"}
    for fullest in (-1, 1):
        memory = Unlike(fullest if world.rank else 1)
        with (
            seen_gpus(),
            mock.patch("srpo_core.learner.memory_of", return_value=memory),
        ):
            ours = sharded(folder / f"ours {fullest}", "replicate", parallel={"context": 2}, **settings)
        compare(ours, single(folder / f"theirs {fullest}", 1, **settings))
        keeping = ours.learner._keeping
        assert keeping.first_kept == (2 if fullest < 0 else 0)
        assert world.exchange(keeping.decoder_kept) == [True, fullest > 0]


def learns_in_one_pass(folder: Path) -> None:
    """Gradients are summed up in memory of ours then: FSDP asks for it, twice for each block."""
    asked = []
    allocate = sharding._Reduce.allocate
    with mock.patch.object(sharding._Reduce, "allocate", lambda *args, **of: asked.append(1) or allocate(*args, **of)):
        learns(folder, "shard", align__at_once=4)
    blocks = len(tiny_flow().module.transformer_blocks) + len(tiny_flow().module.single_transformer_blocks)
    assert len(asked) == (2 * 2 * (blocks + 1) if hasattr(FSDPModule, "set_custom_reduce_scatter") else 0)  # two steps


def leaves_room_for_gradients(folder: Path, strategy: str, gradients: str = "float32", at_once: int = 1) -> None:
    """What a step's gradients will take, of this process's parts, is kept free until they are there.

    Unless they come to be where activations have been, in the only pass of a step.
    """
    asked = []
    settings = {"parallel": {"gradients": gradients}, "align__at_once": at_once, "model__recompute": "auto"}
    with mock.patch("srpo_core.learner.memory_of", return_value=Unlike(10**12)):
        learner = sharded(folder, strategy, **settings).learner
    keeping, told = learner._keeping, learner._gradients_to_come
    keeping._aside = lambda: asked.append(told()) or asked[-1]
    for step in (1, 2):
        learner.step(step, Clock(lambda: None))
    held = sum(part_of(parameter).nbytes for parameter in learner.trained.values())
    if at_once == 1:
        assert asked == [0, 0, 0, held, 0, 0, 0]  # four passes a step, of which the very first decides nothing
    else:
        assert asked == [0 if shares_memory(learner.config) else held]


def keeps_blocks_gathered(folder: Path) -> None:
    """However long blocks stay gathered, and wherever their parts are, the numbers are the same."""
    reached = []
    for i, parallel in enumerate(({}, {"gathered": "rollout"}, {"gathered": "step", "offload": True})):
        trainer = sharded(folder / str(i), "shard", parallel=parallel | {"processes": 2})
        for step in (1, 2):
            trainer.learner.step(step, Clock(lambda: None))
        reached.append([part_of(p).detach().cpu().clone() for p in trainer.learner.trained.values()])
    for other in reached[1:]:
        if ON_CPU:
            assert all(map(torch.equal, reached[0], other))
        assert all(torch.allclose(a, b, atol=CLOSE) for a, b in zip(reached[0], other, strict=True))


def saves(trainer: Trainer, folder: Path) -> None:
    """A checkpoint in parts reads as a whole one, and is there whole or not at all."""
    learner, world = trainer.learner, trainer.world
    wanted = {name: {key: whole(t) for key, t in named.items()} for name, named in learner.tensors().items()}
    trainer.run_dir, trainer.metrics.step = folder, 2
    checkpoint.save_parts(world, folder, 2, learner.tensors(), {"best": None, "lora": None, "metrics": {"step": 2}})
    place = checkpoint_folder(folder, 2)
    assert len(list((place / "weights").glob("part-*.safetensors"))) == world.size
    for name, named in wanted.items():
        told = read_tensors(place, name)
        assert told.keys() == named.keys()
        assert all(torch.equal(told[key], tensor.cpu()) for key, tensor in named.items()), name
    plain = single(folder / "plain", 1)
    load_weights(place, plain.flow.module, averaged=False)
    assert far(learner, plain.learner) == 0
    with mock.patch("srpo_core.parts_storage.save_file", full_disk if world.rank else save_file):
        told = raised(TrainingError, lambda: checkpoint.save_parts(world, folder, 3, learner.tensors(), {"best": None}))
    assert "the disk is full" in str(told)
    assert "step-000002" in str(told)
    world.exchange(None)
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name != "step-000002"]


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def moves_to_the_mesh(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
    """DTensor.from_local as it is where the mesh is of GPUs and the tensor on the host."""
    return FROM_LOCAL(tensor.clone(), *args, **options)


FROM_LOCAL = DTensor.from_local


@mock.patch.object(DTensor, "from_local", moves_to_the_mesh)
def goes_on(folder: Path, strategy: str, **parallel: object) -> None:
    """A run goes on from a checkpoint of any strategy and number of processes as if it had been its own.

    What it saves and reads stays where it is, as parallel.offload wants it.
    """
    theirs = single(folder / "reference", 1)
    theirs.learner.restore(folder)
    ours = sharded(folder / strategy, strategy, parallel=parallel)
    ours.learner.restore(folder)
    spread, held = ours.learner.tensors()["ema"], ours.learner.average.tensors
    assert all(part_of(spread[name]).data_ptr() == held[name].data_ptr() for name in held)
    for kind in ("weights", "ema", "optimizer"):
        apart = far(ours.learner, theirs.learner, kind)
        assert apart == 0 if ON_CPU else apart < 1e-7, f"{kind}: {apart}"  # moments are decoded where parts are


def drops_what_is_not_finite(folder: Path) -> None:
    """One process's NaN ends the step in all at the same place; then they can go on."""
    trainer = sharded(folder / "nan", "shard")
    decode = trainer.autoencoder.decode
    before = [part_of(p).detach().clone() for p in trainer.learner.trained.values()]
    if trainer.world.rank == 1:
        trainer.autoencoder.decode = lambda latents: decode(latents) * torch.nan
    error = raised(TrainingError, lambda: trainer.learner.step(1, Clock(lambda: None)))
    assert isinstance(error, NotFiniteError if trainer.world.rank == 1 else OthersError)
    assert "is not finite" in str(error) and not ends_all(error)
    assert all(map(torch.equal, before, (part_of(p) for p in trainer.learner.trained.values())))
    trainer.autoencoder.decode = decode
    trainer.learner.step(1, Clock(lambda: None))


def stops_together(folder: Path) -> None:
    """A request that one process has seen stops all of them."""
    trainer = sharded(folder / "stop", "shard")

    def check() -> None:
        if trainer.world.rank == 1:
            raise StopRequested

    trainer.learner._check = trainer.world.agreed(check)
    raised(StopRequested, lambda: trainer.learner.step(1, Clock(lambda: None)))
    assert trainer.world.exchange(trainer.world.rank) == list(range(trainer.world.size))


def survives_a_failed_preview(folder: Path) -> None:
    """One process's failing measure is a warning on all, as long as all have called the model as often."""
    trainer = sharded(folder / "preview", "shard", output__preview_prompts=3)
    if trainer.world.rank == 1:
        trainer.previews.measures["brightness"] = full
    trainer._preview(trainer.metrics, trainer._log())
    assert not trainer.metrics.preview
    trainer.learner.step(1, Clock(lambda: None))


def laws(folder: Path, world: World) -> dict[str, Callable[[], object]]:
    """By name, those of so many processes."""
    if world.size == 4:
        return {
            "full": lambda: learns(folder / "hybrid", "hybrid"),
            "context": lambda: shares_tokens(folder / "context", "shard"),
            "narrow gradients": lambda: hands_over_narrowly(folder / "narrow gradients", "hybrid"),
            "room": lambda: leaves_room_for_gradients(folder / "room", "hybrid"),
            "loading": lambda: tells_who_fails_to_load(folder / "loading", world, "hybrid"),
            "goes on": lambda: goes_on(checkpoint_folder(folder / "one", 2), "hybrid"),
            "goes on from 8 bits": lambda: goes_on(checkpoint_folder(folder / "narrow", 2), "hybrid"),
        }
    one = checkpoint_folder(folder / "one", 2)
    return {
        "full": lambda: saves(learns(folder / "full", "shard"), folder / "full" / "saved"),
        "lora": lambda: learns(folder / "lora", "shard", **LORA),
        "context": lambda: shares_tokens(folder / "context", "replicate"),
        "kept": lambda: keeps_the_same_blocks(folder / "kept", world),
        "fp8": lambda: rolls_out_in_parts(folder / "fp8"),
        "reads": lambda: reads_its_part(folder / "flux", world),
        "bfloat16": lambda: computes_narrowly(folder / "bf16"),
        "narrow gradients": lambda: hands_over_narrowly(folder / "narrow gradients", "shard"),
        "called": lambda: is_called_before(folder / "called"),
        "gathered": lambda: keeps_blocks_gathered(folder),
        "room": lambda: leaves_room_for_gradients(folder / "room", "shard"),
        "room in one pass": lambda: leaves_room_for_gradients(folder / "one room", "shard", at_once=4),
        "room for narrow ones": lambda: leaves_room_for_gradients(folder / "narrow room", "shard", "bfloat16", 4),
        "one pass": lambda: learns_in_one_pass(folder / "one pass"),
        "loading": lambda: tells_who_fails_to_load(folder / "loading", world, "shard"),
        "not finite": lambda: drops_what_is_not_finite(folder),
        "stops": lambda: stops_together(folder),
        "preview": lambda: survives_a_failed_preview(folder),
        "goes on": lambda: goes_on(one, "shard", offload=True, processes=2),
        "goes on from 8 bits": lambda: goes_on(checkpoint_folder(folder / "narrow", 2), "shard"),
    }


def main() -> None:
    """Try the laws, or those that are named."""
    folder, world = Path(sys.argv[1]), training_world(ParallelConfig(device=DEVICE, strategy="shard"))
    conftest.keep_imports()
    with world.joined():
        if world.size == 4:
            os.environ["LOCAL_WORLD_SIZE"] = "2"  # as on two machines
        for name, law in laws(folder, world).items():
            if name in sys.argv[2:] or not sys.argv[2:]:
                law()
                print(f"rank {world.rank}: {name}: true", flush=True)
    (folder / f"rank-{world.rank}").touch()


if __name__ == "__main__":
    main()
