"""Networks from the proof of arXiv:1908.01842: functions on a low dimensional manifold, unit by unit, and from data."""

from lightning_rectify.modules.manifold.chart_net import ChartNet
from lightning_rectify.modules.manifold.charts import CoverageWarning, TangentCharts
from lightning_rectify.modules.manifold.dimension import (
    DimensionCurve,
    DimensionEstimate,
    DimensionWarning,
    dimension_curve,
    intrinsic_dimension,
)
from lightning_rectify.modules.manifold.geometry import bottleneck, covering_radius, fill_distance, injectivity, reach
from lightning_rectify.modules.manifold.layered import LayeredNetwork, NetworkSize
from lightning_rectify.modules.manifold.manifolds import Manifold, ParametricManifold, Sphere, Torus
from lightning_rectify.modules.manifold.mixture import ChartMixture
from lightning_rectify.modules.manifold.noisy_charts import noisy_charts, plane_distances
from lightning_rectify.modules.manifold.recipes import ChartNetReport, Guarantee
from lightning_rectify.modules.manifold.regressor import ManifoldRegressor
from lightning_rectify.modules.manifold.regressor_settings import ChartAnswers

__all__ = [
    "ChartAnswers",
    "ChartMixture",
    "ChartNet",
    "ChartNetReport",
    "CoverageWarning",
    "DimensionCurve",
    "DimensionEstimate",
    "DimensionWarning",
    "Guarantee",
    "LayeredNetwork",
    "Manifold",
    "ManifoldRegressor",
    "NetworkSize",
    "ParametricManifold",
    "Sphere",
    "TangentCharts",
    "Torus",
    "bottleneck",
    "covering_radius",
    "dimension_curve",
    "fill_distance",
    "injectivity",
    "intrinsic_dimension",
    "noisy_charts",
    "plane_distances",
    "reach",
]
