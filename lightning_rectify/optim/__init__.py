"""Rectified Adam and the theory of its adaptive learning rate; torch only."""

from lightning_rectify.optim.rectified_adam import RectifiedAdam

__all__ = ["RectifiedAdam"]
