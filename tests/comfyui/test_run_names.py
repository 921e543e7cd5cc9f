"""Names of runs, by the nodes' own code in a process with ComfyUI's folders."""

import json
import os
import subprocess
import sys

import pytest
from comfyui_server import PACK
from comfyui_side import CHECKOUT, needs_comfyui

pytestmark = needs_comfyui
PROGRAM = """
import importlib, json, sys, types
checkout, pack, base = sys.argv[1:4]
sys.path.insert(0, checkout)
sys.argv = [sys.argv[0], "--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths
sys.path.insert(0, pack)
package = types.ModuleType("srpo_nodes")
package.__path__ = [pack + "/nodes"]
sys.modules["srpo_nodes"] = package
names = importlib.import_module("srpo_nodes.run_names")
for line in sys.stdin:
    name, if_there = json.loads(line)
    try:
        place = names.run_place(name, if_there)
        told = [place.name, str(place.folder), str(place.result()), str(place.result(full=True))]
    except ValueError as error:
        told = str(error)
    print("::" + json.dumps(told), flush=True)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("names")


@pytest.fixture(scope="module")
def place(base):
    """A function from a name to its place, or to what is wrong with it."""
    command = [sys.executable, "-c", PROGRAM, CHECKOUT, str(PACK), str(base)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:

        def ask(name, if_there="go on"):
            process.stdin.write(json.dumps([name, if_there]) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("::"):
                    return json.loads(line[2:])
            pytest.fail("it has ended")

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("name", ["my-look", "look 2", "Ünï cödé", "写真", "v1.5", "a", "x" * 120, "com10", "nullable"])
def test_a_good_name_is_one_folder_and_one_file(place, base, name):
    found = place(f"  {name} ")
    assert found == [
        name, str(base / "output" / "srpo" / name), str(base / "models" / "loras" / f"{name}.safetensors"),
        str(base / "models" / "diffusion_models" / f"{name}.safetensors"),
    ]  # fmt: skip
    assert not (base / "output" / "srpo").exists()


@pytest.mark.parametrize(
    "name",
    [
        "", " ", ".", "..", "../evil", "a/b", "/abs", "a\\b", "C:evil", "a\0b", "a\nb", "a*b", "~", "-rf", "name.",
        "CON", "nul.txt", "com1", "LPT9.x.y", "aux ", "x" * 121, "写" * 41, "\u202egpj.exe", "a%2fb", "$HOME",
        ".hidden",
    ],
)  # fmt: skip
def test_others_are_refused_in_words(place, name):
    said = place(name)
    assert isinstance(said, str) and said.startswith("name="), said


def test_a_new_run_takes_the_first_free_name(place, base, tmp_path):
    assert place("free", "new run")[0] == "free"
    (base / "output" / "srpo" / "free").mkdir(parents=True)
    assert place("free", "new run")[0] == "free-2"
    assert place("free")[0] == "free"
    (base / "models" / "loras").mkdir(parents=True, exist_ok=True)
    (base / "models" / "loras" / "free-2.safetensors").touch()
    assert place("free", "new run")[0] == "free-3"
    os.rmdir(base / "output" / "srpo" / "free")
    os.rmdir(base / "output" / "srpo")
    os.rmdir(base / "output")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_is_not_followed(place, base, tmp_path):
    (base / "output" / "srpo").mkdir(parents=True)
    (base / "output" / "srpo" / "link").symlink_to(tmp_path, target_is_directory=True)
    assert "is a link" in place("link")
