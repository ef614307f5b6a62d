"""Charts of points alone, for the gate as a detector."""

import math

import pytest
import torch

from lightning_rectify.modules.manifold import ManifoldRegressor, TangentCharts, noisy_charts, plane_distances


def noisy_circle(count, seed=0, noise=0.05, dim=6):
    g = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(count, generator=g, dtype=torch.float64)
    x = torch.zeros(count, dim, dtype=torch.float64)
    x[:, 0], x[:, 1] = angle.cos(), angle.sin()
    return x + noise / math.sqrt(dim) * torch.randn(count, dim, generator=g, dtype=torch.float64)


def test_a_gate_over_noise_holds_fresh_points_and_none_far_away():
    gate = noisy_charts(noisy_circle(2000), 1, 16)
    assert len(gate) == 16
    inside = gate.coverage(noisy_circle(2000, seed=1), warn=False)
    # 1 of 100 may lie beyond the inner radius; of 2,000 fresh points 20, and 40 is 4.5 standard deviations more
    assert (inside < 1).sum() <= 40
    far = 3.0 * noisy_circle(200, seed=2)
    assert gate.coverage(far, warn=False).max() == 0.0
    # the tangents are those of the circle: at angle a, (-sin a, cos a); noise turns them by a few degrees
    c = gate.centers[:, :2] / gate.centers[:, :2].norm(dim=1, keepdim=True)
    along = (gate.bases[:, 0, 0] * -c[:, 1] + gate.bases[:, 1, 0] * c[:, 0]).abs()
    assert along.min() > 0.98


def test_charts_of_the_regressor_are_these():
    """With as many charts: the regressor's centres and radius, found without values."""
    x = noisy_circle(1000)
    model = ManifoldRegressor(6, dim=1, degree=2).double().fit_points(x, (3 * x[:, 0]).sin())
    gate = noisy_charts(x, 1, len(model.network))
    theirs = model.network.centers + model.network.shift
    # stored in float32 on the way
    assert torch.cdist(gate.centers, theirs).amin(1).max() <= 1e-5
    assert gate.radius == pytest.approx(model.network.log_radii[0].exp().item(), rel=1e-5)


def test_distance_from_the_plane():
    gate = TangentCharts(torch.tensor([[0.0, 0, 0], [9, 0, 0]]), torch.eye(3)[:, :2].expand(2, -1, -1), 1.0, 0.5)
    x = torch.tensor([[0.5, 0.2, 0.3], [8.0, 1.0, -2.0], [100.0, 5.0, 0.0]])
    torch.testing.assert_close(plane_distances(gate, x, most=1), torch.tensor([0.3, 2.0, 0.0]), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5), 1, 1), r"`x` to be float points of shape \(N, D\) but got torch.float32 of shape \(5,\)"),
        ((torch.rand(5, 2), 3, 1), r"`d` to be an integer in \[1, 2\] but got 3"),
        ((torch.rand(5, 2), 1, 6), r"`charts` to be an integer in \[1, 5\] but got 6"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        noisy_charts(*arguments)
    with pytest.raises(ValueError, match=r"`outside` to be in \[0, 1\) but got 1.0"):
        noisy_charts(torch.rand(5, 2), 1, 2, outside=1.0)
