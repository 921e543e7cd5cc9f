"""LoRA: a frozen network with small trained matrices beside some of its linear layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from srpo_core.config import ConfigError, LoraConfig, nearest
from srpo_core.interfaces import TrainableFlow
from srpo_core.weights.compressed import put_weight
from srpo_core.weights.lora_names import Lora, LoraLayer, check_lora, read_lora

ADAPTER = "default"
"""peft's name for the adapter: parameters are called `<layer>.lora_A.default.weight`."""


def lora_targets(groups: Mapping[str, Sequence[str]], name: str) -> Sequence[str]:
    """The layer names of a flow model's group. ConfigError for a group that it lacks."""
    if name not in groups:
        raise ConfigError(f"lora.targets={name!r} is no group of layers of this model{nearest(name, list(groups))}")
    return groups[name]


def has_lora(module: nn.Module) -> bool:
    """Whether a LoRA was added to the module."""
    return any(".lora_A." in name for name, _ in module.named_parameters())


def add_lora(
    module: nn.Module, config: LoraConfig, targets: Sequence[str], generator: torch.Generator | None = None
) -> list[str]:
    """Freeze the module and put a LoRA beside each layer whose path ends with ".<target>"; its parameters' names.

    The LoRA is in float32 and starts without effect: B is zero, A uniform as in peft, drawn from `generator`.
    ConfigError if no layer is called so.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    module.requires_grad_(False)
    pattern = layer_pattern(targets)
    if not any(re.fullmatch(pattern, name) for name, _ in module.named_modules()):
        raise ConfigError(f"lora.targets={config.targets!r}: the model has no layers called {', '.join(targets)}")
    peft_config = PeftConfig(r=config.rank, lora_alpha=lora_alpha(config), target_modules=pattern)
    inject_adapter_in_model(peft_config, module, ADAPTER)
    names = []
    for name, parameter in module.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform_(a=sqrt(5))
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.data.copy_(drawn)
            parameter.requires_grad_(True)
            names.append(name)
    return names


def layer_pattern(targets: Sequence[str]) -> str:
    """Matches the paths of the layers that get a LoRA: those that end with ".<target>"."""
    return rf".+\.({'|'.join(re.escape(target) for target in targets)})"


def lora_alpha(config: LoraConfig) -> float:
    """The LoRA's alpha: its rank where it is unset, so that the scale is 1."""
    return float(config.rank) if config.alpha is None else config.alpha


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA file and the strength that it is merged with."""

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ChosenLora:
        """FILE or FILE:STRENGTH, such as "style.safetensors:0.8". ConfigError for a strength that is not finite."""
        path, separator, strength = text.rpartition(":")
        try:
            chosen = cls(Path(path), float(strength)) if separator and path else cls(Path(text))
        except ValueError:  # the colon is the path's own
            return cls(Path(text))
        if not math.isfinite(chosen.strength):
            raise ConfigError(f"{text}: a LoRA's strength is a number such as 0.8, not {strength}")
        return chosen


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight shapes [out, in] of a module's linear layers by their paths, without the layers of a LoRA beside them."""
    return {
        name.removesuffix(".base_layer"): (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not {"lora_A", "lora_B"} & set(name.split("."))
    }


def target_shapes(flow: TrainableFlow, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Weight shapes [out, in] of the layers that get a LoRA, by their paths. ConfigError if the model has none."""
    targets = lora_targets(flow.lora_targets, config.targets)
    pattern = layer_pattern(targets)
    found = {name: shape for name, shape in linear_shapes(flow.module).items() if re.fullmatch(pattern, name)}
    if not found:
        raise ConfigError(f"lora.targets={config.targets!r}: the model has no layers called {', '.join(targets)}")
    return found


def merged(weight: Tensor, layer: LoraLayer, strength: float) -> Tensor:
    """A weight [out, in] with a LoRA's change added in float32, then rounded to the weight's own dtype once."""
    moved = LoraLayer(layer.down.to(weight.device), layer.up.to(weight.device), layer.alpha)
    return (weight.float() + moved.change(strength)).to(weight.dtype)


@torch.no_grad()
def merge_lora(module: nn.Module, lora: Lora, strength: float = 1.0) -> int:
    """Add a LoRA to a module's weights; how many layers it changed. ConfigError, before any change, if it doesn't fit.

    In a module that has a trained LoRA beside its layers, the frozen weights change.
    """
    check_lora(lora, linear_shapes(module))
    modules = dict(module.named_modules())
    for name, layer in lora.layers.items():
        linear = modules.get(f"{name}.base_layer", modules.get(name))
        put_weight(linear, merged(linear.weight, layer, strength))
    return len(lora.layers)


def read_start(config: LoraConfig) -> Lora | None:
    """The LoRA that lora.start names. ConfigError if its rank is not lora.rank, before a model is loaded."""
    if config.start is None:
        return None
    if not config.rank:
        raise ConfigError(
            f"lora.start={config.start!r} with lora.rank=0, which trains all parameters: set lora.rank to the file's,"
            " or merge the file first (model.lora) and train everything"
        )
    lora = read_lora(config.start, "lora.start")
    ranks = {layer.rank for layer in lora.layers.values()}
    if ranks != {config.rank}:
        found = ", ".join(str(rank) for rank in sorted(ranks))
        way_out = f"set lora.rank={found}" if len(ranks) == 1 else "merge it into the base instead (model.lora)"
        raise ConfigError(f"{lora.source} has rank {found}, lora.rank is {config.rank}; {way_out}")
    return lora


def check_start(lora: Lora, config: LoraConfig, flow: TrainableFlow) -> None:
    """ConfigError unless the layers of lora.start's LoRA are exactly those that lora.targets names in the flow."""
    wanted = target_shapes(flow, config)
    for name in sorted(wanted.keys() ^ lora.layers.keys()):
        where, whose = ("lacks", "is") if name in wanted else ("has", "is not")
        raise ConfigError(
            f"{lora.source} {where} a LoRA of {name}, which {whose} among the layers of lora.targets="
            f"{config.targets!r}; name the group that the file was trained on, or merge it into the base (model.lora)"
        )
    check_lora(lora, wanted)


@torch.no_grad()
def start_from(module: nn.Module, config: LoraConfig, lora: Lora) -> None:
    """Put a LoRA file's matrices in the place of a new LoRA's (`add_lora`), with the same effect.

    Where its scale alpha / rank is another than the run's, `up` is scaled by the ratio.
    """
    parameters = dict(module.named_parameters())
    for name, layer in lora.layers.items():
        ratio = (layer.alpha / layer.rank) / (lora_alpha(config) / config.rank)
        parameters[f"{name}.lora_A.{ADAPTER}.weight"].copy_(layer.down.float())
        parameters[f"{name}.lora_B.{ADAPTER}.weight"].copy_(layer.up.float() * ratio)
