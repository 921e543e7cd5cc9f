"""What is reported of pictures, a number each by name: rewards, relative rewards, rewards by wording, measures.

"reward"           r of the plain prompt
"reward:<name>"    each reward's own value, where several are mixed
"relative"         mean of r over the liked wordings less that over the disliked
"sgp"              r of the prompt as a realistic picture less r of it as an artificial one (arXiv 2509.06942)
"word:<word>"      r of the prompt worded with a control word
and a family's measures under their own names.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from srpo_core.errors import NotFiniteError
from srpo_core.interfaces import Measure, Reward
from srpo_core.preference import ControlWords, liked_less_disliked, wording

Scores = dict[str, list[float]]
"""By name: a number per picture."""
Row = list[str | int | float | None]
"""A row of a table that is shown."""
WORD, PART = "word:", "reward:"
"""How the names of columns begin that belong to one control word or to one reward of a mixture."""


@torch.no_grad()
def score_columns(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    words: ControlWords | None,
    contrast: tuple[str, str] | None = None,
    measures: Mapping[str, Measure] | None = None,
) -> dict[str, Tensor]:
    """Every column of images [B, 3, H, W] in [0, 1] for B prompts, each [B]; the reward is called once.

    Without `words` there are no columns of them: neither "relative" nor "word:<word>".
    """
    every = list(dict.fromkeys([*words.liked, *words.disliked])) if words is not None else []
    asked = list(dict.fromkeys([*every, *(contrast or ())]))
    texts = [*prompts, *(wording(word, prompt) for word in asked for prompt in prompts)]
    parts = reward.each(images, texts) if hasattr(reward, "each") else {}
    values = reward.mix(parts) if parts else reward(images, texts)
    plain, *worded = values.float().view(len(asked) + 1, len(prompts))
    by_word = dict(zip(asked, worded, strict=True))
    columns = {"reward": plain}
    columns |= {f"{PART}{name}": part.float()[: len(prompts)] for name, part in parts.items()}
    if words is not None:
        columns["relative"] = liked_less_disliked(by_word, words)
    if contrast is not None:
        columns["sgp"] = by_word[contrast[0]] - by_word[contrast[1]]
    columns |= {f"{WORD}{word}": by_word[word] for word in every}
    return columns | {name: measure(images, prompts).float() for name, measure in (measures or {}).items()}


def is_detail(name: str) -> bool:
    """Whether a column is a part of another: one word's, or one reward's of a mixture."""
    return ":" in name or "/" in name


def require_finite(scores: Mapping[str, Sequence[float]], pictures: Sequence[str]) -> None:
    """NotFiniteError names the first of `pictures` with a score that is no finite number."""
    for i, picture in enumerate(pictures):
        for name, values in scores.items():
            if not math.isfinite(values[i]):
                raise NotFiniteError(f"{picture}: its {name} is no finite number (NaN or infinite)")


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each score over its pictures."""
    return {name: statistics.fmean(values) for name, values in scores.items()}
