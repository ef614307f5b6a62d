"""The two losses of the paper's joint method (DASPOT of arXiv:1905.00158), in the form of the authors' code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rectify.modules.spot.adaptation_losses import Adversarial, critic_loss, fooling_loss
from lightning_rectify.modules.spot.adaptation_networks import Domain
from lightning_rectify.modules.spot.costs import squared_cost
from lightning_rectify.modules.spot.plan import at_least_float32

DOMAINS: tuple[Domain, Domain] = ("source", "target")
Penalty = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def network_loss(
    network: Any,
    batch: Any,
    fakes: tuple[Tensor, Tensor],
    kind: Adversarial,
    class_weight: float,
    transport_weight: float,
    penalty: Penalty,
) -> tuple[Tensor, Tensor]:
    r"""What the network of features, critics and classifier minimises, and the feature cost in it.

    .. math:: \text{adv}_X + \text{adv}_Y + w_c\, CE(h(\phi_X(X)), V)
        + w_t\, E \lVert \phi_X(G_X) - \phi_Y(G_Y) \rVert^2

    Args:
        network: a :class:`DomainNetwork`.
        batch: source images, labels, target images.
        fakes: a generated source and target image a row, not followed by gradients.
        kind: of the adversarial terms.
        class_weight: w_c; 10 as released.
        transport_weight: w_t; 0.01 as released. Both players minimise this term.
        penalty: of a critic, real and generated images.
    """
    images, labels, target = batch
    loss, generated = images.new_zeros(()), []
    for real, fake, domain in zip((images, target), fakes, DOMAINS, strict=True):
        features = _features(network, torch.cat([real, at_least_float32(fake)]), domain)
        scores = _scores(network, features, domain)
        loss = loss + critic_loss(kind, scores[: len(real)], scores[len(real) :])

        def critic(x: Tensor, domain: Domain = domain) -> Tensor:
            return _scores(network, _features(network, x, domain), domain)

        loss = loss + penalty(critic, real, at_least_float32(fake))
        generated.append(features[len(real) :])
        if domain == "source":
            logits = at_least_float32(network.head(features[: len(real)]))
            loss = loss + class_weight * F.cross_entropy(logits, labels)
    cost = squared_cost(generated[0], generated[1]).mean()
    return loss + transport_weight * cost, cost


def pair_loss(network: Any, pair: tuple[Tensor, Tensor], kind: Adversarial, transport_weight: float) -> Tensor:
    """What the generator of pairs minimises: both fooling losses and the feature cost.

    Args:
        network: a :class:`DomainNetwork`.
        pair: generated source and target images, (B, C, S, S) each.
        kind: of the adversarial terms.
        transport_weight: of the feature cost.
    """
    features = [_features(network, side, domain) for side, domain in zip(pair, DOMAINS, strict=True)]
    scores = [_scores(network, part, domain) for part, domain in zip(features, DOMAINS, strict=True)]
    fooling = fooling_loss(kind, scores[0]) + fooling_loss(kind, scores[1])
    return fooling + transport_weight * squared_cost(features[0], features[1]).mean()


def _features(network: Any, images: Tensor, domain: Domain) -> Tensor:
    return at_least_float32(network.features(images, domain))


def _scores(network: Any, features: Tensor, domain: Domain) -> Tensor:
    head = network.critic_target if domain == "target" else network.critic_source
    return at_least_float32(head(features))[:, 0]
