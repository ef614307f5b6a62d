"""``SPOTAdaptation``: labels of one domain carried to another by a transport plan."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify._lightning import OptimizerCallable
from lightning_rectify.arguments import check_above, check_least, check_types
from lightning_rectify.modules.spot.adaptation_joint import network_loss, pair_loss
from lightning_rectify.modules.spot.adaptation_losses import (
    confident_loss,
    critic_loss,
    fooling_loss,
    slope_penalty,
    vary,
)
from lightning_rectify.modules.spot.adaptation_networks import (
    DigitClassifier,
    DigitPair,
    Domain,
    DomainNetwork,
    ImageCritic,
    ImageMap,
    check_logits,
)
from lightning_rectify.modules.spot.adaptation_parts import PartedModule
from lightning_rectify.modules.spot.adaptation_settings import resolve
from lightning_rectify.modules.spot.costs import CostFunction, costs_of, get_cost
from lightning_rectify.modules.spot.plan import at_least_float32


class SPOTAdaptation(PartedModule):
    r"""Unsupervised domain adaptation of images by optimal transport (Xie et al. 2019, arXiv:1905.00158).

    A training batch is source images, float, (B, C, S, S), labels, int64, (B,), and target images, (B, C, S, S), pixels
    in [0, 1]. No label of the target is ever read in training or validation.

    ``method="two_stage"``: a plan between source and target images, then a classifier on what it carries over. The plan
    is a random map T, whose pairs are (X, T(X, Z)) with X the source images themselves, so that labels go along:

    .. math:: \min_T \max_f \; E\big[c(X, T) / \eta + \lambda\, CE(h(T), V)\big] + E f(Y) - E f(T)

    with a critic f of slope 1 and the classifier's moving average h. The second term makes the cost one of (image,
    label) and image; it is ours (Courty et al. 2017, arXiv:1705.08848, have it in exact transport), as are the map, the
    random changes of the classifier's images and its learning from its own sure answers on the target. Rounds: the
    first ``source_steps`` train the classifier on the source alone; the next ``plan_steps`` the plan, and, if
    ``alternate``, the classifier on transported images besides; the rest the classifier alone, with the last plan.
    Players: ``critic``, ``generator`` (T), ``classifier``.

    ``method="joint"``: the paper's DASPOT as released. A generator of pairs from latents with one trunk, and one
    network for features :math:`\phi_X, \phi_Y`, both critics and the classifier; the latter minimises
    :math:`\text{adv} + 10\, CE + 0.01\, E \lVert \phi_X(G_X) - \phi_Y(G_Y) \rVert^2`, the generator adv and the same
    last term. Players: ``critic`` (the network), ``generator``. On small problems it was unstable (labels swap); it is
    here as the paper's.

    Answers come from moving averages of the last weights. Logged: ``train/loss_NAME`` of each player, ``train/cost``
    (of pairs; no optimal cost), with pseudo-labels ``train/confident_share``; ``val/source_accuracy``; of the target,
    without labels, ``val/unsupervised_score`` (soft neighbourhood density, high is good), ``val/target_entropy`` and
    ``val/target_diversity`` (entropy of the mean prediction, near log K unless classes are lost); ``test/accuracy`` (of
    the target) and ``test/source_accuracy``. With ``DomainPairs(watch_test=True)`` also ``watch/test_accuracy`` and
    ``watch/test_accuracy_best_of_test``, the number that papers which choose by the test report; nothing here reads it.

    Args:
        method: "two_stage" or "joint".
        num_classes: K, at least 2.
        in_channels: C.
        image_size: S, at least 16, a multiple of 4.
        cost: of images, of "two_stage": "squared", "euclidean", "contour" or a function: see :class:`SPOT`.
        eta: of "two_stage", above 0: the critic's weight against the cost. At least the cost's largest gradient: for
            the squared cost twice the largest distance of a pair (see ``eta.py``).
        semantic_weight: lambda of "two_stage", at least 0; 0 is a plan that knows no labels.
        class_weight: of the cross-entropy of "joint", at least 0.
        transport_weight: of the feature cost of "joint", at least 0.
        source_steps: rounds on the source alone, of "two_stage".
        plan_steps: rounds of the plan, at least 1; None: three quarters of the Trainer's rounds, less ``source_steps``.
        alternate: see above.
        carried_weight: of the cross-entropy on transported images, at least 0; 0 leaves the plan without a use, for
            comparison.
        pseudo_weight: of the cross-entropy with the classifier's own sure answers on target images, from the second
            part of "two_stage" on, at least 0.
        pseudo_threshold: probability from which an answer is sure, in (0, 1].
        augment: strength of the random changes of the classifier's images, at least 0 (see
            :func:`~lightning_rectify.modules.spot.adaptation_losses.vary`); None for the method's: 1, or 0 as released.
        adversarial: "wasserstein" or "logistic"; None for the method's: the former, or logistic as released.
        penalty_weight: of the critics' gradients, at least 0; None: 10, or 0 as released (with "wasserstein" give one).
        generator: the network, or None: images and latents to images (:class:`ImageMap`); of "joint", latents to a
            tuple of images (:class:`DigitPair`).
        critic: None for :class:`ImageCritic`; of "joint", a :class:`DomainNetwork`.
        classifier: None for :class:`DigitClassifier`; images to logits (B, K). Of "two_stage".
        latent_size: L; None: 16, or 100 as released.
        generator_width: None: 16, or 1024 as released (seconds a step on a CPU).
        classifier_width: of the features; None: 128, or 500 as released.
        critic_width: None: 16; of "joint" hidden units of the critics, 0 as released for digits of one colour.
        dropout: of the classifier of "two_stage", in [0, 1).
        ema_decay: of the averages that answer, in [0, 1).
        decay_steps: rounds over which rates are held for half and then fall to 2 % (the plan's over its own rounds);
            0 holds them; None asks the Trainer. Not read where ``lr_scheduler`` is given.
        generator_optimizer: None for the method's: RAdam 1e-3, or Adam 2e-4 as released.
        critic_optimizer: the same.
        classifier_optimizer: the same.
        lr_scheduler_interval: see :class:`RectifiedModule`.
        **kwargs: of :class:`MinimaxModule`, but ``averages`` and ``joint``.

    Raises:
        ValueError: for an argument outside its range; in ``setup``, if the datamodule's images or classes do not fit.
    """

    players: ClassVar[tuple[str, ...]] = ("critic", "generator", "classifier")

    def __init__(
        self,
        method: str = "two_stage",
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 16,
        cost: str | CostFunction = "squared",
        eta: float = 20.0,
        semantic_weight: float = 1.0,
        class_weight: float = 10.0,
        transport_weight: float = 0.01,
        source_steps: int = 0,
        plan_steps: int | None = None,
        alternate: bool = True,
        carried_weight: float = 1.0,
        pseudo_weight: float = 1.0,
        pseudo_threshold: float = 0.95,
        augment: float | None = None,
        adversarial: str | None = None,
        penalty_weight: float | None = None,
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        classifier: nn.Module | None = None,
        latent_size: int | None = None,
        generator_width: int | None = None,
        classifier_width: int | None = None,
        critic_width: int | None = None,
        dropout: float = 0.0,
        ema_decay: float | None = None,
        decay_steps: int | None = None,
        generator_optimizer: OptimizerCallable | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        classifier_optimizer: OptimizerCallable | None = None,
        lr_scheduler_interval: str = "step",
        **kwargs: Any,
    ) -> None:
        check_types(SPOTAdaptation, locals())
        chosen = resolve(
            method,
            {
                "adversarial": adversarial, "penalty_weight": penalty_weight, "latent_size": latent_size,
                "generator_width": generator_width, "classifier_width": classifier_width, "critic_width": critic_width,
                "ema_decay": ema_decay, "augment": augment, "decay_steps": decay_steps,
                "generator_optimizer": generator_optimizer, "critic_optimizer": critic_optimizer,
                "classifier_optimizer": classifier_optimizer,
            },
        )  # fmt: skip
        check_least(0, source_steps=source_steps, semantic_weight=semantic_weight, class_weight=class_weight)
        check_least(0, transport_weight=transport_weight, pseudo_weight=pseudo_weight, carried_weight=carried_weight)
        check_least(1, in_channels=in_channels, plan_steps=plan_steps)
        check_least(2, num_classes=num_classes)
        check_above(0, eta=eta)
        if not 0 < pseudo_threshold <= 1:
            raise ValueError(f"Expected argument `pseudo_threshold` to be in (0, 1] but got {pseudo_threshold!r}.")
        if method == "joint":
            if classifier is not None:
                raise ValueError("Expected argument `classifier` to be None with method 'joint' but got a module.")
            self.players = ("critic", "generator")  # type: ignore[misc]
        answering = {"generator", self.players[-1] if method == "two_stage" else "critic"}
        averages = dict.fromkeys(sorted(answering), chosen.ema_decay) if chosen.ema_decay else None
        super().__init__(averages=averages, joint=False, lr_scheduler_interval=lr_scheduler_interval, **kwargs)
        self.method, self.num_classes, self.in_channels, self.image_size = method, num_classes, in_channels, image_size
        self.cost_name, self.cost_function = get_cost(cost)
        self.settings, self.eta = chosen, eta
        self.semantic_weight, self.class_weight, self.transport_weight = semantic_weight, class_weight, transport_weight
        self.source_steps, self.plan_steps, self.alternate = source_steps, plan_steps, alternate
        self.pseudo_weight, self.pseudo_threshold, self.carried_weight = pseudo_weight, pseudo_threshold, carried_weight
        self.latent_size = getattr(generator, "latent_size", chosen.latent_size)
        shape = (in_channels, image_size)
        if method == "joint":
            self.generator = generator or DigitPair(*shape, chosen.latent_size, chosen.generator_width)
            self.critic = critic or DomainNetwork(num_classes, *shape, chosen.classifier_width, chosen.critic_width)
        else:
            self.generator = generator or ImageMap(*shape, chosen.latent_size, chosen.generator_width)
            self.critic = critic or ImageCritic(*shape, chosen.critic_width)
            self.classifier = classifier or DigitClassifier(num_classes, *shape, chosen.classifier_width, dropout)
            check_logits(self.classifier, (in_channels, image_size, image_size), num_classes)
        self.generator_optimizer: OptimizerCallable = chosen.generator_optimizer
        self.critic_optimizer: OptimizerCallable = chosen.critic_optimizer
        self.classifier_optimizer: OptimizerCallable = chosen.classifier_optimizer
        self.make_judges()

    # -- the answers ---------------------------------------------------------------------------------------------------

    def domain_logits(self, images: Tensor, domain: Domain) -> Tensor:
        """Logits (B, K) of images (B, C, S, S), by the averaged weights; one network for both with "two_stage"."""
        network: Any = self.averaged("critic" if self.method == "joint" else "classifier")
        return network.logits(images, domain) if self.method == "joint" else network(images)

    @torch.no_grad()
    def transport(self, images: Tensor, seed: int = 0) -> Tensor:
        """Source images (N, C, S, S) carried to the target's side by the averaged map of "two_stage".

        Args:
            images: pixels in [0, 1].
            seed: of the latents.

        Raises:
            ValueError: with "joint", whose plan has no images of the data.
        """
        if self.method == "joint":
            raise ValueError("Expected `method` to be 'two_stage' for `transport` but got 'joint'.")
        latents = torch.randn(len(images), self.latent_size, generator=torch.Generator().manual_seed(seed))
        return self.averaged("generator")(images, latents.to(images))

    # -- noise: what a subclass may replace ----------------------------------------------------------------------------

    def latents(self, batch: Any) -> Tensor:
        """Latents (B, L) for the batch, from this rank's generator."""
        return self.noise(len(batch[0]), self.latent_size)

    def uniform(self, *size: int) -> Tensor:
        """Uniform numbers in [0, 1) from this rank's generator."""
        return torch.rand(size, generator=self.noise_generator, device=self.device)

    # -- the players' losses -------------------------------------------------------------------------------------------

    def critic_loss(self, batch: Any) -> Tensor:
        """Telling generated images from real ones; in "joint" also cross-entropy and the feature cost."""
        if self.method == "joint":
            with torch.no_grad():
                fakes = self.generator(self.latents(batch))
            weights = self.settings.adversarial, self.class_weight, self.transport_weight
            loss, cost = network_loss(self.critic, batch, fakes, *weights, self._penalty)
            self._note("train/cost", cost)
            return loss
        images, _, target = batch
        with torch.no_grad():
            carried = at_least_float32(self.generator(images, self.latents(batch)))
        scores = at_least_float32(self.critic(torch.cat([target, carried])))
        loss = critic_loss(self.settings.adversarial, scores[: len(target)], scores[len(target) :])
        return loss + self._penalty(self.critic, target, carried)

    def generator_loss(self, batch: Any) -> Tensor:
        """Cost over eta, the semantic cost, and the critic's; in "joint" its critics' and the feature cost."""
        if self.method == "joint":
            pair = self.generator(self.latents(batch))
            return pair_loss(self.critic, pair, self.settings.adversarial, self.transport_weight)
        images, labels, _ = batch
        carried = at_least_float32(self.generator(images, self.latents(batch)))
        cost = costs_of(self.cost_function, images, carried).mean()
        self._note("train/cost", cost)
        loss = cost / self.eta + fooling_loss(self.settings.adversarial, at_least_float32(self.critic(carried)))
        if self.semantic_weight:
            logits = at_least_float32(self.averaged("classifier")(carried))
            loss = loss + self.semantic_weight * F.cross_entropy(logits, labels)
        return loss

    def classifier_loss(self, batch: Any) -> Tensor:
        """Cross-entropy on the source's images and what the plan makes of them; sure answers on the target's."""
        images, labels, target = batch
        part = self.part
        learns = part == "classifier" or (part == "plan" and self.alternate)
        if not learns:
            return self._cross_entropy(self._varied(images), labels)
        loss = self._cross_entropy(self._varied(images), labels)
        if self.carried_weight:
            with torch.no_grad():
                carried = at_least_float32(self.averaged("generator")(images, self.latents(batch)))
            loss = loss + self.carried_weight * self._cross_entropy(self._varied(carried), labels)
        if self.pseudo_weight:
            with torch.no_grad():
                teacher = at_least_float32(self.averaged("classifier")(target))
            sure, share = confident_loss(
                at_least_float32(self.classifier(self._varied(target))), teacher, self.pseudo_threshold
            )
            self._note("train/confident_share", share)
            loss = loss + self.pseudo_weight * sure
        return loss

    def _penalty(self, critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
        kind, weight = self.settings.adversarial, self.settings.penalty_weight
        if not weight:
            return real.new_zeros(())
        mix = self.uniform(len(real)).to(real) if kind == "wasserstein" else None
        return weight * slope_penalty(kind, critic, real, fake, mix)

    def _cross_entropy(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(self.classifier(images)), labels)

    def _varied(self, images: Tensor) -> Tensor:
        strength = self.settings.augment
        return vary(images, 2.0 * self.uniform(len(images), 6) - 1.0, strength) if strength else images

    def _note(self, name: str, value: Tensor) -> None:
        if self._trainer is not None and self.trainer.training:
            self.log(name, value.detach(), batch_size=1)

    def networks(self) -> Iterable[nn.Module]:
        """What ``compile`` compiles; no critic with a penalty: compiled code has no second derivatives."""
        names = [name for name in self.players if name != "critic" or not self.settings.penalty_weight]
        if self.method == "joint":
            names = [name for name in names if name != "critic"]  # its parts are called, never the whole
        return [getattr(self, name) for name in names]
