"""How robust a classifier is, and whether that number can be believed: a report, its checks, and a monitor."""

from lightning_rectify.callbacks.robustness.checks import Check, Evidence, Limits, masking_checks
from lightning_rectify.callbacks.robustness.monitor import RobustnessMonitor, RobustnessWarning
from lightning_rectify.callbacks.robustness.report import ATTACKS, robust_report
from lightning_rectify.callbacks.robustness.result import AttackRow, RobustReport

__all__ = [
    "ATTACKS",
    "AttackRow",
    "Check",
    "Evidence",
    "Limits",
    "RobustReport",
    "RobustnessMonitor",
    "RobustnessWarning",
    "masking_checks",
    "robust_report",
]
