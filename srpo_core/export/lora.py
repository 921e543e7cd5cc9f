"""A LoRA as a file that diffusers and ComfyUI both read.

Its keys are `transformer.<diffusers module>.lora_A.weight`, `.lora_B.weight` and `.alpha`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from srpo_core.checkpoint import read_state, read_tensors
from srpo_core.config import ConfigError
from srpo_core.export.formats import DTYPES, Stream, cast, check_dtype, check_file, tensors_source, write
from srpo_core.lora import ADAPTER
from srpo_core.sharded_checkpoint import is_saved
from srpo_core.weights.lora_names import Lora, LoraLayer, lora_tensors


def trained_lora(parameters: Mapping[str, Tensor], alpha: float) -> Lora:
    """The LoRA among parameters that are named as in the module or its checkpoint; others are left out."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.items():
        for side in ("lora_A", "lora_B"):
            layer, found, _ = name.partition(f".{side}.{ADAPTER}.weight")
            if found:
                sides.setdefault(layer, {})[side] = tensor.detach()
    if not sides:
        raise ConfigError("there is no LoRA among these weights")
    return Lora({layer: LoraLayer(s["lora_A"], s["lora_B"], alpha) for layer, s in sides.items()}, "the trained LoRA")


def checkpoint_lora(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's LoRA under the names that diffusers and ComfyUI read: its running average where there is one.

    ConfigError if the run trained all parameters; TrainingError if a file is damaged.
    """
    lora = read_state(folder)["lora"]
    if not lora:
        raise ConfigError(f"the run of {folder} trained all parameters")
    name = "ema" if is_saved(folder, "ema") else "weights"
    return lora_tensors(trained_lora(read_tensors(folder, name), lora["alpha"]))


def write_lora(
    lora: Lora,
    out: Path,
    metadata: Mapping[str, str],
    dtype: str | None,
    overwrite: bool,
    sources: tuple[Path, ...] = (),
) -> Path:
    """Write a LoRA to one file in `dtype` (None: as it is); alphas stay in float32."""
    check_file(out, "a LoRA")
    if dtype is not None:
        check_dtype(dtype, "lora", "comfyui")
    source = tensors_source(lora_tensors(lora))

    def as_asked(meta: bool) -> Stream:
        return cast(source(meta), None if dtype is None else DTYPES[dtype])

    return write(out, as_asked, metadata, None, overwrite, sources)


def export_lora(
    parameters: Mapping[str, Tensor],
    alpha: float,
    path: Path | str,
    metadata: Mapping[str, str],
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write a LoRA, by its parameters' names in the module or in a checkpoint, to one safetensors file."""
    return write_lora(trained_lora(parameters, alpha), Path(path), metadata, dtype, overwrite)
