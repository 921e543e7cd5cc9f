"""What Direct-Align's training sees at chosen levels, beside what the model predicts there in one step.

A level is the noisier end of a gradient step: a denoise step starts there, an inversion step ends there, so one level
means the same stretch of the trajectory in both branches, and a training range never reaches above its highest level.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srpo_core.align import AlignStep, Branch, recovered
from srpo_core.columns import require_finite
from srpo_core.config import AlignConfig, ConfigError, RolloutConfig
from srpo_core.flow import add_noise, euler_step, per_sample, shifted_sigmas
from srpo_core.interfaces import Autoencoder, FlowModel, Reward
from srpo_core.rollout import Rollout

MOST_LEVELS = 24
"""Levels in one view: each costs a model call, two decoded pictures and a column of the grid."""
CLEAN, LOST = 30.0, 20.0
"""PSNR in dB from which a picture counts as clean, and below which as lost."""
WAYS = ("recovered", "one_step")
"""Both ways to a clean picture: names of LevelView's fields."""


@dataclass(frozen=True)
class Entry:
    """An entry of the schedule that align.range_start and align.range_end count, and its level."""

    index: int
    sigma: float


@dataclass(frozen=True)
class Way:
    """Pictures [B, 3, H, W] in [0, 1], on the CPU, and what they are worth: a number per picture."""

    images: Tensor
    psnr: list[float]
    """Against the clean pictures, in dB; 100 at most."""
    detail: list[float]
    """Share of the clean pictures' edges that are in place."""
    reward: list[float] | None
    """None without a reward."""


@dataclass(frozen=True)
class LevelView:
    """One level: the step that is taken there, and both ways to a clean picture."""

    level: float
    step: AlignStep
    recovered: Way
    one_step: Way

    @property
    def entry(self) -> Entry:
        """The nearest entry of the schedule."""
        return nearest_entry(self.level)

    @property
    def share(self) -> float:
        """Part of the recovered latents that the model predicts; the rest is the known clean picture.

        |d recovered / d velocity| as a part of sigma, which it is in one-step prediction. Above 1 the model's error
        counts more than there.
        """
        weight = abs(self.step.sigma_next - self.step.sigma) / (1 - self.step.sigma_next)
        return weight / self.step.sigma


@dataclass(frozen=True)
class AlignView:
    """The clean pictures and every level, high to low."""

    clean: Way
    levels: list[LevelView]
    branch: Branch
    prompts: tuple[str, ...]

    def images(self, way: str) -> Tensor:
        """All pictures of one of WAYS, [levels * B, 3, H, W], level by level."""
        return torch.cat([getattr(level, way).images for level in self.levels])


def read_levels(text: str) -> list[float]:
    """Levels in (0, 1], separated by commas, spaces or lines, as a list from high to low without repetitions.

    ConfigError names the first that is none.
    """
    words = re.split(r"[,;\s]+", text.strip(" ,;\n\t"))
    levels = []
    for word in filter(None, words):
        try:
            level = float(word)
        except ValueError:
            level = -1.0
        if not 0 < level <= 1:
            raise ConfigError(f"levels: {word!r} is no level; levels are numbers above 0 and up to 1, such as 0.96")
        levels.append(level)
    levels = sorted(set(levels), reverse=True)
    if not levels:
        raise ConfigError("levels is empty; write one or more numbers above 0 and up to 1, such as 0.96, 0.75")
    if len(levels) > MOST_LEVELS:
        raise ConfigError(f"levels: {len(levels)} are too many for one view; {MOST_LEVELS} at most")
    return levels


def step_below(level: float, length: float, branch: Branch) -> AlignStep:
    """The branch's step over [level - length, level]; ConfigError where there is none."""
    low = level - length
    if length <= 0 or low <= 0:
        raise ConfigError(
            f"levels: a step of {length:g} doesn't fit below level {level:g}; take levels above the step, or a smaller"
            " step above 0"
        )
    if branch == "denoise":
        return AlignStep(level, low, 0.0)
    if level >= 1:
        raise ConfigError(
            "levels: an inversion step can't end at level 1, where nothing of the picture is left; take levels below 1"
        )
    return AlignStep(low, level, 0.0)


def schedule() -> Tensor:
    """The schedule that training's range counts, by default: [schedule_steps + 1] from 1 to 0."""
    return shifted_sigmas(_default(AlignConfig, "schedule_steps"), _default(RolloutConfig, "shift"))


def nearest_entry(level: float) -> Entry:
    """The entry of `schedule` whose level is nearest; never 0 or the last, which no range could use to train."""
    sigmas = schedule()
    index = int((sigmas - level).abs()[:-1].argmin())
    return Entry(index, float(sigmas[index]))


def default_range() -> tuple[Entry, Entry]:
    """The entries between which training goes unless it is told otherwise: the published range."""
    sigmas = schedule()
    ends = (_default(AlignConfig, name) for name in ("range_start", "range_end"))
    return tuple(Entry(index, float(sigmas[index])) for index in ends)


def in_default_range(level: float) -> bool:
    """Whether a level lies in the published training range."""
    start, end = default_range()
    return end.sigma - 1e-6 <= level <= start.sigma + 1e-6


def _default(section: type, field: str) -> int | float:
    return section.model_fields[field].default


