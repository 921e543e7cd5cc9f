"""What other programs read of this project: pip, the Comfy registry, GitHub, and the script that installs ComfyUI."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from srpo_core.doctor import parse_pyproject

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
INSTALL = ROOT / "scripts" / "install_comfyui.sh"


def field(section, name):
    """A text of a section of pyproject.toml (Python 3.10 reads no TOML)."""
    body = re.search(rf"^\[{re.escape(section)}\]\n(.*?)(?=^\[|\Z)", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    return re.search(rf'^{name} = "([^"]*)"$', body, re.MULTILINE)[1]


def test_the_manager_installs_all_but_torch():
    """torch stays what fits the machine; everything else is named with the same bounds as in pyproject.toml."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    needed = [text for text, required in parse_pyproject(PYPROJECT) if required]
    assert listed == [text for text in needed if text.split(">=")[0] != "torch"]
    assert len(listed) == len(needed) - 1


def test_the_registrys_rules():
    """As its page "Specifications" states them."""
    name = field("project", "name")
    assert re.fullmatch(r"[A-Za-z](?:[._-]?[A-Za-z0-9])*", name) and len(name) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", field("project", "version"))
    assert field("tool.comfy", "PublisherId") and field("tool.comfy", "DisplayName")
    assert field("project.urls", "Repository").startswith("https://")
    assert (ROOT / "LICENSE").is_file() and 'license = { text = "Apache-2.0" }' in PYPROJECT


def test_the_oldest_comfyui_is_said_once():
    spec = importlib.util.spec_from_file_location("pack_entry", ROOT / "__init__.py")
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    assert field("tool.comfy", "requires-comfyui") == f">={entry.COMFYUI_MINIMUM}"
    assert f'requires-python = ">={".".join(map(str, entry.PYTHON_MINIMUM))}"' in PYPROJECT
    tested = yaml.safe_load((ROOT / ".github/workflows/comfyui.yml").read_text(encoding="utf-8"))
    jobs = tested["jobs"]["comfyui"]["strategy"]["matrix"]["include"]
    oldest = next(job for job in jobs if job["comfyui"] == f"v{entry.COMFYUI_MINIMUM}")
    assert oldest["python"] == ".".join(map(str, entry.PYTHON_MINIMUM))


def test_the_registrys_archive_has_what_the_nodes_need():
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    needed = ("__init__.py", "requirements.txt", "pyproject.toml", "LICENSE", "nodes", "srpo_core", "workflows")
    assert all((ROOT / line).is_dir() for line in left_out)
    assert not {line.strip("/") for line in left_out} & set(needed)


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflows_run_what_is_there(path):
    """Every job has a machine and steps, and every script and file of this project that a step names exists."""
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert (
        workflow["name"] and workflow[True] and workflow["permissions"] == {"contents": "read"}
    )  # YAML reads on as true
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    for name in re.findall(r"(?:bash|-r|-c|pytest) ((?:scripts|tests|requirements)[\w./-]*)", text):
        assert (ROOT / name).exists(), name


def install(*arguments):
    return subprocess.run(["bash", str(INSTALL), *map(str, arguments)], capture_output=True, text=True, check=False)


def a_comfyui(folder):
    folder.mkdir()
    (folder / "main.py").write_text("", encoding="utf-8")
    return folder


def test_the_installer_asks_for_a_folder():
    done = install()
    assert done.returncode == 1 and "which folder?" in done.stderr
    assert "which folder?" in install("--cpu").stderr


@pytest.mark.parametrize("name", ["ComfyUI-SRPO", "comfyui-srpo-main"])
def test_the_installer_replaces_nothing(tmp_path, name):
    comfyui = a_comfyui(tmp_path / "ComfyUI")
    other = comfyui / "custom_nodes" / name
    other.mkdir(parents=True)
    (other / "pyproject.toml").write_text('[project]\nname = "comfyui-srpo"\n', encoding="utf-8")
    done = install(comfyui)
    assert done.returncode == 1 and f"{other} is another copy of this pack" in done.stderr
    (other / "pyproject.toml").unlink()
    if name == "ComfyUI-SRPO":
        assert f"{other} is there already and is not this folder" in install(comfyui).stderr
    assert not other.is_symlink()


def test_the_installer_links_this_folder_and_asks_for_comfyuis_python(tmp_path):
    comfyui = a_comfyui(tmp_path / "Comfy UI")
    for _ in range(2):
        done = install(comfyui)
        assert "COMFYUI_PYTHON" in done.stderr
        assert [path.resolve() for path in (comfyui / "custom_nodes").iterdir()] == [ROOT]
