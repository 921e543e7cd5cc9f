"""Run descriptions: presets, overrides, and errors that name the setting."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from srpo_core.config import ConfigError, RunConfig, nearest
from srpo_core.description import ELSEWHERE, describe_fields, load_run, make_config, preset_names


@pytest.fixture
def described(tmp_path):
    """A run description with a few settings."""
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 2e-6, steps: 7}\nreward: {liked: [Real]}\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name):
    assert isinstance(load_run(name), RunConfig)


def test_defaults_are_the_published_recipe():
    config = RunConfig()
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (5e-6, (0.9, 0.999), 1e-4)
    assert config.optim.max_grad_norm == 0.1
    assert (config.data.height, config.data.width, config.data.batch_size) == (720, 720, 1)
    assert (config.rollout.num_steps, config.rollout.guidance, config.rollout.shift) == (25, 1.0, 3.0)
    align = config.align
    assert (align.range_start, align.range_end, align.schedule_steps, align.levels) == (5, 25, 50, 1000)
    assert (align.k_denoise, align.k_inversion, align.guidance) == ((0.1, 0.25), (0.3, 0.01), 3.5)
    assert align.branches == ["denoise", "inversion"]
    assert config.reward.liked == ["Natural-lighting", "Detail", "Detailed", "Real"]
    assert config.reward.disliked == ["Concept art", "Painting", "Anime", "Flat", "Oil"]
    assert config.reward.margin == 0.7


def test_a_file_sets_what_it_names(described):
    config = load_run(described)
    assert (config.optim.lr, config.optim.steps, config.reward.liked) == (2e-6, 7, ["Real"])
    assert config.optim.weight_decay == RunConfig().optim.weight_decay


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-5", 1e-5),
        ("optim.lr=0.001", 1e-3),
        ("optim.betas=[0.8, 1e-1]", (0.8, 0.1)),
        ("align.branches=[denoise]", ["denoise"]),
        ("align.k_inversion=[0.6, 0.01]", (0.6, 0.01)),
        ("reward.liked=[Real, Concept art]", ["Real", "Concept art"]),
        ("reward.name=mine.module:load", "mine.module:load"),
        ("data.prompts=/a folder/x=1.txt", "/a folder/x=1.txt"),
        ("output.dir=C:\\runs\\one", "C:\\runs\\one"),
        ("data.photos=null", None),
        ("lora.alpha=null", None),
        ("lora.rank=16", 16),
        ("output.tensorboard=false", False),
        ("seed=3", 3),
    ],
)
def test_overrides_are_read_as_the_setting_needs_them(described, override, value):
    config = load_run(described, [override])
    for name in override.partition("=")[0].split("."):
        config = getattr(config, name)
    assert config == value


def test_the_last_override_wins(described):
    assert load_run(described, ["optim.steps=3", "optim.steps=4"]).optim.steps == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown setting 'optim\.lrr'; did you mean 'optim\.lr'\?"),
        ("lr=1e-5", r"unknown setting 'lr'; did you mean 'optim\.lr'\?"),
        ("align.rank=4", r"unknown setting 'align\.rank'; did you mean 'lora\.rank'\?"),
        ("optimm.lr=1", r"unknown setting 'optimm'; did you mean 'optim'\?"),
        ("optim.lr.x=1", r"optim\.lr"),
        ("seed.x=1", r"seed"),
        ("optim.lr", r"'optim\.lr' is no setting; write section\.name=value"),
        ("=1", r"is no setting"),
        ("optim.lr=[1", r"optim\.lr='\[1' can't be read"),
        ("optim.lr=fast", r"optim\.lr='fast': .*valid number"),
        ("optim.lr=-1", r"optim\.lr=-1: .*greater than 0"),
        ("optim.lr=.nan", r"optim\.lr=nan: .*finite"),
        ("optim.steps=1.5", r"optim\.steps=1\.5: .*integer"),
        ("lora.rank=-1", r"lora\.rank=-1: .*greater than or equal to 0"),
        ("model.dtype=float16", r"model\.dtype='float16': .*'float32' or 'bfloat16'"),
        ("align.branches=[denoise, invert]", r"align\.branches\.1='invert': .*'denoise' or 'inversion'"),
        ("align.branches=[]", r"align\.branches=\[\]: .*at least 1"),
        ("align.branches=[denoise, denoise]", r"align.*names a branch twice"),
        ("align.range_end=5", r"range_start < range_end < schedule_steps must hold, got 5, 5, 50"),
        ("reward.liked=Real", r"reward\.liked='Real': .*valid list"),
        ("reward.more=[{name: clip, margn: 1}]", r"setting 'reward\.more\.0\.margn'; did you mean 'margin'\?"),
    ],
)
def test_a_bad_override_is_explained(described, override, message):
    with pytest.raises(ConfigError, match=message):
        load_run(described, [override])


def test_every_bad_setting_is_named(described):
    with pytest.raises(ConfigError) as error:
        load_run(described, ["optim.lr=-1", "lora.rnk=4"])
    assert "optim.lr=-1" in str(error.value)
    assert "unknown setting 'lora.rnk'" in str(error.value)


def test_unknown_presets_name_the_nearest():
    assert nearest("minature", ["miniature", "flux-dev"]).startswith("; did you mean 'miniature'?")
    with pytest.raises(ConfigError, match="unknown preset 'no-such-preset'"):
        load_run("no-such-preset")


def test_files_that_cant_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such run description: .*gone\.yaml"):
        load_run(str(tmp_path / "gone.yaml"))
    for name, content in [("a.yaml", "optim: [1"), ("b.json", "{"), ("c.yaml", "just words")]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            load_run(str(tmp_path / name))


def test_the_record_of_a_run_reads_back_the_same(tmp_path, described):
    config = load_run(described, ["align.k_denoise=[0.2, 0.3]", "optim.lr=1e-5", "data.photos=here", "seed=9"])
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**config.model_dump(mode="json"), "made_with": {"torch": "2"}}), encoding="utf-8")
    assert load_run(str(path)) == config
    assert make_config(config.model_dump()) == config


def test_assignments_are_checked_too():
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.optim.lr = -1
    with pytest.raises(ValidationError):
        config.optim.learning_rate = 1


def test_every_setting_is_described_once():
    fields = list(describe_fields())
    names = [name for name, *_ in fields]
    assert len(set(names)) == len(names)
    assert {"optim.lr", "align.branches", "seed"} <= set(names)
    for name, kind, _, description in fields:
        assert description, name
        assert kind, name
    kinds = {name: kind for name, kind, *_ in fields}
    assert kinds["model.dtype"] == "float32 | bfloat16"
    assert kinds["data.photos"] == "str | unset"
    assert kinds["align.k_denoise"] == "tuple of float"


def test_settings_load_without_the_heavy_libraries():
    code = """
import sys, srpo_core.config, srpo_core.registry
loaded = {"torch", "diffusers", "transformers", "peft", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
"""
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = make_config({"output": {"dir": "~/runs/one"}, "data": {"photos": "~/photos"}, "reward": {"path": "a~b"}})
    assert (config.output.dir, config.data.photos) == ("/home/someone/runs/one", "/home/someone/photos")
    assert config.reward.path == "a~b"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("optim.learning_rate", "optim.lr"), ("learning_rate", "optim.lr"), ("lora.network_dim", "lora.rank")],
)
def test_what_other_programs_call_a_setting_is_understood(theirs, ours):
    with pytest.raises(
        ConfigError, match=rf"unknown setting '{re.escape(theirs)}'; did you mean '{re.escape(ours)}'\?"
    ):
        load_run("miniature", [f"{theirs}=1"])


def test_every_foreign_name_leads_to_a_setting():
    names = {name for name, *_ in describe_fields()}
    assert set(ELSEWHERE.values()) <= names and not {name.split(".")[-1] for name in names} & ELSEWHERE.keys()
