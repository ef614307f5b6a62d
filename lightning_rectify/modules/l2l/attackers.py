"""Networks that learn to attack: from an image and the classifier's gradient to a direction for each pixel.

Four by name: the three of the authors' code ("wide", "slim", "two_layer") and "strided", a small one that does not cost
more than the small classifier it attacks. A network's output is any real number; the attack is
``epsilon * tanh(output)`` (see :mod:`lightning_rectify.modules.l2l.learned`).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.modules.image_networks import given_network

Norm = Literal["batch", "group", "none"]

_SQRT2 = math.sqrt(2.0)


def build_attacker(
    name: str, channels: int, gradient: bool = True, warm_start: bool = False, **kwargs: Any
) -> nn.Module:
    """Build an attacker by name.

    Args:
        name: "wide", "two_layer" (:class:`FullResolutionAttacker`), "slim" or "strided" (:class:`StridedAttacker`).
        channels: channels C of an image, at least 1.
        gradient: whether it sees the gradient (2 C channels in) or the image alone (C).
        warm_start: start as a soft FGSM: the last convolution passes the scaled gradient on, and its other weights are
            a tenth of what they were. Needs ``gradient``, and a network whose last convolution sees its input.
        **kwargs: of the network: ``width``, ``norm``, ``skip`` (of "wide" and "two_layer"), ``gain``.

    Returns:
        A network that maps (N, 2 C or C, H, W) to (N, C, H, W).

    Raises:
        ValueError: for an unknown name or arguments, or a warm start that cannot be.

    Example:
        >>> attacker = build_attacker("strided", channels=1)
        >>> sum(p.numel() for p in attacker.parameters())
        7117
    """
    check_types(build_attacker, locals())
    check_least(1, channels=channels)
    check_choice(_NAMED, attacker=name)
    inputs = 2 * channels if gradient else channels
    try:
        network = _NAMED[name](inputs, channels, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"Expected argument `attacker_args` to fit attacker {name!r} but got {kwargs}: {error}."
        ) from error
    if warm_start:
        if not gradient or not network.skip:
            raise ValueError(
                "Expected argument `warm_start` to be False for an attacker that does not see the gradient, or whose "
                f"last convolution does not ({name!r}: `skip`), but got True."
            )
        _pass_gradient_on(network.head, channels)
    return network


def make_attacker(
    attacker: str | nn.Module, arguments: dict[str, Any] | None, channels: int, gradient: bool, warm_start: bool | None
) -> nn.Module:
    """The attacker that was passed, or the one of this name.

    Args:
        attacker: a network, or a name for :func:`build_attacker`.
        arguments: of the network, for one given by name.
        channels: channels C of an image.
        gradient: whether it sees the gradient.
        warm_start: as :func:`build_attacker` has it; None: if this attacker can.

    Raises:
        ValueError: for arguments or a warm start of a network passed as an object; as :func:`build_attacker`.
    """
    network = given_network("attacker", attacker, arguments)
    if network is None:
        name, arguments = str(attacker), arguments or {}
        if warm_start is None:
            warm_start = gradient and (name in ("strided", "slim") or bool(arguments.get("skip")))
        return build_attacker(name, channels, gradient, warm_start, **arguments)
    if warm_start:
        raise ValueError("Expected argument `warm_start` to be None for an attacker passed as an object but got True.")
    return network


class FullResolutionAttacker(nn.Module):
    """Residual blocks at the image's own resolution: the released "wide" and "two_layer" attackers.

    A 3x3 convolution, normalization and ReLU; residual blocks of ``width`` times ``multiples``; normalization, and a
    3x3 convolution to the image's channels. The authors' two classes hold one more number, a scale that their forward
    pass never reads; it is left out here, as a parameter without gradient stops a run on several processes.

    Args:
        inputs: channels in.
        outputs: channels out, those of an image.
        multiples: widths of stem and blocks in units of ``width``; (1, 2, 4, 2, 1) is "wide", (1, 2, 1) "two_layer".
        width: channels of the narrowest layer, at least 1; 64 as released.
        norm: "batch" as released, "group" (an example's result then does not depend on its batch) or "none".
        skip: give the last convolution the input as well, which a warm start needs; not so as released.
        gain: factor of the output, above 0.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        multiples: Sequence[int] = (1, 2, 4, 2, 1),
        width: int = 64,
        norm: Norm = "batch",
        skip: bool = False,
        gain: float = 1.0,
    ) -> None:
        check_types(FullResolutionAttacker, locals())
        check_least(1, inputs=inputs, outputs=outputs, width=width)
        _check_multiples(multiples)
        super().__init__()
        _check(norm, gain)
        widths = [width * multiple for multiple in multiples]
        self.stem = _stem(inputs, widths[0], norm, stride=1)
        self.blocks = nn.Sequential(*map(partial(ResidualBlock, norm=norm), widths, widths[1:]))
        self.norm = _norm(norm, widths[-1])
        self.head = nn.Conv2d(widths[-1] + inputs * skip, outputs, kernel_size=3, padding=1)
        self.skip, self.gain = skip, gain

    def forward(self, inputs: Tensor) -> Tensor:
        """Directions (N, outputs, H, W), any real numbers, of (N, inputs, H, W)."""
        features = self.norm(self.blocks(self.stem(inputs)))
        if self.skip:
            features = torch.cat([features, inputs], dim=1)
        return self.gain * self.head(features)


