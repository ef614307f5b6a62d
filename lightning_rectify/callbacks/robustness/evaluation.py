"""One model, one set of images, one ball: attacks run on the images that are left, and what each of them broke."""

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.attacks.common import Model, input_gradient
from lightning_rectify.seeds import derive_seed

#: (model, images (N, C, H, W), labels (N,), generator) -> adversarial images (N, C, H, W)
Attack = Callable[[Model, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one attack did.

    Attributes:
        faced: which images it was run on, bool (N,).
        broken: which of them are misclassified after it, inside ball and bounds, bool (N,).
        loss: cross-entropy after it, float64 (N,); NaN where it was not run.
        outside: how many it left outside ball or bounds; not counted as broken.
        changed: whether it changed any image.
        seconds: wall clock.
    """

    faced: np.ndarray
    broken: np.ndarray
    loss: np.ndarray
    outside: int
    changed: bool
    seconds: float


def perturbation_sizes(images: Tensor, attacked: Tensor, norm: str) -> Tensor:
    """Size of each perturbation in the norm, float64 (N,), so that rounding of the measure itself plays no part.

    Args:
        images: shape (N, C, H, W).
        attacked: the same shape.
        norm: "linf" or "l2".
    """
    delta = (attacked.cpu().double() - images.cpu().double()).flatten(1)  # some devices have no float64
    return delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)


class Evaluation:
    """Runs attacks in batches, each with a generator of its own, and scores what they return.

    An attack's draws depend on the seed, its name, and the batch; not on what ran before it.

    Args:
        model: images in pixel units to logits; in evaluation mode already.
        images: shape (N, C, H, W), float32, on the CPU.
        labels: shape (N,), int64.
        norm: "linf" or "l2".
        bounds: of a pixel.
        batch_size: images at a time.
        device: where the model is.
        seed: at least 0.
        say: shows progress.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        norm: str,
        bounds: tuple[float, float],
        batch_size: int,
        device: torch.device,
        seed: int,
        say: "Progress",
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.norm, self.bounds, self.batch_size = norm, bounds, batch_size
        self.device, self.seed, self.say = device, seed, say

    def logits(self) -> Tensor:
        """Those of all images, float32, shape (N, K), on the CPU."""
        with torch.no_grad():
            logits = torch.cat([self.model(images).float().cpu() for _, images, _ in self._batches(self._all())])
        classes = logits.shape[1] if logits.dim() == 2 else 0
        if logits.shape != (len(self.images), classes) or classes < 2:
            raise ValueError(
                "Expected argument `model` to return logits (N, K) with at least 2 classes but got "
                f"{tuple(logits.shape)} for {len(self.images)} images."
            )
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise ValueError(
                f"Expected argument `data` to hold labels from 0 to {classes - 1}, one a logit, but got labels from "
                f"{int(self.labels.min())} to {int(self.labels.max())}."
            )
        return logits

    def repeat_difference(self) -> float:
        """Largest difference between logits of the first batch whole, again, and image by image in small parts.

        Of the largest logit. A model that is random, or looks at the rest of the batch, shows here.
        """
        _, images, _ = next(self._batches(self._all()))
        with torch.no_grad():
            first, again = self.model(images).cpu().double(), self.model(images).cpu().double()
            small = images.flip(0).split(max(1, len(images) // 3))
            parts = torch.cat([self.model(part).cpu().double() for part in small])
        scale = max(float(first.abs().max()), 1e-12)
        return max(float((first - other).abs().max()) for other in (again, parts.flip(0))) / scale

    def zero_gradients(self, chosen: np.ndarray) -> float:
        """Share of the chosen images whose gradient of the cross-entropy is zero or not finite; 0.0 without any."""
        zero = 0
        for _, images, labels in self._batches(chosen):
            gradient, _, _ = input_gradient(self.model, images, labels, loss="ce")
            largest = gradient.flatten(1).abs().amax(dim=1)
            zero += int((~(torch.isfinite(largest) & (largest > 0))).sum())
        return zero / max(int(chosen.sum()), 1)

    def run(self, name: str, attack: Attack, chosen: np.ndarray, epsilon: float) -> Outcome:
        """Attack the chosen images.

        Args:
            name: what progress shows, and part of the seed.
            attack: called batch by batch.
            chosen: which images, bool (N,).
            epsilon: radius of the ball that the attack must keep.
        """
        begin, outside, changed = time.perf_counter(), 0, False
        broken = np.zeros(len(self.images), dtype=bool)
        loss = np.full(len(self.images), np.nan)
        total, done = int(chosen.sum()), 0
        for number, (places, images, labels) in enumerate(self._batches(chosen)):
            attacked = attack(self.model, images, labels, self._generator(name, number)).detach()
            if attacked.shape != images.shape:
                raise ValueError(
                    f"Expected attack {name!r} to return images {tuple(images.shape)} but got {tuple(attacked.shape)}."
                )
            inside = self._inside(images, attacked, epsilon)
            with torch.no_grad():
                logits = self.model(attacked.to(images)).cpu().double()
            wrong = (logits.argmax(dim=1) != labels.cpu()) | ~torch.isfinite(logits).all(dim=1)
            broken[places] = (wrong & inside).numpy()
            loss[places] = F.cross_entropy(logits, labels.cpu(), reduction="none").numpy()
            outside += int((~inside).sum())
            changed = changed or not torch.equal(attacked.to(images), images)
            done += len(places)
            self.say.share(name, done, total)
        seconds = time.perf_counter() - begin
        self.say.done(name, total, int(broken.sum()), seconds)
        return Outcome(chosen.copy(), broken, loss, outside, changed, seconds)

    def _inside(self, images: Tensor, attacked: Tensor, epsilon: float) -> Tensor:
        low, high = self.bounds
        rounding = 1e-6 * (high - low)  # half a unit of float32 at the largest pixel is 6e-8 of it
        size = perturbation_sizes(images, attacked, self.norm)
        pixels = attacked.cpu().double().flatten(1)
        within = (pixels.amin(dim=1) >= low - rounding) & (pixels.amax(dim=1) <= high + rounding)
        return within & (size <= epsilon * (1 + 1e-6) + rounding)

    def _all(self) -> np.ndarray:
        return np.ones(len(self.images), dtype=bool)

    def _batches(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        for places in np.split(np.flatnonzero(chosen), range(self.batch_size, int(chosen.sum()), self.batch_size)):
            if len(places):
                index = torch.from_numpy(places)
                yield places, self.images[index].to(self.device), self.labels[index].to(self.device)

    def _generator(self, name: str, number: int) -> torch.Generator:
        seed = derive_seed(self.seed, zlib.crc32(name.encode()), number)
        return torch.Generator(self.device).manual_seed(seed)


def noise_attack(epsilon: float, norm: str, bounds: tuple[float, float]) -> Attack:
    """Random noise on the sphere of radius epsilon (a corner of the cube for "linf"), cut off at the bounds."""

    def attack(model: Model, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        direction = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        if norm == "linf":
            delta = epsilon * direction.sign()
        else:
            size = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)
            delta = epsilon * direction / size
        return (images + delta).clamp(*bounds)

    return attack


def whole_space(norm: str, bounds: tuple[float, float], images: Tensor) -> float:
    """The radius from which the ball around any image holds every other."""
    width = bounds[1] - bounds[0]
    return width if norm == "linf" else width * math.sqrt(images[0].numel())


def device_of(modules: Iterable[nn.Module]) -> torch.device:
    """The device of the first parameter or buffer of these modules; the CPU without any."""
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            return tensor.device
    return torch.device("cpu")


class Progress:
    """One line on standard error that follows a long attack; plain lines where it is no terminal.

    Args:
        on: whether to say anything.
    """

    def __init__(self, on: bool) -> None:
        self.on, self._live = on, on and sys.stderr.isatty()
        self._begin, self._name, self._said = 0.0, "", 0.0

    def share(self, name: str, done: int, total: int) -> None:
        """An attack is through with so many of its images."""
        now = time.perf_counter()
        if name != self._name:
            self._name, self._begin, self._said = name, now, now
        if self._live and done < total and now - self._said > 0.5:
            left = (now - self._begin) / max(done, 1) * (total - done)
            self._said = now
            print(f"\r  {name}: {done} of {total} images, {left:.0f} s left   ", end="", file=sys.stderr, flush=True)

    def done(self, name: str, total: int, broken: int, seconds: float) -> None:
        """An attack is through."""
        if self.on:
            line = f"  {name}: {broken} of {total} images broken, {seconds:.1f} s"
            print(f"\r{line:<70}" if self._live else line, file=sys.stderr, flush=True)
