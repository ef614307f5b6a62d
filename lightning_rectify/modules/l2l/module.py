"""``L2LDefense``: adversarial training against a learned attacker, or against FGSM, PGD or TRADES."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_rectify._lightning import LRSchedulerCallable, OptimizerCallable
from lightning_rectify.arguments import check_choice, check_fraction, check_least, check_types
from lightning_rectify.attacks.common import attacking
from lightning_rectify.modules.image_networks import given_network
from lightning_rectify.modules.l2l.attackers import make_attacker
from lightning_rectify.modules.l2l.costs import Passes, count_passes, example_inputs, forward_ratio
from lightning_rectify.modules.l2l.learned import Perturbed
from lightning_rectify.modules.l2l.losses import robust_cross_entropy, trades_loss
from lightning_rectify.modules.l2l.measuring import Batch, MeasuredDefense
from lightning_rectify.modules.l2l.memory import AttackMemory
from lightning_rectify.modules.l2l.networks import PixelClassifier, build_classifier
from lightning_rectify.modules.l2l.settings import (
    ATTACKS,
    check_ball,
    check_channels,
    check_memory,
    check_pixel_range,
    fill_in,
)
from lightning_rectify.modules.l2l.training_attack import TrainingAttack
from lightning_rectify.nn.modes import evaluating

_MEMORY = "attack_memory"  # in the checkpoint


class L2LDefense(MeasuredDefense):
    r"""A classifier trained on attacked images: by a learned attacker, FGSM, PGD, TRADES, or none at all.

    Learning to defend by learning to attack (Jiang et al., AISTATS 2021, arXiv:1811.01213; first Chen et al. 2019)
    trains an attacker along with the classifier, l-infinity:

    .. math:: \min_\theta \max_\varphi \tfrac1n \sum_i \ell\big(f_\theta(x_i + g_\varphi(x_i, \nabla_x \ell)), y_i\big)

    A batch is a pair: images inside ``bounds``, float, shape (N, C, H, W), and labels, int64, shape (N,); for
    prediction the images alone will do; with ``memory`` training batches have a third part, as ``ImageData`` gives it
    for ``with_index``. Pixel units everywhere: the module normalizes inside.

    Players, in the order of their steps and optimizers: ``classifier`` and, for "l2l", ``attacker``. Order "joint" has
    one graph and one backward pass, the attacker's gradient reversed: half the cost of "alternate", in which, as in the
    authors' code, the classifier moves first and the attack is computed anew for the attacker.

    Attacks run with the classifier in evaluation mode, each submodule getting its own mode back, in at least float32,
    in validation and test also in inference mode. The forward pass on what they made is an ordinary one in training.

    Logged: ``train/loss`` (with order "alternate" also ``train/loss_classifier`` and ``train/loss_attacker``),
    ``train/accuracy`` (on attacked images), ``val/loss`` and ``val/accuracy`` (clean), ``val/robust_accuracy`` (PGD of
    ``val_attack_steps``), ``val/own_attack_accuracy`` (what training attacks with: never a measure of robustness; far
    above the robust accuracy it says that the attack has collapsed). The same for ``test``. For an attacker that sees
    the gradient also ``STAGE/attack_agreement`` and ``STAGE/attack_saturation`` (see
    :class:`~lightning_rectify.attacks.quality.Quality`). :attr:`passes` says what a step costs.

    Override ``joint_loss``, ``classifier_loss`` or ``attacker_loss`` to train for something else. Networks given as
    objects are not in saved hyperparameters: load with ``load_from_checkpoint(path, classifier=network)``.

    Args:
        classifier: name for :func:`~lightning_rectify.modules.l2l.networks.build_classifier` ("small_cnn", "resnet20",
            "wrn_34_10", any torchvision classification model) or a module that maps images to logits (N, K).
        classifier_args: further arguments of the classifier's constructor, for one given by name.
        num_classes: number of classes K, at least 2.
        in_channels: channels C of an image, at least 1.
        image_size: height and width of the example images, at least 1.
        mean: of each channel, in pixel units, subtracted before the classifier; one number for all; None for 0.
        std: by which channels are divided then, above 0; None for 1.
        attack: what training attacks with: "l2l", "fgsm", "pgd", "trades" (PGD on the divergence of predictions, with
            a loss of its own) or "none".
        epsilon: radius of the l-infinity ball, in pixel units, above 0.
        bounds: least and largest pixel value; None for [0, 1].
        variant: "gradient" (the attacker sees image and gradient) or "naive" (the image alone: it gives no robustness).
        steps: how often the attacker is applied, with the same weights; at least 1.
        attacker: "strided" (small), "slim", "two_layer", "wide" (see
            :func:`~lightning_rectify.modules.l2l.attackers.build_attacker`) or a module that maps (N, 2 C, H, W) to
            (N, C, H, W). None: the preset's, "strided" without one.
        attacker_args: further arguments of the attacker's constructor.
        gradient_scale: "sample_std" (each sample by its own) or "batch_max". None: the preset's, "sample_std".
        warm_start: the attacker starts as a soft FGSM. None: if attacker and preset can.
        bptt: let the attacker's gradient pass from a step to the steps before.
        order: "joint" or "alternate". None: the preset's, "joint".
        attack_bn: mode of the classifier for the gradients that the learned attack sees in the classifier's training
            pass: "eval", or "train" for the mode it is in. None: the preset's, "eval".
        random_start: share of epsilon, in [0, 1], of a uniform start; None: 1 for "pgd", 0 else. "trades" has a start
            of its own.
        clean_weight: share of clean cross-entropy in the loss, in [0, 1); "trades" has a clean term of its own.
        train_steps: steps of "pgd" and "trades", at least 1.
        step_size: of "fgsm", "pgd" and "trades", in pixel units; None: epsilon for "fgsm", else
            2.5 * epsilon / ``train_steps``. With ``memory``: half of epsilon.
        memory: start each training image's attack where its last one ended, so that single steps add up over the epochs
            (ATTA, arXiv:1912.11969; see :class:`~lightning_rectify.modules.l2l.memory.AttackMemory`); for "l2l",
            "fgsm" and "pgd". It takes a byte for each pixel of the training images, on the module's device and in
            checkpoints. Outside training, attacks start from the image and have the steps that they have without it.
        trades_beta: weight of the divergence in TRADES, at least 0.
        val_attack_steps: steps of the PGD of validation, from a uniform start, the same each time; 0 for none (when
            ``RobustnessMonitor`` measures).
        test_attack_steps: the same for test.
        eval_seed: of those starts and of :meth:`attack`, at least 0.
        preset: "released" takes the authors' scripts' choices for all that is None: attacker "wide", no warm start,
            "batch_max", "alternate", ``attack_bn`` "train", SGD (lr 0.1, momentum 0.9, weight decay 2e-4) and Adam (lr
            1e-3, weight decay 2e-4). Their epsilon is 0.031.
        classifier_optimizer: see :class:`MinimaxModule`; None: the preset's, else ``optimizer``, RectifiedAdam.
        attacker_optimizer: the same; None: the preset's, else Adam with lr 3e-3.
        classifier_lr_scheduler: of the classifier alone, as in the authors' code; ``lr_scheduler`` is for both.
        attacker_lr_scheduler: of the attacker alone.
        **kwargs: of :class:`MinimaxModule`, but ``joint``.

    Raises:
        ValueError: for an argument outside its range; in ``setup``, for data that do not fit; in a step, for images
            outside ``bounds``.
    """

    players: ClassVar[tuple[str, ...]] = ("classifier", "attacker")
    maximizer = "attacker"

    def __init__(
        self,
        classifier: str | nn.Module = "small_cnn",
        classifier_args: dict[str, Any] | None = None,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
        mean: list[float] | float | None = None,
        std: list[float] | float | None = None,
        attack: str = "l2l",
        epsilon: float = 8 / 255,
        bounds: list[float] | None = None,
        variant: str = "gradient",
        steps: int = 1,
        attacker: str | nn.Module | None = None,
        attacker_args: dict[str, Any] | None = None,
        gradient_scale: str | None = None,
        warm_start: bool | None = None,
        bptt: bool = True,
        order: str | None = None,
        attack_bn: str | None = None,
        random_start: float | None = None,
        clean_weight: float = 0.0,
        train_steps: int = 10,
        step_size: float | None = None,
        memory: bool = False,
        trades_beta: float = 6.0,
        val_attack_steps: int = 10,
        test_attack_steps: int = 20,
        eval_seed: int = 0,
        preset: str | None = None,
        classifier_optimizer: OptimizerCallable | None = None,
        attacker_optimizer: OptimizerCallable | None = None,
        classifier_lr_scheduler: LRSchedulerCallable | None = None,
        attacker_lr_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(L2LDefense, locals())
        chosen = fill_in(
            preset,
            {
                "attacker": attacker,
                "gradient_scale": gradient_scale,
                "warm_start": warm_start,
                "order": order,
                "attack_bn": attack_bn,
                "classifier_optimizer": classifier_optimizer,
                "attacker_optimizer": attacker_optimizer,
            },
        )
        check_choice(ATTACKS, attack=attack)
        check_choice(("gradient", "naive"), variant=variant)
        check_choice(("sample_std", "batch_max"), gradient_scale=chosen["gradient_scale"])
        check_choice(("joint", "alternate"), order=chosen["order"])
        check_choice(("eval", "train"), attack_bn=chosen["attack_bn"])
        self.learned = attack == "l2l"
        if not self.learned:
            self.players = ("classifier",)  # type: ignore[misc]
        super().__init__(joint=self.learned and chosen["order"] == "joint", **kwargs)
        check_least(2, num_classes=num_classes)
        check_least(1, in_channels=in_channels, image_size=image_size, steps=steps, train_steps=train_steps)
        check_least(0, val_attack_steps=val_attack_steps, test_attack_steps=test_attack_steps)
        check_least(0, eval_seed=eval_seed, trades_beta=trades_beta)
        limits = [0.0, 1.0] if bounds is None else bounds
        check_ball(epsilon, limits, step_size, random_start)
        check_fraction(clean_weight=clean_weight)
        if memory:
            check_memory(attack, random_start)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.epsilon, self.bounds = float(epsilon), (float(limits[0]), float(limits[1]))
        self.training_attack = TrainingAttack(
            name=attack,
            epsilon=self.epsilon,
            bounds=self.bounds,
            random_start=float(attack == "pgd") if random_start is None else random_start,
            gradient=variant == "gradient",
            steps=steps,
            scale=chosen["gradient_scale"],
            bptt=bptt,
            train_steps=train_steps,
            step_size=step_size,
        )
        self.evaluation_attack, self.attack_memory = self.training_attack, None
        if memory:
            self.attack_memory = AttackMemory(self.epsilon)
            self.evaluation_attack = replace(self.training_attack, step_size=None)
            if step_size is None:
                self.training_attack = replace(self.training_attack, step_size=self.epsilon / 2)
        self.attack_bn = chosen["attack_bn"]
        self.clean_weight, self.trades_beta, self.eval_seed = clean_weight, trades_beta, eval_seed
        self.attack_steps = {"val": val_attack_steps, "test": test_attack_steps}
        self.classifier_optimizer = chosen["classifier_optimizer"]
        self.attacker_optimizer = chosen["attacker_optimizer"]
        self.classifier_lr_scheduler, self.attacker_lr_scheduler = classifier_lr_scheduler, attacker_lr_scheduler
        network = given_network("classifier", classifier, classifier_args)
        if network is None:
            network = build_classifier(str(classifier), num_classes, in_channels, **(classifier_args or {}))
        self.classifier = PixelClassifier(network, mean, std)
        check_channels(in_channels, mean=mean, std=std)
        if self.learned:
            see = self.training_attack.gradient
            self.attacker = make_attacker(chosen["attacker"], attacker_args, in_channels, see, chosen["warm_start"])
        # Labels outside the range fail in the loss; the metric's own check would read the device at every step.
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        kinds = ["train", *(f"{stage}{kind}" for stage in ("val", "test") for kind in ("", "_robust", "_own_attack"))]
        self.metrics = nn.ModuleDict({f"{kind}_accuracy": accuracy.clone() for kind in kinds})
        self._attacker_ratio: float | None = None
        self.example_input_array = torch.zeros(2, in_channels, image_size, image_size)

    # -- what others use -----------------------------------------------------------------------------------------------

    @property
    def passes(self) -> Passes:
        """What a training step costs in passes through the networks; ``passes.against_pgd(10)`` compares.

        The first call counts the multiplications of both networks on the example input.
        """
        attack = self.training_attack
        if self.learned and self._attacker_ratio is None:
            images = self.example_input_array.to(self.device, self.classifier.mean.dtype)  # type: ignore[union-attr]
            inputs = example_inputs(images, attack.gradient)
            self._attacker_ratio = forward_ratio(self.attacker, self.classifier, images, inputs)
        return count_passes(
            attack.name,
            gradients=attack.gradients,
            applications=attack.steps,
            joint=self.joint,
            classifier_turns=self.turns["classifier"],
            attacker_turns=self.turns.get("attacker", 1),
            clean=self._needs_clean and attack.name != "none",
            attacker_ratio=self._attacker_ratio or 0.0,
        )

    # -- the game ------------------------------------------------------------------------------------------------------

    def joint_loss(self, batch: Batch) -> Tensor:
        """The classifier's loss on what the attacker makes of the batch, differentiable for both."""
        images, labels, good = self._checked(batch)
        adversarial = self._learn(batch).images if good else images
        return self._defend(images, adversarial, labels)

    def classifier_loss(self, batch: Batch) -> Tensor:
        """The classifier's loss on attacked images, which are constants."""
        images, labels, good = self._checked(batch)
        if not good:  # no attack takes such images; their loss says what is wrong
            return self._defend(images, images, labels)
        if self.learned:
            with evaluating(self.attacker):
                adversarial = self._learn(batch).images
        else:
            start = self._start(batch)
            adversarial = self.training_attack.fixed(self.classifier, images, labels, self.noise_generator, start)
            self._keep(adversarial, batch)
        return self._defend(images, adversarial, labels)

    def attacker_loss(self, batch: Batch) -> Tensor:
        """Minus the cross-entropy of the classifier, in evaluation mode, on what the attacker makes of the batch."""
        images, labels, good = self._checked(batch)
        adversarial = self._learn(batch, again=True).images if good else images
        return -F.cross_entropy(self.classifier(adversarial), labels)

    def turn_context(self, player: str) -> AbstractContextManager[Any]:
        """The attacker moves against a classifier in evaluation mode, whose running statistics stay."""
        return attacking(self.classifier) if player == "attacker" else nullcontext()

    def _learn(self, batch: Batch, again: bool = False) -> Perturbed:
        """The learned attack as part of a training step; ``again`` for a batch whose attack was logged and kept."""
        images, labels = batch[:2]
        perturbed = self.training_attack.learned(
            self.attacker, self.classifier, images, labels, self.noise_generator, self.attack_bn, self._start(batch)
        )
        if not again:
            self._keep(perturbed.images, batch)
            self._log_quality("train", images, perturbed)
        return perturbed

    def _start(self, batch: Batch) -> Tensor | None:
        """Where the attacks on these images ended last, if that is remembered."""
        if self.attack_memory is None:
            return None
        return self.attack_memory.start(batch[0], batch[2] if len(batch) > 2 else None)

    def _keep(self, adversarial: Tensor, batch: Batch) -> None:
        if self.attack_memory is not None:
            self.attack_memory.keep(adversarial, batch[0], batch[2])

    def _defend(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """The classifier's loss and training accuracy on attacked images."""
        # Clean images first, as the authors of TRADES do: running statistics lean to what came last.
        clean = self.classifier(images) if self._needs_clean and adversarial is not images else None
        logits = self.classifier(adversarial)
        accuracy = cast(Metric, self.metrics["train_accuracy"])
        accuracy.update(logits.detach(), labels)
        self.log("train/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        if self.training_attack.name == "trades":
            return trades_loss(logits, logits if clean is None else clean, labels, self.trades_beta)
        return robust_cross_entropy(logits, labels, clean, self.clean_weight)

    @property
    def _needs_clean(self) -> bool:
        return self.training_attack.name == "trades" or self.clean_weight > 0

    def _play_in_turns(self, window: list[Any]) -> dict[str, Tensor]:
        losses = super()._play_in_turns(window)
        loss = losses["train/loss_classifier"]
        return {"train/loss": loss, **losses} if self.learned else {"train/loss": loss}

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a datamodule whose images are not pixels inside ``bounds``, or not of these classes and channels."""
        super().setup(stage)
        self.check_datamodule("num_classes", "in_channels")
        datamodule = getattr(self.trainer, "datamodule", None)
        check_pixel_range(datamodule, self.bounds, type(self).__name__)
        if stage == "fit" and self.attack_memory is not None and getattr(datamodule, "with_index", True) is False:
            raise ValueError(
                f"Expected argument `with_index` of the datamodule {type(datamodule).__name__} to be True with "
                f"`memory` of {type(self).__name__}, which must know one image from another, but got False."
            )

    def on_train_epoch_end(self) -> None:
        """Share memories: the images that a rank has seen are others' in the next epoch."""
        super().on_train_epoch_end()
        if self.attack_memory is not None:
            self.attack_memory.meet(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where attacks have ended, if that is remembered and training can go on from the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.attack_memory is not None and "optimizer_states" in checkpoint:
            self.attack_memory.meet(self.device)
            checkpoint[_MEMORY] = self.attack_memory.offsets.cpu().clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take where attacks have ended."""
        super().on_load_checkpoint(checkpoint)
        if self.attack_memory is not None and _MEMORY in checkpoint:
            self.attack_memory.load(checkpoint[_MEMORY])