class StridedAttacker(nn.Module):
    """Works at half the resolution and sees its input again before the last convolution: "slim" and "strided".

    A 3x3 convolution of stride 2, normalization and ReLU; residual blocks; a transposed 4x4 convolution of stride 2,
    normalization and ReLU; the input beside it; a 3x3 convolution to the image's channels.

    Args:
        inputs: channels in.
        outputs: channels out, those of an image.
        multiples: widths of stem and blocks in units of ``width``; (1, 2, 1) is "slim", (1, 1) "strided".
        width: channels of the stem; 128 for "slim" as released, 16 for "strided".
        shrink: ``width`` over the channels behind the transposed convolution, which are at least 1.
        norm: "batch", "group" (an example's result then does not depend on its batch) or "none".
        norm_before_up: normalize before the transposed convolution, as released.
        head_bias: whether the last convolution has a bias.
        gain: factor of the output, above 0.
        learn_gain: let training change it, as released.

    Raises:
        ValueError: for an argument outside its range.
    """

    skip = True

    def __init__(
        self,
        inputs: int,
        outputs: int,
        multiples: Sequence[int] = (1, 1),
        width: int = 16,
        shrink: int = 2,
        norm: Norm = "batch",
        norm_before_up: bool = False,
        head_bias: bool = True,
        gain: float = 2.0,
        learn_gain: bool = False,
    ) -> None:
        check_types(StridedAttacker, locals())
        check_least(1, inputs=inputs, outputs=outputs, shrink=shrink, width=width)
        _check_multiples(multiples)
        super().__init__()
        _check(norm, gain)
        widths = [width * multiple for multiple in multiples]
        up = max(1, width // shrink)
        self.stem = _stem(inputs, widths[0], norm, stride=2)
        self.blocks = nn.Sequential(*map(partial(ResidualBlock, norm=norm), widths, widths[1:]))
        self.norm = _norm(norm, widths[-1]) if norm_before_up else nn.Identity()
        deconvolution = nn.ConvTranspose2d(widths[-1], up, kernel_size=4, stride=2, padding=1, bias=norm == "none")
        self.up = nn.Sequential(deconvolution, _norm(norm, up, affine=True), nn.ReLU())
        self.head = nn.Conv2d(up + inputs, outputs, kernel_size=3, padding=1, bias=head_bias)
        self.gain = nn.Parameter(torch.tensor(gain)) if learn_gain else gain

    def forward(self, inputs: Tensor) -> Tensor:
        """Directions (N, outputs, H, W), any real numbers, of (N, inputs, H, W)."""
        features = self.up(self.norm(self.blocks(self.stem(inputs))))
        features = features[:, :, : inputs.shape[2], : inputs.shape[3]]  # an odd side comes back one longer
        return self.gain * self.head(torch.cat([features, inputs], dim=1))


class ResidualBlock(nn.Module):
    """Normalization, PReLU, 3x3 convolution, twice, beside a shortcut (a 1x1 convolution if the width changes).

    Normalization has no parameters. Xavier-uniform weights, of gain sqrt(2) for 3x3 and 1 for 1x1.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        norm: "batch", "group" or "none".
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = "batch") -> None:
        super().__init__()
        first = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        second = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.residual = nn.Sequential(
            _norm(norm, in_channels), nn.PReLU(), first, _norm(norm, out_channels), nn.PReLU(), second
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)
            nn.init.xavier_uniform_(self.shortcut.weight)
        for layer in (first, second):
            nn.init.xavier_uniform_(layer.weight, gain=_SQRT2)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, out_channels, H, W) of (N, in_channels, H, W)."""
        return self.residual(features) + self.shortcut(features)


_NAMED: dict[str, Any] = {
    "strided": StridedAttacker,
    "slim": partial(
        StridedAttacker,
        multiples=(1, 2, 1),
        width=128,
        shrink=8,
        norm_before_up=True,
        head_bias=False,
        gain=5.0,
        learn_gain=True,
    ),
    "two_layer": partial(FullResolutionAttacker, multiples=(1, 2, 1)),
    "wide": FullResolutionAttacker,
}


def _stem(inputs: int, width: int, norm: Norm, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, width, kernel_size=3, stride=stride, padding=1, bias=norm == "none")
    return nn.Sequential(convolution, _norm(norm, width, affine=True), nn.ReLU())


def _norm(kind: Norm, channels: int, affine: bool = False) -> nn.Module:
    if kind == "batch":
        # The released layers with parameters have eps 1e-3, those without torch's default.
        return nn.BatchNorm2d(channels, eps=1e-3 if affine else 1e-5, affine=affine)
    if kind == "group":
        return nn.GroupNorm(channels // math.gcd(8, channels), channels, affine=affine)
    return nn.Identity()


@torch.no_grad()
def _pass_gradient_on(head: nn.Conv2d, channels: int) -> None:
    """The last convolution's input ends in image and gradient, C channels each."""
    head.weight.mul_(0.1)
    if head.bias is not None:
        head.bias.mul_(0.1)
    first = head.in_channels - channels
    for channel in range(channels):
        head.weight[channel, first + channel, 1, 1] = 1.0


def _check_multiples(multiples: Sequence[int]) -> None:
    if len(multiples) < 2 or min(multiples) < 1:
        raise ValueError(
            f"Expected argument `multiples` to be two or more integers of at least 1, of the stem and of each block, "
            f"but got {multiples!r}."
        )


def _check(norm: str, gain: float) -> None:
    check_choice(("batch", "group", "none"), norm=norm)
    if not 0 < gain < math.inf:
        raise ValueError(f"Expected argument `gain` to be above 0 but got {gain!r}.")
