"""LoRA: a frozen network with small trained matrices beside some of its linear layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from srpo_core.config import ConfigError, LoraConfig, nearest

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
    pattern = rf".+\.({'|'.join(re.escape(target) for target in targets)})"
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


def lora_alpha(config: LoraConfig) -> float:
    """The LoRA's alpha: its rank where it is unset, so that the scale is 1."""
    return float(config.rank) if config.alpha is None else config.alpha
