"""Pictures of prompts from a base or trained model, as PNG files that say how they were made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from srpo_core import checkpoint as checkpoints
from srpo_core.config import ConfigError, RunConfig
from srpo_core.export import find_checkpoint
from srpo_core.interfaces import Components
from srpo_core.models import load_model
from srpo_core.parallel import make_world
from srpo_core.preview import sample_images, to_pil
from srpo_core.prompts import encode, read_prompts
from srpo_core.randomness import fixed_noise

DEFAULT_PROMPTS = 4
"""Held-out prompts that are drawn where none are given."""


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn: Euler steps, guidance, schedule shift, size in pixels."""

    steps: int
    guidance: float
    shift: float
    height: int
    width: int

    @classmethod
    def of(cls, config: RunConfig, steps: int | None = None, guidance: float | None = None) -> SampleSettings:
        """A run's way to draw previews, with other steps or guidance where given."""
        return cls(
            steps=config.output.preview_steps if steps is None else steps,
            guidance=config.output.preview_guidance if guidance is None else guidance,
            shift=config.rollout.shift,
            height=config.data.height,
            width=config.data.width,
        )


@dataclass(frozen=True)
class Picture:
    """One picture to draw: its prompt (and that prompt's place among the prompts), its seed and its file."""

    prompt: str
    index: int
    seed: int
    path: Path


def chosen_checkpoint(run_dir: Path | None, name: str | None) -> Path | None:
    """The checkpoint that --checkpoint names in a run's folder: last (default), best or a step; None is the base model.

    ConfigError if there is none, or no run (`run_dir` None) to have one.
    """
    if name == "base" or (name is None and run_dir is None):
        return None
    if run_dir is None:
        raise ConfigError(f"--checkpoint {name}: a preset has no checkpoints; name the folder of a run")
    if not checkpoints.list_checkpoints(run_dir):
        raise ConfigError(f"{run_dir} has no checkpoint yet; --checkpoint base draws with the untrained model")
    return find_checkpoint(run_dir, name or "last")


@torch.no_grad()
def merge_lora(module: nn.Module, path: Path) -> int:
    """Add a LoRA file (`[transformer.]<layer>.lora_A.weight`, `.lora_B.weight`, `.alpha`) to a module; how many layers.

    ConfigError if the file can't be read, holds no LoRA or one for another model.
    """
    try:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--lora {path} can't be read: {error}") from error
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    if not layers:
        raise ConfigError(f"--lora {path} holds no LoRA: no name ends with .lora_A.weight")
    modules = dict(module.named_modules())
    for layer in layers:
        down, up = tensors[f"{layer}.lora_A.weight"].float(), tensors.get(f"{layer}.lora_B.weight")
        target = modules.get(f"{layer}.base_layer", modules.get(layer))  # base_layer: under another LoRA
        shape = tuple(target.weight.shape) if isinstance(target, nn.Linear) else None
        if up is None or shape != (up.shape[0], down.shape[1]):
            raise ConfigError(f"--lora {path} is for another model: its layer {layer} doesn't fit")
        scale = float(tensors.get(f"{layer}.alpha", torch.tensor(float(len(down))))) / len(down)
        target.weight += (scale * up.float() @ down).to(target.weight)
    return len(layers)


def load_trained(config: RunConfig, checkpoint: Path | None, lora: Path | None, device: torch.device) -> Components:
    """The model of a run, with a checkpoint's weights (the average, where it has one) and a LoRA file on top."""
    components = load_model(config.model, device)
    module = components.flow.module
    if checkpoint is not None:
        checkpoints.load_weights(checkpoint, module)
    if lora is not None:
        merge_lora(module, lora)
    module.requires_grad_(False).eval()
    return components


