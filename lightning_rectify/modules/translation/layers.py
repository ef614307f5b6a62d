"""What the encoder and the decoder of a Transformer are built of."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.modules.translation.attention import CrossAttention, SelfAttention
from lightning_rectify.nn.dropout import Dropout
from lightning_rectify.text import PAD

Norm = Literal["post", "pre"]


@dataclass(frozen=True)
class LayerOptions:
    """What all layers of a network have in common; meanings and ranges as in ``Transformer``."""

    width: int
    heads: int
    feedforward: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    norm: Norm


class Embedding(nn.Module):
    """Embeddings of tokens and of their places; the sum is dropped out.

    Args:
        tokens: size of the vocabulary.
        width: features D.
        dropout: probability by which features are dropped while training.
        max_length: places that are learned; None: sinusoids, for any place.
    """

    def __init__(self, tokens: int, width: int, dropout: float, max_length: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width, padding_idx=PAD)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        with torch.no_grad():
            self.tokens.weight[PAD] = 0.0
        self.places = None if max_length is None else nn.Embedding(max_length, width)
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=width**-0.5)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Features (B, T, D) of tokens (B, T), int64, at the places from ``start`` on.

        Raises:
            ValueError: for a place that was not learned.
        """
        x = self.tokens(tokens) * math.sqrt(self.tokens.embedding_dim)
        end = start + tokens.shape[1]
        if self.places is None:
            return self.dropout(x + sinusoids(start, end, x.shape[-1], x.device, x.dtype))
        if end > self.places.num_embeddings:
            raise ValueError(
                f"Expected at most {self.places.num_embeddings} tokens, the `max_length` of the learned positions, "
                f"but got {end}."
            )
        return self.dropout(x + self.places.weight[start:end])


def sinusoids(start: int, end: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    r"""Encodings of places by waves of geometrically growing length (arXiv:1706.03762, section 3.5).

    .. math:: \sin(p / 10000^{2i/D}) \;\mathrm{and}\; \cos(p / 10000^{2i/D}), \qquad i = 0, \dots, D/2 - 1

    All sines stand before all cosines, which is the paper's layout in another order of the features.

    Args:
        start: first place, at least 0.
        end: place behind the last.
        width: D, even.
        device: of the result.
        dtype: of the result; computed in float32 or better.

    Returns:
        Shape (end - start, D).
    """
    exact = torch.promote_types(dtype, torch.float32)
    rates = torch.arange(0, width, 2, device=device, dtype=exact).mul(-math.log(10000.0) / width).exp()
    angles = torch.arange(start, end, device=device).to(exact)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(dtype)


class Residual(nn.Module):
    """The way around a branch: what goes in, and the sum that comes out, with dropout and layer normalisation.

    Args:
        options: of the layer; ``norm`` says whether the sum is normalised ("post") or the branch's input ("pre").
    """

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.pre = options.norm == "pre"
        self.norm = nn.LayerNorm(options.width)
        self.dropout = Dropout(options.dropout)

    def enter(self, x: Tensor) -> Tensor:
        """The branch's input (B, T, D)."""
        return self.norm(x) if self.pre else x

    def leave(self, x: Tensor, branch: Tensor) -> Tensor:
        """The sum (B, T, D) of x and the branch's output."""
        x = x + self.dropout(branch)
        return x if self.pre else self.norm(x)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them (arXiv:1706.03762, section 3.3).

    Args:
        width: features D.
        inner: features between.
        dropout: probability by which those between are dropped while training.
    """

    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = Dropout(dropout)
        for linear in (self.inner, self.outer):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, T, D) of features (B, T, D)."""
        return self.outer(self.dropout(torch.relu(self.inner(x))))


class EncoderLayer(nn.Module):
    """Self-attention and feedforward, each with a residual.

    Args:
        options: shape and dropout.
    """

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.self_attention = SelfAttention(options.width, options.heads, options.attention_dropout)
        self.self_residual = Residual(options)
        self.feedforward = FeedForward(options.width, options.feedforward, options.activation_dropout)
        self.feed_residual = Residual(options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Features (B, S, D) of features (B, S, D); mask, bool, (B, 1, 1, S), True where there is a token."""
        return self.feed(self.self_residual.leave(x, self.self_attention(self.self_residual.enter(x), mask)))

    def feed(self, x: Tensor) -> Tensor:
        """The feedforward with its residual."""
        return self.feed_residual.leave(x, self.feedforward(self.feed_residual.enter(x)))


class DecoderLayer(EncoderLayer):
    """Causal self-attention, attention to a memory and feedforward, each with a residual.

    Args:
        options: shape and dropout.
    """

    def __init__(self, options: LayerOptions) -> None:
        super().__init__(options)
        self.cross_attention = CrossAttention(options.width, options.heads, options.attention_dropout)
        self.cross_residual = Residual(options)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Features (B, T, D) of features (B, T, D) and memory (B, S, D) where ``mask`` (B, S) is True."""
        return self.feed(self.look(self.recall(x), memory, mask))

    def recall(self, x: Tensor) -> Tensor:
        """The self-attention with its residual."""
        return self.self_residual.leave(x, self.self_attention(self.self_residual.enter(x), causal=True))

    def look(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """The attention to the memory with its residual."""
        return self.cross_residual.leave(x, self.cross_attention(self.cross_residual.enter(x), memory, mask))

    def weights(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Weights (B, H, T, S) with which :meth:`look` mixes the memory."""
        return self.cross_attention.weights(self.cross_residual.enter(x), memory, mask)

    def step(self, x: Tensor, past: Tensor | None, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 1, D) of one position more, and keys and values with its own; see ``DecoderState``."""
        branch, past = self.self_attention.step(self.self_residual.enter(x), past)
        x = self.self_residual.leave(x, branch)
        branch = self.cross_attention.step(self.cross_residual.enter(x), memory, mask)
        return self.feed(self.cross_residual.leave(x, branch)), past
