"""Intrinsic dimension: estimators against plain rewrites and known manifolds, curves, bands, the noise warning."""

import math
import warnings

import numpy as np
import pytest
import torch

from lightning_rectify.modules.manifold.dimension import (
    DimensionEstimate,
    DimensionWarning,
    dimension_curve,
    intrinsic_dimension,
)
from tests.reference import dimension as reference

D = {"S1": 1, "S2": 2, "T2": 2, "swiss": 2, "S5": 5}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sphere(dim, count=2000, seed=0):
    x = torch.randn(count, dim + 1, generator=generator(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def sample(name, count=2000):
    if name.startswith("S"):
        return sphere(int(name[1:]), count)
    a, b = torch.rand(2, count, generator=generator(3), dtype=torch.float64)
    if name == "T2":
        a, b = 2 * math.pi * a, 2 * math.pi * b
        return torch.stack([(1 + 0.5 * b.cos()) * a.cos(), (1 + 0.5 * b.cos()) * a.sin(), 0.5 * b.sin()], 1)
    t = 1.5 * math.pi * (1 + 2 * a)
    return torch.stack([t * t.cos(), 21 * b, t * t.sin()], 1) / 10


def embedded(x, dim, noise=0.0):
    """Isometrically in R^dim, with noise of that norm."""
    frame = torch.linalg.qr(torch.randn(dim, x.shape[1], generator=generator(1), dtype=torch.float64)).Q
    return x @ frame.t() + noise * torch.randn(len(x), dim, generator=generator(2), dtype=torch.float64) / dim**0.5


# -- estimators --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloud():
    """A little of everything: a curved surface in R^6 with noise."""
    return embedded(sphere(2, 150, seed=5), 6, 0.1)


@pytest.mark.parametrize("k", [2, 3, 8, 15])
def test_ratios_of_distances_against_the_likelihood(cloud, k):
    got = intrinsic_dimension(cloud, method="twonn", neighbors=k, bootstrap=0, warn=False)
    if k == 2:
        assert got.value == pytest.approx(reference.two_nn(cloud.numpy()), rel=1e-12)
    # the reference differentiates numerically, to six digits
    expected = reference.ratio(cloud.numpy(), k) * (149 / 150 if k == 2 else 1.0)
    assert got.value == pytest.approx(expected, rel=1e-5)
    assert (got.low, got.high) == (got.value, got.value)


@pytest.mark.parametrize("k", [2, 5, 15])
def test_levina_bickel_against_a_loop(cloud, k):
    got = intrinsic_dimension(cloud, method="mle", neighbors=k, bootstrap=0, warn=False)
    assert got.value == pytest.approx(reference.levina_bickel(cloud.numpy(), k), rel=1e-12)


@pytest.mark.parametrize("k", [3, 6, 30])
def test_local_pca_against_singular_values(cloud, k):
    """Fewer neighbours than coordinates, as many, more; and far more coordinates, for the Gram matrix."""
    for x in (cloud, embedded(cloud, 80)):
        assert intrinsic_dimension(x, neighbors=k, bootstrap=0).value == reference.local_pca(x.numpy(), k)


@pytest.mark.parametrize("name", D)
@pytest.mark.parametrize("dim", [10, 1000])
def test_known_manifolds(name, dim):
    """A10: without noise the dimension does not see D; n = 2,000."""
    x = embedded(sample(name), dim)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = intrinsic_dimension(x, method="twonn", bootstrap=20)
        assert abs(float(two) - D[name]) <= (0.4 if name == "S5" else 0.15)
        assert abs(intrinsic_dimension(x, method="mle", bootstrap=0).value - D[name]) <= (0.4 if name == "S5" else 0.15)
    assert intrinsic_dimension(x, bootstrap=0).value == D[name]
    assert two.rounded == D[name]
    assert two.low < two.value < two.high


@pytest.mark.parametrize("name", ["S1", "S2", "T2", "swiss"])
def test_noise_is_reported(name):
    """A10: noise of norm 0.05 is above the spacing of the points; local PCA at 30 neighbours looks over it."""
    x = embedded(sample(name), 30, 0.05)
    with pytest.warns(DimensionWarning, match=r"at the scale of 2 neighbours and .* at 16: noise shows"):
        fine = intrinsic_dimension(x, method="twonn", bootstrap=0)
    assert fine.value > 2 * D[name]
    with pytest.warns(DimensionWarning):
        curve = dimension_curve(x, bootstrap=20)
    assert curve.change() > 0.3
    assert list(curve.values) == sorted(curve.values, reverse=True)  # down to the manifold's own, at 64
    # at 64 of 2,000 neighbours of a circle the noise is half the neighbourhood's size
    assert curve.values[-1] <= D[name] * (2.3 if name == "S1" else 1.15)
    assert intrinsic_dimension(x).value == D[name]


def test_flat_space_has_all_its_dimensions():
    x = torch.rand(1500, 3, generator=generator(), dtype=torch.float64)
    assert intrinsic_dimension(x).value == 3
    assert intrinsic_dimension(x, method="mle").value == pytest.approx(3, abs=0.25)  # less at the faces of the cube


def test_one_outlier_moves_nothing():
    x = sample("S2", 500)
    far = torch.cat([x, torch.tensor([[100.0, -50.0, 30.0]]).double()])
    for method in ("local_pca", "twonn", "mle"):
        before, after = (intrinsic_dimension(y, method=method, bootstrap=0).value for y in (x, far))
        assert after == pytest.approx(before, rel=0.02)


def test_equal_points_count_once():
    x = sample("S2", 300)
    twice = torch.cat([x, x[::2], x[:7]])
    for method in ("local_pca", "twonn", "mle"):
        once, again = (intrinsic_dimension(y, method=method, bootstrap=30) for y in (x, twice))
        assert once == again


def test_queries_and_order():
    """A part of the points says nearly the same, and their order nothing."""
    x = sample("S2")
    every = intrinsic_dimension(x, method="twonn", bootstrap=0)
    some = intrinsic_dimension(x, method="twonn", queries=400, bootstrap=0)
    assert some.value != every.value
    assert some.value == pytest.approx(2, abs=0.4)  # four standard deviations, 2/sqrt(400) each
    turned = x[torch.randperm(len(x), generator=generator(4))]
    assert intrinsic_dimension(turned, method="twonn", queries=400, bootstrap=0).value == some.value
    blocks = intrinsic_dimension(x, method="mle", bootstrap=0, most=10_000)
    assert blocks.value == pytest.approx(intrinsic_dimension(x, method="mle", bootstrap=0).value, rel=1e-9)


# -- bands and curves --------------------------------------------------------------------------------------------------


def test_bands_hold_the_truth():
    """Nominally 95 of 100. Of 40 samples, 80 % right is 32 and a bad day is 27; point by point it was 80 % and less."""
    inside = 0
    for seed in range(40):
        e = intrinsic_dimension(sphere(2, 400, seed + 100), method="twonn", bootstrap=60, warn=False)
        inside += e.low <= 2 <= e.high
    assert inside >= 32


def test_bands_narrow_with_the_sample():
    widths = []
    for count in (250, 4000):
        e = intrinsic_dimension(sphere(2, count), method="mle", queries=count)
        widths.append(e.high - e.low)
    assert 2.5 <= widths[0] / widths[1] <= 6.5  # 4, but for the chance in 200 resamples of 50 pieces


def test_a_curve_is_its_estimates():
    x = sample("T2", 600)
    curve = dimension_curve(x, method="mle", neighbors=[4, 15], bootstrap=30)
    for k, value, low, length in zip(curve.neighbors, curve.values, curve.low, curve.lengths, strict=True):
        single = intrinsic_dimension(x, method="mle", neighbors=k, bootstrap=30)
        assert (value, low, length) == pytest.approx((single.value, single.low, single.length), rel=1e-12)
    assert curve.lengths[0] < curve.lengths[1]
    few = dimension_curve(x[:20], bootstrap=0, warn=False)
    assert few.neighbors == (2, 4, 8, 16)


def test_the_figure_shows_the_curve():
    curve = dimension_curve(sample("S2", 300), bootstrap=20)
    (axes,) = curve.figure().axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), np.stack([curve.lengths, curve.values], 1))
    assert [text.get_text() for text in axes.texts] == ["2", "4", "8", "16", "32", "64"]


