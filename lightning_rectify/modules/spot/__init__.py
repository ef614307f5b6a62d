"""Large-scale optimal transport as a game (arXiv:1905.00158)."""

from lightning_rectify.modules.spot.adaptation import SPOTAdaptation
from lightning_rectify.modules.spot.costs import ContourCost, FeatureCost, euclidean_cost, squared_cost
from lightning_rectify.modules.spot.eta import EtaWarning
from lightning_rectify.modules.spot.metrics import TransportEstimate
from lightning_rectify.modules.spot.module import SPOT

__all__ = [
    "SPOT",
    "ContourCost",
    "EtaWarning",
    "FeatureCost",
    "SPOTAdaptation",
    "TransportEstimate",
    "euclidean_cost",
    "squared_cost",
]
