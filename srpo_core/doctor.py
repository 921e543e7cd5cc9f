"""What is installed here, what is missing, and how to get it. Packages that may be broken are imported only to try."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from srpo_core import places
from srpo_core.catalogue import CATALOGUE
from srpo_core.files import free_bytes

PURPOSE = {
    "torch": "everything",
    "diffusers": "the FLUX transformer and autoencoders",
    "transformers": "text encoders, rewards",
    "psutil": "runs in the background",
    "accelerate": "models that are built before their weights are read",
    "tokenizers": "tokenizers of text encoders and rewards",
    "huggingface_hub": "srpo download, and finding what was downloaded",
    "peft": "LoRA training",
    "open_clip_torch": "the HPS v2.1 reward, and CLIP rewards in open_clip's format",
    "safetensors": "weights, checkpoints, exports",
    "filelock": "one process at a time in a run's folder",
    "pydantic": "settings",
    "pyyaml": "presets",
    "numpy": "statistics",
    "pillow": "pictures",
    "rich": "progress bars and tables",
    "matplotlib": "figures",
    "tensorboard": "curves while training (output.tensorboard)",
    "pyarrow": "prompts in .parquet and .arrow files",
    "hpsv2": "the HPS v2 authors' own scorer: nothing here needs it, and it asks for old packages",
    "flash-attn": "faster attention on recent NVIDIA GPUs (not used yet)",
    "comfy-cli": "installing ComfyUI with these nodes (scripts/install_comfyui.sh brings its own)",
}
GET = {"flash-attn": "pip install flash-attn --no-build-isolation"}
IMPORTED = ("torch", "torchvision", "diffusers", "transformers", "peft")
"""Packages that are also imported: they break when their versions don't fit together."""
_LOW_DISK_GIB = 2.0


@dataclass(frozen=True)
class Part:
    """A package: `installed` is its version or None, `problem` says in words what is wrong (None: fine)."""

    name: str
    purpose: str
    required: bool
    wanted: str
    installed: str | None
    problem: str | None
    get: str


