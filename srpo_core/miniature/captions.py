"""The small world's language: captions, the scenes that they ask for, and the words that name a look.

A caption asks for one thing in a place, two or three equal things, or two different things beside or above each other,
somewhere: "a red ball on the left in a meadow", "three blue stars at night", "a pink ring above a white box in the
desert".
A look word may stand before it: "Oil. three blue stars at night".
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass

from srpo_core.config import ConfigError

SHAPES = {
    "ball": "balls", "box": "boxes", "cone": "cones", "star": "stars",
    "heart": "hearts", "ring": "rings", "cross": "crosses", "moon": "moons",
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUNDS = {
    "meadow": "in a meadow", "desert": "in the desert", "snow": "in the snow",
    "night": "at night", "clouds": "in the clouds", "wall": "before a wall",
}  # fmt: skip
CLASHES = {("meadow", "green"), ("desert", "yellow"), ("desert", "orange"), ("snow", "white")}
"""(background, colour) pairs too alike to tell the thing from what is behind it: never asked for."""
PLACES = {
    "left": "on the left", "right": "on the right", "top": "at the top",
    "bottom": "at the bottom", "middle": "in the middle",
}  # fmt: skip
COUNTS = {2: "two", 3: "three"}
LIKED = ("Natural-lighting", "Detail", "Detailed", "Real")
DISLIKED = ("Concept art", "Painting", "Anime", "Flat", "Oil")
LOOK_WORDS = LIKED + DISLIKED
MAX_TOKENS = 24


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    place: str | None = None
    """A name of PLACES; None where the caption leaves it open."""


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: exactly these things, before this background."""

    things: tuple[Thing, ...]
    background: str

    def caption(self) -> str:
        """The scene in words."""
        first, where = self.things[0], BACKGROUNDS[self.background]
        if len(self.things) == 1:
            return f"{_noun(first)} {PLACES[first.place]} {where}"
        if first.place is None:
            return f"{COUNTS[len(self.things)]} {first.colour} {SHAPES[first.shape]} {where}"
        second = self.things[1]
        if first.place == "top":
            return f"{_noun(first)} above {_noun(second)} {where}"
        return f"{_noun(first)} on the left and {_noun(second)} on the right {where}"


def _noun(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape}"


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn evenly from the three kinds; never one with a clash."""
    background = rng.choice(tuple(BACKGROUNDS))
    colours = [colour for colour in COLOURS if (background, colour) not in CLASHES]
    kind = rng.randrange(3)
    shape, colour = rng.choice(tuple(SHAPES)), rng.choice(colours)
    if kind == 0:
        return Scene((Thing(shape, colour, rng.choice(tuple(PLACES))),), background)
    if kind == 1:
        return Scene((Thing(shape, colour),) * rng.choice((2, 3)), background)
    places = rng.choice((("left", "right"), ("top", "bottom")))
    while True:
        other = Thing(rng.choice(tuple(SHAPES)), rng.choice(colours), places[1])
        if (other.shape, other.colour) != (shape, colour):
            return Scene((Thing(shape, colour, places[0]), other), background)


def is_held_out(caption: str) -> bool:
    """One caption in ten is kept from every model of the miniature; which ones depends on the caption's text alone."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def random_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """`count` scenes, all of them from the held-out tenth or none."""
    rng = random.Random(f"scenes {seed} {held_out}")
    scenes = (random_scene(rng) for _ in itertools.count())
    return list(itertools.islice((s for s in scenes if is_held_out(s.caption()) == held_out), count))


def split_look(prompt: str) -> tuple[str | None, str]:
    """("Oil", "a red ball ...") for "Oil. a red ball ..."; None where no look word stands first."""
    for word in LOOK_WORDS:
        if prompt.startswith(f"{word}. "):
            return word, prompt[len(word) + 2 :]
    return None, prompt


def parse(prompt: str) -> Scene:
    """The scene that a prompt asks for. ConfigError for a text outside the small world's language."""
    text = split_look(prompt)[1].strip()
    for background, where in BACKGROUNDS.items():
        if text.endswith(" " + where):
            things = _parse_things(text[: -len(where) - 1].split(" "))
            if things is not None:
                return Scene(things, background)
    raise ConfigError(f"{prompt!r} is no caption of the small world; one such is {random_scenes(1, 0)[0].caption()!r}")


def _parse_noun(words: list[str], place: str | None) -> Thing | None:
    if len(words) == 3 and words[0] in ("a", "an") and words[1] in COLOURS and words[2] in SHAPES:
        return Thing(words[2], words[1], place)
    return None


def _parse_things(words: list[str]) -> tuple[Thing, ...] | None:
    for count, name in COUNTS.items():
        if len(words) == 3 and words[0] == name and words[1] in COLOURS:
            shape = next((s for s, plural in SHAPES.items() if plural == words[2]), None)
            return (Thing(shape, words[1]),) * count if shape else None
    if "above" in words:
        middle = words.index("above")
        things = (_parse_noun(words[:middle], "top"), _parse_noun(words[middle + 1 :], "bottom"))
    elif words[3:7] == ["on", "the", "left", "and"] and words[10:] == ["on", "the", "right"]:
        things = (_parse_noun(words[:3], "left"), _parse_noun(words[7:10], "right"))
    else:
        place = next((p for p, text in PLACES.items() if " ".join(words[3:]) == text), None)
        things = (_parse_noun(words[:3], place) if place else None,)
    return None if None in things else things


VOCABULARY = (
    "<pad>", "<unknown>", "<start>",
    *dict.fromkeys(
        word
        for text in (
            *LOOK_WORDS, *COLOURS, *SHAPES, *SHAPES.values(), *BACKGROUNDS.values(),
            *PLACES.values(), *COUNTS.values(), "a an and above",
        )
        for word in text.lower().split()
    ),
    "<end>",
)  # fmt: skip
_IDS = {word: index for index, word in enumerate(VOCABULARY)}


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the small world has none of, in order, each once."""
    return list(dict.fromkeys(word for word in _words(prompt) if word not in _IDS))


def _words(prompt: str) -> list[str]:
    return prompt.lower().replace(".", " ").replace(",", " ").split()


def tokenize(prompt: str) -> list[int]:
    """MAX_TOKENS token ids: a start, the prompt's words, an end (the largest id, where CLIP pools) and padding.

    Words outside the small world become <unknown>; a longer prompt is cut.
    """
    words = _words(prompt)[: MAX_TOKENS - 2]
    ids = [_IDS["<start>"], *(_IDS.get(word, _IDS["<unknown>"]) for word in words), _IDS["<end>"]]
    return ids + [_IDS["<pad>"]] * (MAX_TOKENS - len(ids))
