"""LightningDataModules."""

from lightning_rectify.data.images import ImageData

__all__ = ["ImageData"]
