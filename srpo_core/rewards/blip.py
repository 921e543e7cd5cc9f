"""ImageReward's network out of transformers' BLIP: a ViT, a BERT whose layers look at its patches, a head on [CLS].

Its sizes are read off the published checkpoint's shapes, its tensors off the published names. What shapes don't tell is
BLIP's own: 64 wide attention heads, GELU, layer norms with 1e-6 in the ViT and 1e-12 in the BERT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from .head import ScoreHead, below

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
"""Beginnings of the published names of what a score needs. The rest of BLIP, its projections, has no part in it."""
HEAD_WIDTH = 64
Shapes = Mapping[str, tuple[int, ...]]


class BlipScore(nn.Module):
    """Pixels and tokens to raw scores. KeyError names what `shapes`, those of a checkpoint, lack."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        vision, text = _vision_config(shapes), _text_config(shapes)
        self.image_size, self.words = int(vision.image_size), int(text.vocab_size)
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.head = ScoreHead(below(shapes, HEAD))
        # no part of a checkpoint, so it must not stay on meta where the rest is made there
        self.text.embeddings.position_ids = torch.arange(text.max_position_embeddings, device="cpu")[None]

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """pixels [B, 3, S, S] normalised, input_ids and attention_mask [n * B, L] -> [n * B]; text i sees i % B."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        patches = patches.repeat(len(input_ids) // len(pixels), 1, 1)
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        ).last_hidden_state
        return self.head(states[:, 0])


def own_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name in `BlipScore`, published name) of every tensor of a checkpoint that a score needs."""
    for name in names:
        if name.startswith(VISION):
            yield "vision." + _vision_name(name.removeprefix(VISION)), name
        elif name.startswith(TEXT):
            rest = name.removeprefix(TEXT)
            if rest != "embeddings.position_ids" and not rest.startswith("pooler."):
                yield f"text.{rest}", name
        elif name.startswith(HEAD):
            yield "head." + name.removeprefix(HEAD), name


_OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_IN_BLOCKS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


def _vision_name(name: str) -> str:
    """The name in `BlipVisionModel` of a tensor of the original ViT."""
    module, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block:
        return f"encoder.layers.{block[1]}.{_IN_BLOCKS.get(block[2], block[2])}{dot}{kind}"
    return f"{_OUTSIDE_BLOCKS.get(module, module)}{dot}{kind}"


def _count(shapes: Shapes, beginning: str) -> int:
    """How many layers are numbered after a beginning of names: the highest number and one."""
    numbers = [int(found[1]) for name in shapes if (found := re.match(re.escape(beginning) + r"(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _vision_config(shapes: Shapes) -> BlipVisionConfig:
    _, positions, width = shapes[f"{VISION}pos_embed"]
    patch = shapes[f"{VISION}patch_embed.proj.weight"][-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{VISION}blocks.0.mlp.fc1.weight"][0],
        num_hidden_layers=_count(shapes, f"{VISION}blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )


def _text_config(shapes: Shapes) -> BlipTextConfig:
    words, width = shapes[f"{TEXT}embeddings.word_embeddings.weight"]
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=shapes[f"{TEXT}encoder.layer.0.crossattention.self.key.weight"][1],
        intermediate_size=shapes[f"{TEXT}encoder.layer.0.intermediate.dense.weight"][0],
        num_hidden_layers=_count(shapes, f"{TEXT}encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=shapes[f"{TEXT}embeddings.position_embeddings.weight"][0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=None,
        sep_token_id=None,
        is_decoder=True,  # gives its layers cross-attention; its mask stays bidirectional
    )
