"""Metrics of generated images against closed forms, scipy and plain numpy."""

import copy

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from lightning_rectify.modules.spectral_gan.features import FeatureExtractor, InceptionFeatures, RandomFeatures
from lightning_rectify.modules.spectral_gan.metrics import (
    GenerationMetrics,
    density_coverage,
    kid_interval,
    precision_recall,
)


class Pixels(FeatureExtractor):
    """Images of C channels and one pixel are their own features; the first three are logits times a scale."""

    name = "pixels"

    def __init__(self, num_features=6, logit_scale=4.0):
        super().__init__()
        self.num_features, self.channels, self.logit_scale = num_features, (num_features,), logit_scale
        self.num_classes = 3 if logit_scale else None
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = 0

    def extract(self, images):
        self.seen += len(images)
        features = images.mean(dim=(2, 3)) * self.weight
        return features, features[:, :3] * self.logit_scale if self.logit_scale else None


def points(n, num_features=6, seed=0, shift=0.0):
    noise = torch.randn(n, num_features, generator=torch.Generator().manual_seed(seed))
    return (noise * 0.2 + shift).clamp(-1, 1)


def as_images(features):
    return features[:, :, None, None]


def measured(real, fake, extractor=None, batch_size=40, **options):
    metrics = GenerationMetrics(extractor or Pixels(), **options)
    for batch in real.split(batch_size):
        metrics.update(as_images(batch), real=True)
    for batch in fake.split(batch_size):
        metrics.update(as_images(batch), real=False)
    return metrics.compute()


# -- against other implementations -------------------------------------------------------------------------------------


def numpy_fd(real, fake):
    real, fake = real.double().numpy(), fake.double().numpy()
    a, b = np.cov(real.T), np.cov(fake.T)
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)


def numpy_mmd(real, fake):
    """Squared MMD, unbiased within each set, with the kernel (x y / F + 1)^3, pair by pair."""
    kernel = lambda x, y: (float(x @ y) / len(x) + 1.0) ** 3  # noqa: E731
    real, fake = real.double().numpy(), fake.double().numpy()

    def within(s):
        return np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])

    return within(real) + within(fake) - 2 * np.mean([kernel(x, y) for x in real for y in fake])


def numpy_prdc(real, fake, k):
    real, fake = real.double().numpy(), fake.double().numpy()

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, j) for j in range(len(fake))]
    inside_real = np.array([[np.linalg.norm(y - x) <= r for x, r in zip(real, real_radii, strict=True)] for y in fake])
    inside_fake = np.array([[np.linalg.norm(x - y) <= r for y, r in zip(fake, fake_radii, strict=True)] for x in real])
    return (
        inside_real.any(1).mean(),
        inside_fake.any(1).mean(),
        inside_real.sum(1).mean() / k,
        inside_real.any(0).mean(),
    )


def test_frechet_distance_against_scipy():
    real, fake = points(300), points(200, seed=1, shift=0.1) * torch.linspace(0.1, 1, 6)
    # 1e-9: float64 on both sides; eigenvalues of a product against its square root.
    assert measured(real, fake)["fd_pixels_n200vs300"] == pytest.approx(numpy_fd(real, fake), rel=1e-9)


def test_frechet_distance_between_diagonal_gaussians():
    """Sum of (difference of means)^2 + (difference of deviations)^2: here of exact sample moments."""
    corners = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)]) / 4
    scale, shift = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.25, 0.0, -0.125])
    deviation = corners.double().std(dim=0)
    expected = (shift**2 + ((scale - 1) * deviation) ** 2).sum().item()
    found = measured(corners, corners * scale + shift, Pixels(3))
    assert found["fd_pixels_n8"] == pytest.approx(expected, rel=1e-12)


def test_kid_of_all_images_against_plain_numpy():
    real, fake = points(30), points(30, seed=1, shift=0.2)
    found = measured(real, fake, kid_subset_size=1000, kid_subsets=3)  # lowered to 30: every draw is everything
    assert found["kid_pixels_n30"] == pytest.approx(numpy_mmd(real, fake), rel=1e-10)  # float64 on both sides
    assert found["kid_std_pixels_n30"] == pytest.approx(0.0, abs=1e-12)


