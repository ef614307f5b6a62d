"""Callbacks that watch training; they work with any LightningModule."""

from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateMonitor

__all__ = ["AdaptiveRateMonitor"]
