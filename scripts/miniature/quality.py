"""The stage that measures what was built: samples of held-out captions."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from srpo_core.flow import shifted_sigmas
from srpo_core.miniature import judge as judging
from srpo_core.miniature import models
from srpo_core.miniature.captions import DISLIKED, LIKED, random_scenes
from srpo_core.miniature.looks import look
from srpo_core.models.flux import FluxFlow, load_module
from srpo_core.rollout import rollout

from .build import SEED, Build, record, save_sheet


@torch.no_grad()
def sample(build: Build, flow: FluxFlow, captions: list[str], guidance: float, steps: int = 25) -> Tensor:
    """Pictures [N, 3, 128, 128] of captions, in the run's own words: our rollout, our decoder."""
    encoder, autoencoder = models.MiniatureTextEncoder(models.load_clip(build.device, build.out)), build.autoencoder()
    build.generator.manual_seed(SEED + 7)
    images = []
    for start in range(0, len(captions), 256):
        part = captions[start : start + 256]
        noise = torch.randn(len(part), 16, 16, 16, device=build.device, generator=build.generator)
        result = rollout(flow, encoder(part), noise, shifted_sigmas(steps, 3.0), guidance)
        images.append(autoencoder.decode(result.clean))
    return torch.cat(images)


def check_quality(build: Build) -> None:
    """Stage `quality`: held-out captions, plain and with look words, at several guidances; the contact sheet."""
    folder = next(f for f in ("transformer", "base") if (build.out / f).is_dir())
    module = load_module(models.FluxTransformer2DModel, build.out / folder, "flow").float().to(build.device)
    flow = FluxFlow(module, dtype=torch.bfloat16 if build.device.type == "cuda" else torch.float32)
    measures = judging.JudgeMeasures(models.load_judge(build.device, build.out))
    rng = random.Random(SEED + 7)
    captions = [scene.caption() for scene in random_scenes(build.steps(1024), SEED + 93, held_out=True)]
    table = {}
    for guidance in (1.0, 2.0, 3.5):
        for kind, words in (("plain", None), ("liked", LIKED), ("disliked", DISLIKED)):
            texts = [f"{rng.choice(words)}. {caption}" if words else caption for caption in captions]
            images = sample(build, flow, texts, guidance)
            numbers = {
                name: getattr(measures, name)(images, texts).mean() for name in ("content", "exact", "judge_liked")
            }
            numbers |= {name: value.mean() for name, value in look(images).items()}
            table[f"{kind} at guidance {guidance}"] = {name: round(float(value), 4) for name, value in numbers.items()}
            build.log(f"{kind} at guidance {guidance}: {table[f'{kind} at guidance {guidance}']}")
            if guidance == 3.5:
                save_sheet(images[:48], 12, build.out / f"samples_{kind}.png")
    record(build, "samples of held-out captions", **table)
