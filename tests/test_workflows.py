"""The graphs of workflows/ as files: whole, tidy, and what their descriptions give."""

import json
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from srpo_core.catalogue import CATALOGUE
from srpo_core.description import load_run
from srpo_core.miniature.captions import parse, split_look
from srpo_core.models.flux_prompts import EVAL_PROMPTS

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import build_workflows
from graphs import schemas
from graphs.layout import NEVER, NOTE, TITLE
from graphs.notes import FOLDER as NOTES
from graphs.notes import words_of
from graphs.prompt import prompt_of
from graphs.training import PROMPTS

ROOT = Path(__file__).parents[1]
KNOWN = schemas.load()
FILES = sorted((ROOT / "workflows").glob("*.json"))
NAMES = {name + twin for name in build_workflows.GRAPHS for twin in ("", "-miniature")} | set(build_workflows.TRAINING)
TRAINING = [file for file in FILES if file.stem in build_workflows.TRAINING]
MINIATURE = "miniature (built in)"
MOST_WIDTH = 512
"""Pixels of a picture in the template browser."""

each_graph = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def nodes_of(workflow, kind):
    return [node for node in workflow["nodes"] if node["type"] == kind]


def values_of(node):
    return KNOWN[node["type"]].by_name(node["widgets_values"])


def test_every_graph_that_draws_has_its_twin_and_nothing_else_lies_there():
    assert {file.stem for file in FILES} == NAMES
    assert {file.stem for file in (ROOT / "workflows").iterdir()} == NAMES


@each_graph
def test_a_graph_is_what_its_description_gives(file):
    found = build_workflows.build(KNOWN)[file.stem]
    assert file.read_text(encoding="utf-8") == build_workflows.text_of(found), "run scripts/build_workflows.py"


@each_graph
def test_links_agree_with_both_their_ends(file):
    workflow = read(file)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    assert (max(nodes), max(links)) == (workflow["last_node_id"], workflow["last_link_id"])
    for id, source, output, target, position, kind in links.values():
        start, end = nodes[source]["outputs"][output], nodes[target]["inputs"][position]
        assert id in start["links"] and end["link"] == id
        assert start["type"] == end["type"] == kind
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    starts = [id for node in nodes.values() for slot in node["outputs"] for id in slot["links"] or ()]
    assert sorted(ends) == sorted(starts) == sorted(links)


@each_graph
def test_nodes_are_known_and_whole(file):
    """Every required socket has a wire, every widget a value that it takes."""
    for node in read(file)["nodes"]:
        if node["type"] == NOTE:
            continue
        schema, values = KNOWN[node["type"]], values_of(node)
        wired = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        assert {slot["name"] for slot in node["inputs"]} == {entry.name for entry in schema.inputs}
        assert {entry.name for entry in schema.sockets if not entry.optional} <= wired
        for entry in schema.widgets:
            value = values[entry.name]
            kinds = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool}.get(entry.type, str)
            assert isinstance(value, kinds), (node["type"], entry.name, value)
            assert entry.options is None or value in entry.options, (node["type"], entry.name, value)
            assert entry.minimum is None or entry.minimum <= value
            assert entry.maximum is None or value <= entry.maximum


