"""From raw text to BLEU: Multi30k and LibreOffice's help, both directions, several seeds.

Trains the Translator for a number of updates (never for a time), chooses the exponent of the length penalty on the
validation part, and translates the test part once: sacreBLEU on cased, detokenised text. Nothing is chosen on test.

    python benchmarks/papers/translation_bleu.py --data FOLDER [--seeds 1 2 3] [--updates 3300] [--pairs multi30k.de-en]

Each run leaves a file below ``--work``, so that an interrupted study goes on; ``--finished`` writes what there is.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from single_runs import study_parser
from timing import cpu_model, data_folder, environment, output_path, write_result

from lightning_rectify import RectifiedAdam, TranslationData, Translator
from lightning_rectify._lightning import Callback, ModelCheckpoint, Trainer, seed_everything
from lightning_rectify.optim import LinearDecay

NAME = "translation_bleu"
PAIRS = ("multi30k.de-en", "multi30k.en-de", "libreoffice.de-en", "libreoffice.en-de")
FOLDERS = {"multi30k": ("multi30k", "."), "libreoffice": ("libreoffice-help-de-en", "libreoffice", ".")}
PENALTIES = (0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0)


@dataclass(frozen=True)
class Recipe:
    """What all runs share."""

    updates: int = 3300
    batch_tokens: int = 2000
    vocab_size: int = 8000
    width: int = 256
    feedforward: int = 1024
    layers: int = 3
    dropout: float = 0.2
    lr: float = 1e-3
    weight_decay: float = 1e-4
    precision: str = "bf16-mixed"


def open_data(dataset: str, root: str, source: str, recipe: Recipe, seed: int) -> TranslationData:
    if dataset == "numbers":
        return TranslationData(batch_tokens=500, train_size=400, val_size=40, test_size=40, vocab_size=200, seed=seed)
    files = {} if dataset == "multi30k" else {"train": "train", "val": "val", "test": "test"}
    return TranslationData(
        dataset=dataset if dataset == "multi30k" else "files", root=root, source=source,
        target="en" if source == "de" else "de", vocab_size=recipe.vocab_size, batch_tokens=recipe.batch_tokens,
        seed=seed, **files,
    )  # fmt: skip


class Curve(Callback):
    """What validation said, by update, and the seconds of training, those before an interruption included."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.earlier, self.begin = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.begin

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points, self.earlier = list(state_dict["points"]), state_dict["seconds"]
        self.begin = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            metrics = {
                name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
            }
            self.points.append({"update": trainer.global_step, **metrics})


def run(pair: str, seed: int, root: str, recipe: Recipe, folder: Path, threads: int) -> dict[str, Any]:
    """Train, choose the length penalty on validation, translate the test part."""
    from sacrebleu import BLEU, CHRF

    torch.set_num_threads(threads)
    dataset, _, direction = pair.partition(".")
    data = open_data(dataset, root, direction[:2] or "de", recipe, seed)
    seed_everything(seed, verbose=False)
    module = Translator(
        vocab_size=data.vocab_size, width=recipe.width, feedforward=recipe.feedforward, encoder_layers=recipe.layers,
        decoder_layers=recipe.layers, dropout=recipe.dropout,
        optimizer=partial(
            RectifiedAdam, lr=recipe.lr, weight_decay=recipe.weight_decay, decoupled_weight_decay=True
        ),
        lr_scheduler=partial(LinearDecay, total_steps=recipe.updates, final_lr=1e-9), lr_scheduler_interval="step",
    )  # fmt: skip
    curve, keep = Curve(), ModelCheckpoint(folder, filename="last", every_n_train_steps=500)
    last = folder / "last.ckpt"
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=recipe.updates, max_epochs=-1, precision=recipe.precision,  # type: ignore[arg-type]
        gradient_clip_val=25, use_distributed_sampler=False, callbacks=[curve, keep], logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    seconds = curve.seconds
    trainer.save_checkpoint(folder / "final.ckpt")
    row: dict[str, Any] = {"pair": pair, "seed": seed, "precision": recipe.precision, "cpu": cpu_model()}
    row |= {"parameters": sum(p.numel() for p in module.parameters())}
    row |= {"train_seconds": round(seconds, 1), "validation": curve.points[-1:]}
    data.setup("fit")
    data.setup("test")
    bleu, chrf = BLEU(), CHRF()
    sources, references = raw(module, data.val_dataloader())
    by_penalty = {
        penalty: bleu.corpus_score(module.translate(sources, 5, penalty), [references]).score for penalty in PENALTIES
    }
    greedy = bleu.corpus_score(module.translate(sources, 1), [references]).score
    best = max(by_penalty, key=lambda penalty: by_penalty[penalty])
    row |= {"val_bleu_greedy": greedy, "val_bleu_by_penalty": by_penalty, "length_penalty": best}
    sources, references = raw(module, data.test_dataloader())
    begin = time.perf_counter()
    translations = module.translate(sources, 5, best)
    row["test_sentences_per_second"] = len(sources) / (time.perf_counter() - begin)
    score = bleu.corpus_score(translations, [references])
    row |= {"test_bleu": score.score, "brevity_penalty": score.bp, "bleu_signature": str(bleu.get_signature())}
    score = chrf.corpus_score(translations, [references])
    row |= {"test_chrf": score.score, "chrf_signature": str(chrf.get_signature())}
    row["samples"] = [list(item) for item in zip(sources[:5], translations[:5], references[:5], strict=True)]
    return row


