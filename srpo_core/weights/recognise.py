"""Whose weights a file holds, from the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .families import FAMILIES
from .fp8 import FP8, is_scaled, weights_in
from .tensors import TensorFile, TensorInfo, WeightsError, open_tensors

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""What may stand before a transformer's names: nothing, the prefix of ComfyUI's checkpoints, or trainers' own."""
VAE_PREFIXES = ("", "vae.", "first_stage_model.")
TEXT_PREFIXES = {"clip": "text_encoders.clip_l.transformer.", "t5": "text_encoders.t5xxl.transformer."}
"""Where an all-in-one checkpoint of ComfyUI keeps the text encoders."""
WORDS = {
    "transformer": "a FLUX transformer",
    "autoencoder": "an autoencoder",
    "clip": "a CLIP text encoder",
    "t5": "a T5 text encoder",
    "lora": "a LoRA",
    "checkpoint": "a checkpoint with several parts",
}
SETTINGS = {
    "transformer": "model.transformer",
    "autoencoder": "model.autoencoder",
    "clip": "model.clip",
    "t5": "model.t5",
    "lora": "model.lora",
    "checkpoint": "model.path",
}
"""The settings that take each kind of file."""
_LORA = re.compile(
    r"[._]lora\d?[._](A|B|down|up|linear_layer)\.|^(lora_unet|lora_te|lora_transformer|lycoris)\d?_|\.(hada|lokr)_w\d"
)
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp64"}


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    part: "transformer", "autoencoder", "clip", "t5", "lora", "checkpoint" (all-in-one) or "unknown"; layout:
    "diffusers", "original", "taesd" or ""; quantisation: "", "fp8" or "scaled fp8"; dtype: safetensors' name of most of
    its numbers; detail: which model, in words (for unknown: a guess, "" if there is none); prefix: what stands before
    its names; parts: for a checkpoint, the contents of each of its parts.
    """

    part: str
    layout: str = ""
    quantisation: str = ""
    dtype: str = ""
    detail: str = ""
    prefix: str = ""
    parameters: int = 0
    parts: Mapping[str, Contents] = field(default_factory=dict)


class WrongPart(WeightsError):
    """A file of weights holds something else than was asked for: `contents` says what."""

    def __init__(self, file: TensorFile, setting: str, contents: Contents, reason: str, way_out: str) -> None:
        super().__init__(setting, file.path, reason, way_out)
        self.contents = contents


def recognise(file: TensorFile) -> Contents:
    """What `file` holds, from its names and shapes."""
    if any(_LORA.search(name) for name in file.info):
        return _contents(file, "lora", "", "LoRA", "")
    if _is_checkpoint(file):
        parts = _checkpoint_parts(file)
        if "transformer" in parts and len(parts) > 1:
            return _contents(file, "checkpoint", "original", parts["transformer"].detail, "", parts)
    for find in (_transformer, _autoencoder, _clip, _t5):
        found = find(file)
        if found is not None:
            return found
    guesses = (_guess(file, prefix) for prefix in (*PREFIXES, "net.", "first_stage_model.", "vae."))
    return _contents(file, "unknown", "", next(filter(None, guesses), ""), "")


def describe(contents: Contents) -> str:
    """One line for users, such as "FLUX.1-dev transformer, original names, scaled fp8 (e4m3), 11.9 B parameters"."""
    if contents.part == "checkpoint":
        inside = "; ".join(describe(part) for part in contents.parts.values())
        return f"{contents.detail}, all in one file: {inside}"
    if contents.part == "unknown":
        what = contents.detail or "weights of a kind that is not known here"
    else:
        what = {"transformer": f"{contents.detail} transformer"}.get(contents.part, contents.detail)
    names = {"diffusers": "diffusers' names", "original": "original names", "taesd": "ComfyUI's names for TAESD"}
    dtype = FP8.get(contents.dtype)
    numbers = f"{contents.quantisation} ({dtype})" if dtype else _DTYPES.get(contents.dtype, contents.dtype.lower())
    return ", ".join(x for x in (what, names.get(contents.layout), numbers, _count(contents.parameters)) if x)


def describe_file(path: Path | str) -> str:
    """`describe` of a file of weights, or of a folder that holds one. WeightsError if it is neither."""
    return describe(recognise(open_tensors(path, "")))


def require(file: TensorFile, part: str, setting: str) -> Contents:
    """The contents of `file`, or of its part in a checkpoint. WrongPart saying what it is if it isn't `part`."""
    contents = recognise(file)
    if contents.part == part:
        return contents
    if part in contents.parts:
        return contents.parts[part]
    wanted = WORDS[part]
    if contents.part == "checkpoint":
        holds = ", ".join(WORDS[name] for name in contents.parts)
        raise WrongPart(file, setting, contents, f"holds {holds}, but not {wanted}", f"name one in {SETTINGS[part]}")
    if contents.part == "unknown":
        names = ", ".join(list(file.info)[:3])
        what = contents.detail or f"something that is not known here (it has {names[:200]}, ...)"
        reason = f"is not {wanted}: it looks like {what}"
        raise WrongPart(file, setting, contents, reason, f"name {wanted} instead")
    reason = f"is {WORDS[contents.part]} ({describe(contents)}), not {wanted}"
    raise WrongPart(file, setting, contents, reason, f"it belongs into {SETTINGS[contents.part]}")


