"""Our text encoding against real ComfyUI's: the same ids of the same tokenizers, the same numbers of the same files.

The towers are narrow but have CLIP-L's and T5-XXL's full vocabularies, and T5 its 24 layers: ComfyUI looks for them.
It runs in a process of its own (text_in_comfyui.py).
"""

import json
import logging
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from comfyui_side import CHECKOUT, ask, needs_comfyui
from safetensors.torch import load_file
from tiny_text import clip_tensors, plain_fp8, save, scaled_fp8, t5_tensors, tiny_clip, tiny_t5

from srpo_core.config import ModelConfig
from srpo_core.models.flux_text import FluxTextEncoder, find_text

pytestmark = needs_comfyui
TOLERANCE = 3e-5
"""Relative, of float32 results; measured with ComfyUI 0.33.0: 5e-6 at most."""
STRAIGHTENED = int(version("transformers").split(".")[0]) < 5 and find_spec("ftfy") is not None
"""Whether ComfyUI's CLIP tokenizer straightens curly quotes first: the one of transformers 4 does so where ftfy is."""
TEXTS = [
    "a photo of a red cat, asleep on a windowsill; morning light",
    "",
    "A CAT!!!  with   runs of  spaces",
    "Zürich, naïve café — “quoted”, 50% off… №5".translate({ord("“"): '"', ord("”"): '"'} if STRAIGHTENED else {}),
    "図書館の猫 и кошка 🐈‍⬛",
    "tabs\tand\nlines\r\n",
    "supercalifragilisticexpialidocious " * 12,
    "an endoftext in words, <|not a token|> and </s>",
    "word " * 76,
]
LONG = "a very long description of many things, " * 80


def numbers(job, texts):
    """What ComfyUI wrote: (ids by tokenizer, tensors)."""
    (job / "job.json").write_text(json.dumps({**json.loads((job / "job.json").read_text()), "texts": texts}))
    ask("text_in_comfyui.py", job)
    report = json.loads((job / "report.json").read_text(encoding="utf-8"))
    assert [message for level, message in report["logged"] if level >= logging.WARNING] == []
    return json.loads((job / "ids.json").read_text(encoding="utf-8")), load_file(job / "outputs.safetensors")


@pytest.fixture(scope="module")
def towers():
    return tiny_clip(49408), tiny_t5(32128, 64, layers=24)


def both(folder, towers, store, texts=TEXTS):
    """(our encoder, ComfyUI's ids, ComfyUI's tensors) for files that hold T5 as `store` makes it."""
    extra = {"text_projection.weight": torch.eye(64)}  # ComfyUI complains of files without it, which FLUX doesn't use
    clip = save(folder / "clip_l.safetensors", clip_tensors(towers[0]) | extra)
    t5 = save(folder / "t5xxl.safetensors", store(t5_tensors(towers[1])))
    files = find_text(ModelConfig(clip=str(clip), t5=str(t5)))
    assert Path(CHECKOUT).resolve() in files.t5_tokenizer.resolve().parents
    settings = {
        "clip": str(clip), "t5": str(t5),
        "clip_config": {name: files.clip_config[name] for name in (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")},
        "t5_config": {name: files.t5_config[name] for name in ("d_ff", "d_kv", "d_model", "num_heads", "num_layers")},
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(settings), encoding="utf-8")
    return FluxTextEncoder(files), *numbers(folder, texts)


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("store", [dict, plain_fp8, scaled_fp8], ids=["fp32", "fp8", "scaled fp8"])
def test_ids_and_embeddings(tmp_path, towers, store):
    encoder, ids, theirs = both(tmp_path, towers, store)
    clip, t5 = encoder.tokenizers
    for i, text in enumerate(TEXTS):
        assert encoder._ids(clip, [text], 77)[0].tolist() == ids["l"][i][0], text
        assert encoder._ids(t5, [text], 512)[0].tolist() == ids["t5xxl"][i][0], text
    ours = encoder(TEXTS).embeds
    for name, key in (("pooled_prompt_embeds", "pooled"), ("prompt_embeds", "tokens")):
        error = relative_error(ours[name], theirs[key])
        print(f"{name}: relative error {error:.1e}")
        assert error < TOLERANCE


def test_long_texts_are_cut_at_ends(tmp_path, towers):
    """ComfyUI goes on where we stop: in further sections (CLIP), without limit (T5)."""
    encoder, ids, _ = both(tmp_path, towers, dict, [LONG, "a cat"])
    clip, t5 = encoder.tokenizers
    assert encoder._ids(clip, [LONG], 77)[0].tolist() == ids["l"][0][0]
    assert len(ids["l"][0]) > 1 and len(ids["t5xxl"][0][0]) > 512
    assert encoder._ids(t5, [LONG], 512)[0].tolist() == [*ids["t5xxl"][0][0][:511], 1]
