"""Graphs that draw with the miniature in a real server, and the latents they leave behind."""

from __future__ import annotations

from comfyui_shown import node
from safetensors.torch import load_file

PROMPT = "two red stars at night"
MODEL, CLIP, VAE, POSITIVE, EMPTY = (["mini", 0], ["mini", 1], ["mini", 2], ["text", 0], ["empty", 0])
"""Links into `miniature`."""
SCALE, SHIFT = 0.3611, 0.1159
"""A LATENT of FLUX less SHIFT, times SCALE, is in the model's range."""
SAMPLER = {"steps": 6, "guidance": 3.5, "shift": 3.0, "noise": "ComfyUI", "at_once": 4}


def miniature(count=1, width=128, height=128, text=PROMPT):
    """The miniature with a prompt and an empty LATENT of `count` pictures."""
    return {
        "mini": node("SRPOMiniature"),
        "text": node("CLIPTextEncode", clip=CLIP, text=text),
        "empty": node("EmptySD3LatentImage", width=width, height=height, batch_size=count),
    }


def sampler(seed, latent=EMPTY, **settings):
    return node("SRPOSampler", model=MODEL, positive=POSITIVE, latent=latent, seed=seed, **{**SAMPLER, **settings})


def saved(latent, name="kept"):
    return node("SaveLatent", samples=latent, filename_prefix=f"latents/{name}")


def latents_of(server, result, name):
    """The latents that a SaveLatent node wrote, in the model's range, [B, C, h, w]."""
    (entry,) = result.outputs[name]["latents"]
    latents = load_file(server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]
    return (latents - SHIFT) * SCALE


def ran(server, graph, **options):
    """The result of a graph that has to succeed."""
    result = server.run(graph, **options)
    assert result.status == "success", f"{result.error}\n{server.log()[-3000:]}"
    return result