def raw(module: Translator, loader: Any) -> tuple[list[str], list[str]]:
    """Sources (as the vocabulary reads them back) and raw references, in the loader's order."""
    assert module.vocabularies is not None
    sources, references = [], []
    for batch in loader:
        sources += [module.vocabularies[0].decode(row) for row in batch.source.tolist()]
        references += batch.references
    return sources, references


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the seeds of a pair, precision and processor, smallest and largest."""
    table = []
    same = ("pair", "precision", "cpu")
    for key in dict.fromkeys(tuple(row[name] for name in same) for row in rows):
        group = [row for row in rows if tuple(row[name] for name in same) == key]
        line: dict[str, Any] = {**dict(zip(same, key, strict=True)), "seeds": [row["seed"] for row in group]}
        for name in ("test_bleu", "test_chrf", "val_bleu_greedy", "length_penalty", "train_seconds"):
            values = [row[name] for row in group]
            line[name] = [statistics.fmean(values), min(values), max(values)]
        table.append(line)
    return table


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[1, 2, 3], jobs=None)
    arguments.add_argument("--data", help="folder that holds multi30k and libreoffice-help-de-en")
    arguments.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    arguments.add_argument("--updates", type=int, default=Recipe.updates)
    arguments.add_argument("--dropout", type=float, default=Recipe.dropout)
    arguments.add_argument("--vocabulary", type=int, default=Recipe.vocab_size)
    arguments.add_argument(
        "--precision", nargs="+", default=[Recipe.precision], help="32-true on a CPU without fast bf16 instructions"
    )
    arguments.add_argument("--finished", action="store_true", help="run nothing, write what has been run")
    arguments.add_argument("--threads", type=int, default=2)
    return arguments.parse_args()


def main() -> None:
    args = parse()
    recipes = [
        Recipe(updates=args.updates, dropout=args.dropout, vocab_size=args.vocabulary, precision=precision)
        for precision in args.precision
    ]
    pairs, seeds, work = args.pairs, args.seeds, args.work
    path = output_path(NAME, args.out, args.quick)
    if args.quick:
        recipes = [Recipe(updates=4, width=32, feedforward=32, layers=1, vocab_size=200, precision="32-true")]
        pairs, seeds, work = ["numbers"], [1], path.parent / NAME
    rows = []
    for seed, pair, recipe in product(seeds, pairs, recipes):
        name = f"{pair}_{recipe.updates}_{recipe.dropout:g}_{recipe.vocab_size}_{recipe.precision}_s{seed}"
        folder = work / name
        result = folder / "result.json"
        if args.finished and not result.exists():
            continue
        if not result.exists() or args.quick:
            folder.mkdir(parents=True, exist_ok=True)
            root = "" if args.quick else data_folder(args.data, FOLDERS[pair.partition(".")[0]])
            result.write_text(json.dumps(run(pair, seed, root, recipe, folder, args.threads)))
        rows.append(row := json.loads(result.read_text()))
        print(f"{name}: test BLEU {row['test_bleu']:.2f} at length penalty {row['length_penalty']}", flush=True)
    machine = {**environment(packages=("sentencepiece", "sacrebleu")), "threads": args.threads}
    settings = {
        **asdict(recipes[0]),
        "precision": [recipe.precision for recipe in recipes],
        "beam": 5,
        "optimizer": "RectifiedAdam, betas .9, .999; linear decay",
        "clip": 25,
    }
    write_result(path, NAME, settings, rows, table=summarize(rows), environment=machine)


if __name__ == "__main__":
    main()
