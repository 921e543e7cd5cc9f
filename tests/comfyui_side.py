"""ComfyUI in processes of its own (comfyui/..._in_comfyui.py), asked about the same files and inputs as our code."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo_core.config import ModelConfig
from srpo_core.miniature.models import WEIGHTS, load
from srpo_core.models.flux import FluxFlow

CHECKOUT = os.environ.get("COMFYUI_PATH", "")
needs_comfyui = pytest.mark.skipif(
    not (Path(CHECKOUT) / "comfy" / "sd.py").is_file(),
    reason="needs real ComfyUI: set COMFYUI_PATH to a checkout whose requirements are installed here",
)
TRANSFORMER = WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-5
"""Relative, of float32 results; measured with ComfyUI 0.33.0: 8e-7 at most."""
GUIDANCE = 3.0
_WORKERS: dict[str, subprocess.Popen] = {}
"""Programs that run; they end with this process."""


def complains(level, message):
    """Whether ComfyUI says that something didn't fit: of weights that it has no use for it tells below a warning."""
    return level >= logging.WARNING or message.lower().startswith(("left over", "leftover"))


def start(program, folder):
    """Run a program of tests/comfyui, which imports ComfyUI and this pack, to its end; it writes into a folder."""
    path = Path(__file__).parent / "comfyui" / program
    done = subprocess.run(
        [sys.executable, str(path), str(Path(CHECKOUT).resolve()), str(folder)],
        cwd=folder, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def ask(program, folder):
    """Have a program of tests/comfyui do the job in a folder; it stays for the next one (comfyui/worker.py)."""
    if program not in _WORKERS or _WORKERS[program].poll() is not None:
        path = Path(__file__).parent / "comfyui" / program
        _WORKERS[program] = subprocess.Popen(
            [sys.executable, str(path), str(Path(CHECKOUT).resolve())],
            cwd=folder, env={**os.environ, "PYTHONPATH": ""}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    worker = _WORKERS[program]
    too_long = threading.Timer(300, worker.kill)
    too_long.start()
    worker.stdin.write(f"{folder}\n")
    worker.stdin.flush()
    done = any(line == "::end\n" for line in worker.stdout)
    too_long.cancel()
    error = folder / "error.txt"
    assert done and not error.exists(), error.read_text(encoding="utf-8") if done else f"{program} has ended"


def comfyui(folder, job, inputs):
    """(tensors, report) of what ComfyUI makes of the files that `job` names. It may not have complained of anything."""
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({name: str(path) for name, path in job.items()}), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    ask("in_comfyui.py", folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    complaints = [message for level, message in report["logged"] if complains(level, message)]
    assert not complaints, complaints
    return load_file(folder / "outputs.safetensors"), report


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def fresh_transformer():
    return load(ModelConfig(family="miniature"), "cpu").flow.module.eval()


def ours(module, question):
    """The velocity that a transformer gives here."""
    prompts, inputs = question
    with torch.no_grad():
        return FluxFlow(module).velocity(inputs["latents"], inputs["sigma"], prompts, GUIDANCE)
