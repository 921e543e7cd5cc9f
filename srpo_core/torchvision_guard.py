"""A torchvision that was built for another torch than the installed one, made importable.

Such a torchvision lacks its compiled operators, and its own import fails: "operator torchvision::nms does not exist".
diffusers, transformers, peft and open_clip import torchvision where it is installed, so all of them fail with it. They
need its resizing only, which has no compiled part: with the missing operators declared (not defined) the import works.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "torchvision"
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""What torchvision's import registers implementations for, whether its library was loaded or not."""
_declared: list[Any] = []
"""Keeps the declarations alive: torch takes them back with the object that made them."""


def install() -> None:
    """Have the first import of torchvision mended if it fails; costs nothing until then, and nothing if it works."""
    if NAME not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _declare_operators() -> None:
    from torch.library import Library

    library = Library(NAME, "FRAGMENT")
    for schema in OPERATORS:
        library.define(schema)
    _declared.append(library)


class _Finder:
    """Finds torchvision as every other finder would, with a loader that tries twice."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """torchvision's spec; None for any other module."""
        if name != NAME or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """torchvision's own loader; where its import fails for want of operators, they are declared and it runs again."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module. What fails for another reason, or once more, fails as it would have."""
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if _declared or f"operator {NAME}::" not in str(error) or "does not exist" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith(f"{NAME}.")]:
                del sys.modules[name]
            _declare_operators()
            self._loader.exec_module(module)
