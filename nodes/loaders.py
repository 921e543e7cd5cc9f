"""Models and LoRAs from files, and the built-in miniature."""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from srpo_core import miniature
from srpo_core.config import ConfigError
from srpo_core.weights.autoencoder_names import taesd_comfyui
from srpo_core.weights.flux_names import linear_shapes
from srpo_core.weights.lora_names import Lora, check_lora, lora_tensors, read_lora
from srpo_core.weights.origin import origin
from srpo_core.weights.tensors import open_tensors

from .flux_loading import WEIGHTS, load_flux, other_loaders
from .inputs import schema
from .miniature_clip import miniature_clip
from .show import shown

CATEGORY = "SRPO/loaders"
BUILT_IN = "miniature (built in)"
"""The LoRA that ships with the miniature, beside the user's own."""
BUILT_IN_LORA = miniature.WEIGHTS / "lora.safetensors"


def file_names(kind: str) -> list[str]:
    """ComfyUI's files of a kind, as its widgets name them."""
    try:
        return folder_paths.get_filename_list(kind)
    except FileNotFoundError:  # a folder that it knew is gone: it looks at each one's time without asking
        folder_paths.filename_list_cache.pop(kind, None)
        return folder_paths.get_filename_list(kind)


def find_file(kind: str, name: str, widget: str) -> Path:
    """A file of one of ComfyUI's folders by the name that its list shows. ConfigError names the folders looked in."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise ConfigError(
            f"{widget}={name!r}: there is no such file; looked in {folders}. Put it there and press R, or choose"
            " another file in the list"
        )
    return Path(path)


def check_file(kind: str, name: str | None, widget: str) -> bool | str:
    """What a node's validate_inputs answers: True, or what is wrong. A name that comes through a link is not known."""
    if name is None:
        return True
    try:
        find_file(kind, name, widget)
    except ConfigError as error:
        return str(error)
    return True


def file_state(path: Path) -> tuple[str, int, int]:
    """What changes when another file takes a file's place."""
    state = path.stat()
    return str(path), state.st_mtime_ns, state.st_size