def test_kid_over_subsets_is_unbiased():
    real, fake = points(60), points(50, seed=1, shift=0.3)
    found = measured(real, fake, kid_subset_size=20, kid_subsets=400)
    std = found["kid_std_pixels_n50vs60"]
    assert std > 0
    # Four standard errors of a mean of 400 draws (drawn without replacement: smaller still).
    assert found["kid_pixels_n50vs60"] == pytest.approx(numpy_mmd(real, fake), abs=4 * std / 20)


def test_kid_interval():
    real, fake = points(60), points(50, seed=1, shift=0.3)
    before = torch.get_rng_state()
    mean, low, high = kid_interval(real, fake, subsets=400, subset_size=20, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert kid_interval(real, fake, subsets=400, subset_size=20, seed=3) == (mean, low, high)
    assert kid_interval(real, fake, subsets=400, subset_size=20, seed=4)[0] != mean
    found = measured(real, fake, kid_subset_size=20, kid_subsets=400, seed=3)
    assert mean == pytest.approx(found["kid_pixels_n50vs60"], rel=1e-10)  # the same draws
    # 1.96 deviations either side if values were normal; they are nearly so: 10 %.
    assert high - low == pytest.approx(2 * 1.96 * found["kid_std_pixels_n50vs60"], rel=0.1)
    assert low < mean < high
    whole = kid_interval(real[:20], fake[:20], subsets=3)
    assert whole == pytest.approx([numpy_mmd(real[:20], fake[:20])] * 3, rel=1e-10)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_precision_recall_density_coverage_against_plain_loops(k, shift):
    real, fake = points(50, 3), points(40, 3, seed=1, shift=shift)
    found = (*precision_recall(real, fake, k), *density_coverage(real, fake, k))
    assert found == pytest.approx(numpy_prdc(real, fake, k), abs=1e-12)  # counts over counts
    metrics = measured(real, fake, Pixels(3), neighbours=k)
    names = ("precision", "recall", "density", "coverage")
    assert tuple(metrics[f"{name}_pixels_n40vs50"] for name in names) == found


def test_chunks_do_not_change_the_counts(monkeypatch):
    real, fake = points(50, 3), points(40, 3, seed=1, shift=0.1)
    whole = (*precision_recall(real, fake, 3), *density_coverage(real, fake, 3))
    monkeypatch.setattr("lightning_rectify.modules.spectral_gan._balls._CHUNK", 150)  # three rows
    assert (*precision_recall(real, fake, 3), *density_coverage(real, fake, 3)) == whole


def test_inception_score_closed_forms():
    """exp of the mean KL to the mean: K for sure and even answers, 1 where all answers are one."""
    one_of_three = torch.eye(3).repeat(20, 1)
    even = measured(points(60, 3), one_of_three, Pixels(3, logit_scale=2000.0))  # float32 softmax would give 0 * inf
    assert even["is_pixels_n60"] == pytest.approx(3.0, rel=1e-12)
    same = measured(points(60, 3), one_of_three[:1].repeat(60, 1), Pixels(3))
    assert same["is_pixels_n60"] == pytest.approx(1.0, rel=1e-12)
    logits = points(60, 3).double().numpy() * 4
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    found = measured(points(60, 3), points(60, 3), Pixels(3))
    assert found["is_pixels_n60"] == pytest.approx(expected, rel=1e-6)  # logits are float32
    assert not any(key.startswith("is_") for key in measured(points(60, 3), points(60, 3), Pixels(3, None)))


def test_mifid_divides_by_the_distance_of_generated_images_to_real_ones():
    real, near = points(60, shift=0.3), points(20, seed=1, shift=0.3)
    unit = lambda x: x.double() / x.double().norm(dim=1, keepdim=True)  # noqa: E731
    distance = (1 - (unit(near) @ unit(real).T).abs()).min(dim=1).values.mean().item()
    assert 0 < distance < 0.1
    found = measured(real, near)
    assert found["mifid_pixels_n20vs60"] == pytest.approx(found["fd_pixels_n20vs60"] / distance, rel=1e-6)
    far = measured(points(60, shift=0.3), points(20, seed=1, shift=-0.3) * torch.tensor([1, -1, 1, -1, 1, -1]))
    assert far["mifid_pixels_n20vs60"] == pytest.approx(far["fd_pixels_n20vs60"], rel=1e-12)
    # Copies of one real image: memorised, though most real images have no copy near.
    copies = measured(real, real[:1].repeat(20, 1))
    assert copies["mifid_pixels_n20vs60"] > 1e6 * copies["fd_pixels_n20vs60"]


# -- closed cases of the four ------------------------------------------------------------------------------------------


def test_identical_sets():
    x = points(80)
    assert precision_recall(x, x, 5) == (1.0, 1.0)
    # Each ball holds its centre, and its 5 neighbours up to the rim.
    assert density_coverage(x, x, 5) == pytest.approx((6 / 5, 1.0), abs=1e-12)
    found = measured(x, x)
    assert found["fd_pixels_n80"] == pytest.approx(0.0, abs=1e-9)  # square roots of rounded eigenvalues


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_constant_features_of_both_sets_count(offset):
    """All distances are 0, as after the collapse of a classifier; with the rim outside all four would be 0."""
    same = torch.full((20, 7), 0.3) + offset
    assert precision_recall(same, same[:9], 5) == (1.0, 1.0)
    assert density_coverage(same, same[:9], 5) == pytest.approx((20 / 5, 1.0), abs=1e-12)


def test_disjoint_sets():
    x = points(80)
    assert precision_recall(x, x + 100, 5) == (0.0, 0.0)
    assert density_coverage(x, x + 100, 5) == (0.0, 0.0)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision():
    a, b = points(100), points(100, seed=1, shift=0.9)
    fresh = points(100, seed=2)
    precision, recall = precision_recall(torch.cat([a, b]), fresh, 5)
    assert precision > 0.9
    assert recall < 0.6
    precision, recall = precision_recall(fresh, torch.cat([a, b]), 5)
    assert precision < 0.6
    assert recall > 0.9
    assert density_coverage(a, fresh, 5)[0] == pytest.approx(1.0, abs=0.2)  # one distribution; 100 samples


# -- the module --------------------------------------------------------------------------------------------------------


def test_keys_carry_metric_extractor_and_counts():
    names = ["fd", "kid", "kid_std", "is", "mifid", "precision", "recall", "density", "coverage"]
    assert list(measured(points(30), points(30, seed=1))) == [f"{name}_pixels_n30" for name in names]
    assert list(measured(points(31), points(30))) == [f"{name}_pixels_n30vs31" for name in names]
    few = measured(points(5), points(9))  # five real images have no fifth neighbour
    assert list(few) == [f"{name}_pixels_n9vs5" for name in names[:5]]
    assert all(isinstance(value, float) for value in few.values())


def test_only_inception_makes_a_fid():
    class Impostor(Pixels):
        name = "inception"

    assert "fd_inception_n30" in measured(points(30), points(30), Impostor())

    class Small(InceptionFeatures):  # the true network is slow, and its weights are not to be had
        def __init__(self):
            FeatureExtractor.__init__(self)

        num_features, num_classes, channels = 6, None, (6,)
        extract = lambda self, images: (images.mean(dim=(2, 3)), None)  # noqa: E731

    assert "fid_inception_n30" in measured(points(30), points(30), Small())


def test_same_images_give_the_same_numbers_and_no_random_state_is_touched():
    real, fake = points(150), points(250, seed=1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        found.append(measured(real, fake, batch_size=(40, 7)[seed - 1]))
        assert torch.equal(before, torch.get_rng_state())
        assert (np.random.get_state()[1] == numpy_before).all()
    assert found[0] == found[1]
    other = measured(real, fake, seed=1)
    assert {key for key in other if other[key] != found[0][key]} == {
        f"{name}_pixels_n250vs150" for name in ("kid", "kid_std", "is")
    }


def test_each_image_goes_through_the_extractor_once():
    extractor = Pixels()
    measured(points(30), points(40), extractor)
    assert extractor.seen == 70


def test_nothing_of_it_is_in_a_checkpoint():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.metrics = GenerationMetrics(RandomFeatures(num_features=8))

    owner = Owner()
    owner.metrics.update(torch.zeros(4, 1, 8, 8), real=True)
    owner.metrics.update(torch.zeros(4, 1, 8, 8), real=False)
    owner.metrics.compute()
    assert owner.state_dict() == {}
    assert list(owner.parameters()) == []
    owner.load_state_dict({})
    assert copy.deepcopy(owner).metrics.compute() == owner.metrics.compute()


def test_extractor_follows_the_images():
    metrics = GenerationMetrics(Pixels())
    metrics.extractor.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):  # it tried: meta tensors have nothing to copy
        metrics.update(torch.zeros(2, 6, 1, 1), real=True)


def test_reset_forgets_all_or_the_generated_images():
    real, first, second = points(30), points(20, seed=1), points(25, seed=2)
    metrics = GenerationMetrics(Pixels())
    metrics.update(as_images(real), real=True)
    metrics.update(as_images(first), real=False)
    assert metrics.compute() == metrics.compute() == measured(real, first)
    metrics.reset(real=False)
    metrics.update(as_images(second), real=False)
    assert metrics.compute() == measured(real, second)
    metrics.reset()
    with pytest.raises(ValueError, match=r"two real and two generated.*got 0 and 0"):
        metrics.compute()


def test_generated_images_beyond_the_range_are_cut_off():
    beyond = points(30, seed=1) * 5
    assert beyond.abs().max() > 1
    assert measured(points(30), beyond) == measured(points(30), beyond.clamp(-1, 1))


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (points(30) + 2, points(30), r"`images`.*\[-1, 1\].*real"),
        (torch.full((3, 6), float("nan")), points(30), r"`images`.*\[-1, 1\].*nan"),
        (points(30), torch.full((3, 6), float("nan")), r"`images`.*finite.*generated images of which 3 of 3"),
        (points(1), points(30), r"two real and two generated.*got 1 and 30"),
        (points(30), points(1), r"two real and two generated.*got 30 and 1"),
    ],
)
def test_wrong_images(real, fake, message):
    with pytest.raises(ValueError, match=message):
        measured(real, fake)


