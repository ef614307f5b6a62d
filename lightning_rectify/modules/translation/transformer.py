"""The encoder-decoder of "Attention is all you need", with a cache for decoding step by step."""

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.arguments import check_choice, check_fraction, check_least, check_types
from lightning_rectify.modules.translation.attention import DecoderState
from lightning_rectify.modules.translation.layers import DecoderLayer, Embedding, EncoderLayer, LayerOptions, Norm
from lightning_rectify.text import PAD

Positions = Literal["sinusoidal", "learned"]


class Transformer(nn.Module):
    r"""Transformer for sequence to sequence (Vaswani et al. 2017, arXiv:1706.03762), ReLU between its feedforwards.

    In fairseq's shape, which the RAdam paper's runs have: queries, keys and values packed, token embeddings
    drawn with standard deviation :math:`D^{-1/2}` and taken times :math:`\sqrt D`, Glorot-uniform linear layers,
    biases 0, dropout on embeddings and on the branches of residuals. Sources end with EOS, targets begin with BOS, and
    both are padded on the right with PAD, the only token that is masked; a source has at least one other.

    ``encoder`` and ``decoder`` are modules of their own, so each can be compiled.

    Args:
        vocab_size: tokens V of the source, at least 4; of source and target if ``target_vocab_size`` is None.
        target_vocab_size: tokens of the target, at least 4; None: one vocabulary for both.
        width: features D, even and a multiple of ``heads``.
        heads: attention heads H.
        feedforward: features inside a feedforward block.
        encoder_layers: layers of the encoder, at least 1.
        decoder_layers: layers of the decoder, at least 1.
        dropout: on embeddings and residual branches, in [0, 1).
        attention_dropout: on attention weights, in [0, 1).
        activation_dropout: on activations inside feedforward blocks, in [0, 1).
        norm: layer normalisation behind each residual sum ("post", the paper's) or at the start of each branch and
            behind the last layer ("pre").
        positions: "sinusoidal", added for any length, or "learned", for up to ``max_length`` tokens.
        max_length: tokens for which positions are learned, at least 1.
        tied: target embedding and softmax are one matrix; with one vocabulary the source embedding is it as well.

    Raises:
        ValueError: for an argument outside its range; in use, for a sequence longer than positions were learned for.
    """

    def __init__(
        self,
        vocab_size: int,
        target_vocab_size: int | None = None,
        width: int = 256,
        heads: int = 4,
        feedforward: int = 1024,
        encoder_layers: int = 3,
        decoder_layers: int = 3,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        norm: Norm = "post",
        positions: Positions = "sinusoidal",
        max_length: int = 1024,
        tied: bool = True,
    ) -> None:
        check_types(Transformer, locals())
        super().__init__()
        check_least(4, vocab_size=vocab_size, target_vocab_size=target_vocab_size)
        check_least(2, width=width)
        check_least(1, heads=heads, feedforward=feedforward, max_length=max_length)
        check_least(1, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
        check_fraction(dropout=dropout, attention_dropout=attention_dropout, activation_dropout=activation_dropout)
        _check_choices(width, heads, norm, positions)
        places = max_length if positions == "learned" else None
        options = LayerOptions(width, heads, feedforward, dropout, attention_dropout, activation_dropout, norm)
        self.encoder = Encoder(Embedding(vocab_size, width, dropout, places), encoder_layers, options)
        embedding = Embedding(target_vocab_size or vocab_size, width, dropout, places)
        self.decoder = Decoder(embedding, decoder_layers, options)
        self.output: nn.Parameter | None = None
        if tied and target_vocab_size is None:
            embedding.tokens.weight = self.encoder.embedding.tokens.weight
        elif not tied:
            self.output = nn.Parameter(torch.empty_like(embedding.tokens.weight))
            nn.init.normal_(self.output, std=width**-0.5)

    @property
    def output_weight(self) -> Tensor:
        """Matrix (V, D) of the softmax layer, which has no bias."""
        return self.decoder.embedding.tokens.weight if self.output is None else self.output

    def features(self, source: Tensor, target: Tensor) -> Tensor:
        """Features (B, T, D) in front of the softmax layer, of sources (B, S) and decoder inputs (B, T), int64."""
        return self.decoder(target, self.encoder(source), source != PAD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of features (..., D)."""
        return F.linear(hidden, self.output_weight)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) of the token behind each one of decoder inputs (B, T), given sources (B, S), int64."""
        return self.logits(self.features(source, target))

    # -- decoding ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, source: Tensor) -> DecoderState:
        """The state before the first token of a translation of sources (B, S); call ``eval()`` before."""
        memory = self.encoder(source)
        layers = [layer.cross_attention.remember(memory).contiguous() for layer in self.decoder.stack()]
        return DecoderState(layers, source != PAD)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Logits (B, V) of the token behind ``tokens`` (B,), which the state takes in; without gradients."""
        return self.logits(self.decoder.step(tokens, state))

    @torch.no_grad()
    def attention(self, source: Tensor, target: Tensor) -> Tensor:
        """Weights (L, B, H, T, S) of each decoder layer's attention to the source, for plots; without gradients."""
        return self.decoder.attention(target, self.encoder(source), source != PAD)


class Encoder(nn.Module):
    """Embedding and layers of self-attention.

    Args:
        embedding: of the source.
        layers: number of layers.
        options: of the layers.
    """

    def __init__(self, embedding: Embedding, layers: int, options: LayerOptions) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(EncoderLayer(options) for _ in range(layers))
        self.norm = nn.LayerNorm(options.width) if options.norm == "pre" else nn.Identity()

    def stack(self) -> list[EncoderLayer]:
        """The layers, first to last."""
        return cast("list[EncoderLayer]", list(self.layers))

    def forward(self, source: Tensor) -> Tensor:
        """Memory (B, S, D) of sources (B, S), int64; at padding it is anything finite."""
        mask = (source != PAD)[:, None, None]
        x = self.embedding(source)
        for layer in self.stack():
            x = layer(x, mask)
        return self.norm(x)


class Decoder(nn.Module):
    """Embedding and layers of causal self-attention and of attention to a memory.

    Args:
        embedding: of the target.
        layers: number of layers.
        options: of the layers.
    """

    def __init__(self, embedding: Embedding, layers: int, options: LayerOptions) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(DecoderLayer(options) for _ in range(layers))
        self.norm = nn.LayerNorm(options.width) if options.norm == "pre" else nn.Identity()

    def stack(self) -> list[DecoderLayer]:
        """The layers, first to last."""
        return cast("list[DecoderLayer]", list(self.layers))

    def forward(self, target: Tensor, memory: Tensor, source_mask: Tensor) -> Tensor:
        """Features (B, T, D) of decoder inputs.

        Padding is on the right, where no token looks, so a causal mask is all that self-attention needs.

        Args:
            target: int64, shape (B, T).
            memory: floating point, shape (B, S, D).
            source_mask: bool, shape (B, S), True where the source has a token.
        """
        x = self.embedding(target)
        for layer in self.stack():
            x = layer(x, memory, source_mask)
        return self.norm(x)

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Features (B, D) at the place of ``tokens`` (B,), which the state takes in."""
        x = self.embedding(tokens[:, None], state.length)
        for i, layer in enumerate(self.stack()):
            x, state.past[i] = layer.step(x, state.past[i], state.memory[i], state.mask)
        state.length += 1
        return self.norm(x).squeeze(1)

    def attention(self, target: Tensor, memory: Tensor, source_mask: Tensor) -> Tensor:
        """Weights (L, B, H, T, S) with which :meth:`forward` looks at the memory."""
        x, weights = self.embedding(target), []
        for layer in self.stack():
            x = layer.recall(x)
            weights.append(layer.weights(x, memory, source_mask))
            x = layer.feed(layer.look(x, memory, source_mask))
        return torch.stack(weights)


def _check_choices(width: int, heads: int, norm: str, positions: str) -> None:
    if width % heads or width % 2:
        raise ValueError(
            f"Expected argument `width` to be even and a multiple of the number of `heads`, {heads}, but got {width}."
        )
    check_choice(("post", "pre"), norm=norm)
    check_choice(("sinusoidal", "learned"), positions=positions)
