"""ManifoldData: the points are on their manifolds, embeddings and noise are what they say, splits and files."""

import math

import numpy as np
import pytest
import torch

from lightning_rectify.data.manifold_samples import MANIFOLDS, embed
from lightning_rectify.data.manifolds import ManifoldData


def parts(**arguments):
    data = ManifoldData(**arguments)
    data.setup("fit")
    return data, {name: (part.x, part.y) for name, part in data._parts.items()}


def draw(name, count=4000, own_dim=10):
    return MANIFOLDS[name].draw(np.random.default_rng(0), count, own_dim)


# -- manifolds ---------------------------------------------------------------------------------------------------------


def test_points_satisfy_the_equations_of_their_manifolds():
    circle, sphere, torus, roll, so3 = (draw(name)[0] for name in ("circle", "sphere", "torus", "swiss_roll", "so3"))
    # 1e-12: float64, a few operations
    assert np.abs(np.linalg.norm(circle, axis=1) - 1).max() < 1e-12
    assert np.abs(np.linalg.norm(sphere, axis=1) - 1).max() < 1e-12
    ring = np.hypot(torus[:, 0], torus[:, 1]) - 1.0
    assert np.abs(np.hypot(ring, torus[:, 2]) - 0.4).max() < 1e-12
    t = 10.0 * np.hypot(roll[:, 0], roll[:, 2])
    assert 1.5 * math.pi <= t.min() < t.max() <= 4.5 * math.pi
    assert np.abs(roll[:, 0] - t * np.cos(t) / 10).max() < 1e-12
    matrices = so3.reshape(-1, 3, 3)
    assert np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max() < 1e-12
    assert np.abs(np.linalg.det(matrices) - 1).max() < 1e-12


def test_points_are_uniform():
    """Moments in closed form; 0.05 is five standard errors of 4,000 points or more."""
    sphere, so3 = draw("sphere")[0], draw("so3")[0]
    assert np.abs(np.cov(sphere.T) - np.eye(3) / 3).max() < 0.05
    assert np.abs(so3.T @ so3 / len(so3) - np.eye(9) / 3).max() < 0.05
    # the share of the torus's area outside radius 1: 1/2 + 2 r / (2 pi R), r = 0.4
    torus = draw("torus")[0]
    assert np.mean(np.hypot(torus[:, 0], torus[:, 1]) > 1) == pytest.approx(0.5 + 0.4 / math.pi, abs=0.04)


@pytest.mark.parametrize("own_dim", [4, 30, 100])
def test_moment_curve_has_full_rank(own_dim):
    u, _ = draw("moment_curve", own_dim=own_dim)
    assert u.shape == (4000, own_dim)
    assert np.linalg.matrix_rank(u) == own_dim


def test_orthogonal_embedding_keeps_distances_and_sine_fills_the_space():
    u = draw("sphere", 200)[0]
    flat = embed(u, 50, "orthogonal", np.random.default_rng(1))
    bent = embed(u, 50, "sine", np.random.default_rng(1))
    gram = lambda x: x @ x.T  # noqa: E731
    assert np.abs(gram(flat) - gram(u)).max() < 1e-12
    assert np.linalg.matrix_rank(flat) == 3
    assert np.linalg.matrix_rank(bent) == 50
    assert np.mean(np.square(bent).sum(1)) == pytest.approx(1.0, abs=0.2)  # the mean of 2 sin^2 is 1


def test_values_do_not_depend_on_the_embedding():
    _, own = parts(dataset="torus", train_size=50)
    _, far = parts(dataset="torus", train_size=50, ambient_dim=40, embedding="sine")
    assert torch.equal(own["train"][1], far["train"][1])


def test_noise_is_as_large_as_it_says_and_the_test_part_has_true_values():
    common = {"dataset": "sphere", "ambient_dim": 40, "train_size": 3000, "test_size": 3000}
    _, clean = parts(**common)
    _, noisy = parts(**common, noise=0.2, label_noise=0.1)
    for part in ("train", "test"):
        size = (noisy[part][0] - clean[part][0]).square().sum(1).mean().sqrt().item()
        assert size == pytest.approx(0.2, rel=0.02)  # 3,000 points of 40 coordinates: 0.3 % standard error
    assert (noisy["train"][1] - clean["train"][1]).std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy["test"][1], clean["test"][1])


# -- parts -------------------------------------------------------------------------------------------------------------


def test_digits_are_the_default_and_keep_their_test_part():
    data, one = parts(val_size=100, seed=1)
    _, two = parts(val_size=100, seed=2)
    assert (data.in_features, data.num_classes, data.outputs, data.dim) == (64, 10, 10, None)
    assert [len(one[part][0]) for part in ("train", "val", "test")] == [1338, 100, 359]
    assert torch.equal(one["test"][0], two["test"][0])
    assert not torch.equal(one["val"][0], two["val"][0])
    assert one["train"][0].min() == 0
    assert one["train"][0].max() == 1
    rows = {tuple(row) for row in one["train"][0].tolist()}
    assert not rows & {tuple(row) for row in one["val"][0].tolist()}


