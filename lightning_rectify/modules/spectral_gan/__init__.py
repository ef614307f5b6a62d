"""GANs under spectrum control (arXiv:1812.10912)."""

from lightning_rectify.modules.spectral_gan.features import (
    ClassifierFeatures,
    EfficientNetLiteFeatures,
    FeatureExtractor,
    InceptionFeatures,
    RandomFeatures,
)
from lightning_rectify.modules.spectral_gan.module import SpectralGAN

__all__ = [
    "ClassifierFeatures",
    "EfficientNetLiteFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "RandomFeatures",
    "SpectralGAN",
]
