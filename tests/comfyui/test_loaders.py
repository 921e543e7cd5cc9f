"""SRPO's loaders in a real server: files in every form, the miniature, and what is refused and how."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from comfyui_pictures import (
    BUILT_IN,
    CAPTION,
    GUIDANCE,
    LEVEL,
    apart,
    checkpoint,
    drawn,
    engine_picture,
    failure,
    graph,
    lora,
)
from comfyui_server import Server
from comfyui_side import TRANSFORMER, needs_comfyui
from flux_weights import header_only, original_shapes
from safetensors.torch import load_file, save_file

from srpo_core.export.convert import convert
from srpo_core.miniature import WEIGHTS

pytestmark = needs_comfyui


@pytest.fixture(scope="module")
def models(server):
    """The miniature's transformer in models/diffusion_models, and unet, by both sets of names in several precisions."""
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    for format, dtype in (("comfyui", "float32"), ("diffusers", "bfloat16"), ("comfyui", "scaled-fp8")):
        convert(TRANSFORMER.parent, folder / f"mini-{format}-{dtype}.safetensors", format, dtype)
    (folder.parent / "unet").mkdir(exist_ok=True)
    shutil.copy(folder / "mini-diffusers-bfloat16.safetensors", folder.parent / "unet" / "in-unet.safetensors")
    tensors = load_file(folder / "mini-diffusers-bfloat16.safetensors")
    plain = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in tensors.items()}
    save_file(plain, folder / "mini-plain-fp8.safetensors")
    (folder / "shards").mkdir()
    names = list(tensors)
    parts = {f"mini-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for name, held in parts.items():
        save_file({one: tensors[one] for one in held}, folder / "shards" / name)
    index = {"weight_map": {one: name for name, held in parts.items() for one in held}}
    (folder / "shards" / "mini.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ---- the miniature


def test_the_miniature_draws_what_the_engine_draws(parts, base):
    """Text encoder, transformer and VAE at once."""
    difference = apart(base, engine_picture(parts, parts.flow.module))
    print(f"largest difference {difference} of 255")
    assert base.std() > 30
    assert difference <= LEVEL


def test_its_clip_takes_what_comfyui_s_encoders_write(server, base):
    flux = {
        "class_type": "CLIPTextEncodeFlux",
        "inputs": {"clip": ["mini", 1], "clip_l": CAPTION, "t5xxl": CAPTION, "guidance": GUIDANCE},
    }
    assert apart(drawn(server, encode=flux)[0], base) == 0
    weighted = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["mini", 1], "text": f"({CAPTION}:1.0)"}}
    assert apart(drawn(server, encode=weighted)[0], base) == 0
    weighted["inputs"]["text"] = CAPTION.replace("red", "(red:0.2)")
    assert apart(drawn(server, encode=weighted)[0], base) > 10
    flux["inputs"]["clip_l"] = "three blue stars at night"
    assert apart(drawn(server, encode=flux)[0], base) > LEVEL


def test_a_second_run_is_cached(server, base):
    result = server.run(graph(["mini", 0]))
    assert "mini" in result.cached


# ---- checkpoints


@pytest.mark.parametrize(
    ("file", "weights", "found"),
    [
        ("mini-comfyui-float32.safetensors", "as stored", "transformer, original names, fp32, 9.3 M parameters"),
        ("mini-comfyui-float32.safetensors", "float32", "loaded as float32"),
        ("mini-comfyui-float32.safetensors", "bfloat16", "loaded as bfloat16"),
        ("mini-diffusers-bfloat16.safetensors", "as stored", "transformer, diffusers' names, bf16, 9.3 M parameters"),
        ("shards/mini-00001-of-00002.safetensors", "as stored", "diffusers' names, bf16, 9.3 M parameters"),
        ("shards/mini-00002-of-00002.safetensors", "float32", "loaded as float32, 17.7 MiB"),
        ("in-unet.safetensors", "as stored", "transformer, diffusers' names, bf16, 9.3 M parameters"),
    ],
)
def test_exact_forms_draw_the_same_picture(server, models, base, file, weights, found):
    pixels, text = drawn(server, checkpoint(file, weights))
    assert found in text
    assert apart(pixels, base) <= LEVEL


