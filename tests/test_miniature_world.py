"""The miniature's language, its pictures and the measure of their look."""

import random

import pytest
import torch
from miniature_pictures import drawn

from srpo_core.config import ConfigError
from srpo_core.miniature.captions import (
    DISLIKED,
    LIKED,
    LOOK_WORDS,
    MAX_TOKENS,
    VOCABULARY,
    is_held_out,
    parse,
    random_scene,
    random_scenes,
    tokenize,
    unknown_words,
)
from srpo_core.miniature.judge import place_matches
from srpo_core.miniature.looks import SCALE, calibrate, look, raw_look
from srpo_core.miniature.world import random_layout

PAD, UNKNOWN, START, END = (VOCABULARY.index(f"<{name}>") for name in ("pad", "unknown", "start", "end"))


# ---- captions


def test_captions_parse_back_to_their_scenes():
    for index, scene in enumerate(random_scenes(500, seed=3)):
        assert parse(scene.caption()) == scene
        assert parse(f"{LOOK_WORDS[index % len(LOOK_WORDS)]}. {scene.caption()}") == scene


@pytest.mark.parametrize("text", ["", "a red ball", "a red dog on the left in a meadow", "four red balls at night"])
def test_other_texts_are_no_captions(text):
    with pytest.raises(ConfigError, match="no caption of the small world"):
        parse(text)


def test_held_out_captions_are_never_in_training():
    training = {scene.caption() for seed in range(3) for scene in random_scenes(2000, seed)}
    held_out = {scene.caption() for seed in range(3) for scene in random_scenes(1000, seed, held_out=True)}
    assert held_out and not training & held_out
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, training))


def test_about_a_tenth_of_the_captions_is_held_out():
    rng = random.Random(0)
    captions = {random_scene(rng).caption() for _ in range(8000)}
    assert sum(map(is_held_out, captions)) / len(captions) == pytest.approx(0.1, abs=0.02)


# ---- tokens


def test_tokens_are_a_start_words_an_end_and_padding():
    ids = tokenize("Oil. three blue stars at night")
    words = ["oil", "three", "blue", "stars", "at", "night"]
    assert ids[:8] == [START, *map(VOCABULARY.index, words), END]
    assert ids[8:] == [PAD] * (MAX_TOKENS - 8)
    assert tokenize("") == [START, END] + [PAD] * (MAX_TOKENS - 2)
    assert PAD == 0 and len(VOCABULARY) - 1 == END


def test_words_outside_the_small_world_are_unknown():
    assert tokenize("a red dragon")[:5] == [START, VOCABULARY.index("a"), VOCABULARY.index("red"), UNKNOWN, END]


def test_long_prompts_are_cut_and_still_end():
    ids = tokenize("red " * 100)
    assert len(ids) == MAX_TOKENS and ids[-1] == END and PAD not in ids


def test_the_vocabulary_covers_every_caption_uncut():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    for scene in random_scenes(2000, seed=4):
        for word in ("Natural-lighting", "Concept art"):
            ids = tokenize(f"{word}. {scene.caption()}")
            assert UNKNOWN not in ids
            assert ids.index(END) == len(f"{word} {scene.caption()}".split()) + 1
    assert all(UNKNOWN not in tokenize(word) for word in LOOK_WORDS)


# ---- pictures


def test_things_are_where_the_caption_puts_them():
    scenes = random_scenes(300, seed=5)
    layout = random_layout(scenes, random.Random(5))
    for i, scene in enumerate(scenes):
        assert layout.present[i].sum() == len(scene.things)
        for j, thing in enumerate(scene.things):
            assert place_matches(thing.place, float(layout.x[i, j]), float(layout.y[i, j]))


def test_same_seed_same_pictures():
    scenes, words = random_scenes(len(LOOK_WORDS), seed=6), LOOK_WORDS
    images = drawn(scenes, words, seed=6)
    assert images.shape == (len(scenes), 3, 128, 128) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, drawn(scenes, words, seed=6))
    assert not torch.equal(images, drawn(scenes, words, seed=7))


# ---- looks


@pytest.fixture(scope="module")
def sides():
    """Looks of the same 120 scenes, layouts and noise drawn in liked and in disliked looks."""
    rng, scenes = random.Random(8), random_scenes(120, seed=8)
    return tuple(look(drawn(scenes, [rng.choice(words) for _ in scenes], seed=8)) for words in (LIKED, DISLIKED))


def test_liked_looks_score_higher_on_every_quantity(sides):
    liked, disliked = sides
    for name in liked:
        assert liked[name].mean() > disliked[name].mean() + 0.5, name


def test_look_separates_the_sides(sides):
    """The same scene always; any two scenes in about 95 of 100 pairs, for a dark background counts as light."""
    liked, disliked = (side["look"] for side in sides)
    assert (liked > disliked).float().mean() >= 0.99
    assert (liked[:, None] > disliked[None]).float().mean() > 0.9


def test_the_scale_is_what_calibration_measures():
    measured = calibrate(count=300)
    for name, (low, high) in SCALE.items():
        assert measured[name] == pytest.approx((low, high), abs=0.05 * (high - low)), name


def test_a_flat_grey_picture_is_plain_and_uncoloured():
    raw = {name: float(value) for name, value in raw_look(torch.full((1, 3, 128, 128), 0.5)).items()}
    assert raw == pytest.approx({"texture": 0, "light": 0, "natural_colour": 0}, abs=1e-5)
    scaled = look(torch.full((1, 3, 128, 128), 0.5))
    assert (scaled["texture"], scaled["light"], scaled["natural_colour"]) == (-0.5, -0.5, 1.5)


def test_each_quantity_answers_to_its_own_change():
    grey = torch.full((1, 3, 128, 128), 0.5)
    grain = 0.05 * torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(-0.3, 0.3, 128).view(1, 1, 1, 128)
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 128, 128)
    plain = raw_look(grey)
    assert raw_look(grey + grain)["texture"] > plain["texture"] + 0.01
    assert raw_look(grey + slope)["light"] > plain["light"] + 0.5
    assert raw_look(red)["natural_colour"] < plain["natural_colour"] - 0.7
    assert raw_look(grey + slope)["natural_colour"] == pytest.approx(0, abs=1e-6)
    assert look(torch.cat([grey, red]))["look"].diff() < 0


def test_words_outside_the_world_are_named():
    assert unknown_words("A cinematic red ball, 8k. in a meadow, cinematic") == ["cinematic", "8k"]
    assert all(not unknown_words(scene.caption()) for scene in random_scenes(200, seed=3))
    assert all(not unknown_words(f"{word}. two blue stars at night") for word in LOOK_WORDS)
