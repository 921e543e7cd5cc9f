"""What settings of rollouts and of frozen weights do to the miniature's pictures, in dB beside the exact path's.

    PYTHONPATH=. python scripts/rollout_errors.py [--out scripts/results/rollout_errors.json] [--pictures 32]

For each row the mean PSNR of decoded rollouts, and the latents' relative difference, from the same noise and held-out
prompts: 25 Euler steps, guidance 1, shift 3, on the CPU. The exact path makes every call in float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bench_load import machine

from srpo_core.align_view import psnr
from srpo_core.config import ModelConfig
from srpo_core.files import write_atomic
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Autoencoder, FlowModel, PromptBatch
from srpo_core.miniature.models import load
from srpo_core.models.flux import BLOCKS
from srpo_core.randomness import fixed_noise
from srpo_core.rollout import rollout
from srpo_core.rollout_copy import RolloutCopy
from srpo_core.weights.compressed import fill_compressed

STEPS, SHIFT, GUIDANCE, AT_ONCE = 25, 3.0, 1.0, 16
ROWS: dict[str, dict[str, Any]] = {
    "exact": {},
    "products in bfloat16": {"dtype": "bfloat16"},
    "rollout in fp8": {"fp8": True},
    "15 calls": {"calls": 15},
    "12 calls": {"calls": 12},
    "12 calls, rollout in fp8": {"calls": 12, "fp8": True},
    "12 plain Euler steps": {"steps": 12},
    "frozen matrices in 8 bits": {"frozen": "8bit"},
    "frozen matrices in fp8": {"frozen": "fp8"},
    "the same, rollout in fp8": {"frozen": "fp8", "fp8": True},
    "frozen matrices in 4 bits": {"frozen": "4bit"},
}
"""By name: what differs from the exact path."""


def drawn(row: dict[str, Any], prompts: PromptBatch, noise: torch.Tensor) -> torch.Tensor:
    """Clean latents [N, C, h, w] of a row's rollouts."""
    dtype = row.get("dtype", "float32")
    flow = load(ModelConfig(family="miniature", dtype=dtype), "cpu").flow
    if "frozen" in row:
        state = {name: tensor.clone() for name, tensor in flow.module.state_dict().items()}
        fill_compressed(flow.module, iter(state.items()), torch.float32, "cpu", {}, BLOCKS, row["frozen"])
    if row.get("fp8"):
        with RolloutCopy(flow, getattr(torch, dtype)).filled() as twin:
            return sampled(twin, prompts, noise, row)
    return sampled(flow, prompts, noise, row)


def sampled(flow: FlowModel, prompts: PromptBatch, noise: torch.Tensor, row: dict[str, Any]) -> torch.Tensor:
    sigmas = shifted_sigmas(row.get("steps", STEPS), SHIFT)
    parts = [
        rollout(flow, prompts.select(some), noise[some.start : some.stop], sigmas, GUIDANCE, calls=row.get("calls", 0))
        for some in (range(i, min(i + AT_ONCE, len(noise))) for i in range(0, len(noise), AT_ONCE))
    ]
    return torch.cat([part.clean for part in parts])


@torch.no_grad()
def pictures(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([autoencoder.decode(part) for part in latents.split(AT_ONCE)])


def main() -> None:
    """Draw all rows, compare each with the first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", type=int, default=32)
    args = parser.parse_args()
    parts = load(ModelConfig(family="miniature", dtype="float32"), "cpu")
    chosen = parts.prompts["eval"][: args.pictures]
    prompts, shape = parts.text_encoder(chosen), parts.flow.latent_shape(128, 128)
    noise = fixed_noise(0, len(chosen), shape, "rollout errors")
    exact = drawn(ROWS["exact"], prompts, noise)
    wanted, rows = pictures(parts.autoencoder, exact), {}
    for name, row in list(ROWS.items())[1:]:
        latents = drawn(row, prompts, noise)
        decibels = psnr(pictures(parts.autoencoder, latents), wanted)
        rows[name] = {
            "psnr_db": round(float(decibels.mean()), 1),
            "lowest_psnr_db": round(float(decibels.min()), 1),
            "relative_latents": float(f"{float((latents - exact).norm() / exact.norm()):.3g}"),
        }
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    about = machine("PYTHONPATH=. python scripts/rollout_errors.py --out scripts/results/rollout_errors.json")
    if args.out is not None:
        result = {"machine": about, "pictures": len(chosen), "rows": rows}
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
