"""Numbers as people read them."""

from fedft.report.statistics import Interval

EXACT = 1e-6
"""A relative bias up to here is the rounding of float32 factors."""

_TIMES = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_unit(largest: float) -> tuple[float, str]:
    """The decimal unit in which ``largest`` reads best: (bytes, name)."""
    return next(((size, name) for size, name in _BYTES if largest >= size), (1.0, "B"))


def bytes_text(value: float | None) -> str:
    """``12.3 MB``."""
    if value is None:
        return "—"
    size, name = bytes_unit(value)
    return f"{significant(value / size)} {name}"


def seconds_text(value: float | None) -> str:
    """``8.2 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if value is None:
        return "—"
    if value < 60:
        return f"{significant(value)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def time_unit(largest: float) -> tuple[float, str]:
    """The unit in which ``largest`` seconds read best on an axis: (seconds, name)."""
    return next(((size, name) for size, name in _TIMES if largest >= 5 * size), (1.0, "s"))


def significant(value: float) -> str:
    """Three significant digits, without an exponent where it can be had."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return _exponent(value)
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def _exponent(value: float) -> str:
    """``2.9e-4``: without the zero that Python pads with."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def score(value: float | None, percent: bool) -> str:
    """A metric: ``71.2 %`` or ``3.41``."""
    if value is None:
        return "—"
    return f"{100 * value:.1f} %" if percent else significant(value)


def spread(value: Interval | None, percent: bool, signed: bool = False) -> str:
    """``71.23 ± 0.85``; ``71.23`` for one seed; ``—`` where there is nothing. No unit."""
    if value is None:
        return "—"
    scale = 100.0 if percent else 1.0
    text = f"{scale * value.mean:{'+' if signed else ''}.2f}".replace("-", "−")
    return text if value.half is None else f"{text} ± {scale * value.half:.2f}"


def bias_text(value: float | None) -> str:
    """A relative bias: ``0.034``, ``5.1e-05``, or ``exact`` where only rounding is left."""
    if value is None:
        return "—"
    if value <= EXACT:
        return "exact"
    return f"{value:#.2g}" if value >= 1e-3 else _exponent(value)


def forgotten_text(value: float | None) -> str:
    """The part of a bias that was forgotten: as a bias, or ``nothing``."""
    return bias_text(value) if value is None or value > EXACT else "nothing"
