"""Transport problems: their truths against other ways to compute them, and the loaders."""

import pickle

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lightning_rectify.data.array_files import read_samples
from lightning_rectify.data.transport import Pairs, TransportData
from lightning_rectify.data.transport_truths import (
    Mixture,
    bures_cost,
    gaussian_map,
    gaussians,
    make_problem,
    mean_distance,
    mixtures,
)
from tests.reference import transport as reference


def some_gaussians(dim, seed=0):
    generator = np.random.default_rng(seed)
    factors = [generator.standard_normal((dim, dim + 2)) for _ in range(2)]
    means = [generator.standard_normal(dim) for _ in range(2)]
    return means[0], factors[0] @ factors[0].T, means[1], factors[1] @ factors[1].T


# -- truths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_bures_cost_is_that_of_scipys_matrix_root(dim):
    given = some_gaussians(dim)
    # 1e-9: float64; sqrtm of a product that is not symmetric loses digits.
    assert bures_cost(*given) == pytest.approx(reference.bures(*given), rel=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_gaussian_map_pushes_forward_and_is_a_gradient(dim):
    """Symmetric positive definite and M A M = B: by Brenier's theorem the optimal map."""
    mean_x, cov_x, mean_y, cov_y = some_gaussians(dim)
    matrix, offset = gaussian_map(mean_x, cov_x, mean_y, cov_y)
    scale = np.abs(cov_y).max()
    np.testing.assert_allclose(matrix @ cov_x @ matrix.T, cov_y, atol=1e-9 * scale)
    np.testing.assert_allclose(matrix @ mean_x + offset, mean_y, atol=1e-9 * scale)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-9 * scale)
    assert np.linalg.eigvalsh(matrix).min() > 0


def test_bures2_is_the_papers_page():
    truth = make_problem("bures2").truth
    assert truth.cost == pytest.approx(5.6737, abs=5e-5)  # its last digit
    assert truth.independent_cost == pytest.approx(9.3, abs=0.02)
    assert truth.max_gradient == pytest.approx(7.8, rel=0.02)  # a quantile from draws, to two digits there


@pytest.mark.parametrize(
    ("name", "options"), [("bures2", {}), ("gaussians", {"dim": 5}), ("shift", {}), ("mixture1", {})]
)
def test_truth_is_what_its_own_map_costs_on_samples(name, options):
    problem = make_problem(name, **options)
    generator = np.random.default_rng(1)
    x = problem.draw_x(200_000, generator)
    y = problem.draw_y(200_000, generator)
    image = problem.truth.map(torch.from_numpy(x)).numpy()
    costs, apart = ((x - image) ** 2).sum(axis=1), ((x - y) ** 2).sum(axis=1)
    for values, truth in ((costs, problem.truth.cost), (apart, problem.truth.independent_cost)):
        # Five standard errors of the mean; a shift costs the same everywhere, but for float64 rounding.
        assert values.mean() == pytest.approx(truth, abs=5 * values.std() / len(x) ** 0.5 + 1e-9)
    assert y.var(axis=0).sum() == pytest.approx(problem.truth.variance_y, rel=0.02)  # > 5 standard errors
    steep = np.quantile(2 * np.sqrt(costs), 0.999)
    assert problem.truth.max_gradient == pytest.approx(steep, rel=0.03)  # about 3 errors of such a quantile
    # image and y have one law: in each coordinate, at the level 1e-4.
    for column in range(problem.dim):
        assert stats.ks_2samp(image[:, column], y[:, column]).pvalue > 1e-4


def test_shift_in_the_euclidean_cost():
    truth = make_problem("shift", cost="euclidean").truth
    assert truth.cost == 5.0
    assert truth.independent_cost == pytest.approx(5.21, abs=0.01)  # there a sample mean
    assert truth.max_gradient == 1.0
    assert truth.map is None


@pytest.mark.parametrize(("shift", "sigma", "dim"), [(5.0, 2**0.5, 2), (0.0, 1.0, 3), (1.5, 0.7, 1)])
def test_mean_distance_by_integration(shift, sigma, dim):
    """The square of the distance over sigma is a noncentral chi-squared number."""
    law = stats.ncx2(dim, (shift / sigma) ** 2) if shift else stats.chi2(dim)
    # in the square root's variable, where the density of one degree of freedom is bounded
    expected = integrate.quad(lambda r: sigma * r * law.pdf(r * r) * 2 * r, 0, 40, limit=200, points=[shift / sigma])[0]
    assert mean_distance(shift, sigma, dim) == pytest.approx(expected, rel=1e-7)  # quad's own error


