"""Predicted beside measured: a GPU's memory and the seconds of a training step, with FLUX.1-dev's shapes.

    PYTHONPATH=. python scripts/bench_memory.py --folder /tmp/bench --out memory.json [--minutes 9] [--rows NAME ...]

Each row is a run with settings of its own, in a process of its own: random weights, three optimizer steps, two
previews. Rows are written to --out as they come, beside those that are there already; no row is started after
--minutes. `--limit-gib 24` caps every process to a card of that size, `--allocator expandable_segments:True` sets
PYTORCH_CUDA_ALLOC_CONF, `--list` names the rows. `--tiny` shrinks the models, to try the script on a machine without a
GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from bench_load import machine
from torch import Tensor, nn

from srpo_core.assemble import assemble
from srpo_core.config import ModelConfig, RunConfig
from srpo_core.description import load_run
from srpo_core.devices import choose_device
from srpo_core.duration import matmul_rate
from srpo_core.estimate import estimate, shapes_of
from srpo_core.interfaces import Components, PromptBatch
from srpo_core.metrics import Clock
from srpo_core.models import load_model
from srpo_core.models.flux import BLOCKS, DTYPES, FluxFlow, ImageAutoencoder
from srpo_core.weights.compressed import fill_compressed
from srpo_core.weights.loading import empty_parameters, fill

GIB = 2**30
SMALL_LORA = ["lora.rank=16", "lora.targets=attention"]
CARD_24 = ["model.frozen_memory=8bit", *SMALL_LORA]
CARD_16 = ["model.frozen_memory=4bit", "reward.dtype=bfloat16", *SMALL_LORA]
ONE_CARD = ["lora.rank=0", "model.trained_memory=bfloat16", "optim.states=8bit", "model.recompute=auto"]
"""What flux-dev does to train all weights on one card of 80 GB."""
GB_80, GB_24, GB_16 = 79.1, 23.5, 15.7
"""GiB that cards of so many GB have for a process."""
KEPT = ["model.recompute=false"]
ALL_WEIGHTS = ["lora.rank=0", "model.family=bench_memory:load_short"]


def square(side: int) -> list[str]:
    """Settings of square pictures."""
    return [f"data.height={side}", f"data.width={side}"]


ROWS: dict[str, tuple[list[str], float]] = {
    "all weights on 80 GB, 720": ([*ONE_CARD, *square(720)], GB_80),
    "24 GB preset, 720": ([*CARD_24, *square(720)], 24e9 / GIB),
    "24 GB preset, 1024": ([*CARD_24, *square(1024)], GB_24),
    "16 GB preset, 720": ([*CARD_16, *square(720)], 16e9 / GIB),
    "all weights on 80 GB, reward in bfloat16, 720": ([*ONE_CARD, "reward.dtype=bfloat16", *square(720)], 80e9 / GIB),
    "all weights on 80 GB, recomputed, accumulation 2, 720": (
        [*ONE_CARD, "model.recompute=true", "optim.accumulation=2", *square(720)],
        GB_80,
    ),
    "16 GB preset, 1024": ([*CARD_16, *square(1024)], GB_16),
    "LoRA 32 all, 720": (square(720), 0),
    "LoRA 32 all, recomputed by need, 720": (["model.recompute=auto", *square(720)], 48e9 / GIB),
    "fp8 base, LoRA 16 attention, 720": (["model.frozen_memory=fp8", *SMALL_LORA, *square(720)], 24e9 / GIB),
    "LoRA 32 all, 1024": (square(1024), 0),
    "not recomputed, LoRA 16 attention, 512": ([*KEPT, *SMALL_LORA, *square(512)], 0),
    "not recomputed, LoRA 32 all, 512": ([*KEPT, *square(512)], 0),
    "not recomputed, 24 GB preset, 512": ([*KEPT, *CARD_24, *square(512)], 0),
    "LoRA 32 all, batch 2, 720": ([*square(720), "data.batch_size=2"], 0),
    "all weights of 3 + 4 blocks, 512": ([*ALL_WEIGHTS, *square(512)], 0),
    "LoRA 32 all, 512": (square(512), 0),
    "LoRA 128 all, 720": ([*square(720), "lora.rank=128"], 0),
    "LoRA 32 all, average, accumulation 2, 720": (
        [*square(720), "optim.ema_decay=0.9", "optim.accumulation=2"],
        0,
    ),
    "not recomputed, 24 GB preset, 720": ([*KEPT, *CARD_24, *square(720)], 0),
    "all weights of 3 + 4 blocks, not recomputed, 512": ([*ALL_WEIGHTS, *KEPT, *square(512)], 0),
    "24 GB preset, batch 4, 512": ([*CARD_24, *square(512), "data.batch_size=4"], 0),
    "float32, LoRA 16 attention, 512": ([*SMALL_LORA, *square(512), "model.dtype=float32"], 0),
    "24 GB preset, 384": ([*CARD_24, *square(384)], 20),
}
"""By name: settings on top of flux-dev-lora, and the GiB that the process is held to (0: none)."""


class RandomFlux(Components):
    """FLUX.1-dev's shapes with random weights, made on the device; prompts are encoded as noise."""

    def __init__(self, config: ModelConfig, device: torch.device | str, blocks: tuple[int, int], heads: int) -> None:
        from srpo_core.miniature.captions import random_scenes

        self.measures, self.notes = {}, ()
        captions = [scene.caption() for scene in random_scenes(16, seed=1)]
        self.prompts = {"train": captions[:8], "eval": captions[8:]}
        self._config, self._device, self._blocks, self._heads = config, torch.device(device), blocks, heads

    def _empty(self) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        with empty_parameters():
            return FluxTransformer2DModel(
                in_channels=64, num_layers=self._blocks[0], num_single_layers=self._blocks[1],
                num_attention_heads=self._heads, guidance_embeds=True,
            ).eval()  # fmt: skip

    def outline(self) -> FluxFlow:
        return FluxFlow(self._empty(), 8, DTYPES[self._config.dtype])

    @cached_property
    def flow(self) -> FluxFlow:
        module, dtype = self._empty(), DTYPES[self._config.dtype]
        if self._config.frozen_memory != "full" and not self.full_precision:
            memory = self._config.frozen_memory
            stream = numbers(self._empty(), self._device)  # whose parameters keep their shapes
            module = fill_compressed(module, stream, dtype, self._device, {}, BLOCKS, memory)
        else:
            wanted = torch.float32 if self.full_precision else dtype
            module = fill(module, numbers(module, self._device), wanted, self._device, "random weights")
        if self._config.recompute:
            module.enable_gradient_checkpointing()
        return FluxFlow(module, 8, dtype)

    def empty_flow(self) -> tuple[FluxFlow, Iterator[tuple[str, Tensor]]]:
        module = self._empty()
        if self._config.recompute:
            module.enable_gradient_checkpointing()
        return FluxFlow(module, 8, DTYPES[self._config.dtype]), numbers(self._empty(), self._device)

    def _empty_autoencoder(self) -> nn.Module:
        from diffusers import AutoencoderKL

        sides = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
        with empty_parameters():
            return AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
                use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, down_block_types=sides[0],
                up_block_types=sides[1],
            )  # fmt: skip

    def autoencoder_outline(self) -> ImageAutoencoder:
        return ImageAutoencoder(self._empty_autoencoder(), recompute=False)

    @cached_property
    def autoencoder(self) -> ImageAutoencoder:
        module, dtype = self._empty_autoencoder(), DTYPES[self._config.dtype]
        fill(module, numbers(module, self._device), dtype, self._device, "random weights")
        return ImageAutoencoder(module, self._config.recompute)

    def embeds_outline(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}

    def text_encoder(self, prompts: Sequence[str]) -> PromptBatch:
        made = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]  # the same each time
        embeds = {
            name: torch.stack([torch.randn(shape, generator=generator) for generator in made])
            for name, shape in self.embeds_outline().items()
        }
        return PromptBatch(tuple(prompts), embeds)


