"""The built-in small world: its language and pictures, its small models and their weights."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
"""Folders and files of the shipped weights (bfloat16 safetensors)."""
