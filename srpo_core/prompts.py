"""Prompts of a run: read from a file or the family's own, shuffled epoch by epoch, encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from srpo_core.config import ConfigError
from srpo_core.interfaces import PromptBatch, TextEncoder
from srpo_core.randomness import generator_for


def read_prompts(value: str, setting: str, builtin: Sequence[str] = ()) -> list[str]:
    """A text file's lines that aren't blank, or `builtin` where `value` says so. ConfigError if there are none."""
    if value == "builtin":
        if not builtin:
            raise ConfigError(
                f"{setting}=builtin: this model family brings no prompts; name a text file, a prompt per line"
            )
        return list(builtin)
    path = Path(value)
    if not path.is_file():
        raise ConfigError(f"{setting}={value!r}: no such file; it must hold a prompt per line")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}={value!r} can't be read as UTF-8 text: {error}") from error
    if not prompts:
        raise ConfigError(f"{setting}={value!r} holds no prompts; write one per line")
    return prompts


def without_held_out(prompts: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """`prompts` less those that are held out. ConfigError if that leaves none."""
    without = set(held_out)
    kept = [prompt for prompt in prompts if prompt not in without]
    if not kept:
        raise ConfigError("data.prompts: every prompt is also in data.eval_prompts, so none is left to train on")
    return kept


def shuffled_order(seed: int, count: int, length: int) -> list[int]:
    """Which of `count` prompts stands at each of the first `length` positions: epochs, each shuffled anew."""
    order: list[int] = []
    for epoch in range(-(-length // count)):
        order += torch.randperm(count, generator=generator_for(seed, epoch, 0, "prompt order")).tolist()
    return order[:length]


@torch.no_grad()
def encode(text_encoder: TextEncoder, prompts: Sequence[str], batch_size: int = 16) -> PromptBatch:
    """All prompts in one PromptBatch on the CPU, encoded batch_size at a time."""
    parts = [
        text_encoder(prompts[start : start + batch_size]).to("cpu") for start in range(0, len(prompts), batch_size)
    ]
    embeds = {name: torch.cat([part.embeds[name] for part in parts]) for name in parts[0].embeds}
    return PromptBatch(tuple(prompts), embeds)


@dataclass(frozen=True)
class PromptSequence:
    """The training prompts that a run visits, in order: position 0 is the first sample of the first step.

    `encoded` holds each visited prompt once, on the CPU; `rows` maps positions to its rows.
    """

    encoded: PromptBatch
    rows: Sequence[int]
    sources: Sequence[Path] | None = None
    """The photo of each row of `encoded`, where a run trains on photos."""

    def at(self, position: int, count: int) -> tuple[PromptBatch, list[Path]]:
        """The `count` prompts from `position` on, and their photos (none without photos)."""
        rows = self.rows[position : position + count]
        return self.encoded.select(rows), [self.sources[row] for row in rows] if self.sources is not None else []


def prompt_sequence(
    text_encoder: TextEncoder, prompts: Sequence[str], seed: int, length: int, photos: Sequence[Path] | None = None
) -> PromptSequence:
    """The first `length` positions of the shuffled epochs over `prompts`; `photos`, if any, are theirs one by one."""
    order = shuffled_order(seed, len(prompts), length)
    visited = list(dict.fromkeys(order))
    row_of = {index: row for row, index in enumerate(visited)}
    encoded = encode(text_encoder, [prompts[index] for index in visited])
    return PromptSequence(
        encoded, [row_of[index] for index in order], None if photos is None else [photos[index] for index in visited]
    )
