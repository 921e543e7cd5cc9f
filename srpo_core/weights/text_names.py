"""CLIP's and T5's text towers under the names that files give them, and their shapes as transformers' configurations.

Files differ in what stands before a name (`text_model.`, `text_encoders.t5xxl.transformer.`, ...) and in what else
they hold: a projection, a logit scale, a vision tower, T5's decoder. A tower is found by one tensor that each has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .fp8 import dequantised
from .recognise import require
from .tensors import TensorFile

HEAD_WIDTH = 64
"""Width of an attention head in CLIP-L and in T5-XXL; CLIP's weights don't tell it."""
_CLIP_ANCHOR = "embeddings.token_embedding.weight"
_T5_ANCHOR = "encoder.final_layer_norm.weight"
_CLIP_OWN = re.compile(r"(embeddings\.(token|position)_embedding\.|encoder\.layers\.|final_layer_norm\.)")
_T5_OWN = re.compile(r"(shared\.|encoder\.(block\.|final_layer_norm\.))")


def in_checkpoint(file: TensorFile, tower: str) -> TensorFile:
    """The part of a ComfyUI checkpoint that is the tower "clip" or "t5". WeightsError if it holds none."""
    return file.prefix(require(file, tower, file.setting).prefix)


def clip_view(file: TensorFile) -> TensorFile:
    """CLIP's text tower in a file: names from `embeddings.` on. WeightsError if there is none, or more than one."""
    return _tower(file, _CLIP_ANCHOR, "clip")


def t5_view(file: TensorFile) -> TensorFile:
    """T5's encoder in a file: names from `encoder.` on. WeightsError if there is none, or more than one."""
    return _tower(file, _T5_ANCHOR, "t5")


def _tower(file: TensorFile, anchor: str, part: str) -> TensorFile:
    found = [name.removesuffix(anchor) for name in file.info if f".{name}".endswith(f".{anchor}")]
    if len(found) == 1:
        return file.prefix(found[0])
    require(file, part, file.setting)  # says what it is instead
    raise file.error(f"holds {len(found)} text encoders", "name a file or folder of one")


def _width(file: TensorFile, name: str, axis: int) -> int:
    """A dimension of a matrix that a tower must have."""
    info = file.info.get(name)
    if info is None or len(info.shape) != 2 or not all(info.shape):
        raise file.error(f"its tensor {name} is {'missing' if info is None else f'of shape {info.shape}'}")
    return info.shape[axis]


def _layers(file: TensorFile, pattern: str) -> int:
    return len({found[1] for name in file.info if (found := re.match(pattern, name))})


def clip_config(file: TensorFile) -> dict[str, Any]:
    """Settings for `CLIPTextConfig` of a `clip_view`, read off its shapes; as OpenAI's CLIP-L has the rest."""
    vocabulary, width = _width(file, _CLIP_ANCHOR, 0), _width(file, _CLIP_ANCHOR, 1)
    if width % HEAD_WIDTH:
        raise file.error(f"is {width} wide, no multiple of {HEAD_WIDTH}", "name a folder with its config.json")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _width(file, "encoder.layers.0.mlp.fc1.weight", 0),
        "projection_dim": width,
        "num_hidden_layers": _layers(file, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": _width(file, "embeddings.position_embedding.weight", 0),
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def t5_config(file: TensorFile) -> dict[str, Any]:
    """Settings for `T5Config` of a `t5_view`, read off its shapes; as T5 v1.1 has the rest."""
    attention, dense = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    bias = f"{attention}.relative_attention_bias.weight"
    table = "shared.weight" if "shared.weight" in file else "encoder.embed_tokens.weight"
    gated, heads = f"{dense}.wi_0.weight" in file, _width(file, bias, 1)
    return {
        "vocab_size": _width(file, table, 0),
        "d_model": _width(file, table, 1),
        "d_kv": _width(file, f"{attention}.q.weight", 0) // heads,
        "d_ff": _width(file, f"{dense}.wi_0.weight" if gated else f"{dense}.wi.weight", 0),
        "num_layers": _layers(file, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": _width(file, bias, 0),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def clip_stream(file: TensorFile, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A `clip_view`'s tensors under the names of `module`, a `CLIPTextModel`: transformers 5 has no `text_model.`."""
    nested = any(name.startswith("text_model.") for name, _ in module.named_parameters())
    own = _own(file, _CLIP_OWN)
    return ((f"text_model.{name}" if nested else name, tensor) for name, tensor in dequantised(own))


def t5_stream(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
    """A `t5_view`'s tensors under the names of a `T5EncoderModel`; its table of tokens once, as shared.weight."""
    pattern = _T5_OWN if "shared.weight" in file else re.compile(_T5_OWN.pattern + r"|encoder\.embed_tokens\.")
    for name, tensor in dequantised(_own(file, pattern)):
        yield ("shared.weight" if name == "encoder.embed_tokens.weight" else name), tensor


def _own(file: TensorFile, pattern: re.Pattern[str]) -> TensorFile:
    """Only the tensors whose names begin as `pattern` says."""
    return file.only(name for name in file.info if pattern.match(name))
