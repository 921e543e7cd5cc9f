"""Scoring picture files: where prompts come from, what the numbers are, what is written."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from fake_runs import picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from tiny import ColourReward, tiny_config

from srpo_core.cli import main
from srpo_core.config import ConfigError, MoreReward, RewardConfig
from srpo_core.errors import NotFiniteError
from srpo_core.graph_prompt import graph_prompt
from srpo_core.preference import ControlWords
from srpo_core.preview import score_images
from srpo_core.report.score_page import Thumbnails, write_score_page
from srpo_core.score_files import find_pictures, load_image
from srpo_core.score_tables import fit_in_words, print_table, write_tables
from srpo_core.scoring import reward_settings, row_means, score_pictures

SETTINGS = RewardConfig(name="tiny:load_reward", liked=["Real", "Detail"], disliked=["Oil"], fit="pad")
MIXTURE = SETTINGS.model_copy(update={"more": [MoreReward(name="tiny:load_reward", scale=2.0)]})


def save_png(path, **text):
    info = PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)


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
    realistic, artificial = (
        reward(images, [f"{word}. {prompt}" for prompt in prompts]) for word in ("Realistic photo", "CG Render")
    )
    assert [row["sgp"] for row in rows] == pytest.approx((realistic - artificial).tolist(), abs=1e-5)
    words = ControlWords(SETTINGS.liked, SETTINGS.disliked)
    run_scores = score_images(images, prompts, reward, words, SETTINGS.contrast)
    assert set(run_scores) | {"file", "prompt"} == set(rows[0])
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
    save_png(tmp_path / "1.png", prompt="from inside")
    assert [p.prompt for p in find_pictures([tmp_path])] == ["prompt 0", "from inside", "prompt 2"]
    save_png(tmp_path / "1.png", parameters="of another tool\nSteps: 20, Sampler: Euler")
    assert find_pictures([tmp_path])[1].prompt == "of another tool"
    listed = tmp_path / "list.txt"
    listed.write_text("x\ny\nz\n")
    assert [p.prompt for p in find_pictures([tmp_path], str(listed))] == ["x", "y", "z"]
    (tmp_path / "list.csv").write_text("caption,words\n1,x\n2,y\n3,z\n")
    assert [p.prompt for p in find_pictures([tmp_path], str(tmp_path / "list.csv"), "words")] == ["x", "y", "z"]
    assert [p.prompt for p in find_pictures([tmp_path / "2.png"])] == ["prompt 2"]


SIMPLE = {
    "3": {"class_type": "KSampler", "inputs": {"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
}
FLUX = {
    "13": {"inputs": {"guider": ["22", 0], "sampler": ["16", 0], "latent_image": ["27", 0]}},
    "22": {"inputs": {"model": ["30", 0], "conditioning": ["26", 0]}},
    "26": {"inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "6": {"inputs": {"text": ["9", 0], "clip": ["11", 0]}},
    "9": {"inputs": {"value": "a red cat"}},
}


@pytest.mark.parametrize("graph", [SIMPLE, FLUX])
def test_comfyui_pictures_tell_their_prompt(tmp_path, graph):
    save_png(tmp_path / "a.png", prompt=json.dumps(graph), workflow="{}")
    assert find_pictures([tmp_path])[0].prompt == "a red cat"


@pytest.mark.parametrize(
    "change",
    [
        {"8": {"inputs": {"positive": ["7", 0], "latent_image": ["5", 0]}}},  # a second sampler with another text
        {"6": {"inputs": {"text": ["6", 0]}}},  # a text that is its own source
        {"6": {"inputs": {"conditioning": ["3", 0]}}},
        {"6": None},
    ],
)
def test_graphs_without_one_prompt_have_none(change):
    assert graph_prompt(json.dumps(SIMPLE | change)) == ""


def test_errors_name_the_file(tmp_path):
    make_pictures(tmp_path)
    (tmp_path / "list.txt").write_text("x\n")
    with pytest.raises(ConfigError, match="holds 1 prompts for 3 pictures"):
        find_pictures([tmp_path], str(tmp_path / "list.txt"))
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
    save_png(tmp_path / "1.png", prompt='{"3": {"class_type": "KSampler"}}')
    with pytest.raises(ConfigError, match=r"1\.png holds a ComfyUI graph that tells of no one prompt"):
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


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_torn_picture_is_found_before_anything_is_scored(tmp_path, kind):
    make_pictures(tmp_path)
    path = tmp_path / f"9.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    (tmp_path / "9.txt").write_text("last")
    assert len(find_pictures([tmp_path])) == 4
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ConfigError, match=rf"9\.{kind} is no readable picture"):
        find_pictures([tmp_path])


def test_odd_metadata_and_tiny_pictures(tmp_path):
    save_png(tmp_path / "a.png", prompt="[" * 100_000)  # nested too deep for any parser
    assert find_pictures([tmp_path])[0].prompt.startswith("[[")
    chain = {str(i): {"inputs": {"conditioning": [str(i + 1), 0], "latent_image": ["x", 0]}} for i in range(5000)}
    save_png(tmp_path / "a.png", prompt=json.dumps(chain))
    with pytest.raises(ConfigError, match="tells of no one prompt"):
        find_pictures([tmp_path])
    save_png(tmp_path / "a.png", parameters="a car, <lora:style:0.8>\nNegative prompt: x\nSteps: 4, Sampler: Euler")
    Image.new("RGB", (5, 3)).save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("small")
    assert [one.prompt for one in find_pictures([tmp_path])] == ["a car", "small"]


def test_pictures_are_read_as_they_are_seen(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "grey16.png")
    assert load_image(tmp_path / "grey16.png").mean().item() == pytest.approx(0.5, abs=0.01)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").min().item() == 1.0  # on white


def test_a_score_that_is_no_number_is_an_error(tmp_path):
    reward = "lambda images, prompts: torch.full((len(prompts),), torch.nan)"
    (tmp_path / "blind.py").write_text(f"import torch\ndef load(config, device):\n    return {reward}\n")
    settings = SETTINGS.model_copy(update={"name": f"{tmp_path / 'blind.py'}:load"})
    with pytest.raises(NotFiniteError, match=r"0\.png: its reward is no finite number"):
        score_pictures(find_pictures([make_pictures(tmp_path)]), settings, device_name="cpu")


def test_tables(tmp_path, capsys):
    rows = score_pictures(find_pictures([make_pictures(tmp_path)]), SETTINGS, device_name="cpu")
    rows[0]["prompt"] = '[red]quotes, "commas"[/red] <lora:cat:1>\x1b[2J'
    table, record = write_tables(rows, SETTINGS, tmp_path / "out" / "v1.2")
    assert (table.name, record.name) == ("v1.2.csv", "v1.2.json")
    with table.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["prompt"] for row in read] == [row["prompt"] for row in rows]
    assert float(read[1]["relative"]) == rows[1]["relative"]
    data = json.loads(record.read_text())
    assert data["mean"]["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert data["mean"] == row_means(rows)
    assert (data["reward"]["liked"], data["reward"]["fit"]) == (["Real", "Detail"], "pad")
    print_table(rows, SETTINGS, console=Console(width=120))
    shown = capsys.readouterr().out
    assert "[red]" in shown and "<lora:cat:1>" in shown and "\x1b" not in shown
    assert "mean of 3" in shown
    assert "whole, with black beside what is not square" in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_the_terminal(tmp_path, capsys, width):
    pictures = find_pictures([make_pictures(tmp_path)])
    rows = score_pictures(pictures, MIXTURE, tiny_config(tmp_path).model, "cpu")
    print_table(rows, MIXTURE, console=Console(width=width))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert f"{rows[0]['reward']:.4f}" in shown and "brightness" in shown and "reward:tiny:load_reward#2" in shown


def test_a_mixture_shows_its_parts(tmp_path):
    (row,) = score_pictures(find_pictures([make_pictures(tmp_path, (16,))]), MIXTURE, device_name="cpu")
    one, two = row["reward:tiny:load_reward"], row["reward:tiny:load_reward#2"]
    assert one == pytest.approx(two) and row["reward"] == pytest.approx((one + 2 * two) / 2)


class Page(HTMLParser):
    """The cells of the table, the addresses, and a complaint about tags that don't match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.rows, self.scripts = [], [], [], 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.addresses += [(name, value) for name, value in attrs if name in ("src", "href")]
        self.scripts += tag == "script"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br", "input", "rect", "line", "circle", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag if tag not in ("rect", "line", "circle", "path") else True

    def handle_data(self, data):
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def score_page(folder, rows, pictures, settings=SETTINGS):
    thumbnails = Thumbnails(len(pictures))
    for one in pictures:
        thumbnails.add(one, load_image(one.path))
    return write_score_page(rows, settings, thumbnails.uris, folder / "scores", "<b>set</b>").read_text("utf-8")


