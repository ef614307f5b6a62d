"""``PlanModule``: a game whose generator is a transport plan; its units, its answers and its metrics."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_rectify.arguments import check_least
from lightning_rectify.modules.minimax import MinimaxModule
from lightning_rectify.modules.spot.costs import CostFunction, Reduction
from lightning_rectify.modules.spot.eta import automatic_eta, largest_gradient, warn_if_small
from lightning_rectify.modules.spot.metrics import estimate, l2_uvp, regret
from lightning_rectify.modules.spot.networks import PlanGenerator
from lightning_rectify.nn.modes import evaluating

LOOK = 2000  # samples that eta="auto" and standardize see
_NUMBERS = 2**22  # generated at one time
_COST_NAME = "lightning_rectify_cost"


class PlanModule(MinimaxModule):
    """A game with a ``generator`` of pairs and a ``cost_function``; the subclass has the losses.

    Networks work in standardized units: x = ``loc_x`` + ``scale`` * output, so for y; a critic's slope is the same in
    both. All answers come from the generator's moving average, in the units of the data, and are functions of the
    weights and the arguments: latents are drawn on the CPU, from a seed.
    """

    generator: PlanGenerator
    cost_function: CostFunction
    latent_size: int
    loc_x: Tensor
    loc_y: Tensor
    scale: Tensor
    eta: Tensor
    measured: Tensor
    cost_name: str
    reduction: Reduction
    shape_x: tuple[int, ...]
    shape_y: tuple[int, ...]

    def make_plan(self, eta: float | str, standardize: bool, eval_samples: int, eval_seed: int) -> None:
        """Make the constants of the plan; called by the subclass's constructor once the shapes are set."""
        self.standardize, self.eval_samples, self.eval_seed, self._eta = standardize, eval_samples, eval_seed, eta
        self.register_buffer("loc_x", torch.zeros(self.shape_x))
        self.register_buffer("loc_y", torch.zeros(self.shape_y))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("eta", torch.tensor(float("nan") if eta == "auto" else float(eta)))
        self.register_buffer("measured", torch.tensor(False))
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._warned = False

    # -- units, eta ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Before the first step ever: take units and eta from the data."""
        if not bool(self.measured):
            x, y = self._first_samples()
            self._measure(x.to(self.scale), y.to(self.scale))
        if not isinstance(self._eta, str):
            self.eta.fill_(self._eta)  # the argument's, whatever the checkpoint was trained with
        self._warned = False
        super().on_train_start()

    def _measure(self, x: Tensor, y: Tensor) -> None:
        self._check_shapes(x, y)
        if self.standardize:
            self.loc_x.copy_(x.mean(dim=0))
            self.loc_y.copy_(y.mean(dim=0))
            variance = ((x - self.loc_x).square().mean() + (y - self.loc_y).square().mean()) / 2.0
            self.scale.copy_(variance.sqrt() if variance > 0 else torch.ones(()))
        if self._eta == "auto":
            self.eta.fill_(automatic_eta(largest_gradient(self.cost_function, x, y), float(self.scale)))
        elif self.reduction == "mean":  # the released one has no units to compare in
            warn_if_small(largest_gradient(self.cost_function, x, y), float(self.eta))
        self.measured.fill_(True)

    def _first_samples(self) -> tuple[Tensor, Tensor]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "training_samples"):
            samples = datamodule.training_samples(LOOK)
        else:
            batches: list[Any] = []
            loader = self.trainer.train_dataloader
            assert loader is not None  # training is about to start
            for batch in loader:
                batches.append(batch)
                if sum(len(part[0]) for part in batches) >= LOOK:
                    break
            samples = tuple(torch.cat(sides) for sides in zip(*batches, strict=True))
        return self.trainer.strategy.broadcast(samples) if self.trainer.world_size > 1 else samples

    def _standardized(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        self._check_shapes(x, y)
        return (x - self.loc_x) / self.scale, (y - self.loc_y) / self.scale

    def _data_units(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc_x + self.scale * x, self.loc_y + self.scale * y

    def _check_shapes(self, x: Tensor, y: Tensor) -> None:
        for name, side, shape in (("x", x, self.shape_x), ("y", y, self.shape_y)):
            if tuple(side.shape[1:]) != shape:
                raise ValueError(
                    f"Expected argument `shape_{name}` to be the shape of the data's {name}, "
                    f"{list(side.shape[1:])}, but got {list(shape)}."
                )

    # -- answers -------------------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor) -> Tensor:
        """Pairs of latents (B, L), flat and joined, shape (B, P + Q), by the averaged generator; see ``split``."""
        joined = at_least_float32(self.averaged("generator")(latents))
        x, y = self._data_units(*self.split(joined))
        return torch.cat([x.flatten(1), y.flatten(1)], dim=1)

    def sample_pairs(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Pairs (x, y) of the plan, shapes (count, *shape_x) and (count, *shape_y), on the module's device.

        Args:
            count: how many, at least 1.
            seed: of the latents, at least 0.

        Raises:
            ValueError: for a count below 1.
        """
        check_least(1, count=count)
        latents = torch.randn(count, self.latent_size, generator=torch.Generator().manual_seed(seed))
        latents = latents.to(self.scale)
        chunk = max(_NUMBERS // max(math.prod(self.generator.shape_x), math.prod(self.generator.shape_y), 64), 1)
        with evaluating(self.averaged("generator")):
            return self.split(torch.cat([self(part) for part in latents.split(chunk)]))

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """x, shape (B, *shape_x), and y, shape (B, *shape_y), of what ``forward`` gives."""
        return self.generator.split(joined)

    def setup(self, stage: str) -> None:
        """Refuse data whose truth is that of another cost."""
        super().setup(stage)
        truth = self._truth()
        theirs = getattr(truth, "cost_name", self.cost_name)
        if theirs != self.cost_name:
            raise ValueError(
                f"Expected argument `cost` of the datamodule to be that of {type(self).__name__}, {self.cost_name!r}, "
                f"or null, but got {theirs!r}."
            )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch."""
        self._seen.append((batch[0], batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch."""
        self._seen.append((batch[0], batch[1]))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_metrics("test")

    def _truth(self) -> Any:
        return getattr(getattr(self.trainer, "datamodule", None), "truth", None)

    def _log_metrics(self, stage: str) -> None:
        seen, self._seen = self._seen, []
        if not seen or self.trainer.sanity_checking:
            return
        sides = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        if self.trainer.world_size > 1:  # every rank then computes the same
            sides = [torch.as_tensor(self.all_gather(side)).flatten(0, 1) for side in sides]
        count = max(self.eval_samples, *map(len, sides))
        pairs = self.sample_pairs(count, self.eval_seed)
        found = estimate(self.cost_function, pairs, (sides[0], sides[1]), float(self.eta))
        names = ["independent_cost", *(f"marginal_{what}_{side}" for what in ("gap", "floor") for side in ("x", "y"))]
        values = {"cost": found.value, **{name: getattr(found, name) for name in names}}
        if (truth := self._truth()) is not None:
            values["cost_error"] = (found.value - truth.cost) / truth.cost
            values["regret"] = regret(found.value, truth.cost, truth.independent_cost)
            if truth.map is not None:
                values["l2_uvp"] = l2_uvp(*pairs, truth.map, truth.variance_y)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the cost's name: a function is no hyperparameter."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_COST_NAME] = self.cost_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another cost than the plan was trained with."""
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get(_COST_NAME, self.cost_name) != self.cost_name:
            raise ValueError(
                f"Expected argument `cost` to be the one of the checkpoint, {checkpoint[_COST_NAME]!r}, but got "
                f"{self.cost_name!r}; give it to load_from_checkpoint(..., cost=...)."
            )


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32 or higher: under autocast networks answer in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
