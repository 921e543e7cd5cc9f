"""The engine never imports ComfyUI or its nodes, importing it does nothing, and importing the nodes is quick."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "srpo_core"
FILES = sorted(ENGINE.rglob("*.py"))
NODES = sorted((ENGINE.parent / "nodes").glob("*.py"))
SLOW = {"diffusers", "transformers", "peft", "open_clip", "matplotlib", "tensorboard", "accelerate", "torchvision"}
"""Libraries that take seconds to import: a node imports them, and engine modules that do, when it runs."""
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
        if path.name != "__main__.py" and (path.name != "adamw_kernel.py" or find_spec("triton"))
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False, cwd=ENGINE.parent
    )
    assert done.returncode == 0, done.stderr


def at_import(tree):
    """The statements that run when a file is imported: not those inside functions, nor those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def engine_modules(tree):
    """Modules of the engine that a file imports while it is imported."""
    for node in at_import(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "srpo_core":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "srpo_core")


def test_importing_the_nodes_loads_nothing_slow():
    """What ComfyUI's start pays for: the nodes' own imports, and all that the engine's modules among them import."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in NODES]
    names = sorted({name for tree in trees for name in engine_modules(tree)})
    assert names
    for tree in trees:
        statements = [node for node in at_import(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not set(imported(ast.Module(statements, []))) & SLOW
    code = """
import importlib, sys
import torch, numpy
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # a name in a module, not a module
            raise
print(sorted(set(sys.modules) & set(sys.argv[1].split(","))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(SLOW), *names],
        capture_output=True, text=True, check=False, cwd=ENGINE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
