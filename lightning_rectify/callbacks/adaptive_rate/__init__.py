"""Watching the adaptive learning rate: the monitor, its quantities, alarms and dashboard."""

from lightning_rectify.callbacks.adaptive_rate.alarms import AdaptiveRateWarning
from lightning_rectify.callbacks.adaptive_rate.monitor import AdaptiveRateMonitor

__all__ = ["AdaptiveRateMonitor", "AdaptiveRateWarning"]
