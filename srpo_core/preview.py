"""Pictures of fixed prompts from fixed noise, what they score, and the sheet that shows them."""

from __future__ import annotations

import io
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
from srpo_core.parallel import World
from srpo_core.preference import ControlWords
from srpo_core.rollout import rollout

COLUMNS, GAP, CAPTION, LEAST_WIDTH = 4, 8, 34, 192
"""Of a contact sheet: pictures in a row, and pixels between them, below them and across them at least."""


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
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Images [n, 3, H, W] in [0, 1], on the CPU, of n prompts from noise [n, C, h, w].

    `on_batch(images done)` is called after each batch, `check()` after each Euler step.
    """
    sigmas = shifted_sigmas(num_steps, shift)
    images = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        batch = prompts.select(rows).to(device)
        started = noise[rows.start : rows.stop].to(device)
        clean = rollout(flow, batch, started, sigmas, guidance, lambda *_: check()).clean
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


def contact_sheet(images: Tensor, captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Images [n, 3, H, W] in rows with their captions below; small ones are enlarged by a whole factor."""
    factor = _enlargement(images.shape[-1])
    width, height = images.shape[-1] * factor, images.shape[-2] * factor
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + CAPTION + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * (height + CAPTION + GAP)
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        lines = textwrap.wrap(caption, max(8, width // 6), max_lines=2, placeholder=" ...")
        draw.text((left, top + height + 3), "\n".join(lines), fill="black", font=font)
    return sheet


def _enlargement(width: int) -> int:
    return max(1, math.ceil(LEAST_WIDTH / width))


def split_sheet(sheet: Image.Image, count: int, height: int, width: int) -> Tensor:
    """The images [count, 3, height, width] of a contact sheet, in [0, 1], as they went in.

    ValueError if it is no sheet of so many of that size.
    """
    factor, columns = _enlargement(width), min(COLUMNS, count)
    step_x, step_y = width * factor + GAP, height * factor + CAPTION + GAP
    if count < 1 or sheet.size != (columns * step_x + GAP, math.ceil(count / columns) * step_y + GAP):
        raise ValueError(
            f"{sheet.width} x {sheet.height} pixels are no sheet of {count} pictures of {width} x {height}"
        )
    pixels = from_pil(sheet)
    images = []
    for i in range(count):
        left, top = GAP + i % columns * step_x, GAP + i // columns * step_y
        images.append(pixels[:, top : top + height * factor : factor, left : left + width * factor : factor])
    return torch.stack(images)


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

    def draw(
        self,
        flow: FlowModel,
        world: World,
        on_batch: Callable[[int], None] = lambda done: None,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Scores]:
        """Images [n, 3, H, W] of the prompts by `flow`, and their scores.

        Processes share the batches; all get the scores, the main one the images (others some of them). `on_batch(images
        done)` is called after each batch; `check()`, which may raise, more often.
        """
        count = len(self.prompts)
        batches = [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]
        mine, latents, images, scores = world.share(batches), [], [], []
        idle = world.turns(len(batches)) - len(mine) if world.keeps_step else 0
        with world.together(), world.in_step():
            for rows in [*mine, *batches[:1] * idle]:  # the model may take all processes
                latents.append(self._sample(flow, rows, world, check))
                on_batch(min(count, len(latents) * world.parts * self.batch_size))
        with world.together():
            for rows, clean in zip(mine, latents, strict=False):
                with torch.no_grad():
                    images.append(self.autoencoder.decode(clean).cpu())
                scores.append(self._score_batch(images[-1], rows))
        shapes = [(len(rows), *images[0].shape[1:]) for rows in batches] if images else []
        whole: Scores = {}
        for part in world.in_order(world.exchange(scores)):
            for name, values in part.items():
                whole.setdefault(name, []).extend(values)
        return torch.cat(world.collect(images, shapes) or [torch.empty(0)]), whole

    def _sample(self, flow: FlowModel, rows: range, world: World, check: Callable[[], None]) -> Tensor:
        """Clean latents of a batch; `check` comes before each model call, before the first alone if all have to."""
        batch = self.prompts.select(rows).to(self.device)
        noise = self.noise[rows.start : rows.stop].to(self.device)
        sigmas = shifted_sigmas(self.num_steps, self.shift)
        world.agreed(check)()
        on_step = None if world.keeps_step else lambda *_: check()
        return rollout(flow, batch, noise, sigmas, self.guidance, on_step).clean

    def _score_batch(self, images: Tensor, rows: range) -> Scores:
        return score_images(
            images, self.prompts.prompts[rows.start : rows.stop], self.reward, self.words, self.contrast, self.measures,
            len(rows), self.device,
        )  # fmt: skip


def save_png(path: Path, picture: Image.Image, durable: bool = True) -> None:
    """Write a picture, whole or not at all (write_atomic); its folder is made if need be."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_atomic(path, png.getvalue(), durable)


def save_preview(run_dir: Path, step: int, prompts: Sequence[str], images: Tensor, scores: Scores) -> Image.Image:
    """Write a preview's sheet and its scores, previews/step-000020.png and .json; the sheet."""
    folder, sheet = run_dir / "previews", contact_sheet(images, prompts)
    save_png(folder / f"step-{step:06d}.png", sheet)
    write_atomic(folder / f"step-{step:06d}.json", json.dumps({"prompts": list(prompts), **scores}, indent=1))
    return sheet
