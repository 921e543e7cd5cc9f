"""What two processes can rely on, asserted in both: `python -m torch.distributed.run ... parallel_laws.py DIR`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import conftest  # one thread, and the first import of srpo_core
import torch
from PIL import Image
from tiny import PROMPTS, encode_text, tiny_config, weights_hash

from srpo_core import parallel
from srpo_core.assemble import assemble
from srpo_core.checks import check_run
from srpo_core.config import ConfigError, ParallelConfig
from srpo_core.devices import divided_world
from srpo_core.errors import TrainingError
from srpo_core.interfaces import PromptBatch
from srpo_core.metrics import Clock
from srpo_core.parallel import OthersError, World
from srpo_core.session import Session
from srpo_core.stopping import StopRequested
from srpo_core.trainer import Trainer


def raised(kind: type[BaseException] | tuple[type[BaseException], ...], act: Callable[[], object]) -> BaseException:
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def exchanges(world: World) -> None:
    """Values arrive by rank, whatever their length; shares are put in order again."""
    mine = {"rank": world.rank, "text": "ü" * (1 + 5000 * world.rank), "none": None}
    told = world.exchange(mine)
    assert [one["rank"] for one in told] == [0, 1] and told[world.rank] == mine and len(told[1]["text"]) == 5001
    for count in range(5):
        items = [[i] * i for i in range(count)]
        assert world.in_order(world.exchange(world.share(items))) == items
    images = [torch.full((rows, 3, 2, 2), float(i)) for i, rows in enumerate((2, 2, 2, 1))]
    whole = world.collect(world.share(images), [image.shape for image in images])
    assert all(map(torch.equal, whole, images if world.is_main else world.share(images)))


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def averages(world: World) -> None:
    """The mean over processes, whatever the buckets; the main process's tensor; a difference is named."""
    shapes = [(3,), (2, 2), (1, 5), (), (7,)]
    every = [[torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in shapes] for seed in (1, 2)]
    for size in (1, 6, 100):
        mine = [tensor.clone() for tensor in every[world.rank]]
        with mock.patch.object(parallel, "BUCKET", size):
            world.average(mine)
        assert all(torch.equal(one, (a + b) / 2) for one, a, b in zip(mine, *every, strict=True))
    with mock.patch.object(torch.Tensor, "new_empty", full if world.rank else torch.Tensor.new_empty):
        told = raised((torch.OutOfMemoryError, OthersError), lambda: world.average([torch.ones(3)]))
    assert "out of memory" in str(told)
    assert float(world.as_main(torch.tensor(float(world.rank + 5)))) == 5.0
    same, other = torch.ones(3), torch.full((3,), 1.0 + world.rank * 1e-7)
    world.check_same({"a": same}, "they")
    told = raised(TrainingError, lambda: world.check_same({"a": same, "b": other}, "they"))
    assert "such as b" in str(told)


def fails(world: World, rank: int, error: BaseException, nested: bool) -> None:
    with world.together():
        if nested and world.rank != rank:  # where one is deeper in its work than the other
            with world.together():
                pass
            raise AssertionError("it went on")
        if world.rank == rank:
            raise error


def ends_together(world: World) -> None:
    """What ends one ends all at the same place, however deep each is; then they can go on."""
    for nested in (False, True):
        for rank in (0, 1):
            raised(StopRequested, lambda rank=rank, nested=nested: fails(world, rank, StopRequested(), nested))
            kind = ConfigError if world.rank == rank else OthersError
            error = raised(kind, lambda rank=rank, nested=nested: fails(world, rank, ConfigError("no"), nested))
            assert str(error) == ("no" if world.rank == rank else f"rank {rank} of 2: no")
    one_each = [StopRequested(), ValueError("broken")][world.rank]  # an error weighs more than a stop
    error = raised((OthersError, ValueError), lambda: fails(world, world.rank, one_each, False))
    assert str(error) == ("rank 1 of 2: ValueError: broken" if world.is_main else "broken")
    assert world.exchange(world.rank) == [0, 1]


def learns(world: World, folder: Path, **more: object) -> None:
    """Two processes learn what one with twice the accumulation does, to the last digits of a sum in another order."""
    settings = {"optim__ema_decay": 0.5, "rollout__same_noise": False, "align__draws_per_rollout": 2, **more}
    ours = trainer_of(folder / "ours", world, optim__accumulation=2, **settings).learner
    alone = World(0, 1, world.device)
    theirs = trainer_of(folder / "theirs", alone, optim__accumulation=4, **settings).learner
    for step in (1, 2, 3):
        told, wanted = (learner.step(step, Clock(lambda: None)) for learner in (ours, theirs))
        for name in ("loss", "sigma", "grad_norm", "lr"):
            assert abs(getattr(told, name) - getattr(wanted, name)) < 1e-5 * abs(getattr(wanted, name)), name
        assert told.source == wanted.source == {"rollouts": 8}
        assert all(abs(told.score[branch] - wanted.score[branch]) < 1e-6 for branch in wanted.score)
    for name, parameter in ours.trained.items():
        assert (parameter - theirs.trained[name]).abs().max() < 1e-5, name  # a step moves them by 1e-3
    assert len(set(world.exchange(weights_hash(ours.flow.module)))) == 1