@torch.no_grad()
def both_ways(
    flow: FlowModel,
    rollout: Rollout,
    steps: Sequence[AlignStep],
    guidance: float,
    on_level: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents [len(steps), 2, B, C, h, w]: recovered, and predicted in one step, from one model call per step.

    `on_level(levels done)` is called after each.
    """
    found = []
    for done, step in enumerate(steps, start=1):
        latents = add_noise(rollout.clean, rollout.noise, step.sigma)
        velocity = flow.velocity(latents, per_sample(step.sigma, latents), rollout.prompts, guidance)
        one_step = euler_step(latents, velocity, step.sigma, 0.0)
        found.append(torch.stack([recovered(latents, velocity, rollout.noise, step), one_step]))
        if on_level is not None:
            on_level(done)
    return torch.stack(found)


@torch.no_grad()
def align_view(
    autoencoder: Autoencoder,
    rollout: Rollout,
    levels: Sequence[float],
    steps: Sequence[AlignStep],
    latents: Tensor,
    reward: Reward | None = None,
    on_level: Callable[[int], None] | None = None,
) -> AlignView:
    """Decode and measure the latents of `both_ways`, [len(levels), 2, B, C, h, w] in the model's range.

    The reward gets all pictures in one call, on the CPU, with the rollout's prompts. `on_level(levels done)` is called
    after each level is decoded. NotFiniteError if a reward is no finite number.
    """
    pictures = [_decoded(autoencoder, rollout.clean)]
    for done, pair in enumerate(latents, start=1):
        pictures += [_decoded(autoencoder, one) for one in pair]
        if on_level is not None:
            on_level(done)
    prompts = rollout.prompts.prompts
    scores: list[list[float] | None] = [None] * len(pictures)
    if reward is not None:
        values = reward(torch.cat(pictures), prompts * len(pictures)).float()
        numbers = [f"picture {i + 1}" for _ in pictures for i in range(len(prompts))]
        require_finite({"reward": values.tolist()}, numbers)
        scores = values.view(len(pictures), len(prompts)).tolist()
    clean, *ways = (
        Way(images, psnr(images, pictures[0]).tolist(), detail_kept(images, pictures[0]).tolist(), score)
        for images, score in zip(pictures, scores, strict=True)
    )
    pairs = zip(levels, steps, ways[::2], ways[1::2], strict=True)
    branch = "denoise" if steps[0].denoises else "inversion"
    return AlignView(clean, [LevelView(*pair) for pair in pairs], branch, prompts)


def _decoded(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    return autoencoder.decode(latents).float().cpu().clamp(0, 1)


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal to noise of pictures [B, 3, H, W] in [0, 1], [B] in dB; at most 100."""
    return -10 * (images - target).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def detail_kept(images: Tensor, target: Tensor) -> Tensor:
    """Share of the target's edges that pictures [B, 3, H, W] have in the same places, [B].

    The projection of their differences of neighbouring pixels onto the target's: 1 for the same picture, less for a
    blurred one, about 0 for another picture however sharp; more contrast gives more than 1.
    """
    along = [(images.diff(dim=dim), target.diff(dim=dim)) for dim in (-1, -2)]
    common = sum((ours * theirs).sum((1, 2, 3)) for ours, theirs in along)
    return common / sum(theirs.square().sum((1, 2, 3)) for _, theirs in along).clamp(min=1e-12)


def verdict(decibels: float) -> str:
    """A PSNR in a word: clean, soft or lost."""
    return "clean" if decibels >= CLEAN else "soft" if decibels >= LOST else "lost"


def table(view: AlignView) -> tuple[list[str], list[list[int | float]]]:
    """Columns and rows of a view's numbers: a row per level and picture."""
    several, scored = len(view.prompts) > 1, view.clean.reward is not None
    columns = [*(["picture"] if several else []), "level", "entry", "from", "to", "predicted"]
    columns += ["recovered dB", "one step dB", "recovered detail", "one step detail"]
    columns += ["recovered reward", "one step reward"] if scored else []
    rows = []
    for level in view.levels:
        for i in range(len(view.prompts)):
            ways = level.recovered, level.one_step
            row = [i + 1] if several else []
            row += [level.level, level.entry.index, round(level.step.sigma, 6), round(level.step.sigma_next, 6)]
            row += [round(level.share, 4), *(round(way.psnr[i], 2) for way in ways)]
            row += [round(way.detail[i], 4) for way in ways]
            row += [round(way.reward[i], 6) for way in ways if way.reward is not None]
            rows.append(row)
    return columns, rows


def finding(view: AlignView) -> str:
    """In words: where either way gives clean pictures, and which settings make a training range of these levels."""
    clean = {way: [one for one in view.levels if statistics.fmean(getattr(one, way).psnr) >= CLEAN] for way in WAYS}
    start, end = default_range()
    lines = [
        f"Training sees a clean picture ({CLEAN:g} dB and more, mean of the pictures) {_at(clean['recovered'])}.",
        f"One-step prediction gives one {_at(clean['one_step'])}.",
    ]
    if view.clean.reward is not None:
        lines.append(f"The clean pictures' mean reward is {statistics.fmean(view.clean.reward):.4g}.")
    entries = [level.entry.index for level in clean["recovered"]]
    if entries and min(entries) < max(entries):
        settings = f"align.range_start={min(entries)} align.range_end={max(entries)}"
        lines.append(f"As a training range, the levels where training sees a clean picture are {settings}.")
    lines.append(
        f"Entries are of the {len(schedule()) - 1}-step schedule with shift {_default(RolloutConfig, 'shift'):g}; the"
        f" published range for FLUX.1-dev goes from {start.index} (level {start.sigma:.4g}) to {end.index}"
        f" ({end.sigma:.4g})."
    )
    return " ".join(lines)


def _at(levels: Sequence[LevelView]) -> str:
    return "at " + ", ".join(f"{level.level:g}" for level in levels) if levels else "at none of these levels"
