"""LightningModules; one folder each."""

from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.classifier import ImageClassifier
from lightning_rectify.modules.language_model import LanguageModel
from lightning_rectify.modules.minimax import MinimaxModule
from lightning_rectify.modules.spectral_gan import SpectralGAN
from lightning_rectify.modules.translation import Translator

__all__ = ["ImageClassifier", "LanguageModel", "MinimaxModule", "RectifiedModule", "SpectralGAN", "Translator"]
