"""How close generated images are to real ones, by the features of one extractor.

The paper (arXiv:1812.10912) reports Inception scores and Frechet Inception distances. Here their torchmetrics versions
run on the features of any :class:`FeatureExtractor`, beside KID, MiFID, and precision, recall, density and coverage,
which torchmetrics does not have.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from lightning_rectify.arguments import check_least
from lightning_rectify.modules.spectral_gan._balls import check_pair, density_coverage, precision_recall
from lightning_rectify.modules.spectral_gan._extractor import FeatureExtractor, forked_seed
from lightning_rectify.modules.spectral_gan.features import InceptionFeatures

__all__ = ["GenerationMetrics", "density_coverage", "kid_interval", "precision_recall"]

_SPLIT = 100  # images in a split of the Inception score, at least


class GenerationMetrics(nn.Module):
    """Metrics of generated against real images; each image goes through the extractor once.

    :meth:`update` with real and generated images in any order and in batches of any size, then :meth:`compute`. Over
    several processes each updates with its own images, and ``compute``, which all must call, returns to all the numbers
    of all images together.

    Nothing of it enters a checkpoint, neither the extractor's weights nor images seen: a module can own it as an
    attribute. The extractor follows the device of the images. Nothing is drawn from the global random state, and the
    same images in the same order give the same numbers.

    Every feature is kept until :meth:`reset`: 4 bytes each, 50,000 images of 2,048 take 400 MB.

    Args:
        extractor: what makes features of images; ``prepare`` it first if it must be trained.
        kid_subsets: draws over which KID is averaged, at least 1.
        kid_subset_size: images in a draw, at least 2; with fewer images, all of them.
        neighbours: the k of precision, recall, density and coverage, at least 1.
        seed: of KID's draws, and of the order in which the Inception score splits images; at least 0.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        kid_subsets: int = 50,
        kid_subset_size: int = 100,
        neighbours: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_least(0, seed=seed)
        check_least(1, kid_subsets=kid_subsets, neighbours=neighbours)
        check_least(2, kid_subset_size=kid_subset_size)
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        self.neighbours, self.seed = neighbours, seed
        self._extractor = (extractor,)  # a tuple: not a child, so not in the state dict
        self._store = _FeatureStore()

    @property
    def extractor(self) -> FeatureExtractor:
        """What makes features of images."""
        return self._extractor[0]

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Take in images.

        Args:
            images: in [-1, 1], float, shape (B, C, H, W). Generated images beyond are cut off there, as they would be
                when saved.
            real: whether they are real or generated.

        Raises:
            ValueError: if real images are not in [-1, 1] (``ImageData(normalization="symmetric")`` makes them so), or
                features are not finite (a generator that diverged).
        """
        if real and len(images) and not images.abs().max() <= 1 + 1e-3:  # interpolation may overshoot by a rounding
            raise ValueError(
                "Expected argument `images` to be in [-1, 1] (ImageData's normalization 'symmetric') but got real "
                f"images from {images.min().item():.4g} to {images.max().item():.4g}."
            )
        features, logits = self.extractor.to(images.device)(images.clamp(-1, 1))
        if not torch.isfinite(features).all():
            raise ValueError(
                f"Expected argument `images` to give finite features but got {'real' if real else 'generated'} images "
                f"of which {int((~torch.isfinite(features)).any(dim=1).sum())} of {len(images)} do not."
            )
        self._store.update("real" if real else "fake", features)
        if not real and logits is not None:
            self._store.update("logits", logits)

    def reset(self, real: bool = True) -> None:
        """Forget the images.

        Args:
            real: False keeps the features of the real ones, for the next round of generated images.
        """
        kept = list(self._store.real)
        self._store.reset()
        if not real:
            for features in kept:
                self._store.update("real", features)

    def compute(self) -> dict[str, float]:
        """All metrics, by a key made of metric, extractor's name and number of images.

        The key is ``{metric}_{name}_n{M}`` where M images were generated and as many real ones seen, else
        ``{metric}_{name}_n{M}vs{N}`` with the number N of real ones. All but KID depend on these numbers themselves:
        values with different ones do not compare. The metrics:

        - ``fd``: Frechet distance of the features' normal approximations (arXiv:1706.08500), in float64; ``fid`` for
          :class:`InceptionFeatures`. Biased up, the more so the fewer images there are for each feature.
        - ``kid``, ``kid_std``: squared kernel MMD, unbiased, with a cubic kernel (arXiv:1801.01401): mean and standard
          deviation over draws. May be negative.
        - ``is``: Inception score (arXiv:1606.03498) of generated images, mean over ten splits, or fewer so that a split
          has 100 images; only if the extractor makes logits. Biased down where splits are small.
        - ``mifid``: ``fd`` over the mean cosine distance of a generated image to the nearest real one, if that is below
          0.1, else ``fd`` (arXiv:2106.03062): very large (1e14 times ``fd``) for copies of real images.
        - ``precision``, ``recall``, ``density``, ``coverage``: see :func:`precision_recall` and
          :func:`density_coverage`; only with more than ``neighbours`` images of each.

        Raises:
            ValueError: with fewer than two real or two generated images.
        """
        real, fake, logits = self._gathered()
        if len(real) < 2 or len(fake) < 2:
            raise ValueError(
                "Expected two real and two generated images at least before `compute` but got "
                f"{len(real)} and {len(fake)}."
            )
        frechet = "fid" if isinstance(self.extractor, InceptionFeatures) else "fd"
        found = {frechet: _frechet_distance(real, fake)}
        found["kid"], found["kid_std"] = self._kid(real, fake)
        if len(logits):
            found["is"] = self._inception_score(logits)
        found["mifid"] = _mifid(real, fake)
        if min(len(real), len(fake)) > self.neighbours:
            found["precision"], found["recall"] = precision_recall(real, fake, self.neighbours)
            found["density"], found["coverage"] = density_coverage(real, fake, self.neighbours)
        count = f"n{len(fake)}" + (f"vs{len(real)}" if len(real) != len(fake) else "")
        return {f"{metric}_{self.extractor.name}_{count}": value for metric, value in found.items()}

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Real and generated features and logits of all processes, float64, on the CPU or a CUDA device."""
        widths = {"real": self.extractor.num_features, "fake": self.extractor.num_features}
        widths["logits"] = self.extractor.num_classes or 0
        store = self._store
        device = next((part[0].device for part in (store.real, store.fake) if part), store.device)
        for name, width in widths.items():
            # Also a process without images must bring a matrix to the gathering, or the others would wait for it.
            store.update(name, torch.empty(0, width, device=device))
        with _quiet():
            gathered = store.compute()
        # Other devices may lack float64. The store squeezes a matrix of one entry.
        real, fake, logits = (
            (part if part.is_cuda else part.cpu()).double().reshape(-1, width) if width else part
            for part, width in ((gathered[name], width) for name, width in widths.items())
        )
        return real, fake, logits

    def _kid(self, real: Tensor, fake: Tensor) -> tuple[float, float]:
        metric = _kid_metric(real, fake, self.kid_subsets, self.kid_subset_size)
        with forked_seed(self.seed), _quiet():
            mean, std = metric.compute()
        return mean.item(), std.item()

    def _inception_score(self, logits: Tensor) -> float:
        with forked_seed(self.seed), _quiet():  # one split has no standard deviation: a warning
            splits = min(max(len(logits) // _SPLIT, 1), 10)
            metric = InceptionScore(_AsTheyAre(logits.shape[1]), splits=splits, sync_on_compute=False)
            # In float64, where a probability times the log of its mean cannot become 0 times infinity.
            metric.update(logits)
            return metric.compute()[0].item()


def kid_interval(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 100, seed: int = 0
) -> tuple[float, float, float]:
    """KID, and the interval that holds 95 % of its values over random subsets.

    The interval is the spread of a KID of ``subset_size`` images of each set, drawn without replacement; it is wider
    than the uncertainty of the mean, and does not see what another training run would change.

    Args:
        real: features of real images, shape (N, F).
        fake: features of generated images, shape (M, F).
        subsets: number of draws, at least 2.
        subset_size: images in a draw, at least 2; lowered to N and M if need be (then there is no spread).
        seed: of the draws, at least 0.

    Returns:
        Mean, 2.5 % and 97.5 % quantile.

    Raises:
        ValueError: if shapes do not fit or an argument is outside its range.
    """
    check_pair(real, fake, 1, smallest=min(len(real), len(fake)))
    check_least(0, seed=seed)
    check_least(2, subsets=subsets, subset_size=subset_size)
    metric = _kid_metric(real.double(), fake.double(), 1, subset_size)
    with forked_seed(seed), _quiet():
        values = torch.stack([metric.compute()[0] for _ in range(subsets)])
    low_, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype, device=values.device))
    return values.mean().item(), low_.item(), high.item()


