"""The settings nodes of a training in a real server: the presets' values, which arrive as the engine takes them."""

import re

import pytest
import yaml
from comfyui_server import PACK
from comfyui_shown import node, texts
from comfyui_side import needs_comfyui
from PIL import Image
from safetensors.torch import save_file
from torch import zeros

from srpo_core.config import RunConfig
from srpo_core.description import make_config

pytestmark = needs_comfyui
NODES = {
    "SRPOPrompts": ["source", "text", "path", "preview_text", "photo_share", "bucket_step", "prompt_column"],
    "SRPOControlWords": ["liked", "disliked", "margin"],
    "SRPORollout": ["width", "height", "num_steps", "guidance", "shift", "batch_size", "same_noise"],
    "SRPOAlign": [
        "branches", "range_start", "range_end", "schedule_steps", "step_fraction", "draws_per_rollout", "guidance",
        "k_denoise_low", "k_denoise_high", "k_inversion_low", "k_inversion_high", "levels",
    ],
    "SRPOOptimizer": [
        "lr", "warmup_steps", "schedule", "accumulation", "max_grad_norm", "weight_decay", "ema_decay", "beta1",
        "beta2", "eps",
    ],
    "SRPOLoRA": ["rank", "alpha", "targets", "start"],
}  # fmt: skip
"""Widgets in the order of saved graphs, which is positional: this list only grows."""
PROMPTS = {
    "source": "text", "text": "", "path": "", "preview_text": "", "photo_share": 1.0, "bucket_step": 48,
    "prompt_column": "",
}  # fmt: skip
PROMPT_VALUES = {
    "data.photo_share": 1.0, "data.bucket_step": 48, "data.prompt_column": None, "data.prompts": "builtin",
    "data.photos": None, "data.eval_prompts": "builtin",
}  # fmt: skip


@pytest.fixture(scope="module")
def known(server):
    """{node: {widget: (type, options)}}"""
    info = {name: server.object_info()[name]["input"] for name in NODES}
    return {name: {**inputs.get("required", {}), **inputs.get("optional", {})} for name, inputs in info.items()}


@pytest.fixture(scope="module")
def default(known):
    """A node's widgets as the page first shows them."""
    return lambda name: {one: spec[1].get("default", spec[1].get("options", [None])[0]) for one, spec in
                         known[name].items()}  # fmt: skip


@pytest.fixture(scope="module")
def settings(server):
    """(values, texts) that a node gives, and what it shows."""

    def run(kind, **widgets):
        result = server.run({"one": node(kind, **widgets), "see": node("PreviewAny", source=["one", 0])})
        assert result.status == "success", result.error
        (text,) = texts(result, "see")
        return text, " ".join(result.outputs.get("one", {}).get("text", ()))

    return run


@pytest.fixture(scope="module")
def fails(server):
    """What is said of a node: when it is queued, or when it runs."""

    def run(kind, **widgets):
        graph = {"one": node(kind, **widgets), "see": node("PreviewAny", source=["one", 0])}
        status, answer = server.post(graph)
        if status == 400:
            return "\n".join(error["message"] + error["details"] for error in answer["node_errors"]["one"]["errors"])
        return server.run(graph).error

    return run


def told(values, texts=None):
    """How PreviewAny shows such settings."""
    return f"RunSettings(values={values!r}, texts={texts or {}!r})"


@pytest.mark.parametrize("name", NODES)
def test_widgets_stand_in_their_saved_order(known, name):
    assert list(known[name]) == NODES[name]


def test_defaults_are_those_of_the_preset(settings, default):
    """Read here from the preset's text, and from the fields where the preset says nothing."""
    preset = yaml.safe_load((PACK / "srpo_core" / "presets" / "flux-dev-lora.yaml").read_text())
    fields = RunConfig().model_dump()
    for name in NODES:
        if name == "SRPOPrompts":
            continue
        text, _ = settings(name, **default(name))
        names = re.findall(r"'(\w+\.\w+)':", text)
        assert names
        values = {}
        for one in names:
            section, field = one.split(".")
            value = preset.get(section, {}).get(field, fields[section][field])
            values[one] = tuple(value) if isinstance(fields[section][field], tuple) else value
        assert text == told(values)


@pytest.mark.parametrize("name", [name for name in NODES if name != "SRPOPrompts"])
def test_limits_are_those_of_the_fields(known, name):
    """A value at a widget's limit is one that the engine takes; the one beyond it is refused or has no meaning."""
    section = {"SRPOControlWords": "reward", "SRPORollout": "rollout", "SRPOAlign": "align", "SRPOOptimizer": "optim",
               "SRPOLoRA": "lora"}[name]  # fmt: skip
    fields = RunConfig.model_fields[section].annotation.model_fields
    for widget, (_, options) in known[name].items():
        if widget in fields and widget not in ("alpha", "range_start", "range_end", "schedule_steps"):
            for end in {"min", "max"} & set(options):
                make_config({section: {widget: options[end]}})


