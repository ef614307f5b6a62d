import math

import mpmath
import pytest
import torch

from lightning_rectify.optim.variance import (
    adaptive_rate_mean,
    adaptive_rate_variance,
    effective_warmup,
    log_adaptive_rate_variance,
    rectification,
    relative_variance,
    sma_length,
    sma_limit,
    variance_matched_length,
)


def exact_by_mpmath(rho, digits=60):
    """Theorem 1 in 60 digits: the oracle."""
    with mpmath.workdps(digits):
        rho = mpmath.mpf(rho)
        ratio = mpmath.gamma((rho - 1) / 2) / mpmath.gamma(rho / 2)
        return rho / (rho - 2) - rho / 2 * ratio**2


# Closed forms where there are any, else digits of an independent evaluation of the paper's theorem.
CHECK = {
    3.0: 3 - 6 / math.pi,
    4.0: 2 - math.pi / 2,
    4.5: 0.3194930774,
    5.0: 5 / 3 - 40 / (9 * math.pi),
    6.0: 0.1746405993,
    7.0: 0.1324192977,
    8.0: 0.1061487030,
    10.0: 0.0755459593,
    20.0: 0.0304240847,
    100.0: 5.192815749e-3,
    500.0: 1.007541702e-3,
    1000.0: 5.018802001e-4,
    1999.0: 2.505949318e-4,
    3999.0: 1.251485851e-4,
    19999.0: 2.500593868e-5,
}


@pytest.mark.parametrize("rho", CHECK)
def test_variance_check_values(rho):
    # 1e-9: the check values carry ten digits.
    assert adaptive_rate_variance(rho) == pytest.approx(CHECK[rho], rel=1e-9)
    assert adaptive_rate_variance(torch.tensor(rho)).item() == pytest.approx(CHECK[rho], rel=1e-9)


@pytest.mark.parametrize(
    ("rho", "first_order", "excess"),
    [(4.5, 1.8, 5.634), (5, 0.8333333333, 3.307455), (6, 0.375, 2.147267), (7, 0.2333333333, 1.762080),
     (8, 0.1666666667, 1.570124), (10, 0.1041666667, 1.378852), (20, 0.0347222222, 1.141274),
     (100, 5.314625850e-3, 1.023457), (500, 1.012112968e-3, 1.004537), (1000, 5.030140602e-4, 1.002259),
     (1999, 2.508775695e-4, 1.001128), (3999, 1.252190707e-4, 1.000563), (19999, 2.500875256e-5, 1.000113)],
)  # fmt: skip
def test_first_order_check_values(rho, first_order, excess):
    value = adaptive_rate_variance(float(rho), "first_order")
    assert value == pytest.approx(first_order, rel=1e-9)
    # The excess over exact is given to four to seven digits.
    assert value / adaptive_rate_variance(float(rho)) == pytest.approx(excess, rel=1e-4)


def test_variance_against_mpmath_over_the_whole_range():
    rhos = [2 + 1e-6, 2 + 1e-3, 2.5, *torch.logspace(0.5, 6, 300, dtype=torch.float64).tolist(), 99.999999, 100.0]
    values = adaptive_rate_variance(torch.tensor(rhos, dtype=torch.float64)).tolist()
    for rho, value in zip(rhos, values, strict=True):
        exact = exact_by_mpmath(rho)
        # 1e-10: log-gamma below 100 loses 2e-11, the truncated series above it 1.2e-11; near 2, rho - 2 itself is known
        # to 4e-10 only, but the value there is rho / (rho - 2) and moves with it on both sides alike.
        assert abs(value / exact - 1) < 1e-10
        assert abs(adaptive_rate_variance(rho) / exact - 1) < 1e-10


@pytest.mark.parametrize(("rho", "mean"), [(5.0, 1.189416), (10.0, 1.083722), (100.0, 1.007579), (1000.0, 1.000751)])
def test_mean_check_values(rho, mean):
    # 1e-6: digits given.
    assert adaptive_rate_mean(rho) == pytest.approx(mean, rel=1e-6)
    assert adaptive_rate_mean(torch.tensor(rho)).item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("rho", [1.5, 2.5, 7.0, 99.0, 101.0, 5e3, 1e6])
def test_mean_and_variance_make_the_second_moment(rho):
    with mpmath.workdps(40):
        exact = mpmath.sqrt(mpmath.mpf(rho) / 2) * mpmath.gamma((mpmath.mpf(rho) - 1) / 2)
        exact /= mpmath.gamma(mpmath.mpf(rho) / 2)
    assert adaptive_rate_mean(rho) == pytest.approx(float(exact), rel=1e-11)
    if rho > 2:  # E[psi^2] = rho / (rho - 2)
        second = adaptive_rate_mean(rho) ** 2 * (1 + relative_variance(rho))
        assert second == pytest.approx(rho / (rho - 2), rel=1e-11)


def test_infinite_where_the_integral_diverges():
    assert adaptive_rate_variance(2.0) == adaptive_rate_variance(1.0) == math.inf
    assert adaptive_rate_variance(4.0, "first_order") == math.inf
    assert adaptive_rate_mean(1.0) == math.inf
    assert torch.isinf(adaptive_rate_variance(torch.tensor([1.0, 2.0]))).all()


