"""How numbers are written in the report and in model cards, the same everywhere."""

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_kd.evaluation.bootstrap import Estimate


DASH = "–"
"""In place of a number that there is not."""

_MINUS = "−"
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def is_number(value: float | None) -> bool:
    """Whether there is a finite value."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int) -> str:
    r"""
    A number with a fixed count of decimals.

    Args:
        value (`float`, *optional*):
            Its value.
        digits (`int`):
            Decimals.

    Returns:
        `str`: with a true minus sign, thousands apart, and no minus before a zero; a dash for what isn't finite.
    """
    if not is_number(value):
        return DASH
    text = f"{abs(value):,.{digits}f}"
    return text if value >= 0 or _is_zero(text) else _MINUS + text


def signed(value: float | None, digits: int) -> str:
    """The same with its sign, as changes are written."""
    text = number(value, digits)
    return text if text.startswith((_MINUS, DASH)) or _is_zero(text) else f"+{text}"


def half_width(estimate: "Estimate") -> float:
    """Half the width of an estimate's interval."""
    return (estimate.high - estimate.low) / 2


def margin(estimate: "Estimate", digits: int) -> str:
    """Half the width of the interval; one that would be shown as zero is said to be below the last digit."""
    half = half_width(estimate)
    text = number(half, digits)
    return f"<{10**-digits:.{digits}f}" if is_number(half) and half > 0 and _is_zero(text) else text


def with_error(estimate: "Estimate", digits: int, sign: bool = False) -> str:
    r"""
    Value and half width of the interval, as in "25.31 ± 1.20".

    Args:
        estimate ([`Estimate`]):
            Value and bounds.
        digits (`int`):
            Decimals.
        sign (`bool`, *optional*, defaults to `False`):
            Whether the value has its sign.

    Returns:
        `str`: with a dash for bounds that there are not.
    """
    value = (signed if sign else number)(estimate.value, digits)
    return f"{value} ± {margin(estimate, digits)}"


def count(value: float | None) -> str:
    """A number of things: exact below a million, in three digits above."""
    if not is_number(value):
        return DASH
    return _scaled(value, _COUNTS, "") or f"{value:,.0f}"


def size(value: float | None) -> str:
    """A number of bytes, in powers of 1000."""
    if not is_number(value):
        return DASH
    return _scaled(value, _BYTES, " ") or f"{value:,.0f} B"


def duration(value: float | None) -> str:
    """A time in milliseconds, seconds or minutes."""
    if not is_number(value):
        return DASH
    if value < 1:
        return f"{_three_digits(value * 1e3)} ms"
    return f"{_three_digits(value)} s" if value < 120 else f"{value / 60:.1f} min"


def amount(value: float | None) -> str:
    """Any other number, in three digits."""
    return _three_digits(value) if is_number(value) else DASH


def _is_zero(text: str) -> bool:
    return not text.strip("0.,")


def _scaled(value: float, units: tuple[tuple[float, str], ...], space: str) -> str | None:
    for factor, unit in units:
        if abs(value) >= factor:
            return f"{_three_digits(value / factor)}{space}{unit}"
    return None


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent where that can be read."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4:
        return f"{value:.2e}".replace("e-0", "e-").replace("-", _MINUS)
    return number(value, max(0, 2 - exponent))
