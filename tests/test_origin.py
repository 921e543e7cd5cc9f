"""What exported files say about themselves."""

import json

import pytest

from srpo_core.miniature import WEIGHTS
from srpo_core.weights.lora_names import check_lora, read_lora
from srpo_core.weights.origin import origin
from srpo_core.weights.tensors import open_tensors


def run(**reward):
    return json.dumps({"reward": reward})


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, ""),
        ({"format": "pt"}, ""),
        (
            {"srpo_run": run(name="hpsv2"), "srpo_step": "40", "srpo_weights": "averaged"},
            "trained by SRPO: 40 steps with the reward hpsv2 (averaged weights)",
        ),
        (
            {"srpo_run": run(name="hpsv2", more=[{"name": "pickscore"}]), "srpo_step": "8", "srpo_weights": "trained"},
            "trained by SRPO: 8 steps with the reward hpsv2 + pickscore (trained weights)",
        ),
        ({"srpo_run": "{", "srpo_step": "8"}, "trained by SRPO: 8 steps (trained weights)"),
        ({"srpo_run": "[" * 100_000, "srpo_step": "8"}, "trained by SRPO: 8 steps (trained weights)"),
        ({"srpo_run": '{"reward": 3}'}, "trained by SRPO: ? steps (trained weights)"),
        ({"srpo_merged": "a.safetensors:0.8"}, "holds the LoRA a.safetensors:0.8"),
        (
            {"srpo_extracted": '{"from": "tuned.safetensors", "base": "flux.safetensors"}'},
            "extracted by SRPO: what turns flux.safetensors into tuned.safetensors",
        ),
    ],
)
def test_origins(metadata, said):
    assert origin(metadata) == said


def test_the_lora_that_ships():
    """Of the demo's own run, for the shipped miniature."""
    path = WEIGHTS / "lora.safetensors"
    assert origin(open_tensors(path, "").metadata) == (
        "trained by SRPO: 64 steps with the reward miniature (averaged weights)"
    )
    lora = read_lora(path, "")
    base = open_tensors(WEIGHTS / "transformer", "")
    check_lora(lora, {name.removesuffix(".weight"): info.shape for name, info in base.info.items()})
    assert {layer.rank for layer in lora.layers.values()} == {16}
    assert max(layer.change().abs().max() for layer in lora.layers.values()) > 1e-3
