"""The RAdam paper's language model (Figure 4) in small: RectifiedAdam and Adam on MASC, against counts of words.

Two LSTM layers with an adaptive softmax, truncated back-propagation with a carried state; RectifiedAdam, Adam and the
paper's ablations of it with the same learning rate, several seeds. After each epoch the perplexity on the validation
part, and at the end on the test part, with the weights of the best epoch; of the first updates what
``AdaptiveRateMonitor`` measured. The bars are a unigram and a bigram model with add-k smoothing over the same
vocabulary; k is the one that is best on the validation part.

    python benchmarks/papers/language_model.py --data FOLDER [--jobs 2] [--seeds 1 2 3] [--dataset masc-lm]

The text is in the layout of the One Billion Word benchmark. Each run leaves its checkpoint and a file below ``--work``,
so that an interrupted study goes on, in the middle of an epoch too. With ``--dataset grammar`` the text is the embedded
one, and the least possible perplexity is in the result.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablation import OPTIMIZERS, csv_logger, draw_points, read_points
from single_runs import keep, run_all, split, study_parser
from timing import data_folder, environment, output_path, write_result

from lightning_rectify import AdaptiveRateMonitor
from lightning_rectify._lightning import Callback, ModelCheckpoint, Trainer, seed_everything
from lightning_rectify.data import grammar
from lightning_rectify.data.tokens import TokenData
from lightning_rectify.modules.language_model import LanguageModel
from lightning_rectify.optim import LinearDecay
from lightning_rectify.words import END

NAME = "language_model"
FOLDERS = {"masc-lm": ("masc-lm", "."), "one_billion_words": ("one_billion_words", ".")}
COMPARED = ("Adam", "Adam, warmup 400", "Adam-2k", "Adam-eps", "RectifiedAdam")
SMOOTHINGS = [10.0 ** (power / 4) for power in range(-16, 5)]


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    dataset: str
    root: str
    min_count: int = 3
    embedding_size: int = 200
    hidden_size: int = 200
    dropout: float = 0.5
    clip: float = 5.0
    batch_size: int = 20
    bptt: int = 20
    epochs: int = 12
    train_size: int | None = None

    def plain(self) -> dict[str, Any]:
        """All but where the text lies."""
        return {name: value for name, value in asdict(self).items() if name != "root"}

    def data(self, seed: int) -> TokenData:
        """The text; its order in training is the seed's."""
        options: dict[str, Any] = {"dataset": "grammar"}
        if self.dataset != "grammar":
            options = {"dataset": "one_billion_words", "root": self.root}
        return TokenData(
            **options, min_count=self.min_count, batch_size=self.batch_size, bptt=self.bptt, train_size=self.train_size,
            seed=seed if self.dataset != "grammar" else 0,
        )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run."""

    optimizer: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer.replace(', ', '_').replace(' ', '')}_{self.lr:g}_s{self.seed}"


class Curve(Callback):
    """Perplexities of every epoch; part of the checkpoint."""

    def __init__(self) -> None:
        self.val: list[float] = []
        self.train: list[float] = []
        self._sum, self._steps = 0.0, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._sum += float(trainer.callback_metrics["train/loss"])
        self._steps += 1

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.val.append(round(float(trainer.callback_metrics["val/perplexity"]), 3))
        self.train.append(round(float(np.exp(self._sum / max(1, self._steps))), 3))
        self._sum, self._steps = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"val": self.val, "train": self.train, "sum": self._sum, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.val, self.train = list(state["val"]), list(state["train"])
        self._sum, self._steps = state["sum"], state["steps"]


def run(cell: Cell, setting: Setting, work: Path) -> dict[str, Any]:
    """Train one model, from its checkpoint if there is one; on one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    begin = time.process_time()
    data = setting.data(cell.seed)
    size = len(data.vocabulary)
    how = OPTIMIZERS[cell.optimizer]
    steps = setting.epochs * len(data.train_dataloader())
    seed_everything(cell.seed, verbose=False)
    module = LanguageModel(
        size, setting.embedding_size, setting.hidden_size, dropout=setting.dropout, cutoffs=[size // 6, size // 2],
        optimizer=partial(how.make, lr=cell.lr), lr_scheduler_interval="step",
        lr_scheduler=partial(LinearDecay, total_steps=steps, warmup_steps=how.warmup),
    )  # fmt: skip
    folder, curve = work / f"{setting.dataset}_{cell.name}", Curve()
    checkpoint = partial(ModelCheckpoint, folder, enable_version_counter=False)
    often = checkpoint(filename="going_on", every_n_train_steps=200)
    best = checkpoint(filename="best", monitor="val/perplexity")
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=setting.epochs, gradient_clip_val=setting.clip,
        callbacks=[curve, often, best, AdaptiveRateMonitor()], default_root_dir=folder, logger=csv_logger(folder),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    going_on = folder / "going_on.ckpt"
    trainer.fit(module, data, ckpt_path=going_on if going_on.exists() else None)
    tested = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)[0]
    row = {
        **asdict(cell),
        "test_perplexity": round(tested["test/perplexity"], 3),
        "val_perplexity": min(curve.val),
        "best_epoch": 1 + int(np.argmin(curve.val)),
        "val": curve.val,
        "train": curve.train,
        "points": read_points(folder, how.frozen),
        "steps": trainer.global_step,
        "parameters": sum(p.numel() for p in module.parameters()),
        "cpu_seconds": round(time.process_time() - begin, 1),  # of the part that this process ran
    }
    return keep(work / f"{setting.dataset}_{cell.name}.json", setting.plain(), row)


