"""Rewards under ComfyUI's memory management: on the GPU to score, and out of it when something else needs the room.

Each reward of a mixture is loaded by itself, reads all pictures, and may be put away before the next one is loaded:
a mixture may be larger than the card.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from srpo_core.config import ConfigError
from srpo_core.errors import ran_out_of_memory
from srpo_core.files import size_text
from srpo_core.interfaces import Reward
from srpo_core.rewards.batches import in_batches
from srpo_core.rewards.mixture import MixedReward, WeightedReward, comparable, joined

AT_ONCE = 8
"""Pictures that a reward reads together on a GPU; on the CPU it is one, since in between it can be stopped."""
ALL = 1e32
"""More bytes than there are: how ComfyUI asks for everything."""
CPU = torch.device("cpu")
OnPictures = Callable[[int], None]
"""Called with the number of pictures that one reward has just read."""


class RewardWeights(nn.Module):
    """What a ModelPatcher holds: it sets attributes (device, ...) that a transformers model forbids."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class WholePatcher(ModelPatcher):
    """On its device whole or not at all: the layers are not ComfyUI's, so they can't fetch weights when they run."""

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        return super().partially_load(device_to, ALL, force_patch_weights)

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        return 0  # no part can go: ComfyUI then takes all of it


class HeldReward:
    """A Reward of the engine whose weights ComfyUI moves. Pictures may be anywhere; scores come back to where they are.

    `after_use` says that it leaves the GPU as soon as nothing uses it. `settings` are those by which a run loads it:
    name, path, and fit where it isn't the official one.
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        device: torch.device,
        after_use: bool = False,
        settings: Mapping[str, str | None] | None = None,
    ) -> None:
        self.settings = dict(settings or {"name": name, "path": None, "fit": None})
        self.name, self.reward, self.module, self.after_use = name, reward, reward.module, after_use
        self.reads_prompts = getattr(reward, "reads_prompts", True)
        self.weights = RewardWeights(reward.module)
        self.patcher = self._chosen = self._patcher(device)
        self._uses, self._on_pictures = 0, None

    def _patcher(self, device: torch.device) -> WholePatcher:
        offload = CPU if device == CPU else management.text_encoder_offload_device()
        return WholePatcher(self.weights, load_device=device, offload_device=offload)

    @property
    def device(self) -> torch.device:
        """Where it scores."""
        return self.patcher.load_device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B]; prompt i belongs to image i % B."""
        with self.used():
            device = self.load()
            at_once = 1 if device.type == "cpu" else AT_ONCE
            return in_batches(self.reward, images, prompts, at_once, device, self._read)

    def _read(self, count: int) -> None:
        if self._on_pictures is not None:
            self._on_pictures(count)
        management.throw_exception_if_processing_interrupted()

    @contextlib.contextmanager
    def used(self, on_pictures: OnPictures | None = None) -> Iterator[None]:
        """Inside the context it stays where it is, unless ComfyUI needs the room."""
        before = self._on_pictures
        self._uses, self._on_pictures = self._uses + 1, on_pictures or before
        try:
            yield
        finally:
            self._uses, self._on_pictures = self._uses - 1, before
            if not self._uses:
                if self.after_use:
                    self.unload()
                self.patcher = self._chosen

    def load(self) -> torch.device:
        """Bring the weights to its device, which is returned; to the CPU, for this use, if they find no room there."""
        try:
            management.load_models_gpu([self.patcher], force_full_load=True)
        except Exception as error:
            if self.device == CPU or not ran_out_of_memory(error):
                raise
            self.patcher = self._patcher(CPU)
            logging.warning("SRPO: the reward %s found no room on the GPU and scores on the CPU", self.name)
            management.load_models_gpu([self.patcher], force_full_load=True)
        return self.device

    def unload(self) -> None:
        """Take the weights off the GPU."""
        others = [one for one in management.current_loaded_models if one.model is not self.patcher]
        management.free_memory(ALL, self.device, others)


@dataclass(frozen=True)
class LoadedReward:
    """What travels on an SRPO_REWARD wire: rewards with their weights in a mixture, and all of them as one.

    `reward` can be called anywhere, with all pictures at once, wherever they are: it loads what it needs.
    """

    name: str
    parts: Sequence[WeightedReward]
    """Each with a HeldReward."""
    reward: Reward

    @contextlib.contextmanager
    def on_device(self, on_pictures: OnPictures | None = None) -> Iterator[tuple[Reward, torch.device]]:
        """(reward, its device) for several calls; rewards with "after use" leave the GPU at the end, not in between.

        `on_pictures` gets the number of pictures that a reward has just read: B in one call of each of the parts.
        """
        with contextlib.ExitStack() as stack:
            for held in self.held:
                stack.enter_context(held.used(on_pictures))
            yield self.reward, self.held[0].load()

    @property
    def held(self) -> list[HeldReward]:
        """The rewards, each with its weights."""
        return [part.reward for part in self.parts]

    @property
    def summary(self) -> str:
        """What it is, in a line: size and where it scores."""
        count = sum(weight.numel() for one in self.held for weight in one.module.parameters())
        places = " and ".join(dict.fromkeys(one.device.type for one in self.held))
        return f"{self.name}: {count / 1e6:,.0f} M parameters, {size_text(self.get_ram_usage())}, scores on {places}"

    @property
    def patcher(self) -> ModelPatcher:
        """By which ComfyUI sees that this output holds a model."""
        return self.held[0].patcher

    def get_ram_usage(self) -> int:
        """Bytes of weights, as ComfyUI's cache asks for them when memory is short."""
        return sum(held.patcher.model_size() for held in self.held)


def hold(
    part: WeightedReward, choice: str, after_use: bool, settings: Mapping[str, str | None] | None = None
) -> LoadedReward:
    """A reward of the engine, its weights on the CPU, as ComfyUI holds it; `choice` is of `scoring_device`."""
    device = scoring_device(choice, management.module_size(part.reward.module))
    reward = HeldReward(part.name, part.reward, device, after_use, settings)
    return LoadedReward(part.name, [replace(part, reward=reward)], reward)


def mix(rewards: Sequence[tuple[LoadedReward, float]], make_comparable: bool) -> LoadedReward:
    """Rewards and mixtures as one mixture, each with its weight; single ones on a scale of 0 to 1 if that is asked.

    ConfigError if no weight is above 0.
    """
    mixtures = [
        ([comparable(part) if make_comparable and not isinstance(one.reward, MixedReward) else part
          for part in one.parts], weight)
        for one, weight in rewards
    ]  # fmt: skip
    try:
        parts = joined(mixtures)
    except ValueError as error:
        raise ConfigError(f"{error}; give a reward that is connected a weight above 0") from error
    return LoadedReward(" + ".join(part.name for part in parts), parts, MixedReward(parts))


def scoring_device(choice: str, size: int) -> torch.device:
    """Where weights of `size` bytes go: the GPU, unless `choice` is "cpu", none is there or they never fit."""
    device = management.get_torch_device()
    if choice == "cpu" or management.vram_state == management.VRAMState.NO_VRAM:
        return CPU
    if device != CPU and size * 1.1 + management.minimum_inference_memory() > management.get_total_memory(device):
        return CPU
    return device
