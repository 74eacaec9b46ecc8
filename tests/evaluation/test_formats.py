import math

import pytest

from trl_kd.evaluation import formats
from trl_kd.evaluation.bootstrap import Estimate


@pytest.mark.parametrize(
    ("value", "digits", "written", "with_sign"),
    [
        (1.2345, 2, "1.23", "+1.23"),
        (-1.2345, 2, "−1.23", "−1.23"),
        (-0.001, 2, "0.00", "0.00"),
        (0.001, 2, "0.00", "0.00"),
        (12345.6, 1, "12,345.6", "+12,345.6"),
        (math.nan, 2, "–", "–"),
        (-math.inf, 2, "–", "–"),
        (None, 2, "–", "–"),
    ],
)
def test_number_value_is_written_with_decimals_and_sign(value, digits, written, with_sign):
    assert formats.number(value, digits) == written
    assert formats.signed(value, digits) == with_sign


@pytest.mark.parametrize(
    ("low", "high", "written"),
    [
        (24.0, 26.5, "25.25 ± 1.25"),
        (25.25, 25.25, "25.25 ± 0.00"),
        (25.2499, 25.2501, "25.25 ± <0.01"),
        (math.nan, math.nan, "25.25 ± –"),
    ],
)
def test_with_error_interval_becomes_half_its_width(low, high, written):
    assert formats.with_error(Estimate(25.25, low, high, 0.1), 2) == written
    assert formats.with_error(Estimate(25.25, low, high, 0.1), 2, sign=True) == f"+{written}"


@pytest.mark.parametrize(
    ("write", "value", "written"),
    [
        (formats.count, 87_120, "87,120"),
        (formats.count, 1_540_000_000, "1.54B"),
        (formats.count, 7_615_000_000, "7.62B"),
        (formats.count, None, "–"),
        (formats.size, 512, "512 B"),
        (formats.size, 1_040_000, "1.04 MB"),
        (formats.size, 15_200_000_000, "15.2 GB"),
        (formats.size, None, "–"),
        (formats.duration, 0.0123, "12.3 ms"),
        (formats.duration, 1.5, "1.50 s"),
        (formats.duration, 240.0, "4.0 min"),
        (formats.duration, math.nan, "–"),
        (formats.amount, 0.0, "0"),
        (formats.amount, 1234.5, "1,234"),
        (formats.amount, 0.01234, "0.0123"),
        (formats.amount, 1.234e-6, "1.23e−6"),
    ],
)
def test_quantity_is_written_in_three_digits_and_its_unit(write, value, written):
    assert write(value) == written
