"""SRPO fine-tuning of flow models."""

from srpo_core import torchvision_guard

torchvision_guard.install()
