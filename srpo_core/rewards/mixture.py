"""Several rewards in one run: each with its own range, margin and weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from srpo_core.flow import Level
from srpo_core.interfaces import Reward
from srpo_core.preference import hinge_loss, relative_score


@dataclass(frozen=True)
class WeightedReward:
    """A reward, how its values become comparable with others', and its part in the loss.

    A value r counts as (r - offset) * scale; the loss of a score is weight * relu(margin - score).
    """

    name: str
    reward: Reward
    weight: float = 1.0
    margin: float = 0.7
    scale: float = 1.0
    offset: float = 0.0

    def normalised(self, values: Tensor) -> Tensor:
        """(values - offset) * scale."""
        return (values - self.offset) * self.scale

    def score(self, preferred: Tensor, other: Tensor, k: Level) -> Tensor:
        """`relative_score` of the normalised values of two wordings, [B]."""
        return relative_score(preferred - self.offset, other - self.offset, k) * self.scale

    def loss(self, score: Tensor, num_branches: int) -> Tensor:
        """weight * relu(margin - score), as one branch's part of a step's loss."""
        return hinge_loss(score, self.margin, num_branches) * self.weight


class MixedReward:
    """Several rewards as one: sum of weight * (r - offset) * scale over the sum of the weights; a Reward."""

    def __init__(self, rewards: Sequence[WeightedReward]) -> None:
        self.rewards = list(rewards)

    def each(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every reward's own values, by name: images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B] each."""
        return {part.name: part.reward(images, prompts) for part in self.rewards}

    def mix(self, values: Mapping[str, Tensor]) -> Tensor:
        """The mixture of values as `each` returns them."""
        return weighted_mean({part.name: part.normalised(values[part.name]) for part in self.rewards}, self.rewards)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B]."""
        return self.mix(self.each(images, prompts))


def weighted_mean(values: Mapping[str, Tensor], rewards: Sequence[WeightedReward]) -> Tensor:
    """sum of weight * value over the sum of the weights, of one value per reward, by name."""
    first, *more = (values[part.name] * part.weight for part in rewards)
    return sum(more, first) / sum(part.weight for part in rewards)


def combined(rewards: Sequence[WeightedReward]) -> Reward:
    """The rewards as one that previews and scores are made with: a single one as it is, in its own range."""
    return rewards[0].reward if len(rewards) == 1 else MixedReward(rewards)


def blind_notes(rewards: Sequence[WeightedReward], branches: Sequence[str]) -> list[str]:
    """What the user should know of rewards that say `reads_prompts = False`: what training on them does."""
    names = [part.name for part in rewards if not getattr(part.reward, "reads_prompts", True)]
    if not names:
        return []
    undone = (
        ", and the inversion branch takes back what the denoise branch gives (align.branches=[denoise] leaves it out)"
        if "inversion" in branches
        else ""
    )
    return [
        f"warning: prompts are not read by {', '.join(names)}: only the share k of plain reward trains there{undone}"
    ]
