"""The searches against enumeration of every sentence, on a network that is a table."""

import itertools
import math

import pytest
import torch

from lightning_rectify.modules.translation.decoding import beam_search, greedy_search, sample
from lightning_rectify.text import BOS, EOS, PAD

V = 6  # PAD, UNK, BOS, EOS and two more
LENGTH = 4


class State:
    def __init__(self, rows):
        self.rows = rows  # (rows, 1 + S): the source's number, then all tokens so far

    def select(self, rows):
        self.rows = self.rows[rows]

    def repeat(self, k):
        self.rows = self.rows.repeat_interleave(k, dim=0)


class Table:
    """The next token's logits are a fixed random function of the source and of all tokens before."""

    def __init__(self, seed=0, scale=1.5):
        self.seed, self.scale, self.rows_seen = seed, scale, []

    def logits(self, row):
        generator = torch.Generator().manual_seed(hash((self.seed, *row)) % 2**31)
        return self.scale * torch.randn(V, generator=generator)

    def start(self, source):
        return State(source[:, :1])

    def step(self, tokens, state):
        self.rows_seen.append(len(tokens))
        state.rows = torch.cat([state.rows, tokens[:, None]], dim=1)
        return torch.stack([self.logits(row) for row in state.rows.tolist()])


def log_probability(network, source, tokens):
    """Of tokens and the EOS behind them, in float64."""
    total, row = 0.0, [source, BOS]
    for token in (*tokens, EOS):
        total += network.logits(row).double().log_softmax(0)[token].item()
        row.append(token)
    return total


def every_sentence(limit):
    """All of at most ``limit`` tokens, EOS counted; a token is anything but PAD, BOS and EOS."""
    words = [token for token in range(V) if token not in (PAD, BOS, EOS)]
    return [tokens for length in range(limit) for tokens in itertools.product(words, repeat=length)]


def sources(count):
    return torch.arange(count)[:, None] + 10


def lengths(*limits):
    return torch.tensor(limits)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_as_wide_as_the_language_is_exhaustive(penalty):
    network, limits = Table(), (LENGTH, 2, 1)
    found = beam_search(network, sources(3), lengths(*limits), beam_size=41, length_penalty=penalty, n_best=41)
    for source, limit, hypotheses in zip((10, 11, 12), limits, found, strict=True):
        expected = {
            tokens: log_probability(network, source, tokens) / (len(tokens) + 1) ** penalty
            for tokens in every_sentence(limit)
        }
        assert len(expected) == {4: 40, 2: 4, 1: 1}[limit]
        assert {tuple(one.tokens) for one in hypotheses} == expected.keys()
        for one in hypotheses:
            # 1e-5: sums of float32 logarithms of up to four terms, against float64.
            assert one.score == pytest.approx(expected[tuple(one.tokens)], abs=1e-5)
        assert [one.score for one in hypotheses] == sorted((one.score for one in hypotheses), reverse=True)


