"""A small game whose batches carry their own noise, the same game as a loop in plain torch, and jobs for two ranks."""

import copy
from functools import partial

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify._lightning import Callback, seed_everything
from lightning_rectify.modules.minimax import MinimaxModule
from tests.helpers.training import trainer, weights

BATCH = 8
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Adam = partial(torch.optim.Adam, lr=0.01)


def critic_loss(critic, generator, batch):
    x, z = batch
    return softplus(-critic(x)).mean() + softplus(critic(generator(z))).mean()


def generator_loss(critic, generator, batch):
    return softplus(-critic(generator(batch[1]))).mean()


def joint_loss(critic, generator, batch):
    """Wasserstein's: the generator minimises, the critic maximises."""
    x, z = batch
    return critic(x).mean() - critic(generator(z)).mean() - 0.1 * critic(x).square().mean()


class Game(MinimaxModule):
    """A batch is points x, shape (B, 2), and latent vectors z, shape (B, 3)."""

    players = ("critic", "generator")
    maximizer = "critic"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def critic_loss(self, batch):
        return critic_loss(self.critic, self.generator, batch)

    def generator_loss(self, batch):
        return generator_loss(self.critic, self.generator, batch)

    def joint_loss(self, batch):
        return joint_loss(self.critic, self.generator, batch)


def make_game(cls=Game, seed=0, **kwargs):
    """Always with the same weights for a seed."""
    seed_everything(seed, verbose=False)
    return cls(**{"optimizer": SGD, **kwargs})


def loader(batches=7, rank=None):
    """Batches of ``BATCH``, in a fixed order; for a rank of two, its half of each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * BATCH, 2, generator=generator) + torch.tensor([2.0, -1.0])
    z = torch.randn(batches * BATCH, 3, generator=generator)
    if rank is None:
        return DataLoader(TensorDataset(x, z), batch_size=BATCH)
    return DataLoader(TensorDataset(x[rank::2], z[rank::2]), batch_size=BATCH // 2)


def fit(module, batches=7, ckpt_path=None, **options):
    training = trainer(**{"max_epochs": 1, "limit_val_batches": 0, **options})
    training.fit(module, loader(batches), ckpt_path=ckpt_path)
    return training


def by_hand(game, batches=7, epochs=1, optimizer=SGD, accumulate=1, turns=None, clip=None, joint=False):
    """What a copy of the game's networks becomes: no Lightning, gradients by ``torch.autograd.grad``."""
    networks = copy.deepcopy(nn.ModuleDict({"critic": game.critic, "generator": game.generator}))
    optimizers = {player: optimizer(network.parameters()) for player, network in networks.items()}
    losses = {"critic": critic_loss, "generator": generator_loss}

    def mean_gradient(player, loss, window):
        parameters = list(networks[player].parameters())
        each = [torch.autograd.grad(loss(networks["critic"], networks["generator"], b), parameters) for b in window]
        return [sum(gradients) / len(window) for gradients in zip(*each, strict=True)]

    def step(player, gradients):
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        factor = min(1.0, (clip or {}).get(player, float("inf")) / (norm.item() + 1e-6))  # as torch clips
        for parameter, gradient in zip(networks[player].parameters(), gradients, strict=True):
            parameter.grad = gradient * factor
        optimizers[player].step()

    for _ in range(epochs):
        rounds = list(loader(batches))
        for window in (rounds[i : i + accumulate] for i in range(0, len(rounds), accumulate)):
            if joint:
                up = [-gradient for gradient in mean_gradient("critic", joint_loss, window)]
                down = mean_gradient("generator", joint_loss, window)
                step("critic", up), step("generator", down)
                continue
            for player, loss in losses.items():
                for _ in range((turns or {}).get(player, 1)):
                    step(player, mean_gradient(player, loss, window))
    return weights(networks)


class Steps(Callback):
    """Each real step in order: the player, its learning rate and the norm of its gradient."""

    def __init__(self):
        self.players, self.lr, self.norm = [], [], []

    def on_train_start(self, trainer, pl_module):
        for player, optimizer in zip(pl_module.players, trainer.optimizers, strict=True):
            optimizer.register_step_post_hook(partial(self._keep, player))

    def _keep(self, player, optimizer, *args):
        (group,) = optimizer.param_groups
        self.players.append(player)
        self.lr.append(group["lr"])
        self.norm.append(nn.utils.get_total_norm([p.grad for p in group["params"]]).item())

    def rates(self, player):
        return [lr for name, lr in zip(self.players, self.lr, strict=True) if name == player]


# -- jobs for two ranks ------------------------------------------------------------------------------------------------


TWO = {"devices": 2, "strategy": "ddp", "limit_val_batches": 0, "use_distributed_sampler": False}


def play_on_rank(**kwargs):
    """Weights of this rank after two epochs on its halves of the batches, in float64."""
    module = make_game(**kwargs)
    training = trainer(**TWO, max_epochs=2, precision="64-true")
    training.fit(module, loader(rank=torch.distributed.get_rank()))
    return {"weights": weights(module), "steps": training.global_step}


def meetings_on_rank():
    """For each backward pass of one round of three batches, whether DDP reduces its gradients."""
    meets = []

    class Look(Game):
        def on_before_backward(self, loss):
            meets.append(self.trainer.strategy.model.require_backward_grad_sync)

    trainer(**TWO, max_steps=1).fit(make_game(Look, accumulate=3), loader(3, torch.distributed.get_rank()))
    return meets


def noise_on_rank():
    """What this rank draws; it drew once before there was a Trainer, as in a user's script that looks at samples."""
    module = make_game()
    module.noise(1)
    drawn = []
    module.turn_batch = lambda batch, player, turn: (drawn.append(module.noise(5)), batch)[1]
    trainer(**TWO, max_steps=1).fit(module, loader(rank=torch.distributed.get_rank()))
    return torch.cat(drawn)
