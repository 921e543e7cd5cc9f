"""CLIP's and T5's tokenizers: single files of weights bring none, so they are looked for on this machine.

Never over the network, and ComfyUI's are found by their folders: none of its code is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srpo_core.config import ConfigError, ModelConfig
from srpo_core.places import comfyui_root, find, snapshot

CLIP, T5 = "tokenizer", "tokenizer_2"
"""The folders of a FLUX model in diffusers format."""
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_COMFYUI = {CLIP: "comfy/sd1_tokenizer", T5: "comfy/text_encoders/t5_tokenizer"}
_CACHED = {CLIP: "openai/clip-vit-large-patch14", T5: "google/t5-v1_1-xxl"}
_MODELS = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer that there are in a folder."""
    return [path for name in _FILES if (path := folder / name).is_file()]


def _is_tokenizer(folder: Path, which: str) -> bool:
    names = {path.name for path in tokenizer_files(folder)}
    if "tokenizer.json" in names:
        return True
    if which == CLIP:
        return {"vocab.json", "merges.txt"} <= names
    return "spiece.model" in names and importlib.util.find_spec("sentencepiece") is not None


def find_tokenizers(
    config: ModelConfig, clip_folder: Path | None = None, t5_folder: Path | None = None
) -> tuple[Path, Path]:
    """Folders of CLIP's and of T5's tokenizer. ConfigError lists the places looked in.

    A tokenizer may lie beside its text encoder's folder, or in it.
    """
    found = []
    for which, name, tower in ((CLIP, "CLIP", clip_folder), (T5, "T5", t5_folder)):
        places = list(dict.fromkeys(_places(config, tower, which)))
        here = next((folder for folder in places if _is_tokenizer(folder, which)), None)
        if here is None:
            looked = "\n".join(f"  {folder}" for folder in places)
            needs = "" if which == CLIP else "; one that is spiece.model alone needs the package sentencepiece"
            raise ConfigError(
                f"no tokenizer for {name} is on this machine{needs}: `srpo download tokenizers` gets it,"
                f" model.tokenizers names a folder with {CLIP} and {T5} in it. Looked in:\n{looked or '  (no place)'}"
            )
        found.append(here)
    return found[0], found[1]


def _places(config: ModelConfig, tower: Path | None, which: str) -> Iterator[Path]:
    """Where a tokenizer may lie, best first. What the user names is the only place."""
    if config.tokenizers is not None:
        yield Path(config.tokenizers) / which
        return
    if config.path is not None and Path(config.path).is_dir():
        yield Path(config.path) / which
    if tower is not None:
        yield tower.parent / which
        yield tower
    comfyui = comfyui_root()
    if comfyui is not None:
        yield comfyui / _COMFYUI[which]
    downloaded = find("tokenizers")
    if downloaded is not None:
        yield downloaded / which
    for repository in _MODELS:
        folder = snapshot(repository)
        if folder is not None:
            yield folder / which
    folder = snapshot(_CACHED[which])
    if folder is not None:
        yield folder


def load_tokenizer(folder: Path, name: str, vocabulary: int, end: int) -> Any:
    """A folder's tokenizer. ConfigError unless its ids lie below `vocabulary` and its end of text is the id `end`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise ConfigError(f"the tokenizer in {folder} can't be loaded: {error}") from error
    if len(tokenizer) > vocabulary or tokenizer.eos_token_id != end:
        raise ConfigError(
            f"the tokenizer in {folder} is not {name}'s: it has {len(tokenizer)} tokens and ends texts with"
            f" {tokenizer.eos_token_id}, the text encoder has {vocabulary} and expects {end}; model.tokenizers names"
            " others"
        )
    return tokenizer
