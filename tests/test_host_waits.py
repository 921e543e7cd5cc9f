"""A step's work is queued without asking the device anything: on the meta device, which has nothing to answer.

Reading a number there is an error, as `.item()` or `.cpu()` would have the host wait for a GPU; a copy to it has to be
one that the host doesn't wait for.
"""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
from PIL import Image
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from srpo_core import assemble
from srpo_core.finite import FiniteChecks
from srpo_core.learner import Learner, Parts
from srpo_core.metrics import Clock
from srpo_core.optim import clip_and_step, gradient_norm
from srpo_core.parallel import World
from srpo_core.rewards.clip import ClipReward, OpenClip
from srpo_core.rewards.mixture import WeightedReward
from srpo_core.rollout_copy import RolloutCopy
from srpo_core.tally import Tally

META = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]


class Waits(TorchDispatchMode):
    """Notes where copies from the host to the device are made, except by `transfer.sent`, which waits for none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            copies = args[0].device.type == "cpu" and kwargs.get("device") == META
        else:
            copies = func is torch.ops.aten.copy_.default and args[0].is_meta and args[1].device.type == "cpu"
        if copies:
            ours = [frame for frame in traceback.extract_stack() if str(ROOT / "srpo_core") in frame.filename]
            if Path(ours[-1].filename).name != "transfer.py":
                self.found.append(f"{ours[-1].filename}:{ours[-1].lineno}")
        return func(*args, **kwargs)


@pytest.fixture
def parts_of(monkeypatch):
    """The parts of a run on the meta device, with a real CLIP as the reward."""
    monkeypatch.setattr(assemble, "Trainer", lambda session, parts: parts)
    real = torch.autocast

    def autocast(kind: str, **options: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if kind == "meta" else real(kind, **options)  # which it doesn't know

    monkeypatch.setattr(torch, "autocast", autocast)

    def parts(config: Any) -> Parts:
        found = assemble.assemble(config)
        clip = OpenClip(tiny_clip.reference(tiny_clip.weights()))
        found.rewards = [WeightedReward("hpsv2", ClipReward(clip), margin=config.reward.margin)]
        for module in (found.flow.module, found.autoencoder.module, clip.module):
            module.to(META)
        if found.rollout_copy is not None:
            found.rollout_copy = RolloutCopy(found.flow, torch.float32, None)
        return found

    return parts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim__accumulation": 4, "rollout__at_once": 4, "align": {"draws_per_rollout": 2}},
        {"model__recompute": True, "model__dtype": "bfloat16"},
        {"rollout": {"num_steps": 6, "calls": 3, "precision": "fp8"}, "optim__ema_decay": 0.9},
        {"model__trained_memory": "bfloat16", "model__dtype": "bfloat16", "optim__states": "8bit"},
        {"lora__rank": 2, "lora__targets": "all"},
        {"data__photo_share": 0.5},
    ],
    ids=["plain", "accumulated", "recomputed", "fp8", "8bit", "lora", "photos"],
)
def test_a_step_asks_the_device_nothing_before_its_numbers_are_due(parts_of, tmp_path, settings):
    if "data__photo_share" in settings:
        for name in "ab":
            Image.new("RGB", (16, 16), "red").save(tmp_path / f"{name}.png")
            (tmp_path / f"{name}.txt").write_text("a photo")
        settings = settings | {"data__photos": str(tmp_path)}
    config = tiny_config(tmp_path / "run", **settings)
    parts = parts_of(config)
    learner = Learner(config, World(0, 1, META), parts)
    with Waits() as waits:
        for number in (1, 2):  # the second with what the first has made ready
            tally, finite = Tally(parts.rewards), FiniteChecks(early=False)
            learner._add_all(number, parts.words.pair(number), tally, finite, Clock(lambda: None))
            norm = gradient_norm([parameter.grad for parameter in learner.parts.values()])
            finite.add(norm, "the gradient")
            with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
                finite.require()  # the one time the step waits
            clip_and_step(learner.optimizer, learner.parts, 1.0, norm)
    assert not waits.found
