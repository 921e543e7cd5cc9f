"""Make the miniature's weights from nothing: pictures from the drawing code, four small networks trained on them, quality measured.

    python scripts/build_miniature.py [--out FOLDER] [--stages autoencoder clip clip_images judge flow guidance quality] [--device cuda]

Stages, each a few minutes on one GPU, each reading what the earlier ones left in FOLDER:
  autoencoder  pictures -> 16-channel latents -> pictures; latents near unit normal, decoder used to a little noise
  clip         text and image towers, contrastive, with neighbouring scenes and several looks of a scene in every batch
  clip_images  the image tower alone goes on
  judge        the held-out detector, on pictures that went through the autoencoder, blur and noise
  flow         the FLUX transformer: rectified flow on latents and captions, a tenth of the captions empty
  guidance     distilled guidance: one call learns what a captioned and an empty call give with classifier-free guidance
  quality      samples of held-out captions measured by the judge and from pixels; contact sheet
Weights are float32 while training and bfloat16 in FOLDER; quality.json and build.log stand beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from miniature_data import Drawn, draw, pack

from srpo_core.flow import add_noise, shifted_sigmas
from srpo_core.interfaces import PromptBatch
from srpo_core.miniature import judge as judging
from srpo_core.miniature import models
from srpo_core.miniature.captions import COLOURS, DISLIKED, LIKED, SHAPES, random_scenes
from srpo_core.miniature.looks import look
from srpo_core.models.flux import FluxFlow, ImageAutoencoder, load_module
from srpo_core.rewards.clip import features
from srpo_core.rewards.images import normalise
from srpo_core.rollout import rollout

SEED = 0


class Log:
    """Lines with the time, on the terminal and at the end of FOLDER/build.log."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.time()

    def __call__(self, text: str) -> None:
        line = f"[{time.time() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Averaged:
    """A moving average of a module's weights, slow once warmed up."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.count = copy.deepcopy(module).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def fit(
    name: str, modules: Iterable[nn.Module], loss_of: Callable[[int], tuple[Tensor, dict[str, float | Tensor]]], steps: int, lr: float,
    build: Build, weight_decay: float = 0.01, after_step: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """AdamW with warm-up and cosine decay over `steps`; `loss_of(step)` gives the loss and numbers to log.

    On a slow machine the decay is hurried so that training ends with the stage's minutes.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    fused = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused)
    begin = time.time()
    for step in range(steps):
        done = max(step / steps, (time.time() - begin) / build.stage_seconds)
        if done >= 1:
            build.log(f"{name}: out of time after {step} of {steps} steps")
            break
        rate = lr * min(1, (step + 1) / min(500, steps / 4 + 1)) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, numbers = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            text = ", ".join(f"{key} {float(value):.4f}" for key, value in numbers.items())
            build.log(
                f"{name} {step + 1}/{steps} loss {float(loss.detach()):.4f} {text} ({(time.time() - begin) / (step + 1):.4f} s/step)"
            )


