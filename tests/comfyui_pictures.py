"""Graphs that draw one picture of the miniature in a real server, and the same picture by the engine."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from srpo_core.config import ModelConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.miniature.models import load
from srpo_core.models.flux import FluxFlow
from srpo_core.rollout import rollout

CAPTION = "a red ball on the left in a meadow"
STEPS, SHIFT, GUIDANCE, SEED = 8, 3.0, 3.5, 5
BUILT_IN = "miniature (built in)"
LEVEL = 1
"""Largest difference of a pixel, of 255, between pictures that should be the same."""


def graph(model, nodes=None, encode=None):
    """The picture (node "picture") that the MODEL of a link draws; `nodes` are added, `encode` encodes the caption."""
    return {
        "mini": {"class_type": "SRPOMiniature", "inputs": {}},
        "text": encode or {"class_type": "CLIPTextEncode", "inputs": {"clip": ["mini", 1], "text": CAPTION}},
        "guided": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["text", 0], "guidance": GUIDANCE}},
        "guider": {"class_type": "BasicGuider", "inputs": {"model": model, "conditioning": ["guided", 0]}},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 96, "batch_size": 1}},
        "sigmas": {"class_type": "SRPOSigmas", "inputs": {"shift": SHIFT, "steps": STEPS}},
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}},
        "sampled": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0], "sigmas": ["sigmas", 0],
                "latent_image": ["empty", 0],
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["sampled", 0], "vae": ["mini", 2]}},
        "picture": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
    } | (nodes or {})  # fmt: skip


def checkpoint(name, weights="as stored"):
    return {"model": {"class_type": "SRPOLoadCheckpoint", "inputs": {"checkpoint": name, "weights": weights}}}


def lora(name, strength=1.0, node="SRPOLoadLoRA"):
    names = {"lora": name, "strength": strength} if node.startswith("SRPO") else {
        "lora_name": name, "strength_model": strength,
    }  # fmt: skip
    return {"model": {"class_type": node, "inputs": {"model": ["mini", 0], **names}}}


def drawn(server, nodes=None, **kwargs):
    """(pixels [H, W, 3] 0 ... 255, the text that the node "model" shows) of a graph that must succeed."""
    result = server.run(graph(["model", 0] if nodes else ["mini", 0], nodes, **kwargs))
    assert result.status == "success", result.error
    (picture,) = result.outputs["picture"]["images"]
    pixels = np.asarray(Image.open(io.BytesIO(server.view(picture))).convert("RGB")).astype(int)
    return pixels, "\n".join(result.outputs.get("model", {}).get("text", ()))


def failure(server, nodes):
    """What the page says of a graph that fails while it runs."""
    result = server.run(graph(["model", 0], nodes))
    assert result.status == "error"
    return result.error


def apart(left, right):
    return np.abs(left - right).max()


def load_miniature():
    return load(ModelConfig(family="miniature"), "cpu")


def engine_picture(engine, transformer):
    """The same picture by the engine, with a transformer of diffusers (and perhaps peft)."""
    noise = torch.randn((1, 16, 12, 16), generator=torch.manual_seed(SEED))
    flow = FluxFlow(transformer.eval())
    clean = rollout(flow, engine.text_encoder([CAPTION]), noise, shifted_sigmas(STEPS, SHIFT), GUIDANCE).clean
    with torch.no_grad():
        images = engine.autoencoder.decode(clean)
    return (images[0].movedim(0, -1).clamp(0, 1) * 255).round().numpy().astype(int)
