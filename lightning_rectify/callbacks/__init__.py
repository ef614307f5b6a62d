"""Callbacks that watch training, show what a model makes, and write it down."""

from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateMonitor
from lightning_rectify.callbacks.average import CheckpointAverage
from lightning_rectify.callbacks.requeue import RequeueBetweenSteps
from lightning_rectify.callbacks.robustness import RobustnessMonitor, RobustReport, robust_report
from lightning_rectify.callbacks.samples import SampleGrid, SampleWriter
from lightning_rectify.callbacks.spectrum import SpectrumMonitor
from lightning_rectify.callbacks.translations import TranslationSamples, TranslationWriter
from lightning_rectify.callbacks.transport import PlanFigure, PlanHistory
from lightning_rectify.callbacks.warmup_probe import WarmupProbe, WarmupProbeResult, probe_warmup

__all__ = [
    "AdaptiveRateMonitor",
    "CheckpointAverage",
    "PlanFigure",
    "PlanHistory",
    "RequeueBetweenSteps",
    "RobustReport",
    "RobustnessMonitor",
    "SampleGrid",
    "SampleWriter",
    "SpectrumMonitor",
    "TranslationSamples",
    "TranslationWriter",
    "WarmupProbe",
    "WarmupProbeResult",
    "probe_warmup",
    "robust_report",
]