def _contents(
    file: TensorFile,
    part: str,
    layout: str,
    detail: str,
    prefix: str,
    parts: Mapping[str, Contents] | None = None,
) -> Contents:
    own = file.prefix(prefix)
    sizes: Counter[str] = Counter()
    for name in weights_in(own):
        sizes[own.info[name].dtype] += own.info[name].numel
    dtype = sizes.most_common(1)[0][0] if sizes else ""
    quantisation = ("scaled fp8" if is_scaled(own) else "fp8") if dtype in FP8 else ""
    return Contents(part, layout, quantisation, dtype, detail, prefix, sum(sizes.values()), dict(parts or {}))


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.1f} {unit} parameters"
    return f"{parameters} parameters"


def _is_checkpoint(file: TensorFile) -> bool:
    """Whether parts stand side by side under the prefixes of a checkpoint."""
    roots = {name.split(".", 1)[0] for name in file.info}
    return "model" in roots and bool(
        roots & {"vae", "first_stage_model", "text_encoders", "cond_stage_model", "conditioner"}
    )


def _checkpoint_parts(file: TensorFile) -> dict[str, Contents]:
    found = {"transformer": _transformer(file), "autoencoder": _autoencoder(file)}
    found |= {"clip": _clip(file), "t5": _t5(file)}
    return {part: contents for part, contents in found.items() if contents is not None}


def _transformer(file: TensorFile) -> Contents | None:
    """A FLUX.1 transformer: not its relatives with other inputs, conditioning or modulation."""
    for prefix in PREFIXES:
        for layout, shape in (("original", _original_shape), ("diffusers", _diffusers_shape)):
            found = shape(lambda name, prefix=prefix: file.info.get(prefix + name))
            if found is not None and not _guess(file, prefix):
                return _contents(file, "transformer", layout, found, prefix)
    return None


Look = Callable[[str], "TensorInfo | None"]


def _original_shape(look: Look) -> str | None:
    """The model's name, from tensors that every original FLUX transformer has."""
    norm = look("double_blocks.0.img_attn.norm.key_norm.scale") or look("double_blocks.0.img_attn.norm.key_norm.weight")
    embedder = look("img_in.weight")
    if norm is None or embedder is None or look("vector_in.in_layer.weight") is None:
        return None
    guided = look("guidance_in.in_layer.weight") is not None
    return _name(embedder, guided, look("double_blocks.18.img_mod.lin.bias"), look("single_blocks.37.linear2.bias"))