@pytest.mark.parametrize("name", ["kid_subsets", "kid_subset_size", "neighbours"])
def test_wrong_arguments(name):
    with pytest.raises(ValueError, match=f"`{name}`.*got 0"):
        GenerationMetrics(Pixels(), **{name: 0})


@pytest.mark.parametrize("function", [precision_recall, density_coverage])
def test_wrong_features(function):
    with pytest.raises(ValueError, match=r"`k`.*below the 5.*got 5"):
        function(points(5), points(9), 5)
    with pytest.raises(ValueError, match=r"`k`.*got 0"):
        function(points(9), points(9), 0)
    with pytest.raises(ValueError, match=r"`real` and `fake`.*\(9, 6\) and \(9, 5\)"):
        function(points(9), points(9, 5), 2)
    with pytest.raises(ValueError, match=r"`subset_size`.*got 1"):
        kid_interval(points(9), points(9), subset_size=1)


# -- two processes -----------------------------------------------------------------------------------------------------


def shares(rank, world, case):
    """What a process sees: of 60 real and 50 generated images every second, or rank 0 all, or the real ones alone."""
    real, fake = points(60), points(50, seed=1, shift=0.2)
    if case == "even":
        return real[rank::world], fake[rank::world]
    if case == "uneven":
        return real[: 11 if rank == 0 else 60][11 * rank :], fake[: 37 if rank == 0 else 50][37 * rank :]
    return (real, fake[:0]) if rank == 0 else (real[:0], fake)


def job(case):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    metrics = GenerationMetrics(Pixels(), kid_subset_size=1000)
    for part, real in zip(shares(rank, world, case), (True, False), strict=True):
        for batch in part.split(10) if len(part) else ():
            metrics.update(as_images(batch), real=real)
    found = metrics.compute()
    return {"found": found, "again": metrics.compute()}


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["even", "uneven", "nothing of one kind"])
def test_two_processes_see_all_images(pool, case):
    ranks = pool.run("tests.modules.spectral_gan.test_metrics.job", case=case)
    assert ranks[0] == ranks[1]
    assert ranks[0]["found"] == ranks[0]["again"]
    alone = measured(points(60), points(50, seed=1, shift=0.2), kid_subset_size=1000)
    alone.pop("kid_std_pixels_n50vs60"), ranks[0]["found"].pop("kid_std_pixels_n50vs60")
    # Images come in another order, so KID draws another 50 of 60. All else are sums in float64.
    kid = alone.pop("kid_pixels_n50vs60"), ranks[0]["found"].pop("kid_pixels_n50vs60")
    assert kid[0] == pytest.approx(kid[1], rel=0.1)
    assert ranks[0]["found"] == pytest.approx(alone, rel=1e-9)
