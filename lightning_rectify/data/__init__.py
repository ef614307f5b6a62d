"""LightningDataModules."""

from lightning_rectify.data.images import ImageData
from lightning_rectify.data.tokens import TokenData
from lightning_rectify.data.translation import TranslationData
from lightning_rectify.data.transport import TransportData

__all__ = ["ImageData", "TokenData", "TranslationData", "TransportData"]
