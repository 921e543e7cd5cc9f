"""ComfyUI's entry: nodes of SRPO, made on top of the engine in the folder srpo_core beside this file.

Nothing happens where ComfyUI isn't: pytest imports this file too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

WEB_DIRECTORY = "./nodes/web"


def _register_engine() -> None:
    """Make the folder beside this file the module `srpo_core`, whatever else is installed; sys.path stays as it is."""
    folder = Path(__file__).parent / "srpo_core"
    loaded = sys.modules.get("srpo_core")
    if loaded is not None:
        other = Path(str(loaded.__file__)).parent
        if other.resolve() != folder.resolve():
            raise ImportError(f"two copies of SRPO: {other} is loaded already, {folder} is not; remove one of them")
        return
    spec = importlib.util.spec_from_file_location(
        "srpo_core", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["srpo_core"] = module
    spec.loader.exec_module(module)


if importlib.util.find_spec("comfy_api") is not None:
    _register_engine()
    from .nodes import comfy_entrypoint  # noqa: F401
