"""LightningDataModules."""

from lightning_rectify.data.domains import DomainPairs
from lightning_rectify.data.images import ImageData
from lightning_rectify.data.manifolds import ManifoldData
from lightning_rectify.data.tokens import TokenData
from lightning_rectify.data.translation import TranslationData
from lightning_rectify.data.transport import TransportData

__all__ = ["DomainPairs", "ImageData", "ManifoldData", "TokenData", "TranslationData", "TransportData"]