def test_files_of_all_folders_are_offered(server, models):
    """Those of models/unet and of subfolders too, as soon as they are there."""
    info = server.get("/object_info/SRPOLoadCheckpoint")["SRPOLoadCheckpoint"]
    _, options = info["input"]["required"]["checkpoint"]
    shard = os.path.join("shards", "mini-00001-of-00002.safetensors")
    assert {"in-unet.safetensors", "mini-comfyui-float32.safetensors", shard} <= set(options["options"])


def test_scaled_fp8_is_read_in_any_form(server, models, base):
    file = "mini-comfyui-scaled-fp8.safetensors"
    stored, text = drawn(server, checkpoint(file))
    assert "loaded as scaled fp8" in text
    back, text = drawn(server, checkpoint(file, "float32"))
    assert "loaded as float32" in text
    assert apart(stored, back) <= LEVEL
    assert 0 < np.abs(stored - base).mean() < 3
    for weights in ("scaled fp8", "fp8 cast"):
        again, text = drawn(server, checkpoint(file, weights))
        assert "the file is in scaled fp8 already" in text
        assert apart(again, stored) == 0


def test_the_scaled_copy(server, models, base):
    """Made once, under progress; ComfyUI's own loader reads it; closer to the original than a plain cast."""
    copy = models / "mini-diffusers-bfloat16-scaled-fp8.safetensors"
    nodes = checkpoint("mini-diffusers-bfloat16.safetensors", "scaled fp8")
    result = server.run(graph(["model", 0], nodes))
    assert result.status == "success", result.error
    assert [one for one in result.of("progress") if one["node"] == "model" and one["value"] == one["max"] > 1]
    made = copy.stat().st_mtime_ns
    os.utime(models / "mini-diffusers-bfloat16.safetensors")  # looks changed: the node runs again
    scaled, text = drawn(server, nodes)
    assert f"read from its scaled-fp8 copy {copy.name}" in text
    assert copy.stat().st_mtime_ns == made
    core = {"model": {"class_type": "UNETLoader", "inputs": {"unet_name": copy.name, "weight_dtype": "default"}}}
    assert apart(drawn(server, core)[0], scaled) == 0
    cast, text = drawn(server, checkpoint("mini-diffusers-bfloat16.safetensors", "fp8 cast"))
    assert "cast to fp8 without scales" in text
    errors = [float(np.sqrt(((picture - base) ** 2).mean())) for picture in (scaled, cast)]
    print(f"rms difference of a pixel, of 255: scaled fp8 {errors[0]:.2f}, plain cast {errors[1]:.2f}")
    assert errors[0] < errors[1]


def test_a_file_written_anew_is_loaded_anew(server, models, base):
    path = models / "renewed.safetensors"
    path.write_bytes((models / "mini-diffusers-bfloat16.safetensors").read_bytes())
    assert apart(drawn(server, checkpoint(path.name))[0], base) <= LEVEL
    tensors = load_file(path)
    save_file({n: t * 0.9 if n == "proj_out.weight" else t for n, t in tensors.items()}, path)
    assert apart(drawn(server, checkpoint(path.name))[0], base) > 5


def test_an_interrupted_copy_leaves_nothing(server, models):
    shapes = original_shapes(width=1536, double=4, single=8, text=192, pooled=192, channels=64, guidance=True)
    header_only(models / "large.safetensors", shapes)
    try:
        seconds = server.seconds_to_stop(graph(["model", 0], checkpoint("large.safetensors", "scaled fp8")), "model")
        print(f"stopped after {seconds:.2f} s")
        assert seconds < 1
        assert not list(models.glob("*large*scaled*"))
    finally:
        (models / "large.safetensors").unlink()