# -- the bars ----------------------------------------------------------------------------------------------------------


def counts(data: TokenData) -> list[dict[str, Any]]:
    """Perplexities of the unigram and the bigram model with add-k smoothing, k by the validation part.

    p(w) = (n(w) + k) / (N + k V) and p(w | v) = (n(v, w) + k) / (n(v) + k V); the word before a sentence's first is the
    end of another. All words count, sentence ends and the unknown word among them, as in the model's perplexity.
    """
    size = len(data.vocabulary)
    texts = {part: [END, *data._encode_part(part).ids.tolist()] for part in ("train", "val", "test")}
    single, double = Counter(texts["train"][1:]), Counter(pairwise(texts["train"]))
    before = Counter(texts["train"][:-1])
    total = len(texts["train"]) - 1

    def perplexity(text: Sequence[int], order: int, k: float) -> float:
        pairs = Counter(pairwise(text))
        nll = 0.0
        for (first, second), times in pairs.items():
            count, context = (single[second], total) if order == 1 else (double[first, second], before[first])
            nll -= times * float(np.log((count + k) / (context + k * size)))
        return float(np.exp(nll / (len(text) - 1)))

    rows = []
    for order, name in ((1, "unigram"), (2, "bigram")):
        k = min(SMOOTHINGS, key=lambda k, order=order: perplexity(texts["val"], order, k))  # type: ignore[misc]
        found = {part: round(perplexity(texts[part], order, k), 3) for part in ("val", "test")}
        rows.append({"model": name, "k": k, "val_perplexity": found["val"], "test_perplexity": found["test"]})
    return rows


def summarize(rows: Sequence[dict[str, Any]], bars: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a model: the mean over seeds, with the smallest and the largest."""
    table: list[dict[str, Any]] = [dict(bar) for bar in bars]
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        group = [row for row in rows if row["optimizer"] == name]
        line: dict[str, Any] = {"model": f"LSTM, {name}", "runs": len(group)}
        for key in ("val_perplexity", "test_perplexity"):
            values = [row[key] for row in group]
            line[key] = [round(statistics.fmean(values), 3), min(values), max(values)]
        table.append(line)
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Validation perplexity by epoch (all seeds), and what the monitor measured in the first updates (first seed)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colours = dict(zip(OPTIMIZERS, plt.get_cmap("tab10")(range(10)), strict=False))
    first = min(row["seed"] for row in rows)
    for row in sorted(rows, key=lambda row: row["seed"]):
        name, label = row["optimizer"], row["optimizer"] if row["seed"] == first else None
        axes[0].plot(range(1, len(row["val"]) + 1), row["val"], color=colours[name], lw=1, label=label)
        if row["seed"] == first:
            draw_points(axes[1:], row["points"], colours[name], label)
    axes[0].set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[1, 2, 3])
    arguments.add_argument("--data", help="folder that holds masc-lm")
    arguments.add_argument("--dataset", choices=[*FOLDERS, "grammar"], default="masc-lm")
    arguments.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(COMPARED))
    arguments.add_argument("--lr", nargs="+", type=float, default=[2e-3])
    arguments.add_argument("--epochs", type=int, default=12)
    arguments.add_argument("--hidden", type=int, default=200, help="features of words and layers")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    if args.quick:
        setting = Setting("grammar", "", 1, 16, 16, dropout=0.0, batch_size=10, epochs=1, train_size=400)
        cells, work = [Cell(name, 1e-2, 1) for name in ("Adam", "RectifiedAdam")], path.parent / NAME
    else:
        root = "" if args.dataset == "grammar" else data_folder(args.data, FOLDERS[args.dataset])
        small = {"min_count": 1, "dropout": 0.1} if args.dataset == "grammar" else {}
        sizes = {"embedding_size": args.hidden, "hidden_size": args.hidden, "epochs": args.epochs}
        setting, work = Setting(args.dataset, root, **{**sizes, **small}), args.work
        cells = [Cell(name, lr, seed) for seed in args.seeds for lr in args.lr for name in args.optimizers]
    work.mkdir(parents=True, exist_ok=True)
    done, todo = split(cells, lambda cell: (work / f"{setting.dataset}_{cell.name}.json", setting.plain()))
    rows = [row for _, row in done]
    data = setting.data(1)
    bars = counts(data)
    for bar in bars:
        print(f"{bar['model']}, k = {bar['k']:.3g}: test perplexity {bar['test_perplexity']}", flush=True)
    jobs = 0 if args.quick else args.jobs
    for _, row, left in run_all(partial(run, setting=setting, work=work), todo, jobs, runs_a_process=1):
        rows.append(row)
        words = f"{row['optimizer']} seed {row['seed']}: test perplexity {row['test_perplexity']}, {left}"
        print(words, flush=True)
    settings = {**setting.plain(), "vocabulary": len(data.vocabulary), "words": len(data._encode_part("train").ids)}
    least = {"least_possible_perplexity": grammar.best_perplexity()} if setting.dataset == "grammar" else {}
    machine = {**environment(packages=("torchmetrics",)), "threads": 1}
    write_result(path, NAME, settings, rows, bars=bars, table=summarize(rows, bars), environment=machine, **least)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
