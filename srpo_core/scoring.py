"""Scores of picture files: absolute reward, relative reward, and the reward under each control word."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from srpo_core.config import ConfigError, ModelConfig, RewardConfig
from srpo_core.description import make_config
from srpo_core.files import write_atomic
from srpo_core.interfaces import Measure, Reward
from srpo_core.models import load_model
from srpo_core.parallel import choose_device
from srpo_core.preference import ControlWords, liked_less_disliked, rewards_by_word
from srpo_core.prompts import read_prompts
from srpo_core.rewards import load_reward

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
Row = dict[str, Any]
"""file, prompt, reward, relative, then the reward under each word ("word:Detail") and measures by name."""


@dataclass(frozen=True)
class PromptedPicture:
    """A picture file and the prompt that it is scored for."""

    path: Path
    prompt: str


def reward_settings(config: RewardConfig, chosen: dict[str, Any]) -> RewardConfig:
    """A source's reward with what the user chose instead; another reward than the source's takes no weights from it."""
    given = {name: value for name, value in chosen.items() if value is not None}
    if given.get("name", config.name) != config.name:
        given.setdefault("path", None)
    return make_config({"reward": {**config.model_dump(), **given}}).reward


def find_pictures(paths: Sequence[Path], prompts_file: Path | None = None) -> list[PromptedPicture]:
    """The picture files in `paths` (folders are searched, not their subfolders), each with its prompt.

    Prompts are the lines of `prompts_file`, for the files in order; else the text file beside a picture, else the PNG's
    own "prompt". ConfigError names what is missing.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
            )
            if not inside:
                raise ConfigError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    if prompts_file is None:
        return [PromptedPicture(file, _own_prompt(file)) for file in files]
    prompts = read_prompts(str(prompts_file), "--prompts")
    if len(prompts) != len(files):
        raise ConfigError(f"--prompts {prompts_file} holds {len(prompts)} prompts for {len(files)} pictures")
    return [PromptedPicture(file, prompt) for file, prompt in zip(files, prompts, strict=True)]


def _own_prompt(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            prompt = " ".join(beside.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{beside} can't be read as UTF-8 text: {error}") from error
        if not prompt:
            raise ConfigError(f"{beside} is empty; it must hold the prompt of {path.name}")
        return prompt
    with _opened(path) as image:
        prompt = str(image.info.get("prompt", "")).strip()
    if not prompt:
        raise ConfigError(f"{path} has no prompt: write one to {beside.name} beside it, or give --prompts FILE")
    if _is_graph(prompt):
        raise ConfigError(
            f"{path} holds a ComfyUI graph instead of a prompt: write the prompt to {beside.name} beside it, or give"
            " --prompts FILE"
        )
    return prompt


def _is_graph(prompt: str) -> bool:
    """Whether it is what ComfyUI writes to a PNG's "prompt": a JSON object of nodes."""
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(prompt), dict)
    return False


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} is no readable picture: {error}") from error


def load_image(path: Path) -> Tensor:
    """A picture file as [3, H, W] in [0, 1], upright. ConfigError if it can't be read to its end."""
    with _opened(path) as image:
        try:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{path} is no readable picture: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@torch.no_grad()
def score_pictures(
    pictures: Sequence[PromptedPicture],
    settings: RewardConfig,
    model: ModelConfig | None = None,
    device_name: str = "auto",
    batch_size: int = 8,
) -> list[Row]:
    """A row of scores per picture; with the held-out measures of a model family where `model` is given."""
    device = choose_device(device_name)
    reward = load_reward(settings, device)
    measures = load_model(model, device).measures if model is not None else {}
    rows = []
    for batch in _batches(pictures, batch_size):
        images = torch.stack([image for _, image in batch]).to(device)
        rows += _score_batch([picture for picture, _ in batch], images, reward, settings, measures)
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


def _score_batch(
    pictures: Sequence[PromptedPicture],
    images: Tensor,
    reward: Reward,
    settings: RewardConfig,
    measures: dict[str, Measure],
) -> list[Row]:
    prompts = [picture.prompt for picture in pictures]
    words = ControlWords(settings.liked, settings.disliked)
    plain, by_word = rewards_by_word(reward, images, prompts, words)
    columns = {"reward": plain.cpu(), "relative": liked_less_disliked(by_word, words).cpu()}
    columns |= {f"word:{word}": values.cpu() for word, values in by_word.items()}
    columns |= {name: measure(images, prompts).float().cpu() for name, measure in measures.items()}
    return [
        {"file": str(picture.path), "prompt": picture.prompt, **{name: float(v[i]) for name, v in columns.items()}}
        for i, picture in enumerate(pictures)
    ]


def means(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of each score over all pictures."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name not in ("file", "prompt")}


def write_tables(rows: Sequence[Row], settings: RewardConfig, out: Path) -> tuple[Path, Path]:
    """Write `out`.csv (a line per picture) and `out`.json (settings, means and rows)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table, record = out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.json")
    write_atomic(table, text.getvalue())
    data = {"reward": settings.model_dump(), "count": len(rows), "mean": means(rows), "pictures": list(rows)}
    write_atomic(record, json.dumps(data, indent=1, ensure_ascii=False))
    return table, record


def print_table(rows: Sequence[Row], most: int = 20) -> None:
    """Rows and their means on the terminal; control words as means below."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    average = means(rows)
    columns = [name for name in average if not name.startswith("word:")]
    table = Table(show_footer=len(rows) > 1)
    table.add_column("picture", footer=f"mean of {len(rows)}", overflow="fold")
    table.add_column("prompt", max_width=44, overflow="ellipsis", no_wrap=True)
    for name in columns:
        table.add_column(name, footer=f"{average[name]:.4f}", justify="right")
    for row in rows[:most]:
        table.add_row(escape(Path(row["file"]).name), escape(row["prompt"]), *(f"{row[name]:.4f}" for name in columns))
    console = Console()
    console.print(table)
    if len(rows) > most:
        console.print(f"... and {len(rows) - most} more; all of them are in the files below.")
    words = {name.removeprefix("word:"): value for name, value in average.items() if name.startswith("word:")}
    listed = ", ".join(f"{word} {value:.4f}" for word, value in words.items())
    console.print(f"Mean reward by control word: {listed}", markup=False, highlight=False)
