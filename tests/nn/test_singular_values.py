import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rectify.nn import condition_number, convolution_norm, singular_values, stable_rank, weight_matrix
from tests.reference import spectral as reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 30), (30, 1), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_against_numpy(shape, dtype):
    matrix = torch.randn(shape, dtype=dtype)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    values = singular_values(matrix)
    assert values.dtype == torch.float64
    # 1e-8 of the largest: an eigenvalue of the Gram matrix is exact to 1e-16 of the largest square.
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-8 * expected[0])


def test_singular_values_of_a_rank_deficient_matrix():
    matrix = torch.outer(torch.arange(1.0, 5.0), torch.ones(6))
    values = singular_values(matrix)
    largest = math.sqrt(30 * 6)
    assert values[0].item() == pytest.approx(largest, rel=1e-12)
    # Roots of rounding errors in zero eigenvalues: the stated 1e-8 of the largest, with a factor for four of them.
    assert values.isfinite().all()
    assert values[1:].max() < 4e-8 * largest


def test_singular_values_have_no_graph():
    assert not singular_values(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_weight_matrix_is_the_map_of_a_patch():
    """Row times unfolded patch is the convolution's output, for each kind of layer."""
    conv = nn.Conv2d(3, 5, (2, 3), bias=False, dtype=torch.float64)
    patch = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(conv(patch).flatten(), weight_matrix(conv) @ patch.flatten())
    linear = nn.Linear(4, 2, bias=False)
    assert weight_matrix(linear) is linear.weight or torch.equal(weight_matrix(linear), linear.weight)


def test_weight_matrix_of_a_transposed_convolution_has_a_row_an_output_channel():
    layer = nn.ConvTranspose2d(3, 5, 2, bias=False)
    matrix = weight_matrix(layer)
    assert matrix.shape == (5, 12)
    for out in range(5):
        torch.testing.assert_close(matrix[out], layer.weight[:, out].flatten())


def test_weight_matrix_of_a_grouped_transposed_convolution():
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
    matrix = weight_matrix(layer)
    assert matrix.shape == (6, 8)
    # Output channel 4 is the second of group 1, which sees input channels 2 and 3.
    torch.testing.assert_close(matrix[4], layer.weight[2:4, 1].flatten())


def test_stable_rank_and_condition_number():
    s = torch.tensor([[3.0, 3.0, 0.0], [4.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(stable_rank(s), torch.tensor([2.0, 1.5, 0.0]))
    assert condition_number(s).tolist() == [math.inf, 2.0, math.inf]
    huge = torch.tensor([1e30, 1e30])  # squares overflow float32
    assert stable_rank(huge).item() == 2.0


def test_stable_rank_of_a_matrix():
    matrix = torch.randn(6, 11, dtype=torch.float64)
    expected = matrix.square().sum() / np.linalg.norm(matrix.numpy(), 2) ** 2
    assert stable_rank(singular_values(matrix)).item() == pytest.approx(expected.item(), rel=1e-12)


# -- the norm of the convolution --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "sizes"),
    [
        ((3, 3), (1, 1), (1, 1), (6, 6)),
        ((3, 3), (1, 1), (1, 1), (5, 7)),
        ((4, 4), (2, 2), (1, 1), (8, 6)),
        ((3, 2), (3, 1), (1, 2), (6, 5)),
        ((1, 1), (2, 2), (1, 1), (4, 4)),
        ((5, 3), (1, 1), (2, 1), (4, 4)),  # the kernel is longer than the image and wraps around
    ],
)
def test_convolution_norm_against_the_dense_matrix(kernel, stride, dilation, sizes):
    layer = nn.Conv2d(3, 4, kernel, stride=stride, dilation=dilation, dtype=torch.float64)
    dense = reference.circular_matrix(layer.weight.detach().numpy(), sizes, stride, dilation)
    # 1e-12: both are float64, the largest eigenvalue loses no digits.
    assert convolution_norm(layer, sizes) == pytest.approx(np.linalg.norm(dense, 2), rel=1e-12)


def test_the_dense_matrix_is_torchs_convolution():
    layer = nn.Conv2d(2, 3, 3, padding=1, stride=2, padding_mode="circular", bias=False, dtype=torch.float64)
    dense = torch.from_numpy(reference.circular_matrix(layer.weight.detach().numpy(), (6, 4), (2, 2), (1, 1)))
    x = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    shifted = torch.roll(x, (1, 1), (2, 3))  # padding moves the image, which no norm sees
    torch.testing.assert_close(layer(x).flatten(), dense @ shifted.flatten())


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (2, 2)])
def test_convolution_norm_of_a_transposed_convolution(groups, stride):
    """Against the dense matrix of torch's own operator on images that wrap around."""
    layer = nn.ConvTranspose1d(4, 2, 3, stride=stride, groups=groups, bias=False, dtype=torch.float64)
    size = 5
    columns = torch.eye(4 * size, dtype=torch.float64).unflatten(1, (4, size))
    long = layer(columns)  # length (size - 1) * stride + 3: fold what hangs over
    images = torch.zeros(4 * size, 2, size * stride, dtype=torch.float64)
    for position in range(long.shape[-1]):
        images[..., position % (size * stride)] += long[..., position].detach()
    expected = np.linalg.norm(images.flatten(1).numpy(), 2)
    assert convolution_norm(layer, size) == pytest.approx(expected, rel=1e-12)


def test_convolution_norm_of_a_grouped_convolution_is_the_largest_of_its_groups():
    layer = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    weight = layer.weight.detach().numpy()
    norms = [
        np.linalg.norm(reference.circular_matrix(part, (5, 5), (1, 1), (1, 1)), 2) for part in (weight[:3], weight[3:])
    ]
    assert convolution_norm(layer, 5) == pytest.approx(max(norms), rel=1e-12)


def test_convolution_norm_in_three_axes_by_power_iteration():
    layer = nn.Conv3d(2, 2, 2, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    layer.requires_grad_(False)
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    # With padding 1 and kernel 2 torch returns one position more along each axis, the first again.
    forward = lambda z: layer(z)[..., :4, :4, :4]  # noqa: E731
    for _ in range(3000):
        _, pulled = torch.autograd.functional.vjp(forward, x, forward(x))
        norm, x = pulled.norm() / x.norm(), pulled / pulled.norm()
    # 1e-6: what 3000 power iterations reach.
    assert convolution_norm(layer, 4) == pytest.approx(norm.sqrt().item(), rel=1e-6)


def test_convolution_norm_in_slices(monkeypatch):
    layer = nn.Conv2d(3, 4, 3)
    whole = convolution_norm(layer, 9)
    # The room exports a function of the module's name, so the module is reached by its full name only.
    monkeypatch.setattr(sys.modules["lightning_rectify.nn.singular_values"], "_MOST_ENTRIES", 30)
    assert convolution_norm(layer, 9) == pytest.approx(whole, rel=1e-12)


def test_the_matrix_norm_is_not_the_norm_of_the_convolution():
    layer = nn.Conv2d(16, 16, 3, bias=False)
    nn.init.orthogonal_(layer.weight.data.view(16, -1))
    assert singular_values(weight_matrix(layer))[0].item() == pytest.approx(1.0, abs=1e-6)
    assert 1.3 < convolution_norm(layer, 16) < 3.0  # at most sqrt(9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weight_matrix(nn.BatchNorm2d(3)), "argument `layer`"),
        (lambda: singular_values(torch.ones(2, 3, 4)), r"argument `matrix` .* \(2, 3, 4\)"),
        (lambda: convolution_norm(nn.Linear(3, 3), 4), "argument `layer` to be a convolution"),
        (lambda: convolution_norm(nn.Conv2d(1, 1, 3), 0), "argument `size`"),
        (lambda: convolution_norm(nn.Conv2d(1, 1, 3), (4,)), "argument `size` to be one or 2 positive"),
        (lambda: convolution_norm(nn.Conv2d(1, 1, 3, stride=2), 5), r"multiple of the stride \(2, 2\) but got 5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
