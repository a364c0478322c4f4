"""Checks of single arguments: what they take, and the one sentence they say of all else."""

import math

import pytest

from spt_fast.arguments import check_flag, check_number, check_share, check_whole_number
from spt_fast.errors import InputError

NO_NUMBERS = ["5", None, [1], True, {}]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, -1, 2.5, 2.0, math.nan])
def test_whole_numbers(value):
    check_whole_number("rank", 1)
    check_whole_number("width", 0, at_least=0)
    with pytest.raises(InputError) as caught:
        check_whole_number("rank", value)
    assert str(caught.value) == f"rank must be a whole number of at least 1, got {value!r}"


@pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, math.inf, -math.inf])
def test_numbers(value):
    check_number("logit", -5)
    check_number("std", 0.0, at_least=0)
    with pytest.raises(InputError) as caught:
        check_number("logit", value)
    assert str(caught.value) == f"logit must be a finite number, got {value!r}"
    with pytest.raises(InputError, match="std must be a finite number of at least 0, got -0.1"):
        check_number("std", -0.1, at_least=0)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, 1, 1.5, math.nan])
def test_shares(value):
    check_share("dropout", 0)
    check_share("dropout", 0.99)
    with pytest.raises(InputError) as caught:
        check_share("dropout", value)
    assert str(caught.value) == f"dropout must be a number in [0, 1), got {value!r}"


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_flags(value):
    check_flag("overwrite", True)
    check_flag("overwrite", False)
    with pytest.raises(InputError) as caught:
        check_flag("overwrite", value)
    assert str(caught.value) == f"overwrite must be True or False, got {value!r}"
