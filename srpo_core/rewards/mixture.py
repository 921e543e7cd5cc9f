"""Several rewards in one run: each with its own range, margin and weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from srpo_core.flow import Level
from srpo_core.interfaces import Reward
from srpo_core.preference import hinge_loss, relative_score

USUAL = {
    "hpsv2": (0.20, 0.35),
    "pickscore": (19.0, 24.0),
    "imagereward": (-2.0, 2.0),
    "clip": (0.15, 0.40),
    "aesthetic": (4.0, 7.0),
    "miniature": (0.0, 0.85),
}
"""Where the values of most pictures lie, by the reward's name: those of poor ones to those of very good ones."""


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
        self.module = nn.ModuleList([part.reward.module for part in rewards if hasattr(part.reward, "module")])

    def each(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every reward's own values, by name: images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B] each."""
        return {part.name: part.reward(images, prompts) for part in self.rewards}

    def mix(self, values: Mapping[str, Tensor]) -> Tensor:
        """The mixture of values as `each` returns them."""
        return weighted_mean({part.name: part.normalised(values[part.name]) for part in self.rewards}, self.rewards)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B]."""
        return self.mix(self.each(images, prompts))


def comparable(part: WeightedReward) -> WeightedReward:
    """The reward on a scale where its usual values, as far as they are known, are 0 to 1."""
    low, high = USUAL.get(base_name(part.name), (0.0, 1.0))
    return replace(part, offset=low, scale=1 / (high - low))


def base_name(name: str) -> str:
    """A reward's name without the number that a second of its kind has: hpsv2 of hpsv2#2."""
    return name.split("#")[0]


def numbered(name: str, others: Sequence[WeightedReward]) -> str:
    """A name of its own beside others: hpsv2, then hpsv2#2."""
    count = sum(base_name(other.name) == name for other in others)
    return f"{name}#{count + 1}" if count else name


def joined(mixtures: Sequence[tuple[Sequence[WeightedReward], float]]) -> list[WeightedReward]:
    """The parts of one mixture of mixtures, each of which as a whole has the weight that stands beside it.

    A weight of 0 leaves a mixture out. ValueError if nothing is left, or if a weight is negative.
    """
    if any(weight < 0 for _, weight in mixtures):
        raise ValueError("weights of a mixture are 0 or more")
    parts: list[WeightedReward] = []
    for rewards, weight in mixtures:
        whole = sum(part.weight for part in rewards)
        for part in rewards if weight else ():
            name = numbered(base_name(part.name), parts)
            parts.append(replace(part, name=name, weight=weight * part.weight / whole))
    if not parts:
        raise ValueError("all weights of the mixture are 0")
    return parts


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
