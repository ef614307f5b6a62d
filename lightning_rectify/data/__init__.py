"""LightningDataModules."""

from lightning_rectify.data.images import ImageData
from lightning_rectify.data.tokens import TokenData
from lightning_rectify.data.translation import TranslationData

__all__ = ["ImageData", "TokenData", "TranslationData"]
