"""What the checks of arguments say."""

import math
import re

import numpy as np
import pytest
import torch

from lightning_rectify.arguments import check_above, check_choice, check_fraction, check_least

MANY = ("circle", "sphere", "torus", "swiss_roll")


@pytest.mark.parametrize(
    ("choices", "value", "said"),
    [
        (("post", "pre"), "middle", "'post' or 'pre' but got 'middle'."),
        (("linf", "l2", None), "l1", "'linf', 'l2' or None but got 'l1'."),
        (MANY, "Sphere", "one of circle, sphere, torus, swiss_roll but got 'Sphere'. Did you mean 'sphere'?"),
        (dict.fromkeys(MANY), None, "one of circle, sphere, torus, swiss_roll but got None."),
        (("post", "pre"), torch.zeros(2), "'post' or 'pre' but got a Tensor of shape (2,)."),
        (("post", "pre"), np.array(["post"]), "'post' or 'pre' but got a ndarray of shape (1,)."),
        (("post", "pre"), ["post"], "'post' or 'pre' but got ['post']."),
    ],
)
def test_a_value_that_is_no_choice(choices, value, said):
    with pytest.raises(ValueError, match=f"^{re.escape(f'Expected argument `norm` to be {said}')}$"):
        check_choice(choices, first=next(iter(choices)), norm=value)


def test_a_choice_is_taken():
    check_choice(MANY, a="torus", b="circle")
    check_choice(("linf", None), norm=None)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, math.inf])
def test_a_fraction_is_below_one(value):
    check_fraction(a=0, b=0.999, c=None)
    with pytest.raises(ValueError, match=rf"Expected argument `dropout` to be in \[0, 1\) but got {value}\."):
        check_fraction(dropout=value)


@pytest.mark.parametrize("value", [0, math.nan, math.inf])
def test_numbers_too_small_or_without_end(value):
    check_least(1, a=1, b=None)
    check_above(0, a=1e-9, b=None)
    with pytest.raises(ValueError, match=f"`size` to be at least 1 but got {value}"):
        check_least(1, size=value)
    with pytest.raises(ValueError, match=f"`eps` to be a finite number above 0 but got {value}"):
        check_above(0, eps=value)
