"""What a training draws and judges: SRPO Prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from srpo_core.config import ConfigError

from . import io_types
from .inputs import Setting, run_values, run_widgets, schema
from .io_types import RunSettings
from .loaders import file_state
from .settings import CATEGORY, FOR_TRAIN
from .show import shown

TEXT, FILE, PHOTOS, BUILT_IN = SOURCES = ("text", "file", "photos", "built in")
PHOTO_RECIPE = "flux-dev-photos"
"""The preset whose values the widgets show at first."""
SETTINGS = (
    Setting("data.photo_share", changes={"step": 0.05, "min": 0.01}),
    Setting("data.bucket_step", changes={"step": 16}),
    Setting("data.prompt_column"),
)


class Prompts(io.ComfyNode):
    """What is trained on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOPrompts",
            display_name="SRPO Prompts",
            category=CATEGORY,
            description="What SRPO Train draws and judges: prompts from the box or a file, or photos of yours with"
            " captions; and the prompts of its preview pictures.",
            search_aliases=["training data", "dataset", "captions", "photos", "prompt list"],
            inputs=[
                io.Combo.Input(
                    "source", options=list(SOURCES),
                    tooltip="text: the box below. file: a file of prompts. photos: a folder of images with captions,"
                    " which are trained on in place of drawn pictures. built in: the model's own prompts, which only"
                    " the miniature has.",
                ),
                io.String.Input(
                    "text", default="", multiline=True, placeholder="prompts to train on, one a line",
                    tooltip="One prompt a line. With photos and photo_share below 1: the prompts drawn in between.",
                ),
                io.String.Input(
                    "path", default="",
                    tooltip="A file of prompts (.txt with one a line, .csv, .json, .jsonl, .parquet, a dataset's"
                    " folder), or a folder of photos, each with a .txt of its name or a row in metadata.jsonl: in"
                    " ComfyUI's input folder, or by its full path.",
                ),
                io.String.Input(
                    "preview_text", default="", multiline=True, placeholder="prompts of the previews, one a line",
                    tooltip="Prompts of the preview pictures, one a line; they are never trained on. Empty: the"
                    " model's own.",
                ),
                *run_widgets(SETTINGS, PHOTO_RECIPE),
            ],
            outputs=[io_types.Prompts.Output("settings", tooltip=FOR_TRAIN)],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, source: str | None, path: str | None) -> bool | str:
        """Missing files are told before anything runs. A value that comes by a link is None here."""
        if source not in (None, *SOURCES):
            return f"source={source!r} is none of {', '.join(SOURCES)}"
        try:
            if path is not None and source in (FILE, PHOTOS):
                _place(source, path)
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, source: str | None, path: str | None, **_: Any) -> object:
        """Files that changed are read anew."""
        if path is None or source not in (FILE, PHOTOS):
            return ""
        place = _place(source, path)
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        return [file_state(file) for file in files if file.is_file()]

    @classmethod
    def execute(cls, source: str, text: str, path: str, preview_text: str, **given: Any) -> io.NodeOutput:
        from srpo_core.prompt_summary import summary_of_text

        settings = run_values(SETTINGS, given)
        values, texts, found = _to_train_on(source, text, path, settings)
        if preview_text.strip():
            texts["data.eval_prompts"] = preview_text
            found += f"\npreviews: {summary_of_text(preview_text, 'preview_text')}"
        settings |= {"data.prompts": "builtin", "data.photos": None, "data.eval_prompts": "builtin"}
        return io.NodeOutput(RunSettings(settings | values, texts), ui=shown(cls, text=found))


def _to_train_on(
    source: str, text: str, path: str, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str], str]:
    """(settings, texts, words for the user) of a source. ConfigError if it holds nothing."""
    from srpo_core.prompt_summary import summary_of_file, summary_of_photos, summary_of_text

    if source == BUILT_IN:
        return {}, {}, "the model's own prompts"
    if source == TEXT:
        return {}, {"data.prompts": text}, summary_of_text(text, "text")
    place, column = str(_place(source, path)), settings["data.prompt_column"]
    if source == FILE:
        return {"data.prompts": place}, {}, summary_of_file(place, "path", column)
    found, texts = summary_of_photos(place, "path", column), {}
    if settings["data.photo_share"] < 1:
        texts["data.prompts"] = text
        found += f"\nbetween them: {summary_of_text(text, 'photo_share is below 1, and text')}"
    return {"data.photos": place}, texts, found


def _place(source: str, path: str) -> Path:
    """The file or folder that `path` names, from ComfyUI's input folder. ConfigError if it isn't there."""
    wanted = "a folder of images with captions" if source == PHOTOS else "a file of prompts"
    if not path.strip():
        raise ConfigError(f"path is empty, and source={source!r} needs {wanted}: name it, or choose another source")
    place = Path(folder_paths.get_input_directory()) / path.strip().strip('"')
    try:
        is_there = place.is_dir() if source == PHOTOS else place.exists()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        is_there = False
    if not is_there:
        raise ConfigError(
            f"path={path!r}: there is no {place}; name {wanted}, in ComfyUI's input folder or by its full path"
        )
    return place
