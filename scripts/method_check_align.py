"""The claim that Direct-Align recovers the clean picture where one-step prediction does not, for method_check.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from srpo_core.align import AlignStep, align_step_at, direct_align, one_step_prediction, training_levels
from srpo_core.align_view import psnr
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import load_run
from srpo_core.devices import make_world
from srpo_core.files import write_atomic
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Components
from srpo_core.intervals import Interval, bootstrap_ci
from srpo_core.models import load_model
from srpo_core.preview import to_pil
from srpo_core.prompts import encode, read_prompts
from srpo_core.randomness import fixed_noise
from srpo_core.rollout import Rollout, rollout

LEVELS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)
LONGER = (0.1, 0.4)
"""Lengths of the gradient step beside the training's own."""
ROLLOUT_STEPS = 25
MEASURES = ("content", "look")
PICTURE_PROMPTS, PICTURE_LEVELS = 3, 6


@dataclass(frozen=True)
class Recovered:
    """What a model call per prompt recovers at level sigma: Direct-Align by a step of `length`, or (None) one-step."""

    sigma: float
    length: float | None
    values: dict[str, np.ndarray]
    """Per prompt: "psnr" of the picture against the rollout's in dB, "error" (RMS of the latents') and MEASURES."""
    images: Tensor
    """Of the first PICTURE_PROMPTS prompts."""

    @property
    def weight(self) -> float:
        """|d recovered / d velocity|."""
        return self.sigma if self.length is None else self.length / (1 - self.sigma + self.length)

    @property
    def share(self) -> float:
        """Part of the recovered latents that is one-step prediction; the rest is the known clean latents."""
        return self.weight / self.sigma

    def interval(self, name: str, less: Recovered | None = None) -> Interval:
        """95 % interval of the mean of a measure, or of its paired difference to another way."""
        return bootstrap_ci(self.values[name] - (less.values[name] if less is not None else 0.0))


@dataclass(frozen=True)
class Bench:
    """Rollouts of held-out prompts, in batches, and what recovers and measures them."""

    parts: Components
    rollouts: list[Rollout]
    images: list[Tensor]
    """The rollouts' pictures, batch by batch."""
    guidance: float
    """Of the model call that recovers."""

    @torch.no_grad()
    def recover(self, sigma: float, length: float | None) -> Recovered:
        """Put the noise back at sigma, recover by one model call, decode, measure."""
        flow, values, pictures = self.parts.flow, [], []
        for clean, target in zip(self.rollouts, self.images, strict=True):
            if length is None:
                latents = one_step_prediction(flow, clean, sigma, self.guidance)
            else:
                latents = direct_align(flow, clean, AlignStep(sigma, sigma - length, 0.0), self.guidance)
            images = self.parts.autoencoder.decode(latents)
            error = (latents - clean.clean).square().mean((1, 2, 3)).sqrt()
            values.append({"psnr": psnr(images, target), "error": error, **self.measure(images, clean.prompts.prompts)})
            pictures.append(images)
        merged = {name: torch.cat([part[name] for part in values]).double().cpu().numpy() for name in values[0]}
        return Recovered(sigma, length, merged, torch.cat(pictures)[:PICTURE_PROMPTS].cpu())

    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """MEASURES of pictures [B, 3, H, W], [B] each."""
        return {name: self.parts.measures[name](images, prompts).cpu() for name in MEASURES}

    def of_rollouts(self) -> dict[str, np.ndarray]:
        """MEASURES of the rollouts' own pictures."""
        pairs = zip(self.rollouts, self.images, strict=True)
        found = [self.measure(images, clean.prompts.prompts) for clean, images in pairs]
        return {name: torch.cat([part[name] for part in found]).numpy() for name in MEASURES}


