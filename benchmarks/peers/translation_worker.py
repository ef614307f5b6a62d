"""One side of translation_speed.py: trains and translates when told to, in a process (and an environment) of its own.

    python translation_worker.py SIDE FOLDER THREADS

SIDE is "ours", "ours_bf16", "torch" or "joeynmt". FOLDER holds ``batches.pt`` (sources and targets), ``test.pt``
(sources, sorted by length) and, for translating, ``weights.pt`` (a Transformer's state dict). Each line of standard
input is a command in JSON, each answer a line of standard output: ``{"do": "train", "updates": 8}`` gives
``seconds`` and ``tokens``, ``{"do": "translate", "beam": 5, "alpha": 1.0}`` gives ``seconds`` and ``ids``, and
``{"do": "profile", "updates": 8}`` milliseconds of an update by kind of operation.
"""

import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SHAPE = {"vocab_size": 8000, "width": 256, "heads": 4, "feedforward": 1024, "encoder_layers": 3, "decoder_layers": 3}
DROPOUT, SMOOTHING, CLIP = 0.1, 0.1, 25.0


class Side:
    """A model, its loss and its search."""

    autocast: Any = nullcontext
    smoothing = SMOOTHING

    def __init__(self) -> None:
        self.model = self.build()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)

    def build(self) -> nn.Module:
        raise NotImplementedError

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        """Sum over the target's tokens."""
        raise NotImplementedError

    def translate(self, source: Tensor, beam: int, alpha: float) -> list[list[int]]:
        raise NotImplementedError

    def load(self, weights: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def update(self, source: Tensor, target: Tensor) -> int:
        tokens = int((target[:, 1:] != PAD).sum())
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.loss(source, target) / tokens
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return tokens


class Ours(Side):
    """The package's network; dropout in the same places as its peers have it."""

    def build(self) -> nn.Module:
        from lightning_rectify.modules.translation.loss import linear_cross_entropy
        from lightning_rectify.modules.translation.transformer import Transformer

        self.fused = linear_cross_entropy
        return Transformer(**SHAPE, dropout=DROPOUT, attention_dropout=DROPOUT, activation_dropout=DROPOUT)

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        real = target[:, 1:] != PAD
        hidden = self.model.features(source, target[:, :-1])[real]
        return self.fused(hidden, self.model.output_weight, target[:, 1:][real], self.smoothing)[0]

    def translate(self, source: Tensor, beam: int, alpha: float) -> list[list[int]]:
        from lightning_rectify.modules.translation.decoding import beam_search

        limits = (source != PAD).sum(dim=1) * 2 + 10
        with self.autocast():
            found = beam_search(self.model, source, limits, beam, alpha)
        return [hypotheses[0].tokens for hypotheses in found]

    def load(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)


class OursInBf16(Ours):
    @staticmethod
    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)


class Torch(Side):
    """torch.nn.Transformer with the same embeddings, and the plain loss that people write with it."""

    def build(self) -> nn.Module:
        from lightning_rectify.modules.translation.layers import Embedding

        embedding = Embedding(SHAPE["vocab_size"], SHAPE["width"], DROPOUT)
        stacks = nn.Transformer(
            SHAPE["width"], SHAPE["heads"], SHAPE["encoder_layers"], SHAPE["decoder_layers"], SHAPE["feedforward"],
            DROPOUT, batch_first=True,
        )  # fmt: skip
        return nn.ModuleDict({"embedding": embedding, "stacks": stacks})

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        embedding, stacks = self.model["embedding"], self.model["stacks"]
        inputs, labels = target[:, :-1], target[:, 1:]
        causal = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
        padding = source == PAD
        hidden = stacks(
            embedding(source), embedding(inputs), tgt_mask=causal, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        logits = F.linear(hidden, embedding.tokens.weight)
        return F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING, reduction="sum"
        )


class TorchInBf16(Torch):
    @staticmethod
    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)


