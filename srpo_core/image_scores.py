"""Scores of pictures in memory: which prompt each is scored for, the numbers, and the tables that show them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from srpo_core.columns import PART, WORD, Row, Scores, require_finite, score_columns
from srpo_core.config import ConfigError
from srpo_core.interfaces import Reward
from srpo_core.preference import ControlWords
from srpo_core.rewards.mixture import MixedReward


def prompts_for(text: str, count: int, one_per_line: bool) -> list[str]:
    """The prompts of `count` pictures: the whole text for each, or a line for each; a single line serves them all.

    Lines without text don't count; no text at all is an empty prompt for each. ConfigError for another number of lines.
    """
    if not one_per_line or not text.strip():
        return [text.strip()] * count
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) not in (1, count):
        raise ConfigError(
            f"prompt: {len(lines)} lines for {count} pictures; one_prompt_per_line needs a line for each picture, or"
            " one line for all. Switch it off if the prompt is one text of several lines"
        )
    return lines * count if len(lines) == 1 else lines


def reads_prompts(reward: Reward) -> bool:
    """Whether a reward, or any of a mixture, looks at the text and not at the picture alone."""
    if isinstance(reward, MixedReward):
        return any(reads_prompts(part.reward) for part in reward.rewards)
    return getattr(reward, "reads_prompts", True)


def control_words(liked: Sequence[str], disliked: Sequence[str]) -> ControlWords:
    """ConfigError for a side without words."""
    for name, side in (("liked", liked), ("disliked", disliked)):
        if not side:
            raise ConfigError(f"{name}: no words; write at least one, with commas or lines between several")
    return ControlWords(tuple(liked), tuple(disliked))


def score_batch(reward: Reward, images: Tensor, prompts: Sequence[str], words: ControlWords | None = None) -> Scores:
    """Scores of images [n, 3, H, W] in [0, 1] for n prompts, as columns.py names them; with `words` the relative ones.

    The reward is called once. ConfigError where scores would mean nothing: see `check_prompts`. NotFiniteError for a
    score that is no finite number.
    """
    check_prompts(reward, prompts, words)
    scores = {name: values.tolist() for name, values in score_columns(reward, images, prompts, words).items()}
    require_finite(scores, [f"picture {i + 1}" for i in range(len(images))])
    return scores


def check_prompts(reward: Reward, prompts: Sequence[str], words: ControlWords | None = None) -> None:
    """ConfigError for an empty prompt of a reward that reads it, and for words for a reward that reads none."""
    reads = reads_prompts(reward)
    if words is not None and not reads:
        raise ConfigError(
            "reward: it does not read the prompt, so liked and disliked words change nothing and every relative score"
            " is 0; choose hpsv2, pickscore, imagereward or clip"
        )
    if reads and not all(prompts):
        raise ConfigError("prompt: it is empty, and this reward scores how well a picture fits its prompt; write it")


def by_word(scores: Scores, words: ControlWords) -> dict[str, list[float]]:
    """The relative score of each control word, a number per picture.

    Of a liked word: the reward under it less the mean over the disliked ones; of a disliked word: the mean over the
    liked ones less the reward under it. Over the words of either side these average to "relative".
    """
    sides = {side: [scores[f"{WORD}{word}"] for word in getattr(words, side)] for side in ("liked", "disliked")}
    liked, disliked = ([*map(fmean, zip(*sides[side], strict=True))] for side in ("liked", "disliked"))
    table = {word: _less(scores[f"{WORD}{word}"], disliked) for word in words.liked}
    return table | {f"{word} (disliked)": _less(liked, scores[f"{WORD}{word}"]) for word in words.disliked}


def _less(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(first, second, strict=True)]


def score_rows(scores: Scores, prompts: Sequence[str]) -> tuple[list[str], list[Row]]:
    """(columns, a row per picture): its number from 1, its score, each reward's own of a mixture, and its prompt.

    Prompts are left out where they are all the same.
    """
    names = [name for name in scores if name == "reward" or name.startswith(PART)]
    columns = ["picture", "score", *(name.removeprefix(PART) for name in names[1:])]
    rows: list[Row] = [[i + 1, *(scores[name][i] for name in names)] for i in range(len(prompts))]
    if len(set(prompts)) > 1:
        return [*columns, "prompt"], [[*row, prompt] for row, prompt in zip(rows, prompts, strict=True)]
    return columns, rows


def relative_rows(scores: Scores, words: ControlWords) -> tuple[list[str], list[Row]]:
    """(columns, a row per picture): its number from 1, relative score, plain score, and those of each word."""
    words_scores = by_word(scores, words)
    columns = ["picture", "relative", "plain score", *words_scores]
    values = [scores["relative"], scores["reward"], *words_scores.values()]
    return columns, [[i + 1, *numbers] for i, numbers in enumerate(zip(*values, strict=True))]


def unheard(scores: Scores) -> str:
    """A sentence where no word changed any score, as with words that a reward doesn't know; else nothing."""
    worded = [scores[name] for name in scores if name.startswith(WORD)]
    if any(value != worded[0][i] for values in worded for i, value in enumerate(values)):
        return ""
    return " No word changes a score: this reward may not know them; try others."


def summary(values: Sequence[float], what: str = "score") -> str:
    """How many pictures, their mean and the best, in a sentence."""
    best = max(range(len(values)), key=values.__getitem__)
    if len(values) == 1:
        return f"{what} {values[0]:.4g}"
    return f"{len(values)} pictures, mean {what} {fmean(values):.4g}, highest {values[best]:.4g} (picture {best + 1})"
