"""A FLUX transformer of a megabyte in a file, and LoRAs for it."""

from __future__ import annotations

import torch
from flux_weights import original_shapes, random_tensors
from lora_files import named, random_pairs, save
from safetensors import safe_open

from srpo_core.models.flux_files import transformer_at

SIZES = {"width": 128, "double": 1, "single": 1, "text": 24, "pooled": 20, "channels": 16, "guidance": True}
SHAPES = original_shapes(**SIZES)
MATRICES = {name.removesuffix(".weight"): shape for name, shape in SHAPES.items() if len(shape) == 2}


def original_file(path, dtype=torch.float32, metadata=None, **sizes):
    """Under the original names; sizes as in `original_shapes`."""
    tensors = random_tensors(original_shapes(**SIZES | sizes))
    return save(path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, metadata)


def kohya_lora(path, seed=1):
    """A LoRA of all layers inside blocks."""
    layers = {name: shape for name, shape in MATRICES.items() if "_blocks." in name}
    return save(path, named(random_pairs(layers, seed=seed), "kohya"))


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(ours, theirs):
    """Names, dtypes and all bits of two sets of tensors."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def diffusers_tensors(path):
    return dict(transformer_at(path, "").stream())
