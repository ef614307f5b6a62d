"""What a trained translator offers to people who have texts: translations, scores, samples, attention."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_least
from lightning_rectify.modules.translation.decoding import Hypothesis, beam_search, greedy_search, sample
from lightning_rectify.modules.translation.transformer import Transformer
from lightning_rectify.nn.modes import evaluating
from lightning_rectify.text import BOS, EOS, PAD, Vocabulary, pad

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TextInterface(nn.Module):
    """From text to text with a network and its vocabularies; :class:`Translator` is one.

    Attributes:
        network: the Transformer.
        vocabularies: source's and target's; None until data or checkpoint give them.
        beam_size: hypotheses kept, at least 1; 1 is greedy.
        length_penalty: of the beam, the exponent of the length by which log-probabilities are divided.
        max_length_ratio: longest translation, as a multiple of the source's length, above 0; ten tokens are added.
    """

    network: Transformer
    vocabularies: tuple[Vocabulary, Vocabulary] | None
    beam_size: int
    length_penalty: float
    max_length_ratio: float
    device: torch.device

    def translate(
        self,
        texts: Sequence[str],
        beam_size: int | None = None,
        length_penalty: float | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """A translation of each text, in their order.

        Args:
            texts: sentences of the source language; an empty one has an empty translation.
            beam_size: at least 1; 1 is greedy; None for the module's.
            length_penalty: of the beam; None for the module's.
            batch_size: sentences translated at a time, at least 1.

        Raises:
            RuntimeError: if the module has no vocabularies yet.
        """
        return [found[0][0] if found else "" for found in self._found(texts, beam_size, length_penalty, 1, batch_size)]

    def translate_n_best(
        self,
        texts: Sequence[str],
        n_best: int,
        beam_size: int | None = None,
        length_penalty: float | None = None,
        batch_size: int = 64,
    ) -> list[list[tuple[str, float]]]:
        """The best translations of each text that the beam found, best first, with their scores.

        A score is a log-probability (natural logarithm) over the length to the power of ``length_penalty``. See
        :meth:`translate` for the other arguments.

        Args:
            texts: sentences of the source language.
            n_best: how many, 1 to ``beam_size``.
            beam_size: at least 1; None for the module's.
            length_penalty: of the beam; None for the module's.
            batch_size: sentences translated at a time, at least 1.
        """
        return self._found(texts, beam_size, length_penalty, n_best, batch_size)

    def sample(
        self,
        texts: Sequence[str],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[tuple[str, float]]:
        """A translation of each text drawn at random, with its log-probability; see ``decoding.sample``."""
        if not texts:
            return []
        source = self._sources(texts)
        generator = torch.Generator(self.device).manual_seed(seed)
        with evaluating(self):
            found = sample(self.network, source, self._limits(source), temperature, top_k, top_p, generator)
        return [(self._text(one), one.log_probability) for one in found]

    def score(self, texts: Sequence[str], translations: Sequence[str], batch_size: int = 64) -> Tensor:
        """Log-probability (natural logarithm) of each translation given its text, float64, shape (N,).

        Raises:
            ValueError: if there are not as many translations as texts, or for a ``batch_size`` below 1.
        """
        check_least(1, batch_size=batch_size)
        if len(texts) != len(translations):
            raise ValueError(
                f"Expected argument `translations` to have one for each of {len(texts)} texts but got "
                f"{len(translations)}."
            )
        scores = []
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            source, target = self._sources(texts[part]), self._targets(translations[part])
            with evaluating(self):
                logits = self.network(source, target[:, :-1])
            logs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
            labels = target[:, 1:]
            chosen = logs.gather(2, labels.unsqueeze(2)).squeeze(2).masked_fill(labels == PAD, 0.0)
            scores.append(chosen.cpu().double().sum(dim=1))  # not all devices have float64
        return torch.cat(scores) if scores else torch.zeros(0, dtype=torch.float64)

    def translate_file(self, source: str | os.PathLike[str], target: str | os.PathLike[str] | None = None) -> None:
        """Translate a text file line by line; without ``target``, to standard output."""
        # Bytes: as text, a carriage return inside a line would end it.
        lines = Path(source).read_bytes().decode("utf-8").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        written = "".join(f"{line}\n" for line in self.translate([line.rstrip("\r") for line in lines]))
        if target is None:
            sys.stdout.write(written)
        else:
            Path(target).write_bytes(written.encode("utf-8"))

    def plot_attention(self, text: str, translation: str | None = None, layer: int = -1) -> "Figure":
        """Where the decoder looks in the source: a layer's cross-attention, the mean over its heads.

        Args:
            text: of the source language.
            translation: of it; None for the module's own.
            layer: of the decoder; the last by default.
        """
        from matplotlib.figure import Figure

        if translation is None:
            (translation,) = self.translate([text])
        source, target = self._sources([text]), self._targets([translation])
        with evaluating(self):
            weights = self.network.attention(source, target[:, :-1])[layer, 0].mean(dim=0).float().cpu()
        sources, targets = self._vocabularies()
        figure = Figure(figsize=(2 + 0.3 * weights.shape[1], 2 + 0.3 * weights.shape[0]), layout="constrained")
        axes = figure.subplots()
        axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(weights.shape[1]), sources.pieces(source[0].tolist()), rotation=90)
        axes.set_yticks(range(weights.shape[0]), targets.pieces(target[0, 1:].tolist()))
        return figure

    def _found(
        self,
        texts: Sequence[str],
        beam_size: int | None,
        length_penalty: float | None,
        n_best: int,
        batch_size: int,
    ) -> list[list[tuple[str, float]]]:
        """Texts and scores of the best hypotheses, from batches of like lengths."""
        check_least(1, batch_size=batch_size)
        encoded = self._encode(self._vocabularies()[0], texts)
        order = sorted((i for i, tokens in enumerate(encoded) if len(tokens) > 1), key=lambda i: -len(encoded[i]))
        found: list[list[tuple[str, float]]] = [[] for _ in texts]
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            source = pad([encoded[i] for i in part]).to(self.device)
            with evaluating(self):
                results = self._search(source, beam_size, length_penalty, n_best)
            for i, hypotheses in zip(part, results, strict=True):
                found[i] = [(self._text(one), one.score) for one in hypotheses]
        return found

    def _search(
        self, source: Tensor, beam_size: int | None = None, length_penalty: float | None = None, n_best: int = 1
    ) -> list[list[Hypothesis]]:
        size = self.beam_size if beam_size is None else beam_size
        exponent = self.length_penalty if length_penalty is None else length_penalty
        limits = self._limits(source)
        if size == 1 and n_best == 1:  # the same hypotheses as a beam of one, for less
            return [[found.rescored(exponent)] for found in greedy_search(self.network, source, limits)]
        return beam_search(self.network, source, limits, size, exponent, n_best)

    def _limits(self, source: Tensor) -> Tensor:
        limits = ((source != PAD).sum(dim=1) * self.max_length_ratio).long() + 10
        places = self.network.decoder.embedding.places
        return limits if places is None else limits.clamp(max=places.num_embeddings)

    def _vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        if self.vocabularies is None:
            raise RuntimeError(
                "Expected `vocabularies` to be known, from a checkpoint, a fit or by hand, before text is read or "
                "written but got None."
            )
        return self.vocabularies

    def _encode(self, vocabulary: Vocabulary, texts: Iterable[str]) -> list[list[int]]:
        return [[*vocabulary.encode(text), EOS] for text in texts]

    def _sources(self, texts: Iterable[str]) -> Tensor:
        return pad(self._encode(self._vocabularies()[0], texts)).to(self.device)

    def _targets(self, texts: Iterable[str]) -> Tensor:
        encoded = self._encode(self._vocabularies()[1], texts)
        return pad([[BOS, *tokens] for tokens in encoded]).to(self.device)

    def _text(self, hypothesis: Hypothesis) -> str:
        return self._vocabularies()[1].decode(hypothesis.tokens)
