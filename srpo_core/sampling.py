"""Pictures of prompts from a base or trained model, drawn by one process or shared among several (torchrun)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo_core import checkpoint as checkpoints
from srpo_core.checks import check_size
from srpo_core.config import ConfigError, RunConfig
from srpo_core.devices import divided_world
from srpo_core.embeddings import StoredPrompts, embedding_cache, encode
from srpo_core.errors import NotFiniteError
from srpo_core.export import find_checkpoint
from srpo_core.files import check_writable, fingerprint
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Components, PromptBatch, TrainableFlow
from srpo_core.lora import ChosenLora, linear_shapes, merge_lora
from srpo_core.models import load_model
from srpo_core.parallel import World
from srpo_core.picture_files import Picture, check_places, is_drawn, plan, save_picture, write_index
from srpo_core.preview import sample_images
from srpo_core.progress import Display
from srpo_core.prompts import read_prompts
from srpo_core.randomness import fixed_noise
from srpo_core.run_folder import made_with
from srpo_core.weights.lora_names import Lora, check_lora, read_lora

DEFAULT_PROMPTS = 4
"""Held-out prompts that are drawn where none are given."""
MODEL_PARTS = {"family", "path", "transformer", "autoencoder", "clip", "t5", "t5_memory", "frozen_memory", "lora"}
FINAL_STEPS = {"flux": 50}
"""Euler steps of a family's finished pictures, where they are more than those of previews: 50 as published for FLUX."""


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
        """A run's way to draw finished pictures, with other steps or guidance where given."""
        default_steps = FINAL_STEPS.get(config.model.family, config.output.preview_steps)
        return cls(
            steps=default_steps if steps is None else steps,
            guidance=config.output.preview_guidance if guidance is None else guidance,
            shift=config.rollout.shift,
            height=config.data.height,
            width=config.data.width,
        )


@dataclass(frozen=True)
class Outcome:
    """What one process did: every picture's file, how many it drew, and whether by now all are there."""

    files: list[Path]
    drawn: int
    complete: bool


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


