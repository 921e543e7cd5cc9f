"""The base model and the trained one on the same held-out prompts from the same noise: evaluation/evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from srpo_core.columns import Scores
from srpo_core.errors import TrainingError
from srpo_core.files import write_atomic
from srpo_core.preview import Gallery, save_png, to_pil

When = Literal["before", "after"]


def evaluation_file(run_dir: Path | str) -> Path:
    """Where a run's evaluation lies."""
    return Path(run_dir) / "evaluation" / "evaluation.json"


def read_evaluation(run_dir: Path | str) -> dict[str, Any]:
    """{"prompts", "settings", "before": scores, "after": scores, "after_step"}, as far as it was made."""
    path = evaluation_file(run_dir)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} can't be read: {error}; remove it to have it made anew") from error


class Evaluation:
    """A gallery of held-out prompts, drawn by the base model before training and by the trained one after it.

    `settings`, of JSON's types, are what the base model's pictures and scores depend on: others have it evaluated anew.
    """

    def __init__(self, run_dir: Path, gallery: Gallery, settings: Mapping[str, Any]) -> None:
        self.run_dir, self.gallery, self.settings = run_dir, gallery, settings

    def _record(self) -> dict[str, Any]:
        """What was made so far with the same prompts and settings."""
        made = read_evaluation(self.run_dir)
        fresh = {"prompts": list(self.gallery.prompts.prompts), "settings": self.settings}
        return made if fresh.items() <= made.items() else fresh

    def missing(self, when: When, step: int) -> bool:
        """Whether `when` is still to be made, for the model of `step`."""
        record = self._record()
        return when not in record or (when == "after" and record["after_step"] != step)

    def keep(self, when: When, step: int, images: Tensor, scores: Scores) -> None:
        """Write down the gallery's pictures [n, 3, H, W] and scores by the model of `step`."""
        folder = evaluation_file(self.run_dir).parent / when
        for i, image in enumerate(images):
            save_png(folder / f"{i:03d}.png", to_pil(image), durable=False)  # its record says that all are there
        record = self._record() | {when: scores} | ({"after_step": step} if when == "after" else {})
        write_atomic(evaluation_file(self.run_dir), json.dumps(record, indent=1))
