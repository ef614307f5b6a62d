"""RAdam and its variance theory, and what its authors built beside it, for PyTorch Lightning.

The public names are imported on first use, so that ``import lightning_rectify`` itself costs almost nothing and
the optimizer can be used where Lightning is not wanted.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# name -> module that defines it
_PUBLIC = {
    "RectifiedAdam": "optim",
    "AdaptiveRateMonitor": "callbacks",
    "SpectrumMonitor": "callbacks",
    "WarmupProbe": "callbacks",
    "RobustnessMonitor": "callbacks",
    "RectifiedModule": "modules",
    "MinimaxModule": "modules",
    "ImageClassifier": "modules",
    "SpectralGAN": "modules",
    "L2LDefense": "modules",
    "SPOT": "modules",
    "SPOTAdaptation": "modules",
    "ManifoldRegressor": "modules",
    "LanguageModel": "modules",
    "Translator": "modules",
    "ImageData": "data",
    "TokenData": "data",
    "TranslationData": "data",
    "TransportData": "data",
    "DomainPairs": "data",
    "ManifoldData": "data",
}

__all__ = [
    "SPOT",
    "AdaptiveRateMonitor",
    "DomainPairs",
    "ImageClassifier",
    "ImageData",
    "L2LDefense",
    "LanguageModel",
    "ManifoldData",
    "ManifoldRegressor",
    "MinimaxModule",
    "RectifiedAdam",
    "RectifiedModule",
    "RobustnessMonitor",
    "SPOTAdaptation",
    "SpectralGAN",
    "SpectrumMonitor",
    "TokenData",
    "TranslationData",
    "Translator",
    "TransportData",
    "WarmupProbe",
    "__version__",
]

if TYPE_CHECKING:
    from lightning_rectify.callbacks import AdaptiveRateMonitor, RobustnessMonitor, SpectrumMonitor, WarmupProbe
    from lightning_rectify.data import (
        DomainPairs,
        ImageData,
        ManifoldData,
        TokenData,
        TranslationData,
        TransportData,
    )
    from lightning_rectify.modules import (
        SPOT,
        ImageClassifier,
        L2LDefense,
        LanguageModel,
        ManifoldRegressor,
        MinimaxModule,
        RectifiedModule,
        SpectralGAN,
        SPOTAdaptation,
        Translator,
    )
    from lightning_rectify.optim import RectifiedAdam


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
