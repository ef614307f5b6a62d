"""The average of a run's last checkpoints, which translation papers report instead of the last weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rectify._lightning import (
    Callback,
    LightningModule,
    ModelCheckpoint,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.callbacks._logs import replacing
from lightning_rectify.checkpoints import AVERAGED_FROM, load_plain


class CheckpointAverage(ModelCheckpoint):
    """Keeps the last checkpoints of a run and, when ``fit`` ends, writes their average beside them.

    The Transformer's evaluation (Vaswani et al. 2017, arXiv:1706.03762, section 6.1) averages the last 5 or 20
    checkpoints, the RAdam paper's translation runs (arXiv:1908.03265) the last 20. Once the learning rate has fallen to
    nothing the last checkpoints are nearly the same, and so is their average.

    ``average.ckpt`` is a checkpoint like any other (see :func:`average_checkpoints`): ``Trainer.test(ckpt_path=...)``
    and ``load_from_checkpoint`` take it. It is the average of what there is if there are fewer than ``last``; a resumed
    run counts the checkpoints of the run that it goes on from, wherever they lie, and deletes none outside its own
    folder. A run that an exception ends has no average: ``average_checkpoints`` makes it from its files.

    ``trainer.checkpoint_callback`` and ``ckpt_path="best"`` stay those of another ``ModelCheckpoint`` if there is one.
    Checkpoints that are folders (sharded ones) cannot be averaged.

    Args:
        last: number of checkpoints to keep and to average, at least 1.
        dirpath: where to; None for the ``checkpoints`` folder of the run.
        filename: of the checkpoints, as for ``ModelCheckpoint``.
        every_n_epochs: save at the end of each n-th epoch; None for each one, or for none with ``every_n_train_steps``.
        every_n_train_steps: save after each n-th update instead.
        save_weights_only: leave out what a resume needs (optimizers, schedules), also of the average.

    Attributes:
        average_path: path of ``average.ckpt``, or "" as long as there is none.

    Raises:
        ValueError: for an argument outside its range, and at the end of fit for weights that are not finite.

    Example:
        >>> CheckpointAverage(last=20, every_n_train_steps=1000).last  # trainer = Trainer(callbacks=[...])
        20
    """

    def __init__(
        self,
        last: int = 10,
        dirpath: str | Path | None = None,
        filename: str = "recent-{epoch}-{step}",
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        save_weights_only: bool = False,
    ) -> None:
        check_types(CheckpointAverage, locals())
        check_least(1, last=last, every_n_epochs=every_n_epochs, every_n_train_steps=every_n_train_steps)
        if not filename:
            raise ValueError("Expected argument `filename` to be the beginning of a file's name but got ''.")
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise ValueError(
                "Expected argument `every_n_train_steps` to be None with `every_n_epochs` but got "
                f"{every_n_train_steps!r}."
            )
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            # The last k: Lightning refuses k > 1 without a metric, and the step's number is one that grows.
            monitor="step",
            mode="max",
            save_top_k=last,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            save_weights_only=save_weights_only,
            save_on_train_epoch_end=True,  # no metric of a validation is waited for
        )
        self.last = last
        self.average_path = ""

    @property
    def state_key(self) -> str:
        """Of this callback among a checkpoint's: two that keep another number are two."""
        return f"{super().state_key}[last={self.last}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let every other checkpoint callback go first: the first is the trainer's, whose best file is tested."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # A new list: Lightning is in the middle of the old one.
        trainer.callbacks = [one for one in callbacks if one is not self] + [self]  # type: ignore[attr-defined]
        if stage == "fit":
            self.average_path = ""

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        # A module may log a "step" of its own, for another x axis; the last checkpoints are the last nevertheless.
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the files of the run that this one goes on from, in whatever folder they are."""
        # ModelCheckpoint forgets them where the folder is another, as each run's is with a logger.
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the average, on the first process."""
        super().on_train_end(trainer, pl_module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path, failure = "", None
        if trainer.is_global_zero:
            try:
                path = self._write()
            except Exception as error:  # the others wait, and must hear of it
                failure = error
        # Also the barrier behind which the file is there for all.
        self.average_path, message = trainer.strategy.broadcast((path, str(failure or "")))
        if failure is not None:
            raise failure
        if message:
            raise RuntimeError(f"The first process could not average checkpoints: {message}")

    def _write(self) -> str:
        by_age = sorted(self.best_k_models, key=lambda path: float(self.best_k_models[path]))
        paths = [path for path in by_age if Path(path).exists()]
        if gone := [path for path in by_age if path not in paths]:
            rank_zero_warn(f"CheckpointAverage averages without checkpoints that are gone: {', '.join(gone)}.")
        if not paths or self.dirpath is None:
            rank_zero_warn("CheckpointAverage wrote no average: no checkpoint was saved.")
            return ""
        output = average_checkpoints(paths, Path(self.dirpath) / "average.ckpt")
        rank_zero_info(f"{output}: average of {len(paths)} checkpoints ({', '.join(Path(p).name for p in paths)})")
        return str(output)


def average_checkpoints(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Write a checkpoint whose weights are the mean of those of several others.

    Every tensor of floating point in the state dict is averaged, in float64 and over the files one by one, and gets its
    own dtype back: parameters, and also buffers such as batch normalization's averages. All else comes from the newest
    file (that with the largest ``global_step``; of several the one named last): integers, extra state,
    hyperparameters, the state of optimizers, callbacks and loops. The key ``lightning_rectify_averaged_from`` names the
    files. Memory is about twice that of one model in float64, however many the files; they are read with
    ``weights_only=True``, and without their optimizer's state but for the newest's, which is copied.

    Args:
        paths: Lightning's checkpoints, as single files, of one module; at least one.
        output: file to write, at once or not at all; none of ``paths``.

    Returns:
        ``output`` as a path.

    Raises:
        ValueError: without paths; if ``output`` is among them; for a file that has other weights than the first, or
            weights that are not finite (infinite ones are let through where they are the same in all files, as in the
            buffer of a mask).
    """
    files, output = [Path(path) for path in paths], Path(output)
    if not files:
        raise ValueError("Expected argument `paths` to be at least one checkpoint but got none.")
    if output.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"Expected argument `output` to be none of `paths` but got {str(output)!r}.")
    first = newest = _read(files[0])
    sums: dict[str, Tensor] = {}
    for file in files:
        checkpoint = _read(file)
        _check_same_weights(file, checkpoint["state_dict"], files[0], first["state_dict"])
        for key, value in checkpoint["state_dict"].items():
            if _is_averaged(value):
                _check_finite(key, {files[0]: first["state_dict"][key], file: value})
                wide = value.to(torch.promote_types(value.dtype, torch.float64))
                sums[key] = sums[key].add_(wide) if key in sums else wide.clone()
        if checkpoint["global_step"] >= newest["global_step"]:
            newest = checkpoint
    for key in list(sums):  # one at a time: the model in float64 goes as the model in its own dtype comes
        newest["state_dict"][key] = sums.pop(key).div_(len(files)).to(newest["state_dict"][key].dtype)
    newest[AVERAGED_FROM] = [str(file) for file in files]
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        torch.save(newest, temporary)
    return output


def _read(file: Path) -> dict[str, Any]:
    """A checkpoint whose tensors stay on disk until they are used."""
    if file.is_dir():
        raise ValueError(f"Expected each of `paths` to be a file but got the folder {str(file)!r} (sharded weights?).")
    checkpoint: dict[str, Any] = load_plain(file)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "global_step" not in checkpoint:
        raise ValueError(f"Expected each of `paths` to be a checkpoint of Lightning but got {str(file)!r}.")
    return checkpoint


def _is_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _check_same_weights(file: Path, state: dict[str, Any], first_file: Path, first: dict[str, Any]) -> None:
    found, expected = (
        {key: (tuple(value.shape), value.dtype) for key, value in each.items() if _is_averaged(value)}
        for each in (state, first)
    )
    if found != expected:
        odd = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise ValueError(
            f"Expected all of `paths` to hold weights of the same names, shapes and dtypes but got {str(file)!r}, "
            f"which differs from {str(first_file)!r} in {', '.join(odd[:5])}."
        )


def _check_finite(key: str, values: dict[Path, Tensor]) -> None:
    """Refuse NaN, and infinite numbers that are not the same in both files."""
    odd = [file for file, value in values.items() if not torch.isfinite(value).all()]
    if odd and not torch.equal(*(values[file] for file in (next(iter(values)), list(values)[-1]))):
        raise ValueError(
            f"Expected the weights of each of `paths` to be finite but got {str(odd[-1])!r} with {key!r} that is not."
        )