def test_the_page_holds_every_picture_and_number(tmp_path):
    pictures = find_pictures([make_pictures(tmp_path / "a b", (16, 24, 16, 400))])
    rows = score_pictures(pictures, SETTINGS, device_name="cpu")
    rows[0]["prompt"] = evil = '<script>alert("x")</script> & more'
    text = score_page(tmp_path, rows, pictures)
    page = Page(text)
    assert page.scripts == 1 and not re.search(r"url\(|@import|https?://", text)
    head, *lines = page.rows
    assert head == ["Picture", "Reward", "Relative reward", "Realism (SGP)", "Real", "Detail", "Oil"]
    assert sorted(line[0] for line in lines) == sorted(f"{i}.png{row['prompt']}" for i, row in enumerate(rows))
    assert any(evil in line[0] for line in lines)
    shown = [float(line[2].replace("−", "-")) for line in lines]
    assert shown == sorted(shown, reverse=True)  # in order without the script, too
    assert shown == pytest.approx(sorted((row["relative"] for row in rows), reverse=True), abs=0.006)
    assert [value for name, value in page.addresses if name == "href"].count("a%20b/3.png") == 1
    images = [value for name, value in page.addresses if name == "src"]
    assert len(images) == 4 and all(value.startswith("data:image/jpeg;base64,") for value in images)
    sizes = [Image.open(io.BytesIO(base64.b64decode(value.split(",")[1]))).size for value in images]
    assert max(sizes) == (192, 192) and min(sizes) == (16, 16)
    assert "(fit pad)" in text and "&lt;b&gt;set&lt;/b&gt;" in text and "<b>set" not in text


