"""The training loops of ``lightning_cost.py`` in plain torch: networks and losses of the modules, and nothing else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify import ImageClassifier, L2LDefense, LanguageModel, ManifoldRegressor, MinimaxModule, Translator
from lightning_rectify.modules.l2l.losses import robust_cross_entropy
from lightning_rectify.modules.translation.loss import linear_cross_entropy
from lightning_rectify.text import PAD
from lightning_rectify.words import IGNORED

Step = Callable[[Any], None]


def plain_steps(module: Any, clip: float | None = None) -> Step:
    """A function that takes one training step on a batch, by the optimizers and schedules of the module.

    Args:
        module: with weights to train, on the CPU.
        clip: largest norm of the gradient, of a module that is no game.
    """
    module.train()
    if isinstance(module, L2LDefense):
        return _joint_steps(module)
    return _played_steps(module) if isinstance(module, MinimaxModule) else _one_player_steps(module, clip)


# -- one player --------------------------------------------------------------------------------------------------------


def _one_player_steps(module: Any, clip: float | None) -> Step:
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    schedule = configured["lr_scheduler"]["scheduler"] if isinstance(configured, dict) else None
    loss_of = _loss_of(module)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        loss_of(batch).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if schedule is not None and module.lr_scheduler_interval == "step":
            schedule.step()

    return step


def _loss_of(module: Any) -> Callable[[Any], Tensor]:
    if isinstance(module, ImageClassifier):
        return lambda batch: F.cross_entropy(module.network(batch[0]), batch[1], label_smoothing=module.label_smoothing)
    if isinstance(module, LanguageModel):
        return _language_loss(module)
    if isinstance(module, Translator):
        return lambda batch: _translation_loss(module, batch)
    if isinstance(module, ManifoldRegressor):
        return lambda batch: _manifold_loss(module, *batch)
    raise TypeError(f"Expected a module whose loss is known but got {type(module).__name__}.")


def _language_loss(module: LanguageModel) -> Callable[[Any], Tensor]:
    states: dict[int, Tensor] = {}  # of each group of streams

    def loss(batch: Any) -> Tensor:
        before = None if batch.start else states.get(batch.group)
        features, state = module.network.recurrent(batch.tokens, before)
        states[batch.group] = state.detach()
        real = batch.targets != IGNORED
        return module.network.softmax(features[real], batch.targets[real]).mean()

    return loss


def _translation_loss(module: Translator, batch: Any) -> Tensor:
    inputs, labels = batch.target[:, :-1], batch.target[:, 1:]
    real = labels != PAD
    hidden = module.network.features(batch.source, inputs)[real]
    loss, _ = linear_cross_entropy(hidden, module.network.output_weight, labels[real], module.label_smoothing)
    return loss / real.sum()


def _manifold_loss(module: ManifoldRegressor, x: Tensor, y: Tensor) -> Tensor:
    loss = module.loss(module.network(x.flatten(1)), y)
    return loss + module.anchor * module.network.distance_from_start() / module.network.count


# -- games -------------------------------------------------------------------------------------------------------------


def _played_steps(module: MinimaxModule) -> Step:
    """Players in turn; the others' weights need no gradient meanwhile."""
    optimizers, schedules = module.configure_optimizers()
    by_player = dict(zip(module.players, optimizers, strict=True))
    weights = {player: _weights([optimizer]) for player, optimizer in by_player.items()}

    def step(batch: Any) -> None:
        for player, optimizer in by_player.items():
            others = [weight for name in module.players if name != player for weight in weights[name]]
            for turn in range(module.turns[player]):
                for weight in others:
                    weight.requires_grad_(False)
                optimizer.zero_grad()
                with module.turn_context(player):
                    getattr(module, f"{player}_loss")(module.turn_batch(batch, player, turn)).backward()
                optimizer.step()
                for weight in others:
                    weight.requires_grad_(True)
                with torch.no_grad():
                    module.on_player_step(player)
        if module.lr_scheduler_interval == "step":
            for schedule in schedules:
                schedule["scheduler"].step()

    return step


def _joint_steps(module: L2LDefense) -> Step:
    """One backward pass for both players, the attacker's gradient reversed; nothing is measured."""
    optimizers, _ = module.configure_optimizers()
    classifier, attacker = optimizers

    def step(batch: Any) -> None:
        images, labels = batch
        for optimizer in optimizers:
            optimizer.zero_grad()
        perturbed = module.training_attack.learned(
            module.attacker, module.classifier, images, labels, module.noise_generator, module.attack_bn
        )
        robust_cross_entropy(module.classifier(perturbed.images), labels, None, 0.0).backward()
        for weight in _weights([attacker]):
            if weight.grad is not None:
                weight.grad.neg_()
        classifier.step()
        attacker.step()

    return step


def _weights(optimizers: Iterable[Any]) -> list[nn.Parameter]:
    return [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