def test_float32_is_not_cast_to_fp8(server, models):
    said = failure(server, checkpoint("mini-comfyui-float32.safetensors", "fp8 cast"))
    assert "ConfigError: weights='fp8 cast': " in said
    assert "mini-comfyui-float32.safetensors holds float32 weights" in said
    assert "choose weights='scaled fp8'" in said


def test_other_files_are_told_and_who_loads_them(server, models):
    save_file({"joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(4, 4)}, models / "sd3.safetensors")
    said = failure(server, checkpoint("sd3.safetensors"))
    assert "checkpoint=" in said and "it looks like Stable Diffusion 3" in said
    (models / "lora.safetensors").write_bytes((WEIGHTS / "lora.safetensors").read_bytes())
    assert "or load this with SRPO Load LoRA (models/loras)" in failure(server, checkpoint("lora.safetensors"))
    tensors = load_file(models / "mini-diffusers-bfloat16.safetensors")
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    save_file(tensors, models / "cut.safetensors")
    assert "1 missing (transformer_blocks.1.attn.to_q.weight)" in failure(server, checkpoint("cut.safetensors"))
    (models / "old.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "is a pickle" in failure(server, checkpoint("old.ckpt"))


@pytest.mark.parametrize(
    ("nodes", "widget", "folder"),
    [
        (checkpoint("SRPO/none.safetensors"), "checkpoint", "diffusion_models"),
        (lora("none.safetensors"), "lora", "loras"),
    ],
)
def test_a_missing_file_names_the_folders(server, nodes, widget, folder):
    status, answer = server.post(graph(["model", 0], nodes))
    assert status == 400
    (error,) = answer["node_errors"]["model"]["errors"]
    assert error["extra_info"]["input_name"] == widget
    assert "none.safetensors': there is no such file; looked in" in error["details"]
    assert str(server.base / "models" / folder) in error["details"]


def test_bad_widget_values(server, models):
    wrong = (
        (checkpoint("mini-comfyui-float32.safetensors", "fp4"), "weights: 'fp4' not in"),
        (lora(BUILT_IN, 11), "Value 11.0 bigger than max of 10.0"),
    )
    for nodes, said in wrong:
        status, answer = server.post(graph(["model", 0], nodes))
        assert status == 400
        (error,) = answer["node_errors"]["model"]["errors"]
        assert said in f"{error['message']} {error['details']}"


@pytest.fixture(scope="module")
def fp8_server(tmp_path_factory, models):
    """A server whose user asked for fp8 everywhere."""
    base = tmp_path_factory.mktemp("fp8")
    (base / "models").mkdir()
    (base / "models" / "diffusion_models").symlink_to(models, target_is_directory=True)
    one = Server(base, ("--fp8_e4m3fn-unet",))
    try:
        yield one.wait()
    finally:
        one.stop()


def test_comfyui_s_fp8_option(fp8_server, base):
    """Casts float32 files too, unless it is stopped; scaled fp8 and what is asked for explicitly are as ever."""
    file = "mini-comfyui-float32.safetensors"
    said = failure(fp8_server, checkpoint(file))
    assert "weights='as stored' with ComfyUI's --fp8_e4m3fn-unet" in said and "choose weights='scaled fp8'" in said
    exact, text = drawn(fp8_server, checkpoint(file, "float32"))
    assert "loaded as float32" in text
    assert apart(exact, base) <= LEVEL
    scaled, _ = drawn(fp8_server, checkpoint(file, "scaled fp8"))
    stored, _ = drawn(fp8_server, checkpoint("mini-comfyui-scaled-fp8.safetensors"))
    assert apart(scaled, stored) == 0
    cast, text = drawn(fp8_server, checkpoint("mini-diffusers-bfloat16.safetensors"))
    assert "cast to fp8 without scales" in text
    assert ((scaled - base) ** 2).mean() < ((cast - base) ** 2).mean()
