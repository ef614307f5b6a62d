"""lightning_rectify.nn.dropout: the law of torch's dropout, from 16 bits a feature."""

import math

import pytest
import torch
from torch import nn

from lightning_rectify.nn.dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_what_is_kept_is_scaled_and_as_frequent_as_asked_for(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 1001)
    y = dropout(x, p)
    kept = y != 0
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs(kept.double().mean() - (1 - p)) < 5 * deviation + 0.5 / 65536  # p is rounded to 1/65,536
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=2e-4, atol=0)  # the scale with it
    assert abs(y.double().mean() - x.double().mean()) < 5 * math.sqrt(p / (1 - p) / x.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 1001])
def test_features_are_dropped_independently(lag: int) -> None:
    """Four neighbours share a word of the generator, rows do not."""
    torch.manual_seed(1)
    kept = (dropout(torch.ones(1000, 1001), 0.3) != 0).double().flatten() - 0.7
    correlation = (kept[:-lag] * kept[lag:]).mean() / 0.21
    assert abs(correlation) < 5 / math.sqrt(len(kept))


def test_the_gradient_goes_through_what_was_kept() -> None:
    torch.manual_seed(2)
    x = torch.randn(7, 13, 5, dtype=torch.float64).transpose(0, 2).requires_grad_()
    y = dropout(x, 0.4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach() / x.detach())
    assert set(gradient.unique().tolist()) == {0.0, 65536 / (65536 - 26214)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3, 5)])
def test_shape_and_type_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y = dropout(torch.ones(shape, dtype=dtype), 0.5)
    assert y.shape == shape
    assert y.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_generator_and_not_threads_decide() -> None:
    x, threads = torch.ones(999, 999), torch.get_num_threads()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = dropout(x, 0.2)
    second = dropout(x, 0.2)
    torch.set_rng_state(state)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(dropout(x, 0.2), first)
        assert torch.equal(dropout(x, 0.2), second)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1e-9, 1 - 1e-9, 1.0])
def test_ends_of_the_range(p: float) -> None:
    x = torch.ones(50)
    y = Dropout(p)(x)
    assert y.isfinite().all()
    assert torch.equal(y != 0, torch.full((50,), p < 0.5))
    with pytest.raises(ValueError, match="dropout probability"):
        Dropout(1.5)


def test_the_layer_is_torchs_in_all_else() -> None:
    layer, x = Dropout(0.25), torch.randn(40, 40)
    assert isinstance(layer, nn.Dropout)
    assert repr(layer) == repr(nn.Dropout(0.25))
    assert torch.equal(layer.eval()(x), x)
    assert (layer.train()(x) == 0).any()


def test_in_a_compiled_graph_it_is_torchs() -> None:
    x, found = torch.ones(100), []
    for layer in (Dropout(0.5), nn.Dropout(0.5)):
        torch.manual_seed(4)
        found.append(torch.compile(layer, backend="aot_eager", fullgraph=True)(x))
    assert set(found[0].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(*found)
