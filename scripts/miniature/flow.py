"""Stages that paint: the flow transformer and its distilled guidance."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from srpo_core.flow import add_noise
from srpo_core.interfaces import PromptBatch
from srpo_core.miniature import models
from srpo_core.models.flux import load_module

from .build import SEED, Averaged, Build, LossAndNumbers, fit


@torch.no_grad()
def dataset(build: Build, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, 16, 16, 16], rows of the text table [N] and the table's ids [M, T]; row 0 is the empty caption."""
    autoencoder = build.autoencoder()
    latents, ids = [], []
    with build.draws("captions", SEED + 4, 2048, count // 2048) as batches:
        for drawn, images in batches:
            with build.autocast():
                latents.append(autoencoder.encode(images).to(torch.bfloat16))
            ids.append(torch.from_numpy(drawn.tokens))
    empty = models.tokens([""])["input_ids"]
    table, rows = torch.cat([empty, *ids]).unique(dim=0, return_inverse=True)
    order = torch.cat([rows[:1], torch.tensor([i for i in range(len(table)) if i != rows[0]])])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return torch.cat(latents), place[rows[1:]].to(build.device), table[order]


@torch.no_grad()
def embed_table(build: Build, table: Tensor) -> tuple[Tensor, Tensor]:
    """Text states [M, T, D] and pooled features [M, D] of token ids [M, T], bfloat16 on the device."""
    clip = models.load_clip(build.device, build.out)
    states, pooled = [], []
    for ids in table.split(4096):
        out = clip.text_model(input_ids=ids.to(build.device))
        states.append(out.last_hidden_state.to(torch.bfloat16))
        pooled.append(clip.text_projection(out.pooler_output).to(torch.bfloat16))
    return torch.cat(states), torch.cat(pooled)


class FlowData:
    """Noised latents with their captions, drawn from a table that stays on the device."""

    def __init__(self, build: Build, count: int) -> None:
        self.build = build
        self.latents, self.rows, table = dataset(build, count)
        self.states, self.pooled = embed_table(build, table)
        build.log(f"{len(self.latents)} pictures, {len(table)} different captions")

    def prompts(self, rows: Tensor) -> PromptBatch:
        embeds = {"prompt_embeds": self.states[rows].float(), "pooled_prompt_embeds": self.pooled[rows].float()}
        return PromptBatch(("",) * len(rows), embeds)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """clean, noise [B, C, h, w], levels [B] (logit-normal or even, shifted to high noise), text rows [B]."""
        options = {"device": self.build.device, "generator": self.build.generator}
        pick = torch.randint(len(self.latents), (size,), **options)
        even = torch.rand(size, **options)
        t = torch.where(torch.rand(size, **options) < 0.5, even, torch.randn(size, **options).sigmoid())
        sigma = (2 * t / (1 + t)).clamp(1e-3, 1)
        clean = self.latents[pick].float()
        return clean, torch.randn(clean.shape, **options), sigma, self.rows[pick]


def train_flow(build: Build) -> None:
    """Stage `flow`: the rectified-flow loss; a tenth of the captions empty; guidance is always told to be 1."""
    torch.manual_seed(SEED + 5)
    module = models.new_transformer().to(build.device)
    data = FlowData(build, 2048 * build.steps(120))
    build.generator.manual_seed(SEED + 5)
    averaged = Averaged(module, 0.9995)
    flow = build.flow(module)
    steps = build.steps(13100)

    def loss_of(step: int) -> LossAndNumbers:
        clean, noise, sigma, rows = data.batch(512)
        drop = torch.rand(len(rows), device=build.device, generator=build.generator) < 0.1
        prompts = data.prompts(rows.masked_fill(drop, 0))
        velocity = flow.velocity(add_noise(clean, noise, sigma), sigma, prompts, 1.0)
        return F.mse_loss(velocity, noise - clean), {}

    fit("flow", [module], loss_of, steps, 1.2e-3, build, after_step=lambda: averaged.update(module))
    build.save(averaged.module, "base")


def train_guidance(build: Build) -> None:
    """Stage `guidance`: one call of the student at g in [1, 5] gives the base's empty + g * (captioned - empty)."""
    base = load_module(models.FluxTransformer2DModel, build.out / "base", "flow").float().to(build.device)
    student = copy.deepcopy(base)
    data = FlowData(build, 2048 * build.steps(60))
    build.generator.manual_seed(SEED + 6)
    averaged = Averaged(student, 0.998)
    teacher, flow = build.flow(base.requires_grad_(False)), build.flow(student)
    steps = build.steps(1800)

    def loss_of(step: int) -> LossAndNumbers:
        clean, noise, sigma, rows = data.batch(384)
        latents = add_noise(clean, noise, sigma)
        guidance = 1 + 4 * torch.rand(len(rows), device=build.device, generator=build.generator)
        with torch.no_grad():
            both = data.prompts(torch.cat([rows, torch.zeros_like(rows)]))
            captioned, empty = teacher.velocity(latents.repeat(2, 1, 1, 1), sigma.repeat(2), both, 1.0).chunk(2)
            target = empty + guidance.view(-1, 1, 1, 1) * (captioned - empty)
        return F.mse_loss(flow.velocity(latents, sigma, data.prompts(rows), guidance), target), {}

    fit("guidance", [student], loss_of, steps, 4e-4, build, after_step=lambda: averaged.update(student))
    build.save(averaged.module, "transformer")