class _FeatureStore(Metric):
    """Features by kind, joined over processes; torchmetrics' own metrics would each send them again."""

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]
    logits: list[Tensor]

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)  # a second copy of all features
        for name in ("real", "fake", "logits"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, kind: str, values: Tensor) -> None:
        getattr(self, kind).append(values.detach())

    def compute(self) -> dict[str, Tensor]:
        parts = {kind: getattr(self, kind) for kind in ("real", "fake", "logits")}
        return {kind: part if isinstance(part, Tensor) else torch.cat(part) for kind, part in parts.items()}


class _AsTheyAre(nn.Module):
    """The feature network of a metric that is given features. Without ``num_features`` it would draw an image."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out torchmetrics' warnings: of memory that is used anyhow, and of the missing std of one split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _frechet_distance(real: Tensor, fake: Tensor) -> float:
    metric = FrechetInceptionDistance(_AsTheyAre(real.shape[1]), sync_on_compute=False).to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return max(metric.compute().item(), 0.0)  # rounding may leave equal sets just below zero


def _mifid(real: Tensor, fake: Tensor) -> float:
    metric = MemorizationInformedFrechetInceptionDistance(_AsTheyAre(real.shape[1]), sync_on_compute=False)
    # In turned roles: torchmetrics takes the mean over the set it calls real, the definition over generated images.
    metric.update(fake, real=True)
    metric.update(real, real=False)
    return metric.compute().item()


def _kid_metric(real: Tensor, fake: Tensor, subsets: int, subset_size: int) -> KernelInceptionDistance:
    with _quiet():
        metric = KernelInceptionDistance(
            _AsTheyAre(real.shape[1]), subsets=subsets, subset_size=min(subset_size, len(real), len(fake)),
            sync_on_compute=False, compute_with_cache=False,
        )  # fmt: skip
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric
