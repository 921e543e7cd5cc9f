"""CLIP models from files: folders and single files, with the names of transformers' code or of open_clip's.

What a model is, is read off its tensors' names and shapes. Two things are not in them and come from the configuration
beside the file: the activation (GELU, or the QuickGELU of OpenAI's models) and the images' mean and deviation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from srpo_core.weights.loading import empty_parameters, fill
from srpo_core.weights.tensors import WeightsError

from .clip import OPENAI_MEAN, OPENAI_STD, Clip, OpenClip, TransformersClip
from .files import read_shapes, read_weights, seems

if TYPE_CHECKING:
    from open_clip import CLIP

Shapes = Mapping[str, tuple[int, ...]]
IN_FOLDERS = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip
"""Files of weights in a model's folder, the first choice first."""
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
"""Files that tell of a transformers tokenizer."""
WORDS = 49408
"""Words of CLIP's own tokenizer, which open_clip brings along."""
ACTIVATION_IS_ASKED = (
    "models of this shape are trained with GELU (LAION) or with QuickGELU (OpenAI), and the file doesn't say which:"
    " put the {name} of its repository beside it, or one that holds {content}"
)


@dataclass(frozen=True)
class ClipFile:
    """A CLIP model's file, its configuration as far as it has one, and what is in it."""

    path: Path
    setting: str
    shapes: Shapes
    config: Mapping[str, Any]
    """transformers' config.json or open_clip's open_clip_config.json, {} without"""
    is_open_clip: bool

    @property
    def image_width(self) -> int:
        """Width of the image tower."""
        patches = "visual.conv1.weight" if self.is_open_clip else "vision_model.embeddings.patch_embedding.weight"
        return (*self.shapes[patches], 0)[0]

    @property
    def words(self) -> int:
        """Number of words in its vocabulary."""
        table = "token_embedding.weight" if self.is_open_clip else "text_model.embeddings.token_embedding.weight"
        return (*self.shapes.get(table, ()), 0)[0]

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer of transformers lies beside the file; it is read for models in its format only."""
        return any((self.path.parent / name).is_file() for name in TOKENIZERS) and not self.is_open_clip

    def wrong(self, reason: str, way_out: str = "") -> WeightsError:
        """The error that names the file."""
        return WeightsError(self.setting, self.path, reason, way_out)


def examine_clip(path: Path | str, setting: str, quick_gelu: bool | None = None) -> ClipFile:
    """What the file or folder holds, without reading its tensors. WeightsError unless it is a whole CLIP model.

    `quick_gelu` says what the model's activation is, where it is known; else a configuration must.
    """
    file = _find(Path(path), setting)
    shapes = read_shapes(file, setting)
    is_open_clip = "visual.conv1.weight" in shapes
    if not is_open_clip and "vision_model.embeddings.patch_embedding.weight" not in shapes:
        raise WeightsError(setting, file, f"is {seems(shapes) or 'something else'}, not a CLIP model")
    name = "open_clip_config.json" if is_open_clip else "config.json"
    clip = ClipFile(file, setting, shapes, _read_json(file.with_name(name), setting), is_open_clip)
    for tower, needed in (("image", "visual.proj"), ("text", "token_embedding.weight")) if is_open_clip else (
        ("image", "visual_projection.weight"), ("text", "text_projection.weight"),
    ):  # fmt: skip
        if needed not in shapes:
            raise clip.wrong(f"lacks the {tower} tower of a CLIP model ({needed})")
    if clip.words != WORDS and not clip.has_tokenizer:
        raise clip.wrong(f"has a vocabulary of {clip.words} words, not CLIP's {WORDS}, and no tokenizer beside it")
    _preprocessing(clip)
    outline(clip, quick_gelu)
    return clip


def load_clip(path: Path | str, setting: str, device: torch.device | str, quick_gelu: bool | None = None) -> Clip:
    """The CLIP model in a file or folder, in float32 on `device`. WeightsError as of `examine_clip`, or by a tensor."""
    clip = examine_clip(path, setting, quick_gelu)
    module, preprocessing = fill_clip(outline(clip, quick_gelu), clip, device), _preprocessing(clip)
    if clip.is_open_clip:
        return OpenClip(module, *preprocessing)
    return TransformersClip(module, _tokenizer(clip), *preprocessing, less_memory=True)


def outline(clip: ClipFile, quick_gelu: bool | None) -> Any:
    """The model that a file is for, without weights."""
    activation = _activation(clip, quick_gelu)
    if clip.is_open_clip:
        return new_open_clip(architecture(clip), activation)
    try:
        with empty_parameters():
            return CLIPModel(_transformers_config(clip, activation))
    except Exception as error:  # transformers and torch have many for a configuration that is none
        raise clip.wrong(
            f"no CLIP model can be made of its {'configuration' if clip.config else 'shapes'}:"
            f" {type(error).__name__}: {error}"
        ) from error


def new_open_clip(config: Mapping[str, Any], quick_gelu: bool) -> CLIP:
    """open_clip's model of one of its configurations, without weights."""
    from open_clip import CLIP

    with empty_parameters():
        return CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=quick_gelu)


def fill_clip(module: Any, clip: ClipFile, device: torch.device | str) -> Any:
    """A model made without weights, with the file's in float32; every name and shape must fit."""
    return fill(module, _tensors(clip), torch.float32, device, f"{clip.setting}={str(clip.path)!r}")


