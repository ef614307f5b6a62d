"""Seeds derived from other numbers."""

from itertools import product

import pytest
import torch

from lightning_rectify.seeds import derive_seed


def test_every_key_and_its_place_count():
    seeds = [derive_seed(*keys) for length in (1, 2, 3) for keys in product(range(4), repeat=length) if keys[-1]]
    assert len(set(seeds)) == len(seeds) == 3 + 12 + 48


def test_it_is_numpys_and_the_same_on_each_machine():
    # numpy promises that SeedSequence stays as it is (NEP 19).
    assert derive_seed(0, 1) == 2918264622725855778
    assert 0 <= derive_seed(2**64 - 1, 7) < 2**63


def test_streams_of_neighbours_are_uncorrelated():
    streams = torch.stack([torch.randn(4000, generator=torch.Generator().manual_seed(derive_seed(0, rank)))
                           for rank in range(8)])  # fmt: skip
    off = torch.corrcoef(streams) - torch.eye(8)
    assert off.abs().max() < 5 / 4000**0.5  # five standard errors


def test_a_negative_key_is_refused():
    with pytest.raises(ValueError, match="negative"):
        derive_seed(0, -1)