def plain_beam_search(network, source, limit, size, penalty):
    """The rule of ``beam_search``'s docstring for one source, with lists."""
    alive, finished = [((), 0.0)], []
    for place in range(1, limit + 1):
        continuations = []
        for tokens, total in alive:
            logs = network.logits([source, BOS, *tokens]).double().log_softmax(0)
            for token in range(V):
                if token not in (PAD, BOS) and (place < limit or token == EOS):
                    continuations.append(((*tokens, token), total + logs[token].item()))
        continuations.sort(key=lambda item: -item[1])
        ends = [item for item in continuations[:size] if item[0][-1] == EOS]
        finished += [(tokens[:-1], total / len(tokens) ** penalty) for tokens, total in ends]
        finished = finished[:size]
        if len(finished) == size:
            break
        alive = [item for item in continuations if item[0][-1] != EOS][:size]
    return sorted(finished, key=lambda item: -item[1])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_narrow_beams_follow_the_rule_in_batches_as_alone(size, seed):
    network, limits = Table(seed), (6, 3, 5, 1, 6)
    found = beam_search(network, sources(5), lengths(*limits), size, length_penalty=0.8, n_best=size)
    for i, limit in enumerate(limits):
        expected = plain_beam_search(network, 10 + i, limit, size, 0.8)
        assert [tuple(one.tokens) for one in found[i]] == [tokens for tokens, _ in expected]
        assert [one.score for one in found[i]] == pytest.approx([score for _, score in expected], abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_a_beam_of_one(seed):
    network, limits = Table(seed), lengths(6, 3, 5, 1, 6)
    by_beam = beam_search(network, sources(5), limits, beam_size=1)
    greedy = greedy_search(network, sources(5), limits)
    assert [one.tokens for one in greedy] == [found[0].tokens for found in by_beam]
    for one, source in zip(greedy, range(10, 15), strict=True):
        assert one.log_probability == pytest.approx(log_probability(network, source, one.tokens), abs=1e-5)


def test_finished_sentences_leave_the_batch():
    network, limits = Table(), lengths(1, 2, 6)
    greedy_search(network, sources(3), limits)
    assert network.rows_seen[:2] == sorted(network.rows_seen[:2], reverse=True)
    assert network.rows_seen[0] == 3
    assert network.rows_seen[1] < 3
    network.rows_seen.clear()
    beam_search(network, sources(3), limits, beam_size=4)
    assert network.rows_seen[0] == 12
    assert network.rows_seen[1] <= 8


def test_samples_have_the_networks_distribution():
    network, count = Table(scale=1.0), 4000
    source = torch.full((count, 1), 10)
    found = sample(network, source, torch.full((count,), 3), generator=torch.Generator().manual_seed(0))
    counts = {}
    for one in found:
        counts[tuple(one.tokens)] = counts.get(tuple(one.tokens), 0) + 1
    # Forbidden tokens are left out of a draw, and the third token must be EOS: the law of what remains.
    chi2 = 0.0
    for tokens in every_sentence(3):
        probability, row = 1.0, [10, BOS]
        for token in (*tokens, EOS)[:2] if len(tokens) == 2 else (*tokens, EOS):
            law = network.logits(row).double().exp()
            law[[PAD, BOS]] = 0.0
            probability *= (law / law.sum())[token].item()
            row.append(token)
        chi2 += (counts.get(tokens, 0) - count * probability) ** 2 / (count * probability)
    assert len(every_sentence(3)) == 13
    assert chi2 < 32.9  # the .999 quantile of chi-squared with 12 degrees of freedom; the seed is fixed


def test_cuts_and_temperature_leave_the_head():
    network, limits = Table(), lengths(*[6] * 5)
    greedy = [one.tokens for one in greedy_search(network, sources(5), limits)]
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert [one.tokens for one in sample(network, sources(5), limits, **options)] == greedy
    # top_p of just over the first token's share keeps exactly two.
    logs = network.logits([10, BOS])
    logs[[PAD, BOS]] = -math.inf
    falling, order = logs.softmax(0).sort(descending=True)
    drawn = sample(network, torch.full((300, 1), 10), torch.full((300,), 2), top_p=falling[0].item() + 1e-3)
    first = {(one.tokens or [EOS])[0] for one in drawn}
    assert first == set(order[:2].tolist())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: beam_search(Table(), sources(1), lengths(2), beam_size=0), "`beam_size`.*at least 1.*got 0"),
        (lambda: beam_search(Table(), sources(1), lengths(2), 2, n_best=3), "`n_best`.*from 1 to.*2.*got 3"),
        (lambda: beam_search(Table(), sources(1), lengths(0)), "`max_lengths`.*at least 1.*got"),
        (lambda: greedy_search(Table(), sources(2), lengths(2)), "`max_lengths`.*each of the 2.*got"),
        (lambda: sample(Table(), sources(1), lengths(2), temperature=0), "`temperature`.*above 0.*got 0"),
        (lambda: sample(Table(), sources(1), lengths(2), top_k=0), "`top_k`.*at least 1.*got 0"),
        (lambda: sample(Table(), sources(1), lengths(2), top_p=0.0), r"`top_p`.*\(0, 1\].*got 0.0"),
    ],
)
def test_bad_arguments(call, said):
    with pytest.raises(ValueError, match=f"(?s)Expected argument {said}"):
        call()
