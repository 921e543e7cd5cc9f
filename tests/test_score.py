"""Scoring picture files: where prompts come from, what the numbers are, what is written."""

import csv
import json

import numpy as np
import pytest
import torch
from fake_runs import picture
from PIL import Image
from tiny import ColourReward, tiny_config

from srpo_core.config import ConfigError, RewardConfig
from srpo_core.preference import ControlWords
from srpo_core.preview import score_images
from srpo_core.sampling import save_png
from srpo_core.scoring import (
    find_pictures,
    load_image,
    means,
    print_table,
    reward_settings,
    score_pictures,
    write_tables,
)

SETTINGS = RewardConfig(name="tiny:load_reward", liked=["Real", "Detail"], disliked=["Oil"])


def make_pictures(folder, sizes=(16, 16, 16)):
    for i, size in enumerate(sizes):
        picture(folder / f"{i}.png", np.random.default_rng(i), size, 1.0)
        (folder / f"{i}.txt").write_text(f"prompt {i}\n")
    return folder


def test_scores_are_those_of_the_reward(tmp_path):
    pictures = find_pictures([make_pictures(tmp_path)])
    rows = score_pictures(pictures, SETTINGS, device_name="cpu", batch_size=2)
    images, prompts = torch.stack([load_image(p.path) for p in pictures]), [p.prompt for p in pictures]
    reward = ColourReward()
    assert [row["reward"] for row in rows] == pytest.approx(reward(images, prompts).tolist(), abs=1e-5)
    oil = reward(images, [f"Oil. {prompt}" for prompt in prompts])
    assert [row["word:Oil"] for row in rows] == pytest.approx(oil.tolist(), abs=1e-5)
    for row in rows:
        assert row["relative"] == pytest.approx((row["word:Real"] + row["word:Detail"]) / 2 - row["word:Oil"], abs=1e-5)
    run_scores = score_images(images, prompts, reward, ControlWords(SETTINGS.liked, SETTINGS.disliked))
    assert [row["relative"] for row in rows] == pytest.approx(run_scores["relative"], abs=1e-5)  # as previews count


def test_sizes_may_differ(tmp_path):
    pictures = find_pictures([make_pictures(tmp_path, (16, 24, 16))])
    together = score_pictures(pictures, SETTINGS, device_name="cpu", batch_size=8)
    alone = [score_pictures([p], SETTINGS, device_name="cpu")[0] for p in pictures]
    assert [row["reward"] for row in together] == pytest.approx([row["reward"] for row in alone], abs=1e-5)


def test_measures_of_the_family_come_along(tmp_path):
    pictures = find_pictures([make_pictures(tmp_path)])
    rows = score_pictures(pictures, SETTINGS, tiny_config(tmp_path).model, "cpu")
    assert rows[0]["brightness"] == pytest.approx(load_image(pictures[0].path).mean().item(), abs=1e-5)


def test_prompts_beside_inside_and_in_a_file(tmp_path):
    make_pictures(tmp_path)
    (tmp_path / "1.txt").unlink()
    save_png(torch.rand(3, 16, 16), tmp_path / "1.png", {"prompt": "from inside"})
    assert [p.prompt for p in find_pictures([tmp_path])] == ["prompt 0", "from inside", "prompt 2"]
    listed = tmp_path / "list.txt"
    listed.write_text("x\ny\nz\n")
    assert [p.prompt for p in find_pictures([tmp_path], listed)] == ["x", "y", "z"]
    assert [p.prompt for p in find_pictures([tmp_path / "2.png"])] == ["prompt 2"]


def test_errors_name_the_file(tmp_path):
    make_pictures(tmp_path)
    (tmp_path / "list.txt").write_text("x\n")
    with pytest.raises(ConfigError, match="holds 1 prompts for 3 pictures"):
        find_pictures([tmp_path], tmp_path / "list.txt")
    (tmp_path / "1.txt").unlink()
    with pytest.raises(ConfigError, match=r"1\.png has no prompt: write one to 1\.txt"):
        find_pictures([tmp_path])
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"1\.txt is empty"):
        find_pictures([tmp_path])
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"1\.txt can't be read as UTF-8"):
        find_pictures([tmp_path])
    (tmp_path / "1.txt").unlink()
    save_png(torch.rand(3, 16, 16), tmp_path / "1.png", {"prompt": '{"3": {"class_type": "KSampler"}}'})
    with pytest.raises(ConfigError, match=r"1\.png holds a ComfyUI graph instead of a prompt"):
        find_pictures([tmp_path])
    with pytest.raises(ConfigError, match="no such file"):
        find_pictures([tmp_path / "none"])
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        find_pictures([tmp_path / "sub"])


def test_unreadable_pictures(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"a\.png is no readable picture"):
        load_image(path)
    whole = tmp_path / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    path.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"a\.png is no readable picture"):
        load_image(path)


def test_tables(tmp_path, capsys):
    rows = score_pictures(find_pictures([make_pictures(tmp_path)]), SETTINGS, device_name="cpu")
    rows[0]["prompt"] = '[red]quotes, "commas"[/red]'
    table, record = write_tables(rows, SETTINGS, tmp_path / "out" / "v1.2")
    assert (table.name, record.name) == ("v1.2.csv", "v1.2.json")
    with table.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["prompt"] for row in read] == [row["prompt"] for row in rows]
    assert float(read[1]["relative"]) == rows[1]["relative"]
    data = json.loads(record.read_text())
    assert data["mean"]["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert data["mean"] == means(rows)
    assert data["reward"]["liked"] == ["Real", "Detail"]
    print_table(rows)
    shown = capsys.readouterr().out
    assert "[red]" in shown
    assert "mean of 3" in shown


def test_another_reward_takes_no_weights_from_the_source():
    source = RewardConfig(name="clip", path="clip.pt")
    assert reward_settings(source, {"name": None, "liked": ["Real"]}).path == "clip.pt"
    assert reward_settings(source, {"name": "miniature"}).path is None
    assert reward_settings(source, {"name": "miniature", "path": "x"}).path == "x"
    with pytest.raises(ConfigError, match=r"reward\.liked"):
        reward_settings(source, {"liked": []})
