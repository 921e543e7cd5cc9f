"""ComfyUI's entry: SRPO's nodes, made on top of the engine in the folder srpo_core beside this file.

Nothing happens where ComfyUI isn't: pytest imports this file too.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

COMFYUI_MINIMUM = "0.9.0"
"""Also requires-comfyui in pyproject.toml."""
PYTHON_MINIMUM = (3, 10)
WEB_DIRECTORY = "./nodes/web"


def _in_comfyui() -> bool:
    """Whether ComfyUI loads this file; folder_paths alone marks versions too old to have comfy_api."""
    return "folder_paths" in sys.modules or importlib.util.find_spec("comfy_api") is not None


def _require_versions() -> None:
    """ImportError if Python or ComfyUI is too old. A ComfyUI that tells no version is believed if it has comfy_api."""
    if sys.version_info < PYTHON_MINIMUM:
        wanted, found = (".".join(str(part) for part in version[:2]) for version in (PYTHON_MINIMUM, sys.version_info))
        raise ImportError(f"SRPO needs Python {wanted} or newer, ComfyUI runs on {found} ({sys.executable})")
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        if importlib.util.find_spec("comfy_api") is not None:
            return
        version = "an older one"
    if _numbers(version) < _numbers(COMFYUI_MINIMUM):
        raise ImportError(
            f"SRPO needs ComfyUI {COMFYUI_MINIMUM} or newer, this is {version}: update ComfyUI and start it again"
        )


def _numbers(version: str) -> list[int]:
    """The numbers a version starts with: "0.9.0-dev1" -> [0, 9, 0]; of what starts with none, []."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return [int(part) for part in found[1].split(".")] if found else []


def _register_engine() -> None:
    """Make the folder beside this file the module `srpo_core`, whatever else is installed; sys.path stays as it is."""
    folder = Path(__file__).parent / "srpo_core"
    loaded = sys.modules.get("srpo_core")
    if loaded is not None:
        other = Path(next(iter(loaded.__path__)))
        if other.resolve() != folder.resolve():
            raise ImportError(f"two copies of SRPO: {other} is loaded already, {folder} is not; remove one of them")
        return
    spec = importlib.util.spec_from_file_location(
        "srpo_core", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["srpo_core"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["srpo_core"]
        raise


if _in_comfyui():
    _require_versions()
    _register_engine()
    from .nodes import comfy_entrypoint  # noqa: F401