class LoadCheckpoint(io.ComfyNode):
    """A FLUX transformer of a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOLoadCheckpoint",
            display_name="SRPO Load Checkpoint",
            category=CATEGORY,
            description="Loads a FLUX.1 transformer (FLUX.1-dev, the SRPO release, fine-tunes, `srpo export`), checked"
            " whole, and says what the file holds. Makes a proper scaled-fp8 copy where memory is short.",
            search_aliases=["flux", "unet", "diffusion model", "load model", "UNETLoader", "fp8"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=file_names("diffusion_models"),
                    tooltip="A .safetensors file of models/diffusion_models (or unet), under the original or diffusers'"
                    " names, in any precision; of a model in shards, any shard.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default=WEIGHTS[0],
                    tooltip="as stored: as ComfyUI loads it (on GPUs float32 becomes bfloat16). bfloat16, float32: in"
                    " that precision, files in fp8 too. scaled fp8: half of bfloat16's memory; the copy is made once"
                    " and kept beside the file. fp8 cast: as small and less exact; refused for float32 files, whose"
                    " pictures become noisy.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for samplers and LoRA loaders."),
                io.String.Output("found", display_name="found", tooltip="What the file holds and how it was loaded."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        return check_file("diffusion_models", checkpoint, "checkpoint")

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **_: object) -> object:
        return checkpoint and file_state(find_file("diffusion_models", checkpoint, "checkpoint"))

    @classmethod
    def execute(cls, checkpoint: str, weights: str) -> io.NodeOutput:
        model, found = load_flux(find_file("diffusion_models", checkpoint, "checkpoint"), weights)
        return io.NodeOutput(model, found, ui=shown(cls, text=found))


class LoadLora(io.ComfyNode):
    """A LoRA on top of a FLUX model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOLoadLoRA",
            display_name="SRPO Load LoRA",
            category=CATEGORY,
            description="Puts a LoRA on a FLUX model, of any trainer's naming. One that doesn't fit is an error that"
            " says where, not a picture without it.",
            search_aliases=["lora", "apply lora", "LoraLoaderModelOnly", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX model."),
                io.Combo.Input(
                    "lora",
                    options=[*file_names("loras"), BUILT_IN],
                    tooltip="A .safetensors file of models/loras, such as `srpo export` writes; or the LoRA that SRPO"
                    " trained on the built-in miniature.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of it: 1 as trained, 0 none, below 0 the opposite.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None) -> bool | str:
        return True if lora == BUILT_IN else check_file("loras", lora, "lora")

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, **_: object) -> object:
        return lora and file_state(_lora_file(lora))

    @classmethod
    def execute(cls, model: ModelPatcher, lora: str, strength: float) -> io.NodeOutput:
        path = _lora_file(lora)
        with other_loaders():
            changes = read_lora(path, "lora")
        patched = add_lora(model, changes, strength)
        ranks = ", ".join(str(rank) for rank in sorted({layer.rank for layer in changes.layers.values()}))
        found = f"{len(changes.layers)} layers, rank {ranks}"
        lines = (found, origin(open_tensors(path, "lora").metadata), *changes.notes)
        return io.NodeOutput(patched, ui=shown(cls, text="\n".join(line for line in lines if line)))


def _lora_file(name: str) -> Path:
    return BUILT_IN_LORA if name == BUILT_IN else find_file("loras", name, "lora")


def add_lora(model: ModelPatcher, lora: Lora, strength: float) -> ModelPatcher:
    """A MODEL with a LoRA added. ConfigError, naming the layer and both shapes, unless all of it fits."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.model.diffusion_model.state_dict().items()}
    if "double_blocks.0.img_attn.qkv.weight" not in shapes:
        kind = type(model.model).__name__
        raise ConfigError(f"model: this MODEL ({kind}) is no FLUX model; use LoraLoaderModelOnly for others")
    check_lora(lora, linear_shapes(shapes))
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(lora_tensors(lora), keys)
    patched = model.clone()
    taken = patched.add_patches(patches, strength)
    if len(taken) != len(lora.layers):
        raise ConfigError(
            f"{lora.source}: ComfyUI takes only {len(taken)} of its {len(lora.layers)} layers for this MODEL; update"
            " ComfyUI, or merge the LoRA into the checkpoint with `srpo export --merge`"
        )
    return patched


class Miniature(io.ComfyNode):
    """The built-in small world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOMiniature",
            display_name="SRPO Miniature",
            category=CATEGORY,
            description="A small FLUX model with its text encoder and VAE, built in: try any graph on any machine with"
            " no download. It draws 128 x 128 pictures of captions such as `three blue stars at night` or `a pink ring"
            " above a white box in the desert`.",
            search_aliases=["demo", "tiny", "test model", "example", "toy"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The flow model, 9.2 M parameters."),
                io.Clip.Output(tooltip="Its text encoder, for CLIPTextEncode; it knows the words of its small world."),
                io.Vae.Output(tooltip="Its VAE, for VAEDecode and VAEEncode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        exact = torch.float32
        model = comfy.sd.load_diffusion_model_state_dict(_shipped("transformer"), model_options={"dtype": exact})
        _own_preview_colours(model)
        vae = comfy.sd.VAE(sd=taesd_comfyui(_shipped("vae"), scale=1.0, shift=0.0), dtype=exact)
        return io.NodeOutput(model, miniature_clip(), vae)


def _own_preview_colours(model: ModelPatcher) -> None:
    """Live previews in the miniature's colours: its latents are others than FLUX's, though they are scaled alike."""
    latents = model.model.latent_format  # this model's own object
    latents.latent_rgb_factors = [list(row) for row in miniature.PREVIEW_COLOURS]
    latents.latent_rgb_factors_bias = list(miniature.PREVIEW_COLOUR_BIAS)
    latents.taesd_decoder_name = None


def _shipped(part: str) -> dict[str, torch.Tensor]:
    """The miniature's weights in float32: on any device pictures are the engine's own then."""
    path = miniature.WEIGHTS / part / "diffusion_pytorch_model.safetensors"
    return {name: tensor.float() for name, tensor in comfy.utils.load_torch_file(str(path)).items()}
