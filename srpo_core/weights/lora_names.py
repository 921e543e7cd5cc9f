"""LoRA files of FLUX models in all the namings that trainers write, as low-rank pairs by diffusers' module names.

Read are: diffusers and peft (`transformer.<module>.lora_A.weight`), kohya (`lora_unet_double_blocks_0_img_attn_qkv.
lora_down.weight`), ComfyUI and others with original names (`diffusion_model.double_blocks.0...`), OneTrainer
(`lora_transformer_...`) and XLabs (`...processor.qkv_lora1.down.weight`). A LoRA beside one of the original network's
fused layers becomes one per part, with the same `down` and its own rows of `up`. Other modules' names stay as they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_core.config import ConfigError

from .flux_names import BLOCKS, REST, SWAPPED, diffusers_modules, swap_halves
from .recognise import require
from .tensors import TensorFile, open_tensors

_TEXT_ENCODERS = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te|te\d?[._]|clip_[lgh]\.|t5xxl\.|text_model\.)")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_JOINED = re.compile(r"(lora_unet|lora_transformer|lycoris)_+(?=[a-z])")
_END = re.compile(
    r"[._](?:lora_(?P<ab>[AB])(?:\.[\w-]+)?|(?:lora[._]|lora_linear_layer\.)?(?P<side>down|up))\.weight$|\.(?P<alpha>alpha)$"
)
_OTHER_KINDS = {
    "LoKr": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a", "lokr_t2"),
    "LoHa": ("hada_w1_a", "hada_w2_a", "hada_t1"),
    "DoRA": ("dora_scale", "lora_magnitude_vector", "magnitude"),
    "OFT": ("oft_blocks", "oft_diag"),
    "GLoRA": ("a1.weight", "b1.weight"),
    "convolution": ("lora_mid.weight",),
}
_BEYOND = (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm", ".lora_B.bias", ".reshape_weight")

_XLABS = {
    "double_blocks": {
        "processor.qkv_lora1": "img_attn.qkv",
        "processor.qkv_lora2": "txt_attn.qkv",
        "processor.proj_lora1": "img_attn.proj",
        "processor.proj_lora2": "txt_attn.proj",
    },
    "single_blocks": {"processor.qkv": "linear1_qkv", "processor.proj": "linear2"},
}
_QKV = "linear1_qkv"
"""The first three parts of `linear1`, as if they were a layer of their own."""


class LoraLayer(NamedTuple):
    """One layer's low-rank change alpha / rank * up @ down: down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight that it changes."""
        return self.up.shape[0], self.down.shape[1]

    def change(self, strength: float = 1.0) -> Tensor:
        """What is added to the weight: [out, in], float32."""
        return (strength * self.alpha / self.rank) * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Lora:
    """The layers of a LoRA file by diffusers' module paths. `notes` tell the user what of the file was left out."""

    layers: dict[str, LoraLayer]
    source: str
    notes: tuple[str, ...] = ()


def read_lora(path: Path | str, setting: str) -> Lora:
    """The LoRA in a safetensors file that `setting` names.

    ConfigError, before anything else is done, if the file can't be read, holds something else (a whole model, another
    kind of adapter, one for another family) or parts that no low-rank pair can hold.
    """
    file = open_tensors(path, setting)
    names, notes = _transformer_names(file)
    if not names:
        raise file.error("holds no LoRA for the transformer, only for text encoders", "name another LoRA")
    _refuse_other_kinds(file, names)
    pairs: dict[str, dict[str, str]] = {}
    for name in names:
        layer, part = _split(name, file)
        if pairs.setdefault(layer, {}).setdefault(part, name) != name:
            raise file.error(f"two of its tensors, {pairs[layer][part]} and {name}, are the same part of a LoRA")
    alphas = _alphas(file)
    layers: dict[str, LoraLayer] = {}
    for layer, parts in pairs.items():
        for module, found in _unfuse(layer, _pair(layer, parts, file, alphas), file):
            if module in layers:
                raise file.error(f"two of its layers change {module}")
            layers[module] = found
    return Lora(layers, f"{setting}={str(path)!r}" if setting else str(path), notes)


