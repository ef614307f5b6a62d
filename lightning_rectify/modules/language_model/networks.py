"""Stacked LSTMs with an explicit state, and an adaptive softmax that trains on several processes and in bfloat16."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_fraction, check_least, check_types
from lightning_rectify.nn.dropout import Dropout

_INIT = 0.1  # embeddings begin uniform in +- this


class StackedLSTM(nn.Module):
    """Word embeddings and LSTM layers, with dropout between them but not from one word to the next.

    The layout of Zaremba et al. 2014 (arXiv:1409.2329). Each layer is an ``nn.LSTM`` of its own: the dropout of a
    stacked one is drawn by cuDNN on a GPU, from a state that no checkpoint holds.

    Args:
        vocab_size: number of words V, at least 3.
        embedding_size: features E of an embedding, at least 1.
        hidden_size: features H of each layer, at least 1.
        layers: number of layers K, at least 1.
        dropout: on embeddings and on each layer's outputs, in [0, 1).

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int, layers: int, dropout: float) -> None:
        super().__init__()
        check_least(1, embedding_size=embedding_size, hidden_size=hidden_size, layers=layers)
        check_least(3, vocab_size=vocab_size)
        check_fraction(dropout=dropout)
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        nn.init.uniform_(self.embedding.weight, -_INIT, _INIT)
        widths = [embedding_size] + [hidden_size] * (layers - 1)
        self.layers = nn.ModuleList(nn.LSTM(width, hidden_size, batch_first=True) for width in widths)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read words.

        Args:
            tokens: ids, int64, shape (B, T).
            state: what the layers remember of the words before, hidden states and then cells, shape (2, K, B, H);
                None for nothing.

        Returns:
            Features of the word after each, shape (B, T, H), and the state after the last, shape (2, K, B, H).
        """
        features = self.dropout(self.embedding(tokens))
        states = []
        for i, layer in enumerate(self.layers):
            # The embedding's dtype: under autocast a layer's output is narrower than the state that is carried.
            begin = None if state is None else (state[0, i : i + 1].contiguous(), state[1, i : i + 1].contiguous())
            features, (hidden, cell) = layer(features.to(self.embedding.weight.dtype), begin)
            features = self.dropout(features)
            states.append(torch.stack([hidden, cell]))
        return features, torch.cat(states, dim=1).to(self.embedding.weight.dtype)


class _Wide(nn.Module):
    """Logits in at least float32: autocast on a CPU leaves log_softmax in bfloat16, where it has two digits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float64 else logits.float()


class AdaptiveSoftmax(nn.Module):
    """torch's ``AdaptiveLogSoftmaxWithLoss`` (Grave et al. 2017, arXiv:1609.04309), one loss a word.

    Words are ids sorted by frequency. The first ``cutoffs[0]`` and each of the clusters behind them are told apart by
    one softmax, and the words of a cluster by another over features narrower by ``div_value`` from cluster to cluster.

    Other than torch's, it takes and computes losses in at least float32 under autocast, where torch's raises on a CPU;
    and a cluster that a batch has no word of gets a gradient of zeros and not none, so that all processes have the same
    parameters to average, and all of them step together.

    Args:
        width: features H.
        vocab_size: number of words V.
        cutoffs: where the clusters begin: integers in 1 to V - 1, rising, at least one.
        div_value: at least 1, and so that each cluster has at least one feature.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, width: int, vocab_size: int, cutoffs: Sequence[int], div_value: float = 4.0) -> None:
        super().__init__()
        bounds = [0, *cutoffs, vocab_size]
        if len(bounds) < 3 or any(type(c) is not int for c in cutoffs) or sorted(set(bounds)) != bounds:
            raise ValueError(
                f"Expected argument `cutoffs` to be integers in 1 to {vocab_size - 1}, one or more and rising, for "
                f"`vocab_size` {vocab_size} but got {cutoffs!r}."
            )
        if not 1 <= div_value ** len(cutoffs) <= width:
            raise ValueError(
                f"Expected argument `div_value` to be at least 1 and to leave at least one of {width} features to each "
                f"of {len(cutoffs)} clusters but got {div_value!r}."
            )
        self.inner = nn.AdaptiveLogSoftmaxWithLoss(width, vocab_size, list(cutoffs), div_value)
        self.inner.head = nn.Sequential(self.inner.head, _Wide())  # type: ignore[assignment]
        for tail in self.inner.tail:
            assert isinstance(tail, nn.Sequential)
            tail.append(_Wide())

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood (natural logarithm) of each word.

        Args:
            features: shape (M, H).
            targets: ids, int64, shape (M,).

        Returns:
            Shape (M,).
        """
        features = self._wide(features)
        losses = -self.inner(features, targets).output
        nothing = features[:0]
        for tail in self.inner.tail:
            losses = losses + tail(nothing).sum()
        return losses

    def log_prob(self, features: Tensor) -> Tensor:
        """Log-probability (natural logarithm) of every word, shape (..., V), for features of shape (..., H)."""
        flat = self.inner.log_prob(self._wide(features).flatten(0, -2))
        return flat.unflatten(0, features.shape[:-1])

    def _wide(self, features: Tensor) -> Tensor:
        # torch's writes losses into a tensor of the features' dtype.
        return features if features.dtype == torch.float64 else features.float()


class LSTMNetwork(nn.Module):
    """A recurrent language model: ``recurrent`` reads words, ``softmax`` says what comes next.

    Args:
        vocab_size: number of words V.
        embedding_size: features of an embedding.
        hidden_size: features H of each layer.
        layers: number of layers.
        dropout: of :class:`StackedLSTM`.
        cutoffs: of :class:`AdaptiveSoftmax`.
        div_value: of :class:`AdaptiveSoftmax`.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        layers: int,
        dropout: float,
        cutoffs: Sequence[int],
        div_value: float,
    ) -> None:
        check_types(LSTMNetwork, locals())
        super().__init__()
        self.recurrent = StackedLSTM(vocab_size, embedding_size, hidden_size, layers, dropout)
        self.softmax = AdaptiveSoftmax(hidden_size, vocab_size, cutoffs, div_value)

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of the word after each of ``tokens`` (B, T), which begin a text."""
        features, _ = self.recurrent(tokens)
        return self.softmax.log_prob(features)