def test_a_users_arrays_are_split_by_the_seed():
    x, y = torch.randn(100, 2, 3), torch.arange(100.0)
    data, cut = parts(x=x, y=y, val_size=0.2, test_size=10, seed=3)
    assert data.in_features == 6
    assert data.outputs == 1
    assert [len(cut[part][1]) for part in ("train", "val", "test")] == [70, 20, 10]
    assert torch.equal(torch.cat([part[1] for part in cut.values()]).sort().values, y)
    for points, values in cut.values():
        assert torch.equal(points, x.flatten(1)[values.long()])
    _, again = parts(x=x, y=y, val_size=0.2, test_size=10, seed=3)
    assert torch.equal(again["train"][1], cut["train"][1])
    _, other = parts(x=x, y=y, val_size=0.2, test_size=10, seed=4)
    assert not torch.equal(other["train"][1], cut["train"][1])


def test_files_and_the_last_column(tmp_path):
    table = np.round(np.random.default_rng(0).standard_normal((30, 4)), 3)
    np.savetxt("table.csv", table, delimiter=",", header="a,b,c,value", comments="")
    np.save("x.npy", table[:, :3])
    np.save("y.npy", table[:, 3])
    _, one = parts(x="table.csv", val_size=5, test_size=5)
    _, two = parts(x="x.npy", y="y.npy", val_size=5, test_size=5)
    for part in ("train", "val", "test"):
        assert torch.equal(one[part][0], two[part][0])
        assert torch.equal(one[part][1], two[part][1])


def test_a_users_classes():
    y = torch.arange(60) % 3
    data, cut = parts(x=torch.randn(60, 4), y=y, num_classes=3)
    assert data.num_classes == data.outputs == 3
    assert cut["train"][1].dtype == torch.int64
    with pytest.raises(ValueError, match=r"`y`.*classes 0 to 1.*got values from 0 to 2"):
        parts(x=torch.randn(60, 4), y=y, num_classes=2)


def test_training_points_are_the_training_part_and_copies():
    data, cut = parts(dataset="circle", train_size=64, batch_size=16)
    x, y = data.training_points()
    assert torch.equal(x, cut["train"][0])
    x.zero_()
    assert data.training_points()[0].any()
    batches = list(data.train_dataloader())
    assert [len(batch[0]) for batch in batches] == [16] * 4
    assert torch.equal(torch.cat([batch[1] for batch in batches]).sort().values, y.sort().values)


def test_points_are_not_there_before_setup():
    with pytest.raises(RuntimeError, match="setup"):
        ManifoldData().training_points()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset": "cube"}, "`dataset`.*one of digits, circle.*got 'cube'"),
        ({"dataset": "sphere", "x": torch.zeros(9, 2)}, "`dataset`.*None.*got 'sphere'"),
        ({"y": torch.zeros(9)}, "`y`.*None without points"),
        ({"dataset": "sphere", "ambient_dim": 2}, "`ambient_dim`.*at least 3.*got 2"),
        ({"dataset": "moment_curve", "ambient_dim": 5}, "`ambient_dim`.*even.*got 5"),
        ({"ambient_dim": 5}, "`ambient_dim`.*None.*got 5"),
        ({"dataset": "sphere", "embedding": "linear"}, "`embedding` to be 'orthogonal' or 'sine' but got 'linear'"),
        ({"dataset": "sphere", "noise": -0.1}, "`noise`.*at least 0.*got -0.1"),
        ({"label_noise": 0.1}, "`label_noise`.*0 without a manifold.*got 0.1"),
        ({"num_classes": 3}, "`num_classes`.*None without points.*got 3"),
        ({"batch_size": 0}, "`batch_size`.*at least 1.*got 0"),
        ({"train_size": 0}, "`train_size`.*at least 1.*got 0"),
        ({"val_size": 1.5}, r"`val_size`.*share in \(0, 1\).*got 1.5"),
        ({"dataset": "circle", "val_size": 0.5}, "`val_size`.*at least 2.*got 0.5"),
        ({"test_size": 10}, "`test_size`.*None for digits.*got 10"),
        ({"seed": -1}, "`seed`.*at least 0.*got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=f"(?s)Expected argument {words}"):
        ManifoldData(**arguments)


def test_wrong_data_is_named():
    with pytest.raises(ValueError, match=r"`y`.*hold 9 values.*got 8"):
        parts(x=torch.zeros(9, 2), y=torch.zeros(8))
    with pytest.raises(ValueError, match=r"`val_size` and `test_size`.*got 0.1 and 0.1 of 9"):
        parts(x=torch.zeros(9, 2), y=torch.zeros(9))
    with pytest.raises(FileNotFoundError, match="`x`"):
        parts(x="nothing.npy")
    data = ManifoldData(dataset="circle", train_size=8, batch_size=9)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"`batch_size`.*at most 8.*got 9"):
        data.train_dataloader()
