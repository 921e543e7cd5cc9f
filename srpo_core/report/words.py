"""What measures are called on a page, and what they mean."""

from __future__ import annotations

from srpo_core.columns import PART, WORD

LABELS = {
    "look": "Look",
    "content": "Content",
    "reward": "Reward",
    "relative": "Relative reward",
    "sgp": "Realism (SGP)",
}
HELP = {
    "look": "how much the pictures have the liked look, from their pixels alone",
    "content": "whether the prompt's things, colours and places are there",
    "relative": "mean reward of the prompt worded with liked words, minus the same with disliked words",
    "sgp": "reward of the prompt worded as a realistic picture, minus that as an artificial one (reward.contrast)",
    "reward": "the training reward of the picture for the plain prompt",
    "texture": "fine detail",
    "light": "slopes of brightness, as light and shade make them",
    "natural_colour": "colours that are not over-saturated",
    "exact": "share of pictures on which everything that the prompt asks for is right",
    "judge_liked": "how sure a separately trained judge is that the look is a liked one",
}


def label(name: str) -> str:
    """A measure's name for readers: "natural_colour" -> "Natural colour", "word:Oil" and "relative/Oil" -> "Oil"."""
    if name in LABELS:
        return LABELS[name]
    if name.startswith((WORD, PART)):
        return name.split(":", 1)[1]
    plain = name.split("/")[-1].replace("_", " ")
    return plain[:1].upper() + plain[1:]


def small(text: str) -> str:
    """As inside a sentence: "Realism (SGP)" -> "realism (SGP)"."""
    return text[:1].lower() + text[1:]