@torch.no_grad()
def make_bench(config: RunConfig, count: int, guidance: float | None = None) -> Bench:
    """Roll out `count` held-out prompts from the noise that previews have, in batches of data.batch_size."""
    device = make_world(config.parallel).device
    parts = load_model(config.model, device)
    prompts = read_prompts(config.data.eval_prompts, "data.eval_prompts", parts.prompts.get("eval", ()))[:count]
    encoded = encode(parts.text_encoder, prompts)
    noise = fixed_noise(
        config.seed, len(prompts), parts.flow.latent_shape(config.data.height, config.data.width), "held-out"
    )
    sigmas = shifted_sigmas(ROLLOUT_STEPS, config.rollout.shift)
    rollouts = []
    for start in range(0, len(prompts), config.data.batch_size):
        rows = range(start, min(start + config.data.batch_size, len(prompts)))
        batch = encoded.select(rows).to(device), noise[rows.start : rows.stop].to(device)
        rollouts.append(rollout(parts.flow, *batch, sigmas, config.rollout.guidance))
    images = [parts.autoencoder.decode(clean.clean) for clean in rollouts]
    return Bench(parts, rollouts, images, config.rollout.guidance if guidance is None else guidance)


def training_length(config: RunConfig) -> float:
    """Length in sigma of the gradient steps of a run."""
    align = config.align
    levels = training_levels(
        align.range_start, align.range_end, align.schedule_steps, config.rollout.shift, align.levels
    )
    step = align_step_at("denoise", align.levels // 2, levels, align.step_fraction, align.k_denoise)
    return step.sigma - step.sigma_next


def with_ends(interval: Interval, decimals: int) -> str:
    """ "31.2 [30.8, 31.6]"."""
    return f"{interval.estimate:.{decimals}f} [{interval.low:.{decimals}f}, {interval.high:.{decimals}f}]"


def level_row(aligned: Recovered, predicted: Recovered) -> dict[str, Any]:
    """Both ways at one level, with 95 % intervals of means over the prompts."""
    return {
        "sigma": aligned.sigma,
        "predicted share": round(aligned.share, 3),
        "velocity error (RMS)": round(float(aligned.values["error"].mean()) / aligned.weight, 3),
        "PSNR (dB): Direct-Align": with_ends(aligned.interval("psnr"), 1),
        "one-step": with_ends(predicted.interval("psnr"), 1),
        "difference": with_ends(aligned.interval("psnr", predicted), 1),
        "content: Direct-Align": with_ends(aligned.interval("content"), 2),
        "content: one-step": with_ends(predicted.interval("content"), 2),
        "content: difference": with_ends(aligned.interval("content", predicted), 2),
        "look: Direct-Align": round(float(aligned.values["look"].mean()), 2),
        "look: one-step": round(float(predicted.values["look"].mean()), 2),
    }


def length_row(ways: Sequence[Recovered]) -> dict[str, Any]:
    """Steps of several lengths at one level, the last of them one-step prediction."""
    row: dict[str, Any] = {"sigma": ways[0].sigma}
    for found in ways:
        name = "one-step" if found.length is None else f"step of {found.length:.3g}"
        psnr_mean, content = (float(found.values[key].mean()) for key in ("psnr", "content"))
        row[name] = f"{psnr_mean:.1f} dB, content {content:.2f}, {found.share:.0%} predicted"
    return row


def recovery_picture(bench: Bench, pairs: Sequence[tuple[Recovered, Recovered]]) -> Image.Image:
    """A column per level, after the rollout's own; for each prompt a row of Direct-Align and one of one-step."""
    chosen = [pairs[round(i)] for i in np.linspace(0, len(pairs) - 1, min(PICTURE_LEVELS, len(pairs)))]
    originals = bench.images[0][:PICTURE_PROMPTS].cpu()
    prompts = bench.rollouts[0].prompts.prompts
    height, width = originals.shape[-2:]
    side, top, line, gap = 92, 26, 22, 2
    block = line + 2 * (height + gap)
    sheet = Image.new("RGB", (side + (1 + len(chosen)) * (width + gap), top + len(originals) * block), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, text in enumerate(["rollout", *(f"sigma {aligned.sigma:g}" for aligned, _ in chosen)]):
        draw.text((side + column * (width + gap) + width // 2, 5), text, fill="black", font=font, anchor="ma")
    for i, original in enumerate(originals):
        y = top + i * block
        draw.text((side, y + 2), prompts[i], fill="#444444", font=font)
        for row, text in enumerate(("Direct-\nAlign", "one-step")):
            row_top = y + line + row * (height + gap)
            draw.text((6, row_top + height // 2 - 14), text, fill="black", font=font)
            for column, image in enumerate([original, *(pair[row].images[i] for pair in chosen)]):
                sheet.paste(to_pil(image), (side + column * (width + gap), row_top))
    return sheet


def align_finding(bench: Bench, pairs: Sequence[tuple[Recovered, Recovered]], config: RunConfig) -> str:
    """What the table says, and what it can't say."""
    own = bench.of_rollouts()
    aligned, predicted = min(pairs, key=lambda pair: abs(pair[0].sigma - 0.95))
    ahead = [pair[0].sigma for pair in pairs if pair[0].interval("psnr", pair[1]).low > 0]
    keeps = [pair[0].sigma for pair in pairs if pair[0].interval("content", pair[1]).low > 0]
    loses = [pair[0].sigma for pair in pairs if bootstrap_ci(pair[0].values["content"] - own["content"]).high < 0]
    return (
        f"{len(own['look'])} held-out prompts, rollouts of {ROLLOUT_STEPS} steps at guidance"
        f" {config.rollout.guidance:g} (content {own['content'].mean():.2f}, look {own['look'].mean():.2f}); their own"
        f" noise put back, one model call at guidance {bench.guidance:g} for either way; means and 95 % intervals over"
        f" prompts. At sigma {aligned.sigma:g} Direct-Align comes back to {aligned.values['psnr'].mean():.1f} dB with"
        f" content {aligned.values['content'].mean():.2f}, one-step prediction to {predicted.values['psnr'].mean():.1f}"
        f" dB with content {predicted.values['content'].mean():.2f}. The interval of the paired difference lies above 0"
        f" in PSNR at {len(ahead)} of {len(pairs)} levels, in content at {_levels(keeps)}. Below the rollouts' own"
        f" content Direct-Align lies at {_levels(loses)}. Both ways use the same velocity, so much of this is"
        f" arithmetic: Direct-Align's latents are exactly a mix of the known clean ones and of the one-step prediction,"
        f" with the share of prediction in the table ({aligned.share:.0%} at sigma {aligned.sigma:g}), and so is its"
        " error in the latents. It shows no better prediction; it shows that a reward reads a nearly undamaged picture"
        " while the gradient still goes through a call at that level."
    )


def _levels(sigmas: Sequence[float]) -> str:
    return "sigma " + ", ".join(f"{sigma:g}" for sigma in sigmas) if sigmas else "none"


def _record(found: Recovered) -> dict[str, Any]:
    values = {name: array.tolist() for name, array in found.values.items()}
    return {"sigma": found.sigma, "length": found.length, "weight": found.weight, "share": found.share, **values}


def check_align(
    preset: str, overrides: Sequence[str], out: Path, count: int, levels: Sequence[float], guidance: float | None = None
) -> list[dict[str, Any]]:
    """Measure both ways at every level; align.png and align.json in `out`; the claims."""
    config = load_run(preset, overrides)
    length = training_length(config)
    if not all(length < sigma < 1 for sigma in levels):
        raise ConfigError(f"--levels must lie above the gradient step's length {length:.3g} and below 1, got {levels}")
    bench = make_bench(config, count, guidance)
    table: list[list[Recovered]] = []
    for sigma in levels:
        lengths = [length, *(longer for longer in LONGER if longer < sigma), None]
        table.append([bench.recover(sigma, one) for one in lengths])
        print(f"align: sigma {sigma:g} done", flush=True)
    pairs = [(ways[0], ways[-1]) for ways in table]
    out.mkdir(parents=True, exist_ok=True)
    recovery_picture(bench, pairs).save(out / "align.png")
    record = {"prompts": [prompt for clean in bench.rollouts for prompt in clean.prompts.prompts]}
    record |= {"guidance": bench.guidance, "rollouts": {k: v.tolist() for k, v in bench.of_rollouts().items()}}
    record |= {"recovered": [_record(found) for ways in table for found in ways]}
    write_atomic(out / "align.json", json.dumps(record, indent=1))
    return [
        {
            "name": "align",
            "title": "Direct-Align against one-step prediction, one model call each",
            "finding": align_finding(bench, pairs, config),
            "rows": [level_row(*pair) for pair in pairs],
            "image": "align.png",
        },
        {
            "name": "align-lengths",
            "title": "Direct-Align with longer steps",
            "finding": "The longer the step, the more of the recovered picture is the model's prediction: a step all"
            f" the way is one-step prediction. Training uses steps of {length:.3g}.",
            "rows": [length_row(ways) for ways in table],
        },
    ]
