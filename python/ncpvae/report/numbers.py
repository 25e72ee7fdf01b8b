"""Numbers as they are printed on a page."""

import math

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, decimals: int | None) -> str:
    """As it is printed: thousands apart, a true minus sign, "not finite" for NaN and ±inf."""
    if not math.isfinite(value):
        return "not finite"
    if value and (decimals is None or round(value, decimals) == 0):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPT)}".replace("-", "−")
    return f"{value:,.{decimals or 0}f}".replace("-", "−")


def brief(value: float) -> str:
    """A number in running text: three significant digits, all digits before the point."""
    size = abs(float(f"{value:.3g}")) if math.isfinite(value) else 0.0
    if 0 < size < 1e-3 or size >= 1e9:
        return number(value, None)
    return number(value, max(0, 2 - math.floor(math.log10(size))) if size else 0)
