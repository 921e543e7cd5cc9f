"""Training from graphs of strangers: nothing is written elsewhere, no code is run, no secret is told."""

from pathlib import Path

import psutil
import pytest
from comfyui_miniature import ran
from comfyui_server import CHECKOUT, Server
from comfyui_shown import node
from comfyui_side import needs_comfyui
from comfyui_training import at_work, end_trainings, graph, refusal, runs, state, train, trainings, tree, until

pytestmark = needs_comfyui
TOKEN = "hf_secretOfTheProofXYZ"
PROMPTS = {
    "source": "text", "text": "a red ball in a meadow\na blue cube at night", "path": "", "preview_text": "two stars",
    "photo_share": 1.0, "bucket_step": 0, "prompt_column": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose environment holds a token, and doesn't say where ComfyUI is."""
    base = tmp_path_factory.mktemp("safety")
    one = Server(base, environment={"HF_HUB_CACHE": str(base / "hub"), "HF_TOKEN": TOKEN, "COMFYUI_PATH": ""})
    try:
        yield one.wait()
    finally:
        one.stop()
        end_trainings(base)


ELSEWHERE = [
    "", " ", ".", "..", "../evil", "a/b", "/abs", "a\\b", "C:evil", "a\0b", "a\nb", "a*b", "~", "-rf", "name.",
    "CON", "nul.txt", "com1", "x" * 300, "\u202egpj.exe",
]  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_that_lead_elsewhere_are_refused(server, name):
    before = tree(server.base.parent)
    assert f"name={name[:80]!r}" in refusal(server, graph(name))
    after = tree(server.base.parent)
    assert [path for path in after.keys() - before.keys() if "/temp/" not in path] == []


REFUSED = {
    "output.dir=/tmp/elsewhere": "output.dir", "output.result=/tmp/elsewhere.safetensors": "output.result",
    "data.embeddings=/tmp/elsewhere": "data.embeddings", "reward.name=os:system": "'os:system'",
    "reward.name=/tmp/evil.py:load": "'/tmp/evil.py:load'", "model.family=antigravity:load": "model.family",
    "reward.more=[{name: 'os:system'}]": "'os:system'", "parallel.nonsense=3": "nonsense", "optim.lr=fast": "optim.lr",
    "just words": "just words",
}  # fmt: skip


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_write_elsewhere_or_run_code_are_refused(server, setting):
    given = train("strange")["inputs"] | {"more_settings": setting}
    said = refusal(server, {"train": node("SRPOTrain", **given)})
    assert REFUSED[setting] in said, said
    assert not (runs(server) / "strange").exists()


def test_a_training_writes_where_it_may_and_no_secret(server):
    """The training has the token, for weights of rewards; no file below ComfyUI's folder does."""
    before, given = tree(server.base), graph("secretive", prompts=["prompts", 0], mode="background")
    ran(server, {"prompts": node("SRPOPrompts", **PROMPTS), **given})
    process = psutil.Process(at_work(runs(server) / "secretive")["pid"])
    assert process.environ()["HF_TOKEN"] == TOKEN
    until(lambda: not trainings(server.base), "its end")
    assert state(runs(server) / "secretive")["status"] == "finished"
    after = tree(server.base)
    changed = {path for path in after if after[path] != before.get(path) and path.split("/")[0] not in ("user", "temp")}
    own = {path for path in changed if path.startswith("output/srpo/secretive/")}
    assert changed - own == {"models/loras/secretive.safetensors", "server.log"}
    assert [path for path in after if TOKEN.encode() in (server.base / path).read_bytes()] == []


def test_a_run_finds_comfyui_whoever_starts_it(server):
    """Its folders and tokenizers: the node's process and one that the page resumes are told where it is."""
    folder = runs(server) / "found"
    ran(server, graph("found", steps=400, mode="background"))
    told = [psutil.Process(at_work(folder, step=1)["pid"]).environ()["COMFYUI_PATH"]]
    assert server.send("/srpo/runs/found/stop", {})[0] == 200
    until(lambda: not trainings(server.base), "its end")
    assert server.send("/srpo/runs/found/resume", {})[0] == 200
    told.append(psutil.Process(at_work(folder)["pid"]).environ()["COMFYUI_PATH"])
    end_trainings(server.base)
    assert [Path(one).resolve() for one in told] == [Path(CHECKOUT).resolve()] * 2
