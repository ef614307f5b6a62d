import pytest
import torch

from lightning_rectify.optim.sampling import CoordinateSample


def tensors():
    generator = torch.Generator().manual_seed(0)
    channels_last = torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    return [torch.randn(100, 7, generator=generator), torch.randn(3, generator=generator), channels_last]


def flat(values):
    return torch.cat([value.reshape(-1) for value in values])


@pytest.mark.parametrize("size", [1, 10, 500, None, 10**6])
def test_reads_what_it_says(size):
    values = tensors()
    sample = CoordinateSample(values, size, seed=1)
    total = sum(value.numel() for value in values)
    assert len(sample) == min(size or total, total)
    out = torch.empty(len(sample))
    sample.read(values, out)
    assert torch.isin(out, flat(values)).all()
    assert len(out.unique()) == len(out)  # without replacement
    if len(sample) == total:
        assert torch.equal(out, flat(values))
    # owners say which tensor each came from
    for i, value in enumerate(values):
        assert torch.isin(out[torch.from_numpy(sample.owners == i)], value).all()


def test_fixed_by_the_seed_and_untouched_by_global_state():
    values = tensors()
    before = torch.get_rng_state()
    outs = []
    for seed in (3, 3, 4):
        sample = CoordinateSample(values, 50, seed)
        outs.append(torch.empty(50))
        sample.read(values, outs[-1])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(before, torch.get_rng_state())


def test_missing_tensor_reads_nan_and_dtype_is_kept():
    values = [value.bfloat16() for value in tensors()]
    sample = CoordinateSample(values, 300, 0)
    out = torch.empty(300)
    sample.read([values[0], None, values[2]], out)
    missing = torch.from_numpy(sample.owners == 1)
    assert torch.isnan(out[missing]).all()
    assert torch.isfinite(out[~missing]).all()


def test_share_of_each_tensor_is_its_share_of_coordinates():
    values = [torch.zeros(9000), torch.zeros(1000)]
    sample = CoordinateSample(values, 2000, 5)
    # hypergeometric: mean 200, standard deviation 12
    assert abs((sample.owners == 1).sum() - 200) < 60