class Build:
    """Where the stages read and write, and how long they train."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out
        self.device = torch.device(args.device)
        self.scale: float = args.scale
        self.workers: int = args.workers
        self.stage_seconds: float = 60 * args.stage_minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out / "build.log")
        self.generator = torch.Generator(self.device)

    def steps(self, count: int) -> int:
        return max(2, round(count * self.scale))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def compiled(self, module: nn.Module) -> nn.Module:
        return torch.compile(module) if self.device.type == "cuda" else module

    def flow(self, module: models.FluxTransformer2DModel) -> FluxFlow:
        """The transformer in bfloat16 arithmetic, its blocks compiled where that pays."""
        if self.device.type == "cuda":
            module.compile_repeated_blocks()
        return FluxFlow(module, dtype=torch.bfloat16)

    def draws(self, kind: str, seed: int, count: int, batches: int) -> Iterator[tuple[Drawn, Tensor]]:
        self.generator.manual_seed(seed)
        for drawn in draw(kind, seed, count, batches, self.workers):
            yield drawn, drawn.render(self.generator)

    def save(self, module: nn.Module, name: str) -> None:
        copy.deepcopy(module).to(torch.bfloat16).save_pretrained(self.out / name)

    def autoencoder(self) -> ImageAutoencoder:
        module = load_module(models.AutoencoderTiny, self.out / "vae", "autoencoder").float().to(self.device)
        return ImageAutoencoder(module, recompute=False)


def details(images: Tensor) -> Tensor:
    """Differences of neighbouring pixels, [B, 6, H - 1, W - 1]."""
    return torch.cat([images[..., 1:, 1:] - images[..., :-1, 1:], images[..., 1:, 1:] - images[..., 1:, :-1]], 1)


def train_autoencoder(build: Build) -> None:
    """Stage `autoencoder`: pixel and detail errors, latents pulled to mean 0 and deviation 1, decoding under a little noise."""
    module = models.new_autoencoder().to(build.device, memory_format=torch.channels_last)
    steps = build.steps(18000)
    drawn = build.draws("looks", SEED + 1, 1024, steps // 32 + 1)
    batches = (part for _, images in drawn for part in images.split(32))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = next(batches).contiguous(memory_format=torch.channels_last)
        with build.autocast():
            latents = module.encoder(images * 2 - 1)
            amount = 0.15 * torch.rand(len(latents), 1, 1, 1, device=build.device, generator=build.generator)
            shake = torch.randn(latents.shape, device=build.device, generator=build.generator)
            decoded = module.decoder(latents + amount * shake).float() / 2 + 0.5
        values = latents.float().transpose(0, 1).flatten(1)
        shape = (values.mean(1) ** 2 + (values.std(1) - 1) ** 2).mean()
        error = decoded - images
        fine = (details(decoded) - details(images)).abs().mean()
        loss = error.abs().mean() + 4 * (error**2).mean() + 2 * fine + 0.1 * shape
        return loss, {
            "psnr": -10 * (error.detach() ** 2).mean().log10(),
            "fine": fine.detach(),
            "shape": shape.detach(),
        }

    averaged = Averaged(module, 0.999)
    fit("autoencoder", [module], loss_of, steps, 1e-3, build, after_step=lambda: averaged.update(module))
    build.save(averaged.module, "vae")
    check_autoencoder(build)


@torch.no_grad()
def check_autoencoder(build: Build) -> None:
    """PSNR and looks of fresh pictures before and after the saved autoencoder; statistics of its latents; a sheet."""
    autoencoder = build.autoencoder()
    drawn, images = next(build.draws("looks", SEED + 91, 512, 1))
    latents = autoencoder.encode(images)
    again = autoencoder.decode(latents)
    psnr = -10 * ((again - images) ** 2).mean((1, 2, 3)).log10()
    before, after = look(images), look(again)
    liked = torch.from_numpy(drawn.word).to(images.device) < len(LIKED)
    for name in before:
        pairs = [f"{float(side[name][group].mean()):.3f}" for group in (~liked, liked) for side in (before, after)]
        build.log(f"autoencoder {name}: disliked {pairs[0]} -> {pairs[1]}, liked {pairs[2]} -> {pairs[3]}")
    record(
        build,
        "autoencoder",
        psnr=float(psnr.mean()),
        latent_mean=float(latents.mean()),
        latent_std=float(latents.std()),
    )
    save_sheet(torch.cat([images[:16], again[:16]]), 16, build.out / "autoencoder.png")


def softened(images: Tensor, build: Build) -> Tensor:
    """Pictures as training meets them: some slightly blurred, some with a little noise, some brighter or darker."""
    batch = len(images)

    def rand() -> Tensor:
        return torch.rand(batch, 1, 1, 1, device=build.device, generator=build.generator)

    blurred = F.avg_pool2d(F.pad(images, [1, 1, 1, 1], mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, (rand() < 0.3) * rand())
    noise = torch.randn(images.shape, device=build.device, generator=build.generator)
    images = images + noise * 0.04 * rand() * (rand() < 0.4)
    return (images * (1 + 0.1 * (rand() - 0.5))).clamp(0, 1)


def contrastive_loss(image: Tensor, text: Tensor, temperature: Tensor, scene: Tensor, plain: Tensor) -> Tensor:
    """Symmetric cross-entropy over unit features [N, D]; a plain caption belongs to all pictures of its scene alike."""
    own = torch.eye(len(image), device=image.device)
    target = torch.where(plain[:, None], (scene[:, None] == scene[None]).float(), own)
    scores = temperature * text @ image.T
    by_text = F.cross_entropy(scores, target / target.sum(1, keepdim=True))
    by_image = F.cross_entropy(scores.T, target.T / target.sum(0)[:, None])
    return (by_text + by_image) / 2


def train_clip(build: Build) -> None:
    """Stage `clip`: both towers, 1024 pictures a batch."""
    model = models.new_clip().to(build.device)
    nn.init.constant_(model.logit_scale, math.log(10))
    fit_clip(build, "clip", model, build.steps(1100), 1024, SEED + 2)


def train_clip_images(build: Build) -> None:
    """Stage `clip_images`: the image tower goes on alone, so that what the flow model is conditioned on stays as it is."""
    model = models.load_clip(build.device, build.out)
    model.text_model.requires_grad_(False)
    model.text_projection.requires_grad_(False)
    fit_clip(build, "clip_images", model, build.steps(5000), 512, SEED + 12)


def fit_clip(build: Build, name: str, model: models.CLIPModel, steps: int, count: int, seed: int) -> None:
    """Contrastive training on pictures half of which went through the autoencoder; saves the averaged model."""
    compiled_image, compiled_text = build.compiled(model.vision_model), build.compiled(model.text_model)
    batches = build.draws("contrast", seed, count, steps)
    through = through_autoencoder(build)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        drawn, images = next(batches)
        scene, plain = torch.from_numpy(drawn.scene).to(build.device), torch.from_numpy(drawn.plain).to(build.device)
        ids = torch.from_numpy(drawn.tokens).to(build.device)
        pixels = normalise(softened(through(images), build), models.MEAN, models.STD)
        with build.autocast():
            image = features(model.visual_projection(compiled_image(pixel_values=pixels).pooler_output).float())
            text = features(model.text_projection(compiled_text(input_ids=ids).pooler_output).float())
        temperature = model.logit_scale.exp().clamp(max=60)
        loss = contrastive_loss(image.float(), text.float(), temperature, scene, plain)
        right = ((text @ image.T).argmax(1) == torch.arange(len(text), device=build.device))[~plain].float().mean()
        return loss, {"own picture first": right, "temperature": temperature.detach()}

    averaged = Averaged(model, 0.999)
    fit(name, [model], loss_of, steps, 8e-4, build, weight_decay=0.05, after_step=lambda: averaged.update(model))
    build.save(averaged.module, "clip")


def through_autoencoder(build: Build) -> Callable[[Tensor], Tensor]:
    """A function that sends half of a batch through the saved autoencoder (none where there is none yet)."""
    if not (build.out / "vae").is_dir():
        build.log("no autoencoder yet: pictures stay as drawn")
        return lambda images: images
    autoencoder = build.autoencoder()

    @torch.no_grad()
    def through(images: Tensor) -> Tensor:
        half = len(images) // 2
        pick = torch.randperm(len(images), device=build.device, generator=build.generator)[:half]
        images = images.clone()
        with build.autocast():
            latents = autoencoder.encode(images[pick])
            shake = torch.randn(latents.shape, device=build.device, generator=build.generator)
            images[pick] = autoencoder.decode(latents + 0.1 * shake)
        return images

    return through


def judge_loss(maps: Tensor, background: Tensor, look_logits: Tensor, drawn: Drawn) -> Tensor:
    """Centres (a cell each, its neighbours free), shapes and colours there, background and look."""
    device = maps.device
    layout = {name: torch.from_numpy(array).to(device) for name, array in drawn.layout.items()}
    rows, slots = layout["present"].nonzero().unbind(1)
    cell_x, cell_y = ((layout[axis][rows, slots] * judging.GRID).long().clamp(0, judging.GRID - 1) for axis in "xy")
    target = torch.zeros_like(maps[:, 0])
    target[rows, cell_y, cell_x] = 1
    near = F.max_pool2d(target[:, None], 3, stride=1, padding=1)[:, 0]
    weight = torch.where(target > 0, 10.0, 1 - near)
    centre = F.binary_cross_entropy_with_logits(maps[:, 0].float(), target, weight)
    there = maps[rows, :, cell_y, cell_x].float()
    shape = F.cross_entropy(there[:, 1 : 1 + len(SHAPES)], layout["shape"][rows, slots])
    colour = F.cross_entropy(there[:, 1 + len(SHAPES) :][:, : len(COLOURS)], layout["colour"][rows, slots])
    behind = F.cross_entropy(background.float(), layout["background"])
    return (
        centre * 4
        + shape
        + colour
        + behind
        + F.cross_entropy(look_logits.float(), torch.from_numpy(drawn.word).to(device))
    )


def train_judge(build: Build) -> None:
    """Stage `judge`: its own seeds, a convolutional detector; measured on fresh pictures through the autoencoder."""
    model = judging.Judge().to(build.device)
    steps = build.steps(4000)
    batches = build.draws("looks", SEED + 3, 512, steps)
    through = through_autoencoder(build)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        drawn, images = next(batches)
        with build.autocast():
            return judge_loss(*model(softened(through(images), build)), drawn), {}

    averaged = Averaged(model, 0.998)
    fit("judge", [model], loss_of, steps, 1.5e-3, build, weight_decay=0.03, after_step=lambda: averaged.update(model))
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in averaged.module.state_dict().items()}
    save_file(weights, build.out / "judge.safetensors")
    check_judge(build)


@torch.no_grad()
def check_judge(build: Build) -> None:
    """How often the judge reads a fresh held-out picture right, as drawn and through the autoencoder."""
    judge, autoencoder = models.load_judge(build.device, build.out), build.autoencoder()
    rng = random.Random(SEED + 92)
    scenes = random_scenes(1800, SEED + 92, held_out=True)
    words = [rng.choice(LIKED + DISLIKED) for _ in scenes]
    images = pack(scenes, words, [False] * len(scenes), rng).render(build.generator.manual_seed(SEED + 92))
    again = torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in images.split(300)])
    measures = judging.JudgeMeasures(judge)
    captions = [scene.caption() for scene in scenes]
    side = torch.tensor([word in LIKED for word in words])
    numbers = {}
    for name, pictures in (("drawn", images), ("decoded", again)):
        numbers[f"exact_{name}"] = float(measures.exact(pictures, captions).mean())
        numbers[f"look_side_{name}"] = float(((measures.judge_liked(pictures, captions) > 0.5) == side).float().mean())
    record(build, "judge", **numbers)


@torch.no_grad()
def dataset(build: Build, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, 16, 16, 16], rows of the text table [N] and the table's token ids [M, T]; row 0 is the empty caption."""
    autoencoder = build.autoencoder()
    latents, ids = [], []
    for drawn, images in build.draws("captions", SEED + 4, 2048, count // 2048):
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
    steps = build.steps(16000)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        clean, noise, sigma, rows = data.batch(512)
        drop = torch.rand(len(rows), device=build.device, generator=build.generator) < 0.1
        prompts = data.prompts(rows.masked_fill(drop, 0))
        velocity = flow.velocity(add_noise(clean, noise, sigma), sigma, prompts, 1.0)
        return F.mse_loss(velocity, noise - clean), {}

    fit("flow", [module], loss_of, steps, 1.2e-3, build, after_step=lambda: averaged.update(module))
    build.save(averaged.module, "base")


def train_guidance(build: Build) -> None:
    """Stage `guidance`: the student's one call at guidance g in [1, 5] = empty + g * (captioned - empty) of the base model."""
    base = load_module(models.FluxTransformer2DModel, build.out / "base", "flow").float().to(build.device)
    student = copy.deepcopy(base)
    data = FlowData(build, 2048 * build.steps(60))
    build.generator.manual_seed(SEED + 6)
    averaged = Averaged(student, 0.998)
    teacher, flow = build.flow(base.requires_grad_(False)), build.flow(student)
    steps = build.steps(6000)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
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


def save_sheet(images: Tensor, columns: int, path: Path) -> None:
    """Pictures [N, 3, H, W] as one PNG, row by row."""
    rows = [torch.cat(list(row), 2) for row in images.float().cpu().split(columns)]
    sheet = (torch.cat([row for row in rows if row.shape == rows[0].shape], 1) * 255).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)


