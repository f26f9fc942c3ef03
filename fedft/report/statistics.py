"""Means over few seeds: Student's t intervals and paired differences, without further libraries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import atan, cos, fsum, isfinite, pi, sin, sqrt
from statistics import mean, stdev

from fedft.core.errors import ConfigError

CONFIDENCE = 0.95
"""Two-sided level of an interval where none is asked for."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds with its two-sided confidence interval.

    Attributes:
        mean: of the values.
        half: half the width of the interval, t_{(1 + c) / 2, n-1} s / sqrt(n) at level c; None for
            a single value, from which no interval can be had.
        n: how many values.
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end; the mean itself where there is no interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end; the mean itself where there is no interval."""
        return self.mean + (self.half or 0.0)


def check_seeds(count: int, confidence: float, what: str) -> None:
    """Refuse an interval that cannot be had.

    Raises:
        ConfigError: a level outside (0, 1), or fewer than two seeds.
    """
    if not 0.0 < confidence < 1.0:
        raise ConfigError(
            f"{confidence} is no confidence level", fix="It lies between 0 and 1, such as 0.95."
        )
    if count < 2:
        raise ConfigError(
            f"{what}: an interval at {confidence:.3g} needs two seeds or more, and there is {count}",
            fix="Give more seeds (--seeds 0,1,2), or leave --confidence out.",
        )


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Mean and confidence interval of the finite values; None where there are none."""
    finite = [v for v in values if isfinite(v)]
    if not finite:
        return None
    n = len(finite)
    half = t_quantile((1 + confidence) / 2, n - 1) * stdev(finite) / sqrt(n) if n > 1 else None
    return Interval(mean(finite), half, n)


def paired(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Interval | None:
    """Mean and interval of the differences, seed by seed, over the seeds that both have.

    Pairing removes what a seed does to all rules alike (its partition, its first adapter, its
    cohorts): the interval is that of the difference, not the difference of two intervals.
    """
    both = sorted(values.keys() & baseline)
    return interval([values[seed] - baseline[seed] for seed in both], confidence)


def t_cdf(t: float, df: int) -> float:
    """Student's distribution function for whole degrees of freedom, by its finite series.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = atan(t / sqrt(df))
    term = cos(theta) if df % 2 else 1.0
    terms: list[float] = []
    for k in range(3 if df % 2 else 2, df + 1, 2):
        terms.append(term)
        term *= cos(theta) ** 2 * (k - 1) / k
    series = sin(theta) * fsum(terms)
    two_sided = (2 / pi) * (theta + series) if df % 2 else series
    return 0.5 + two_sided / 2


def t_quantile(probability: float, df: int) -> float:
    """The inverse of :func:`t_cdf` for probabilities above one half, by bisection.

    Raises:
        ValueError: fewer than one degree of freedom, or a probability outside [0.5, 1).
    """
    if df < 1 or not 0.5 <= probability < 1.0:
        raise ValueError(f"t quantile needs df >= 1 and 0.5 <= p < 1; got {df} and {probability}")
    low, high = 0.0, 2.0
    while t_cdf(high, df) < probability:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return high