def _diffusers_shape(look: Look) -> str | None:
    embedder, text = look("x_embedder.weight"), look("time_text_embed.text_embedder.linear_1.weight")
    if embedder is None or text is None or look("single_transformer_blocks.0.proj_mlp.weight") is None:
        return None
    guided = look("time_text_embed.guidance_embedder.linear_1.weight") is not None
    last = look("transformer_blocks.18.norm1.linear.bias"), look("single_transformer_blocks.37.proj_out.bias")
    return _name(embedder, guided, *last)


def _name(embedder: TensorInfo, guided: bool, double: TensorInfo | None, single: TensorInfo | None) -> str:
    whole = embedder.shape == (3072, 64) and double is not None and single is not None
    if not whole:
        width = f" of width {embedder.shape[0]}" if embedder.shape else ""
        return f"FLUX{width}{'' if guided else ' without guidance'}"
    return "FLUX.1-dev" if guided else "FLUX.1-schnell"


def _autoencoder(file: TensorFile) -> Contents | None:
    for prefix in VAE_PREFIXES:
        for layout, first, width in (
            ("original", "decoder.mid.block_1.conv1.weight", "decoder.conv_in.weight"),
            ("diffusers", "decoder.mid_block.resnets.0.conv1.weight", "decoder.conv_in.weight"),
            ("diffusers", "decoder.layers.2.conv.0.weight", "decoder.layers.0.weight"),
            ("taesd", "taesd_decoder.3.conv.0.weight", "taesd_decoder.1.weight"),
        ):
            info = file.info.get(prefix + width)
            if prefix + first in file and info is not None and len(info.shape) == 4 and not _guess(file, prefix):
                kind = "autoencoder" if "conv_in" in width else "tiny autoencoder (TAESD)"
                detail = f"{kind} with {info.shape[1]} latent channels"
                return _contents(file, "autoencoder", layout, detail, prefix)
    return None


def _clip(file: TensorFile) -> Contents | None:
    """A CLIP text tower; transformers 5 has dropped `text_model.` from its names."""
    for prefix in ("", TEXT_PREFIXES["clip"]):
        for inner in ("text_model.", ""):
            info = file.info.get(f"{prefix}{inner}embeddings.token_embedding.weight")
            layer = f"{prefix}{inner}encoder.layers.0.self_attn.q_proj.weight"
            if info is not None and len(info.shape) == 2 and layer in file:
                vision = " with its vision tower" if f"{prefix}vision_model.embeddings.class_embedding" in file else ""
                return _contents(file, "clip", "", f"CLIP text encoder of width {info.shape[1]}{vision}", prefix)
    return None


def _t5(file: TensorFile) -> Contents | None:
    for prefix in ("", TEXT_PREFIXES["t5"]):
        info = file.info.get(f"{prefix}encoder.block.0.layer.0.SelfAttention.q.weight")
        if info is not None and len(info.shape) == 2:
            decoder = " with its decoder" if f"{prefix}decoder.block.0.layer.0.SelfAttention.q.weight" in file else ""
            return _contents(file, "t5", "", f"T5 text encoder of width {info.shape[1]}{decoder}", prefix)
    return None


def _guess(file: TensorFile, prefix: str) -> str:
    """The family outside this project that a file's names speak of; "" if none."""
    for what, *groups in FAMILIES:
        for names in groups:
            if all(_matches(file, prefix, name) for name in names):
                return what
    return ""


def _matches(file: TensorFile, prefix: str, wanted: str) -> bool:
    """`name`, or `name[axis]=size` of a tensor's shape."""
    name, _, condition = wanted.partition("[")
    info = file.info.get(prefix + name)
    if info is None or not condition:
        return info is not None
    axis, _, size = condition.partition("]=")
    return len(info.shape) > int(axis) and info.shape[int(axis)] == int(size)