def test_mixture_quantiles_and_costs():
    x = Mixture(np.array([0.3, 0.7]), np.array([-1.0, 2.0]), np.array([0.5, 1.5]))
    y = Mixture(np.ones(1), np.array([4.0]), np.array([0.2]))
    u = np.linspace(0.001, 0.999, 101)
    np.testing.assert_allclose(x.cdf(x.quantile(u)), u, atol=1e-12)  # bisection
    np.testing.assert_allclose(y.quantile(u), stats.norm(4.0, 0.2).ppf(u), atol=1e-10)
    absolute = mixtures(x, y, "euclidean").truth
    expected = integrate.quad(lambda t: abs(x.cdf(np.array(t)) - y.cdf(np.array(t))), -12, 14, limit=400, points=[4.0])[
        0
    ]
    # 1e-5: where the quantile functions cross the integrand has a kink, and the rule is exact to the step squared.
    assert absolute.cost == pytest.approx(expected, rel=1e-5)
    generator = np.random.default_rng(0)
    apart = np.abs(x.draw(400_000, generator) - y.draw(400_000, generator))
    assert absolute.independent_cost == pytest.approx(apart.mean(), abs=5 * apart.std() / 400_000**0.5)


def test_mixture1_is_the_papers_page():
    assert make_problem("mixture1").truth.cost == pytest.approx(6.776, abs=5e-4)
    assert make_problem("mixture1", cost="euclidean").truth.cost == pytest.approx(2.5, abs=1e-6)


def test_two_normals_on_the_line_are_both_problems():
    x, y = (Mixture(np.ones(1), np.array([m]), np.array([s])) for m, s in ((0.0, 1.0), (2.0, 0.7)))
    line = mixtures(x, y, "squared").truth
    plane = gaussians(np.zeros(1), np.eye(1), np.array([2.0]), np.array([[0.49]]), "squared").truth
    assert line.cost == pytest.approx(plane.cost, rel=1e-9)
    assert line.max_gradient == pytest.approx(plane.max_gradient, rel=0.02)  # one of the two is from draws
    points = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(line.map(points), plane.map(points), rtol=0, atol=1e-8)


def test_problems_are_functions_of_their_seed_and_can_be_pickled():
    one, two, other = (make_problem("gaussians", dim=8, seed=seed) for seed in (3, 3, 4))
    assert one.truth.cost == two.truth.cost != other.truth.cost
    again = pickle.loads(pickle.dumps(one))
    assert np.array_equal(again.draw_x(5, np.random.default_rng(0)), one.draw_x(5, np.random.default_rng(0)))


# -- data --------------------------------------------------------------------------------------------------------------


def data(**options):
    module = TransportData(**{"batch_size": 8, "epoch_size": 32, "val_size": 10, **options})
    module.setup("fit")
    return module


def epoch(module, number=0):
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def test_population_is_drawn_anew_each_epoch_and_the_same_again():
    first, second = epoch(data()), epoch(data(), 1)
    assert [tuple(side.shape) for side in first[0]] == [(8, 2), (8, 2)]
    assert len(first) == 4
    assert all(torch.equal(a, b) for x, y in zip(first, epoch(data()), strict=True) for a, b in zip(x, y, strict=True))
    points = torch.cat([batch[0] for batch in first + second])
    assert len(points.unique(dim=0)) == 64
    assert not torch.equal(first[0][0], epoch(data(seed=1))[0][0])
    assert not torch.equal(first[0][0], first[0][1])  # both sides have draws of their own


def test_fixed_sample_is_shuffled_on_each_side_of_its_own():
    module = data(train_size=32)
    first, second = epoch(module), epoch(module, 1)
    for side in (0, 1):
        a, b = (torch.cat([batch[side] for batch in part]) for part in (first, second))
        assert not torch.equal(a, b)
        assert torch.equal(a.sort(dim=0).values, b.sort(dim=0).values)
    partners = [{tuple(x.tolist()): tuple(y.tolist()) for batch in part for x, y in zip(*batch, strict=True)}
                for part in (first, second)]  # fmt: skip
    assert partners[0] != partners[1]