# -- estimators of others ----------------------------------------------------------------------------------------------


class CorrelationDimension:
    """Of scikit-dimension's face: the slope of the log of the share of near pairs (Grassberger and Procaccia 1983)."""

    def fit(self, X, y=None):
        distances = np.sort(torch.pdist(torch.from_numpy(X)).numpy())
        a, b = len(distances) // 400, len(distances) // 40
        self.dimension_ = math.log(10.0) / math.log(distances[b - 1] / distances[a - 1])
        return self


def test_a_foreign_estimator():
    x = sample("S2", 800)
    curve = dimension_curve(x, estimator=CorrelationDimension(), fractions=(1.0, 0.5, 0.25), bootstrap=100)
    assert curve.method == "CorrelationDimension"
    assert curve.neighbors == (2, 4, 8)
    assert curve.values[0] == CorrelationDimension().fit(x.numpy()).dimension_
    assert curve.values == pytest.approx((2, 2, 2), abs=0.2)
    assert curve.low[0] < curve.values[0] < curve.high[0]
    # fewer points, wider bands: twice as wide a quarter of them, but for ten draws
    assert curve.high[2] - curve.low[2] > curve.high[0] - curve.low[0]
    assert curve.lengths[0] < curve.lengths[2]
    assert curve == dimension_curve(x, estimator=CorrelationDimension(), fractions=(1.0, 0.5, 0.25), bootstrap=100)


