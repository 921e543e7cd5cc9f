"""Exports of runs: the LoRA, the transformer or the autoencoder of a checkpoint, with the run's description inside."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from safetensors.torch import load_file
from small_flux import metadata
from tiny import load, tiny_config
from tiny_flux import random_latents, tiny_pipeline

from srpo_core import export
from srpo_core.assemble import assemble
from srpo_core.checkpoint import checkpoint_folder, read_tensors
from srpo_core.config import ConfigError
from srpo_core.description import load_run, make_config
from srpo_core.models.flux import FluxFlow


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a LoRA run and of a full run with a running average, four steps each."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for kind, settings in {
        "lora": {"lora__rank": 2, "lora__alpha": 3.0},
        "full": {"optim__ema_decay": 0.9},
    }.items():
        trainer = assemble(tiny_config(folder / kind, output__keep_checkpoints=3, **settings))
        trainer.train()
        made[kind] = folder / kind, trainer.flow.module
    return made


def tiny_velocity(module):
    """Of the family of tests/tiny.py, whose text is narrower."""
    parts = load(tiny_config("unused").model, "cpu")
    with torch.no_grad():
        prompts = parts.text_encoder(["a red cat", "a tree"])
        return FluxFlow(module).velocity(random_latents(), torch.tensor([0.9, 0.7]), prompts, 3.5)


def fresh_transformer():
    return load(tiny_config("unused").model, "cpu").flow.module


def test_a_lora_run_becomes_a_lora_file(runs):
    run_dir, module = runs["lora"]
    path = export.export_run(run_dir)
    assert path == run_dir / "export" / "lora-000004.safetensors"
    transformer = fresh_transformer()
    untouched = tiny_velocity(transformer)
    pipeline = tiny_pipeline(transformer=transformer)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    assert relative_error(tiny_velocity(transformer), tiny_velocity(module)) < 1e-5
    assert not torch.equal(tiny_velocity(module), untouched)
    described = metadata(path)
    assert described["srpo_step"] == "4"
    assert described["srpo_weights"] == "trained"
    record = json.loads(described["srpo_run"])
    record.pop("made_with")
    assert make_config(record) == load_run(str(run_dir / "run.json"))


def test_a_lora_run_merges_into_a_transformer(runs, tmp_path):
    run_dir, module = runs["lora"]
    merged = FluxTransformer2DModel.from_pretrained(export.export_run(run_dir, tmp_path / "merged", what="transformer"))
    assert relative_error(tiny_velocity(merged), tiny_velocity(module)) < 1e-5


def test_a_full_run_becomes_its_average_or_its_trained_weights(runs, tmp_path):
    run_dir, module = runs["full"]
    average = read_tensors(checkpoint_folder(run_dir, 4), "ema")
    out = export.export_run(run_dir)
    assert out == run_dir / "export" / "full-000004"
    tensors = load_file(out / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in average.items())
    assert metadata(out / "diffusion_pytorch_model.safetensors")["srpo_weights"] == "averaged"
    out = export.export_run(run_dir, tmp_path / "trained.safetensors", averaged=False)
    trained = module.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in load_file(out).items())
    assert not torch.equal(trained["proj_out.weight"], tensors["proj_out.weight"])


def test_any_checkpoint_can_be_exported(runs, tmp_path):
    run_dir, _ = runs["lora"]
    path = export.export_run(run_dir, tmp_path / "early.safetensors", checkpoint=2)
    early = read_tensors(checkpoint_folder(run_dir, 2), "weights")
    name, tensor = next(item for item in early.items() if ".lora_B." in item[0])
    assert torch.equal(load_file(path)["transformer." + name.replace(".default", "")], tensor)
    best = export.export_run(run_dir, tmp_path / "best.safetensors", checkpoint="best", dtype="float16")
    assert int(metadata(best)["srpo_step"]) in (2, 4)
    assert export.find_checkpoint(run_dir, "2") == checkpoint_folder(run_dir, 2)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lora", {"checkpoint": 3}, "no checkpoint 3; there are step-000002, step-000004"),
        ("lora", {"checkpoint": "newest"}, "last, best or a step, got 'newest'"),
        ("lora", {"averaged": True}, r"no running average: .*optim\.ema_decay=0"),
        ("lora", {"dtype": "float8"}, r"unknown dtype 'float8' \(choices: float32, bfloat16, float16, scaled-fp8\)"),
        ("lora", {"out": "folder"}, r"a LoRA is one file: folder should end in \.safetensors"),
        ("lora", {"what": "unet"}, "auto, lora, transformer or vae, got 'unet'"),
        ("lora", {"what": "lora", "dtype": "scaled-fp8"}, "only a transformer can be that, not a lora"),
        ("full", {"dtype": "scaled-fp8"}, "diffusers has no such format"),
        ("full", {"format": "comfyui", "out": "folder"}, r"a transformer in ComfyUI's format is one file"),
        ("full", {"format": "safetensors"}, "unknown format 'safetensors'"),
        ("full", {"what": "lora"}, "trained all parameters, not a LoRA"),
    ],
)
def test_what_cant_be_exported_is_named(runs, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        export.export_run(runs[kind][0], **options)


def test_folders_without_a_run_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: there is no run\.json"):
        export.export_run(tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        export.export_run(tmp_path)


def test_a_run_in_comfyuis_format(runs, tmp_path):
    """The original names, in float32 the same numbers; the file is named for what is in it."""
    run_dir, _ = runs["full"]
    plain = load_file(export.export_run(run_dir, tmp_path / "plain.safetensors"))
    path = export.export_run(run_dir, format="comfyui", dtype="float32")
    assert path == run_dir / "export" / "full-000004-float32.safetensors"
    tensors = load_file(path)
    assert torch.equal(tensors["img_in.weight"], plain["x_embedder.weight"])
    block = [
        plain[f"single_transformer_blocks.0.{part}.weight"]
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    assert torch.equal(tensors["single_blocks.0.linear1.weight"], torch.cat(block))
    assert metadata(path)["srpo_step"] == "4"
    small = load_file(export.export_run(run_dir, format="comfyui", dtype="scaled-fp8"))
    assert small["single_blocks.0.linear1.weight"].dtype == torch.float8_e4m3fn


def test_a_runs_autoencoder_in_diffusers_format(runs, tmp_path):
    run_dir, _ = runs["full"]
    module = load(tiny_config("unused").model, "cpu").autoencoder.module
    again = AutoencoderTiny.from_pretrained(
        export.export_run(run_dir, tmp_path / "vae", what="vae", format="diffusers")
    )
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in again.state_dict().items())
