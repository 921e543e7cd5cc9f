"""Models that this project knows by name: where they come from, where they go, their licences and checksums.

One table for `srpo download`, `srpo doctor`, the settings' hints and docs/files.md. Checksums are those that several
public lists agree on; None where none could be established: a download is checked against the hub's own in any case.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

REWARDS_FOLDER = "srpo_rewards"
"""Folder of rewards in ComfyUI's models folder."""

FLUX_DEV_LICENCE = "FLUX.1 [dev] non-commercial"


@dataclass(frozen=True)
class File:
    """A file of a repository, or with * in the last part of `path` all that match.

    `place` is where it goes below ComfyUI's models folder: a file, or a folder where it ends in / (None: nowhere).
    `cached` says whether it belongs to a download into the Hugging Face cache. `size` is in bytes, exact beside a
    `sha256`, else about right.
    """

    repository: str
    path: str
    place: str | None = None
    cached: bool = True
    sha256: str | None = None
    size: int | None = None

    def matches(self, path: str) -> bool:
        """Whether this is the file, or one of the files, at `path` in its repository."""
        folder, _, name = path.rpartition("/")
        own_folder, _, pattern = self.path.rpartition("/")
        return folder == own_folder and fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Entry:
    """Something to download. Its first file (or with `folder` the folder of its files) is the value of `setting`."""

    name: str
    what: str
    licence: str
    gated: bool
    """whether the licence must be accepted on the model's page first (the hub has the last word)"""
    setting: str
    files: tuple[File, ...]
    folder: bool = False
    needs: tuple[str, ...] = ()
    """names of entries that it can't be used without"""
    cache_setting: str | None = None
    """the setting that takes the cache's folder, where that is another one"""

    @property
    def repository(self) -> str:
        return self.files[0].repository

    @property
    def size(self) -> int:
        """About how many bytes a download into the cache is; the hub says exactly."""
        return sum(file.size or 0 for file in self.files if file.cached)

    @property
    def comfyui_size(self) -> int:
        """The same of a download into ComfyUI's folders."""
        return sum(file.size or 0 for file in self.files if file.place is not None)

    @property
    def differs(self) -> bool:
        """Whether the two downloads are different files."""
        return any(file.cached != (file.place is not None) for file in self.files)


def _diffusers(repository: str) -> tuple[File, ...]:
    """The files of a FLUX repository in diffusers format, weights as sharded safetensors."""
    sizes = {"transformer": 23_800_000_000, "text_encoder": 246_000_000, "text_encoder_2": 9_525_000_000,
             "vae": 168_000_000, "tokenizer": 1_600_000, "tokenizer_2": 3_200_000}  # fmt: skip
    folders = ("transformer", "text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2", "scheduler")
    weights = tuple(File(repository, f"{folder}/*", size=sizes.get(folder)) for folder in folders)
    return (File(repository, "model_index.json"), *weights)


def _transformers(repository: str, size: int, sha256: str | None = None) -> tuple[File, ...]:
    """A model in transformers' format: its weights, and configuration and tokenizer beside them."""
    place = f"{REWARDS_FOLDER}/{repository.split('/')[1]}/"
    weights = File(repository, "model.safetensors", place, sha256=sha256, size=size)
    return (weights, File(repository, "*.json", place), File(repository, "*.txt", place))


