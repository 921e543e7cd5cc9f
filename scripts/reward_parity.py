"""Compare the hpsv2 and pickscore rewards with their authors' code, on the same random weights.

    python scripts/reward_parity.py PACKAGE [--narrow] [--skip hpsv2|pickscore]

PACKAGE is the folder of an unpacked hpsv2 wheel (pip download hpsv2==1.2.0 --no-deps; unzip); it is imported, never
copied. Two things that it lacks are supplied: the tokenizer's vocabulary, which is open_clip's, and the module turtle.
PickScore is compared with the snippet in its model card, run by transformers. Full size takes 12 GB of memory and disk.
The result goes to scripts/results/rewards.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srpo_core.config import RewardConfig
from srpo_core.files import write_atomic
from srpo_core.interfaces import Reward
from srpo_core.rewards import hpsv2, pickscore

RESULTS = Path(__file__).resolve().parent / "results" / "rewards.json"
PROMPTS = (
    "a red cat on a mat",
    "Realistic photo. Two dogs, running & barking at night!",
    "Concept art. " + "a very long caption about a castle by the sea, " * 12,
)
SIZES = ((224, 224), (720, 720), (768, 1344), (301, 200))
"""Heights and widths of the pictures."""


def picture(height: int, width: int) -> Image.Image:
    """Waves of many lengths with a little noise, 8 bits."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / (7 + 5 * c) + c) * np.cos(y / (11 - 2 * c)) + 0.3 * np.sin((x + y) / 3) for c in range(3)]
    noise = np.random.default_rng(height).normal(0, 10, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) * 90 + 128 + noise, 0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 255


def differences(reward: Reward, theirs: Callable[[Image.Image, Sequence[str]], Tensor]) -> dict[str, Any]:
    """By picture size: their scores, and the largest difference of ours."""
    rows = {}
    for size in SIZES:
        image, start = picture(*size), time.perf_counter()
        with torch.no_grad():
            expected = theirs(image, PROMPTS)
            middle = time.perf_counter()
            ours = reward(tensor(image), PROMPTS)
        rows["x".join(map(str, size))] = {
            "scores": [round(float(value), 6) for value in expected],
            "largest_difference": float((ours - expected).abs().max()),
            "seconds": {"theirs": round(middle - start, 1), "ours": round(time.perf_counter() - middle, 1)},
        }
    return rows


def gradient_difference(reward: Reward, theirs: Callable[[Tensor, Sequence[str]], Tensor]) -> float:
    """Relative difference of the gradients in a picture of the tower's own size."""
    gradients = []
    for function in (theirs, reward):
        image = tensor(picture(224, 224)).requires_grad_()
        gradients.append(torch.autograd.grad(function(image, PROMPTS[:1]).sum(), image)[0])
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


# HPS v2


def import_package(folder: Path) -> Any:
    """The package's copy of open_clip, without running the package's own __init__."""
    import open_clip

    package = types.ModuleType("hpsv2")
    package.__path__ = [str(folder / "hpsv2")]
    sys.modules["hpsv2"] = package
    sys.modules.setdefault("turtle", types.ModuleType("turtle")).forward = None
    vocabulary = folder / "hpsv2" / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not vocabulary.exists():
        shutil.copy(Path(open_clip.__file__).with_name(vocabulary.name), vocabulary)
    from hpsv2.src import open_clip as theirs

    return theirs


