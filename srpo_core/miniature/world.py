"""The small world's pictures: scenes drawn from captions in any look, by plain tensor arithmetic: the truth is known.

A look is a few numbers between two poles. On one side pictures have texture, light, shadow and natural colours; on the
other they are flat, outlined, smeared and over-saturated. Every look word has its own range of these numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .captions import BACKGROUNDS, COLOURS, LIKED, LOOK_WORDS, SHAPES, Scene
from .shapes import signed_distance

MAX_THINGS = 3
_RGB = torch.tensor(
    [
        (0.86, 0.15, 0.14), (0.95, 0.54, 0.10), (0.95, 0.85, 0.18), (0.18, 0.62, 0.24),
        (0.16, 0.32, 0.86), (0.52, 0.22, 0.68), (0.96, 0.52, 0.70), (0.95, 0.95, 0.95),
    ]
)  # fmt: skip
_SKY = torch.tensor(
    [
        (0.62, 0.80, 0.92), (0.93, 0.82, 0.66), (0.66, 0.77, 0.88),
        (0.07, 0.08, 0.20), (0.46, 0.68, 0.92), (0.62, 0.50, 0.44),
    ]
)  # fmt: skip
_GROUND = torch.tensor(
    [
        (0.42, 0.62, 0.30), (0.80, 0.64, 0.40), (0.88, 0.91, 0.95),
        (0.14, 0.15, 0.26), (0.70, 0.85, 0.95), (0.44, 0.37, 0.33),
    ]
)  # fmt: skip
# wavelength (pixels of 128) and direction (x, y) of each background's grain
_GRAIN = torch.tensor(
    [(6.0, 1.0, 0.25), (8.0, 0.2, 1.0), (7.0, 0.7, 0.7), (7.0, 0.5, 0.8), (10.0, 0.4, 0.9), (8.0, 0.0, 1.0)]
)
_CLOUDS = tuple(BACKGROUNDS).index("clouds")
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Look:
    """How pictures are drawn: numbers or tensors [B] in [0, 1], of saturation about 1 (the colour as named)."""

    texture: Tensor | float
    """grain and speckle on things and ground"""
    light: Tensor | float
    """shading, highlights, cast shadows and a fall-off across the picture"""
    saturation: Tensor | float
    """chroma against the named colour"""
    outline: Tensor | float
    """dark contours"""
    brush: Tensor | float
    """wobbling contours and broad smears of paint"""


# per look word: the ranges of texture, light, saturation, outline, brush
LOOKS: dict[str, tuple[tuple[float, float], ...]] = {
    "Natural-lighting": ((0.5, 0.8), (0.85, 1.0), (0.55, 0.7), (0, 0), (0, 0)),
    "Detail": ((0.8, 1.0), (0.5, 0.8), (0.55, 0.75), (0, 0), (0, 0)),
    "Detailed": ((0.8, 1.0), (0.5, 0.9), (0.5, 0.7), (0, 0), (0, 0)),
    "Real": ((0.7, 0.9), (0.7, 1.0), (0.5, 0.65), (0, 0), (0, 0)),
    "Concept art": ((0, 0.05), (0.1, 0.25), (0.9, 1.1), (0, 0.2), (0.4, 0.7)),
    "Painting": ((0, 0.1), (0.05, 0.2), (1.0, 1.2), (0, 0.2), (0.7, 1.0)),
    "Anime": ((0, 0), (0.0, 0.1), (1.15, 1.3), (0.8, 1.0), (0, 0)),
    "Flat": ((0, 0), (0.0, 0.0), (1.0, 1.2), (0, 0), (0, 0)),
    "Oil": ((0, 0.1), (0.15, 0.3), (1.1, 1.3), (0, 0.1), (0.8, 1.0)),
}


def random_looks(words: Sequence[str], rng: random.Random) -> Look:
    """One look [B] for each look word, drawn evenly from the word's ranges."""
    rows = [[rng.uniform(*span) for span in LOOKS[word]] for word in words]
    return Look(*torch.tensor(rows).unbind(1))


def random_look_word(rng: random.Random, liked_share: float) -> str:
    """A look word: a liked one with probability `liked_share`."""
    return rng.choice(LIKED if rng.random() < liked_share else LOOK_WORDS[len(LIKED) :])


