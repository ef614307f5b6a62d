"""Watching singular values: the monitor, what it reads, and how that is shown."""

from lightning_rectify.callbacks.spectrum.monitor import SpectrumMonitor

__all__ = ["SpectrumMonitor"]
