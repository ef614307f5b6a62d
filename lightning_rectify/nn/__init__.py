"""Parts of networks; torch only."""

from lightning_rectify.nn._factors import SpectralFactors
from lightning_rectify.nn.controls import (
    Control,
    Divergence,
    DOptimal,
    LipschitzRegularizer,
    SpectralConstraint,
    SpectralNormalization,
)
from lightning_rectify.nn.singular_values import (
    condition_number,
    convolution_norm,
    singular_values,
    stable_rank,
    weight_matrix,
)
from lightning_rectify.nn.spectral import (
    bake,
    controlled_layers,
    matrix_layers,
    orthogonality_error,
    project,
    rebuilt_once,
    spectral_control,
    spectral_penalty,
    spectrum,
)

__all__ = [
    "Control",
    "DOptimal",
    "Divergence",
    "LipschitzRegularizer",
    "SpectralConstraint",
    "SpectralFactors",
    "SpectralNormalization",
    "bake",
    "condition_number",
    "controlled_layers",
    "convolution_norm",
    "matrix_layers",
    "orthogonality_error",
    "project",
    "rebuilt_once",
    "singular_values",
    "spectral_control",
    "spectral_penalty",
    "spectrum",
    "stable_rank",
    "weight_matrix",
]
