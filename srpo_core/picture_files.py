"""The files of drawn pictures: their names, what they say of how they were made, their index and their sheet."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.files import write_atomic
from srpo_core.graph_prompt import graph_prompt, is_graph
from srpo_core.preview import contact_sheet, from_pil, to_pil

INDEX, SHEET = "samples.jsonl", "samples_sheet.jpg"
"""Beside the pictures: a line for each, and the first of them on one sheet."""
SHEET_PICTURES, SHEET_SIDE = 64, 256
RECORD = "srpo"
"""The text chunk of a PNG that holds its record as JSON."""
Record = dict[str, Any]
"""How a picture was made: prompt, seed, steps, ...; the entry "made_with" tells of versions and device."""


@dataclass(frozen=True)
class Picture:
    """One picture to draw: its prompt (and that prompt's place among the prompts), its seed and its file."""

    prompt: str
    index: int
    seed: int
    path: Path

    def record(self, settings: Mapping[str, Any]) -> Record:
        """Its record under the settings that all pictures share."""
        return {"prompt": self.prompt, "seed": self.seed, **settings}


def plan(prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Picture]:
    """The pictures of all prompts and seeds, prompt by prompt."""
    pictures = []
    for index, prompt in enumerate(prompts):
        for seed in seeds:
            name = "-".join(filter(None, (f"{index:03d}", _slug(prompt), str(seed))))
            pictures.append(Picture(prompt, index, seed, folder / f"{name}.png"))
    return pictures


def _slug(prompt: str) -> str:
    """A prompt's beginning in letters and digits that any file system takes: "Größe, 2" -> "grosse-2"."""
    plain = unicodedata.normalize("NFKD", prompt.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:48].rstrip("-")


def is_drawn(picture: Picture, settings: Mapping[str, Any]) -> bool:
    """Whether its file is there and was made with these settings, whatever the versions and the device were."""
    return _without_origin(read_record(picture.path)) == _without_origin(picture.record(settings))


def check_places(pictures: Sequence[Picture], settings: Mapping[str, Any]) -> None:
    """ConfigError if a picture's place is taken by a file that was made otherwise."""
    taken = [picture.path for picture in pictures if picture.path.exists() and not is_drawn(picture, settings)]
    if taken:
        more = f" and {len(taken) - 1} more exist" if len(taken) > 1 else " exists"
        raise ConfigError(
            f"{taken[0]}{more} already, made with other settings; --overwrite replaces what is there, --out names"
            " another folder"
        )


def _without_origin(record: Mapping[str, Any] | None) -> Record | None:
    return None if record is None else {name: value for name, value in record.items() if name != "made_with"}


def read_record(path: Path) -> Record | None:
    """What a picture says of how it was made; None where there is no such file or it says nothing."""
    try:
        with Image.open(path) as image:
            record = json.loads(image.info.get(RECORD, "null"))
    except (OSError, ValueError, TypeError, RecursionError, Image.DecompressionBombError):
        return None
    return record if isinstance(record, dict) else None


def save_picture(image: Tensor, picture: Picture, settings: Mapping[str, Any]) -> None:
    """Write [3, H, W] in [0, 1] as PNG with its record, and with "parameters" as other tools write and read them."""
    record = picture.record(settings)
    text = PngInfo()
    text.add_text("parameters", parameters(record))
    text.add_itxt(RECORD, json.dumps(record, ensure_ascii=False))
    out = io.BytesIO()
    to_pil(image).save(out, "PNG", pnginfo=text)
    write_atomic(picture.path, out.getvalue())


def parameters(record: Record) -> str:
    """A record in the wording of A1111's web UI: the prompt, then a line of "Name: value" pairs."""
    said = {
        "Steps": record["steps"],
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": 1,
        "Distilled CFG Scale": record["guidance"],
        "Shift": record["shift"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"].get("transformer") or record["model"].get("path") or record["model"]["family"],
        "Checkpoint": record["checkpoint"],
        "Lora": ", ".join(f"{lora['file']}:{lora['strength']:g}" for lora in record.get("loras", [])),
        "Version": f"srpo {record.get('made_with', {}).get('versions', {}).get('comfyui-srpo', '')}".strip(),
    }
    quoted = {name: json.dumps(value) if "," in str(value) else value for name, value in said.items() if value != ""}
    return f"{record['prompt']}\n" + ", ".join(f"{name}: {value}" for name, value in quoted.items())


def prompt_of(info: Mapping[str, Any]) -> str:
    """The prompt in a picture's text chunks: of this project's record, of A1111's parameters, of ComfyUI's graph, or
    plain; "" where none is found.
    """
    try:
        record = json.loads(info.get(RECORD, "null"))
    except (ValueError, TypeError, RecursionError):
        record = None
    if isinstance(record, dict) and record.get("prompt"):
        return str(record["prompt"]).strip()
    if "parameters" not in info:
        text = str(info.get("prompt", "")).strip()
        return graph_prompt(text) if is_graph(text) else text
    text = re.split(r"^(?:Negative prompt:|Steps: \d+, )", str(info["parameters"]), maxsplit=1, flags=re.MULTILINE)[0]
    return re.sub(r"<(?:lora|lyco|hypernet):[^<>]*>", "", text).strip(" ,\n")  # they load files and say nothing


def write_index(pictures: Sequence[Picture], settings: Mapping[str, Any]) -> bool:
    """Write the folder's index, and its sheet once all `pictures` are there; whether they are.

    Made from what the pictures say, under a lock: any process of several may do it, the last one's is complete.
    """
    folder = pictures[0].path.parent
    with FileLock(folder / ".samples.lock"):
        records = {path.name: read_record(path) for path in sorted(folder.glob("*.png")) if path.name[0] != "."}
        lines = [_index_line(name, record) for name, record in records.items() if record is not None]
        write_atomic(folder / INDEX, "".join(f"{line}\n" for line in lines))
        wanted = ((records.get(picture.path.name), picture.record(settings)) for picture in pictures)
        complete = all(_without_origin(there) == _without_origin(record) for there, record in wanted)
        if complete:
            out = io.BytesIO()
            _sheet(pictures[:SHEET_PICTURES]).save(out, "JPEG", quality=90)
            write_atomic(folder / SHEET, out.getvalue())
    return complete


def _index_line(name: str, record: Record) -> str:
    kept = {key: value for key, value in record.items() if key not in ("sigmas", "made_with")}
    return json.dumps({"file": name, **kept}, ensure_ascii=False)


def _sheet(pictures: Sequence[Picture]) -> Image.Image:
    images = []
    for picture in pictures:
        with Image.open(picture.path) as image:
            small = image.convert("RGB")
        small.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
        images.append(from_pil(small))
    seeds = len({picture.seed for picture in pictures})
    return contact_sheet(torch.stack(images), [picture.prompt for picture in pictures], seeds if seeds > 1 else 4)