def check_lora(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ConfigError unless each layer of the LoRA is one of the model's, whose weight shapes are `shapes`, and fits."""
    for name, layer in lora.layers.items():
        shape = shapes.get(name)
        if shape is None:
            raise ConfigError(f"{lora.source} is for another model: this one has no linear layer {name}")
        if tuple(shape) != layer.shape:
            raise ConfigError(
                f"{lora.source} is for another model: its layer {name} changes a weight of {list(layer.shape)}, this"
                f" model's is {list(shape)}"
            )


def lora_tensors(lora: Lora) -> dict[str, Tensor]:
    """A LoRA under the names that diffusers and ComfyUI read; readers scale by alpha / rank."""
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"transformer.{name}.alpha"] = torch.tensor(float(layer.alpha))
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down
        tensors[f"transformer.{name}.lora_B.weight"] = layer.up
    return tensors


def _transformer_names(file: TensorFile) -> tuple[list[str], tuple[str, ...]]:
    """The file's names but those for text encoders, and a note about these."""
    kept = [name for name in file.info if not _TEXT_ENCODERS.match(name)]
    skipped = len(file.info) - len(kept)
    note = f"{file.path}: {skipped} tensors for text encoders are left out; only the transformer's part is used"
    return kept, (note,) if skipped else ()


def _refuse_other_kinds(file: TensorFile, names: list[str]) -> None:
    for kind, ends in _OTHER_KINDS.items():
        found = next((name for name in names if name.endswith(tuple(f".{end}" for end in ends)) or
                      any(f".{end}." in name for end in ends)), None)  # fmt: skip
        if found is not None:
            raise file.error(
                f"is a {kind} adapter ({found}), no plain LoRA",
                "merge it into a checkpoint in ComfyUI (ModelSave) and use that, or train from a plain LoRA",
            )
    for name in names:
        if name.endswith(_BEYOND) and bool(file.read(name).reshape(-1).view(torch.uint8).any()):
            raise file.error(f"changes more than a LoRA can hold ({name})", "merge it into a checkpoint and use that")
    names[:] = [name for name in names if not name.endswith(_BEYOND)]
    if not any(_END.search(name) for name in names):
        require(file, "lora", file.setting)
        raise file.error("holds no low-rank pair", "name a LoRA file")


def _split(name: str, file: TensorFile) -> tuple[str, str]:
    """(layer, "down" | "up" | "alpha") of a tensor's name."""
    found = _END.search(name)
    if found is None or found.start() == 0:
        raise file.error(f"its tensor {name} is no part of a LoRA that is known here")
    part = "alpha" if found["alpha"] else found["side"] or {"A": "down", "B": "up"}[found["ab"]]
    return _bare(name[: found.start()]), part


def _bare(layer: str) -> str:
    """A layer's name without the prefixes that say only that it is the transformer's."""
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    return layer


def _alphas(file: TensorFile) -> Callable[[str, int], float]:
    """Alpha by layer and rank where no tensor gives it: of the settings that came with the file, else the rank."""
    where, text = _settings(file)
    try:
        settings = json.loads(text)
        settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        pattern = {str(key): float(value) for key, value in settings.get("alpha_pattern", {}).items()}
        common = float(settings["lora_alpha"]) if "lora_alpha" in settings else None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise file.error(f"its {where} can't be understood: {error}") from error
    if settings.get("use_dora"):
        raise file.error("is a DoRA adapter, no plain LoRA")

    def alpha(layer: str, rank: int) -> float:
        own = [value for key, value in pattern.items() if f".{layer}".endswith(f".{key}")]
        value = own[0] if own else rank if common is None else common
        return float(value) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)

    return alpha


def _settings(file: TensorFile) -> tuple[str, str]:
    """Where a LoRA's settings stand, and their JSON: diffusers' metadata, or the file that peft writes beside it."""
    beside = file.path.with_name("adapter_config.json")
    if "lora_adapter_metadata" not in file.metadata and file.path.stem.startswith("adapter_model") and beside.is_file():
        try:
            return str(beside), beside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise file.error(f"its {beside} can't be read: {error}") from error
    return "metadata lora_adapter_metadata", file.metadata.get("lora_adapter_metadata", "{}")


