"""SRPO Train on FLUX's files: what auto finds, what is missing, the plan at full size, and toys that really train."""

import json

import pytest
from comfyui_flux import full_size_files, toy_files
from comfyui_miniature import ran
from comfyui_server import Server
from comfyui_shown import REWARD, node
from comfyui_side import needs_comfyui
from comfyui_training import end_trainings, lora_file, refusal, runs, train, tree

pytestmark = needs_comfyui
PROMPTS = {
    "source": "text", "text": "a red cat\na blue dog", "path": "", "preview_text": "a tree", "photo_share": 1.0,
    "bucket_step": 0, "prompt_column": "",
}  # fmt: skip


def new_server(folder):
    return Server(folder, environment={"HF_HUB_CACHE": str(folder / "hub")})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of its own: the shared one's folders hold other files."""
    one = new_server(tmp_path_factory.mktemp("flux"))
    try:
        yield one.wait()
    finally:
        one.stop()
        end_trainings(one.base)


@pytest.fixture(scope="module")
def toys(server):
    return toy_files(server.base)


def graph(name, settings=None, reward=True, **inputs):
    sockets = {"prompts": ["prompts", 0]} | ({"reward": ["reward", 0]} if reward else {})
    given = {"prompts": node("SRPOPrompts", **PROMPTS), "train": train(name, settings, **sockets, **inputs)}
    return given | ({"reward": REWARD} if reward else {})


def test_all_that_is_missing_is_told_at_once(server):
    """Where nothing is there: of a base by its name, before the graph begins; of the rest before anything is made."""
    said = refusal(server, graph("empty", base="flux1-dev.safetensors"))
    for word in ("base=", "clip_l=", "t5xxl=", "vae=", "models/diffusion_models", "models/text_encoders", "models/vae"):
        assert word in said, word
    assert "download flux clip-l t5 ae" in said
    own = server.base / "models" / "diffusion_models" / "mine.safetensors"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(b"")
    given = {"train": train("empty", base="mine.safetensors")}
    said = refusal(server, given)
    for word in ("clip_l=", "t5xxl=", "vae=", "reward: ", "prompts: ", "models/srpo_rewards"):
        assert word in said, word
    assert "download clip-l t5 ae hpsv2" in said
    own.unlink()
    assert tree(server.base / "output") == {}


def config_of(server, name):
    return json.loads((runs(server) / name / "run.json").read_text(encoding="utf-8"))


def test_a_toy_of_single_files_is_trained(server, toys):
    """auto takes a T5 by the beginning of its name; what has no usual name is chosen."""
    chosen = {"clip_l": "toy-clip.safetensors", "vae": "toy-vae.safetensors"}
    result = ran(server, graph("toy", toys, base="toy.safetensors", **chosen))
    model = config_of(server, "toy")["model"]
    models = server.base / "models"
    assert model["transformer"] == str(models / "diffusion_models" / "toy.safetensors") and model["path"] is None
    assert model["clip"] == str(models / "text_encoders" / "toy-clip.safetensors")
    assert model["t5"] == str(models / "text_encoders" / "t5xxl_toy.safetensors")
    assert model["autoencoder"] == str(models / "vae" / "toy-vae.safetensors")
    assert lora_file(server, "toy").is_file(), result.outputs


def test_a_checkpoint_brings_its_parts(server, toys):
    ran(server, graph("whole", toys, base="checkpoints/whole.safetensors"))
    model = config_of(server, "whole")["model"]
    assert model["path"].endswith("whole.safetensors") and (model["clip"], model["transformer"]) == (None, None)
    said = refusal(server, graph("half", toys, base="checkpoints/half.safetensors"))
    assert "clip_l=" in said and "vae=" not in said and "t5xxl=" not in said
    chosen = {"clip_l": "toy-clip.safetensors"}
    ran(server, graph("half", toys, base="checkpoints/half.safetensors", **chosen))
    model = config_of(server, "half")["model"]
    assert model["path"].endswith("half.safetensors") and model["autoencoder"] is None
    assert model["t5"].endswith("t5xxl_toy.safetensors")


def test_the_plan_of_full_size_files(server):
    """Usual names need no choice; nothing is read but headers, and nothing is left."""
    before = tree(server.base / "output")
    full_size_files(server.base)
    more = {"reward.path": str(server.base / "models" / "srpo_rewards" / "HPS_v2.1_compressed.safetensors")}
    given = graph("planned", more, reward=False, quick=False, base="flux1-dev.safetensors", mode="check only",
                  recipe="flux-dev-lora")  # fmt: skip
    (plan,) = ran(server, given).outputs["train"]["srpo_table"]
    text = json.dumps(plan["rows"])
    assert "130.7 million parameters beside 11.90 billion frozen ones" in text
    for word in ("flux1-dev.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors", "ae.safetensors", "hpsv2: "):
        assert word in text, word
    assert {"memory", "checkpoints", "time", "result", "folder", "command"} <= {name for name, _ in plan["rows"]}
    assert tree(server.base / "output") == before


def test_the_engine_s_complaints_name_the_widgets(server, toys):
    chosen = {"clip_l": "toy-clip.safetensors", "vae": "toy.safetensors"}
    (server.base / "models" / "vae" / "toy.safetensors").write_bytes(
        (server.base / "models" / "diffusion_models" / "toy.safetensors").read_bytes()
    )
    said = refusal(server, graph("swapped", toys, base="toy.safetensors", **chosen))
    assert "vae=" in said and "a FLUX transformer" in said and "model.autoencoder" not in said