def trainer_of(folder: Path, world: World, **settings: object) -> Trainer:
    return assemble(config := tiny_config(folder, **settings), Session(config, world))


def draws_noise(world: World, folder: Path) -> None:
    """The same for both processes as published, unless that is unset; prompts and levels are each one's own."""
    for same in (True, False):
        learner = trainer_of(folder / str(same), world, rollout__same_noise=same).learner
        clean = learner._rollout(1, 0)
        one, other = world.exchange(clean.noise.tolist())
        assert (one == other) == same
        one, other = world.exchange(clean.prompts.prompts)
        assert set(one).isdisjoint(other)
        one, other = world.exchange([float(step.sigma[0]) for _, step in learner._align_steps(1, 0, 0)])
        assert one != other


def drops_what_is_not_finite(world: World, folder: Path) -> None:
    """One process's NaN ends the step in both, before the weights take it in."""
    trainer = trainer_of(folder / "nan", world)
    before = weights_hash(trainer.flow.module)
    if world.rank == 1:
        trainer.flow.velocity = lambda latents, *_: latents * torch.nan
    error = raised(TrainingError, lambda: trainer.learner.step(1, Clock(lambda: None)))
    assert "is not finite" in str(error)
    assert str(error).startswith("rank 1 of 2: ") == world.is_main
    assert weights_hash(trainer.flow.module) == before
    assert all(parameter.grad is None for parameter in trainer.learner.trained.values())


def tells_what_would_fit(world: World, folder: Path) -> None:
    """One process that runs out of memory ends the step in both, with what to try."""
    trainer = trainer_of(folder / "memory", world)
    if world.rank == 1:
        trainer.flow.velocity = full
    error = raised(TrainingError, lambda: trainer._learn(1, Clock(lambda: None)))
    assert "out of memory" in str(error)
    assert trainer.less_memory() in str(error)
    assert ("rank 1 of 2: " in str(error)) == world.is_main


class Encoder:
    """The tiny family's, with a name for its embeddings on disk; it tells what it was asked for."""

    fingerprint = "tiny"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> PromptBatch:
        self.asked += prompts
        return encode_text(prompts)


def encodes_once(world: World, folder: Path) -> None:
    """Each prompt is encoded by one process; afterwards both find all of them."""
    captions = ("a red wall", "a green wall", "a blue wall")
    photos = folder / "photos"
    with world.together():
        for caption in captions if world.is_main else ():
            photos.mkdir(exist_ok=True)
            Image.new("RGB", (24, 24), caption.split()[1]).save(photos / f"{caption}.png")
            (photos / f"{caption}.txt").write_text(caption)
    for name, settings in (("prompts", {}), ("both", {"data__photos": str(photos), "data__photo_share": 0.5})):
        config, encoder = tiny_config(folder / name, optim__steps=20, **settings), Encoder()
        ready = check_run(config, world)
        ready.components.text_encoder = encoder
        data = assemble(config, Session(config, world), ready).learner.data
        asked = world.exchange(encoder.asked)
        assert all(asked)
        wanted = PROMPTS["train"] + PROMPTS["eval"][:2] + (captions if settings else ())
        assert sorted(asked[0] + asked[1]) == sorted(wanted)
        for micro in range(20):
            batch = data.at(micro, world.rank, world.size).prompts
            assert torch.equal(batch.embeds["prompt_embeds"], encode_text(batch.prompts).embeds["prompt_embeds"])


def main() -> None:
    folder, world = Path(sys.argv[1]), divided_world(ParallelConfig(device="cpu"))
    conftest.keep_imports()
    with world.joined():
        exchanges(world)
        averages(world)
        ends_together(world)
        learns(world, folder / "full")
        learns(world, folder / "lora", lora__rank=2, optim__eps=1e-6)  # its first gradients are nearly 0
        draws_noise(world, folder)
        drops_what_is_not_finite(world, folder)
        tells_what_would_fit(world, folder)
        encodes_once(world, folder)
    (folder / f"rank-{world.rank}").touch()


if __name__ == "__main__":
    main()