def numbers(module: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """A module's state, the same each time: matrices of gain one half, norms of weight 1, no biases."""
    for name, tensor in module.state_dict().items():
        if tensor.ndim < 2:
            value = 1.0 if name.endswith("weight") else 0.0
            yield name, torch.full(tensor.shape, value, device=device)
            continue
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        made = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.bfloat16)
        yield name, made.mul_(0.5 / tensor[0].numel() ** 0.5)


def load(config: ModelConfig, device: torch.device | str) -> RandomFlux:
    """The whole of FLUX.1-dev."""
    return RandomFlux(config, device, (19, 38), 24)


def load_short(config: ModelConfig, device: torch.device | str) -> RandomFlux:
    """As many blocks as can be trained whole on one card."""
    return RandomFlux(config, device, (3, 4), 24)


def load_tiny(config: ModelConfig, device: torch.device | str) -> RandomFlux:
    """A narrow one, to try the script."""
    return RandomFlux(config, device, (1, 1), 2)


class Meter(Clock):
    """A clock that also keeps each phase's peak of the device's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        super().__init__(lambda: torch.cuda.synchronize(device) if device.type == "cuda" else None, device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with super().phase(name):
                yield
        finally:
            if cuda:
                self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))


def measure(config: RunConfig) -> dict[str, object]:
    """A run's prediction, then three of its steps and its previews. What it could not do is under "error"."""
    device = choose_device(config.parallel.device)
    shapes = shapes_of(config, load_model(config.model, device))
    guess = estimate(config, shapes)
    row: dict[str, object] = {
        "predicted_gib": {name: gib(value) for name, value in guess.phases.items()},
        "predicted_peak_gib": gib(guess.peak),
        "predicted_on_card_gib": gib(guess.on_card),
    }
    loading, meter = Meter(device), None
    try:
        with loading.phase("loading"):
            trainer = assemble(config)
        row["loaded_gib"] = gib(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0
        for number in (1, 2, 3):
            meter = Meter(device) if number == 1 else following(meter)
            trainer.learner.step(number, meter)
        with meter.phase("previews"):
            trainer.previews.draw(trainer.flow, trainer.world)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:600]
    peaks = loading.peaks | (meter.peaks if meter is not None else {})
    row["measured_gib"] = {name: gib(value) for name, value in peaks.items()}
    row["measured_peak_gib"] = gib(max(peaks.values(), default=0))
    row["seconds"] = {name: round(value, 3) for name, value in (meter.seconds if meter is not None else {}).items()}
    if device.type == "cuda":
        row["reserved_gib"] = gib(torch.cuda.max_memory_reserved(device))
        free, total = torch.cuda.mem_get_info(device)
        row["outside_the_allocator_gib"] = gib(total - free - torch.cuda.memory_reserved(device))
        row["matmul_tflops"] = round(matmul_rate(device, DTYPES[config.model.dtype]) / 1e12, 1)
    return row


