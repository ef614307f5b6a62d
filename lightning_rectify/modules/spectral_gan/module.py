"""``SpectralGAN``: a generator against a discriminator whose singular values are controlled."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lightning_rectify._lightning import OptimizerCallable
from lightning_rectify.arguments import check_choice, check_fraction, check_least, check_types
from lightning_rectify.modules.minimax import MinimaxModule
from lightning_rectify.modules.spectral_gan.features import FeatureExtractor
from lightning_rectify.modules.spectral_gan.losses import get_loss, gradient_penalty, r1_penalty
from lightning_rectify.modules.spectral_gan.metrics import GenerationMetrics
from lightning_rectify.modules.spectral_gan.networks import build_networks
from lightning_rectify.modules.spectral_gan.sampling import draw_latents, lerp, slerp
from lightning_rectify.nn.controls import Control
from lightning_rectify.nn.modes import evaluating
from lightning_rectify.nn.spectral import project, rebuilt_once, spectral_control, spectral_penalty
from lightning_rectify.optim.rectified_adam import RectifiedAdam
from lightning_rectify.seeds import derive_seed


def adam_of_games(params: Any) -> Optimizer:
    """RectifiedAdam with the paper's lr 2e-4 and betas (0.5, 0.999) of the CNN runs."""
    return RectifiedAdam(params, lr=2e-4, betas=(0.5, 0.999))