def test_pages_of_many_pictures_have_small_thumbnails():
    assert [Thumbnails(count).side for count in (1, 200, 201, 3000, 9000)] == [192, 192, 144, 96, 64]


def test_the_command_writes_tables_and_page(tmp_path, capsys):
    folder = make_pictures(tmp_path / "pictures")
    (tmp_path / "run.json").write_text(tiny_config(tmp_path / "run").model_dump_json())
    asked = ["score", str(folder), "--source", str(tmp_path / "run.json"), "--device", "cpu"]
    assert main(asked) == 0
    assert {path.suffix for path in folder.glob("srpo_scores.*")} == {".csv", ".json", ".html"}
    assert json.loads((folder / "srpo_scores.json").read_text())["reward"]["fit"] == "crop"
    assert main([*asked, "--fit", "pad", "--out", str(tmp_path / "padded")]) == 0
    assert json.loads((tmp_path / "padded.json").read_text())["reward"]["fit"] == "pad"
    assert main([*asked, "--out", str(tmp_path / "named.csv")]) == 0
    assert sorted(path.name for path in tmp_path.glob("named*")) == ["named.csv", "named.html", "named.json"]
    assert str(tmp_path / "padded.html") in capsys.readouterr().out.replace("\n", "")


def test_pictures_in_a_run_are_scored_by_its_reward(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", reward__liked=["Real"], reward__disliked=["Oil"])
    folder = make_pictures(tmp_path / "run" / "samples" / "last")
    (tmp_path / "run" / "run.json").write_text(config.model_dump_json())
    assert main(["score", str(folder), "--device", "cpu"]) == 0
    reward = json.loads((folder / "srpo_scores.json").read_text())["reward"]
    assert (reward["name"], reward["liked"]) == (config.reward.name, ["Real"])
    assert f"Scored by {config.reward.name}" in capsys.readouterr().out.replace("\n", " ")


def test_a_place_that_cant_be_written_is_found_before_scoring(tmp_path, capsys):
    folder = make_pictures(tmp_path / "pictures")
    (tmp_path / "file").write_text("")
    assert main(["score", str(folder), "--device", "cpu", "--out", str(tmp_path / "file" / "x")]) == 2
    said = capsys.readouterr()
    assert "--out: " in said.err and "can't be written to" in said.err and "scoring" not in said.out
    assert main(["score", str(folder), "--device", "nothing"]) == 2
    assert "--device='nothing'" in capsys.readouterr().err


def test_another_reward_takes_no_weights_from_the_source():
    source = RewardConfig(name="clip", path="clip.pt")
    assert reward_settings(source, {"name": None, "liked": ["Real"]}).path == "clip.pt"
    assert reward_settings(source, {"name": "miniature"}).path is None
    assert reward_settings(source, {"name": "miniature", "path": "x"}).path == "x"
    mixed = source.model_copy(update={"more": [MoreReward(name="hpsv2")], "contrast": ("a", "b")})
    kept, other = (reward_settings(mixed, {"name": name}) for name in (None, "miniature"))
    assert (kept.fit, kept.more[0].fit, kept.contrast) == ("crop", "pad", ("a", "b"))
    assert (other.more, other.contrast) == ([], RewardConfig().contrast)
    assert reward_settings(mixed, {"name": "hpsv2"}).fit == "pad"  # as its authors score
    padded = reward_settings(mixed, {"fit": "pad"})
    assert (padded.fit, padded.more[0].fit) == ("pad", "pad")
    assert "clip saw the pictures by their centre square" in fit_in_words(kept)
    with pytest.raises(ConfigError, match=r"reward\.liked"):
        reward_settings(source, {"liked": []})