@each_graph
def test_nodes_stand_apart_and_inside_one_frame(file):
    workflow = read(file)
    boxes = {}
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y - TITLE, x + width, y + height)
    for one, other in combinations(boxes.values(), 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    frames = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    for one, other in combinations(frames, 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    for left, top, right, bottom in boxes.values():
        inside = [f for f in frames if f[0] < left and f[1] < top and right < f[2] and bottom < f[3]]
        assert len(inside) == 1


@each_graph
def test_wires_run_from_left_to_right_within_a_row(file):
    """A frame's nodes take their wires from frames left of it or above it."""
    workflow = read(file)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, _, target, *_ in workflow["links"]:
        start, end = nodes[source], nodes[target]
        is_above = start["pos"][1] < end["pos"][1]
        assert start["pos"][0] < end["pos"][0] or is_above


@each_graph
def test_a_note_stands_first_and_says_what_to_do(file):
    workflow = read(file)
    (note,) = nodes_of(workflow, NOTE)
    assert note is workflow["nodes"][0]
    (text,) = note["widgets_values"]
    assert "$" not in text and text.startswith("## ")


@each_graph
def test_it_has_a_picture_that_fits_the_template_browser(file):
    with Image.open(file.with_suffix(".jpg")) as picture:
        assert picture.width <= MOST_WIDTH and picture.height <= MOST_WIDTH
        assert picture.format == "JPEG"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_tables_of_files_in_notes_are_whole(name):
    """Markdown's tables end at an empty line: none stands between their rows."""
    lines = words_of(name).splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("|")]
    assert rows == list(range(rows[0], rows[-1] + 1)) if rows else True
    assert all(lines[i].count("|") == 3 for i in rows)


def test_no_piece_of_a_note_is_left_over():
    used = "".join(path.read_text(encoding="utf-8") for path in NOTES.glob("*.md"))
    assert {path.stem[1:] for path in NOTES.glob("_*.md")} == set(re.findall(r"\$(\w+)", used)) - {"name"}


@pytest.mark.parametrize("file", [f for f in FILES if "miniature" in f.stem], ids=lambda file: file.stem)
def test_a_twin_speaks_the_miniatures_language_and_needs_no_file(file):
    workflow = read(file)
    texts = [node["widgets_values"][0] for node in nodes_of(workflow, "PrimitiveStringMultiline")]
    for node in nodes_of(workflow, "CLIPTextEncode"):
        texts += [node["widgets_values"][0]] if node["inputs"][1]["link"] is None else []
    for node in nodes_of(workflow, "SRPOPrompts"):
        assert values_of(node)["source"] == "built in"
    assert all(values_of(node)["base"] == MINIATURE for node in nodes_of(workflow, "SRPOTrain"))
    assert texts
    for text in texts:
        assert parse(split_look(text)[1]).caption() == split_look(text)[1]
    types = {node["type"] for node in workflow["nodes"]}
    assert "SRPOMiniature" in types
    assert not types & {"UNETLoader", "DualCLIPLoader", "VAELoader", "SRPOLoadCheckpoint", "LoadImage"}
    assert all(values_of(node)["reward"] == "miniature" for node in nodes_of(workflow, "SRPOLoadReward"))
    assert all(node["mode"] != NEVER for node in workflow["nodes"])


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_a_training_is_whole_and_its_finer_settings_are_off(file):
    """What is switched off keeps the recipe; what a run needs is on, and each run has a name of its own."""
    workflow = read(file)
    (train,) = prompts_of(workflow, "SRPOTrain")
    assert {"reward", "prompts", "words"} <= {name for name, value in train.items() if isinstance(value, list)}
    assert train["mode"] == "wait" and train["if_there"] == "go on"
    found = [values_of(node)["name"] for other in TRAINING for node in nodes_of(read(other), "SRPOTrain")]
    assert found.count(train["name"]) == 1
    off = {node["type"] for node in workflow["nodes"] if node["mode"] == NEVER}
    wired = {slot["name"] for node in nodes_of(workflow, "SRPOTrain") for slot in node["inputs"] if slot["link"]}
    if file.stem == "train_miniature":
        assert not off
    else:
        assert {"SRPORollout", "SRPOAlign", "SRPOOptimizer"} <= off
        assert {"rollout", "align", "optimizer"} <= wired


def prompts_of(workflow, kind):
    """The inputs of a kind's nodes that run."""
    return [node["inputs"] for node in prompt_of(workflow, KNOWN).values() if node["class_type"] == kind]


def source_of(workflow, node, socket):
    """The id of the node that a socket's wire comes from; None without one."""
    (wire,) = (slot["link"] for slot in node["inputs"] if slot["name"] == socket)
    return next((link[1] for link in workflow["links"] if link[0] == wire), None)


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_what_a_training_gives_is_used_in_the_same_queue(file):
    """A LoRA goes through ComfyUI's own loader into the comparison with the base; all weights become a file.

    The comparison goes by the training's own reward and words.
    """
    workflow = read(file)
    prompt = prompt_of(workflow, KNOWN)
    (compare,) = nodes_of(workflow, "SRPOCompare")
    (trainer,) = nodes_of(workflow, "SRPOTrain")
    for judge in ("reward", "words"):
        assert source_of(workflow, compare, judge) == source_of(workflow, trainer, judge) is not None
    if file.stem == "train_full":
        (train,) = prompts_of(workflow, "SRPOTrain")
        assert load_run(train["recipe"]).lora.rank == 0
        assert compare["mode"] == NEVER
        files = [values_of(node)["checkpoint"] for node in nodes_of(workflow, "SRPOLoadCheckpoint")]
        assert f"{train['name']}.safetensors" in files
        return
    inputs = prompt[str(compare["id"])]["inputs"]
    loader = prompt[inputs["model_b"][0]]
    assert loader["class_type"] == "LoraModelLoader" and loader["inputs"]["model"] == inputs["model_a"]
    trained, output = loader["inputs"]["lora"]
    assert prompt[trained]["class_type"] == "SRPOTrain"
    assert KNOWN["SRPOTrain"].outputs[output].type == "LORA_MODEL"


def test_prompts_to_train_on_are_different_and_none_is_held_out():
    lines = PROMPTS.splitlines()
    assert len(set(lines)) == len(lines) >= 40
    assert not set(lines) & set(EVAL_PROMPTS)


@pytest.mark.parametrize("name", build_workflows.GRAPHS)
def test_a_graph_and_its_twin_do_the_same(name):
    """From the pictures' prompt on, both have the same nodes of this pack."""
    loaders = {"SRPOMiniature", "SRPOLoadCheckpoint", "SRPOLoadLoRA", "SRPOSampler"}
    found = []
    for file in (f"{name}.json", f"{name}-miniature.json"):
        types = [node["type"] for node in read(ROOT / "workflows" / file)["nodes"]]
        found.append(sorted(one for one in types if one.startswith("SRPO") and one not in loaders))
    assert found[0] == found[1]


def test_the_published_settings_of_flux():
    workflow = read(ROOT / "workflows" / "SRPO-workflow.json")
    prompt = prompt_of(workflow, KNOWN)
    found = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert found["UNETLoader"] == {"unet_name": "SRPO/diffusion_pytorch_model.safetensors", "weight_dtype": "default"}
    assert found["DualCLIPLoader"] == {
        "clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux", "device": "default",
    }  # fmt: skip
    assert found["VAELoader"] == {"vae_name": "ae.safetensors"}
    assert found["EmptySD3LatentImage"] == {"width": 1280, "height": 720, "batch_size": 1}
    assert found["KSamplerSelect"] == {"sampler_name": "euler"}
    assert found["SRPOSigmas"] == {"shift": 3.0, "steps": 50}
    assert found["FluxGuidance"]["guidance"] == 3.5
    assert "SRPOSampler" not in found, "the other way is switched off"
    (other,) = nodes_of(workflow, "SRPOSampler")
    values = values_of(other)
    assert (values["seed"], values["steps"], values["guidance"], values["shift"]) == (42, 50, 3.5, 3.0)


def test_files_that_graphs_ask_for_are_those_that_downloads_bring():
    """What `srpo download NAME --to comfyui` puts into ComfyUI's folders is found by the graphs under their names."""
    places = {
        file.place: (file.repository, file.path)
        for entry in CATALOGUE.values() for file in entry.files if file.place is not None
    }  # fmt: skip
    asked = 0
    for file in FILES:
        for node in read(file)["nodes"]:
            for model in node["properties"].get("models", ()):
                repository, path = places[f"{model['directory']}/{model['name']}"]
                assert model["url"] == f"https://huggingface.co/{repository}/resolve/main/{path}"
                assert model["name"] in node["widgets_values"]
                asked += 1
    assert asked == 40


@each_graph
def test_a_prompt_leaves_out_what_does_not_run(file):
    workflow = read(file)
    prompt = prompt_of(workflow, KNOWN)
    runs = {str(node["id"]) for node in workflow["nodes"] if node["mode"] != NEVER and node["type"] != NOTE}
    assert set(prompt) == runs
    links = [value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert {source for source, _ in links} <= runs


@pytest.fixture
def schema():
    info = {
        "input": {
            "required": {
                "seed": ["INT", {"default": 7, "min": 0, "max": 9, "control_after_generate": True}],
                "model": ["MODEL"],
                "way": [["fast", "slow"]],
                "image": [["a.png"], {"image_upload": True}],
                "scores": ["FLOAT", {"forceInput": True}],
            },
            "optional": {"name": ["STRING", {"default": "x"}], "reward": ["SRPO_REWARD", {}]},
        },
        "output": ["IMAGE"], "output_name": ["best"], "output_is_list": [True], "output_node": True,
        "display_name": "Try",
    }  # fmt: skip
    return schemas.parse("Try", info)


def test_widgets_and_their_values_by_position(schema):
    """The seed's control and the picture's upload stand behind them, as the page saves them."""
    assert [entry.name for entry in schema.sockets] == ["model", "scores", "reward"]
    assert schema.values({"way": "slow", "image": "b.png"}) == [7, "fixed", "slow", "b.png", "image", "x"]
    assert schema.by_name([1, "randomize", "fast", "c.png", "image", "y"]) == {
        "seed": 1, "way": "fast", "image": "c.png", "name": "y",
    }  # fmt: skip
    with pytest.raises(ValueError, match="Try has 6 widget values, saved are 5"):
        schema.by_name([1, "fixed", "fast", "c.png", "image"])


def test_a_snapshot_reads_as_it_was_written(schema, tmp_path):
    schemas.save({"Try": schema}, tmp_path / "try.json")
    assert schemas.load(tmp_path / "try.json") == {"Try": schema}
    schemas.save(KNOWN, tmp_path / "schemas.json")
    assert (tmp_path / "schemas.json").read_text() == schemas.SNAPSHOT.read_text()


def test_an_unknown_input_is_told():
    graph = build_workflows.Graph("x", KNOWN)
    graph.group("one")
    with pytest.raises(KeyError, match="SRPOSigmas has no input step; it has shift, steps"):
        graph.add("SRPOSigmas", {"step": 3})
