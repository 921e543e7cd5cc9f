"""`srpo encode` and training through the cache, with real FLUX parts at toy size; two processes under torchrun too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import weights_hash
from tiny_flux import save_tiny_flux

from srpo_core import cli
from srpo_core.assemble import assemble
from srpo_core.checkpoint import latest, load_weights
from srpo_core.config import ConfigError
from srpo_core.description import make_config
from srpo_core.embeddings import EmbeddingCache
from srpo_core.models import load_model
from srpo_core.models.flux_text import FluxTextEncoder

TRAIN = [f"a thing, number {chr(97 + i)}" for i in range(7)]
HELD_OUT = ["a tree", "a river", "a horse"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture
def settings(folder, tmp_path):
    """A short LoRA run of toy FLUX."""
    (tmp_path / "train.csv").write_text("id,prompt\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TRAIN)))
    (tmp_path / "eval.txt").write_text("\n".join(HELD_OUT))
    return {
        "model": {"family": "flux", "path": str(folder), "dtype": "float32", "recompute": False},
        "data": {
            "prompts": str(tmp_path / "train.csv"), "eval_prompts": str(tmp_path / "eval.txt"), "height": 16,
            "width": 16, "batch_size": 2,
        },
        "rollout": {"num_steps": 2},
        "reward": {"name": "tiny:load_reward", "margin": 5.0},
        "optim": {"steps": 2, "lr": 1e-3},
        "lora": {"rank": 2},
        "output": {
            "dir": str(tmp_path / "run"), "preview_every": 0, "checkpoint_every": 1, "tensorboard": False,
        },
        "parallel": {"device": "cpu"},
    }  # fmt: skip


@pytest.fixture
def description(settings, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(make_config(settings).model_dump_json())
    return str(path)


def some_photos(folder):
    """A folder of two photos with captions."""
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo of {name}")
    return folder


def files_in(folder):
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())


def test_everything_is_encoded_once_and_what_is_there_stays(description, folder, tmp_path, capsys):
    out = tmp_path / "cache"
    assert cli.main(["encode", description, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "encoding prompts: 10 to do" in said
    assert f"10 prompts encoded, 0 there already: 0.5 MB in {out}" in said
    assert f"data.embeddings={out}" in said
    files = files_in(out)
    assert len(files) == 10
    encoder = load_model(make_config({"model": {"path": str(folder), "dtype": "float32"}}).model, "cpu").text_encoder
    cache = EmbeddingCache(out, encoder.fingerprint)
    batch = encoder(TRAIN[:1])
    assert torch.equal(cache.get(TRAIN[0])["prompt_embeds"], batch.embeds["prompt_embeds"][0])
    times = [(out / path).stat().st_mtime_ns for path in files]
    (out / files[3]).unlink()
    assert cli.main(["encode", description, "--out", str(out)]) == 0
    assert "1 prompt encoded, 9 there already" in capsys.readouterr().out
    assert files_in(out) == files
    assert [(out / path).stat().st_mtime_ns for path in files[:3]] == times[:3]


def test_prompts_of_a_file_and_captions_of_photos(description, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "one more"}\n{"text": "a tree"}\n{"text": "one more"}')
    out = str(tmp_path / "cache")
    assert cli.main(["encode", description, "--prompts", str(more), "--out", out]) == 0
    assert "2 prompts encoded" in capsys.readouterr().out
    photos = some_photos(tmp_path / "photos")
    assert cli.main(["encode", description, f"data.photos={photos}", "--out", out]) == 0
    assert "4 prompts encoded, 1 there already" in capsys.readouterr().out  # photos alone: no rollouts of prompts
    assert cli.main(["encode", description, f"data.photos={photos}", "data.photo_share=0.5", "--out", out]) == 0
    assert "7 prompts encoded, 5 there already" in capsys.readouterr().out


def test_two_processes_share_the_work(description, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert cli.main(["encode", description, "--out", str(alone)]) == 0
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=localhost:0", str(root / "srpo_core" / "__main__.py"), "encode", description, "--out",
         str(shared)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2: 5 prompts encoded, 0 there already" in done.stdout
    assert "rank 1 of 2: 5 prompts encoded, 0 there already" in done.stdout
    assert done.stdout.count("encoding prompts: 5 to do") == 1  # one of them speaks
    assert files_in(shared) == files_in(alone)
    for path in files_in(alone):
        ours, theirs = load_file(shared / path), load_file(alone / path)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_family_whose_embeddings_cannot_be_kept(tmp_path, capsys):
    assert cli.main(["encode", "miniature", "--out", str(tmp_path / "cache")]) == 2
    assert "model.family=miniature: its text encoder has no `fingerprint`" in capsys.readouterr().err


def trained(config, resume=False):
    """The fingerprint of the weights that a run ends with."""
    outcome = assemble(config).train(resume=resume)
    assert outcome.finished
    module = load_model(config.model, "cpu").flow.module
    load_weights(latest(config.output.dir), module)
    return weights_hash(module)


def forbid(self, prompts):
    raise AssertionError(f"the text encoder was called for {prompts}")


def test_training_reads_through_the_cache_and_needs_no_encoder_once_it_is_complete(settings, tmp_path, monkeypatch):
    first = trained(make_config(settings))
    cache = tmp_path / "run" / "embeddings"
    assert len(files_in(cache)) == 3 + 4  # held-out prompts, and those that two steps of two prompts visit
    shutil.move(cache, tmp_path / "cache")
    monkeypatch.setattr(FluxTextEncoder, "__call__", forbid)
    settings["data"]["embeddings"] = str(tmp_path / "cache")
    settings["output"]["dir"] = str(tmp_path / "second")
    assert trained(make_config(settings)) == first
    assert not (tmp_path / "second" / "embeddings").exists()


def test_a_run_on_photos_and_prompts_after_encode_calls_no_encoder(settings, description, tmp_path, monkeypatch):
    """In the same folder, where encode leaves the embeddings if it is not told otherwise."""
    settings["data"] |= {"photos": str(some_photos(tmp_path / "photos")), "photo_share": 0.5}
    settings["optim"]["steps"] = 6
    Path(description).write_text(make_config(settings).model_dump_json())
    assert cli.main(["encode", description]) == 0
    monkeypatch.setattr(FluxTextEncoder, "__call__", forbid)
    run = assemble(make_config(settings))
    kinds = [bool(run.learner.data.at(micro, 0, 1).photos) for micro in range(6)]
    assert set(kinds) == {True, False}
    assert run.train().finished


def test_a_resumed_run_is_the_same_bit_for_bit(settings, tmp_path, monkeypatch):
    whole = trained(make_config(settings))
    settings["output"]["dir"] = str(tmp_path / "parts")
    run = assemble(make_config(settings))
    step = run.learner.step

    def stops(number, clock):
        if number == 2:
            raise KeyboardInterrupt
        return step(number, clock)

    run.learner.step = stops
    with pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.setattr(FluxTextEncoder, "__call__", forbid)
    assert trained(make_config(settings), resume=True) == whole


def test_a_damaged_file_is_made_again_by_training(settings, tmp_path):
    first = trained(make_config(settings))
    cache = tmp_path / "run" / "embeddings"
    for path in files_in(cache)[::2]:
        (cache / path).write_bytes(b"half")
    settings["output"]["dir"] = str(tmp_path / "second")
    settings["data"]["embeddings"] = str(cache)
    assert trained(make_config(settings)) == first


def test_bad_prompts_stop_before_anything_is_loaded(description, tmp_path, capsys):
    (tmp_path / "train.csv").write_text("id,prompt\n1,a\n2,\n")
    out = tmp_path / "cache"
    assert cli.main(["encode", description, "--out", str(out)]) == 2
    assert "data.prompts=" in (said := capsys.readouterr().err) and "line 3: the prompt is empty" in said
    assert not out.exists()
    with pytest.raises(ConfigError, match="line 3"):
        assemble(make_config({"data": {"prompts": str(tmp_path / "train.csv")}}))
