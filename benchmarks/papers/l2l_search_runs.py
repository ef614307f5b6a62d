"""Single runs of ``l2l_search.py``: train a candidate beside a clock that PGD-10 sets, and judge it."""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from image_batches import Batches
from l2l import Study, classifier, quiet, row_of
from l2l_candidates import SearchDefense, build
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rectify._lightning import Callback, Trainer, seed_everything
from lightning_rectify.attacks.gradient import pgd
from lightning_rectify.callbacks.robustness import robust_report
from lightning_rectify.data.image_datasets import stratified_take
from lightning_rectify.data.images import ImageData
from lightning_rectify.modules.l2l.networks import PixelClassifier


@dataclass(frozen=True)
class Search:
    """What all runs share."""

    study: Study
    val_images: int = 2000
    test_images: int = 4000
    keep: int = 3  # of each kind, from the first stage to the second
    references: int = 3  # PGD-10 steps after each epoch
    restarts: tuple[int, ...] = (1, 3)  # on test images
    queries: int = 500  # Square's, on test images

    def plain(self, test: bool) -> dict[str, Any]:
        """What a run on validation images, or on test images, depends on."""
        found = {**self.study.plain(), "val_images": self.val_images, "references": self.references}
        if not test:
            return {**found, "test_images": 0}
        last = {"test_images": self.test_images, "test_restarts": list(self.restarts), "square": self.queries}
        return {**found, **last}


@dataclass(frozen=True)
class Cell:
    """One run."""

    name: str
    epsilon: float
    seed: int

    def path(self, work: Path) -> Path:
        """Where its result lies."""
        stem = "".join(c if c.isalnum() or c == "." else "_" for c in self.name)
        return work / f"{stem}_e{self.epsilon:g}_s{self.seed}.json"


# -- data and training -------------------------------------------------------------------------------------------------


def prepare(search: Search, root: str | None, work: Path) -> None:
    """The study's training images, as many others of the training part to validate on, and the test part."""
    if (work / "data.pt").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    data = ImageData(search.study.dataset, root, val_size=0, augment=False, normalization="unit", seed=0)
    data.setup("fit")
    data.setup("test")
    images, labels = data.training_images()
    rest, train = stratified_take(labels, search.study.train_images, 0)  # as ImageData takes them
    val = rest[stratified_take(labels[rest], search.val_images, 0)[1]]
    test = [torch.cat(part) for part in zip(*data.test_dataloader(), strict=True)]
    parts = {"train": (images[train], labels[train]), "val": (images[val], labels[val]), "test": tuple(test)}
    torch.save({name: tuple(part.clone() for part in pair) for name, pair in parts.items()}, work / "data.pt")


class Clock(Callback):
    """The process's time inside each training epoch, and after it that of some steps of PGD-10 on another network."""

    def __init__(self, images: Tensor, labels: Tensor, epsilon: float, repeats: int) -> None:
        self.seconds: list[float] = []
        self.reference: list[float] = []
        self._batch, self._epsilon, self._repeats = (images, labels), epsilon, repeats
        self._network = classifier(images.shape[-1])
        self._sgd = torch.optim.SGD(self._network.parameters(), lr=0.01, momentum=0.9)
        self._generator = torch.Generator().manual_seed(0)
        self._begin = 0.0

    def on_train_epoch_start(self, *args: object) -> None:
        self._begin = time.process_time()

    def on_train_epoch_end(self, *args: object) -> None:
        now = time.process_time()
        self.seconds.append(now - self._begin)
        for _ in range(self._repeats):
            self._step()
        self.reference.append((time.process_time() - now) / self._repeats)

    def _step(self) -> None:
        attacked = pgd(self._network, *self._batch, self._epsilon, steps=10, generator=self._generator)
        self._network.train()
        self._sgd.zero_grad()
        F.cross_entropy(self._network(attacked), self._batch[1]).backward()
        self._sgd.step()


def train(cell: Cell, search: Search, work: Path) -> tuple[SearchDefense, float, float]:
    """The trained module, its CPU seconds an epoch, and what PGD-10 would have taken meanwhile."""
    study = search.study
    images, labels = torch.load(work / "data.pt", weights_only=True)["train"]
    seed_everything(cell.seed, verbose=False)
    batches = Batches(images, labels, study.batch_size, cell.seed, with_index=True)
    module = build(cell.name, study, cell.epsilon, len(images), images.shape[-1], len(batches))
    some = slice(study.batch_size)
    clock = Clock(images[some], labels[some], cell.epsilon, search.references)
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=study.epochs, callbacks=[clock], **silence)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module, statistics.fmean(clock.seconds), statistics.fmean(clock.reference) * len(batches)


def judge(model: Any, data: Any, epsilon: float, search: Search, test: bool) -> dict[str, Any]:
    """What PGD-50, its margin loss and APGD leave; on test images with restarts, and after targeted APGD and Square."""
    study = search.study
    attacks = ("fgsm", "pgd", "pgd_margin", "apgd_ce", *(("apgd_dlr_targeted", "square") if test else ()))
    report = robust_report(
        model, data, epsilon, steps=study.steps, restarts=search.restarts if test else study.restarts[:1],
        epsilons=(epsilon,), attacks=attacks, apgd_steps=study.apgd_steps // 2, queries=search.queries,
        max_images=None, batch_size=250, own_attack=False, progress=False,
    )  # fmt: skip
    return row_of(report)


def run(cell: Cell, search: Search, work: Path) -> dict[str, Any]:
    """Train one candidate, keep its classifier, judge it on the validation images."""
    torch.set_num_threads(1)
    quiet()
    module, seconds, reference = train(cell, search, work)
    torch.save(module.classifier.state_dict(), cell.path(work).with_suffix(".pt"))
    begin = time.process_time()
    data = torch.load(work / "data.pt", weights_only=True)["val"]
    return {
        **asdict(cell),
        **judge(module, data, cell.epsilon, search, test=False),
        "learned": module.learned,
        "epoch_cpu_seconds": seconds,
        "ratio_to_pgd": seconds / reference,
        "report_cpu_seconds": round(time.process_time() - begin, 1),
    }


def on_test(cell: Cell, search: Search, work: Path) -> dict[str, Any]:
    """Judge a finished candidate on the test part."""
    torch.set_num_threads(1)
    data = [part[: search.test_images] for part in torch.load(work / "data.pt", weights_only=True)["test"]]
    model = PixelClassifier(classifier(data[0].shape[-1]))
    model.load_state_dict(torch.load(cell.path(work).with_suffix(".pt"), weights_only=True))
    return {**asdict(cell), **judge(model, tuple(data), cell.epsilon, search, test=True)}
