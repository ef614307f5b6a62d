"""Translation by a Transformer: network, loss, searches, metrics and the module."""

from lightning_rectify.modules.translation.module import Translator
from lightning_rectify.modules.translation.transformer import Transformer

__all__ = ["Transformer", "Translator"]