def compare_hps(package: Path, folder: Path, architecture: str) -> dict[str, Any]:
    """Our scores and gradient against those of the package's model code, transform and tokenizer."""
    from hpsv2.src.open_clip.factory import create_model_and_transforms

    torch.manual_seed(0)
    model, _, transform = create_model_and_transforms(
        architecture, None, precision="fp32", light_augmentation=True, output_dict=True, pretrained_hf=False
    )
    model.eval().requires_grad_(False)
    tokenize = sys.modules["hpsv2.src.open_clip"].get_tokenizer(architecture)
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.state_dict()}, path)

    def scores(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        output = model(pixels, tokenize(list(prompts)))
        return (output["image_features"] @ output["text_features"].T).flatten()

    def by_package(image: Image.Image, prompts: Sequence[str]) -> Tensor:
        return scores(transform(image)[None], prompts)

    def by_model(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return scores(transform.transforms[-1](images[0])[None], prompts)

    config = RewardConfig(name="hpsv2", path=str(path), fit="pad")
    hpsv2.check(config)
    reward = hpsv2.load(config, "cpu")
    state = reward.clip.module.state_dict()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "keys": len(state),
        "file_gib": round(path.stat().st_size / 2**30, 2),
        "pictures": differences(reward, by_package),
        "gradient": gradient_difference(reward, by_model),
    }


# PickScore


def write_tokenizer(folder: Path) -> None:
    """open_clip's vocabulary as the files of transformers' CLIPTokenizer."""
    import open_clip
    from open_clip import SimpleTokenizer

    vocabulary = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {renamed.get(word, word): i for word, i in SimpleTokenizer().encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_pickscore(folder: Path, size: dict[str, Any]) -> None:
    """A CLIP with random weights in transformers' format, with processor and tokenizer as its repository has them."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**size))
    torch.nn.init.constant_(model.logit_scale, 4.6052)  # 100, as PickScore's
    model.save_pretrained(folder)
    write_tokenizer(folder)
    side = model.config.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "do_resize": True,
        "size": {"shortest_edge": side}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def model_card_scores(folder: Path) -> tuple[Any, Callable[[Any, Sequence[str]], Tensor]]:
    """The model, and what the model card computes with it: exp(logit_scale) times the cosine."""
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval().requires_grad_(False)

    def unit(output: Any) -> Tensor:
        features = output if isinstance(output, Tensor) else output.pooler_output
        return features / torch.norm(features, dim=-1, keepdim=True)

    def scores(image: Image.Image, prompts: Sequence[str]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        text = unit(model.get_text_features(**processor(text=list(prompts), **options)))
        pixels = processor(images=[image], return_tensors="pt")
        return model.logit_scale.exp() * (text @ unit(model.get_image_features(**pixels)).T).flatten()

    return model, scores


def compare_pickscore(folder: Path, size: dict[str, Any]) -> dict[str, Any]:
    """Our scores against the model card's; its processor rounds resized pictures to 8 bits."""
    write_pickscore(folder, size)
    model, theirs = model_card_scores(folder)
    pickscore.IMAGE_WIDTH = size["vision_config"]["hidden_size"]
    config = RewardConfig(name="pickscore", path=str(folder))
    pickscore.check(config)
    rows = differences(pickscore.load(config, "cpu"), theirs)
    alone = folder / "alone" / "pickscore.safetensors"
    alone.parent.mkdir()
    (folder / "model.safetensors").rename(alone)
    single = pickscore.load(RewardConfig(name="pickscore", path=str(alone)), "cpu")
    side = model.config.vision_config.image_size
    image = picture(side, side)
    with torch.no_grad():
        difference = (single(tensor(image), PROMPTS) - theirs(image, PROMPTS)).abs().max()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pictures": rows,
        "file_alone": float(difference),
    }


VIT_H_14 = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024,
    },
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", "projection_dim": 1024, "bos_token_id": 49406, "eos_token_id": 49407,
    },
}  # fmt: skip
NARROW = {
    "projection_dim": 32,
    "vision_config": VIT_H_14["vision_config"] | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                                                  "num_attention_heads": 2, "projection_dim": 32},
    "text_config": VIT_H_14["text_config"] | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                                              "num_attention_heads": 1, "projection_dim": 32},
}  # fmt: skip


def versions() -> dict[str, str]:
    """The libraries that were compared."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "open_clip_torch", "transformers", "torchvision", "pillow")}


def main() -> None:
    """Compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the unpacked hpsv2 wheel")
    parser.add_argument("--narrow", action="store_true", help="PickScore with small random weights, HPS not at all")
    parser.add_argument("--skip", choices=["hpsv2", "pickscore"], default=None, help="leave one out")
    parser.add_argument("--folder", type=Path, default=None, help="where the random weights are put meanwhile")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.skip != "hpsv2" and not args.narrow:
            import_package(args.package)
            results["hpsv2"] = compare_hps(args.package, Path(folder), hpsv2.ARCHITECTURE) | {"versions": versions()}
            (Path(folder) / "HPS_v2.1_compressed.pt").unlink()
            print(json.dumps(results["hpsv2"], indent=1))
        if args.skip != "pickscore":
            found = compare_pickscore(Path(folder), NARROW if args.narrow else VIT_H_14) | {"versions": versions()}
            results["pickscore"] = found
            print(json.dumps(found, indent=1))
    if not args.narrow:
        write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
