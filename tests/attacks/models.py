"""Small models with known answers."""

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits linear in the pixels, in float64: the worst case in a ball is known in closed form."""

    def __init__(self, classes=2, shape=(1, 3, 4), seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, *shape, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.flatten(1).T


def smooth(classes=4, shape=(2, 4, 4), seed=0, scale=3.0) -> nn.Module:
    """A float64 network without kinks, so that rounding cannot flip the sign of a gradient."""
    torch.manual_seed(seed)
    size = shape[0] * shape[1] * shape[2]
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, classes)).double()
    with torch.no_grad():
        net[1].weight.mul_(scale)
        net[3].weight.mul_(scale)
    return net.eval()


def batch(n=6, classes=4, shape=(2, 4, 4), seed=1, low=0.0, high=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=dtype)
    return images, torch.randint(classes, (n,), generator=generator)


def excess(images: Tensor, attacked: Tensor, epsilon: float, norm: str) -> float:
    """How far outside the ball, in exact enough arithmetic: float64 holds differences of float32 numbers exactly."""
    offset = (attacked.double() - images.double()).flatten(1)
    size = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    return (size - epsilon).max().item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
