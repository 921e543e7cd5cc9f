"""A copy of the model for rollouts: its blocks' matrices in fp8, everything else shared with the trained one."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from srpo_core.compiling import Compiler
from srpo_core.config import ConfigError
from srpo_core.interfaces import TrainableFlow
from srpo_core.lora import ADAPTER, layer_pattern
from srpo_core.weights.compressed import fp8_codes
from srpo_core.weights.eight_bit import to_fp8_rows
from srpo_core.weights.fp8_linear import PARTS, Fp8Linear, takes_fp8


class RolloutCopy:
    """Holds nothing of its own but while it is `filled`: then codes of the weights as they are at that time.

    A LoRA beside a layer is merged into its codes, unless the matrix is held in fp8 anyway (model.frozen_memory): those
    codes serve as they are, at no cost. `dtype` is the precision of the model's other products.
    """

    def __init__(self, flow: TrainableFlow, dtype: torch.dtype, compiler: Compiler | None = None) -> None:
        """ConfigError if no layer of the model can be held in fp8."""
        self.flow = copy.copy(flow)
        self.flow.module = shared_copy(flow.module)
        self._layers = _replace(self.flow.module, flow.lora_targets, dtype)
        if not self._layers:
            raise ConfigError("rollout.precision='fp8': the model has no linear layers that suit it; set it to model")
        self._to_codes = _codes if compiler is None else compiler.function(_codes)
        if compiler is not None:
            compiler.blocks(self.flow.module, flow.block_types)

    @contextlib.contextmanager
    @torch.no_grad()
    def filled(self) -> Iterator[TrainableFlow]:
        """Inside the context the copy stands for the weights as they are now; its memory is given back after it."""
        try:
            for layer, source in self._layers:
                self._fill(layer, source)
            yield self.flow
        finally:
            for layer, _ in self._layers:
                for name in PARTS:
                    setattr(layer, name, None)

    def _fill(self, layer: Fp8Linear, source: nn.Module) -> None:
        linear = getattr(source, "base_layer", source)
        held = fp8_codes(linear)
        if held is None:
            layer.codes, layer.scale = self._to_codes(linear.weight, *lora_parts(source))
            return
        layer.codes, layer.scale = held
        down, up, scale = lora_parts(source)
        if down is not None and up is not None:
            layer.down, layer.up = down.to(layer.dtype), (up.float() * scale).to(layer.dtype)


def shared_copy(module: nn.Module) -> nn.Module:
    """A tree of modules of its own with the same parameters and buffers, and hooks of diffusers; not compiled."""
    twin = module.__class__.__new__(module.__class__)
    own = {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in vars(module).items()}
    own.pop("forward", None)  # what was compiled or hooked on belongs to the other one
    hooks = own.pop("_diffusers_hook", None)
    own["_modules"] = {name: child and shared_copy(child) for name, child in module._modules.items()}
    vars(twin).update(own)
    for name, hook in hooks.hooks.items() if hooks is not None else ():  # such as those that share a picture's tokens
        type(hooks).check_if_exists_or_initialize(twin).register_hook(copy.copy(hook), name)
    return twin


def _replace(
    module: nn.Module, targets: Mapping[str, Sequence[str]], dtype: torch.dtype
) -> list[tuple[Fp8Linear, nn.Module]]:
    """Put layers in fp8 in the place of the module's named ones; (new, old) of each."""
    pattern = layer_pattern(targets["all"])
    found = [(name, layer) for name, layer in module.named_modules() if re.fullmatch(pattern, name)]
    replaced = []
    for name, layer in found:
        linear = getattr(layer, "base_layer", layer)
        if isinstance(linear, nn.Linear) and takes_fp8(linear.out_features, linear.in_features):
            module.set_submodule(name, new := Fp8Linear(linear.bias, dtype))
            replaced.append((new, layer))
    return replaced


def lora_parts(layer: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """The down [r, in], up [out, r] and scale of a layer's LoRA, or None, None and 0."""
    if not hasattr(layer, "lora_A"):
        return None, None, 0.0
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


def _codes(weight: Tensor, down: Tensor | None, up: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Codes and row scales of a weight with its LoRA."""
    if down is None or up is None:
        return to_fp8_rows(weight)
    return to_fp8_rows(weight.float() + up.float() @ down.float() * scale)
