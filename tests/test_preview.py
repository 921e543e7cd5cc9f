"""Previews and evaluation: fixed pictures, scores that are on paper, sheets that show them."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from tiny import ColourReward, brightness, encode_text, tiny_autoencoder, tiny_config, tiny_flow

from srpo_core.assemble import assemble
from srpo_core.columns import is_detail, means, score_columns
from srpo_core.drift import VelocityProbe
from srpo_core.errors import TrainingError
from srpo_core.evaluate import Evaluation, evaluation_file, read_evaluation
from srpo_core.metrics import read_metrics
from srpo_core.preference import ControlWords
from srpo_core.preview import contact_sheet, sample_images, score_images, to_pil
from srpo_core.progress import Display
from srpo_core.randomness import fixed_noise
from srpo_core.rewards.mixture import MixedReward, WeightedReward
from srpo_core.rollout import Rollout

PROMPTS = ["a cat", "a dog", "a tree"]
WORDS = ControlWords(("Real", "Detail"), ("Flat", "Oil", "Anime"))


def word_length_reward(images, prompts):
    """Brightness of the picture plus the number of letters before the first dot (0 where there is none)."""
    count = len(prompts) // len(images)
    letters = torch.tensor([float(len(text.split(". ")[0]) if ". " in text else 0) for text in prompts])
    return images.mean((1, 2, 3)).repeat(count) + letters


def test_scores_are_those_on_paper():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.5, 0.9)])
    contrast, measures = ("Realistic photo", "CG Render"), {"brightness": brightness}
    scores = score_images(images, PROMPTS, word_length_reward, WORDS, contrast, measures, batch_size=2)
    assert scores["sgp"] == pytest.approx([15 - 9] * 3)
    assert scores["word:Detail"] == pytest.approx([6.1, 6.5, 6.9])
    assert scores["reward"] == pytest.approx([0.1, 0.5, 0.9])
    assert scores["relative"] == pytest.approx([(4 + 6) / 2 - (4 + 3 + 5) / 3] * 3)
    assert scores["brightness"] == pytest.approx([0.1, 0.5, 0.9])
    assert means(scores)["reward"] == pytest.approx(0.5)


def test_a_picture_goes_through_the_image_tower_once():
    calls = []

    def counting(images, prompts):
        calls.append((len(images), len(prompts), len(set(prompts))))
        return word_length_reward(images, prompts)

    words = ControlWords(("Real", "CG Render"), ("Flat", "Real"))  # a word on both sides, and one of the contrast
    images = torch.rand(2, 3, 4, 4)
    columns = score_columns(counting, images, PROMPTS[:2], words, ("Realistic photo", "CG Render"))
    assert calls == [(2, 10, 10)]  # the plain prompt and four wordings of each, none twice
    assert list(columns) == ["reward", "relative", "sgp", "word:Real", "word:CG Render", "word:Flat"]
    assert columns["word:CG Render"].tolist() == pytest.approx((images.mean((1, 2, 3)) + 9).tolist())


def test_parts_of_a_mixture_are_columns_of_their_own():
    half = WeightedReward("bright", lambda images, prompts: brightness(images, prompts).repeat(len(prompts) // 2), 1.0)
    letters = WeightedReward("letters", word_length_reward, weight=3.0, scale=0.1, offset=1.0)
    images = torch.rand(2, 3, 4, 4)
    columns = score_columns(MixedReward([half, letters]), images, PROMPTS[:2], WORDS, ("Realistic photo", "CG Render"))
    bright = images.mean((1, 2, 3))
    assert columns["reward:bright"].tolist() == pytest.approx(bright.tolist())
    assert columns["reward:letters"].tolist() == pytest.approx(
        bright.tolist()
    )  # no letters before a dot: its own range
    expected = (bright + 3 * (bright - 1) * 0.1) / 4
    assert columns["reward"].tolist() == pytest.approx(expected.tolist())
    assert columns["sgp"].tolist() == pytest.approx([3 * 0.1 * (15 - 9) / 4] * 2, rel=1e-4)
    assert [name for name in columns if is_detail(name)][:2] == ["reward:bright", "reward:letters"]


def test_a_run_records_every_word(tmp_path):
    config = tiny_config(tmp_path / "run", output__evaluate_prompts=2, optim__steps=2)
    assemble(config).train()
    for line in read_metrics(tmp_path / "run"):
        if "preview" in line:
            assert {"reward", "relative", "sgp", "brightness", "word:Oil", "word:Real"} <= set(line["preview"])
    recorded = read_evaluation(tmp_path / "run")
    assert len(recorded["after"]["word:Concept art"]) == len(recorded["before"]["sgp"]) == 2
    relative = [
        sum(recorded["after"][f"word:{word}"][i] for word in config.reward.liked) / len(config.reward.liked)
        - sum(recorded["after"][f"word:{word}"][i] for word in config.reward.disliked) / len(config.reward.disliked)
        for i in range(2)
    ]
    assert recorded["after"]["relative"] == pytest.approx(relative, abs=1e-4)


def test_the_terminal_is_spared_single_words():
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    Display(console=console).scores("preview", {"reward": 0.25, "sgp": 0.5, "word:Oil": 0.1, "reward:clip": 0.2})
    assert console.file.getvalue() == "preview: reward +0.2500  sgp +0.5000\n"


def test_pictures_do_not_depend_on_the_batch_size():
    flow, autoencoder, prompts = tiny_flow(), tiny_autoencoder(), encode_text(PROMPTS)
    noise = fixed_noise(0, 3, (4, 8, 8), "held-out")
    done = []
    together = sample_images(flow, autoencoder, prompts, noise, 2, 3.0, 3.5, batch_size=3)
    one_by_one = sample_images(flow, autoencoder, prompts, noise, 2, 3.0, 3.5, batch_size=1, on_batch=done.append)
    assert together.shape == (3, 3, 16, 16) and done == [1, 2, 3]
    assert torch.allclose(together, one_by_one, atol=1e-5)


def test_a_contact_sheet_shows_every_picture_with_its_caption():
    images = torch.stack([torch.full((3, 100, 100), value) for value in (0.0, 0.5, 1.0)])
    sheet = contact_sheet(images, ["black", "grey " * 40, "white"], columns=2)
    width, height = sheet.size
    assert width == 2 * 208 + 8 and height == 2 * (200 + 34 + 8) + 8  # enlarged twice
    assert sheet.getpixel((100, 100)) == (0, 0, 0) and sheet.getpixel((300, 100)) == (128, 128, 128)
    caption = sheet.crop((8, 208, 208, 242))
    assert caption.getextrema() != ((255, 255), (255, 255), (255, 255))


def test_values_outside_the_range_are_clamped():
    assert to_pil(torch.full((3, 2, 2), 1.7)).getpixel((0, 0)) == (255, 255, 255)


def test_drift_is_the_relative_change_of_the_velocity():
    class Scaled:
        scale = 1.0

        def velocity(self, latents, sigma, prompts, guidance):
            return self.scale * latents

    flow = Scaled()
    ones = torch.ones(2, 4, 8, 8)
    probe = VelocityProbe(flow, Rollout(encode_text(["a", "b"]), ones, 2 * ones), 0.5, 3.5)
    assert probe.drift(flow) == 0.0
    flow.scale = 0.9
    assert probe.drift(flow) == pytest.approx(0.1, rel=1e-5)


def test_an_evaluation_is_made_anew_when_its_prompts_or_settings_change(tmp_path):
    trainer = assemble(tiny_config(tmp_path))
    evaluation = Evaluation(tmp_path, trainer._gallery(2), {"seed": 0})
    assert evaluation.missing("before", 0) and evaluation.missing("after", 4)
    drawn = evaluation.gallery.draw(trainer.flow, trainer.world)
    evaluation.keep("before", 0, *drawn)
    evaluation.keep("after", 4, *drawn)
    assert not evaluation.missing("before", 4) and not evaluation.missing("after", 4)
    assert evaluation.missing("after", 5)
    assert Evaluation(tmp_path, trainer._gallery(1), {"seed": 0}).missing("before", 0)
    assert Evaluation(tmp_path, trainer._gallery(2), {"seed": 1}).missing("before", 0)
    record = read_evaluation(tmp_path)
    assert record["before"] == record["after"]


def test_a_broken_evaluation_file_is_named(tmp_path):
    evaluation_file(tmp_path).parent.mkdir()
    evaluation_file(tmp_path).write_text("{")
    with pytest.raises(TrainingError, match=r"evaluation.json can't be read.*remove it"):
        read_evaluation(tmp_path)


def test_the_tiny_reward_follows_the_contract():
    images = torch.rand(2, 3, 16, 16)
    both = ColourReward()(images, ["a", "b", "c", "d"])
    assert both.shape == (4,)
    assert torch.allclose(both[2:], ColourReward()(images, ["c", "d"]))
