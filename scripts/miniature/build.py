"""What every stage of the build shares: where it reads and writes, its log, its training loop and its records."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from srpo_core.miniature import models
from srpo_core.models.flux import FluxFlow, ImageAutoencoder, load_module

from .data import Drawn, draw

SEED = 0
LossAndNumbers = tuple[Tensor, dict[str, float | Tensor]]
"""A loss and what to log beside it."""


class Log:
    """Lines with the time, on the terminal and at the end of FOLDER/build.log."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.time()

    def __call__(self, text: str) -> None:
        line = f"[{time.time() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Averaged:
    """A moving average of a module's weights, slow once warmed up."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.count = copy.deepcopy(module).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def fit(
    name: str,
    modules: Iterable[nn.Module],
    loss_of: Callable[[int], LossAndNumbers],
    steps: int,
    lr: float,
    build: Build,
    weight_decay: float = 0.01,
    after_step: Callable[[], None] | None = None,
) -> None:
    """AdamW with warm-up and cosine decay over `steps`; `loss_of(step)` gives the loss and numbers to log.

    On a slow machine the decay is hurried so that training ends with the stage's minutes.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    fused = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused)
    begin = time.time()
    for step in range(steps):
        done = max(step / steps, (time.time() - begin) / build.stage_seconds)
        if done >= 1:
            build.log(f"{name}: out of time after {step} of {steps} steps")
            break
        rate = lr * min(1, (step + 1) / min(500, steps / 4 + 1)) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, numbers = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            text = ", ".join(f"{key} {float(value):.4f}" for key, value in numbers.items())
            speed = (time.time() - begin) / (step + 1)
            build.log(f"{name} {step + 1}/{steps} loss {float(loss.detach()):.4f} {text} ({speed:.4f} s/step)")


class Build:
    """Where the stages read and write, and how long they train."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out
        self.device = torch.device(args.device)
        self.scale: float = args.scale
        self.workers: int = args.workers
        self.stage_seconds: float = 60 * args.stage_minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out / "build.log")
        self.generator = torch.Generator(self.device)

    def steps(self, count: int) -> int:
        return max(2, round(count * self.scale))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def compiled(self, module: nn.Module) -> nn.Module:
        return torch.compile(module) if self.device.type == "cuda" else module

    def flow(self, module: models.FluxTransformer2DModel) -> FluxFlow:
        """The transformer in bfloat16 arithmetic, its blocks compiled where that pays."""
        if self.device.type == "cuda":
            module.compile_repeated_blocks()
        return FluxFlow(module, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def draws(self, kind: str, seed: int, count: int, batches: int) -> Iterator[Iterator[tuple[Drawn, Tensor]]]:
        """Batches of scenes and their pictures; the processes that draw end with the `with`, however far it came."""
        self.generator.manual_seed(seed)
        with contextlib.closing(draw(kind, seed, count, batches, self.workers)) as batches_drawn:
            yield ((drawn, drawn.render(self.generator)) for drawn in batches_drawn)

    def save(self, module: nn.Module, name: str) -> None:
        copy.deepcopy(module).to(torch.bfloat16).save_pretrained(self.out / name)

    def autoencoder(self) -> ImageAutoencoder:
        module = load_module(models.AutoencoderTiny, self.out / "vae", "autoencoder").float().to(self.device)
        return ImageAutoencoder(module, recompute=False)


def save_sheet(images: Tensor, columns: int, path: Path) -> None:
    """Pictures [N, 3, H, W] as one PNG, row by row."""
    rows = [torch.cat(list(row), 2) for row in images.float().cpu().split(columns)]
    sheet = (torch.cat([row for row in rows if row.shape == rows[0].shape], 1) * 255).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)


def record(build: Build, stage: str, **numbers: object) -> None:
    """Put a stage's numbers into quality.json, with the machine that made them."""
    path = build.out / "quality.json"
    quality = json.loads(path.read_text()) if path.is_file() else {}
    device = torch.cuda.get_device_name() if build.device.type == "cuda" else platform.processor() or "cpu"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    quality["made_with"] = {**versions, "device": device, "seed": SEED}
    quality[stage] = numbers
    path.write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    build.log(f"{stage}: {json.dumps(numbers)}")
