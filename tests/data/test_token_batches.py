"""The plan of token batches, against a plain rewrite of what it says, and the batches of encoded pairs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rectify.data.resumable import ResumableLoader
from lightning_rectify.data.token_batches import EncodedPairs, EncodedTexts, TokenBatchSampler
from lightning_rectify.text import BOS, EOS, PAD


def lengths(count=200, seed=0, longest=30):
    return np.random.default_rng(seed).integers(2, longest + 1, size=(count, 2))


def plan(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def tokens(batch, sizes):
    return len(batch) * max(max(sizes[i]) for i in batch)


def rank_plans(sizes, ranks, epoch, **options):
    return [plan(TokenBatchSampler(sizes, **options, num_replicas=ranks, rank=rank), epoch) for rank in range(ranks)]


# -- by tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [30, 64, 400])
def test_batches_are_filled_and_never_overfilled(budget):
    sizes = lengths()
    batches = plan(TokenBatchSampler(sizes, batch_tokens=budget), epoch=3)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(tokens(batch, sizes) <= budget for batch in batches)
    # Greedy: in the order of lengths, no batch could have taken the first sentence of the next one.
    ordered = sorted(batches, key=lambda batch: tuple(sizes[batch[0]]))
    for batch, following in pairwise(ordered):
        assert tuple(sizes[batch[-1]]) <= tuple(sizes[following[0]])
        assert tokens([*batch, following[0]], sizes) > budget


def test_the_plan_is_its_definition():
    """A plain rewrite: shuffle, sort, cut, shuffle; one random stream of seed and epoch."""
    sizes, budget, seed, epoch = lengths(97, seed=2), 120, 5, 4
    rng = np.random.default_rng([seed, epoch])
    places = sorted(rng.permutation(97).tolist(), key=lambda i: tuple(sizes[i]))  # stable
    batches, batch = [], []
    for place in places:
        if batch and tokens([*batch, place], sizes) > budget:
            batches.append(tuple(batch))
            batch = []
        batch.append(place)
    batches.append(tuple(batch))
    expected = [batches[i] for i in rng.permutation(len(batches))]
    assert plan(TokenBatchSampler(sizes, batch_tokens=budget, seed=seed), epoch) == expected


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("count", [240, 241, 243])
def test_ranks_see_together_what_one_process_sees(ranks, count):
    sizes = lengths(count)
    for epoch in (0, 7):
        whole = plan(TokenBatchSampler(sizes, batch_tokens=240), epoch)
        assert min(map(len, whole)) >= ranks  # else the plans differ there, as they must
        parts = rank_plans(sizes, ranks, epoch, batch_tokens=240 // ranks)
        assert {len(part) for part in parts} == {len(whole)}
        for batch, *shares in zip(whole, *parts, strict=True):
            assert sorted(i for share in shares for i in share) == sorted(batch)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_differ_in_all_but_the_number_of_batches():
    sizes = lengths(longest=6)  # many of one length
    sampler = TokenBatchSampler(sizes, batch_tokens=40)
    plans = [plan(sampler, epoch) for epoch in range(5)]
    assert {len(batches) for batches in plans} == {len(sampler)}
    assert len({frozenset(map(frozenset, batches)) for batches in plans}) == 5  # who shares a batch
    assert len({tuple(len(batch) for batch in batches) for batches in plans}) == 5  # order of the batches
    assert plan(sampler, 0) == plans[0]
    assert plan(TokenBatchSampler(sizes, batch_tokens=40, seed=1), 0) != plans[0]
    assert plan(TokenBatchSampler(sizes, batch_tokens=40, seed=1), 0) != plans[1]  # seed + epoch


def test_a_sentence_above_the_budget_has_a_batch_of_its_own():
    sizes = np.array([[3, 3], [50, 2], [3, 3], [2, 60], [3, 3]])
    batches = plan(TokenBatchSampler(sizes, batch_tokens=10))
    assert sorted(map(sorted, batches)) == [[0, 2, 4], [1], [3]]
    # On two ranks each needs one: two sentences a global batch, the fifth joins the last one.
    left, right = rank_plans(sizes, 2, 0, batch_tokens=1)
    assert [len(a) + len(b) for a, b in zip(left, right, strict=True)] in ([2, 3], [3, 2])
    assert all(left)
    assert all(right)


def test_a_last_batch_too_small_for_all_ranks_joins_the_one_before():
    sizes = np.full(5, 5)  # one side is enough
    left, right = rank_plans(sizes, 2, 0, batch_tokens=10)
    assert [len(left), len(right)] == [1, 1]
    assert sorted(left[0] + right[0]) == [0, 1, 2, 3, 4]
    assert [len(batch) for batch in plan(TokenBatchSampler(sizes, batch_tokens=20, shuffle=False))] == [4, 1]


def test_without_shuffle_token_batches_are_sorted():
    sizes = lengths()
    sampler = TokenBatchSampler(sizes, batch_tokens=100, shuffle=False)
    order = [i for batch in plan(sampler) for i in batch]
    assert order == sorted(range(200), key=lambda i: (*sizes[i], i))
    assert plan(sampler, 1) == plan(sampler, 0)


# -- by sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_of_sentences_are_a_permutation(ranks):
    sizes = lengths(50)
    one = plan(TokenBatchSampler(sizes, batch_size=12, seed=4), epoch=2)
    expected = np.random.default_rng([4, 2]).permutation(50)[:48].reshape(4, 12).tolist()
    assert one == [tuple(batch) for batch in expected]
    parts = rank_plans(sizes, ranks, 2, batch_size=12 // ranks, seed=4)
    for rank, part in enumerate(parts):
        assert part == [batch[rank::ranks] for batch in one]


@pytest.mark.parametrize(
    ("ranks", "count", "sums"), [(1, 10, [4, 4, 2]), (2, 17, [8, 9]), (2, 18, [8, 8, 2]), (3, 5, [5])]
)
def test_evaluation_loses_and_repeats_nothing(ranks, count, sums):
    sizes = lengths(count)
    parts = rank_plans(sizes, ranks, 0, batch_size=4, shuffle=False)
    together = list(zip(*parts, strict=True))  # as many batches on each rank
    assert [sum(map(len, shares)) for shares in together] == sums
    assert all(share for shares in together for share in shares)
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(count))
    for part in parts:
        order = [tuple(sizes[i]) for batch in part for i in batch]
        assert order == sorted(order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one.*`batch_tokens`.*`batch_size`.*None and None"),
        ({"batch_tokens": 9, "batch_size": 3}, "exactly one.*got 9 and 3"),
        ({"batch_tokens": 0}, "`batch_tokens`.*at least 1.*got 0"),
        ({"batch_size": 0}, "`batch_size`.*at least 1.*got 0"),
        ({"batch_size": 1, "seed": -1}, "`seed`.*got -1"),
        ({"batch_size": 6}, "`batch_size`.*at most 5.*got 6"),
        ({"batch_size": 3, "num_replicas": 2}, "`batch_size`.*at most 2.*each rank.*got 3"),
        ({"batch_tokens": 100, "num_replicas": 6}, "`lengths`.*each of 6 ranks.*got 5"),
        ({"batch_size": 1, "num_replicas": 6, "shuffle": False}, "`lengths`.*each of 6 ranks.*got 5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(lengths(5), **arguments)


# -- pairs -------------------------------------------------------------------------------------------------------------

SOURCES, TARGETS = [[5, 6], [], [7, 8, 9]], [[4], [11, 12, 13, 14], [15, 16]]


def test_a_batch_has_its_special_ids_and_padding():
    pairs = EncodedPairs(EncodedTexts(SOURCES), EncodedTexts(TARGETS), references=["a", "b", "c"])
    assert pairs.lengths.tolist() == [[3, 2], [1, 5], [4, 3]]
    batch = pairs[2, 1]
    assert batch.source.tolist() == [[7, 8, 9, EOS], [EOS, PAD, PAD, PAD]]
    assert batch.target.tolist() == [[BOS, 15, 16, EOS, PAD, PAD], [BOS, 11, 12, 13, 14, EOS]]
    assert batch.index.tolist() == [2, 1]
    assert batch.references == ["c", "b"]
    assert {part.dtype for part in batch[:3]} == {torch.int64}
    assert pairs[1].index.tolist() == [1]  # one place


def test_prediction_has_no_target_and_taken_pairs_keep_their_index():
    pairs = EncodedPairs(EncodedTexts(SOURCES))
    assert pairs.lengths.tolist() == [[3], [1], [4]]
    assert pairs[0, 1].target is pairs[0, 1].references is None
    taken = EncodedPairs(EncodedTexts(SOURCES), EncodedTexts(TARGETS), references=["a", "b", "c"]).take([2, 0])
    assert len(taken) == 2
    batch = taken[0, 1]
    assert (batch.index.tolist(), batch.references) == ([2, 0], ["c", "a"])
    assert batch.source.tolist() == [[7, 8, 9, EOS], [5, 6, EOS, PAD]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_hand_batches_through_and_resume(num_workers):
    sentences = [[4] * (1 + i % 7) for i in range(60)]
    pairs = EncodedPairs(EncodedTexts(sentences), EncodedTexts(sentences))
    sampler = TokenBatchSampler(pairs.lengths, batch_tokens=24)
    assert isinstance(sampler, DistributedSampler)  # so that Lightning leaves it in place
    options = {"sampler": sampler, "batch_size": None, "num_workers": num_workers}
    sampler.set_epoch(2)
    plain = [batch.index.tolist() for batch in DataLoader(pairs, **options)]
    assert plain == [list(batch) for batch in sampler]
    loader = ResumableLoader(pairs, **options)
    assert len(loader) == len(sampler) == len(plain)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    again = ResumableLoader(pairs, **options)
    again.load_state_dict(loader.state_dict())
    assert [batch.index.tolist() for batch in again] == plain[3:]
