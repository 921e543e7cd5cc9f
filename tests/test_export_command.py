"""`srpo export` of files: options, messages, exit codes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_flux import kohya_lora, original_file, same

from srpo_core import cli
from srpo_core.export.convert import convert
from srpo_core.lora import ChosenLora


@pytest.fixture
def original(tmp_path):
    return original_file(tmp_path / "original.safetensors")


def run_cli(capsys, *words):
    code = cli.main(["export", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_the_command_converts_and_merges(tmp_path, original, capsys):
    lora = kohya_lora(tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    code, said = run_cli(
        capsys, original, "--out", out, "--format", "comfyui", "--dtype", "bfloat16", "--merge", f"{lora}:0.5"
    )
    assert code == 0 and "models/diffusion_models" in said
    expected = convert(original, tmp_path / "e.safetensors", "comfyui", "bfloat16", [ChosenLora(lora, 0.5)])
    same(load_file(out), load_file(expected))
    code, said = run_cli(capsys, lora, "--out", tmp_path / "l.safetensors")
    assert code == 0 and "models/loras" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out names the file"),
        (["--out", "x.safetensors", "--checkpoint", "best"], "--checkpoint is for runs"),
        (["--out", "x.safetensors", "--what", "vae"], "--what vae is for runs"),
        (["--out", "x.safetensors", "--rank", "4"], "--extract BASE and --rank N belong together"),
        (["--out", "x.safetensors", "--extract", "b", "--rank", "4", "--merge", "c"], "two jobs"),
    ],
)
def test_options_that_dont_go_together(original, capsys, words, message):
    code, said = run_cli(capsys, original, *words)
    assert code == 2 and message in said


def test_a_folder_without_run_or_weights(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, said = run_cli(capsys, tmp_path / "empty", "--out", tmp_path / "x.safetensors")
    assert code == 2 and "holds no run: there is no run.json; nor does it hold weights" in said
    code, said = run_cli(capsys, tmp_path / "nothing")
    assert code == 2 and "nothing: no such file or folder" in said


def test_a_truncated_file_is_named(tmp_path, original, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(original.read_bytes()[:-100])
    code, said = run_cli(capsys, broken, "--out", tmp_path / "x.safetensors")
    assert code == 2 and str(broken) in said and "cut short" in said
    save_file({"a": torch.zeros(1)}, broken)
    code, said = run_cli(capsys, broken, "--out", tmp_path / "x.safetensors")
    assert code == 2 and "is not a FLUX transformer" in said
