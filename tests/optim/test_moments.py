import pytest
import torch

from lightning_rectify.optim import RectifiedAdam
from lightning_rectify.optim.moments import rectifier_options, second_moments, unwrap

OPTIMIZERS = {
    "RectifiedAdam": RectifiedAdam,
    "RectifiedAdam foreach": lambda p: RectifiedAdam(p, foreach=True),
    "RectifiedAdam capturable": lambda p: RectifiedAdam(p, capturable=True),
    "RAdam": torch.optim.RAdam,
    "Adam": lambda p: torch.optim.Adam(p, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": torch.optim.AdamW,
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
}


class Wrapper:
    """As Lightning's and DeepSpeed's wrappers look from outside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("wraps", [0, 2])
def test_reads_the_moving_average_of_squares(name, wraps):
    torch.manual_seed(0)
    first, second = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))
    optimizer = OPTIMIZERS[name]([{"params": [first]}, {"params": [second]}])
    expected = {first: torch.zeros(3, 2, dtype=torch.float64), second: torch.zeros(4, dtype=torch.float64)}
    beta2 = 0.99 if name == "RMSprop" else 0.999
    for t in range(5):
        for param in (first, second):
            if param is second and t < 2:  # late
                continue
            param.grad = torch.randn_like(param)
            expected[param] = beta2 * expected[param] + (1 - beta2) * param.grad.double() ** 2
        optimizer.step()
    wrapped = optimizer
    for _ in range(wraps):
        wrapped = Wrapper(wrapped)
    moments = second_moments(wrapped, {first: "layer.weight"})
    assert [(m.param is p, m.group, int(m.step)) for m, p in zip(moments, (first, second), strict=True)] == [
        (True, 0, 5),
        (True, 1, 3),
    ]
    assert [m.name for m in moments] == ["layer.weight", "param1"]
    assert all(m.beta2 == beta2 and m.eps == 1e-8 for m in moments)
    assert all(m.corrected == (name != "RMSprop") for m in moments)
    assert all(m.eps_before_correction == ("RAdam" in name or "Rectified" in name) for m in moments)
    for m in moments:
        # 1e-6: float32 state.
        torch.testing.assert_close(m.value.double(), expected[m.param], rtol=1e-6, atol=0)


def test_nothing_before_the_first_step_and_given_names():
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.named_parameters())
    assert second_moments(optimizer) == []
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert [m.name for m in second_moments(optimizer)] == ["weight", "bias"]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adafactor])
def test_optimizers_without_second_moment_are_refused(cls):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"RMSprop.*but got {cls.__name__}"):
        second_moments(Wrapper(cls([param], lr=0.1)))


def test_optimizer_that_only_looks_like_adam_is_refused_after_a_step():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adamax([param])
    param.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match="Adamax keeps"):
        second_moments(optimizer)


def test_rectifier_options():
    param = torch.nn.Parameter(torch.ones(2))
    ours = RectifiedAdam([param], early_phase="skip", rectifier="exact", threshold=4.5)
    assert rectifier_options(Wrapper(ours), ours.param_groups[0]) == (4.5, "exact", "skip")
    theirs = torch.optim.RAdam([param])
    assert rectifier_options(theirs, theirs.param_groups[0]) == (5.0, "first_order", "momentum")
    adam = torch.optim.Adam([param])
    assert rectifier_options(adam, adam.param_groups[0]) is None
    assert unwrap(Wrapper(adam)) is adam