def test_a_foreign_estimator_that_sees_noise_is_warned_about():
    x = embedded(sample("S2", 800), 30, 0.05)

    class TwoNN:
        def fit(self, X):
            self.dimension_ = intrinsic_dimension(torch.from_numpy(X), method="twonn", bootstrap=0, warn=False).value
            return self

    with pytest.warns(DimensionWarning):
        dimension_curve(x, estimator=TwoNN(), bootstrap=20)
    dimension_curve(x, estimator=TwoNN(), bootstrap=20, warn=False)


def test_scikit_dimension():
    """The real one, and its estimates beside ours."""
    skdim = pytest.importorskip("skdim")
    x = embedded(sample("S2", 600), 5)
    curve = dimension_curve(x, estimator=skdim.id.TwoNN(discard_fraction=0.1), fractions=(1.0, 0.5), bootstrap=50)
    assert curve.method == "TwoNN"
    assert curve.values[0] == skdim.id.TwoNN(discard_fraction=0.1).fit(x.numpy()).dimension_
    # a line through the lower 90 % against maximum likelihood: a standard deviation, 2/sqrt(600), apart at most twice
    assert curve.values[0] == pytest.approx(intrinsic_dimension(x, method="twonn").value, abs=0.17)
    theirs = dimension_curve(x, estimator=skdim.id.MLE(K=15), fractions=(1.0,), bootstrap=0)
    assert theirs.values[0] == pytest.approx(intrinsic_dimension(x, method="mle", neighbors=15).value, abs=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: intrinsic_dimension(x, method="pca"), "`method` to be 'local_pca', 'twonn' or 'mle' but got 'pca'"),
        (lambda x: intrinsic_dimension(x, neighbors=2), "`neighbors` to be an integer >= 3 but got 2"),
        (lambda x: intrinsic_dimension(x, method="mle", neighbors=50), "`neighbors` to be less than the 50 different"),
        (lambda x: intrinsic_dimension(x[:3]), "`points` to hold at least 4 different points but got 3"),
        (lambda x: intrinsic_dimension(x[0]), "`points` to be float points of shape"),
        (lambda x: intrinsic_dimension(x, queries=0), "`queries` to be an integer >= 2 but got 0"),
        (lambda x: intrinsic_dimension(x, bootstrap=-1), "`bootstrap` to be an integer >= 0 but got -1"),
        (lambda x: intrinsic_dimension(x, confidence=1), r"`confidence` to be in \(0, 1\) but got 1"),
        (lambda x: dimension_curve(x, neighbors=[8, 4]), r"`neighbors` to be ascending integers >= 2 but got \[8, 4\]"),
        (lambda x: dimension_curve(x, fractions=[0.5]), r"`fractions` to be None without `estimator` but got \[0.5\]"),
        (lambda x: dimension_curve(x, estimator=3), "`estimator` to have a method `fit` but got 3"),
        (
            lambda x: dimension_curve(x, estimator=CorrelationDimension(), neighbors=[2]),
            r"`neighbors` to be None with `estimator` but got \[2\]",
        ),
        (
            lambda x: dimension_curve(x, estimator=CorrelationDimension(), fractions=[0.5, 2.0]),
            r"`fractions` to descend within \(0, 1\] but got \[0.5, 2.0\]",
        ),
        (
            lambda x: dimension_curve(x, estimator=CorrelationDimension(), fractions=[0.01]),
            "`fractions` to leave 4 of 50 points but got 0.01",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(sphere(2, 50))


def test_an_estimate_is_like_a_number():
    e = DimensionEstimate(0.3, 0.2, 0.4, "twonn", 2, 1.0)
    assert (float(e), e.rounded) == (0.3, 1)
