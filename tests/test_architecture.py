"""The engine never imports ComfyUI or its nodes, and importing it does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "srpo_core"
FILES = sorted(ENGINE.rglob("*.py"))
FORBIDDEN = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "nodes",
    "execution",
    "server",
    "tests",
}


def imported(tree):
    """Top-level packages that a file imports by absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level


def depth(path):
    return len(path.relative_to(ENGINE).parts)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ENGINE)) for path in FILES])
def test_the_engine_stands_alone(path):
    names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    assert not names & FORBIDDEN
    assert all(len(name) <= depth(path) for name in names if name.startswith(".")), (
        "a relative import leaves the engine"
    )


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ENGINE)) for path in FILES])
def test_only_safe_formats_are_read(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not set(imported(tree)) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in node.keywords)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec", "yaml.load"}:
            pytest.fail(f"line {node.lineno} calls {ast.unparse(node.func)}")


def test_imports_change_no_global_state():
    """Neither randomness nor threads, gradients, default types or the working folder."""
    code = """
import os, random, sys
import torch, numpy, transformers, diffusers, rich.style
def state():
    return {
        "torch": torch.get_rng_state().tolist(), "random": random.getstate(), "folder": os.getcwd(),
        "path": sys.path[:], "numpy": numpy.random.get_state()[1].tolist(), "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(), "anomaly": torch.is_anomaly_enabled(), "dtype": torch.get_default_dtype(),
    }
before = state()
for name in sys.argv[1:]:
    __import__(name)
changed = [key for key, value in state().items() if value != before[key]]
assert not changed, changed
"""
    names = [
        ".".join(("srpo_core", *path.relative_to(ENGINE).with_suffix("").parts)).removesuffix(".__init__")
        for path in FILES
        if path.name != "__main__.py"
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False, cwd=ENGINE.parent
    )
    assert done.returncode == 0, done.stderr
