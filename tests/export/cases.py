"""What is taken out of each module for use without training: a network, its inputs, which sizes may change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from lightning_rectify import (
    SPOT,
    ImageClassifier,
    L2LDefense,
    LanguageModel,
    ManifoldRegressor,
    SpectralGAN,
    SPOTAdaptation,
    Translator,
)
from lightning_rectify.modules.manifold import ChartNet, Sphere
from lightning_rectify.nn.spectral import bake

BATCH, SOURCE, TARGET = Dim("batch", min=1), Dim("source", min=1), Dim("target", min=1)


@dataclass(frozen=True)
class Case:
    """A network that is exported.

    Attributes:
        network: in evaluation mode.
        draw: inputs of a batch of so many, of lengths that differ with it.
        shapes: sizes that may change, one dict an input.
        tolerance: absolute, of float32: kernels may differ with the batch, and another runtime adds in another order.
    """

    network: nn.Module
    draw: Callable[[int], tuple[torch.Tensor, ...]]
    shapes: tuple[dict[int, Any], ...] = ({0: BATCH},)
    tolerance: float = 1e-5


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with every weight a little elsewhere: what an average is told apart from the last weights by."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def gan(**options: Any) -> SpectralGAN:
    """A small one, with an average of the generator that is not its last weights."""
    sizes = {"generator_width": 16, "discriminator_width": 16, "latent_size": 16, "in_channels": 1}
    module = SpectralGAN(**sizes, **options).eval()
    shaken(module.averaged("generator"))
    return module


def generator() -> Case:
    module = gan()
    return Case(module, lambda size: (torch.rand(size, module.latent_size) * 2 - 1,))


def conditional_generator() -> Case:
    module = gan(num_classes=3)
    shapes = ({0: BATCH}, {0: BATCH})
    return Case(module, lambda size: (torch.rand(size, module.latent_size) * 2 - 1, torch.randint(3, (size,))), shapes)


def baked_discriminator() -> Case:
    """After ``bake`` there is no trace of the factors: plain layers, plain weights."""
    return Case(bake(gan().discriminator), lambda size: (torch.rand(size, 1, 32, 32) * 2 - 1,))


def plan() -> Case:
    """Pairs of a transport plan, in the data's units."""
    module = SPOT(width=16, critic_width=16, standardize=False).eval()
    module.averaged("generator")  # made with the first step or answer
    return Case(module, lambda size: (torch.randn(size, module.latent_size),))


def transport_map() -> Case:
    torch.manual_seed(0)
    network = SPOT(width=16, critic_width=16, standardize=False).transport_map(neighbours=3, pool=200).eval()
    return Case(network, lambda size: (torch.randn(size, 2),))


def image_map() -> Case:
    """Images of one domain to the other's side, with their latents."""
    module = SPOTAdaptation(generator_width=4, critic_width=4, classifier_width=16, latent_size=4)
    network = module.averaged("generator").eval()
    return Case(network, lambda size: (torch.rand(size, 1, 16, 16), torch.randn(size, 4)), ({0: BATCH}, {0: BATCH}))


def classifier() -> Case:
    return Case(ImageClassifier(network_args={"width": 4}).eval(), lambda size: (torch.randn(size, 1, 8, 8),))


def robust_classifier() -> Case:
    """With its normalization inside: pixels go in."""
    module = L2LDefense(classifier_args={"width": 4}, attacker_args={"width": 4}, mean=0.3, std=0.2)
    return Case(module.eval(), lambda size: (torch.rand(size, 1, 8, 8),))


def translator() -> Case:
    """Logits of the next token, for any number and length of sentences."""
    torch.manual_seed(0)
    module = Translator(vocab_size=50, width=32, heads=2, feedforward=64, encoder_layers=1, decoder_layers=1)

    def draw(size: int) -> tuple[torch.Tensor, ...]:
        return torch.randint(4, 50, (size, size + 2)), torch.randint(4, 50, (size, 2 * size + 1))

    return Case(module.eval(), draw, ({0: BATCH, 1: SOURCE}, {0: BATCH, 1: TARGET}))


class NextWord(nn.Module):
    """docs/export.md: one word (B, 1) and the state (2, K, B, H) to log-probabilities (B, V) and the next state."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, words: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, state = self.network.recurrent(words, state)
        return self.network.softmax.log_prob(features[:, -1]), state


def language_model() -> Case:
    torch.manual_seed(0)
    module = LanguageModel(vocab_size=60, embedding_size=16, hidden_size=32, cutoffs=[20, 40]).eval()
    shapes = ({0: BATCH}, {2: BATCH})
    return Case(NextWord(module.network), lambda n: (torch.randint(60, (n, 1)), torch.randn(2, 2, n, 32)), shapes)


def regressor() -> Case:
    angle = torch.linspace(0, 6.28, 200)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    module = ManifoldRegressor(in_features=2, dim=1, degree=2).fit_points(circle, (3 * angle).sin())
    return Case(module.eval(), lambda size: (circle[:: 200 // size][:size] * 1.01,))


def chart_net() -> Case:
    """The network of the proof, unit by unit. In float64, of depth 20: what it says is right to 1e-10."""
    network = ChartNet.from_manifold(
        Sphere(1, frame=torch.eye(3, 2, dtype=torch.float64)), lambda x: x[:, 0] * x[:, 1], grid=4
    ).to_layered()

    def draw(size: int) -> tuple[torch.Tensor, ...]:
        angle = torch.linspace(0, 6, size, dtype=torch.float64)
        return (torch.stack([angle.cos(), angle.sin(), 0 * angle], 1),)

    return Case(network, draw, tolerance=1e-10)


CASES = {
    make.__name__: make
    for make in (
        generator,
        conditional_generator,
        baked_discriminator,
        plan,
        transport_map,
        image_map,
        classifier,
        robust_classifier,
        translator,
        language_model,
        regressor,
        chart_net,
    )
}
