"""What a step's branches came to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srpo_core.align import AlignStep
from srpo_core.rewards.mixture import WeightedReward, weighted_mean


class Tally:
    """Sums up a step's branches."""

    def __init__(self, rewards: Sequence[WeightedReward]) -> None:
        self.parts = rewards
        self.loss: list[Tensor] = []
        self.score: dict[str, list[Tensor]] = defaultdict(list)
        self.reward: dict[str, list[Tensor]] = defaultdict(list)
        self.scores: dict[str, dict[str, list[Tensor]]] = {part.name: defaultdict(list) for part in rewards}
        self.rewards: dict[str, dict[str, list[Tensor]]] = {part.name: defaultdict(list) for part in rewards}
        self.sigma: list[Tensor] = []
        self.source: dict[str, int] = defaultdict(int)

    def add(
        self, branch: str, loss: Tensor, scores: dict[str, Tensor], preferred: dict[str, Tensor], align_step: AlignStep
    ) -> None:
        """A branch's loss, and by reward its scores and the preferred wording's values, each [B], no gradient."""
        self.loss.append(loss.detach())
        if len(self.parts) == 1:
            (score,), (value,) = scores.values(), preferred.values()
        else:
            score = weighted_mean(scores, self.parts)
            value = weighted_mean({part.name: part.normalised(preferred[part.name]) for part in self.parts}, self.parts)
        self.score[branch].append(score)
        self.reward[branch].append(value)
        for part in self.parts:
            self.scores[part.name][branch].append(scores[part.name])
            self.rewards[part.name][branch].append(preferred[part.name])
        self.sigma.append(torch.as_tensor(align_step.sigma))

    def summary(self) -> dict[str, Any]:
        """Means by branch, sums of losses, and where the pictures came from: fields of StepMetrics."""

        def mean(values: list[Tensor]) -> float:
            return float(torch.stack(values).float().mean())

        def by_branch(values: dict[str, list[Tensor]]) -> dict[str, float]:
            return {branch: mean(each) for branch, each in values.items()}

        by_reward = {"scores": self.scores, "rewards": self.rewards} if len(self.parts) > 1 else {}
        return {
            "loss": float(torch.stack(self.loss).sum()),
            "score": by_branch(self.score),
            "reward": by_branch(self.reward),
            **{key: {name: by_branch(each) for name, each in of.items()} for key, of in by_reward.items()},
            "sigma": mean(self.sigma),
            "source": dict(self.source),
        }
