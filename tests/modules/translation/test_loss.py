"""The fused softmax layer and cross-entropy against torch's two."""

import pytest
import torch
from torch.nn import functional as F

from lightning_rectify.modules.translation.loss import linear_cross_entropy


def problem(rows, classes, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def plain(hidden, weight, labels, smoothing):
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    return loss, F.cross_entropy(logits, labels, reduction="sum").detach()


def distance(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "block"), [(1, 128), (7, 3), (8, 4), (30, 1), (30, 128), (30, None)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients_are_torchs(smoothing, rows, block, dtype, tolerance):
    """Round-off of sums of 30 to 50 terms is a few epsilon (2e-16, 1e-7); the bars leave a factor of ten and more."""
    hidden, weight, labels = problem(rows, 50, 16, dtype)
    expected, expected_nll = plain(*problem(rows, 50, 16)[:2], labels, smoothing)  # float64
    exact = problem(rows, 50, 16)
    plain(*exact, smoothing)[0].mul(0.7).backward()
    loss, nll = linear_cross_entropy(hidden, weight, labels, smoothing, block=block)
    assert loss.shape == nll.shape == ()
    assert loss.dtype == nll.dtype == dtype
    assert not nll.requires_grad
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=tolerance, atol=0)
    (0.7 * loss).backward()
    assert distance(hidden.grad, exact[0].grad) < tolerance
    assert distance(weight.grad, exact[1].grad) < tolerance


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(smoothing):
    hidden, weight, labels = problem(5, 7, 4)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, smoothing, block=2)[0], (hidden, weight)
    )


def test_backward_twice_over_one_graph_adds_up():
    hidden, weight, labels = problem(5, 7, 4)
    loss, _ = linear_cross_entropy(hidden, weight, labels, 0.1)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


def test_second_derivatives_are_refused():
    hidden, weight, labels = problem(5, 7, 4)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none", "no_grad"])
def test_only_the_gradients_asked_for(wanted):
    hidden, weight, labels = problem(9, 11, 4)
    expected = plain(hidden, weight, labels, 0.1)
    hidden.requires_grad_(wanted in ("hidden", "no_grad"))
    weight.requires_grad_(wanted in ("weight", "no_grad"))
    with torch.set_grad_enabled(wanted != "no_grad"):
        loss, nll = linear_cross_entropy(hidden, weight, labels, 0.1, block=4)
    torch.testing.assert_close((loss.detach(), nll), (expected[0].detach(), expected[1]), rtol=1e-10, atol=0)
    assert loss.requires_grad is (wanted in ("hidden", "weight"))
    if loss.requires_grad:
        loss.backward()
        assert (hidden.grad is not None) is (wanted == "hidden")
        assert (weight.grad is not None) is (wanted == "weight")


def test_no_rows_cost_nothing():
    hidden, weight, labels = problem(0, 7, 4)
    loss, nll = linear_cross_entropy(hidden, weight, labels, 0.1)
    loss.backward()
    assert loss.item() == nll.item() == 0.0
    assert hidden.grad.shape == (0, 4)
    assert not weight.grad.any()


def test_scores_of_thousands_do_not_overflow():
    hidden, weight, labels = problem(6, 9, 4, torch.float32)
    with torch.no_grad():
        hidden *= 1e4
    loss, nll = linear_cross_entropy(hidden, weight, labels, 0.1, block=4)
    expected = plain(hidden.double(), weight.double(), labels, 0.1)
    # float32: 6 epsilon, of products of four terms
    torch.testing.assert_close(
        (loss.detach().double(), nll.double()), (expected[0].detach(), expected[1]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_is_no_further_from_the_truth_than_torchs_own(smoothing):
    rows, classes, width = 200, 300, 64
    exact = problem(rows, classes, width)
    with torch.no_grad():
        exact[1].mul_(width**-0.5)
    labels = exact[2]
    truth = plain(*exact, smoothing)
    truth[0].backward()
    distances = []
    for function in (linear_cross_entropy, plain):
        hidden, weight = (x.detach().float().requires_grad_() for x in exact[:2])
        with torch.autocast("cpu", torch.bfloat16):
            loss, nll = function(hidden, weight, labels, smoothing)
        loss.backward()
        assert loss.dtype == nll.dtype == torch.float32
        assert hidden.grad.dtype == weight.grad.dtype == torch.float32
        # scores near 3 are rounded by up to 2^-8, and the mean over 200 rows has less of it
        torch.testing.assert_close(loss.double(), truth[0], rtol=2e-3, atol=0, check_dtype=False)
        torch.testing.assert_close(nll.double(), truth[1], rtol=2e-3, atol=0, check_dtype=False)
        distances.append([distance(hidden.grad, exact[0].grad), distance(weight.grad, exact[1].grad)])
    ours, theirs = distances
    assert max(ours) < 2**-7  # two roundings of 2^-9 relative, to the scores (times about 3) and to the gradient
    assert all(mine < 1.2 * peer for mine, peer in zip(ours, theirs, strict=True))


def test_bfloat16_weights_keep_their_type_and_sum_in_float32():
    hidden, weight, labels = problem(600, 20, 8, torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, labels, 0.1, block=2)  # 300 sums: in bfloat16 they would stall
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = hidden.detach().double(), weight.detach().double().requires_grad_()
    plain(*exact, labels, 0.1)[0].backward()
    assert distance(weight.grad, exact[1].grad) < 2**-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "`hidden` to have shape .N, D. but got .2, 3, 4."),
        ({"weight": torch.zeros(5, 3)}, "`weight` to have shape .V, 4. with V at least 1 but got .5, 3."),
        ({"weight": torch.zeros(0, 4)}, "`weight` to have shape .V, 4. with V at least 1 but got .0, 4."),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "`labels` to have shape .2,., .* but got .3,."),
        ({"label_smoothing": 1.0}, "`label_smoothing` to be in .0, 1. but got 1.0"),
        ({"label_smoothing": -0.1}, "`label_smoothing` to be in .0, 1. but got -0.1"),
        ({"block": 0}, "`block` to be at least 1 but got 0"),
    ],
)
def test_bad_arguments(change, message):
    good = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^Expected argument {message}"):
        linear_cross_entropy(**{**good, **change})
