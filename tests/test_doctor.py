"""What doctor says about packages, weights and the whole installation."""

import json
from importlib import metadata

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from srpo_core import cli, doctor
from srpo_core.config import ConfigError

PYPROJECT = """
[project]
dependencies = [
    "torch>=2.7",
    "numpy",
]

[project.optional-dependencies]
rewards = ["open_clip_torch>=2.24"]
dev = ["pytest>=8"]

[project.scripts]
srpo = "x:y"
"""


def test_versions_compare_as_numbers():
    numbers = doctor.version_numbers
    assert numbers("2.13.0+cpu") > numbers("2.7")
    assert numbers("2.7.0") == numbers("2.7")
    assert numbers("2.7.0rc1") == numbers("2.7")
    assert numbers("0.9") < numbers("0.35")


def test_requirements_are_read_from_pyproject():
    expected = [("torch>=2.7", True), ("numpy", True), ("open_clip_torch>=2.24", False)]
    assert doctor.parse_pyproject(PYPROJECT) == expected


def test_every_named_package_has_a_purpose():
    named = [text.split(">=")[0] for text, _ in doctor.requirements()]
    assert "torch" in named
    assert set(named) == set(doctor.PURPOSE)


def test_requirements_of_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "srpo_core" / "doctor.py"))
    listed = ["torch>=2.7", 'open_clip_torch>=2.24; extra == "rewards"', 'pytest>=8; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: listed)
    assert doctor.requirements() == [("torch>=2.7", True), ("open_clip_torch>=2.24", False)]


def test_parts():
    fine = doctor.examine_part("torch>=2.0", True, {})
    assert fine.problem is None
    assert fine.installed == metadata.version("torch")
    assert "older than 99" in doctor.examine_part("torch>=99", True, {}).problem
    missing = doctor.examine_part("no-such-package-here>=1.5", False, {})
    assert missing.installed is None
    assert missing.get == "pip install 'no-such-package-here>=1.5'"
    assert doctor.examine_part("torch", True, {"torch": "it can't be imported"}).problem == "it can't be imported"


def test_a_torchvision_of_another_torch_is_reported(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1")
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    problem = doctor.import_problem("torchvision")
    assert "built for another torch" in problem
    assert "pip uninstall torchvision" in problem


def test_packages_that_are_not_installed_are_not_imported():
    assert doctor.import_problem("no-such-package-here") is None


def make_weights(folder):
    for name in ("transformer/a", "vae/b", "clip/c", "judge"):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(100)}, path)
    return folder


def test_weights(tmp_path):
    assert "there are no weights" in doctor.weights_problem(tmp_path / "none")
    folder = make_weights(tmp_path / "weights")
    assert doctor.weights_problem(folder) is None
    path = folder / "vae" / "b.safetensors"
    whole = path.read_bytes()
    for damaged, reason in (
        (whole[:-1], "bytes instead of"),
        (b"version https://git-lfs", "no safetensors"),
        (b"", "no safetensors"),
    ):
        path.write_bytes(damaged)
        assert reason in doctor.weights_problem(folder)
    path.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    assert "header is damaged" in doctor.weights_problem(folder)
    path.unlink()
    assert "there is no vae" in doctor.weights_problem(folder)


@pytest.fixture(scope="module")
def findings():
    return doctor.examine()


def test_this_installation(findings):
    assert findings.fine
    text = findings.to_text()
    assert "all required parts are fine" in text
    assert metadata.version("torch") in text
    data = json.loads(findings.to_json())
    assert data["fine"] is True
    assert {part["name"] for part in data["parts"]} == set(doctor.PURPOSE)


def test_models_that_are_here(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "my comfy"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    encoder = tmp_path / "my comfy" / "models" / "clip" / "clip_l.safetensors"
    cached = tmp_path / "cache" / "models--xswu--HPSv2"
    reward = cached / "snapshots" / "1234" / "HPS_v2.1_compressed.pt"
    for path, content in ((encoder, b""), (reward, b""), (cached / "refs" / "main", b"1234")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    findings = doctor.examine()
    assert {name for name, path in findings.models.items() if path} == {"clip-l", "hpsv2"}
    text = findings.to_text()
    assert f"'model.clip={encoder}'" in text  # as a shell takes it
    assert f"reward.path={reward}" in text
    assert "not here: flux," in text


def test_what_files_are(tmp_path, capsys):
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "a.safetensors"
    )
    torch.save({"layers.0.weight": torch.zeros(2, 2), "layers.7.weight": torch.zeros(1, 2)}, tmp_path / "head.pth")
    assert cli.main(["doctor", str(tmp_path / "a.safetensors"), str(tmp_path / "head.pth")]) == 0
    lora, head = capsys.readouterr().out.splitlines()
    assert "LoRA" in lora
    assert "aesthetic" in head
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    torch.save({"x": ConfigError("code")}, tmp_path / "code.pt")
    assert cli.main(["doctor", str(tmp_path / "page.safetensors"), str(tmp_path / "code.pt")]) == 1
    page, code = capsys.readouterr().out.splitlines()
    assert "web page" in page
    assert page.startswith(str(tmp_path / "page.safetensors"))
    assert code.startswith(str(tmp_path / "code.pt"))


def test_a_missing_required_part_is_not_fine(findings):
    from dataclasses import replace

    part = doctor.examine_part("no-such-package-here", True, {})
    broken = replace(findings, parts=[*findings.parts, part])
    assert not broken.fine
    assert "problem: no-such-package-here: it is not installed; pip install" in broken.to_text()
    optional = replace(findings, parts=[replace(part, required=False)])
    assert optional.fine
    assert "to get the optional parts" in optional.to_text()
