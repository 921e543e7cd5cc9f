"""ComfyUI's entry file where ComfyUI isn't, where it is too old, and where another copy of the engine is loaded."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOAD = """
import importlib.util, sys
sys.path.insert(0, sys.argv[2])
spec = importlib.util.spec_from_file_location("pack", sys.argv[1] + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
"""
"""What ComfyUI does with a folder of custom_nodes, in a Python whose path begins with another folder."""


def load(comfyui, code, pack=ROOT):
    """Run LOAD and then `code`, which executes the module, with the folder `comfyui` as ComfyUI's."""
    return subprocess.run(
        [sys.executable, "-c", LOAD + code, str(pack), str(comfyui)],
        cwd=comfyui, env={"PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def is_version(folder, version):
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    return folder


def entry():
    spec = importlib.util.spec_from_file_location("pack_entry", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_happens_without_comfyui(tmp_path):
    code = """
path = sys.path[:]
spec.loader.exec_module(module)
assert not hasattr(module, "comfy_entrypoint") and "srpo_core" not in sys.modules and sys.path == path
assert not set(sys.modules) & {"torch", "pydantic"}
"""
    done = load(tmp_path, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["0.8.2", "0.3.76", "v0.8.99"])
def test_an_old_comfyui_is_refused_in_words(tmp_path, version):
    done = load(is_version(tmp_path, version), "sys.modules['folder_paths'] = sys\nspec.loader.exec_module(module)")
    assert f"SRPO needs ComfyUI 0.9.0 or newer, this is {version}: update ComfyUI" in done.stderr


def test_a_comfyui_that_knows_neither_its_version_nor_v3_is_refused(tmp_path):
    done = load(tmp_path, "sys.modules['folder_paths'] = sys\nspec.loader.exec_module(module)")
    assert "SRPO needs ComfyUI 0.9.0 or newer, this is an older one" in done.stderr


@pytest.mark.parametrize("version", ["0.9.0", "0.9.0-dev3", "0.10.1", "0.33.0", "v0.9.1", "1.0"])
def test_versions_from_0_9_on_are_accepted(tmp_path, monkeypatch, version):
    monkeypatch.syspath_prepend(is_version(tmp_path, version))
    monkeypatch.delitem(sys.modules, "comfyui_version", raising=False)
    entry()._require_versions()
    monkeypatch.delitem(sys.modules, "comfyui_version")


def test_an_old_python_is_refused_in_words(monkeypatch):
    module = entry()
    monkeypatch.setattr(module.sys, "version_info", (3, 9, 18))
    with pytest.raises(ImportError, match=r"SRPO needs Python 3.10 or newer, ComfyUI runs on 3.9"):
        module._require_versions()


def copied(folder):
    """A second copy of the pack, as far as it is read before it is refused."""
    (folder / "srpo_core").mkdir(parents=True)
    for name in ("__init__.py", "srpo_core/__init__.py", "srpo_core/torchvision_guard.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_a_second_copy_is_refused_with_both_paths(tmp_path):
    pack = copied(tmp_path / "SRPO (copy)")
    is_version(tmp_path, "0.33.0")
    code = f"sys.modules['folder_paths'] = sys\nsys.path.append({str(ROOT)!r})\nimport srpo_core\n"
    done = load(tmp_path, code + "spec.loader.exec_module(module)", pack)
    assert f"two copies of SRPO: {ROOT / 'srpo_core'} is loaded already, {pack / 'srpo_core'} is not" in done.stderr


def test_the_engine_beside_the_entry_wins_over_an_installed_one(tmp_path):
    pack = copied(tmp_path / "pack")
    code = f"sys.path.append({str(ROOT)!r})\nspec.loader.exec_module(module)\nmodule._register_engine()\n"
    code += "import srpo_core.torchvision_guard as part\nprint(part.__file__)"
    done = load(tmp_path, code, pack)
    assert Path(done.stdout.strip()) == pack / "srpo_core" / "torchvision_guard.py", done.stderr


def test_a_link_to_the_engine_that_is_loaded_is_no_second_copy(tmp_path):
    (tmp_path / "link").symlink_to(ROOT, target_is_directory=True)
    code = f"sys.path.append({str(ROOT)!r})\nimport srpo_core\nspec.loader.exec_module(module)\n"
    done = load(tmp_path, code + "module._register_engine()", tmp_path / "link")
    assert done.returncode == 0, done.stderr


def test_an_engine_that_fails_leaves_nothing_behind(tmp_path):
    pack = copied(tmp_path / "pack")
    (pack / "srpo_core" / "__init__.py").write_text("raise OSError('disk')", encoding="utf-8")
    code = """
spec.loader.exec_module(module)
try:
    module._register_engine()
except OSError:
    assert "srpo_core" not in sys.modules
    print("told")
"""
    assert load(tmp_path, code, pack).stdout.strip() == "told"
