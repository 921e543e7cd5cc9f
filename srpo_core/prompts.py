"""Prompts of a run: read from files or the family's own, shuffled epoch by epoch, encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from srpo_core.config import ConfigError
from srpo_core.embeddings import EmbeddingCache, StoredPrompts, encode
from srpo_core.interfaces import PromptBatch, TextEncoder
from srpo_core.progress import Display
from srpo_core.prompt_files import FORMS, read_prompt_files
from srpo_core.randomness import generator_for


def read_prompts(value: str, setting: str, builtin: Sequence[str] = (), column: str | None = None) -> list[str]:
    """The prompts of a file or folder (see prompt_files), or `builtin` where `value` says so. ConfigError if none.

    `column` names a table's column of prompts.
    """
    if value == "builtin":
        if not builtin:
            raise ConfigError(f"{setting}=builtin: this model family brings no prompts; name {FORMS}")
        return list(builtin)
    return read_prompt_files(value, setting, column)


def without_held_out(prompts: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """`prompts` less those that are held out. ConfigError if that leaves none."""
    without = set(held_out)
    kept = [prompt for prompt in prompts if prompt not in without]
    if not kept:
        raise ConfigError(
            "data.prompts: every prompt is also in data.eval_prompts, so none is left to train on; name others there"
        )
    return kept


def shuffled_order(seed: int, count: int, length: int) -> list[int]:
    """Which of `count` prompts stands at each of the first `length` positions: epochs, each shuffled anew."""
    order: list[int] = []
    for epoch in range(-(-length // count)):
        order += torch.randperm(count, generator=generator_for(seed, epoch, 0, "prompt order")).tolist()
    return order[:length]


@dataclass(frozen=True)
class PromptSequence:
    """The training prompts that a run visits, in order: position 0 is the first sample of the first step.

    `encoded` holds each visited prompt once, on the CPU or on disk; `rows` maps positions to its rows.
    """

    encoded: PromptBatch | StoredPrompts
    rows: Sequence[int]

    def at(self, position: int, count: int) -> PromptBatch:
        """The `count` prompts from `position` on."""
        return self.encoded.select(self.rows[position : position + count])


def prompt_sequence(
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    seed: int,
    length: int,
    cache: EmbeddingCache | None = None,
    display: Display | None = None,
) -> PromptSequence:
    """The first `length` positions of the shuffled epochs over `prompts`."""
    return ordered_sequence(text_encoder, prompts, shuffled_order(seed, len(prompts), length), cache, display)


def ordered_sequence(
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    order: Sequence[int],
    cache: EmbeddingCache | None = None,
    display: Display | None = None,
) -> PromptSequence:
    """The prompts whose indices `order` lists; only those are encoded, each once. See `encode` for the rest."""
    visited = list(dict.fromkeys(order))
    row_of = {index: row for row, index in enumerate(visited)}
    encoded = encode(text_encoder, [prompts[index] for index in visited], cache=cache, display=display)
    return PromptSequence(encoded, [row_of[index] for index in order])
