"""What a transport plan looks like, and how its cost and marginals go over training."""

from lightning_rectify.callbacks.transport.history import PlanHistory
from lightning_rectify.callbacks.transport.plan import PlanFigure

__all__ = ["PlanFigure", "PlanHistory"]
