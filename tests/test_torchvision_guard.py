"""A torchvision built for another torch is mended when it is imported; any other is left alone.

Each case is a process of its own with a torchvision of its own: a package whose import does what the real one's does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REGISTERS = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, iou_threshold: scores)
"""
DEFINES = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imported(tmp_path, code, torchvision):
    """What a process prints that imports the engine and then runs `code`, beside a torchvision of these two files."""
    package = tmp_path / "torchvision"
    if torchvision is not None:
        package.mkdir()
        (package / "__init__.py").write_text("from torchvision import operators\nversion = 'fake'\n")
        (package / "operators.py").write_text(torchvision)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", f"import srpo_core, sys\n{code}"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}, cwd=tmp_path,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_the_case_is_real(tmp_path):
    """Without the engine this torchvision can't be imported."""
    code = "sys.meta_path = [f for f in sys.meta_path if 'srpo_core' not in type(f).__module__]\nimport torchvision"
    assert "operator torchvision::nms does not exist" in imported(tmp_path, code, REGISTERS)


@pytest.mark.parametrize("first", ["import torchvision", "import torchvision.operators", "import diffusers"])
def test_missing_operators_are_declared(tmp_path, first):
    code = f"{first}\nimport torchvision, torchvision.operators\nprint(torchvision.version, torchvision.__name__)"
    assert imported(tmp_path, code, REGISTERS) == "fake torchvision"


def test_a_torchvision_that_works_is_left_alone(tmp_path):
    code = "import torchvision\nfrom srpo_core import torchvision_guard as g\nprint(torchvision.version, g._declared)"
    assert imported(tmp_path, code, DEFINES + REGISTERS) == "fake []"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("raise RuntimeError('another trouble')", "RuntimeError: another trouble"),
        ("raise RuntimeError('operator torchvision::x does not exist')", "torchvision::x does not exist"),
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
    ],
)
def test_other_troubles_stay_what_they_are(tmp_path, content, message):
    assert message in imported(tmp_path, "import torchvision", content)


def test_importing_the_engine_imports_neither_torch_nor_torchvision(tmp_path):
    code = "print({'torch', 'torchvision'} & set(sys.modules))"
    assert imported(tmp_path, code, REGISTERS) == "set()"
