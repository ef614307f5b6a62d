"""Multi-head attention of the Transformer, whole sequences at once or one position after the other."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.arguments import check_least
from lightning_rectify.nn.dropout import dropout as drop


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    r"""Softmax of the scaled scores, :math:`\mathrm{softmax}(Q K^T / \sqrt d)` (arXiv:1706.03762, equation 1).

    Args:
        query: shape (B, H, T, d).
        key: shape (B, H, S, d).
        mask: bool, broadcastable to (B, H, T, S), True where a query may look; every query needs such a key.
        causal: a query looks at no later position; T = S.

    Returns:
        Weights (B, H, T, S), non-negative, each row sums to 1.
    """
    batch, heads, length, size = query.shape
    bias = query.new_zeros((1, 1, 1, 1))
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf)
    if causal:
        later = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        bias = bias.masked_fill(later, -torch.inf)
    # One kernel for product, scale and mask; a mask that is added needs no work in the backward pass.
    scores = torch.baddbmm(
        bias.expand(batch, heads, length, key.shape[2]).flatten(0, 1),
        query.flatten(0, 1),
        key.flatten(0, 1).transpose(1, 2),
        alpha=size**-0.5,
    )
    return scores.softmax(dim=-1).unflatten(0, (batch, heads))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention (arXiv:1706.03762, section 3.2.1).

    Args:
        query: shape (B, H, T, d).
        key: shape (B, H, S, d).
        value: shape (B, H, S, d).
        mask: as in :func:`attention_weights`; not together with ``causal``.
        causal: as in :func:`attention_weights`.
        dropout: probability by which weights are dropped, in [0, 1).

    Returns:
        Shape (B, T, H d): the heads side by side.
    """
    if query.device.type == "cpu" and (torch.is_grad_enabled() or query.dtype in (torch.bfloat16, torch.float16)):
        # On the CPU torch's fused kernel is slow for sentences (some 14 tokens): forward and backward seven times in
        # bfloat16, forward alone twice; in float32 it is as fast, and a little faster forward.
        weights = drop(attention_weights(query, key, mask, causal), dropout)
        mixed = torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).unflatten(0, weights.shape[:2])
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself; queries, keys and values are one projection.

    Args:
        width: features D, a multiple of ``heads``.
        heads: number of heads H.
        dropout: probability by which attention weights are dropped while training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        _initialise(self.projection, self.output)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Features (B, T, D) of features (B, T, D); ``mask`` and ``causal`` as in :func:`attend`."""
        query, key, value = self._split(x)
        return self.output(attend(query, key, value, mask, causal, self.dropout if self.training else 0.0))

    def step(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features (B, 1, D) of the position behind those in ``past``.

        Args:
            x: shape (B, 1, D).
            past: keys and values of the earlier positions, shape (B, 2, H, T, d); None at the first.

        Returns:
            The features, and keys and values with the new position, shape (B, 2, H, T + 1, d).
        """
        query, key, value = self._split(x)
        new = torch.stack((key, value), dim=1)
        # A block reserved in advance is no faster here and three times slower where beams reorder it at each step.
        past = new if past is None else torch.cat((past, new), dim=3)
        key, value = past.unbind(1)
        return self.output(attend(query, key, value)), past

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.projection(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of a sequence to a memory; keys and values are one projection of it.

    Args:
        width: features D, a multiple of ``heads``.
        heads: number of heads H.
        dropout: probability by which attention weights are dropped while training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.memory = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        _initialise(self.query, self.output)
        _initialise(self.memory, self.output)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Features (B, T, D) of features (B, T, D), from memory (B, S, D) where ``mask`` (B, S) is True."""
        key, value = self.remember(memory).unbind(1)
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(self._heads(self.query(x)), key, value, mask[:, None, None], dropout=dropout))

    def remember(self, memory: Tensor) -> Tensor:
        """Keys and values (B, 2, H, S, d) of memory (B, S, D)."""
        return self.memory(memory).unflatten(-1, (2, self.heads, -1)).permute(0, 2, 3, 1, 4)

    def step(self, x: Tensor, remembered: Tensor, mask: Tensor) -> Tensor:
        """Features (B, 1, D) of one position.

        Args:
            x: shape (B, 1, D), of B = M G rows; each G in a row share a memory and are as one sequence to it.
            remembered: what :meth:`remember` gave, shape (M, 2, H, S, d).
            mask: bool, shape (M, S).
        """
        key, value = remembered.unbind(1)
        query = self._heads(self.query(x).view(len(remembered), -1, x.shape[-1]))
        return self.output(attend(query, key, value, mask[:, None, None]).view(x.shape))

    def weights(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Attention weights (B, H, T, S) with which :meth:`forward` mixes the memory, without dropout."""
        key = self.remember(memory)[:, 0]
        return attention_weights(self._heads(self.query(x)), key, mask[:, None, None])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DecoderState:
    """What a decoder keeps of the sentences under way, B rows: keys and values of the source and of what was written.

    Rows that share a source and stand together (beams) share its keys and values: these are neither copied for each
    beam nor moved when beams change places.

    Args:
        memory: keys and values of the sources for each layer, shape (M, 2, H, S, d); M = B / ``group``.
        mask: bool, shape (M, S), True where the source has a token.

    Attributes:
        past: keys and values of the target for each layer, shape (B, 2, H, T, d); None before the first token.
        length: tokens written so far, T.
        group: rows in a row that share a source.
    """

    def __init__(self, memory: list[Tensor], mask: Tensor) -> None:
        self.memory, self.mask = memory, mask
        self.past: list[Tensor | None] = [None] * len(memory)
        self.length, self.group = 0, 1

    def __len__(self) -> int:
        return len(self.mask) * self.group

    def repeat(self, times: int) -> None:
        """Have each row ``times`` times, one after the other.

        Raises:
            ValueError: if ``times`` is below 1.
        """
        check_least(1, times=times)
        self.group *= times
        self.past = [None if past is None else past.repeat_interleave(times, dim=0) for past in self.past]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64, shape (B',), in this order; a row may come more than once."""
        self.past = [None if past is None else past.index_select(0, rows) for past in self.past]
        sources = self._sources_of_groups(rows)
        if sources is None:  # rows of different sources stand together: each gets a copy of its own
            sources, self.group = rows.div(self.group, rounding_mode="floor"), 1
        elif len(sources) == len(self.mask) and bool((sources == torch.arange(len(sources)).to(sources)).all()):
            return  # only beams changed places
        self.memory = [memory.index_select(0, sources) for memory in self.memory]
        self.mask = self.mask.index_select(0, sources)

    def _sources_of_groups(self, rows: Tensor) -> Tensor | None:
        """The source of each ``group`` rows in a row; None if a group has several."""
        if len(rows) % self.group:
            return None
        sources = rows.div(self.group, rounding_mode="floor").view(-1, self.group)
        return sources[:, 0] if bool((sources == sources[:, :1]).all()) else None


def _initialise(*layers: nn.Linear) -> None:
    """Uniform weights as Glorot and Bengio 2010 (equation 16) have them, biases of zero.

    All but the last layer, the output, count as one matrix from D to 3 D whatever their shape: so has fairseq
    initialised queries, keys and values since it kept them in one.
    """
    *projections, output = layers
    for layer in projections:
        bound = (6.0 / (4 * layer.in_features)) ** 0.5
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(output.weight)
    nn.init.zeros_(output.bias)
