"""What a training step costs, counted in passes through the networks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rectify.nn.modes import evaluating


@dataclass(frozen=True)
class Passes:
    """Passes of one training step (one batch) through classifier and attacker.

    In units of a forward pass of the classifier, a backward pass to the images alone costs 1, one to the weights (and
    the images) 2; so for the attacker, whose forward pass costs ``attacker_ratio`` of the classifier's. Normalization
    layers, optimizers and loading are left out: little beside big networks, much beside small ones.

    Args:
        forward: forward passes of the classifier.
        backward_images: its backward passes to the images alone.
        backward: its backward passes to its weights.
        attacker_forward: forward passes of the attacker.
        attacker_backward: its backward passes to its weights.
        attacker_ratio: multiplications of a forward pass of the attacker, over the classifier's.
    """

    forward: int
    backward_images: int
    backward: int
    attacker_forward: int = 0
    attacker_backward: int = 0
    attacker_ratio: float = 0.0

    @property
    def cost(self) -> float:
        """In forward passes of the classifier."""
        attacker = self.attacker_forward + 2 * self.attacker_backward
        return self.forward + self.backward_images + 2 * self.backward + self.attacker_ratio * attacker

    def against_pgd(self, steps: int = 10) -> float:
        """Cost over that of training with PGD of so many steps, which is 2 ``steps`` + 3.

        Args:
            steps: of PGD, at least 1.

        Example:
            >>> passes = Passes(2, 1, 1, attacker_forward=1, attacker_backward=1, attacker_ratio=0.27)
            >>> round(passes.against_pgd(10), 3)
            0.253
        """
        return self.cost / (2 * steps + 3)


def count_passes(
    attack: str,
    *,
    gradients: int,
    applications: int = 0,
    joint: bool = True,
    classifier_turns: int = 1,
    attacker_turns: int = 1,
    clean: bool = False,
    attacker_ratio: float = 0.0,
) -> Passes:
    """Passes of a training step.

    Args:
        attack: "l2l", "fgsm", "pgd", "trades" or "none".
        gradients: gradients of the images that one attack takes, at least 0.
        applications: of the attacker in one attack.
        joint: one graph and one backward pass for both players.
        classifier_turns: of the classifier, in turns.
        attacker_turns: of the attacker, in turns.
        clean: whether the loss has a clean term.
        attacker_ratio: see :class:`Passes`.
    """
    extra = 1 if clean else 0
    # TRADES attacks the distance to a prediction, which it must make first.
    attack_forward = gradients + (attack == "trades")
    step = {"forward": attack_forward + 1 + extra, "backward_images": gradients, "backward": 1 + extra}
    if attack != "l2l" or joint:
        trained = applications if attack == "l2l" else 0
        if attack != "l2l":
            step = {name: classifier_turns * count for name, count in step.items()}
        return Passes(
            **step,
            attacker_forward=trained,
            attacker_backward=trained,
            attacker_ratio=attacker_ratio if trained else 0.0,
        )
    return Passes(
        forward=classifier_turns * step["forward"] + attacker_turns * (gradients + 1),
        backward_images=classifier_turns * gradients + attacker_turns * (gradients + 1),
        backward=classifier_turns * step["backward"],
        attacker_forward=(classifier_turns + attacker_turns) * applications,
        attacker_backward=attacker_turns * applications,
        attacker_ratio=attacker_ratio,
    )


def forward_ratio(attacker: nn.Module, classifier: nn.Module, images: Tensor, inputs: Tensor) -> float:
    """Multiplications of the attacker's forward pass over those of the classifier's (convolutions and matrices).

    Args:
        attacker: takes ``inputs``.
        classifier: takes ``images``.
        images: shape (N, C, H, W).
        inputs: shape (N, 2 C or C, H, W).
    """
    counts = []
    for network, example in ((attacker, inputs), (classifier, images)):
        # Not by way of __call__: code that is compiled cannot be counted.
        with evaluating(network), FlopCounterMode(display=False) as counter:
            network.forward(example)
        counts.append(counter.get_total_flops())
    return counts[0] / max(counts[1], 1)


def example_inputs(images: Tensor, gradient: bool) -> Tensor:
    """What the attacker sees of images of zeros: (N, 2 C, H, W), or (N, C, H, W) without gradient."""
    return torch.cat([images, torch.zeros_like(images)], dim=1) if gradient else images
