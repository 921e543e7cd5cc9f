"""Pictures and captions of the small world in bulk: drawn by worker processes, rendered on the device."""

from __future__ import annotations

import multiprocessing
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from srpo_core.miniature.captions import (
    BACKGROUNDS,
    CLASHES,
    COLOURS,
    LOOK_WORDS,
    SHAPES,
    Scene,
    Thing,
    is_held_out,
    random_scene,
    tokenize,
)
from srpo_core.miniature.world import Layout, Look, random_layout, random_look_word, random_looks, render


@dataclass(frozen=True)
class Drawn:
    """Scenes ready to render, as arrays [N, ...] that travel between processes."""

    layout: dict[str, np.ndarray]
    look: dict[str, np.ndarray]
    word: np.ndarray
    """index into LOOK_WORDS of each picture's look"""
    tokens: np.ndarray
    scene: np.ndarray
    """pictures of the same scene share a number"""
    plain: np.ndarray
    """whether the caption leaves the look open"""

    def render(self, generator: torch.Generator) -> Tensor:
        """Pictures [N, 3, 128, 128] on the generator's device."""
        device = generator.device
        layout = Layout(**{name: torch.from_numpy(array) for name, array in self.layout.items()})
        look = Look(**{name: torch.from_numpy(array).to(device) for name, array in self.look.items()})
        return render(layout, look, generator)


def _seen_scene(rng: random.Random) -> Scene:
    while True:
        scene = random_scene(rng)
        if not is_held_out(scene.caption()):
            return scene


def _neighbour(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one shape, colour or background changed: what contrastive training has to tell apart."""
    while True:
        things, background = list(scene.things), scene.background
        change = rng.randrange(3)
        if change == 2:
            background = rng.choice(tuple(BACKGROUNDS))
        else:
            new = {"shape": rng.choice(tuple(SHAPES))} if change == 0 else {"colour": rng.choice(COLOURS)}
            chosen = range(len(things)) if things[0].place is None else [rng.randrange(len(things))]
            for i in chosen:
                things[i] = replace(things[i], **new)
        other = Scene(tuple(things), background)
        twins = len(things) == 2 and things[0].place is not None and _kind(things[0]) == _kind(things[1])
        clash = any((background, thing.colour) in CLASHES for thing in things)
        if other != scene and not twins and not clash and not is_held_out(other.caption()):
            return other


def _kind(thing: Thing) -> tuple[str, str]:
    return thing.shape, thing.colour


def _draw(job: tuple[str, int, int]) -> Drawn:
    """`count` pictures.

    `captions`: half with a look word, half plain and mostly disliked in look, as a base model's data.
    `contrast`: each scene and a neighbour of it in four different looks, a quarter of the captions plain.
    `looks`: every look alike.
    """
    kind, seed, count = job
    rng = random.Random(f"{kind} {seed}")
    scenes: list[Scene] = []
    words: list[str] = []
    plain: list[bool] = []
    while len(scenes) < count:
        scene = _seen_scene(rng)
        if kind == "contrast":
            for version in (scene, _neighbour(scene, rng)):
                scenes += [version] * 4
                words += rng.sample(LOOK_WORDS, 4)
                plain += [rng.random() < 0.25 for _ in range(4)]
        else:
            scenes.append(scene)
            plain.append(kind == "captions" and rng.random() < 0.5)
            words.append(random_look_word(rng, 0.12) if plain[-1] else rng.choice(LOOK_WORDS))
    return pack(scenes, words, plain, rng)


def pack(scenes: Sequence[Scene], words: Sequence[str], plain: Sequence[bool], rng: random.Random) -> Drawn:
    """Scenes in the looks of `words`, their captions without the word where `plain`."""
    layout, look = random_layout(scenes, rng), random_looks(words, rng)
    numbers: dict[Scene, int] = {}
    texts = [
        scene.caption() if open_look else f"{word}. {scene.caption()}"
        for scene, word, open_look in zip(scenes, words, plain, strict=True)
    ]
    return Drawn(
        {f.name: getattr(layout, f.name).numpy() for f in fields(Layout)},
        {f.name: getattr(look, f.name).numpy() for f in fields(Look)},
        np.array([LOOK_WORDS.index(word) for word in words]),
        np.array([tokenize(text) for text in texts]),
        np.array([numbers.setdefault(scene, len(numbers)) for scene in scenes]),
        np.array(plain),
    )


def draw(kind: str, seed: int, count: int, batches: int, workers: int) -> Iterator[Drawn]:
    """`batches` batches of `count` scenes, the same ones in the same order whatever the number of workers.

    Closing it early drops what no worker has begun and ends the workers.
    """
    context = multiprocessing.get_context("spawn")
    jobs = ((kind, seed * 1_000_003 + i, count) for i in range(batches))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending = deque(pool.submit(_draw, job) for job in islice(jobs, 4 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_draw, job) for job in islice(jobs, 1))
    finally:
        pool.shutdown(cancel_futures=True)
