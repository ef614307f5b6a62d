"""``SPOT``: a transport plan as a game between a generator of pairs and the critics of its two marginals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_rectify._lightning import OptimizerCallable
from lightning_rectify.arguments import check_above, check_fraction, check_least, check_types
from lightning_rectify.modules.spot.costs import CostFunction, check_reduction, get_cost, gradient_norms, reduce_cost
from lightning_rectify.modules.spot.critics import build_critics, clip_weights, gradient_penalty
from lightning_rectify.modules.spot.density import PlanDensity
from lightning_rectify.modules.spot.eta import warn_if_binding
from lightning_rectify.modules.spot.networks import build_generator
from lightning_rectify.modules.spot.plan import at_least_float32
from lightning_rectify.modules.spot.presets import HoldThenDecay, resolve

_EVERY = 50  # rounds from one look at the slopes of generated pairs to the next


class SPOT(PlanDensity):
    r"""Optimal transport by a generator of pairs (Xie et al. 2019, arXiv:1905.00158).

    .. math:: \min_G \max_{f_X, f_Y} E\, c(G_X(Z), G_Y(Z)) / \eta + E f_X(G_X(Z)) - E f_X(X) + E f_Y(G_Y(Z)) - E f_Y(Y)

    with critics of slope at most 1. For two distributions known by samples and any differentiable cost it gives the
    cost, a sampler of the plan, and an out-of-sample map, with memory for one batch. To use it without training code:
    :meth:`fit_samples`, then :meth:`cost`, :meth:`sample_pairs`, :meth:`transform`; with the generator "ode" and
    ``entropy`` also :meth:`log_prob`.

    A batch is a pair x, float, shape (B, \*shape_x), and y, shape (B, \*shape_y), drawn independently of each other. It
    is cut into ``critic_steps`` parts, one a step of the critics; give the loader as many times the batch size.

    Players, in the order of their steps and optimizers: ``critic`` (both), ``generator``. Logged: ``train/loss_NAME``
    of both (a critic's loss is *no* distance); each 50 rounds ``train/eta`` and ``train/cost_gradient`` (the steepest
    of a batch of generated pairs). At the end of validation, by the generator's moving average and the same latents
    each time: ``val/cost``; ``val/marginal_gap_x`` and ``_y`` beside ``val/marginal_floor_x`` and ``_y`` (sliced W1,
    exact W1 in one dimension: :func:`~lightning_rectify.modules.spot.metrics.marginal_gap`); ``val/independent_cost``;
    where the data module's ``truth`` is known also ``val/cost_error`` ((cost - truth) / truth), ``val/regret`` and,
    where the truth is a map, ``val/l2_uvp``. With a density also ``val/entropy`` (of the plan, nats),
    ``val/round_trip``, for two numbers ``val/mass`` on a grid, and where the truth has a density ``val/plan_kl``
    (truth to plan). The same under ``test/``.

    With "auto" and ``standardize``, constants are taken from samples of the training data before the first step (of
    the data module's ``training_samples(count)``, else of the loader's first batches), and kept in the checkpoint.

    Args:
        preset: what the arguments left at None are: "spot" (the prototype's best, for low dimensions: squared cost,
            "mlp", "spectral", RMSprop 5e-4, 5 critic steps, average 0.995) or "spot_released" (the authors' constants,
            for images of 64 x 64: Euclidean cost of the whole batch with weight 5e-4, DCGAN, weights clipped to 0.01,
            RMSprop 5e-5; it fails on small problems, where the cost wins).
        shape_x: of one x: a number of features, or [C, H, W].
        shape_y: of one y; None for ``shape_x``.
        cost: "squared", "euclidean", "contour" (of images), or a function of x and y that returns shape (B,), also by
            its import path ("my_package.my_module.my_cost").
        reduction: "mean", or "released": see :func:`~lightning_rectify.modules.spot.costs.reduce_cost`.
        eta: largest slope of the multipliers, in units of cost over data, above 0; or "auto": 2.5 times the largest
            gradient of the cost on an exact plan of 300 samples. Too small a one biases the cost down; it warns
            (:class:`~lightning_rectify.modules.spot.eta.EtaWarning`).
        entropy: weight eps of E log p in the objective, in units of the cost, at least 0; above 0 for "ode" alone:
            the entropic plan (:mod:`~lightning_rectify.modules.spot.density`), whose density exists.
        generator: "mlp", "dcgan" (images in [-1, 1]), "ode" (has a density; for few dimensions), or latents (B, L) to
            a tuple of x and y, then in standardized units unless ``standardize`` is False.
        ode: of "ode": see :func:`~lightning_rectify.modules.spot.networks.build_generator`.
        latent_size: L; None for the preset's: as many as x and y have numbers together, or 100 as released.
        width: of the generator's layers.
        depth: of the "mlp" and "ode" generators.
        share: "trunk" or "none": whether both sides share all layers but the last.
        norm: of the "dcgan": "batch", "group" or "none".
        critic: "mlp", "conv" (images), or a module: x and y to a tuple of scores.
        critic_width: of the critics' layers.
        critic_depth: of the "mlp" critics.
        critic_norm: of the "conv" critics, "none" or (only with "clip") "batch".
        constraint: of the critics: "spectral", "gradient_penalty", "groupsort" or "clip".
        penalty_weight: of the gradient penalty, above 0.
        clip: bound of the weights under "clip", above 0.
        critic_steps: steps of the critics for one of the generator, at least 1.
        burst: steps of the critics in the first 25 rounds and each 500th, as released (10), on the same parts of the
            batch again; 0 for none.
        ema_decay: of the generator's moving average, in [0, 1); 0 is the last generator itself.
        standardize: work in units in which the data has mean 0 and, over both sides, variance 1.
        decay_steps: rounds over which the learning rate is held for half and then falls linearly to 2 %; 0 holds it;
            None asks the Trainer (and the preset). Not read where ``lr_scheduler`` is given.
        generator_optimizer: see :class:`MinimaxModule`; None for the preset's. ``optimizer`` is not read.
        critic_optimizer: the same.
        eval_samples: pairs generated for a validation, at least 2.
        eval_seed: of their latents, at least 0.
        lr_scheduler_interval: see :class:`RectifiedModule`.
        **kwargs: of :class:`MinimaxModule`, but ``turns``, ``averages`` and ``joint``.

    Raises:
        ValueError: for an argument outside its range; while training, for data that do not fit.
    """

    players = ("critic", "generator")

    def __init__(
        self,
        preset: str = "spot",
        shape_x: int | list[int] = 2,
        shape_y: int | list[int] | None = None,
        cost: str | CostFunction | None = None,
        reduction: str | None = None,
        eta: float | str | None = None,
        entropy: float = 0.0,
        generator: str | nn.Module | None = None,
        ode: dict[str, Any] | None = None,
        latent_size: int | None = None,
        width: int = 64,
        depth: int = 2,
        share: str | None = None,
        norm: str | None = None,
        critic: str | nn.Module | None = None,
        critic_width: int = 64,
        critic_depth: int = 2,
        critic_norm: str | None = None,
        constraint: str | None = None,
        penalty_weight: float = 10.0,
        clip: float = 0.01,
        critic_steps: int | None = None,
        burst: int | None = None,
        ema_decay: float | None = None,
        standardize: bool | None = None,
        decay_steps: int | None = None,
        generator_optimizer: OptimizerCallable | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        eval_samples: int = 10_000,
        eval_seed: int = 0,
        lr_scheduler_interval: str = "step",
        **kwargs: Any,
    ) -> None:
        check_types(SPOT, locals())
        chosen: Any = resolve(
            preset,
            {
                "cost": cost, "reduction": reduction, "eta": eta, "generator": generator, "share": share, "norm": norm,
                "latent_size": latent_size, "critic": critic, "critic_norm": critic_norm, "constraint": constraint,
                "critic_steps": critic_steps, "burst": burst, "ema_decay": ema_decay, "standardize": standardize,
            },
        )  # fmt: skip
        check_least(0, burst=chosen.burst, eval_seed=eval_seed, decay_steps=decay_steps)
        check_least(1, critic_steps=chosen.critic_steps, latent_size=chosen.latent_size)
        check_least(2, eval_samples=eval_samples)
        check_above(0, penalty_weight=penalty_weight, clip=clip)
        check_fraction(ema_decay=chosen.ema_decay)
        if chosen.eta != "auto" and (isinstance(chosen.eta, str) or not 0 < chosen.eta < float("inf")):
            raise ValueError(f"Expected argument `eta` to be a finite number above 0 or 'auto' but got {chosen.eta!r}.")
        super().__init__(
            turns={"critic": chosen.critic_steps},
            averages={"generator": chosen.ema_decay} if chosen.ema_decay else None,
            joint=False,
            lr_scheduler_interval=lr_scheduler_interval,
            **kwargs,
        )
        self.shape_x = _shape("shape_x", shape_x)
        self.shape_y = _shape("shape_y", shape_x if shape_y is None else shape_y)
        self.cost_name, self.cost_function = get_cost(chosen.cost)
        check_reduction(chosen.reduction, self.cost_name)
        self.reduction, self.constraint = chosen.reduction, chosen.constraint
        self.latent_size = chosen.latent_size or int(np.prod(self.shape_x) + np.prod(self.shape_y))
        self.generator = build_generator(
            chosen.generator, self.shape_x, self.shape_y, self.latent_size, width, depth, chosen.share, chosen.norm, ode
        )
        self.critic = build_critics(
            chosen.critic, self.shape_x, self.shape_y, chosen.constraint, critic_width, critic_depth, chosen.critic_norm
        )
        if chosen.constraint == "clip":
            clip_weights(self.critic, clip)
        self.generator_optimizer: OptimizerCallable = generator_optimizer or chosen.optimizer
        self.critic_optimizer: OptimizerCallable = critic_optimizer or chosen.optimizer
        self.penalty_weight, self.clip, self.burst, self.critic_steps = (
            penalty_weight, clip, chosen.burst, chosen.critic_steps
        )  # fmt: skip
        self.decay_steps = decay_steps if chosen.decay else decay_steps or 0
        self.make_plan(chosen.eta, chosen.standardize, eval_samples, eval_seed)
        self.make_density(entropy)
        self.example_input_array = torch.zeros(2, self.latent_size)

    # -- the game ------------------------------------------------------------------------------------------------------

    def latents(self, batch: Any) -> Tensor:
        """Latents for training, one for each x of the batch, shape (B, L), from this rank's generator."""
        return self.noise(len(batch[0]), self.latent_size)

    def critic_loss(self, batch: Any) -> Tensor:
        """Scores of the data less those of generated points, both sides added; with the gradient penalty."""
        real = self._standardized(batch)
        fake_x, fake_y = self.split(at_least_float32(self.generator(self.latents(batch)).detach()))
        if self._mixes_batches():
            scores = [*self.critic(*real), *self.critic(fake_x, fake_y)]
        else:  # one pass of each critic is faster than two
            both = self.critic(torch.cat([real[0], fake_x]), torch.cat([real[1], fake_y]))
            halves = [score.split([len(real[0]), len(fake_x)]) for score in both]
            scores = [halves[0][0], halves[1][0], halves[0][1], halves[1][1]]
        means = [at_least_float32(score).mean() for score in scores]
        loss = means[0] - means[2] + means[1] - means[3]
        if self.constraint == "gradient_penalty":
            mix = torch.rand(len(real[0]), generator=self.noise_generator, device=self.device).to(fake_x)
            loss = loss + self.penalty_weight * gradient_penalty(self.critic, real, (fake_x, fake_y), mix)
        return loss

    def generator_loss(self, batch: Any) -> Tensor:
        """Cost (with entropy) over eta, and the critics' scores, of as many pairs as the part of the batch has."""
        pairs, log_density = self.generate(self.latents(batch))
        x, y = self.split(at_least_float32(pairs))
        scores = self.critic(x, y)
        x, y = self._data_units(x, y)
        cost = reduce_cost(self.cost_function, x, y, self.reduction)
        if log_density is not None:
            cost = cost + self.entropy * log_density.mean()
        self._look_at_slopes(x, y)
        return cost / (self.eta * self.scale) + sum(at_least_float32(score).mean() for score in scores)

    def _look_at_slopes(self, x: Tensor, y: Tensor) -> None:
        if self._trainer is None or not self.trainer.training:
            return
        if (self.trainer.global_step + 1) % _EVERY == 0:  # when loggers that write each 10, 25, 50 steps listen
            slopes = gradient_norms(self.cost_function, x, y)
            self.log_dict({"train/eta": self.eta, "train/cost_gradient": slopes.max()}, batch_size=1)
            self._warned = self._warned or warn_if_binding(slopes, float(self.eta))

    def turn_batch(self, batch: Any, player: str, turn: int) -> Any:
        """Each step of the critics sees a part of the batch; the generator's has the size of the first."""
        size = len(batch[0]) // self.critic_steps
        if size < 1:
            raise ValueError(
                f"Expected a batch of at least `critic_steps` = {self.critic_steps} points a side but got "
                f"{len(batch[0])}."
            )
        start = turn % self.critic_steps * size
        return [side[start : start + size] for side in batch]

    def networks(self) -> list[nn.Module]:
        """What ``compile`` compiles; no critic under a gradient penalty: compiled code has no second derivatives."""
        generator = self.compilable()
        return [generator] if self.constraint == "gradient_penalty" else [self.critic, generator]

    def on_player_step(self, player: str) -> None:
        """Clip the critics' weights; update the average."""
        super().on_player_step(player)
        if player == "critic" and self.constraint == "clip":
            clip_weights(self.critic, self.clip)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The released code's rounds with more steps of the critics."""
        if self.burst:
            many = self.trainer.global_step < 25 or self.trainer.global_step % 500 == 0
            self.turns["critic"] = self.burst if many else self.critic_steps

    def configure_optimizers(self) -> Any:
        """One optimizer a player; a rate that is held and then falls, unless there is a schedule already."""
        total = self._decay_total() if self.lr_scheduler is None else 0
        if not total:
            return super().configure_optimizers()
        optimizers, schedulers = super().configure_optimizers()
        if not schedulers:
            schedulers = [{"scheduler": HoldThenDecay(optimizer, total)} for optimizer in optimizers]
        return optimizers, schedulers

    def _decay_total(self) -> int:
        if self.decay_steps is not None or self._trainer is None:
            return self.decay_steps or 0
        steps = float(self.trainer.estimated_stepping_batches)
        return max(int(steps) // self.accumulate, 1) if 0 < steps < float("inf") else 0

    def _mixes_batches(self) -> bool:
        return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.critic.modules())


def _shape(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"Expected argument `{name}` to be a number or a list of numbers above 0 but got {shape!r}.")
    return sizes
