"""Pictures of fixed prompts from fixed noise, what they score, and the sheet that shows them."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from srpo_core.columns import Scores, score_columns
from srpo_core.files import write_atomic
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Autoencoder, FlowModel, Measure, PromptBatch, Reward
from srpo_core.preference import ControlWords
from srpo_core.rollout import rollout


@torch.no_grad()
def sample_images(
    flow: FlowModel,
    autoencoder: Autoencoder,
    prompts: PromptBatch,
    noise: Tensor,
    num_steps: int,
    shift: float,
    guidance: float,
    batch_size: int,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Images [n, 3, H, W] in [0, 1], on the CPU, of n prompts from noise [n, C, h, w].

    `on_batch(images done)` is called after each batch.
    """
    sigmas = shifted_sigmas(num_steps, shift)
    images = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        batch = prompts.select(rows).to(device)
        clean = rollout(flow, batch, noise[rows.start : rows.stop].to(device), sigmas, guidance).clean
        images.append(autoencoder.decode(clean).cpu())
        if on_batch is not None:
            on_batch(rows.stop)
    return torch.cat(images)


@torch.no_grad()
def score_images(
    images: Tensor,
    prompts: Sequence[str],
    reward: Reward,
    words: ControlWords,
    contrast: tuple[str, str] | None = None,
    measures: Mapping[str, Measure] | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Scores:
    """Scores of images [n, 3, H, W] in [0, 1] for n prompts: the columns of columns.py."""
    scores: Scores = {}
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device)
        texts = list(prompts[start : start + batch_size])
        for name, values in score_columns(reward, batch, texts, words, contrast, measures).items():
            scores.setdefault(name, []).extend(values.tolist())
    return scores


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as a picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def from_pil(picture: Image.Image) -> Tensor:
    """A picture as [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def contact_sheet(images: Tensor, captions: Sequence[str], columns: int = 4, least_width: int = 192) -> Image.Image:
    """Images [n, 3, H, W] in rows with their captions below; small ones are enlarged by a whole factor."""
    factor = max(1, math.ceil(least_width / images.shape[-1]))
    width, height, strip = images.shape[-1] * factor, images.shape[-2] * factor, 34
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + 8) + 8, rows * (height + strip + 8) + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = 8 + i % columns * (width + 8), 8 + i // columns * (height + strip + 8)
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        lines = textwrap.wrap(caption, max(8, width // 6), max_lines=2, placeholder=" ...")
        draw.text((left, top + height + 3), "\n".join(lines), fill="black", font=font)
    return sheet


@dataclass(frozen=True)
class Gallery:
    """Fixed prompts with fixed noise [n, C, h, w], and how they are drawn and scored."""

    prompts: PromptBatch
    noise: Tensor
    autoencoder: Autoencoder
    reward: Reward
    words: ControlWords
    contrast: tuple[str, str]
    measures: Mapping[str, Measure]
    num_steps: int
    shift: float
    guidance: float
    batch_size: int
    device: torch.device

    def draw(self, flow: FlowModel, on_batch: Callable[[int], None] | None = None) -> tuple[Tensor, Scores]:
        """Images [n, 3, H, W] of the prompts by `flow`, and their scores; `on_batch(images done)` after each batch."""
        images = sample_images(
            flow, self.autoencoder, self.prompts, self.noise, self.num_steps, self.shift, self.guidance,
            self.batch_size, self.device, on_batch,
        )  # fmt: skip
        scores = score_images(
            images, self.prompts.prompts, self.reward, self.words, self.contrast, self.measures, self.batch_size,
            self.device,
        )  # fmt: skip
        return images, scores


def save_preview(run_dir: Path, step: int, prompts: Sequence[str], images: Tensor, scores: Scores) -> Image.Image:
    """Write a preview's sheet and its scores, previews/step-000020.png and .json; the sheet."""
    folder = run_dir / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(images, prompts)
    sheet.save(folder / f"step-{step:06d}.png")
    write_atomic(folder / f"step-{step:06d}.json", json.dumps({"prompts": list(prompts), **scores}, indent=1))
    return sheet
