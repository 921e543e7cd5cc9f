"""Model families by name. A family is one file with `load(config, device) -> Components` and one line here."""

from __future__ import annotations

import torch

from srpo_core.config import ModelConfig
from srpo_core.interfaces import Components
from srpo_core.registry import resolve

MODELS = {
    "flux": "srpo_core.models.flux:load",
    "miniature": "srpo_core.miniature.models:load",
}


def load_model(config: ModelConfig, device: torch.device | str) -> Components:
    """The family's parts, weights included. ConfigError names the setting that is wrong."""
    return resolve(MODELS, "model family", config.family)(config, device)
