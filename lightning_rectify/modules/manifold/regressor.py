"""``ManifoldRegressor``: values or classes at points near an unknown manifold, by experts on its charts."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, R2Score
from torchmetrics.classification import MulticlassAccuracy

from lightning_rectify.arguments import check_types
from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.manifold.experts import ExpertKind
from lightning_rectify.modules.manifold.mixture import ChartMixture
from lightning_rectify.modules.manifold.regressor_settings import ChartAnswers, check
from lightning_rectify.modules.manifold.starts import Start, estimated_dims, fit_mixture
from lightning_rectify.modules.sharding import load_whole_state, whole_state

_STATE = "lightning_rectify_early_stopping"
_POINTS = ("training_points", "training_images")  # of a data module, the first that it has
_MOST_NODES = 20_000  # of a grid of "p1"


class ManifoldRegressor(RectifiedModule):
    r"""A function of points near a low dimensional manifold, known only by samples (after arXiv:1908.01842).

    .. math:: \hat f(x) = \sum_i \rho_i(x)\, f_i(\phi_i(x))

    Charts (balls with tangent coordinates :math:`\phi_i`) are made from the training points, and each has an expert
    :math:`f_i`. That is the theorem's network with what data asks for, all of it ours: local PCA in place of known
    tangents, normalised gates :math:`\rho_i` in place of a known partition of unity, and least squares in place of
    Taylor coefficients. The number of charts, their radius and the polynomials' degree are chosen by leave-one-out
    error. The network itself is :class:`~lightning_rectify.modules.manifold.mixture.ChartMixture`.

    The start is already a good answer: polynomials by least squares need no training (:meth:`fit_points` is enough).
    Training from there helps where charts should be fitted together, or a loss is not quadratic (classes), and with
    noisy values it may hurt: so the experts are pulled towards their start (``anchor``), and training stops and goes
    back to the best weights when validation no longer improves (``early_stopping``). With
    ``Trainer(num_sanity_val_steps=-1)`` the start itself is one of the candidates.

    A batch is a pair: points, float, shape (B, D) or (B, ...) with D numbers in all, and values, float, shape (B,) or
    (B, K), or with ``num_classes`` classes, int64, shape (B,). Points of a user's own coordinates should be in one
    unit: distances are Euclidean.

    The charts are made in ``setup``, on rank 0 (the other ranks receive them), from the data module's
    ``training_points()`` (x and y; ``training_images()`` will do); without such a data module call :meth:`fit_points`
    first. A module that has charts keeps them. All of it is in the checkpoint.

    Logged: ``train/loss`` (mean square error over the values' variance, or cross-entropy) and, with an anchor,
    ``train/anchor``; over each epoch ``val/loss``, ``val/coverage`` (mean of :meth:`coverage`) and ``val/rmse`` (in the
    values' unit) and ``val/r2``, or ``val/accuracy``; the same under ``test/``.

    Args:
        in_features: D, at least 1.
        outputs: K of a regressor, at least 1.
        num_classes: classes K, at least 2, for a classifier; None for a regressor.
        dim: d, dimension of the manifold, in [1, D]; or "auto": of the estimates by local PCA, TwoNN and nearest
            neighbours (:func:`~lightning_rectify.modules.manifold.starts.estimated_dims`), which noise and curvature
            drive apart, the one with the least leave-one-out error.
        expert: "polynomial", "p1" (linear interpolation on a grid) or "mlp" (one hidden layer).
        degree: of the polynomials, at least 0; or "auto": by leave-one-out error.
        cells: cells a coordinate of "p1", at least 1; a chart has (cells + 1)^d nodes.
        hidden: units of "mlp", at least 1.
        dropout: share of them left out in training, in [0, 1).
        radius: of the charts, in the unit of x, above 0; or "auto": by leave-one-out error.
        init: the experts' start: "least_squares", "construction" (the proof's, from estimated derivatives) or "random";
            see :func:`~lightning_rectify.modules.manifold.starts.fit_mixture`.
        gate: "frozen", or "trained": centres and radii of the gates are trained too.
        dispatch: charts that answer for a point at most, the nearest ones; at least 1.
        outside: what points in no chart get: "nearest" (the nearest chart's value at its edge) or "mean" (of the
            training values). See :meth:`coverage` before either is believed.
        anchor: weight of the experts' squared distance from their start, in units of one training point's loss, at
            least 0: a ridge that pulls to the start and not to 0. None: 1 from "least_squares" and "construction", 0
            from "random".
        early_stopping: stop, with the best weights, after so many validations without a lower ``val/loss``; 0 never.
            None: 5 from "least_squares" and "construction", 0 from "random".
        seed: of what the start draws, at least 0.
        **kwargs: of :class:`RectifiedModule`: ``optimizer``, ``lr_scheduler``, ``lr_scheduler_interval``, ``compile``.

    Raises:
        ValueError: for an argument outside its range; in ``setup``, if the data does not fit; in ``on_fit_start``, if
            there are no charts.

    Example:
        >>> angle = torch.linspace(0, 6.28, 200)
        >>> circle = torch.stack([angle.cos(), angle.sin()], 1)
        >>> model = ManifoldRegressor(in_features=2, dim=1).fit_points(circle, (3 * angle).sin())
        >>> round(model(circle[60:61]).item(), 2), round((3 * angle[60]).sin().item(), 2)
        (-0.57, -0.57)
        >>> model.coverage(torch.tensor([[1.0, 0.0], [9.0, 9.0]])).tolist()
        [1.0, 0.0]
    """

    def __init__(
        self,
        in_features: int = 64,
        outputs: int = 1,
        num_classes: int | None = None,
        dim: int | str = "auto",
        expert: ExpertKind = "polynomial",
        degree: int | str = "auto",
        cells: int = 4,
        hidden: int = 16,
        dropout: float = 0.0,
        radius: float | str = "auto",
        init: Start = "least_squares",
        gate: str = "frozen",
        dispatch: int = 8,
        outside: str = "nearest",
        anchor: float | None = None,
        early_stopping: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_types(ManifoldRegressor, locals())
        super().__init__(**kwargs)
        check(locals())
        self.in_features, self.outputs, self.num_classes = in_features, num_classes or outputs, num_classes
        self.dim, self.degree, self.radius, self.init, self.seed = dim, degree, radius, init, seed
        self.expert, self.cells, self.hidden = expert, cells, hidden
        started = init != "random"
        self.anchor = anchor if anchor is not None else float(started)
        self.early_stopping = early_stopping if early_stopping is not None else 5 * started
        sizes = {"polynomial": 1 if degree == "auto" else degree, "p1": cells, "mlp": hidden}
        self.network = ChartMixture(
            in_features, self.outputs, expert, int(sizes[expert]), dispatch, gate == "trained", outside, dropout,
            anchored=self.anchor > 0,
        )  # fmt: skip
        self.scores = torch.nn.ModuleDict({stage: self._scores() for stage in ("val", "test")})
        self._best: dict[str, Any] = {}
        self.example_input_array = torch.zeros(2, in_features)

    def _scores(self) -> torch.nn.ModuleDict:
        if self.num_classes is not None:
            accuracy = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
            return torch.nn.ModuleDict({"accuracy": accuracy})
        return torch.nn.ModuleDict({"rmse": MeanSquaredError(squared=False), "r2": R2Score()})

    # -- charts --------------------------------------------------------------------------------------------------------

    def fit_points(self, x: Tensor, y: Tensor) -> "ManifoldRegressor":
        """Make the charts of training points, and the experts' start; without training.

        Args:
            x: points, shape (N, D) or (N, ...) with D numbers in all, N > d + 1.
            y: as in a batch.

        Returns:
            The module itself.

        Raises:
            ValueError: if shapes do not fit or there are too few points for ``dim``.
        """
        x, y = self._checked(x, y)
        highest = self._highest_dim(len(x))
        dims = [min(d, highest) for d in estimated_dims(x, self.seed)] if self.dim == "auto" else [int(self.dim)]
        if max(dims) > highest:
            raise ValueError(
                f"Expected argument `dim` to be at most {highest} with {len(x)} points, expert {self.expert!r} and "
                f"init {self.init!r} but got {self.dim}."
            )
        fit_mixture(
            self.network,
            x,
            y,
            dims,
            self.init,
            None if self.radius == "auto" else float(self.radius),
            None if self.degree == "auto" else int(self.degree),
            self.num_classes is not None,
            self.seed,
        )
        return self

    def _checked(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        if x.shape[1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"Expected argument `x` to be float points of {self.in_features} numbers, `in_features`, but got "
                f"{tuple(x.shape)} of {x.dtype}."
            )
        classes = self.num_classes is not None
        shape = (len(x),) if classes or (self.outputs == 1 and y.ndim == 1) else (len(x), self.outputs)
        if y.shape != shape or classes == y.is_floating_point():
            kind = "classes (int64)" if classes else "values (float)"
            raise ValueError(
                f"Expected argument `y` to be {kind} of shape {shape} but got {tuple(y.shape)} of {y.dtype}."
            )
        if classes and len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.outputs:
            raise ValueError(
                f"Expected argument `y` to be in [0, {self.outputs}), `num_classes`, but got {int(y.min())} to "
                f"{int(y.max())}."
            )
        return x, y if classes else y.reshape(len(x), -1)

    def _highest_dim(self, count: int) -> int:
        """What so many points bear, and of "p1" the nodes, of a constructed "mlp" its units."""
        highest = min(self.in_features, count - 2)
        if self.expert == "p1":
            return min(highest, int(math.log(_MOST_NODES) / math.log(self.cells + 1)))
        return min(highest, self.hidden) if (self.expert, self.init) == ("mlp", "construction") else highest

    def setup(self, stage: str) -> None:
        """Make the charts, unless there are some.

        Raises:
            ValueError: if the data module's points or values are not those of the arguments.
        """
        if stage == "fit":
            self._best = {}
        self.check_datamodule("in_features", *([] if self.num_classes else ["outputs"]), "num_classes")
        data = getattr(self.trainer, "datamodule", None)
        points = next((getattr(data, name) for name in _POINTS if hasattr(data, name)), None)
        if self.network.fitted or points is None:
            return
        self._fit_on_rank_0(points)

    def _fit_on_rank_0(self, points: Callable[[], tuple[Tensor, Tensor]]) -> None:
        # The same numbers on all ranks, whatever their processors make of the last digit.
        state = None
        if self.trainer.global_rank == 0:
            self.fit_points(*points())
            state = self.network.state_dict()
        if self.trainer.world_size > 1:
            state = self.trainer.strategy.broadcast(state)
            assert state is not None
            self.network.allocate_like(state)
            self.network.load_state_dict(state)

    def on_fit_start(self) -> None:
        """Refuse to train without charts.

        Raises:
            ValueError: if neither ``setup`` nor :meth:`fit_points` nor a checkpoint brought some.
        """
        if not self.network.fitted:
            raise ValueError(
                "Expected argument `datamodule` of the Trainer to have a method `training_points` (as ManifoldData), "
                f"or `fit_points` to have been called before, but got {type(self.trainer.datamodule).__name__}."  # type: ignore[attr-defined]
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the checkpoint's charts."""
        super().on_load_checkpoint(checkpoint)
        # Absent where weights are sharded: the strategy has loaded them already, into charts of the same sizes.
        saved = checkpoint.get("state_dict", {})
        mine = {key: value for key, value in saved.items() if key.startswith("network.")}
        if mine:
            self.network.allocate_like({key.removeprefix("network."): value for key, value in mine.items()})
        self._best = checkpoint.get(_STATE, {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where early stopping is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = self._best

    # -- answers -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Values (B,), or (B, K) for K > 1, or logits (B, K), of points (B, D) or (B, ...)."""
        values = self.network(x.flatten(1))
        return values if self.num_classes or self.outputs > 1 else values.squeeze(1)

    def coverage(self, x: Tensor) -> Tensor:
        """How far inside the charts points (B, D) are, (B,): 1 near a centre, 0 for points in no chart."""
        return self.network.coverage(x.flatten(1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest chart of points (B, D), int64 (B,), -1 in none; and the coordinates there, (B, d), in [0, 1]^d.

        Coordinates are linear in x within a chart, also of new points; NaN in none.
        """
        return self.network.encode(x.flatten(1))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> ChartAnswers:
        """Of each point: ``value`` (or the most probable class), ``chart``, ``z`` and ``coverage``.

        As :meth:`encode`, but z of a point in no chart (-1) are its coordinates in the nearest one, off [0, 1]^d maybe.
        """
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        values = self(x)
        chart, z = self.network.encode(x.flatten(1), mask=False)
        return ChartAnswers(
            value=values.argmax(1) if self.num_classes else values, chart=chart, z=z, coverage=self.coverage(x)
        )

    # -- training ------------------------------------------------------------------------------------------------------

    def loss(self, values: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, or the mean square error over the variance of the training values; a scalar."""
        if self.num_classes:
            return F.cross_entropy(values, y)
        return ((values - y) / self.network.scale).square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, a scalar, with the anchor's pull; logs ``train/loss`` and ``train/anchor``."""
        x, y = batch
        values = self.network(x.flatten(1))
        loss = self.loss(values, y if self.num_classes else y.reshape(values.shape))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        if self.anchor == 0:
            return loss
        pull = self.anchor * self.network.distance_from_start() / self.network.count
        self.log("train/anchor", pull, batch_size=len(x))
        return loss + pull

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val/loss``, ``val/coverage`` and the scores."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test/loss``, ``test/coverage`` and the scores."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        values = self.network(x.flatten(1))
        y = y if self.num_classes else y.reshape(values.shape)
        self.log(f"{stage}/loss", self.loss(values, y), prog_bar=True, sync_dist=True, batch_size=len(x))
        covered = self.coverage(x).mean()
        self.log(f"{stage}/coverage", covered, sync_dist=True, batch_size=len(x))
        scores: Any = self.scores[stage]
        for name, metric in scores.items():
            if self.num_classes:
                metric.update(values, y)
            else:
                metric.update(values.flatten().float(), y.flatten().float())
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=len(x))

    def on_validation_epoch_start(self) -> None:
        """Metrics anew: their zeros may have been made in inference mode, by ``Trainer.validate`` before."""
        for metric in self.scores["val"].children():
            metric.reset()  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Keep the best weights; stop with them when validation has improved no more for long enough."""
        trainer = self.trainer
        if not self.early_stopping or trainer.state.fn != "fit":
            return
        whole = list(trainer.num_sanity_val_batches) == list(trainer.num_val_batches)
        if trainer.sanity_checking and (self._best or not whole):  # only a look at the start, on the whole part
            return
        if "val/loss" not in trainer.callback_metrics:  # several validation loaders: none of them is asked
            return
        loss = float(trainer.callback_metrics["val/loss"])
        if not self._best or loss < self._best["loss"]:
            self._best = {"loss": loss, "waited": 0, "weights": whole_state(self.network)}
            return
        self._best["waited"] += 1
        if self._best["waited"] >= self.early_stopping:
            load_whole_state(self.network, self._best["weights"])
            trainer.should_stop = True
