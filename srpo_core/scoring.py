"""Scores of picture files: absolute reward, relative reward, and the reward under each control word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from srpo_core.columns import means, require_finite, score_columns
from srpo_core.config import ModelConfig, ParallelConfig, RewardConfig
from srpo_core.description import make_config
from srpo_core.devices import make_world
from srpo_core.models import load_model
from srpo_core.preference import ControlWords
from srpo_core.progress import Display
from srpo_core.rewards import check_reward, load_reward
from srpo_core.score_files import PromptedPicture, load_image

OFFICIAL_FIT = {"hpsv2": "pad"}
"""How pictures fit a reward in the scoring of its authors, where that is not their centre square."""
Row = dict[str, Any]
"""file, prompt, then the columns of columns.py."""


def reward_settings(config: RewardConfig, chosen: dict[str, Any]) -> RewardConfig:
    """A source's reward with what the user chose instead; unless chosen, pictures fit it as in its official scoring.

    Another reward than the source's takes its control words alone: no weights, no contrast, no rewards to mix with.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    data = config.model_dump()
    if given.get("name", config.name) != config.name:
        given.setdefault("path", None)
        data |= {"more": [], "contrast": RewardConfig().contrast}
    data |= given
    for one in (data, *data["more"]):
        one["fit"] = given.get("fit") or OFFICIAL_FIT.get(one["name"], "crop")
    return make_config({"reward": data}).reward


@torch.no_grad()
def score_pictures(
    pictures: Sequence[PromptedPicture],
    settings: RewardConfig,
    model: ModelConfig | None = None,
    device_name: str = "auto",
    batch_size: int = 8,
    on_image: Callable[[PromptedPicture, Tensor], None] | None = None,
    display: Display | None = None,
) -> list[Row]:
    """A row of scores per picture; with the held-out measures of a model family where `model` is given.

    `on_image` gets every picture as it was read, [3, H, W] in [0, 1]; `display` counts them. NotFiniteError for a score
    that is no finite number.
    """
    check_reward(settings)
    device = make_world(ParallelConfig(device=device_name), "--device").device
    reward = load_reward(settings, device)
    words = ControlWords(settings.liked, settings.disliked)
    measures = load_model(model, device).measures if model is not None else {}
    if display is not None:
        display.phase("scoring", len(pictures))
    rows: list[Row] = []
    for batch in _batches(pictures, batch_size):
        images = torch.stack([image for _, image in batch]).to(device)
        prompts = [picture.prompt for picture, _ in batch]
        columns = score_columns(reward, images, prompts, words, settings.contrast, measures)
        numbers = {name: values.tolist() for name, values in columns.items()}
        require_finite(numbers, [str(picture.path) for picture, _ in batch])
        for i, (picture, image) in enumerate(batch):
            scores = {name: values[i] for name, values in numbers.items()}
            rows.append({"file": str(picture.path), "prompt": picture.prompt, **scores})
            if on_image is not None:
                on_image(picture, image)
            if display is not None:
                display.advance(len(rows))
    return rows


def _batches(pictures: Sequence[PromptedPicture], batch_size: int) -> Iterator[list[tuple[PromptedPicture, Tensor]]]:
    """Pictures with their images, in order, neighbours of one size together; read when it is their turn."""
    batch: list[tuple[PromptedPicture, Tensor]] = []
    for picture in pictures:
        image = load_image(picture.path)
        if batch and (len(batch) == batch_size or batch[0][1].shape != image.shape):
            yield batch
            batch = []
        batch.append((picture, image))
    if batch:
        yield batch


def score_names(rows: Sequence[Row]) -> list[str]:
    """The names of the scores, in order."""
    return [name for name in rows[0] if name not in ("file", "prompt")]


def row_means(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of each score over all pictures."""
    return means({name: [row[name] for row in rows] for name in score_names(rows)})