def _pair(layer: str, parts: Mapping[str, str], file: TensorFile, alphas: Callable[[str, int], float]) -> LoraLayer:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise file.error(f"its layer {layer} lacks the matrix `{missing[0]}`: the file is not whole")
    down, up = (_matrix(parts[part], file) for part in ("down", "up"))
    rank = down.shape[0]
    if up.shape[1] != rank:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise file.error(f"its layer {layer} has matrices of {shapes}, which are no low-rank pair")
    return LoraLayer(down, up, _number(parts["alpha"], file) if "alpha" in parts else alphas(layer, rank))


def _number(name: str, file: TensorFile) -> float:
    stored = file.read(name)
    if stored.numel() != 1 or stored.is_complex() or not math.isfinite(float(stored)):
        raise file.error(f"{name} is no single finite number")
    return float(stored)


def _matrix(name: str, file: TensorFile) -> Tensor:
    """A floating-point matrix; a 1 x 1 convolution's counts as one."""
    shape = file.info[name].shape
    if len(shape) > 2 and all(side == 1 for side in shape[2:]):
        shape = shape[:2]
    if len(shape) != 2 or 0 in shape:
        raise file.error(f"{name} is {list(file.info[name].shape)} instead of a matrix")
    tensor = file.read(name)
    if not tensor.is_floating_point():
        raise file.error(f"{name} is stored as {file.info[name].dtype}, no floating-point numbers")
    if not bool(tensor.float().isfinite().all()):
        raise file.error(f"{name} holds infinite numbers or NaN: the LoRA is broken")
    return tensor.reshape(shape)


def _unfuse(layer: str, pair: LoraLayer, file: TensorFile) -> Iterator[tuple[str, LoraLayer]]:
    """(diffusers' module, pair) of a layer: one, or one for each part of a stacked layer."""
    original, modules = _modules(layer)
    if modules is None:
        raise file.error(f"its layer {layer} is none of a FLUX transformer's: the LoRA is for another model")
    rows, width = pair.shape
    if original == SWAPPED:
        if rows % 2:
            raise file.error(f"its layer {layer} has {rows} rows, an odd number")
        pair = pair._replace(up=swap_halves(pair.up))
    if len(modules) == 1:
        yield modules[0], pair
        return
    sizes = [width] * 3 + [rows - 3 * width] * (len(modules) - 3)
    if sum(sizes) != rows or min(sizes) <= 0:
        raise file.error(f"its layer {layer} changes a weight of {[rows, width]}, which is no {len(modules)} layers")
    for module, up in zip(modules, pair.up.split(sizes), strict=True):
        yield module, pair._replace(up=up)


def _modules(layer: str) -> tuple[str, tuple[str, ...] | None]:
    """(original name or "", diffusers' modules) of a layer; no modules: it is none of FLUX's."""
    joined = _JOINED.match(layer)
    name = layer if joined is None else _dotted(layer[joined.end() :])
    found = re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", name)
    if found is not None:
        kind, index, rest = found.groups()
        name = f"{kind}.{index}.{_XLABS[kind].get(rest, rest)}"
    if name.endswith(f".{_QKV}"):
        modules = diffusers_modules(name.replace(_QKV, "linear1"))
        return name, modules and modules[:3]
    modules = diffusers_modules(name)
    unknown = found is not None or name == ""
    return (name, modules) if modules is not None or unknown else ("", (name,))


def _dotted(name: str) -> str:
    """An original or diffusers name whose dots became underscores, with its dots again; "" if there is none such."""
    for kind, (blocks, table) in BLOCKS.items():
        found = re.fullmatch(rf"({kind}|{blocks})_(\d+)_(.+)", name)
        if found is not None:
            of, index, rest = found.groups()
            inside = [*table, _QKV] if of == kind else [part for parts in table.values() for part in parts]
            return next((f"{of}.{index}.{dotted}" for dotted in inside if dotted.replace(".", "_") == rest), "")
    outside = [*REST, *(parts[0] for parts in REST.values())]
    return next((dotted for dotted in outside if dotted.replace(".", "_") == name), "")