def record(build: Build, stage: str, **numbers: object) -> None:
    """Put a stage's numbers into quality.json, with the machine that made them."""
    path = build.out / "quality.json"
    quality = json.loads(path.read_text()) if path.is_file() else {}
    device = torch.cuda.get_device_name() if build.device.type == "cuda" else platform.processor() or "cpu"
    quality["made_with"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "seed": SEED,
    }
    quality[stage] = numbers
    path.write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    build.log(f"{stage}: {json.dumps(numbers)}")


STAGES: dict[str, Callable[[Build], None]] = {
    "autoencoder": train_autoencoder, "clip": train_clip, "clip_images": train_clip_images, "judge": train_judge,
    "flow": train_flow, "guidance": train_guidance, "quality": check_quality,
}  # fmt: skip


def main() -> None:
    """Run the chosen stages in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=models.WEIGHTS, help="folder of the weights")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="steps and pictures, as a part of the full build (for trying it out)"
    )
    parser.add_argument("--stage-minutes", type=float, default=10.0, help="a stage trains no longer than this")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that draw scenes")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward is not reliable on these shapes
    build = Build(args)
    for name in args.stages:
        torch.manual_seed(SEED)
        begin = time.time()
        STAGES[name](build)
        build.log(f"stage {name} took {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