@dataclass(frozen=True)
class Layout:
    """Where the things of B scenes are: tensors [B, MAX_THINGS] (background [B]).

    Positions and sizes are parts of the picture.
    """

    shape: Tensor
    colour: Tensor
    present: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    tilt: Tensor
    background: Tensor

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device."""
        return Layout(*(getattr(self, f.name).to(device) for f in fields(self)))


_CENTRES = {
    "left": (0.25, 0.52),
    "right": (0.75, 0.52),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.75),
    "middle": (0.5, 0.5),
}
_COUNTED = {2: [(0.27, 0.5), (0.73, 0.5)], 3: [(0.25, 0.66), (0.5, 0.3), (0.75, 0.66)]}


def random_layout(scenes: Sequence[Scene], rng: random.Random) -> Layout:
    """Positions, sizes and tilts for scenes; things never touch each other."""
    shapes, colours, backgrounds = tuple(SHAPES), COLOURS, tuple(BACKGROUNDS)
    rows = []
    for scene in scenes:
        centres = [_CENTRES[t.place] for t in scene.things] if scene.things[0].place else _COUNTED[len(scene.things)]
        for thing, (x, y) in zip(scene.things, centres, strict=True):
            size = rng.uniform(0.145, 0.19) * (1.2 if len(scene.things) == 1 else 1.0)
            x, y = x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)
            kind = (shapes.index(thing.shape), colours.index(thing.colour), 1)
            rows.append((*kind, x, y, size, rng.uniform(-0.25, 0.25)))
        rows += [(0, 0, 0, 0.5, 0.5, 0.1, 0.0)] * (MAX_THINGS - len(scene.things))
    table = torch.tensor(rows, dtype=torch.float32).view(len(scenes), MAX_THINGS, 7)
    shape, colour, present = (table[..., i].long() for i in range(3))
    background = torch.tensor([backgrounds.index(scene.background) for scene in scenes])
    return Layout(shape, colour, present, *(table[..., i] for i in range(3, 7)), background)


def _noise(batch: int, cells: int, size: int, generator: torch.Generator) -> Tensor:
    grid = torch.randn(batch, 1, cells + 2, cells + 2, generator=generator, device=generator.device)
    return F.interpolate(grid, (size, size), mode="bicubic", align_corners=True)[:, 0]


def _column(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device, dtype=torch.float32).expand(len(like)).view(-1, 1, 1)


def _tint(colour: Tensor, amount: Tensor) -> Tensor:
    """colour [B, 3] spread over [B, 3, H, W] with brightness `amount` [B, H, W]."""
    return colour[:, :, None, None] * amount[:, None]


@dataclass(frozen=True)
class _Canvas:
    """What every part of B pictures is drawn with."""

    x: Tensor
    """[B, size, size], positions of the pixels as parts of the picture"""
    y: Tensor
    soft: Tensor
    """[B, size, size] of noise, smoothest first"""
    coarse: Tensor
    fine: Tensor
    look: Look
    """every field [B, 1, 1]"""
    sun: tuple[Tensor, Tensor]
    """(x, y), [B, 1, 1] each: where the light comes from, in picture coordinates"""
    size: int
    generator: torch.Generator

    def rand(self) -> Tensor:
        """[B, 1, 1], even in [0, 1)."""
        return torch.rand(len(self.x), 1, 1, generator=self.generator, device=self.x.device)


def render(layout: Layout, look: Look, generator: torch.Generator, size: int = 128) -> Tensor:
    """Draw B scenes -> [B, 3, size, size] in [0, 1], on the generator's device. Same generator state, same pictures."""
    device = generator.device
    layout = layout.to(device)
    look = Look(*(_column(getattr(look, f.name), layout.background) for f in fields(Look)))
    batch = len(layout.background)
    axis = (torch.arange(size, device=device) + 0.5) / size
    y, x = (grid.expand(batch, size, size) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    soft, coarse, fine = (_noise(batch, cells, size, generator) for cells in (3, 8, 20))
    warp_x, warp_y = _noise(batch, 6, size, generator), _noise(batch, 6, size, generator)
    toward = torch.rand(batch, 1, 1, generator=generator, device=device) * 2.2 - 1.1
    sun = (toward.sin(), -toward.cos())
    canvas = _Canvas(x, y, soft, coarse, fine, look, sun, size, generator)

    picture = _background(canvas, layout.background)
    smear = torch.sin((x * 3 + y * 5 + 0.5 * soft) * 2 * torch.pi + 2 * warp_x)
    picture = picture * (1 + 0.10 * look.brush * smear)[:, None]
    wobbly = replace(canvas, x=x + 0.018 * look.brush * warp_x, y=y + 0.018 * look.brush * warp_y)
    for slot in range(MAX_THINGS):
        picture = _draw_thing(picture, wobbly, layout, slot)
    from_sun = (x - 0.5 - 0.3 * sun[0]) ** 2 + (y - 0.5 - 0.3 * sun[1]) ** 2
    picture = picture * (1 - look.light * 0.22 * from_sun * 2)[:, None]
    luma = (picture * _LUMA.to(device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return (luma + look.saturation[:, None] * (picture - luma)).clamp(0, 1)


def _background(canvas: _Canvas, index: Tensor) -> Tensor:
    """Sky and ground [B, 3, H, W] of backgrounds [B]."""
    device, x, y, look = canvas.x.device, canvas.x, canvas.y, canvas.look
    horizon = 0.5 + 0.12 * canvas.rand()
    sharpness = torch.where(index == _CLOUDS, 6.0, canvas.size)  # clouds have no horizon
    ground = torch.sigmoid((y - horizon) * sharpness.view(-1, 1, 1))
    wavelength, along_x, along_y = _GRAIN.to(device)[index].T.view(3, -1, 1, 1)
    phase = canvas.rand()
    waves = (x * along_x + y * along_y) * (128 / wavelength)
    grain = torch.sin(waves * 2 * torch.pi + 1.5 * canvas.coarse + 6.28 * phase)
    rough = 0.07 * grain * (0.35 + 0.65 * ground) + 0.035 * canvas.fine + 0.035 * canvas.coarse
    shade = 0.10 * canvas.soft * (1 - ground) + 0.28 * (y - horizon) * ground - 0.18 * (x - 0.5) * canvas.sun[0].neg()
    amount = 1 + look.texture * rough + look.light * shade
    sky, floor = _SKY.to(device)[index], _GROUND.to(device)[index]
    return _tint(sky, amount * (1 - ground)) + _tint(floor, amount * ground)


@dataclass(frozen=True)
class _Placed:
    """One thing of each of B scenes: shape [B], the rest [B, 1, 1]."""

    shape: Tensor
    present: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    tilt: Tensor

    def local(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the picture -> positions from the thing's centre, along its own axes, in units of its size."""
        x, y = (x - self.x) / self.size, (y - self.y) / self.size
        return x * self.tilt.cos() + y * self.tilt.sin(), y * self.tilt.cos() - x * self.tilt.sin()

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """Signed distance [B, H, W] from its contour, of `local` positions."""
        return signed_distance(tuple(SHAPES), self.shape, u, v)


def _draw_thing(picture: Tensor, canvas: _Canvas, layout: Layout, slot: int) -> Tensor:
    """The pictures with each scene's thing number `slot` (where there is one), its shadow and its contour."""
    look, size = canvas.look, canvas.size
    columns = {name: getattr(layout, name)[:, slot].view(-1, 1, 1) for name in ("x", "y", "size", "tilt")}
    present = layout.present[:, slot].view(-1, 1, 1).float()
    placed = _Placed(layout.shape[:, slot], present, **columns)

    shade = placed.distance(*placed.local(canvas.x + 0.045 * canvas.sun[0], canvas.y + 0.045 * canvas.sun[1]))
    picture = picture * (1 - present * 0.5 * look.light * torch.sigmoid(-shade * 9))[:, None]

    u, v = placed.local(canvas.x, canvas.y)
    distance = placed.distance(u, v)
    inside = torch.sigmoid(-distance * placed.size * size * 1.6) * present
    thing = _surface(canvas, _RGB.to(u.device)[layout.colour[:, slot]], u, v, _lit(canvas, distance, placed.size))
    contour = look.outline * torch.exp(-((distance * placed.size * size / 1.6) ** 2)) * present
    picture = picture * (1 - inside)[:, None] + thing * inside[:, None]
    return picture * (1 - 0.85 * contour)[:, None]


def _lit(canvas: _Canvas, distance: Tensor, scale: Tensor) -> Tensor:
    """How much light [B, H, W] falls on a thing that bulges inside its contour; 0 on the far side."""
    depth = (-distance / 0.55).clamp(0.02, 1)
    height = (1 - (1 - depth) ** 2).sqrt() * 0.55 * scale * canvas.size
    slope_y, slope_x = torch.gradient(height, dim=(1, 2))
    length = (slope_x**2 + slope_y**2 + 1).sqrt()
    facing = (-slope_x * canvas.sun[0] - slope_y * canvas.sun[1] + 0.9) / length / 1.35
    return facing.clamp(min=0)


def _surface(canvas: _Canvas, colour: Tensor, u: Tensor, v: Tensor, lit: Tensor) -> Tensor:
    """A thing's paint [B, 3, H, W]: colour [B, 3] with grain, light, a highlight and strokes of the brush."""
    look = canvas.look
    spark = lit.clamp(max=1) ** 14
    turn = canvas.rand() * torch.pi
    waves = 5 + 3 * canvas.rand()
    grain = torch.sin((u * turn.cos() + v * turn.sin()) * waves * torch.pi + 1.2 * canvas.coarse)
    strokes = torch.sin(u * 3 + v * 4 + canvas.coarse)
    amount = (
        1
        + look.texture * (0.16 * grain + 0.05 * canvas.fine)
        + look.light * (0.75 * lit - 0.5)
        + 0.10 * look.brush * strokes
    )
    edge = torch.sigmoid(8 * (-u - v - 0.55))
    return _tint(colour, amount) + (look.light * 0.35 * spark)[:, None] + (look.brush * 0.18 * edge)[:, None]
