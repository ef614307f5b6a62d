"""LightningDataModules."""

from lightning_rectify.data.images import ImageData
from lightning_rectify.data.translation import TranslationData

__all__ = ["ImageData", "TranslationData"]
