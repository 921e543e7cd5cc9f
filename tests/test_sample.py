"""Drawing pictures: seeds, files, metadata, checkpoints and LoRA files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import PROMPTS, tiny_config, tiny_flow

from srpo_core.assemble import assemble
from srpo_core.config import ConfigError
from srpo_core.sampling import SampleSettings, chosen_checkpoint, merge_lora, sample


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def draw(config, folder, checkpoint=None, **options):
    return sample(config, checkpoint, SampleSettings.of(config, steps=2), folder, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run with checkpoints of steps 2 and 4."""
    config = tiny_config(tmp_path_factory.mktemp("run") / "run", output__keep_checkpoints=2, optim__lr=0.02)
    return config, assemble(config).train().run_dir


def test_a_picture_depends_on_prompt_and_seed_alone(tmp_path):
    config = tiny_config(tmp_path)
    prompts = ["a red cat", "a blue dog", "a house"]
    one = draw(config, tmp_path / "one", prompts=prompts, seeds=range(2), batch_size=1)
    four = draw(config, tmp_path / "four", prompts=prompts, seeds=range(2), batch_size=4)
    alone = draw(config, tmp_path / "alone", prompts=["a blue dog"], seeds=[1], batch_size=4)
    assert [path.name for path in one] == [path.name for path in four]
    for left, right in zip(one, four, strict=True):
        assert abs(pixels(left) - pixels(right)).max() <= 1  # sums of other batches round otherwise
    assert abs(pixels(alone[0]) - pixels(one[3])).max() <= 1
    assert abs(pixels(one[0]) - pixels(one[1])).max() > 1
    again = draw(config, tmp_path / "again", prompts=prompts, seeds=range(2), batch_size=4)
    assert all(left.read_bytes() == right.read_bytes() for left, right in zip(four, again, strict=True))


def test_files_say_how_they_were_made(tmp_path):
    prompt = 'größe, "100%" [bold]/../'
    (path,) = draw(tiny_config(tmp_path), tmp_path / "out", prompts=[prompt], seeds=[7])
    assert path.parent == tmp_path / "out"
    with Image.open(path) as image:
        assert image.size == (16, 16)
        assert image.info["prompt"] == prompt
        assert image.info["seed"] == "7"
        made_by = json.loads(image.info["srpo"])
    assert made_by["checkpoint"] == "base"
    assert made_by["steps"] == 2
    assert made_by["guidance"] == 3.5


def test_nothing_is_overwritten_unasked(tmp_path):
    config = tiny_config(tmp_path)
    (path,) = draw(config, tmp_path / "out", prompts=["a"])
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        draw(config, tmp_path / "out", prompts=["a"])
    assert path.read_bytes() == b"mine"
    draw(config, tmp_path / "out", prompts=["a"], overwrite=True)
    assert path.read_bytes() != b"mine"
    assert sorted(tmp_path.glob("out/.tmp*")) == []


def test_held_out_prompts_are_the_default(tmp_path):
    files = draw(tiny_config(tmp_path), tmp_path / "out")
    with Image.open(files[0]) as image:
        assert image.info["prompt"] == PROMPTS["eval"][0]
    assert len(files) == len(PROMPTS["eval"])


def test_prompts_from_a_file_and_bad_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    config = tiny_config(tmp_path)
    assert len(draw(config, tmp_path / "out", prompts_file=str(tmp_path / "prompts.txt"))) == 2
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        draw(config, tmp_path / "out2", prompts_file=str(tmp_path / "empty.txt"))
    with pytest.raises(ConfigError, match="--prompt is empty"):
        draw(config, tmp_path / "out2", prompts=[" "])


def test_checkpoints_by_name(run, tmp_path):
    config, folder = run
    assert chosen_checkpoint(folder, None).name == "step-000004"
    assert chosen_checkpoint(folder, "last").name == "step-000004"
    assert chosen_checkpoint(folder, "2").name == "step-000002"
    assert chosen_checkpoint(folder, "base") is None
    assert chosen_checkpoint(None, None) is None
    for name in ("3", "newest"):
        with pytest.raises(ConfigError, match="checkpoint"):
            chosen_checkpoint(folder, name)
    with pytest.raises(ConfigError, match="a preset has no checkpoints"):
        chosen_checkpoint(None, "last")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        chosen_checkpoint(tmp_path, None)
    (base,) = draw(config, tmp_path / "base", prompts=["a"])
    (trained,) = draw(config, tmp_path / "trained", chosen_checkpoint(folder, "last"), prompts=["a"])
    assert abs(pixels(base) - pixels(trained)).max() > 0
    with Image.open(trained) as image:
        assert "step-000004" in json.loads(image.info["srpo"])["checkpoint"]


def lora_file(path, layer="single_transformer_blocks.0.attn.to_q", rank=2, width=32, alpha=4.0, prefix="transformer."):
    down, up = torch.randn(rank, width), torch.randn(width, rank)
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(alpha)}
    save_file({f"{prefix}{layer}.{name}": tensor for name, tensor in tensors.items()}, path)
    return alpha / rank * up @ down


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_lora_file_adds_its_scaled_product(tmp_path, prefix):
    change = lora_file(tmp_path / "lora.safetensors", prefix=prefix)
    module, layer = tiny_flow().module, "single_transformer_blocks.0.attn.to_q"
    before = module.get_submodule(layer).weight.clone()
    assert merge_lora(module, tmp_path / "lora.safetensors") == 1
    torch.testing.assert_close(module.get_submodule(layer).weight - before, change, rtol=1e-4, atol=1e-5)


def test_lora_files_that_do_not_fit(tmp_path):
    path = tmp_path / "lora.safetensors"
    for options in ({"layer": "blocks.0.attn.to_q"}, {"width": 16}):
        lora_file(path, **options)
        with pytest.raises(ConfigError, match="is for another model"):
            merge_lora(tiny_flow().module, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="holds no LoRA"):
        merge_lora(tiny_flow().module, path)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="can't be read"):
        merge_lora(tiny_flow().module, path)
    with pytest.raises(ConfigError, match="can't be read"):
        merge_lora(tiny_flow().module, tmp_path / "none.safetensors")


def test_an_exported_lora_draws_the_same_as_its_checkpoint(tmp_path):
    from srpo_core.export import export_run

    config = tiny_config(tmp_path / "run", lora={"rank": 2, "alpha": 32}, optim__lr=0.02)
    folder = assemble(config).train().run_dir
    lora = export_run(folder, tmp_path / "lora.safetensors")
    (trained,) = draw(config, tmp_path / "a", chosen_checkpoint(folder, None), prompts=["a"])
    (merged,) = draw(config, tmp_path / "b", prompts=["a"], lora=lora)
    (base,) = draw(config, tmp_path / "c", prompts=["a"])
    assert abs(pixels(trained) - pixels(merged)).max() <= 1
    assert abs(pixels(base) - pixels(merged)).max() > 1
