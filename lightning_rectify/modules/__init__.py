"""LightningModules; one folder each."""

from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.classifier import ImageClassifier

__all__ = ["ImageClassifier", "RectifiedModule"]