def test_values_arrive_as_the_engine_takes_them(settings, default, server):
    loras = server.base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    save_file({"x": zeros(1)}, loras / "settings.safetensors")
    given = default("SRPOAlign") | {"branches": "inversion", "k_denoise_high": 0.5, "levels": 200}
    text, _ = settings("SRPOAlign", **given)
    assert "'align.branches': ['inversion']" in text and "'align.k_denoise': (0.1, 0.5)" in text
    assert "'align.levels': 200" in text
    text, _ = settings("SRPOOptimizer", **default("SRPOOptimizer") | {"lr": 2e-7, "beta1": 0.8, "schedule": "cosine"})
    assert "'optim.lr': 2e-07" in text and "'optim.betas': (0.8, 0.999)" in text and "'cosine'" in text
    given = {"rank": 8, "alpha": 4.0, "targets": "mlp", "start": "settings.safetensors"}
    text, _ = settings("SRPOLoRA", **given)
    assert text == told({"lora.rank": 8, "lora.alpha": 4.0, "lora.targets": "mlp",
                         "lora.start": str(loras / "settings.safetensors")})  # fmt: skip
    text, _ = settings("SRPOLoRA", **given | {"alpha": 0.0, "start": "none"})
    assert "'lora.alpha': None" in text and "'lora.start': None" in text
    text, _ = settings("SRPOControlWords", liked="Real,\n Soft light ,", disliked="Oil\nFlat, ", margin=-0.5)
    assert text == told({"reward.liked": ["Real", "Soft light"], "reward.disliked": ["Oil", "Flat"],
                         "reward.margin": -0.5})  # fmt: skip


def test_prompts_of_each_source(settings, server):
    folder = server.base / "input" / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for i, side in enumerate((64, 96)):
        Image.new("RGB", (side, 64)).save(folder / "deeper" / f"{i}.png")
        (folder / "deeper" / f"{i}.txt").write_text("a red ball")
    (folder.parent / "some.csv").write_text("text,other\na blue box,x\na green cone,y\na green cone,z\n")
    text, shown = settings("SRPOPrompts", **PROMPTS | {"text": "one\n\n two\n", "preview_text": "three"})
    assert text == told(PROMPT_VALUES, {"data.prompts": "one\n\n two\n", "data.eval_prompts": "three"})
    assert shown == "2 prompts\npreviews: 1 prompt"
    text, shown = settings("SRPOPrompts", **PROMPTS | {"source": "built in", "text": "ignored"})
    assert (text, shown) == (told(PROMPT_VALUES), "the model's own prompts")
    for path in ("some.csv", str(folder.parent / "some.csv"), f'"{folder.parent / "some.csv"}"'):
        text, shown = settings("SRPOPrompts", **PROMPTS | {"source": "file", "path": path})
        assert text == told(PROMPT_VALUES | {"data.prompts": str(folder.parent / "some.csv")})
        assert shown == "3 prompts (2 different ones)"
    text, shown = settings("SRPOPrompts", **PROMPTS | {"source": "file", "path": "some.csv", "prompt_column": "other"})
    assert "'data.prompt_column': 'other'" in text and shown == "3 prompts"
    photos = PROMPTS | {"source": "photos", "path": "pictures", "text": "one"}
    text, shown = settings("SRPOPrompts", **photos)
    assert text == told(PROMPT_VALUES | {"data.photos": str(folder)})
    assert shown == "2 photos with captions, 64 x 64 to 96 x 64 pixels"
    text, shown = settings("SRPOPrompts", **photos | {"photo_share": 0.5})
    assert "{'data.prompts': 'one'}" in text and shown.endswith("between them: 1 prompt")


def test_files_that_changed_are_read_anew(server):
    path = server.base / "input" / "changing.txt"
    graph = {
        "one": node("SRPOPrompts", **PROMPTS | {"source": "file", "path": "changing.txt"}),
        "see": node("PreviewAny", source=["one", 0]),
    }
    for count in (1, 3):
        path.write_text("a prompt\n" * count + "another")
        result = server.run(graph)
        assert result.outputs["one"]["text"][0].startswith(f"{count + 1} prompts")
        assert "one" in server.run(graph).cached


WRONG = [
    ("SRPOPrompts", {}, "text is empty"),
    ("SRPOPrompts", {"source": "photos"}, "path is empty"),
    ("SRPOPrompts", {"source": "file", "path": "no.txt"}, "path='no.txt'"),
    ("SRPOPrompts", {"source": "photos", "path": "x" * 5000}, "there is no"),
    ("SRPOPrompts", {"source": "file", "path": "a\0b"}, "there is no"),
    ("SRPOPrompts", {"source": "web"}, "none of text, file, photos, built in"),
    ("SRPOPrompts", {"text": "one", "photo_share": 0.0}, "photo_share"),
    ("SRPOControlWords", {"liked": " ,\n"}, "liked=[]: at least 1 is needed"),
    ("SRPOControlWords", {"margin": "much"}, "margin"),
    ("SRPORollout", {"width": 0}, "width"),
    ("SRPORollout", {"batch_size": 5000}, "batch_size"),
    ("SRPOAlign", {"range_start": 30}, "range_start < range_end < schedule_steps must hold, got 30, 25, 50"),
    ("SRPOAlign", {"range_start": -1}, "range_start=-1"),
    ("SRPOAlign", {"branches": "inversion, denoise"}, "branches"),
    ("SRPOAlign", {"k_denoise_low": float("nan")}, "k_denoise_low"),
    ("SRPOOptimizer", {"lr": 0.0}, "lr"),
    ("SRPOOptimizer", {"beta2": 1.5}, "beta2"),
    ("SRPOOptimizer", {"schedule": "steps"}, "schedule"),
    ("SRPOLoRA", {"rank": 2000}, "rank"),
    ("SRPOLoRA", {"start": "../../x.safetensors"}, "start='../../x.safetensors'"),
    ("SRPOLoRA", {"targets": "most"}, "targets"),
]


@pytest.mark.parametrize(("kind", "change", "words"), WRONG)
def test_a_value_that_cannot_be_is_refused_by_the_widgets_name(fails, default, kind, change, words):
    assert words in fails(kind, **default(kind) | change)