def plan(prompts: Sequence[str], seeds: Sequence[int], folder: Path, overwrite: bool) -> list[Picture]:
    """The pictures of all prompts and seeds. ConfigError if a file is there already and may not be replaced."""
    pictures = []
    for index, prompt in enumerate(prompts):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
        for seed in seeds:
            pictures.append(Picture(prompt, index, seed, folder / f"{index:03d}-{slug}-{seed}.png"))
    there = [picture.path for picture in pictures if picture.path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
        raise ConfigError(f"{there[0]}{more} already; --overwrite replaces them, --out names another folder")
    return pictures


def save_png(image: Tensor, path: Path, text: dict[str, str]) -> None:
    """Write [3, H, W] in [0, 1] with text chunks, beside its place first."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{path.name}")
    to_pil(image).save(beside, "PNG", pnginfo=info)
    os.replace(beside, path)


def draw(
    components: Components,
    pictures: Sequence[Picture],
    settings: SampleSettings,
    device: torch.device,
    batch_size: int,
    on_images: Callable[[Sequence[Picture], Tensor], None],
) -> None:
    """Draw pictures a batch at a time: `on_images(pictures, images [b, 3, H, W] on the CPU)` after each.

    A picture's noise depends on its seed and size alone, so neither the batch size nor the other prompts change it.
    """
    shape = components.flow.latent_shape(settings.height, settings.width)
    prompts = list(dict.fromkeys(picture.prompt for picture in pictures))
    encoded = encode(components.text_encoder, prompts)
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        noise = torch.cat([fixed_noise(picture.seed, 1, shape, "sample") for picture in batch])
        chosen = encoded.select([prompts.index(picture.prompt) for picture in batch])
        images = sample_images(
            components.flow, components.autoencoder, chosen, noise, settings.steps, settings.shift, settings.guidance,
            batch_size, device,
        )  # fmt: skip
        on_images(batch, images)


def sample(
    config: RunConfig,
    checkpoint: Path | None,
    settings: SampleSettings,
    folder: Path,
    prompts: Sequence[str] | None = None,
    prompts_file: str | None = None,
    lora: Path | None = None,
    seeds: Sequence[int] = (0,),
    batch_size: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Draw each prompt once per seed into `folder`, with a progress bar; the files.

    Prompts: given, of a file, or else the first few of the run's held-out ones. ConfigError before any drawing if
    something is wrong with them, the size or the files.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if prompts is None and prompts_file is not None:
        prompts = read_prompts(prompts_file, "--prompts")
    if prompts is not None and not all(prompt.strip() for prompt in prompts):
        raise ConfigError("--prompt is empty")
    if prompts is not None:
        plan(prompts, seeds, folder, overwrite)
    world = make_world(config.parallel)
    components = load_trained(config, checkpoint, lora, world.device)
    if prompts is None:
        held_out = read_prompts(config.data.eval_prompts, "data.eval_prompts", components.prompts.get("eval", ()))
        prompts = held_out[:DEFAULT_PROMPTS]
    pictures = plan(prompts, seeds, folder, overwrite)
    made_by = _made_by(config, checkpoint, lora, settings)
    bar = Progress(TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bar:
        task = bar.add_task("", total=len(pictures))

        def save(batch: Sequence[Picture], images: Tensor) -> None:
            for picture, image in zip(batch, images, strict=True):
                save_png(image, picture.path, {"prompt": picture.prompt, "seed": str(picture.seed), "srpo": made_by})
            bar.advance(task, len(batch))

        draw(components, pictures, settings, world.device, batch_size or config.data.batch_size, save)
    return [picture.path for picture in pictures]


def _made_by(config: RunConfig, checkpoint: Path | None, lora: Path | None, settings: SampleSettings) -> str:
    """What a picture's metadata says of the model and settings, as JSON."""
    record: dict[str, Any] = {
        "model": config.model.model_dump(include={"family", "path", "transformer"}, exclude_none=True),
        "checkpoint": str(checkpoint) if checkpoint is not None else "base",
        "lora": str(lora) if lora is not None else None,
        **asdict(settings),
    }
    return json.dumps({name: value for name, value in record.items() if value is not None})