class JoeyNMT(Side):
    """JoeyNMT's model, loss and search, called as its own training and prediction call them."""

    def build(self) -> nn.Module:
        from joeynmt.model import build_model
        from joeynmt.vocabulary import Vocabulary

        special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        # Its vocabulary puts UNK first; what matters here are the numbers.
        ids = {"unk_id": 0, "pad_id": 1, "bos_id": 2, "eos_id": 3, "sep_token": None, "sep_id": None, "lang_tags": []}
        vocabulary = Vocabulary([f"w{i}" for i in range(SHAPE["vocab_size"] - 4)], SimpleNamespace(**special, **ids))
        stack = {
            "type": "transformer", "num_layers": SHAPE["encoder_layers"], "num_heads": SHAPE["heads"],
            "embeddings": {"embedding_dim": SHAPE["width"], "scale": True, "dropout": DROPOUT},
            "hidden_size": SHAPE["width"], "ff_size": SHAPE["feedforward"], "dropout": DROPOUT, "layer_norm": "post",
        }  # fmt: skip
        config = {
            "initializer": "xavier_uniform", "embed_initializer": "normal", "embed_init_weight": SHAPE["width"] ** -0.5,
            "tied_embeddings": True, "tied_softmax": True, "encoder": dict(stack), "decoder": dict(stack),
        }  # fmt: skip
        model = build_model(config, vocabulary, vocabulary)
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = 1e-5  # as the others have it
        return model

    def batch(self, source: Tensor, target: Tensor | None) -> Any:
        from joeynmt.batch import Batch

        # PAD and UNK change places between the two vocabularies.
        swap = torch.arange(SHAPE["vocab_size"])
        swap[[PAD, UNK]] = swap[[UNK, PAD]]
        return Batch(
            src=swap[source], src_length=(source != PAD).sum(dim=1), src_prompt_mask=None,
            trg=None if target is None else swap[target], trg_prompt_mask=None,
            indices=torch.arange(len(source)), device=torch.device("cpu"), pad_index=1, eos_index=EOS,
            is_train=target is not None,
        )  # fmt: skip

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        self.model.loss_function = ("crossentropy", self.smoothing)
        return self.model(return_type="loss", **vars(self.batch(source, target)))[0]

    def translate(self, source: Tensor, beam: int, alpha: float) -> list[list[int]]:
        from joeynmt.search import search

        longest = int((source != PAD).sum(dim=1).max()) * 2 + 10
        rows, _, _ = search(self.model, self.batch(source, None), longest, beam, alpha)
        return [[int(i) for i in row if i not in (0, 1, BOS, EOS)] for row in rows]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Our weights under its names; its sinusoids alternate sines and cosines, so features change places."""
        width = SHAPE["width"]
        order = torch.arange(width).view(2, -1).t().flatten()

        def linear(
            name: str, ours: str, rows: Tensor | None, columns: Tensor | None, part: slice | None = None
        ) -> None:
            weight, bias = weights[f"{ours}.weight"], weights[f"{ours}.bias"]
            if part is not None:
                weight, bias = weight[part], bias[part]
            if columns is not None:
                weight = weight[:, columns]
            if rows is not None:
                weight, bias = weight[rows], bias[rows]
            found[f"{name}.weight"], found[f"{name}.bias"] = weight, bias

        def norm(name: str, ours: str) -> None:
            for kind in ("weight", "bias"):
                found[f"{name}.{kind}"] = weights[f"{ours}.norm.{kind}"][order]

        def feed(name: str, ours: str) -> None:
            linear(f"{name}.feed_forward.pwff_layer.0", f"{ours}.feedforward.inner", None, order)
            linear(f"{name}.feed_forward.pwff_layer.3", f"{ours}.feedforward.outer", order, None)
            norm(f"{name}.feed_forward.layer_norm", f"{ours}.feed_residual")

        found: dict[str, Tensor] = {}
        parts = {letter: slice(i * width, (i + 1) * width) for i, letter in enumerate("qkv")}
        for i in range(SHAPE["encoder_layers"]):
            name = ours = f"encoder.layers.{i}"
            for letter, part in parts.items():
                linear(f"{name}.src_src_att.{letter}_layer", f"{ours}.self_attention.projection", None, order, part)
            linear(f"{name}.src_src_att.output_layer", f"{ours}.self_attention.output", order, None)
            norm(f"{name}.layer_norm", f"{ours}.self_residual")
            feed(name, ours)
        for i in range(SHAPE["decoder_layers"]):
            name = ours = f"decoder.layers.{i}"
            for letter, part in parts.items():
                linear(f"{name}.trg_trg_att.{letter}_layer", f"{ours}.self_attention.projection", None, order, part)
            linear(f"{name}.trg_trg_att.output_layer", f"{ours}.self_attention.output", order, None)
            norm(f"{name}.x_layer_norm", f"{ours}.self_residual")
            linear(f"{name}.src_trg_att.q_layer", f"{ours}.cross_attention.query", None, order)
            for letter, part in zip("kv", (parts["q"], parts["k"]), strict=True):
                linear(f"{name}.src_trg_att.{letter}_layer", f"{ours}.cross_attention.memory", None, order, part)
            linear(f"{name}.src_trg_att.output_layer", f"{ours}.cross_attention.output", order, None)
            norm(f"{name}.dec_layer_norm", f"{ours}.cross_residual")
            feed(name, ours)
        embedding = weights["encoder.embedding.tokens.weight"][:, order].clone()
        embedding[[PAD, UNK]] = embedding[[UNK, PAD]]
        for name in ("src_embed.lut.weight", "trg_embed.lut.weight", "decoder.output_layer.weight"):
            found[name] = embedding
        missing, unexpected = self.model.load_state_dict(found, strict=False)
        if unexpected or any(not name.endswith("pe.pe") for name in missing):
            raise SystemExit(f"joeynmt: weights do not fit: missing {missing}, unexpected {unexpected}.")


#: what of torch's operations is counted as what; the rest is elementwise, sums, copies and the optimizer
KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "random numbers": ("bernoulli_", "random_"),
    "softmax": ("_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "exp_"),
}


def profile(side: Side, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Milliseconds of an update by kind of operation, each without what it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for source, target in batches:
            side.update(source, target)
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    found = dict.fromkeys((*KINDS, "all else"), 0.0)
    for event in profiler.key_averages():
        found[kind_of.get(event.key, "all else")] += event.self_cpu_time_total / 1000 / len(batches)
    return found


SIDES = {"ours": Ours, "ours_bf16": OursInBf16, "torch": Torch, "torch_bf16": TorchInBf16, "joeynmt": JoeyNMT}


def main() -> None:
    name, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    side = SIDES[name]()
    batches = torch.load(f"{folder}/batches.pt", weights_only=True)
    place = 0
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "train":
            side.model.train()
            begin, tokens = time.perf_counter(), 0
            for _ in range(command["updates"]):
                tokens += side.update(*batches[place % len(batches)])
                place += 1
            answer = {"seconds": time.perf_counter() - begin, "tokens": tokens}
        elif command["do"] == "translate":
            side.load(torch.load(f"{folder}/weights.pt", weights_only=True))
            side.model.eval()
            sources = torch.load(f"{folder}/test.pt", weights_only=True)[: command.get("batches")]
            begin = time.perf_counter()
            ids = [row for source in sources for row in side.translate(source, command["beam"], command["alpha"])]
            answer = {"seconds": time.perf_counter() - begin, "ids": ids}
        elif command["do"] == "profile":
            side.model.train()
            answer = profile(side, batches[: command["updates"]])
        elif command["do"] == "loss":  # that all compute the same thing: the loss of a batch, without dropout
            side.load(torch.load(f"{folder}/weights.pt", weights_only=True))
            side.model.eval()
            side.smoothing, target = 0.0, batches[0][1]
            with torch.no_grad():
                answer = {"loss": float(side.loss(*batches[0])) / int((target[:, 1:] != PAD).sum())}
            side.smoothing = SMOOTHING
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
