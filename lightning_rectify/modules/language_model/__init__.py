"""Language modelling by LSTMs: networks, carried states and the module."""

from lightning_rectify.modules.language_model.module import LanguageModel
from lightning_rectify.modules.language_model.networks import LSTMNetwork

__all__ = ["LSTMNetwork", "LanguageModel"]
