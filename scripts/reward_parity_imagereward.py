"""Compare the imagereward reward with the ImageReward package's own model code, on weights made by rule.

    python scripts/reward_parity_imagereward.py --python ENV/bin/python [--size tiny|full] [--golden FILE]

ENV is an environment of its own with the package, which needs old libraries (Python 3.11):
    pip install torch==2.13.0 && pip install --no-deps torchvision==0.28.0 timm==0.6.13 image-reward==1.5
    pip install transformers==4.27.4 "huggingface_hub<0.26" safetensors fairscale
There this script runs itself, as `original`: the package's code makes the network (`full`: 24 + 12 layers, 447 M
parameters, 1.8 GB; `tiny`: 2 + 2 layers), scores pictures and saves its checkpoint. Here the reward loads that file and
must give the same scores and gradients. The full size goes to scripts/results/rewards.json; --golden writes what tests
compare with (of the full size only names and shapes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from by_rule import by_rule, weight_by_rule
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results" / "rewards.json"
WORDS = (
    *("a", "red", "blue", "square", "circle", "on", "the", "wall", "of", "house", "painting", "photo", "detail"),
    *("##s", "##ed", "real", "##istic", ".", ",", "'", "-", "(", ")"),
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = (
    "A red square on the wall.",
    "Realistic photo. a blue circle",
    "Painting. the house, detailed, of a wall - (red) " * 5,
    "",
)
UNUSUAL = (
    "Réal, PHOTO's reds-squared",
    "\ta red\n blue\u00a0house\u200b",
    "写真 red。(blue)",
    "a [SEP] red [MASK] [ENC] blue [enc]",
    "red🙂blue naïve ﬁ İ",
    "x" * 120 + " red",
)
"""Texts at which tokenizers can part."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PHOTO = (300, 260)
"""Height and width of the picture that goes through the package's own PIL pipeline."""
TINY = {"image_size": 64, "vision": 192, "depth": 2, "text": 128, "layers": 2, "intermediate": 256, "positions": 40}
FULL = {
    "image_size": 224,
    "vision": 1024,
    "depth": 24,
    "text": 768,
    "layers": 12,
    "intermediate": 3072,
    "positions": 512,
}
SIZES = {"tiny": TINY, "full": FULL}


def pictures(size: int) -> Tensor:
    """Two pictures [2, 3, size, size] in [0, 1]: coarse blotches with noise over them."""
    coarse = by_rule("coarse", (2, 3, 5, 5), 0, 1)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="nearest")
    return 0.8 * smooth + 0.2 * by_rule("noise", (2, 3, size, size), 0, 1)


def photo() -> Tensor:
    """A picture [3, H, W] in whole 255ths, of PHOTO's size."""
    coarse = by_rule("photo", (1, 3, 9, 9), 0, 1)
    smooth = nn.functional.interpolate(coarse, PHOTO, mode="bilinear", align_corners=False)[0]
    return (255 * smooth).round() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", help="interpreter of the environment with the ImageReward package")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--golden", type=Path, help="write names, shapes and, if tiny, numbers here")
    parser.add_argument("--original", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.original:
        run_original(options.original, options.size)
    elif options.python:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), options)
    else:
        parser.error("--python is needed")


# ---- in the package's environment