class SpectralGAN(MinimaxModule):
    """A GAN under spectrum control (Jiang et al. 2019, arXiv:1812.10912).

    Every convolution and linear layer of the discriminator is W = U diag(e) V^T; ``control`` says what e may be, a soft
    penalty keeps U and V orthonormal. Section 1 and 2 of the paper, in the form its authors' code runs it; there the
    generator's step comes first in an iteration, here last, as usual.

    A batch is a pair of images in [-1, 1], float, shape (B, C, H, W), and labels, int64, shape (B,). With ``n_dis``
    above 1 it is cut into so many parts, one a step of the discriminator; give the loader ``n_dis`` times the batch
    size.

    Players, in the order of their steps and optimizers: ``discriminator``, ``generator``. Logged:
    ``train/loss_NAME`` of both; with ``features``, at the end of validation and test, ``val/METRIC_EXTRACTOR_nCOUNT``
    (see :class:`~lightning_rectify.modules.spectral_gan.metrics.GenerationMetrics`) over as many generated images as
    there are real ones. What is sampled and measured comes from the generator's moving average.

    Args:
        network: "cnn" or "resnet".
        image_size: 32 or 48.
        in_channels: channels C of an image.
        generator_width: channels of the generator's widest layer; None for the paper's.
        discriminator_width: the same of the discriminator.
        latent_size: length L of a latent vector; None for the paper's.
        latent_distribution: "uniform" in [-1, 1] or "normal"; None for the paper's: uniform for "cnn".
        generator_norm: "batch", "group" or "none".
        num_classes: K for the conditional form (class-conditional normalisation, projection discriminator).
        loss: "non_saturating", "hinge", "wasserstein" or "least_squares".
        control: preset of ``spectral_control`` (the paper's modes 1, 2, 3, 5, 8 or "normalization", "constraint",
            "lipschitz", "divergence", "d_optimal"), a baseline ("plain", "spectral_norm", "orthogonal"), or controls.
        spectrum_start: "ones" (orthonormal factors, e = 1), "spread" (e at the quantiles of the control's law; what
            "divergence" needs) or "weight" (the layers' own weights).
        orthogonality: weight of the penalty on U and V (on W for "orthogonal").
        retraction: with n above 0, U and V are made orthonormal by QR each n-th step, and there is no penalty.
        gradient_penalty: weight of the gradient penalty (10 in its paper, with "wasserstein").
        r1: weight gamma of the R1 penalty.
        n_dis: steps of the discriminator for one of the generator, at least 1.
        ema_decay: of the generator's moving average, in [0, 1); None samples from the generator itself.
        features: what the metrics see of an image; None for no metrics.
        generator_optimizer: see :class:`MinimaxModule`.
        discriminator_optimizer: the same.
        eval_seed: of the latent vectors of validation, test and prediction, at least 0.
        **kwargs: of :class:`MinimaxModule`, but ``turns``, ``averages`` and ``joint``. ``compile`` leaves out a
            discriminator under ``gradient_penalty`` or ``r1``: compiled code has no second derivatives.

    Raises:
        ValueError: for an argument outside its range; in ``setup``, for data that do not fit.
    """

    players = ("discriminator", "generator")

    def __init__(
        self,
        network: str = "cnn",
        image_size: int = 32,
        in_channels: int = 3,
        generator_width: int | None = None,
        discriminator_width: int | None = None,
        latent_size: int | None = None,
        latent_distribution: str | None = None,
        generator_norm: str = "batch",
        num_classes: int | None = None,
        loss: str = "non_saturating",
        control: int | str | Control | list[int | str | Control] = "d_optimal",
        spectrum_start: str = "ones",
        orthogonality: float = 10.0,
        retraction: int = 0,
        gradient_penalty: float = 0.0,
        r1: float = 0.0,
        n_dis: int = 1,
        ema_decay: float | None = 0.999,
        features: FeatureExtractor | None = None,
        generator_optimizer: OptimizerCallable = adam_of_games,
        discriminator_optimizer: OptimizerCallable = adam_of_games,
        eval_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_types(SpectralGAN, locals())
        check_least(1, n_dis=n_dis)
        check_fraction(ema_decay=ema_decay)
        super().__init__(
            turns={"discriminator": n_dis},
            averages=None if ema_decay is None else {"generator": ema_decay},
            joint=False,
            **kwargs,
        )
        check_least(0, gradient_penalty=gradient_penalty, r1=r1, eval_seed=eval_seed)
        check_choice(("uniform", "normal", None), latent_distribution=latent_distribution)
        self.loss = get_loss(loss)
        generator, discriminator = build_networks(
            network, image_size=image_size, in_channels=in_channels, generator_width=generator_width,
            discriminator_width=discriminator_width, latent_size=latent_size, num_classes=num_classes,
            norm=generator_norm,  # type: ignore[arg-type]
        )  # fmt: skip
        spectral_control(
            discriminator,
            control,
            start=spectrum_start,  # type: ignore[arg-type]
            orthogonality=orthogonality,
            retraction=retraction,
        )
        project(discriminator)
        self.generator, self.discriminator = generator, discriminator
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer
        self.latent_size = int(generator.latent_size)  # type: ignore[arg-type]
        self.latent_distribution: Any = latent_distribution or ("uniform" if network == "cnn" else "normal")
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.gradient_penalty, self.r1, self.eval_seed = gradient_penalty, r1, eval_seed
        self.metrics = None if features is None else GenerationMetrics(features)
        self._eval_generator: torch.Generator | None = None
        latents = torch.zeros(2, self.latent_size)
        self.example_input_array = latents if num_classes is None else (latents, torch.zeros(2, dtype=torch.int64))

    # -- the game ------------------------------------------------------------------------------------------------------

    def latents(self, batch: Any) -> Tensor:
        """Latent vectors for training, one for each image of the batch, shape (B, L), from this rank's generator."""
        return draw_latents(len(batch[0]), self.latent_size, self.latent_distribution, self.noise_generator)

    def discriminator_loss(self, batch: Any) -> Tensor:
        """The adversarial loss, the penalties on the spectrum and, if asked for, those on the gradient."""
        real, labels = batch[0], self._labels(batch)
        fake = self.generator(self.latents(batch), labels).detach()
        both = None if labels is None else labels.repeat(2)
        scores = self.discriminator(torch.cat([real, fake]), both).float()
        loss = self.loss.discriminator(scores[: len(real)], scores[len(real) :])
        loss = loss + spectral_penalty(self.discriminator)
        if self.gradient_penalty > 0:
            mix = torch.rand(len(real), generator=self.noise_generator, device=self.device)
            loss = loss + self.gradient_penalty * gradient_penalty(
                lambda images: self.discriminator(images, labels), real, fake, mix
            )
        if self.r1 > 0:
            loss = loss + self.r1 * r1_penalty(lambda images: self.discriminator(images, labels), real)
        return loss

    def generator_loss(self, batch: Any) -> Tensor:
        """The adversarial loss of as many generated images as the batch has, of the same classes."""
        labels = self._labels(batch)
        return self.loss.generator(self.discriminator(self.generator(self.latents(batch), labels), labels).float())

    def turn_batch(self, batch: Any, player: str, turn: int) -> Any:
        """Each step of the discriminator sees a part of the batch; the generator's has the size of the first."""
        parts = self.turns["discriminator"]
        if parts == 1:
            return batch
        size = len(batch[0]) // parts
        if size < 1:
            raise ValueError(
                f"Expected a batch of at least `n_dis` = {parts} images, one a step of the discriminator, but got "
                f"{len(batch[0])}."
            )
        return [part[turn * size : (turn + 1) * size] for part in batch]

    def networks(self) -> list[nn.Module]:
        """What ``compile`` compiles; without the discriminator where its gradient is penalised.

        Compiled code has no second derivatives, which those penalties need.
        """
        twice = self.gradient_penalty > 0 or self.r1 > 0
        return [self.generator] if twice else [self.discriminator, self.generator]

    def turn_context(self, player: str) -> AbstractContextManager[Any]:
        """The discriminator's weights are rebuilt from their factors once for all that one loss does with them."""
        return rebuilt_once(self.discriminator)

    def on_player_step(self, player: str) -> None:
        """Project the spectrum; update the average."""
        super().on_player_step(player)
        if player == "discriminator":
            project(self.discriminator)

    # -- images --------------------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of latents (B, L) and labels (B,), by the averaged generator."""
        return self.averaged("generator")(latents, labels)

    def sample(
        self, count: int, seed: int = 0, labels: Tensor | None = None, truncation: float | None = None
    ) -> Tensor:
        """Generated images, shape (count, C, H, W), in [-1, 1]; a function of the arguments and the weights.

        Args:
            count: how many, at least 1.
            seed: of the latent vectors, which are the same on every device.
            labels: classes, int64, shape (count,), of a conditional model; by default they take turns.
            truncation: of the latent vectors, above 0.

        Raises:
            ValueError: for an argument outside its range, and for labels of an unconditional model.
        """
        check_least(1, count=count)
        classes = self.num_classes
        if classes is not None and labels is not None and not _are_classes(labels, count, classes):
            raise ValueError(
                f"Expected argument `labels` to be classes from 0 to {classes - 1}, shape ({count},), but got shape "
                f"{tuple(labels.shape)}: {labels}."
            )
        latents = self._seeded_latents(count, seed, truncation)
        return self._decode(latents, self._every_class(count) if labels is None else labels)

    def interpolate(self, pairs: int, steps: int, seed: int = 0) -> Tensor:
        """Images on the way between ``pairs`` pairs of latent vectors, shape (pairs * steps, C, H, W).

        The way is the great arc for normal latents, the straight line for uniform ones. The starts are the first half
        of the latents of ``sample(2 * pairs, seed)``, the ends the second; a pair has one class, the pairs take turns.

        Args:
            pairs: how many, at least 1.
            steps: images of a pair, its ends among them, at least 1.
            seed: of the latent vectors.
        """
        check_least(1, pairs=pairs, steps=steps)
        start, end = self._seeded_latents(2 * pairs, seed).chunk(2)
        path = slerp if self.latent_distribution == "normal" else lerp
        latents = path(start, end, torch.linspace(0, 1, steps, device=self.device))
        labels = self._every_class(pairs)
        return self._decode(latents.flatten(0, 1), None if labels is None else labels.repeat_interleave(steps))

    def _seeded_latents(self, count: int, seed: int, truncation: float | None = None) -> Tensor:
        """Latents on the module's device, drawn on the CPU: a seed means the same images everywhere."""
        generator = torch.Generator().manual_seed(seed)
        return draw_latents(count, self.latent_size, self.latent_distribution, generator, truncation, self.device)

    def _decode(self, latents: Tensor, labels: Tensor | None, chunk: int = 250) -> Tensor:
        images = []
        with evaluating(self.averaged("generator")):
            for start in range(0, len(latents), chunk):
                part = slice(start, start + chunk)
                images.append(self(latents[part], None if labels is None else labels[part].to(self.device)).float())
        return torch.cat(images)

    def _labels(self, batch: Any) -> Tensor | None:
        return batch[1] if self.num_classes is not None else None

    def _every_class(self, count: int) -> Tensor | None:
        return None if self.num_classes is None else torch.arange(count, device=self.device) % self.num_classes

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse data that do not fit; train the extractor if it learns from the data."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        expected = {"in_channels": self.in_channels, "image_size": self.image_size, "normalization": "symmetric"}
        if self.num_classes is not None:
            expected["num_classes"] = self.num_classes
        for name, value in expected.items():
            theirs = getattr(datamodule, name, value)
            if theirs != value:
                raise ValueError(
                    f"Expected argument `{name}` of the datamodule {type(datamodule).__name__} to be {value!r}, which "
                    f"{type(self).__name__} works with, but got {theirs!r}."
                )
        if self.metrics is not None and stage in ("fit", "validate", "test") and datamodule is not None:
            extractor = self.metrics.extractor.to(self.trainer.strategy.root_device)
            if extractor.needs_training and hasattr(datamodule, "training_images"):
                datamodule.setup("fit")  # the test stage alone does not read the training part
                extractor.prepare(*datamodule.training_images())

    def on_validation_epoch_start(self) -> None:
        """The same latent vectors each time."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """The same latent vectors each time."""
        self._start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Feed the metrics with the batch and as many generated images."""
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Feed the metrics with the batch and as many generated images."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_metrics("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """As many images as the batch has examples, of their classes if conditional; a function of batch and rank."""
        images, labels = (batch[0], self._labels(batch)) if isinstance(batch, (tuple, list)) else (batch, None)
        seed = derive_seed(self.eval_seed, self.global_rank, dataloader_idx, batch_idx)
        return self.sample(len(images), seed=seed, labels=labels)

    def _start_evaluation(self) -> None:
        self._eval_generator = torch.Generator().manual_seed(derive_seed(self.eval_seed, self.global_rank))

    def _evaluate(self, batch: Any) -> None:
        if self.metrics is None:
            return
        assert self._eval_generator is not None
        latents = draw_latents(
            len(batch[0]), self.latent_size, self.latent_distribution, self._eval_generator, device=self.device
        )
        self.metrics.update(batch[0], real=True)
        self.metrics.update(self._decode(latents, self._labels(batch)), real=False)

    def _log_metrics(self, stage: str) -> None:
        if self.metrics is None:
            return
        if not self.trainer.sanity_checking:
            values = self.metrics.compute()
            self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)
        self.metrics.reset()


def _are_classes(labels: Tensor, count: int, classes: int) -> bool:
    return labels.shape == (count,) and bool(((labels >= 0) & (labels < classes)).all())
