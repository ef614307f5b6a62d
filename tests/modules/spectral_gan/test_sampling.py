import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import geometric_slerp
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from torchvision.utils import make_grid

from lightning_rectify.modules.spectral_gan.sampling import (
    draw_latents,
    image_grid,
    lerp,
    nearest_neighbours,
    slerp,
    to_bytes,
    truncated,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- latents -----------------------------------------------------------------------------------------------------------

# Kolmogorov-Smirnov p-values: uniform in [0, 1] if the law is right; the seeds are fixed, so a pass stays one.
LEAST_P = 0.01


@pytest.mark.parametrize(("distribution", "law"), [("normal", stats.norm()), ("uniform", stats.uniform(-1, 2))])
def test_latents_follow_their_law(distribution, law):
    latents = draw_latents(200, 100, distribution, seeded())
    assert latents.shape == (200, 100)
    assert latents.dtype == torch.float32
    assert stats.kstest(latents.flatten().numpy(), law.cdf).pvalue > LEAST_P


@pytest.mark.parametrize("threshold", [0.04, 0.5, 1.0, 1.5])
def test_truncated_normal_follows_its_law(threshold):
    """The law of normal numbers redrawn until they fit: scipy's truncnorm, and redrawn ones themselves."""
    latents = truncated((20_000,), threshold, seeded(1)).numpy()
    assert np.abs(latents).max() <= np.float32(threshold)
    assert stats.kstest(latents, stats.truncnorm(-threshold, threshold).cdf).pvalue > LEAST_P
    redrawn = np.random.default_rng(0).standard_normal(1_000_000)
    redrawn = redrawn[np.abs(redrawn) <= threshold][:20_000]
    assert stats.ks_2samp(latents, redrawn).pvalue > LEAST_P
    # The wrong law is seen: cut off instead of redrawn.
    clipped = np.clip(np.random.default_rng(0).standard_normal(20_000), -threshold, threshold)
    assert stats.kstest(clipped, stats.truncnorm(-threshold, threshold).cdf).pvalue < 1e-6


def test_truncated_uniform_follows_its_law():
    latents = truncated((20_000,), 0.3, seeded(2), "uniform").numpy()
    assert np.abs(latents).max() <= np.float32(0.3)
    assert stats.kstest(latents, stats.uniform(-0.3, 0.6).cdf).pvalue > LEAST_P


@pytest.mark.parametrize("threshold", [8.0, 40.0, math.inf])
def test_a_far_threshold_is_none(threshold):
    latents = truncated((200_000,), threshold, seeded(3)).numpy()
    assert np.isfinite(latents).all()
    assert stats.kstest(latents, stats.norm.cdf).pvalue > LEAST_P
    assert 4.0 < np.abs(latents).max() < 6.5  # of 200,000 normal numbers: 2e-5 above, 3e-6 below


def test_latents_are_reproducible_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    for distribution, truncation in (("normal", None), ("uniform", None), ("normal", 0.5), ("uniform", 0.5)):
        first, again = (draw_latents(3, 4, distribution, seeded(5), truncation) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, draw_latents(3, 4, distribution, seeded(6), truncation))
    assert torch.equal(state, torch.get_rng_state())


def test_truncation_goes_with_the_distribution():
    assert torch.equal(draw_latents(3, 4, "normal", seeded(), 0.7), truncated((3, 4), 0.7, seeded()))
    assert torch.equal(draw_latents(3, 4, "uniform", seeded(), 0.7), truncated((3, 4), 0.7, seeded(), "uniform"))
    assert draw_latents(0, 4).shape == (0, 4)
    assert draw_latents(2, 4, device="meta").device.type == "meta"
    assert draw_latents(2, 4, generator=seeded(), device="meta").device.type == "meta"  # drawn here, then moved


# -- interpolation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 128])
def test_slerp_of_unit_vectors_is_scipys(size):
    a, b = torch.nn.functional.normalize(torch.randn(2, 4, size, generator=seeded()).double(), dim=2)
    t = torch.linspace(0, 1, 7).double()
    ours = slerp(a, b, t)
    assert ours.shape == (4, 7, size)
    theirs = np.stack([geometric_slerp(x, y, t.numpy()) for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    np.testing.assert_allclose(ours, theirs, atol=1e-14)  # float64, vectors of length 1
    assert ours.norm(dim=2).sub(1).abs().max() < 1e-14


def test_slerp_of_vectors_of_two_lengths():
    """Angle 60 degrees, lengths 2 and 6, at half way: sin 30 / sin 60 = 1/sqrt(3) of their sum."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0 * math.sqrt(3.0)]])
    middle = slerp(a, b, torch.tensor([0.5]))[0, 0]
    torch.testing.assert_close(middle, torch.tensor([5.0, 3.0 * math.sqrt(3.0)]) / math.sqrt(3.0))


def test_slerp_keeps_the_length_of_normal_latents_and_lerp_does_not():
    a, b = torch.randn(2, 200, 256, generator=seeded())
    half = torch.tensor([0.5])
    # Lengths of 256 normal numbers are 16 with standard deviation 0.7; the mean of 200 to 0.05.
    assert slerp(a, b, half).norm(dim=2).mean().item() == pytest.approx(16.0, abs=0.3)
    assert lerp(a, b, half).norm(dim=2).mean().item() == pytest.approx(16.0 / math.sqrt(2.0), abs=0.3)


@pytest.mark.parametrize("path", [slerp, lerp])
def test_paths_start_and_end_at_their_ends(path):
    a, b = torch.randn(2, 5, 16, generator=seeded())
    points = path(a, b, torch.tensor([0.0, 1.0]))
    # Float32: an arc's end is scaled by sin(w) / sin(w), a line's by 1.
    torch.testing.assert_close(points[:, 0], a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(points[:, 1], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, 0.0])
def test_slerp_of_parallel_vectors_is_a_line(factor):
    """The same, longer, opposite and zero: where the arc is not defined or a point of it."""
    a = torch.randn(3, 16, generator=seeded(), requires_grad=True)
    b, t = factor * a.detach(), torch.linspace(0, 1, 5)
    points = slerp(a, b, t)
    torch.testing.assert_close(points, lerp(a, b, t), rtol=0, atol=0)
    points.sum().backward()
    assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize("angle", [3e-6, 9e-5, 1.1e-4, 3e-3])
def test_slerp_is_exact_on_both_sides_of_the_threshold(angle):
    """In float32, against the point at t times the angle: arccos of the inner product would see 0 below 3e-4."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
    t = torch.linspace(0, 1, 5)
    # The line leaves the arc by angle^2 / 8 = 1e-9 at the threshold; the rest is float32 rounding.
    torch.testing.assert_close(slerp(a, b, t)[0, :, 1], torch.sin(t * angle), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(slerp(a, b, t)[0, :, 0], torch.cos(t * angle), rtol=1e-6, atol=0)


def test_lines_stay_in_the_cube_and_arcs_do_not():
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    t = torch.linspace(0, 1, 11)
    assert lerp(a, b, t).abs().max() <= 1
    assert slerp(a, b, t).abs().max() > 1.4


# -- neighbours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "chunk"), [(1, 7), (3, 7), (3, 1), (3, 1000), (23, 5)])
def test_neighbours_are_those_of_scipy_and_scikit_learn(k, chunk):
    queries, reference = torch.randn(12, 3, 4, 4, generator=seeded()), torch.randn(23, 3, 4, 4, generator=seeded(1))
    distances, indices = nearest_neighbours(queries, reference, k, chunk)
    assert distances.shape == indices.shape == (12, k)
    flat, base = queries.flatten(1).double().numpy(), reference.flatten(1).double().numpy()
    np.testing.assert_allclose(distances, np.sort(cdist(flat, base))[:, :k], rtol=1e-6)  # float32 against float64
    theirs = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(base).kneighbors(flat, return_distance=False)
    np.testing.assert_array_equal(indices, theirs)


def test_a_copy_is_at_distance_zero_and_a_near_copy_near():
    """Norms and inner products in float32 would give 0.05 or so for vectors of length 55, whatever the truth."""
    reference = torch.randn(40, 3, 32, 32, generator=seeded())
    queries = reference[[31, 4]].clone()
    queries[1, 0, 0, 0] += 2.0**-10
    distances, indices = nearest_neighbours(queries, reference, chunk=16)
    assert indices.flatten().tolist() == [31, 4]
    assert distances[0].item() == 0
    assert distances[1].item() == pytest.approx(2.0**-10, rel=1e-3)  # a pixel of size 1 is rounded to 1e-7


def test_neighbours_of_bytes_and_of_mixed_precision():
    queries = torch.tensor([[0], [255]], dtype=torch.uint8)
    distances, indices = nearest_neighbours(queries, torch.tensor([[250], [10]], dtype=torch.uint8))
    assert distances.flatten().tolist() == [10.0, 5.0]
    assert indices.flatten().tolist() == [1, 0]
    distances, _ = nearest_neighbours(queries.double(), torch.tensor([[250.0], [10.0]]))
    assert distances.dtype == torch.float64


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "columns", "padding"), [(7, 3, 2), (6, 3, 0), (4, 10, 1), (9, 1, 2)])
def test_grids_are_torchvisions(count, columns, padding):
    images = torch.rand(count, 3, 5, 4, generator=seeded()) * 2.4 - 1.2  # some outside: they are clipped
    theirs = make_grid(images, nrow=columns, padding=padding, normalize=True, value_range=(-1, 1))
    # (x + 1) / 2 in another order: float32.
    torch.testing.assert_close(image_grid(images, columns, padding), theirs, rtol=0, atol=1e-6)


def test_grid_of_one_channel_by_hand():
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    expected = torch.tensor([[0.0, 0.5], [1.0, 0.0]])
    assert torch.equal(image_grid(images, columns=2, padding=0), expected[None])
    assert image_grid(images, columns=2, padding=2).shape == (1, 8, 8)


def test_bytes_and_back():
    levels = torch.arange(256)
    assert torch.equal(to_bytes(levels / 127.5 - 1.0), levels.to(torch.uint8))
    assert to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    values = torch.rand(1000, generator=seeded()) * 2 - 1
    assert (to_bytes(values).double() / 127.5 - 1 - values).abs().max() <= 1 / 255 + 1e-6  # half a level, float32


# -- errors ------------------------------------------------------------------------------------------------------------

A = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw_latents(-1, 4), "`count` to be at least 0 but got -1"),
        (lambda: draw_latents(2, 0), "`latent_size` to be at least 1 but got 0"),
        (lambda: draw_latents(2, 4, "cauchy"), "`distribution` to be 'uniform' or 'normal' but got 'cauchy'"),
        (lambda: draw_latents(2, 4, truncation=0.0), "`threshold` to be positive but got 0.0"),
        (lambda: truncated((2,), float("nan")), "`threshold` to be positive but got nan"),
        (lambda: truncated((2,), 1.5, None, "uniform"), "`threshold` to be at most 1 with uniform .* but got 1.5"),
        (lambda: lerp(A[0], A[0], A[0]), r"`a` to be of shape \(B, L\) but got \(4,\)"),
        (lambda: slerp(A, A[:1], A[0]), r"`b` to be of the shape of `a`, \(2, 4\), but got \(1, 4\)"),
        (lambda: slerp(A, A, A), r"`t` to be of shape \(T,\) but got \(2, 4\)"),
        (lambda: nearest_neighbours(A, A[:, :3]), r"of those in `reference`, \(3,\), but got \(4,\)"),
        (lambda: nearest_neighbours(A, A, k=3), "`k` to be from 1 to 2, the references, but got 3"),
        (lambda: nearest_neighbours(A, A, chunk=0), "`chunk` to be at least 1 but got 0"),
        (lambda: image_grid(A), r"`images` to be of shape \(N, C, H, W\), N > 0, but got \(2, 4\)"),
        (lambda: image_grid(A.view(2, 1, 2, 2), columns=0), "`columns` to be at least 1 but got 0"),
        (lambda: image_grid(A.view(2, 1, 2, 2), padding=-1), "`padding` to be at least 0 but got -1"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
