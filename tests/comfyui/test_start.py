"""ComfyUI's start with the pack: what its log says, what works without some packages, what is left on the disk."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_server import NAME, PACK, Server
from comfyui_side import CHECKOUT, needs_comfyui

pytestmark = needs_comfyui
NODES = {
    "SRPOLoadCheckpoint", "SRPOLoadLoRA", "SRPOMiniature", "SRPOSigmas", "SRPOSampler", "SRPOLoadReward",
    "SRPOMixRewards", "SRPOScoreImages", "SRPORelativeScore", "SRPOBestOfN", "SRPOAlignPreview", "SRPOCompare",
    "SRPOPrompts", "SRPOControlWords", "SRPORollout", "SRPOAlign", "SRPOOptimizer", "SRPOLoRA", "SRPOTrain",
    "SRPOTrainingStatus",
}  # fmt: skip
HIDDEN = ("diffusers", "peft", "accelerate", "open_clip_torch", "matplotlib", "tensorboard", "rich")
HIDE = f"""
import importlib.machinery, importlib.metadata, sys
distributions = set({HIDDEN!r})
modules = distributions | {{"open_clip"}}
class PathFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in modules else super().find_spec(name, path, target)
sys.meta_path = [PathFinder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
version = importlib.metadata.version
def hiding(name):
    if name in distributions:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hiding
"""
"""A sitecustomize.py with which packages are as if they had never been installed."""
SCORED = {
    "model": {"class_type": "SRPOMiniature", "inputs": {}},
    "reward": {
        "class_type": "SRPOLoadReward",
        "inputs": {
            "reward": "miniature", "file": "auto", "fit": "official", "device": "auto", "offload": "when needed",
        },
    },
    "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "a red star at night"}},
    "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 2}},
    "draw": {
        "class_type": "SRPOSampler",
        "inputs": {
            "model": ["model", 0], "positive": ["text", 0], "latent": ["latent", 0], "seed": 1, "steps": 2,
            "guidance": 3.5, "shift": 3.0, "noise": "ComfyUI", "at_once": 4,
        },
    },
    "images": {"class_type": "VAEDecode", "inputs": {"samples": ["draw", 0], "vae": ["model", 2]}},
    "score": {
        "class_type": "SRPOScoreImages",
        "inputs": {
            "reward": ["reward", 0], "images": ["images", 0], "prompt": "a red star at night",
            "one_prompt_per_line": False,
        },
    },
}  # fmt: skip
"""A graph that loads a model and a reward, draws, decodes and scores."""


@pytest.fixture
def start(tmp_path):
    """A function that starts a server in tmp_path / "comfyui" with variables of the environment; stopped at the end."""
    servers = []

    def begin(**environment):
        servers.append(Server(tmp_path / "comfyui", environment=environment))
        return servers[-1].wait()

    yield begin
    for one in servers:
        one.stop()


def start_log(server):
    """What ComfyUI says until it answers, without the time that each import took."""
    log = server.log().partition("To see the GUI go to")[0]
    return [line for line in log.splitlines() if not re.search(r"\d seconds: ", line)]


def told(server):
    """The lines of it that speak of the pack."""
    return [line for line in start_log(server) if "srpo" in line.lower()]


def files(folder):
    return {
        path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts
    }


def test_every_node_is_there_and_the_log_has_nothing_to_say(server):
    assert {name for name in server.object_info() if name.startswith("SRPO")} == NODES
    assert told(server) == []
    assert not [line for line in start_log(server) if "IMPORT FAILED" in line or "pyproject" in line]


def test_every_node_and_socket_is_explained(server):
    """Descriptions and tooltips; search aliases where this ComfyUI knows them."""
    info = server.object_info()
    knows_aliases = any("search_aliases" in node for node in info.values())
    for name in NODES:
        node = info[name]
        assert (
            node["description"]
            and node["display_name"].startswith("SRPO ")
            and node["category"].split("/")[0] == "SRPO"
        )
        assert not knows_aliases or node["search_aliases"]
        sockets = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        for socket, (_, *options) in sockets.items():
            assert options and options[0].get("tooltip"), f"{name}.{socket} has no tooltip"
        assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"]), name


@pytest.mark.parametrize("kind", ["srpo_rewards", "text_encoders", "loras"])
def test_a_folder_that_is_removed_while_it_runs_stops_nothing(server, kind):
    """ComfyUI's lists of files fail then, and with them whatever asks for the choices of a widget."""
    folder = server.base / "models" / kind / "gone"
    folder.mkdir(parents=True)
    server.object_info()
    shutil.rmtree(folder)
    assert "SRPOLoadReward" in server.object_info() and "SRPOLoadLoRA" in server.object_info()
    result = server.run(SCORED)
    assert result.status == "success", result.error


def test_a_run_writes_into_comfyuis_folders_only(start, tmp_path, monkeypatch):
    """Neither into the user's home, nor into the temporary folder, nor into the pack."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir(), temporary.mkdir()
    before = files(PACK / "nodes") | files(PACK / "srpo_core")
    for name in [name for name in os.environ if name.startswith(("XDG_", "HF_", "TORCH_HOME", "MPLCONFIGDIR"))]:
        monkeypatch.delenv(name)
    server = start(HOME=str(home), USERPROFILE=str(home), TMPDIR=str(temporary))
    result = server.run(SCORED)
    assert result.status == "success", result.error
    assert files(home) == set()
    assert {path.name for path in files(temporary)} <= {"_remote_module_non_scriptable.py"}  # torch 2.7 itself
    assert files(PACK / "nodes") | files(PACK / "srpo_core") == before
    written = {path.parts[0] for path in files(server.base)}
    assert written <= {"server.log", "temp", "user", "models"}, files(server.base)
    assert not any(path.parts[0] == "models" for path in files(server.base))


def test_it_starts_without_some_packages_and_says_how_to_get_them(start, tmp_path):
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    server = start(PYTHONPATH=str(hide))
    assert set(server.object_info()) >= NODES
    warning, *more = told(server)
    assert not more
    assert all(f"{name}: it is not installed" in warning for name in HIDDEN)
    assert f'-m pip install -r "{server.base / "custom_nodes" / NAME / "requirements.txt"}"' in warning
    drawn = {name: SCORED[name] for name in ("model", "text", "latent", "draw", "images")}
    result = server.run(drawn | {"show": {"class_type": "PreviewImage", "inputs": {"images": ["images", 0]}}})
    assert result.status == "success", result.error


def test_a_node_that_needs_a_missing_package_says_how_to_get_it(tmp_path):
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(Path(CHECKOUT).resolve())!r})
spec = importlib.util.spec_from_file_location("pack", {str(PACK / "__init__.py")!r})
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from comfy_api.latest import io
from pack.nodes import packages
from srpo_core.config import ConfigError

class Node(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("Node", inputs=[io.Int.Input("number")], outputs=[])

    @classmethod
    def execute(cls, number):
        import no_such_package.part

try:
    packages.with_advice(Node).execute(number=3)
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f'"{sys.executable}" -m pip install -r "{PACK / "requirements.txt"}"' in done.stdout, done.stderr
    assert "no_such_package is not installed" in done.stdout


def test_a_second_copy_is_refused_and_the_first_works(start, tmp_path):
    """Whichever of the two ComfyUI comes across first."""
    copy = tmp_path / "comfyui" / "custom_nodes" / "SRPO-copy"
    (copy / "srpo_core").mkdir(parents=True)
    for path in (PACK / "__init__.py", PACK / "nodes", *(PACK / "srpo_core").iterdir()):
        (copy / path.relative_to(PACK)).symlink_to(path)
    server = start()
    assert set(server.object_info()) >= NODES
    log = server.log()
    assert log.count("two copies of SRPO") >= 1
    assert str(server.base / "custom_nodes" / NAME / "srpo_core") in log and str(copy / "srpo_core") in log
