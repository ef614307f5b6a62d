"""Networks from the proof of arXiv:1908.01842: functions on a low dimensional manifold, unit by unit."""

from lightning_rectify.modules.manifold.chart_net import ChartNet
from lightning_rectify.modules.manifold.charts import CoverageWarning, TangentCharts
from lightning_rectify.modules.manifold.layered import LayeredNetwork, NetworkSize
from lightning_rectify.modules.manifold.manifolds import Manifold, ParametricManifold, Sphere, Torus
from lightning_rectify.modules.manifold.recipes import ChartNetReport, Guarantee

__all__ = [
    "ChartNet",
    "ChartNetReport",
    "CoverageWarning",
    "Guarantee",
    "LayeredNetwork",
    "Manifold",
    "NetworkSize",
    "ParametricManifold",
    "Sphere",
    "TangentCharts",
    "Torus",
]
