"""Semantic relative preference: a text-conditioned reward made relative by control words (arXiv 2509.06942)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srpo_core.flow import Level, per_sample
from srpo_core.interfaces import Reward


@dataclass(frozen=True)
class ControlWords:
    """Words to move toward and away from; both lists rotate with the optimizer step, each at its own length."""

    liked: Sequence[str]
    disliked: Sequence[str]

    def __post_init__(self) -> None:
        if not self.liked or not self.disliked:
            raise ValueError("control words need at least one liked and one disliked word")

    def pair(self, step: int) -> tuple[str, str]:
        """(liked, disliked) of an optimizer step."""
        return self.liked[step % len(self.liked)], self.disliked[step % len(self.disliked)]


def preferred_and_other(liked: str, disliked: str, denoises: bool) -> tuple[str, str]:
    """(preferred, other) of a branch: inversion turns the gradient around, so there the disliked word is preferred."""
    return (liked, disliked) if denoises else (disliked, liked)


def wording(word: str, prompt: str) -> str:
    """The text a reward reads for `prompt` under a control word."""
    return f"{word}. {prompt}"


def two_wordings(
    reward: Reward, images: Tensor, prompts: Sequence[str], preferred: str, other: str
) -> tuple[Tensor, Tensor]:
    """r of images [B, 3, H, W] in [0, 1] under two wordings of B prompts, preferred and other: two [B], in one call."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
    scores = reward(images, [wording(word, prompt) for word in (preferred, other) for prompt in prompts])
    if scores.shape != (2 * len(prompts),):
        raise ValueError(f"a reward returns a score per text, [{2 * len(prompts)}]; got {list(scores.shape)}")
    return scores[: len(prompts)], scores[len(prompts) :]


def relative_score(preferred_reward: Tensor, other_reward: Tensor, k: Level) -> Tensor:
    """(1 + k) * preferred - other [B]; k, a number or [B], is the share of absolute reward mixed in."""
    return (1 + per_sample(k, preferred_reward)) * preferred_reward - other_reward


def relative_reward(
    reward: Reward, images: Tensor, prompts: Sequence[str], preferred: str, other: str, k: Level
) -> Tensor:
    """`relative_score` of images [B, 3, H, W] in [0, 1] for B prompts under two control words, [B]."""
    return relative_score(*two_wordings(reward, images, prompts, preferred, other), k)


def liked_less_disliked(by_word: Mapping[str, Tensor], words: ControlWords) -> Tensor:
    """Mean of r over the liked wordings less that over the disliked ones, [B]."""
    liked, disliked = (torch.stack([by_word[word] for word in side]).mean(0) for side in (words.liked, words.disliked))
    return liked - disliked


def hinge_loss(score: Tensor, margin: float, num_branches: int) -> Tensor:
    """relu(margin - score) averaged over the batch, as one of `num_branches` branches' part of a step's loss."""
    return torch.relu(margin - score).mean() / num_branches