def sample(
    config: RunConfig,
    checkpoint: Path | None,
    settings: SampleSettings,
    folder: Path,
    prompts: Sequence[str] | None = None,
    prompts_file: str | None = None,
    loras: Sequence[ChosenLora] = (),
    seeds: Sequence[int] = (0,),
    batch_size: int | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Draw each prompt once per seed into `folder`; of several processes each draws its share, rank 0 tells how far.

    A picture depends on its prompt, seed and settings; batches are formed before they are shared out, so the bytes do
    not depend on the number of processes. Pictures that are there already with the same settings are kept, unless
    `overwrite` has all drawn anew. Prompts: given, of a file, or else the first few of the run's held-out ones.
    ConfigError before any drawing if something is wrong with them, the size, the weights or the files.
    """
    world = divided_world(config.parallel)
    if prompts is None and prompts_file is not None:
        prompts = read_prompts(prompts_file, "--prompts", column=config.data.prompt_column)
    if prompts is not None and not all(prompt.strip() for prompt in prompts):
        raise ConfigError("--prompt is empty")
    weights = TrainedWeights(checkpoint, [(read_lora(lora.path, "--lora"), lora.strength) for lora in loras])
    components = load_model(config.model, world.device)
    weights.check(components.outline(), settings)
    if prompts is None:
        held_out = read_prompts(config.data.eval_prompts, "data.eval_prompts", components.prompts.get("eval", ()))
        prompts = held_out[:DEFAULT_PROMPTS]
    pictures = plan(prompts, seeds, folder)
    check_writable(folder, "--out")
    shared = _shared_record(config, checkpoint, settings, loras, world)
    size = batch_size or config.data.batch_size
    batches = world.share([pictures[start : start + size] for start in range(0, len(pictures), size)])
    if not overwrite:
        check_places(pictures, shared)
        batches = [batch for batch in batches if not all(is_drawn(picture, shared) for picture in batch)]
    drawn = 0
    if batches:
        with Display(quiet=not world.is_main) as display:
            encoded = _encode(config, components, batches, display)
            weights.load_into(components)
            total = sum(map(len, batches))
            display.phase("drawing" if world.size == 1 else f"drawing (process 1 of {world.size})", total)
            for batch in batches:
                images = draw(components, batch, encoded, settings, world.device)
                for picture, image in zip(batch, images, strict=True):
                    save_picture(image, picture, shared)
                drawn += len(batch)
                display.advance(drawn)
    return Outcome([picture.path for picture in pictures], drawn, write_index(pictures, shared))


@dataclass(frozen=True)
class TrainedWeights:
    """What is laid over a family's own transformer: a checkpoint (its average, where it has one), then LoRAs."""

    checkpoint: Path | None
    loras: Sequence[tuple[Lora, float]] = ()

    def check(self, outline: TrainableFlow, settings: SampleSettings) -> None:
        """ConfigError if a LoRA or the pictures' size isn't one for this model."""
        shapes = linear_shapes(outline.module)
        for lora, _ in self.loras:
            check_lora(lora, shapes)
        check_size(outline, settings.height, settings.width)

    def load_into(self, components: Components) -> None:
        """Load the transformer, lay these weights over it and freeze it."""
        module = components.flow.module
        if self.checkpoint is not None:
            checkpoints.load_weights(self.checkpoint, module)
        for lora, strength in self.loras:
            merge_lora(module, lora, strength)
        module.requires_grad_(False).eval()


def _encode(
    config: RunConfig, components: Components, batches: Sequence[Sequence[Picture]], display: Display
) -> PromptBatch | StoredPrompts:
    """The prompts of some batches, each once; the text encoder's memory is free afterwards.

    One at a time: a prompt's embedding, to its last bit, does not depend on what else is encoded.
    """
    prompts = list(dict.fromkeys(picture.prompt for batch in batches for picture in batch))
    has_place = config.data.embeddings or Path(config.output.dir).is_dir()
    cache = embedding_cache(components.text_encoder, config) if has_place else None
    encoded = encode(components.text_encoder, prompts, 1, cache, display)
    components.release("text_encoder")
    return encoded


@torch.no_grad()
def draw(
    components: Components,
    batch: Sequence[Picture],
    encoded: PromptBatch | StoredPrompts,
    settings: SampleSettings,
    device: torch.device,
) -> Tensor:
    """Images [b, 3, H, W] in [0, 1] of a batch, on the CPU. A picture's noise depends on its seed and size alone.

    NotFiniteError if the model draws numbers that are none.
    """
    shape = components.flow.latent_shape(settings.height, settings.width)
    noise = torch.cat([fixed_noise(picture.seed, 1, shape, "sample") for picture in batch])
    chosen = encoded.select([encoded.prompts.index(picture.prompt) for picture in batch])
    images = sample_images(
        components.flow, components.autoencoder, chosen, noise, settings.steps, settings.shift, settings.guidance,
        len(batch), device,
    )  # fmt: skip
    if not bool(torch.isfinite(images).all()):
        raise NotFiniteError(
            f"{batch[0].path.name}: the model's numbers are not finite (NaN or infinite), so nothing is written; try"
            " model.dtype=float32, a lower --lora strength or another checkpoint"
        )
    return images


def _shared_record(
    config: RunConfig, checkpoint: Path | None, settings: SampleSettings, loras: Sequence[ChosenLora], world: World
) -> dict[str, Any]:
    """What every picture's record says of the model and the settings. Files by name, not by place: pictures travel."""
    parts = config.model.model_dump(include=MODEL_PARTS, exclude_none=True)
    files = {name: Path(value).name for name, value in parts.items() if name != "family"}
    there = {name: Path(value) for name, value in parts.items() if name != "family" and Path(value).exists()}
    record: dict[str, Any] = {
        **asdict(settings),
        "sigmas": [round(sigma, 6) for sigma in shifted_sigmas(settings.steps, settings.shift).tolist()],
        "model": {"family": config.model.family, **files, "dtype": config.model.dtype},
        "checkpoint": f"{checkpoint.resolve().parent.parent.name}/{checkpoint.name}" if checkpoint else "base",
        "loras": [{"file": lora.path.name, "strength": lora.strength} for lora in loras],
    }
    if config.model.lora is not None:
        record["model"]["lora_strength"] = config.model.lora_strength
    if checkpoint is not None:
        there["checkpoint"] = checkpoint
    there |= {f"lora {i}": lora.path for i, lora in enumerate(loras)}
    record["fingerprints"] = {name: fingerprint(path) for name, path in there.items()}
    return {**record, "made_with": made_with(world.device)}
