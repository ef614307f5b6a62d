"""Callbacks that watch training; they work with any LightningModule."""

from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateMonitor
from lightning_rectify.callbacks.samples import SampleGrid, SampleWriter
from lightning_rectify.callbacks.spectrum import SpectrumMonitor

__all__ = ["AdaptiveRateMonitor", "SampleGrid", "SampleWriter", "SpectrumMonitor"]