def run_original(folder: Path, size: str) -> None:
    """Make the package's network in `folder`, whose bert-base-uncased it reads; leave checkpoint and numbers."""
    from safetensors.torch import save_file

    code = package_code()
    model = original_network(code, SIZES[size], folder)
    state = {name: made(name, tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    torch.save(state, folder / "ImageReward.pt")
    images = pictures(SIZES[size]["image_size"]).requires_grad_()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    scores = []
    for prompt in PROMPTS:
        tokens = model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        for image in images:
            scores.append(model.score_gard(tokens.input_ids, tokens.attention_mask, ((image - mean) / std)[None])[0, 0])
    scores = torch.stack(scores)
    (scores * by_rule("cotangent", scores.shape)).sum().backward()
    found = {"scores": scores.detach(), "gradient": images.grad}
    unusual = model.blip.tokenizer(list(UNUSUAL), padding="max_length", truncation=True, max_length=35)
    found["tokens"] = torch.tensor(unusual.input_ids)
    if size == "full":
        from PIL import Image

        pixels = (photo() * 255).byte().permute(1, 2, 0).numpy()
        found["photo"] = torch.tensor([model.score(prompt, Image.fromarray(pixels)) for prompt in PROMPTS])
    save_file(found, folder / "original.safetensors")
    names = ("torch", "torchvision", "image-reward", "timm", "transformers")
    (folder / "versions.json").write_text(json.dumps({name: version(name) for name in names}), encoding="utf-8")


def package_code() -> types.SimpleNamespace:
    """The package's model code, without its top level, which imports diffusers, datasets and OpenAI's clip."""
    import importlib.util

    operators = torch.library.Library("torchvision", "FRAGMENT")  # for a torchvision built for another torch
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    root = Path(importlib.util.find_spec("ImageReward").origin).parent
    for name, place in (("ImageReward", root), ("ImageReward.models", root / "models")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]
    from ImageReward import ImageReward as top
    from ImageReward.models.BLIP import blip, med, vit

    return types.SimpleNamespace(top=top, blip=blip, med=med, vit=vit, operators=operators)


def original_network(code: types.SimpleNamespace, size: dict[str, int], folder: Path) -> nn.Module:
    """The package's ImageReward: its own constructor at full size, its parts put together at another."""
    text = {
        "vocab_size": len(VOCABULARY) + 2,
        "hidden_size": size["text"],
        "intermediate_size": size["intermediate"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["text"] // 64,
        "max_position_embeddings": size["positions"],
        "layer_norm_eps": 1e-12,
        "add_cross_attention": True,
        "encoder_width": size["vision"],
    }
    if size is FULL:
        (folder / "med_config.json").write_text(json.dumps({**text, "vocab_size": 30524}), encoding="utf-8")
        return code.top.ImageReward(device="cpu", med_config=str(folder / "med_config.json"))
    model = code.top.ImageReward.__new__(code.top.ImageReward)
    nn.Module.__init__(model)
    model.blip, model.mlp = nn.Module(), code.top.MLP(size["text"])
    model.blip.visual_encoder = code.vit.VisionTransformer(
        img_size=size["image_size"], embed_dim=size["vision"], depth=size["depth"], num_heads=size["vision"] // 64
    )
    model.blip.text_encoder = code.med.BertModel(code.med.BertConfig(**text), add_pooling_layer=False)
    model.blip.tokenizer = code.blip.init_tokenizer()
    model.device, model.mean, model.std = "cpu", 0.16717362830052426, 1.0333394966054072
    return model


def made(name: str, tensor: Tensor) -> Tensor:
    """A weight by rule; position ids stay what they are."""
    return weight_by_rule(name, tensor.shape) if tensor.is_floating_point() else tensor


# ---- here


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Let the package's environment make its numbers, make ours, record the differences."""
    from safetensors.torch import load_file

    from srpo_core.config import RewardConfig
    from srpo_core.files import write_atomic
    from srpo_core.rewards import imagereward

    tokenizer = folder / "bert-base-uncased"
    tokenizer.mkdir()
    unused = [f"[unused{i}]" for i in range(30522 - len(VOCABULARY))] if options.size == "full" else []
    (tokenizer / "vocab.txt").write_text("\n".join([*VOCABULARY, *unused]) + "\n", encoding="utf-8")
    command = [options.python, str(Path(__file__).resolve()), "--original", str(folder), "--size", options.size]
    subprocess.run(command, check=True, cwd=folder)
    theirs = load_file(folder / "original.safetensors")
    reward = imagereward.load(RewardConfig(name="imagereward", path=str(folder)), "cpu")
    images = pictures(SIZES[options.size]["image_size"]).requires_grad_()
    scores = reward(images, [prompt for prompt in PROMPTS for _ in images])
    (scores * by_rule("cotangent", scores.shape)).sum().backward()
    found = {
        "size": options.size,
        "parameters": sum(parameter.numel() for parameter in reward.network.parameters()),
        "scores": theirs["scores"].tolist(),
        "largest score difference": (scores - theirs["scores"]).abs().max().item(),
        "largest gradient difference, of the largest gradient": _relative(images.grad, theirs["gradient"]),
        "texts with other tokens": int((reward.tokenize(UNUSUAL)["input_ids"] != theirs["tokens"]).any(-1).sum()),
    }
    if "photo" in theirs:
        with torch.no_grad():
            ours = reward(photo()[None], list(PROMPTS))
        found["scores of a photo, resized by PIL"] = theirs["photo"].tolist()
        found["largest score difference of the photo"] = (ours - theirs["photo"]).abs().max().item()
    found["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    found["versions of theirs"] = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    print(json.dumps(found, indent=1))
    if options.size == "full":
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        write_atomic(RESULTS, json.dumps(results | {"imagereward": found}, indent=1) + "\n")
    if options.golden:
        state = torch.load(folder / "ImageReward.pt", weights_only=True, mmap=True)
        shapes = {"shapes": {name: list(tensor.shape) for name, tensor in state.items()}}
        numbers = golden(theirs, images.shape) if options.size == "tiny" else {}
        write_atomic(options.golden, json.dumps(shapes | numbers) + "\n")


def golden(theirs: dict[str, Tensor], shape: torch.Size) -> dict[str, Any]:
    """What a test needs, beside the shapes of the weights, to repeat the comparison without the package."""
    return {
        "vocabulary": VOCABULARY,
        "prompts": PROMPTS,
        "images": list(shape),
        "scores": theirs["scores"].tolist(),
        "unusual": UNUSUAL,
        "tokens": theirs["tokens"].tolist(),
        "gradient": theirs["gradient"][:, :, ::9, ::7].tolist(),
    }


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


if __name__ == "__main__":
    main()
