"""FLUX's text encoders, CLIP-L and T5-XXL, from every file that people have them in.

Files and tokenizers are found and their headers checked first (`find_text`); weights are read at the first prompt that
is encoded, so a run whose embeddings are all in the cache never holds a text encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srpo_core.config import ConfigError, ModelConfig
from srpo_core.interfaces import PromptBatch
from srpo_core.models.flux_tokenizers import find_tokenizers, load_tokenizer, tokenizer_files
from srpo_core.places import find
from srpo_core.weights import text_names
from srpo_core.weights.compressed import fill_compressed
from srpo_core.weights.loading import check, empty_parameters, fill
from srpo_core.weights.tensors import TensorFile, open_tensors

MAX_TOKENS = 512
"""T5 tokens per prompt, padding included, as FLUX.1-dev was trained."""
_CATALOGUE = {"clip": "clip-l", "t5": "t5"}
"""What `srpo download` calls the towers."""
_NO_NUMBERS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Entries of a config.json that change no numbers here."""
_SAMPLED = 64
"""Bytes of each tensor that go into a fingerprint."""


@dataclass(frozen=True)
class TextFiles:
    """Where the two towers and their tokenizers are; a tower's `config` is what transformers builds it by."""

    clip: TensorFile
    clip_config: dict[str, Any]
    t5: TensorFile
    t5_config: dict[str, Any]
    clip_tokenizer: Path
    t5_tokenizer: Path

    @property
    def widths(self) -> tuple[int, int]:
        """(T5's, CLIP's): the transformer's joint_attention_dim and pooled_projection_dim must be these."""
        return self.t5_config["d_model"], self.clip_config["hidden_size"]

    @cached_property
    def fingerprint(self) -> str:
        """An identity of both towers and tokenizers that is cheap to take: sha256 over names, shapes, dtypes and first
        bytes of all tensors, the configurations, and the tokenizers' files. Where the files lie doesn't count."""
        digest = hashlib.sha256()
        for file, config in ((self.clip, self.clip_config), (self.t5, self.t5_config)):
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for name, info in sorted(file.info.items()):
                digest.update(f"\n{name} {info.dtype} {info.shape} ".encode() + file.sample(name, _SAMPLED))
        for folder in (self.clip_tokenizer, self.t5_tokenizer):
            for path in tokenizer_files(folder):
                digest.update(f"\n{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def find_text(config: ModelConfig) -> TextFiles:
    """Both towers and their tokenizers, checked by their headers alone. ConfigError names what is missing or wrong."""
    clip, clip_folder = _find_tower(config, "clip", "text_encoder")
    t5, t5_folder = _find_tower(config, "t5", "text_encoder_2")
    clip, t5 = text_names.clip_view(clip), text_names.t5_view(t5)
    files = TextFiles(
        clip, _folder_config(clip_folder, clip, "hidden_size") or text_names.clip_config(clip),
        t5, _folder_config(t5_folder, t5, "d_model") or text_names.t5_config(t5),
        *find_tokenizers(config, clip_folder, t5_folder),
    )  # fmt: skip
    module = _empty_clip(files)
    check(module, text_names.clip_stream(clip.outline(), module), clip)
    check(_empty_t5(files), text_names.t5_stream(t5.outline()), t5)
    return files


def _find_tower(config: ModelConfig, tower: str, subfolder: str) -> tuple[TensorFile, Path | None]:
    """A tower's tensors, and its folder where it is one."""
    named = getattr(config, tower)
    if named is not None:
        path = Path(named)
        path = path / subfolder if (path / subfolder).is_dir() else path  # a whole model's folder
        return open_tensors(path, f"model.{tower}"), path if path.is_dir() else None
    if config.path is None:
        here = find(_CATALOGUE[tower])
        way_out = f"model.{tower}={here} is here" if here else f"`srpo download {_CATALOGUE[tower]}` gets one"
        raise ConfigError(f"model.{tower} is not set, and there is no model.path with a text encoder in it; {way_out}")
    root = Path(config.path)
    if not root.is_dir():
        return text_names.in_checkpoint(open_tensors(root, "model.path"), tower), None
    if not (root / subfolder).is_dir():
        raise ConfigError(f"model.path={config.path!r} has no folder {subfolder}; model.{tower} names the text encoder")
    return open_tensors(root / subfolder, "model.path"), root / subfolder


def _folder_config(folder: Path | None, file: TensorFile, width: str) -> dict[str, Any] | None:
    """What a folder's own config.json says of the tower, less what changes no numbers; None if there is none."""
    path = folder / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)  # of a whole CLIP
        if not isinstance(config[width], int) or not isinstance(config["vocab_size"], int):
            raise TypeError(f"{width} and vocab_size must be numbers")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise file.error(f"its {path} can't be used: {error!r}") from error
    return {key: value for key, value in config.items() if key not in _NO_NUMBERS}