@dataclass(frozen=True)
class Findings:
    """What doctor found; `warnings` spoil nothing by themselves."""

    python: str
    platform: str
    device: str
    disk_free_gib: float
    parts: list[Part]
    miniature: str | None
    """what is wrong with the miniature's weights; None: they are intact"""
    warnings: list[str]
    model_places: list[str]
    """where models are looked for"""
    models: dict[str, str | None]
    """where each of the catalogue's models is; None: not here"""

    @property
    def fine(self) -> bool:
        """Whether all that training needs is there."""
        return all(part.problem is None for part in self.parts if part.required)

    def to_json(self) -> str:
        return json.dumps({"fine": self.fine, **asdict(self)}, indent=1)

    def to_text(self) -> str:
        """The findings as lines for a terminal, what is missing last."""
        width = max(len(part.name) for part in self.parts)
        lines = [
            f"python {self.python} on {self.platform}",
            f"device: {self.device}",
            f"free disk: {self.disk_free_gib:.1f} GiB here",
        ]
        for required, title in ((True, "required"), (False, "optional")):
            lines += ["", f"{title}:"]
            for part in (part for part in self.parts if part.required is required):
                mark = "ok " if part.problem is None else "-- " if part.installed is None and not required else "!! "
                state = part.installed or "not installed"
                lines.append(f"  {mark}{part.name:<{width}}  {state:<14} {part.wanted:<9} {part.purpose}")
        lines += ["", f"miniature weights: {self.miniature or 'there and intact'}", *self._models_text()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        for part in self.parts:
            if part.problem is not None and (part.required or part.installed is not None):
                lines.append(f"problem: {part.name}: {part.problem}; {part.get}")
        missing = [part for part in self.parts if not part.required and part.installed is None]
        if missing:
            lines += ["", "to get the optional parts:", *(f"  {part.get:<48} {part.purpose}" for part in missing)]
        lines += [
            "",
            "all required parts are fine"
            if self.fine
            else "required parts are missing or broken: see the problems above",
        ]
        return "\n".join(lines)

    def _models_text(self) -> list[str]:
        """Which of the catalogue's models are here and the settings that take them."""
        lines = ["", *(f"models are looked for in {place}" for place in self.model_places)]
        for name, path in self.models.items():
            if path is not None:
                lines.append(f"  ok {name:<12}  {places.as_setting(CATALOGUE[name], Path(path))}")
        absent = [name for name, path in self.models.items() if path is None]
        if absent:
            text = f"not here: {', '.join(absent)} (srpo download NAME gets one)"
            lines += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        return lines


def examine() -> Findings:
    """Look at the whole installation; nothing is changed, nothing downloaded."""
    broken = {name: problem for name in IMPORTED if (problem := import_problem(name)) is not None}
    parts = [examine_part(text, required, broken) for text, required in requirements()]
    warnings = [f"torchvision: {broken['torchvision']}"] if "torchvision" in broken else []
    free = free_bytes(Path.cwd()) / 2**30
    if free < _LOW_DISK_GIB:
        warnings.append(f"only {free:.1f} GiB are free here; checkpoints may not fit")
    return Findings(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        device="unknown: torch can't be imported" if "torch" in broken else _device(),
        disk_free_gib=free,
        parts=parts,
        miniature=weights_problem(Path(__file__).parent / "miniature" / "weights"),
        warnings=warnings,
        **_models(),
    )


def _models() -> dict[str, Any]:
    """The findings about the catalogue's models; nothing where huggingface_hub is missing, which says so itself."""
    try:
        found = {name: places.find(name) for name in CATALOGUE}
    except ImportError:
        return {"model_places": [], "models": {}}
    return {"model_places": model_places(), "models": {name: path and str(path) for name, path in found.items()}}


def model_places() -> list[str]:
    """Where models are looked for, in words."""
    root = places.comfyui_root()
    if root is None:
        return [f"{places.cache_root()} (Hugging Face); COMFYUI_PATH would add ComfyUI's folder"]
    return [f"{root / 'models'} (ComfyUI)", f"{places.cache_root()} (Hugging Face)"]


def describe_files(names: Sequence[str]) -> tuple[list[str], bool]:
    """(a line about each file or folder of weights, whether all of them are weights)."""
    from srpo_core.config import ConfigError
    from srpo_core.rewards.files import PICKLED, read_shapes, seems
    from srpo_core.weights.recognise import describe_file

    lines, fine = [], True
    for name in names:
        try:
            kind = seems(read_shapes(name, "")) if Path(name).suffix in PICKLED else describe_file(name)
            lines.append(f"{name}: {kind or 'weights of a kind that is not known here'}")
        except ConfigError as error:
            lines.append(str(error))
            fine = False
    return lines, fine


def requirements() -> list[tuple[str, bool]]:
    """("torch>=2.7", whether it is required) for all packages that the project names, the extra `dev` left out.

    They are its pyproject.toml's, else those of the installed package, else names without versions.
    """
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        return parse_pyproject(project.read_text(encoding="utf-8"))
    try:
        listed = metadata.requires("comfyui-srpo") or []
    except metadata.PackageNotFoundError:
        extras = {"pyarrow", "hpsv2", "flash-attn", "comfy-cli"}
        return [(name, name not in extras) for name in PURPOSE]
    found = [
        (text.split(";")[0].strip(), "extra ==" not in text) for text in listed if not re.search(r"extra == .dev", text)
    ]
    return list(dict.fromkeys(found))


def parse_pyproject(text: str) -> list[tuple[str, bool]]:
    """The same from pyproject.toml's text (Python 3.10 reads no TOML); the extra `dev` is left out."""
    required = re.search(r"^dependencies = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    extras = re.findall(r"^(\w+) = \[(.*?)\]", section[1] if section else "", re.MULTILINE | re.DOTALL)
    found = [(name, True) for name in re.findall(r'"([^"]+)"', required[1] if required else "")]
    return found + [
        (name, False) for extra, names in extras if extra != "dev" for name in re.findall(r'"([^"]+)"', names)
    ]


def examine_part(requirement: str, required: bool, broken: dict[str, str]) -> Part:
    """One package against its requirement "name>=version"."""
    name, _, minimum = (piece.strip() for piece in requirement.partition(">="))
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        installed = None
    problem = broken.get(name)
    if installed is None:
        problem = "it is not installed"
    elif minimum and version_numbers(installed) < version_numbers(minimum):
        problem = f"version {installed} is older than {minimum}"
    get = GET.get(name, f"pip install '{requirement}'")
    wanted = f">={minimum}" if minimum else "any"
    return Part(name, PURPOSE.get(name, "named in pyproject.toml"), required, wanted, installed, problem, get)


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without trailing zeros: "2.13.0+cpu" -> (2, 13)."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def import_problem(name: str) -> str | None:
    """What happens when an installed package is imported, None if that works or if it is not installed."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken package raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "torchvision::nms" in str(error):
            return (
                f"it was built for another torch ({reason}), which also breaks transformers; install the torchvision "
                "that belongs to this torch, or remove it: pip uninstall torchvision"
            )
        return f"it can't be imported: {reason}"
    return None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"cuda: {card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards)
    if torch.backends.mps.is_available():
        return f"mps: Apple GPU{_memory()}"
    built = "" if torch.version.cuda is None else f"; torch is built for CUDA {torch.version.cuda} but finds no GPU"
    return f"cpu{_memory()}{built}"


def _memory() -> str:
    if sys.platform == "win32":
        return ""
    return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"


def weights_problem(folder: Path, needed: Sequence[str] = ("transformer", "vae", "clip", "judge")) -> str | None:
    """What is wrong with the miniature's weights; None if each part is there and every file is whole."""
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return f"missing: there are no weights in {folder}"
    for name in needed:
        if not any(file.relative_to(folder).parts[0].split(".")[0] == name for file in files):
            return f"missing: there is no {name} in {folder}"
    for file in files:
        problem = broken_safetensors(file)
        if problem is not None:
            return f"broken: {file}: {problem}"
    return None


def broken_safetensors(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and length alone; None if nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            return "it is no safetensors file"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header is damaged"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"it has {size} bytes instead of {expected}"
