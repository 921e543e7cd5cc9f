"""The held-out judge: a small detector of which things a picture shows, where, before which background, in which look.

It never meets the reward or its data, and it is never in a gradient: it only measures what a run did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import BACKGROUNDS, COLOURS, LIKED, LOOK_WORDS, SHAPES, Scene, Thing, parse

SIZE = 128
GRID = 16
"""Cells along each side of the judge's map."""


class _Block(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class Judge(nn.Module):
    """images [B, 3, 128, 128] in [0, 1] -> maps [B, 1 + shapes + colours, GRID, GRID], background and look logits."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        wide = width * 3 // 2
        self.body = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, stride=2, padding=2), nn.SiLU(), _Block(width // 2),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1), _Block(width), _Block(width),
            nn.Conv2d(width, wide, 3, stride=2, padding=1),
            _Block(wide), _Block(wide, 2), _Block(wide, 2), _Block(wide),
            nn.GroupNorm(8, wide), nn.SiLU(),
        )  # fmt: skip
        self.maps = nn.Conv2d(wide, 1 + len(SHAPES) + len(COLOURS), 1)
        self.background = nn.Linear(wide, len(BACKGROUNDS))
        self.look = nn.Linear(wide, len(LOOK_WORDS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.body(images * 2 - 1)
        pooled = hidden.mean((2, 3))
        return self.maps(hidden), self.background(pooled), self.look(pooled)


@dataclass(frozen=True)
class Seen:
    """What the judge sees in one picture."""

    things: tuple[tuple[str, str, float, float], ...]
    """(shape, colour, x, y) of each, positions as parts of the picture"""
    background: str
    liked: float
    """probability that the look is one of the liked ones"""


def place_matches(place: str | None, x: float, y: float) -> bool:
    """Whether a position answers to a caption's place."""
    return {
        None: True,
        "left": x < 0.4,
        "right": x > 0.6,
        "top": y < 0.4,
        "bottom": y > 0.6,
        "middle": 0.35 < x < 0.65 and 0.35 < y < 0.65,
    }[place]


@torch.no_grad()
def see(judge: Judge, images: Tensor) -> list[Seen]:
    """Judge pictures [B, 3, H, W] in [0, 1] of any size."""
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True)
    maps, background, look = judge(images.float().clamp(0, 1))
    centre = maps[:, :1]
    peak = (F.max_pool2d(centre, 5, stride=1, padding=2) == centre) & (centre > 0)
    shape, colour = maps[:, 1 : 1 + len(SHAPES)].argmax(1), maps[:, 1 + len(SHAPES) :].argmax(1)
    liked = look.softmax(-1)[:, : len(LIKED)].sum(-1)
    shapes, backgrounds = tuple(SHAPES), tuple(BACKGROUNDS)
    seen = []
    for i in range(len(images)):
        things = tuple(
            (shapes[shape[i, row, column]], COLOURS[colour[i, row, column]], (column + 0.5) / GRID, (row + 0.5) / GRID)
            for row, column in peak[i, 0].nonzero().tolist()
        )
        seen.append(Seen(things, backgrounds[int(background[i].argmax())], float(liked[i])))
    return seen


def things_right(scene: Scene, seen: Seen) -> float:
    """Things asked for and seen (shape, colour and place right), as a part of those asked for or seen.

    The larger of the two counts: what is missing costs as much as what nobody asked for.
    """

    def found(thing: Thing, candidate: tuple[str, str, float, float]) -> bool:
        shape, colour, x, y = candidate
        return (shape, colour) == (thing.shape, thing.colour) and place_matches(thing.place, x, y)

    left = list(seen.things)
    right = 0
    for thing in scene.things:
        match = next((candidate for candidate in left if found(thing, candidate)), None)
        if match is not None:
            left.remove(match)
            right += 1
    return right / max(len(scene.things), len(seen.things))


def all_right(scene: Scene, seen: Seen) -> float:
    """1 where things and background are all right and nothing is added, else 0."""
    return float(things_right(scene, seen) == 1 and seen.background == scene.background)


class JudgeMeasures:
    """The judge's numbers for pictures [B, 3, H, W] and B captions, [B] each: content, exact and judge_liked."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge.requires_grad_(False).eval()

    def content(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """`things_right` in [0, 1]."""
        return self._per_picture(images, prompts, things_right)

    def exact(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """`all_right`, 0 or 1."""
        return self._per_picture(images, prompts, all_right)

    def judge_liked(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probability in [0, 1] that the look is a liked one."""
        return torch.tensor([seen.liked for seen in see(self.judge, images)])

    def _per_picture(self, images: Tensor, prompts: Sequence[str], score: Callable[[Scene, Seen], float]) -> Tensor:
        pairs = zip(prompts, see(self.judge, images), strict=True)
        return torch.tensor([score(parse(prompt), seen) for prompt, seen in pairs], dtype=torch.float32)
