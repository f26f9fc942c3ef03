"""The Gaussian mechanism in whole numbers: a sum of bounded vectors, and noise that covers it.

    Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A.
    Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012.
    Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020,
    arXiv:2004.00010.
    Casacuberta, Shoemate, Vadhan and Wagaman, "Widespread Underestimation of Sensitivity in
    Differentially Private Libraries and How to Fix It", CCS 2022, arXiv:2207.10635.
    Holohan and Braghin, "Secure Random Sampling in Differential Privacy", 2021, arXiv:2107.10138.

The theorem is about real numbers. In floating point, the last bits of value + noise tell which
values it can have been (Mironov), Box-Muller's own pairs can be solved for (Holohan and Braghin),
and a sum depends on the order of its terms, by more than one term may change it (Casacuberta et al.).
Both are avoided by a grid. With z the noise multiplier, C the bound, d the numbers of a vector and
g = z C 2^-k the grid's step,

    n_i = round(x_i min(1, C' / ||x_i||) / g)               C' = C - g sqrt(d) / 2
    M   = g (sum_i n_i + round(2^k N(0, I)))

n_i are integers of 64 bits, whose sum is exact in any order. Rounding moves a vector by at most
g sqrt(d) / 2, so that g ||n_i|| <= C: one vector more or less changes g sum_i n_i by at most C.
For whole n, n + round(y) = round(n + y): M is the continuous mechanism with noise N(0, (z C)^2 I),
rounded afterwards, which costs no privacy. Its accountants therefore hold for M as they are, and
no bit below the grid exists that could give a value away.

What remains is that computed normals are not real ones: a cell of the grid is off by the rounding of
logarithm, root and cosine, some 2^-50, which of its width is 2^-30 at k = 20. The paper that sums four
Gaussians makes solving for the values hard; here there is nothing to solve, since a cell is reached
from some 2^60 pairs of uniform numbers.

k is at least 20, and so large that rounding costs at most a 512th of C.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fedft.core.errors import ConfigError

Noise = Callable[[int], Tensor]
"""Number of values → so many independent standard normal numbers, float64."""

_FINE = 20
"""Bits of a standard deviation that the grid resolves, at least."""

_SHARE = 9
"""Rounding costs at most 2^-9 of the bound."""

_RANGE = 44
"""Bits of the bound in steps, at most: 2^18 vectors add up in 64 bits."""

_WIDEST = 52
"""Bits of a standard deviation in steps, at most: beyond, doubles are no finer than the grid."""

_CHUNK = 1 << 16
"""Numbers rounded at a time, which the processor's cache holds."""

_SLACK = 2.0**-30
"""Of the bound, for the rounding of norms in double precision."""


@dataclass(frozen=True)
class GaussianSum:
    """The sum of clipped vectors with noise. A vector may be given as several tensors.

    Args:
        bound: C, the largest norm of a vector.
        multiplier: z, the noise's standard deviation in units of the bound.
        size: d, how many numbers a vector has.

    Raises:
        ConfigError: no noise could be made of these figures.
    """

    bound: float
    multiplier: float
    size: int

    def __post_init__(self) -> None:
        figures = (self.bound, self.multiplier)
        if not all(math.isfinite(x) and x > 0 for x in figures) or self.bits > _WIDEST:
            raise ConfigError(
                f"noise multiplier {self.multiplier:g} on vectors of {self.size:,} numbers within "
                f"{self.bound:g} cannot be made: both must be positive and finite, and the noise below "
                f"2^{_WIDEST - _SHARE} bounds",
                fix="Choose a noise multiplier and a bound between 1e-3 and 1e3.",
            )

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise, z C."""
        return self.multiplier * self.bound

    @property
    def bits(self) -> int:
        """The noise's standard deviation is 2^k steps: k. Negative where a step drowns the noise."""
        coarse = math.log2(self.multiplier)
        fine = math.ceil(coarse + math.log2(max(1, self.size)) / 2) + _SHARE - 1
        return min(max(_FINE, fine), _RANGE + math.floor(coarse))

    @property
    def step(self) -> float:
        """The distance between neighbours on the grid, g."""
        return math.ldexp(self.deviation, -self.bits)

    def clipped(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of clipped vectors, in steps; any number of such sums can be added up.

        Args:
            vectors: n of them, each tensor with its part of all: [n, *shape]. A vector with a
                number that is not finite counts as zero.

        Returns:
            int64 [*shape], for each tensor.
        """
        parts = [_rows(part) for part in vectors]
        norms = _norms(torch.stack([_norms(part).cpu() for part in parts], dim=1))  # [n]
        inner = self.bound * (1 - _SLACK) - self.step * math.sqrt(self.size) / 2
        factors = (inner / norms).clamp(max=1.0) / self.step
        usable = norms.isfinite()
        factors, parts = factors[usable], [p[usable.to(p.device)] for p in parts]
        return [
            _whole_sum(part, factors.to(part.device).unsqueeze(1)).view(given.shape[1:])
            for part, given in zip(parts, vectors, strict=True)
        ]

    def released(self, sums: Sequence[Tensor], noise: Noise) -> list[Tensor]:
        """The sums with their noise: what may be seen. float64, of the same shapes

        Args:
            sums: as :meth:`clipped` gives them.
            noise: of the operating system, but for tests.
        """
        return [self._noisy(total, noise) for total in sums]

    def _noisy(self, total: Tensor, noise: Noise) -> Tensor:
        drawn = (noise(total.numel()) * math.ldexp(1.0, self.bits)).round().to(torch.int64)
        return (total + drawn.view(total.shape).to(total.device)).double() * self.step


def _rows(part: Tensor) -> Tensor:
    """Each vector's part as a row, on a device that knows double precision. [n, numbers]"""
    where = part.cpu() if part.device.type == "mps" else part
    return where.detach().reshape(len(part), math.prod(part.shape[1:]))


def _norms(rows: Tensor) -> Tensor:
    """The length of each row, in double precision. [n]"""
    return cast(Any, torch.linalg).vector_norm(rows, dim=1, dtype=torch.float64)


def _whole_sum(rows: Tensor, factors: Tensor) -> Tensor:
    """The sum of rows [n, d] times factors [n, 1], each rounded to whole numbers. int64 [d]"""
    total = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
    count = max(1, _CHUNK // max(1, rows.shape[1]))
    for first in range(0, len(rows), count):
        some = slice(first, first + count)
        total += (rows[some].double() * factors[some]).round_().to(torch.int64).sum(0)
    return total
