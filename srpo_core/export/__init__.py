"""Weights as other programs read them: of a run, or of any file."""

from srpo_core.export.lora import export_lora
from srpo_core.export.run import export_run, find_checkpoint
from srpo_core.export.transformer import export_transformer
from srpo_core.export.vae import export_vae

__all__ = [
    "export_lora",
    "export_run",
    "export_transformer",
    "export_vae",
    "find_checkpoint",
]