_ENTRIES = (
    Entry(
        "flux", "FLUX.1-dev: the transformer for ComfyUI, the whole diffusers folder for the cache",
        FLUX_DEV_LICENCE, True, "model.transformer",
        (
            File("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors", "diffusion_models/flux1-dev.safetensors",
                 False, "4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7", 23_802_932_552),
            *_diffusers("black-forest-labs/FLUX.1-dev"),
        ),
        cache_setting="model.path",
    ),
    Entry(
        "flux-schnell", "FLUX.1-schnell, as flux; distilled to four steps, a poor start for training",
        "Apache-2.0", True, "model.transformer",
        (
            File("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors",
                 "diffusion_models/flux1-schnell.safetensors", False,
                 "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a", 23_782_506_688),
            *_diffusers("black-forest-labs/FLUX.1-schnell"),
        ),
        cache_setting="model.path",
    ),
    Entry(
        "flux-krea", "FLUX.1-Krea-dev, as flux",
        FLUX_DEV_LICENCE, True, "model.transformer",
        (
            File("black-forest-labs/FLUX.1-Krea-dev", "flux1-krea-dev.safetensors",
                 "diffusion_models/flux1-krea-dev.safetensors", False, size=23_800_000_000),
            *_diffusers("black-forest-labs/FLUX.1-Krea-dev"),
        ),
        cache_setting="model.path",
    ),
    Entry(
        "flux-fp8", "FLUX.1-dev with both text encoders and the autoencoder in one 8-bit file",
        FLUX_DEV_LICENCE, False, "model.path",
        (
            File("Comfy-Org/flux1-dev", "flux1-dev-fp8.safetensors", "checkpoints/flux1-dev-fp8.safetensors",
                 sha256="8e91b68084b53a7fc44ed2a3756d821e355ac1a7b6fe29be760c1db532f3d88a", size=17_246_524_772),
        ),
    ),
    Entry(
        "srpo", "the SRPO authors' FLUX.1-dev, trained with HPS v2.1 (transformer in float32)",
        f"SRPO academic use only, and {FLUX_DEV_LICENCE}", False, "model.transformer",
        (
            File("tencent/SRPO", "diffusion_pytorch_model.safetensors",
                 "diffusion_models/SRPO/diffusion_pytorch_model.safetensors", size=47_600_000_000),
        ),
    ),
    Entry(
        "clip-l", "CLIP-L text encoder of FLUX, one file",
        "MIT", False, "model.clip",
        (
            File("comfyanonymous/flux_text_encoders", "clip_l.safetensors", "text_encoders/clip_l.safetensors",
                 sha256="660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd", size=246_144_152),
        ),
    ),
    Entry(
        "t5", "T5-XXL text encoder of FLUX, one file in 16 bits",
        "Apache-2.0", False, "model.t5",
        (
            File("comfyanonymous/flux_text_encoders", "t5xxl_fp16.safetensors", "text_encoders/t5xxl_fp16.safetensors",
                 sha256="6e480b09fae049a72d2a8c5fbccb8d3e92febeb233bbe9dfe7256958a9167635", size=9_787_841_024),
        ),
    ),
    Entry(
        "t5-fp8", "T5-XXL text encoder of FLUX, one file in 8 bits (scaled)",
        "Apache-2.0", False, "model.t5",
        (
            File("comfyanonymous/flux_text_encoders", "t5xxl_fp8_e4m3fn_scaled.safetensors",
                 "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors",
                 sha256="a498f0485dc9536735258018417c3fd7758dc3bccc0a645feaa472b34955557a", size=5_157_348_688),
        ),
    ),
    Entry(
        "ae", "autoencoder of FLUX, one file",
        "Apache-2.0", False, "model.autoencoder",
        (
            File("Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors", "vae/ae.safetensors",
                 sha256="afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38", size=335_304_388),
        ),
    ),
    Entry(
        "tokenizers", "FLUX's two tokenizers (not needed where ComfyUI itself or a diffusers folder is at hand)",
        "Apache-2.0", True, "model.tokenizers",
        (
            File("black-forest-labs/FLUX.1-schnell", "tokenizer/*", "text_encoders/flux_tokenizers/tokenizer/",
                 size=1_600_000),
            File("black-forest-labs/FLUX.1-schnell", "tokenizer_2/*", "text_encoders/flux_tokenizers/tokenizer_2/",
                 size=3_200_000),
        ),
        folder=True,
    ),
    Entry(
        "hpsv2", "HPS v2.1, the reward of the published recipe",
        "Apache-2.0", False, "reward.path",
        (
            File("xswu/HPSv2", "HPS_v2.1_compressed.pt", f"{REWARDS_FOLDER}/HPS_v2.1_compressed.pt",
                 size=1_972_000_000),
        ),
    ),
    Entry(
        "pickscore", "PickScore v1, a reward",
        "MIT (its code; the model's page names none)", False, "reward.path",
        _transformers("yuvalkirstain/PickScore_v1", 3_944_000_000),
        folder=True,
    ),
    Entry(
        "clip", "CLIP ViT-H-14 by LAION, a reward",
        "MIT", False, "reward.path",
        _transformers("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 3_944_000_000),
        folder=True,
    ),
    Entry(
        "clip-l14", "CLIP ViT-L-14 by OpenAI: a reward, and the image tower of the aesthetic one",
        "MIT (its code; the model's page names none)", False, "reward.path",
        _transformers("openai/clip-vit-large-patch14", 1_710_540_580,
                      "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
        folder=True,
    ),
    Entry(
        "imagereward", "ImageReward v1.0, a reward, with the tokenizer that it reads prompts with",
        "Apache-2.0", False, "reward.path",
        (
            File("zai-org/ImageReward", "ImageReward.pt", f"{REWARDS_FOLDER}/ImageReward/", size=1_790_000_000),
            File("zai-org/ImageReward", "med_config.json", f"{REWARDS_FOLDER}/ImageReward/"),
            File("google-bert/bert-base-uncased", "tokenizer.json", f"{REWARDS_FOLDER}/ImageReward/bert-base-uncased/"),
            File("google-bert/bert-base-uncased", "vocab.txt", f"{REWARDS_FOLDER}/ImageReward/bert-base-uncased/"),
        ),
    ),
    Entry(
        "aesthetic", "LAION aesthetic predictor v2: the head that goes on top of clip-l14",
        "Apache-2.0", False, "reward.path",
        (
            File("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth",
                 f"{REWARDS_FOLDER}/sac+logos+ava1-l14-linearMSE.pth",
                 sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0", size=3_714_759),
        ),
        needs=("clip-l14",),
    ),
)  # fmt: skip

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def hint(name: str) -> str:
    """How to get an entry, for the end of an error message."""
    return f"srpo download {name} gets it"