def test_sides_of_different_sizes():
    x, y = np.arange(20.0), np.arange(100.0, 150.0).reshape(25, 2)
    module = TransportData(x=x, y=y, batch_size=5, val_size=2, seed=3)
    module.setup("fit")
    train = epoch(module)
    assert [len(batch[0]) for batch in train] == [5] * 4  # 21 of y, 16 of x; one is left over
    assert train[0][0].shape == (5, 1)
    assert train[0][1].shape == (5, 2)
    seen = torch.cat([batch[0] for batch in train]).flatten().tolist()
    held = [
        side for loader in (module.val_dataloader(), module.test_dataloader()) for batch in loader for side in batch
    ]
    assert len(set(seen)) == 16
    assert not set(seen) & {value for side in held[::2] for value in side.flatten().tolist()}
    assert module.truth is None


@pytest.mark.parametrize("kind", ["npy", "csv", "csv with names", "tensor"])
def test_files_and_arrays(kind, tmp_path):
    values = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    source = {"tensor": torch.from_numpy(values)}.get(kind)
    if kind == "npy":
        source = str(tmp_path / "x.npy")
        np.save(source, values)
    elif source is None:
        source = tmp_path / "x.csv"
        np.savetxt(source, values, delimiter=",", header="a,b,c" if "names" in kind else "", comments="")
    torch.testing.assert_close(read_samples("x", source), torch.from_numpy(values), rtol=1e-6, atol=0)
    module = data(x=source, y=source, epoch_size=1, val_size=0.1)
    assert len(module.val_dataloader().dataset) == 3
    assert len(epoch(module)) == 3


def test_workers_change_nothing():
    alone, helped = epoch(data()), epoch(data(num_workers=1))
    assert all(torch.equal(a, b) for x, y in zip(alone, helped, strict=True) for a, b in zip(x, y, strict=True))


def test_plain_indices_keep_the_order():
    pairs = Pairs(torch.arange(3.0), torch.arange(5.0))
    x, y = pairs.__getitems__([0, 1, 2, 3, 4])
    assert (x.tolist(), y.tolist()) == ([0, 1, 2, 0, 1], [0, 1, 2, 3, 4])


def test_training_samples_are_not_validation_samples():
    module = data(val_size=50)
    x, _ = module.training_samples(50)
    again, _ = module.training_samples(50)
    val = next(iter(module.val_dataloader()))[0]
    assert torch.equal(x, again)
    assert not (x[:, None] == val[None]).all(dim=2).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"problem": "moons"}, "`problem`.*one of bures2.*got 'moons'"),
        ({"problem": "bures2", "dim": 3}, "`dim`.*2 or None.*got 3"),
        ({"problem": "gaussians", "dim": 0}, "`dim`.*at least 1.*got 0"),
        ({"cost": "cosine"}, "`cost`.*'squared'.*got 'cosine'"),
        ({"x": np.ones(1)}, "`x` and `y`.*together"),
        ({"x": np.ones(1), "y": np.ones(1), "problem": "shift"}, "`problem`.*None.*got 'shift'"),
        ({"x": np.ones(1), "y": np.ones(1), "dim": 1}, "`dim`.*None.*got 1"),
        ({"batch_size": 0}, "`batch_size`.*at least 1.*got 0"),
        ({"val_size": 1}, "`val_size`.*at least 2.*got 1"),
        ({"seed": -1}, "`seed`.*at least 0.*got -1"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        TransportData(**options)


def test_bad_samples(tmp_path):
    (tmp_path / "words.csv").write_text("a,b\n1,2\nx,3\n")
    for source, words in (
        ([float("nan"), 1.0], "`x`.*finite"),
        ([], "`x`.*hold samples"),
        ("x.parquet", "`x`.*.npy or .csv.*got 'x.parquet'"),
        (tmp_path / "words.csv", "`x`.*file of numbers.*words.csv"),
    ):
        with pytest.raises(ValueError, match=words):
            read_samples("x", source)
    with pytest.raises(FileNotFoundError, match=r"`x`.*none at"):
        read_samples("x", "nowhere.npy")
    module = TransportData(x=np.zeros(5), y=np.zeros(5), val_size=3)
    with pytest.raises(ValueError, match=r"`val_size`.*`x`.*got 3 of 5"):
        module.setup("fit")
    with pytest.raises(RuntimeError, match="setup"):
        TransportData().training_samples(5)
    module = TransportData(train_size=7, batch_size=8)
    module.setup("fit")
    with pytest.raises(ValueError, match=r"`batch_size`.*at most 7.*got 8"):
        module.train_dataloader()