def _tensors(clip: ClipFile) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors, each forgotten when the next is asked for; old files hold position ids too."""
    weights = read_weights(clip.path, clip.setting)
    for name in list(weights):
        tensor = weights.pop(name)
        if not name.endswith("position_ids"):
            yield name, tensor


def architecture(clip: ClipFile) -> Mapping[str, Any]:
    """open_clip's configuration of the shapes in a file. WeightsError if it knows none."""
    from open_clip import get_model_config, list_models

    shapes = clip.shapes
    for name in list_models():
        config = get_model_config(name)
        if _has_shapes(config, shapes):
            return config
    raise clip.wrong(f"is a CLIP model of a shape that open_clip doesn't know (image tower {clip.image_width} wide)")


def _has_shapes(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether an open_clip configuration is of a plain CLIP with these shapes."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision.get("layers"), int) or "hf_model_name" in text or "custom_text" in config:
        return False
    patch = vision.get("patch_size")
    tokens = (vision.get("image_size", 224) // patch) ** 2 + 1 if patch else 0
    return (
        shapes["visual.conv1.weight"] == (vision["width"], 3, patch, patch)
        and shapes["visual.proj"] == (vision["width"], config["embed_dim"])
        and shapes.get("visual.positional_embedding") == (tokens, vision["width"])
        and shapes["token_embedding.weight"] == (text.get("vocab_size", 49408), text["width"])
        and shapes.get("positional_embedding") == (text.get("context_length", 77), text["width"])
        and _count(shapes, "visual.transformer.resblocks.") == vision["layers"]
        and _count(shapes, "transformer.resblocks.") == text["layers"]
    )


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered layers there are under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _transformers_config(clip: ClipFile, quick_gelu: bool) -> CLIPConfig:
    """The model's own configuration, else one from its shapes, with heads as wide as in the known models."""
    if clip.config:
        return CLIPConfig.from_dict(dict(clip.config))
    shapes = clip.shapes
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    tokens, _ = shapes["vision_model.embeddings.position_embedding.weight"]
    words, text_width = shapes["text_model.embeddings.token_embedding.weight"]
    activation = "quick_gelu" if quick_gelu else "gelu"
    projection = shapes["visual_projection.weight"][0]
    vision = {
        "hidden_size": width, "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "vision_model.encoder.layers."), "patch_size": patch,
        "num_attention_heads": 16 if width >= 1024 else width // 64, "image_size": int((tokens - 1) ** 0.5) * patch,
        "hidden_act": activation, "projection_dim": projection,
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."), "vocab_size": words,
        "num_attention_heads": max(1, text_width // 64), "hidden_act": activation, "projection_dim": projection,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "bos_token_id": words - 2, "eos_token_id": words - 1,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def _activation(clip: ClipFile, known: bool | None) -> bool:
    """Whether the model's activation is QuickGELU. WeightsError if neither `known` nor a configuration says so."""
    if clip.is_open_clip and clip.config:
        return bool(_section(clip, "model_cfg").get("quick_gelu", False))
    if clip.config:
        return False  # transformers' configuration is used whole
    if known is not None:
        return known
    name, content = (
        ("open_clip_config.json", '{"model_cfg": {"quick_gelu": false}} (or true)') if clip.is_open_clip
        else ("config.json", "transformers' configuration of the model")
    )  # fmt: skip
    raise clip.wrong(ACTIVATION_IS_ASKED.format(name=name, content=content))


def _preprocessing(clip: ClipFile) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the model's images: OpenAI's unless its configuration has others."""
    own, prefix = _section(clip, "preprocess_cfg"), ""
    if not clip.is_open_clip:
        own, prefix = _read_json(clip.path.with_name("preprocessor_config.json"), clip.setting), "image_"
    found = own.get(f"{prefix}mean", OPENAI_MEAN), own.get(f"{prefix}std", OPENAI_STD)
    for values in found:
        if not isinstance(values, list | tuple) or [type(v) in (int, float) for v in values] != [True] * 3:
            raise clip.wrong(f"the images' mean and deviation beside it are not three numbers each: {values!r}")
    if not all(found[1]):
        raise clip.wrong(f"the images' deviation beside it is zero: {found[1]!r}")
    return found


def _section(clip: ClipFile, name: str) -> Mapping[str, Any]:
    """A part of the configuration beside the file, {} without."""
    section = clip.config.get(name, {})
    if not isinstance(section, dict):
        raise clip.wrong(f"{name} in the configuration beside it is no JSON object")
    return section


def _tokenizer(clip: ClipFile) -> Any:
    """Texts -> what transformers' CLIP takes: by the tokenizer beside the file, else by open_clip's, the same one.

    Texts are cut to as many tokens as the model has positions: 77.
    """
    length = clip.shapes["text_model.embeddings.position_embedding.weight"][0]
    if clip.has_tokenizer:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(clip.path.parent), local_files_only=True)
        except Exception as error:  # transformers raises many kinds for broken files
            raise clip.wrong(f"the tokenizer beside it can't be read: {error}") from error

        def tokenize(texts: Sequence[str]) -> Mapping[str, Tensor]:
            encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
            return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}

        return tokenize
    from open_clip import SimpleTokenizer

    own = SimpleTokenizer(context_length=length)
    return lambda texts: {"input_ids": own(list(texts))}


def _find(path: Path, setting: str) -> Path:
    """The file of weights that `path` names: itself, or the first known one in it."""
    if not path.is_dir():
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    raise WeightsError(setting, path, f"holds no weights of a CLIP model ({', '.join(IN_FOLDERS)})", "name the file")


def _read_json(path: Path, setting: str) -> Mapping[str, Any]:
    """A configuration, {} where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(setting, path, f"can't be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(setting, path, "holds no JSON object")
    return content
