"""Stages that see: the autoencoder, the CLIP and the judge."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from srpo_core.miniature import judge as judging
from srpo_core.miniature import models
from srpo_core.miniature.captions import COLOURS, DISLIKED, LIKED, SHAPES, random_scenes
from srpo_core.miniature.looks import look
from srpo_core.rewards.clip import features
from srpo_core.rewards.images import normalise

from .build import SEED, Averaged, Build, LossAndNumbers, fit, record, save_sheet
from .data import Drawn, pack


def details(images: Tensor) -> Tensor:
    """Differences of neighbouring pixels, [B, 6, H - 1, W - 1]."""
    return torch.cat([images[..., 1:, 1:] - images[..., :-1, 1:], images[..., 1:, 1:] - images[..., 1:, :-1]], 1)


def train_autoencoder(build: Build) -> None:
    """Stage `autoencoder`: pixel and detail errors, latents pulled to unit normal, decoding under a little noise."""
    module = models.new_autoencoder().to(build.device, memory_format=torch.channels_last)
    steps = build.steps(7300)
    averaged = Averaged(module, 0.999)
    with build.draws("looks", SEED + 1, 1024, steps // 32 + 1) as drawn:
        batches = (part for _, images in drawn for part in images.split(32))

        def loss_of(step: int) -> LossAndNumbers:
            return autoencoder_loss(build, module, next(batches).contiguous(memory_format=torch.channels_last))

        fit("autoencoder", [module], loss_of, steps, 1e-3, build, after_step=lambda: averaged.update(module))
    build.save(averaged.module, "vae")
    check_autoencoder(build)


def autoencoder_loss(build: Build, module: models.AutoencoderTiny, images: Tensor) -> LossAndNumbers:
    """Errors of pictures [B, 3, H, W] decoded from shaken latents, and how far the latents are from unit normal."""
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
    psnr = -10 * (error.detach() ** 2).mean().log10()
    return loss, {"psnr": psnr, "fine": fine.detach(), "shape": shape.detach()}


@torch.no_grad()
def check_autoencoder(build: Build) -> None:
    """PSNR and looks of fresh pictures before and after the saved autoencoder; statistics of its latents; a sheet."""
    autoencoder = build.autoencoder()
    with build.draws("looks", SEED + 91, 512, 1) as batches:
        drawn, images = next(batches)
    latents = autoencoder.encode(images)
    again = autoencoder.decode(latents)
    psnr = -10 * ((again - images) ** 2).mean((1, 2, 3)).log10()
    before, after = look(images), look(again)
    liked = torch.from_numpy(drawn.word).to(images.device) < len(LIKED)
    for name in before:
        pairs = [f"{float(side[name][group].mean()):.3f}" for group in (~liked, liked) for side in (before, after)]
        build.log(f"autoencoder {name}: disliked {pairs[0]} -> {pairs[1]}, liked {pairs[2]} -> {pairs[3]}")
    numbers = {"psnr": psnr.mean(), "latent_mean": latents.mean(), "latent_std": latents.std()}
    record(build, "autoencoder", **{name: float(value) for name, value in numbers.items()})
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
    """Stage `clip_images`: the image tower goes on alone; what the flow model is conditioned on stays as it is."""
    model = models.load_clip(build.device, build.out)
    model.text_model.requires_grad_(False)
    model.text_projection.requires_grad_(False)
    fit_clip(build, "clip_images", model, build.steps(2050), 512, SEED + 12)


def fit_clip(build: Build, name: str, model: models.CLIPModel, steps: int, count: int, seed: int) -> None:
    """Contrastive training on pictures half of which went through the autoencoder; saves the averaged model."""
    compiled_image, compiled_text = build.compiled(model.vision_model), build.compiled(model.text_model)
    through = through_autoencoder(build)

    def loss_of(drawn: Drawn, images: Tensor) -> LossAndNumbers:
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
    with build.draws("contrast", seed, count, steps) as batches:
        fit(
            name, [model], lambda step: loss_of(*next(batches)), steps, 8e-4, build, weight_decay=0.05,
            after_step=lambda: averaged.update(model),
        )  # fmt: skip
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
    word = F.cross_entropy(look_logits.float(), torch.from_numpy(drawn.word).to(device))
    return centre * 4 + shape + colour + behind + word


def train_judge(build: Build) -> None:
    """Stage `judge`: its own seeds, a convolutional detector; measured on fresh pictures through the autoencoder."""
    model = judging.Judge().to(build.device)
    steps = build.steps(1050)
    through = through_autoencoder(build)

    def loss_of(drawn: Drawn, images: Tensor) -> LossAndNumbers:
        with build.autocast():
            return judge_loss(*model(softened(through(images), build)), drawn), {}

    averaged = Averaged(model, 0.998)
    with build.draws("looks", SEED + 3, 512, steps) as batches:
        fit(
            "judge", [model], lambda step: loss_of(*next(batches)), steps, 1.5e-3, build, weight_decay=0.03,
            after_step=lambda: averaged.update(model),
        )  # fmt: skip
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
