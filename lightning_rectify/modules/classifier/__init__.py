"""Image classification, the RAdam paper's first task."""

from lightning_rectify.modules.classifier.module import ImageClassifier

__all__ = ["ImageClassifier"]
