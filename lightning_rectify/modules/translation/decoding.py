"""From a network that gives the next token's logits to sentences: greedy search, beam search, sampling."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_rectify.arguments import check_least
from lightning_rectify.text import BOS, EOS, PAD


class StepNetwork(Protocol):
    """What the searches need of a network; ``Transformer`` has it.

    A state is what the network keeps of the sentences under way, a row each. ``state.select(rows)`` keeps these rows in
    this order, ``state.repeat(k)`` has each row k times, one after the other.
    """

    def start(self, source: Tensor) -> Any:
        """The state before the first token, of sources (B, S)."""
        ...

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Logits (B, V) of the token after ``tokens`` (B,); the state goes on."""
        ...


@dataclass(frozen=True)
class Hypothesis:
    """A translation as subwords.

    Attributes:
        tokens: without BOS and EOS.
        log_probability: of the tokens and the EOS behind them, given the source; natural logarithm.
        score: what hypotheses are compared by: ``log_probability / length ** length_penalty``, EOS counted.
    """

    tokens: list[int]
    log_probability: float
    score: float

    def rescored(self, length_penalty: float) -> "Hypothesis":
        """The same one with the score of another length penalty."""
        return _hypothesis(self.tokens, self.log_probability, length_penalty)


def _next_log_probabilities(logits: Tensor) -> Tensor:
    """Natural logarithms, float32 or better; a sentence has no padding and begins once."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits.log_softmax(dim=-1)
    logits[..., PAD] = logits[..., BOS] = -torch.inf
    return logits


def _hypothesis(tokens: list[int], log_probability: float, length_penalty: float) -> Hypothesis:
    return Hypothesis(tokens, log_probability, log_probability / (len(tokens) + 1) ** length_penalty)


def _checked(source: Tensor, max_lengths: Tensor) -> list[int]:
    limits = max_lengths.tolist()
    if len(limits) != len(source) or any(limit < 1 for limit in limits):
        raise ValueError(
            f"Expected argument `max_lengths` to be a number of tokens, at least 1, for each of the {len(source)} "
            f"sources but got {limits}."
        )
    return limits


@torch.no_grad()
def greedy_search(network: StepNetwork, source: Tensor, max_lengths: Tensor) -> list[Hypothesis]:
    """The most probable token at each step.

    Args:
        network: in evaluation mode.
        source: int64, shape (B, S).
        max_lengths: int64, shape (B,): of each translation, EOS counted; at least 1.

    Returns:
        One hypothesis a source, scored with a length penalty of 1.
    """
    return _one_by_one(network, source, _checked(source, max_lengths), lambda logs: logs.argmax(dim=-1))


@torch.no_grad()
def sample(
    network: StepNetwork,
    source: Tensor,
    max_lengths: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Hypothesis]:
    """Tokens drawn from the network's distribution, or from its head.

    Args:
        network: in evaluation mode.
        source: int64, shape (B, S).
        max_lengths: int64, shape (B,): of each translation, EOS counted; at least 1.
        temperature: by which logits are divided, above 0; below 1 sharpens.
        top_k: draw from the k most probable tokens only, at least 1; None for all.
        top_p: draw from the fewest tokens that hold this probability (Holtzman et al. 2020, arXiv:1904.09751), in
            (0, 1].
        generator: of the draws, on the source's device.

    Returns:
        One hypothesis a source; its log-probability is the network's own, without temperature and cuts.

    Raises:
        ValueError: for an argument outside its range.
    """
    if not temperature > 0:
        raise ValueError(f"Expected argument `temperature` to be above 0 but got {temperature}.")
    check_least(1, top_k=top_k)
    if not 0 < top_p <= 1:
        raise ValueError(f"Expected argument `top_p` to be in (0, 1] but got {top_p}.")

    def choose(logs: Tensor) -> Tensor:
        falling, tokens = (logs / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        if top_k is not None:
            falling[:, top_k:] = 0.0
        before = falling.cumsum(dim=-1) - falling  # the mass in front of each token: the first always stays
        falling = falling.masked_fill(before >= top_p * falling.sum(dim=-1, keepdim=True), 0.0)
        return tokens.gather(1, torch.multinomial(falling, 1, generator=generator)).squeeze(1)

    return _one_by_one(network, source, _checked(source, max_lengths), choose)


def _one_by_one(network: StepNetwork, source: Tensor, limits: list[int], choose: Any) -> list[Hypothesis]:
    """One path a source; sentences that have ended leave the batch."""
    alive = torch.arange(len(source), device=source.device)
    limit = torch.tensor(limits, device=source.device)
    wide = torch.float32 if source.device.type == "mps" else torch.float64  # it has no float64
    sums = torch.zeros(len(source), device=source.device, dtype=wide)
    written = torch.zeros(len(source), max(limits), dtype=torch.int64, device=source.device)
    state = network.start(source)
    tokens = torch.full_like(alive, BOS)
    for place in range(max(limits)):
        logs = _next_log_probabilities(network.step(tokens, state))
        tokens = choose(logs).masked_fill(limit[alive] == place + 1, EOS)
        sums[alive] += logs.gather(1, tokens[:, None]).squeeze(1).to(wide)
        written[alive, place] = tokens
        goes_on = (tokens != EOS).nonzero().squeeze(1)
        if len(goes_on) == 0:
            break
        if len(goes_on) < len(alive):
            alive, tokens = alive[goes_on], tokens[goes_on]
            state.select(goes_on)
    rows = [row[: row.index(EOS)] for row in written.tolist()]
    return [_hypothesis(row, total, 1.0) for row, total in zip(rows, sums.tolist(), strict=True)]


@torch.no_grad()
def beam_search(
    network: StepNetwork,
    source: Tensor,
    max_lengths: Tensor,
    beam_size: int = 5,
    length_penalty: float = 1.0,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    """The best hypotheses that a search with ``beam_size`` partial ones a step finds.

    At each step the 2 K best continuations are looked at: those of the first K that end are finished, the best K that
    do not go on. A source is done when K hypotheses are finished, or at its longest length, where all must end. Its
    rows then leave the batch.

    Args:
        network: in evaluation mode.
        source: int64, shape (B, S).
        max_lengths: int64, shape (B,): of each translation, EOS counted; at least 1.
        beam_size: K, at least 1.
        length_penalty: exponent of the length by which a log-probability is divided; 0 prefers short sentences, larger
            values longer ones.
        n_best: hypotheses of a source to return, 1 to K.

    Returns:
        For each source its ``n_best`` hypotheses, best first; fewer where fewer were finished.

    Raises:
        ValueError: for an argument outside its range.
    """
    check_least(1, beam_size=beam_size)
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"Expected argument `n_best` to be from 1 to `beam_size` {beam_size} but got {n_best}.")
    limits = _checked(source, max_lengths)
    beams = _Beams(network, source, beam_size, length_penalty)
    for place in range(1, max(limits) + 1):
        beams.advance(torch.tensor([place == limits[i] for i in beams.alive], device=source.device))
        if not beams.alive:
            break
    best = [sorted(found, key=lambda hypothesis: -hypothesis.score) for found in beams.finished]
    return [found[:n_best] for found in best]


class _Beams:
    """K partial hypotheses of each source that is not done, A of them."""

    def __init__(self, network: StepNetwork, source: Tensor, size: int, length_penalty: float) -> None:
        self.network, self.size, self.length_penalty = network, size, length_penalty
        self.alive = list(range(len(source)))
        self.finished: list[list[Hypothesis]] = [[] for _ in self.alive]
        self.state = network.start(source)
        self.state.repeat(size)
        self.tokens = torch.full((len(source), size, 1), BOS, device=source.device)
        # One hypothesis to begin with: the others are its copies and must not be found K times.
        self.sums = torch.full((len(source), size), -torch.inf, device=source.device)
        self.sums[:, 0] = 0.0

    def advance(self, must_end: Tensor) -> None:
        """One token more; ``must_end`` (A,) says which sources are at their longest length."""
        logs = _next_log_probabilities(self.network.step(self.tokens[:, :, -1].flatten(), self.state))
        logs = logs.unflatten(0, (len(self.alive), self.size))
        ends = torch.arange(logs.shape[-1], device=logs.device) == EOS
        logs = logs.masked_fill(must_end[:, None, None] & ~ends, -torch.inf)
        totals = (self.sums.unsqueeze(-1) + logs).flatten(1)
        totals, places = totals.topk(2 * self.size, dim=1)
        beams, tokens = places // logs.shape[-1], places % logs.shape[-1]
        is_end = (tokens == EOS) & (totals > -torch.inf)
        self._finish(totals, beams, is_end)
        done = must_end.tolist()
        kept = [row for row, i in enumerate(self.alive) if len(self.finished[i]) < self.size and not done[row]]
        if not kept:
            self.alive = []
            return
        rows = torch.tensor(kept, device=logs.device)
        # The K best that go on. An end sorts behind all of them; at most K of the 2 K are ends, one a beam.
        order = is_end[rows].to(torch.int8).sort(dim=1, stable=True).indices[:, : self.size]
        beams, tokens = beams[rows].gather(1, order), tokens[rows].gather(1, order)
        self.sums = totals[rows].gather(1, order).masked_fill(is_end[rows].gather(1, order), -torch.inf)
        self.tokens = torch.cat(
            [self.tokens[rows].gather(1, beams.unsqueeze(-1).expand(-1, -1, self.tokens.shape[2])), tokens[..., None]],
            dim=2,
        )
        self.state.select((rows[:, None] * self.size + beams).flatten())
        self.alive = [self.alive[row] for row in kept]

    def _finish(self, totals: Tensor, beams: Tensor, is_end: Tensor) -> None:
        """Note the ends among the first K continuations of each source, best first, up to K in all."""
        found = is_end[:, : self.size].nonzero()
        if len(found) == 0:
            return
        rows, places = found.T
        written = self.tokens[rows, beams[rows, places], 1:].tolist()
        for row, tokens, total in zip(rows.tolist(), written, totals[rows, places].tolist(), strict=True):
            finished = self.finished[self.alive[row]]
            if len(finished) < self.size:
                finished.append(_hypothesis(tokens, total, self.length_penalty))