def following(before: Meter) -> Meter:
    """A meter for the next step, with the peaks of those before: the last one's seconds are those of a step."""
    meter = Meter(before.device)
    meter.peaks = before.peaks
    return meter


def gib(count: int) -> float:
    return round(count / GIB, 3)


def run_row(folder: Path, name: str, tiny: bool, limit: float) -> None:
    """In a child: measure a row and print it as JSON, last of all."""
    settings, cap = ROWS[name]
    cap = limit or cap
    if cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total))
    base = ["model.family=bench_memory:load", f"reward.path={folder / 'hps.safetensors'}", "data.prompts=builtin"]
    base += ["optim.accumulation=1", "optim.steps=3", "rollout.num_steps=6", "output.preview_steps=6"]
    base += ["output.preview_prompts=2", f"output.dir={folder / 'run'}", "reward.liked=[Real]"]
    small = ["model.family=bench_memory:load_tiny", "reward.name=miniature", "reward.path=null", "data.height=64"]
    small += ["data.width=64", "reward.disliked=[Painting]", "reward.contrast=[Real, Painting]"]
    config = load_run("flux-dev-lora", [*base, *settings, *(small if tiny else [])])
    row = {"settings": settings, "cap_gib": round(cap, 2), **measure(config)}
    print("ROW " + json.dumps(row), flush=True)


def make_reward(folder: Path) -> None:
    """HPS v2's file with random weights, once."""
    import open_clip
    from full_size_run import write

    write(folder / "hps.safetensors", open_clip.create_model("ViT-H-14", device="meta"))


def rows_of(args: argparse.Namespace, began: float) -> Iterator[tuple[str, dict[str, object]]]:
    """Each row as its process ends."""
    for name in args.rows or ROWS:
        if time.perf_counter() - began > 60 * args.minutes:
            print(f"no time left for: {name}", flush=True)
            continue
        start = time.perf_counter()
        words = ["--folder", str(args.folder), "--row", name, "--limit-gib", str(args.limit_gib)]
        command = [sys.executable, __file__, *words, *(["--tiny"] if args.tiny else [])]
        environment = os.environ | ({"PYTORCH_CUDA_ALLOC_CONF": args.allocator} if args.allocator else {})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
        row = json.loads(found[-1][4:]) if found else {"error": (done.stdout + done.stderr)[-3000:]}
        yield name, row | {"seconds_of_the_process": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Measure the rows, one by one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="for a file of weights and the runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS))
    parser.add_argument("--minutes", type=float, default=9.0, help="no row is started later")
    parser.add_argument("--limit-gib", type=float, default=0.0, help="hold each process to so much of the card")
    parser.add_argument("--allocator", default="", help="PYTORCH_CUDA_ALLOC_CONF of the rows")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    began = time.perf_counter()
    if args.row:
        run_row(args.folder, args.row, args.tiny, args.limit_gib)
        return
    if args.list:
        print("\n".join(ROWS))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.tiny:
        make_reward(args.folder)
    about = machine("PYTHONPATH=. python scripts/bench_memory.py --folder FOLDER --out memory.json")
    there = args.out is not None and args.out.is_file()
    rows: dict[str, object] = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if there else {}
    for name, row in rows_of(args, began):
        rows[name] = row
        short = {key: row.get(key) for key in ("predicted_peak_gib", "measured_peak_gib", "measured_gib", "seconds")}
        print(f"{name}: {json.dumps(short)} {row.get('error', '')}", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