@pytest.mark.parametrize("beta2", [0.9, 0.98, 0.99, 0.999, 0.9999, 0.99999])
def test_sma_length_against_mpmath(beta2):
    for step in (1, 2, 3, 5, 6, 50, 1000, 50_000):
        with mpmath.workdps(50):
            b = mpmath.mpf(beta2)
            exact = 2 / (1 - b) - 1 - 2 * step * b**step / (1 - b**step)
        # 1e-9: rho_t near 1 is a difference of numbers near rho_inf = 2e5, known to 1e-16 each.
        assert sma_length(float(step), beta2) == pytest.approx(float(exact), rel=1e-9)
        assert sma_length(torch.tensor(float(step)), beta2).item() == pytest.approx(float(exact), rel=1e-9)


def test_sma_lengths_start_at_one_and_tend_to_the_limit():
    steps = torch.arange(1, 30_000, dtype=torch.float64)
    for length in (sma_length(steps, 0.999), variance_matched_length(steps, 0.999)):
        assert length[0].item() == pytest.approx(1.0, abs=1e-9)
        assert (length.diff() > 0).all() or length.diff().min() > -1e-9
        assert length[-1].item() == pytest.approx(1999.0, rel=1e-6)
    assert sma_length(1e7, 0.999) == sma_limit(0.999)  # no overflow
    # The definition: squared sum over sum of squares of the weights.
    weights = 0.999 ** torch.arange(500, dtype=torch.float64)
    assert variance_matched_length(500.0, 0.999) == pytest.approx((weights.sum() ** 2 / weights.pow(2).sum()).item())


@pytest.mark.parametrize(
    ("step", "expected"),
    [(6, 0.02582), (7, 0.03274), (10, 0.04900), (100, 0.21534), (1000, 0.64533), (10_000, 0.99977)],
)
def test_rectification_check_values(step, expected):
    assert rectification(float(step), 0.999) == pytest.approx(expected, abs=5e-6)
    assert rectification(torch.tensor(step), 0.999).item() == pytest.approx(expected, abs=5e-6)


def test_rectification_gate_and_thresholds():
    assert rectification(5.0, 0.999) == 0.0
    assert rectification(5.0, 0.999, threshold=4.0) > 0.0  # the paper's gate: step 5 is the first
    assert rectification(4.0, 0.999, threshold=4.0) == 0.0
    exact = [rectification(t, 0.999, threshold=2.0, rectifier="exact") for t in (2.0, 3.0, 4.0, 5.0)]
    assert exact == pytest.approx([0.0, 0.01515, 0.02414, 0.03151], abs=5e-6)
    assert rectification(torch.tensor(1e6), 0.999).item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("beta2", "expected"), [(0.9, 14.0), (0.98, 55.4), (0.99, 106.9), (0.999, 1033.3)])
def test_effective_warmup(beta2, expected):
    assert effective_warmup(beta2) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("rho", [1.0, 5.0, 100.0])
def test_log_variance_is_trigamma(rho):
    with mpmath.workdps(30):
        expected = mpmath.polygamma(1, mpmath.mpf(rho) / 2) / 4
    # 1e-9: torch's trigamma is that good at small arguments.
    assert log_adaptive_rate_variance(rho) == pytest.approx(float(expected), rel=1e-9)
    assert log_adaptive_rate_variance(torch.tensor(rho)).item() == pytest.approx(float(expected), rel=1e-9)


def test_simulation_follows_the_theory():
    """The paper's figure 9 at mu = 0: psi of a moving average of squared normal gradients, over trajectories."""
    generator = torch.Generator().manual_seed(0)
    trajectories, beta2 = 40_000, 0.999
    v = torch.zeros(trajectories, dtype=torch.float64)
    for step in range(1, 301):
        g = torch.randn(trajectories, generator=generator, dtype=torch.float64)
        v = beta2 * v + (1 - beta2) * g**2
        if step not in (6, 10, 50, 100, 300):
            continue
        psi = ((1 - beta2**step) / v).sqrt()
        measured = psi.var().item()
        # Standard error of a variance, from the fourth central moment of this sample.
        error = ((psi - psi.mean()).pow(4).mean().item() - measured**2) ** 0.5 / trajectories**0.5
        # The variance-matched length is within .2 % of a long simulation at these steps, except at the first (1 %),
        # where moving and simple average differ in shape.
        theory = adaptive_rate_variance(variance_matched_length(float(step), beta2))
        assert abs(measured - theory) < 4 * error + 0.01 * theory, step
        # The paper's own length is above it by up to 5 % here.
        paper = adaptive_rate_variance(sma_length(float(step), beta2))
        assert abs(measured - paper) < 4 * error + 0.06 * paper, step
        # Rectified, it is the floor (the first-order rectifier damps step 6 by 1.47 too much, step 100 by 1.01).
        rectified = rectification(float(step), beta2, rectifier="exact") ** 2 * measured
        floor = adaptive_rate_variance(sma_limit(beta2))
        assert rectified == pytest.approx(floor, rel=0.06 + 4 * error / measured)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sma_limit(1.0), "beta2"),
        (lambda: sma_length(0.0, 0.9), "step"),
        (lambda: adaptive_rate_variance(-1.0), "rho"),
        (lambda: adaptive_rate_variance(5.0, "second"), "order"),
        (lambda: rectification(5.0, 0.6), "no step would ever be rectified"),
        (lambda: rectification(5.0, 0.999, threshold=3.0), "threshold"),
        (lambda: rectification(5.0, 0.999, rectifier="none"), "rectifier"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
