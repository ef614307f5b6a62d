"""How fast does the Translator's network train and translate, beside torch.nn.Transformer and JoeyNMT?

All sides get the same batches of Multi30k, the same shape (width 256, 3+3 layers, vocabulary 8,000, one tied matrix),
dropout in the same places, clipping and fused Adam, each in a process of its own; rounds are interleaved. What counts
are real target tokens a second, counted by one rule for all; a profile says where an update's time goes. Then the same
trained weights translate the test part with a beam of five in ours and in JoeyNMT, and BLEU is given for both.

glibc gives large activations back to the system after each step, and gets them again page by page. All sides are
spared that by its environment variables; ``--memory default`` leaves them out for all, as it is for whoever sets
nothing.

    python benchmarks/translation_speed.py --data FOLDER --peer PYTHON_WITH_JOEYNMT --weights CHECKPOINT

JoeyNMT needs an environment of its own (benchmarks/README.md); without ``--peer`` it is left out. ``--weights`` is a
checkpoint of configs/translation_multi30k.yaml; without it nothing is translated.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from timing import ROOT, data_folder, environment, output_path, parser, ratio_of, write_result

from lightning_rectify import TranslationData, Translator

NAME = "translation_speed"
WORKER = Path(__file__).resolve().parent / "peers" / "translation_worker.py"
FOLDERS = ("multi30k", ".")
SIDES = ("ours", "torch", "joeynmt", "ours_bf16", "torch_bf16")


class Worker:
    """One side in its own process."""

    def __init__(self, python: str, side: str, folder: str, threads: int, memory: str) -> None:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        if memory == "kept":
            variables |= {"MALLOC_MMAP_THRESHOLD_": str(2 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
        self.process = subprocess.Popen(
            [python, str(WORKER), side, folder, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A worker ended: {self.process.args}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_inputs(data: TranslationData, folder: Path, batches: int) -> list[str]:
    """Training batches and test sources as files; returns the test references, in the order of the sources."""
    data.setup("fit")
    loader = iter(data.train_dataloader())
    chosen = [next(loader) for _ in range(batches)]
    torch.save([(batch.source, batch.target) for batch in chosen], folder / "batches.pt")
    data.setup("test")
    test = list(data.test_dataloader())
    torch.save([batch.source for batch in test], folder / "test.pt")
    return [line for batch in test for line in batch.references or []]


def parse() -> argparse.Namespace:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--data", help="folder that holds multi30k")
    arguments.add_argument("--peer", help="a python that has joeynmt")
    arguments.add_argument("--weights", type=Path, help="checkpoint of configs/translation_multi30k.yaml")
    arguments.add_argument("--batch-tokens", type=int, default=2000)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--updates", type=int, default=10, help="of a round")
    arguments.add_argument(
        "--memory", choices=("kept", "default"), default="kept", help="glibc's way with large blocks"
    )
    return arguments.parse_args()


def main() -> None:
    args = parse()
    sides = [side for side in SIDES if side != "joeynmt" or args.peer]
    rounds, updates = (2, 1) if args.quick else (args.rounds, args.updates)
    module = None
    if args.quick:
        data = TranslationData(vocab_size=400, batch_tokens=500, train_size=400, val_size=50, test_size=50)
    else:
        root = data_folder(args.data, FOLDERS)
        data = TranslationData(dataset="multi30k", root=root, vocab_size=8000, batch_tokens=args.batch_tokens, seed=1)
        if args.weights:
            module = Translator.load_from_checkpoint(args.weights, map_location="cpu")
    with TemporaryDirectory() as name:
        folder = Path(name)
        if module is not None:
            torch.save(module.network.state_dict(), folder / "weights.pt")
        references = write_inputs(data, folder, rounds * updates)
        workers = {
            side: Worker(args.peer if side == "joeynmt" else sys.executable, side, name, args.threads, args.memory)
            for side in sides
        }
        rows = train(workers, rounds, updates)
        searches = translate(workers, module, references, args.rounds) if module is not None else []
        for worker in workers.values():
            worker.close()
    settings = {
        "batch_tokens": args.batch_tokens,
        "rounds": rounds,
        "updates": updates,
        "beam": 5,
        "dropout": 0.1,
        "memory": args.memory,
    }
    machine = {**environment(packages=("sentencepiece",)), "threads": args.threads}
    write_result(output_path(NAME, args.out, args.quick), NAME, settings, rows, searches=searches, environment=machine)


def train(workers: dict[str, Worker], rounds: int, updates: int) -> list[dict[str, Any]]:
    """Tokens a second of each side, and ratios round by round; the first round is not counted."""
    speed: dict[str, list[float]] = {side: [] for side in workers}
    for index in range(rounds + 1):
        tokens = set()
        for side, worker in workers.items() if index % 2 == 0 else reversed(workers.items()):
            done = worker.ask(do="train", updates=updates)
            tokens.add(done["tokens"])
            if index:
                speed[side].append(done["tokens"] / done["seconds"])
        assert len(tokens) == 1, f"The sides do not count alike: {tokens}"
        print(f"round {index}: " + ", ".join(f"{side} {values[-1:]}" for side, values in speed.items()), flush=True)
    rows = []
    for side, values in speed.items():
        row: dict[str, Any] = {"side": side, "tokens_per_second": sorted(values)[len(values) // 2]}
        row["profile_ms"] = workers[side].ask(do="profile", updates=updates)
        for peer in ("joeynmt", "torch", "torch_bf16"):
            if peer in speed:
                row[f"times_{peer}"] = asdict(ratio_of(values, speed[peer]))
        rows.append(row)
    return rows


def translate(
    workers: dict[str, Worker], module: Translator, references: list[str], rounds: int
) -> list[dict[str, Any]]:
    """Seconds for the test part with a beam of five, and BLEU, of each side that can; three rounds."""
    from sacrebleu import corpus_bleu

    assert module.vocabularies is not None
    sides = [side for side in workers if not side.startswith("torch")]
    losses = {side: workers[side].ask(do="loss")["loss"] for side in sides}
    print(f"loss of one batch: {losses}", flush=True)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    texts: dict[str, list[str]] = {}
    for _ in range(min(rounds, 3)):
        for side in sides:
            done = workers[side].ask(do="translate", beam=5, alpha=1.0)
            seconds[side].append(done["seconds"])
            texts[side] = [module.vocabularies[1].decode(row) for row in done["ids"]]
    found = []
    for side in sides:
        bleu = corpus_bleu(texts[side], [references])
        row: dict[str, Any] = {"side": side, "sentences": len(references), "bleu": bleu.score, "loss": losses[side]}
        row["sentences_per_second"] = len(references) / sorted(seconds[side])[len(seconds[side]) // 2]
        if "joeynmt" in seconds:
            row["times_joeynmt"] = asdict(ratio_of(seconds["joeynmt"], seconds[side]))
        found.append(row)
    return found


if __name__ == "__main__":
    main()
