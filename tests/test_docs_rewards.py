"""What docs/rewards.md shows and says: its code runs, its settings are read, its numbers are the measured ones."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_docs import tables

from srpo_core import cli
from srpo_core.config import RewardConfig
from srpo_core.description import load_run
from srpo_core.interfaces import Reward
from srpo_core.preference import two_wordings
from srpo_core.rewards import REWARDS, load_rewards
from srpo_core.rewards.images import square
from srpo_core.rewards.mixture import USUAL

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def block(language):
    """The page's one block of code in a language."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture
def muted(tmp_path, monkeypatch):
    """A working folder with the page's own reward in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "muted.py").write_text(block("python"), encoding="utf-8")
    return "muted.py:load"


def test_the_pages_own_reward_does_what_it_says(muted):
    (part,) = load_rewards(RewardConfig(name=muted), "cpu")
    assert isinstance(part.reward, Reward)
    grey, red = torch.full((3, 8, 8), 0.5), torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8)
    images = torch.stack([grey, red]).requires_grad_()
    real, oil = two_wordings(part.reward, images, ["a", "b"], "Real", "Oil")
    assert torch.allclose(real, torch.tensor([0, -1.0])) and torch.allclose(oil, torch.tensor([0, -0.2]))
    part.score(real, oil, k=0.1).sum().backward()
    assert (images.grad[1, 0] < 0).all()  # less red is better


def test_the_pages_own_reward_trains(muted, tmp_path):
    small = ["model.family=tiny:load", "data.height=16", "data.width=16", "data.batch_size=1", "rollout.num_steps=2"]
    short = ["optim.steps=1", "output.preview_every=0", "output.evaluate_prompts=0", f"output.dir={tmp_path / 'run'}"]
    names = [f"reward.name={muted}", f"reward.more=[{{name: {tmp_path / 'muted.py'}:load, weight: 0.3}}]"]
    assert cli.main(["train", "miniature", *names, *small, *short]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (step,) = [line for line in map(json.loads, lines) if "loss" in line]
    assert step["loss"] > 0 and step["grad_norm"] > 0


def test_the_mixture_on_the_page_is_read(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(block("yaml"), encoding="utf-8")
    reward = load_run(str(path)).reward
    parts = [(reward.name, reward.scale, reward.weight), *((m.name, m.scale, m.weight) for m in reward.more)]
    assert parts == [("hpsv2", 1, 1), ("pickscore", 0.05, 0.5), ("imagereward", 0.04, 0.5)]


def test_every_reward_is_on_the_page_and_no_other():
    overview, starts, usual = (rows for rows in tables(PAGE))
    assert {row["name"].strip("`") for row in overview} == set(REWARDS)
    assert {row["reward.name"].strip("`") for row in starts} == set(REWARDS) - {"miniature"}
    spans = {row["reward.name"].strip("`"): (float(row["0"]), float(row["1"])) for row in usual}
    assert spans == USUAL
    for preset in ("flux-dev", "flux-dev-pickscore"):
        reward = load_run(preset).reward
        (row,) = (row for row in starts if row["reward.name"] == f"`{reward.name}`")
        for name in ("scale", "offset", "margin"):
            assert float(row[f"reward.{name}"].strip("`")) == getattr(reward, name)


def test_what_crop_leaves_out_of_a_wide_picture():
    (said,) = re.findall(r"Of a 16:9 picture (\d+) % lie outside", PAGE)
    wide = torch.zeros(1, 3, 224, 398)
    kept = square(wide, 224, "crop").shape[-1] / wide.shape[-1]
    assert round(100 * (1 - kept)) == int(said)


def test_the_differences_on_the_page_are_the_measured_ones():
    found = json.loads((ROOT / "scripts" / "results" / "rewards.json").read_text(encoding="utf-8"))["imagereward"]
    assert "within 1e-6 and its gradients within 1e-5" in PAGE and "446 million parameters" in PAGE
    assert found["size"] == "full" and round(found["parameters"] / 1e6) == 446
    assert found["largest score difference"] < 1e-6
    assert found["largest gradient difference, of the largest gradient"] < 1e-5