class FluxTextEncoder:
    """CLIP-L's pooled output and T5's token states, as FLUX is conditioned on them. Loads at its first call.

    `t5_memory` is model.t5_memory: "8bit" keeps T5's matrices in 8 bits (an fp8 file's own, or whole numbers
    with a scale for each row), "offload" keeps them on the host and moves one layer at a time.

    Measured with T5-XXL's shapes, random weights and bfloat16 on an H100: full 9.1 GiB and 33 ms for a prompt; 8bit
    5.0 GiB, 82 ms and states 4 % off (of an fp8 file: exact), where the same weights in a scaled fp8 file are 10 % off
    and bfloat16 itself is 2 % off float32; offload 0.5 GiB (3.7 at its peak) and 142 ms.
    """

    def __init__(
        self,
        files: TextFiles,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        t5_memory: str = "full",
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.files, self.dtype, self.device = files, dtype, torch.device(device)
        self.t5_memory, self.max_tokens = t5_memory, max_tokens
        self.batch_size = 16 if t5_memory == "offload" else 1
        """Prompts at once: one, so that its company changes no numbers; many where T5 is moved for each call."""

    @property
    def fingerprint(self) -> str:
        """What the numbers depend on: the files, the precision, T5's 8 bits, the number of tokens. Not the device."""
        storage = "8bit" if self.t5_memory == "8bit" else "full"
        told = f"flux text 1|{self.files.fingerprint}|{self.dtype}|{storage}|{self.max_tokens}"
        return hashlib.sha256(told.encode()).hexdigest()

    @cached_property
    def clip(self) -> nn.Module:
        """The `CLIPTextModel`."""
        module = _empty_clip(self.files)
        stream = text_names.clip_stream(self.files.clip, module)
        return fill(module, stream, self.dtype, self.device, self.files.clip)

    @cached_property
    def t5(self) -> nn.Module:
        """The `T5EncoderModel`, held as `t5_memory` says."""
        module, stream = _empty_t5(self.files), text_names.t5_stream(self.files.t5)
        if self.t5_memory == "8bit":
            return fill_compressed(module, stream, self.dtype, self.device, self.files.t5)
        if self.t5_memory == "offload" and self.device.type != "cpu":
            from accelerate import cpu_offload

            return cpu_offload(fill(module, stream, self.dtype, "cpu", self.files.t5), self.device)
        return fill(module, stream, self.dtype, self.device, self.files.t5)

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """CLIP's and T5's, checked against the towers."""
        clip, t5 = self.files.clip_config, self.files.t5_config
        return (
            load_tokenizer(self.files.clip_tokenizer, "CLIP", clip["vocab_size"], clip["vocab_size"] - 1),
            load_tokenizer(self.files.t5_tokenizer, "T5", t5["vocab_size"], 1),
        )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> PromptBatch:
        """Prompts -> prompt_embeds [B, max_tokens, D] and pooled_prompt_embeds [B, P]."""
        clip_tokenizer, t5_tokenizer = self.tokenizers
        clip_ids = self._ids(clip_tokenizer, prompts, self.clip.config.max_position_embeddings)
        pooled = self.clip(clip_ids).pooler_output
        embeds = self.t5(self._ids(t5_tokenizer, prompts, self.max_tokens)).last_hidden_state
        return PromptBatch(tuple(prompts), {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def _ids(self, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        """[B, length]: cut off or padded, as FLUX's pipelines do it."""
        settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(prompts), **settings).input_ids.to(self.device)


def text_outline(files: TextFiles) -> tuple[nn.Module, nn.Module]:
    """CLIP-L and T5 with their parameters on meta."""
    return _empty_clip(files), _empty_t5(files)


def _empty_clip(files: TextFiles) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return _empty(CLIPTextModel, CLIPTextConfig, files.clip_config, files.clip)


def _empty_t5(files: TextFiles) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    module = _empty(T5EncoderModel, T5Config, files.t5_config, files.t5)
    module.set_input_embeddings(module.shared)  # one table of tokens, whatever the version makes of it
    return module


def _empty(cls: Any, config_cls: Any, config: dict[str, Any], file: TensorFile) -> nn.Module:
    """A module without memory for its parameters. WeightsError if transformers can't build it by its configuration."""
    try:
        with empty_parameters():
            return cls(config_cls.from_dict(config)).eval().requires_grad_(False)
    except Exception as error:  # transformers raises many kinds for a configuration that makes no sense
        raise file.error(f"a {cls.__name__} can't be built by its configuration: {error}") from error
