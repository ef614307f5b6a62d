"""Finding the length of a warmup before training: the probe, what it measures, and what follows from it."""

from lightning_rectify.callbacks.warmup_probe.callback import WarmupProbe, probe_warmup
from lightning_rectify.callbacks.warmup_probe.result import WarmupProbeResult

__all__ = ["WarmupProbe", "WarmupProbeResult", "probe_warmup"]
