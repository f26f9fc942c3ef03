"""Coordinate-wise trimmed mean: drop the extremes of every entry, average the rest.

    Yin, Chen, Kannan and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates", ICML 2018, arXiv:1803.01498.

    x[i] <- mean of the K - 2 k middle values of x_1[i] ... x_K[i],   k = ceil(trim K)

in place of the ``inner`` rule's mean; unweighted. It stands while at most ``trim`` of a round's sites
lie. In which space it acts, and why, is said in :mod:`fedft.strategies.coordinate_median`.

Departures from the paper: k is rounded up, so that ``trim`` is a promise in small cohorts too, and
never takes all values: two sites or one are averaged. Sites take several local steps.

Wire: as the inner rule.
"""

from math import ceil
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedft.strategies.summary import Coordinatewise


class TrimmedMean(Coordinatewise):
    """The inner rule with the entrywise trimmed mean in place of the mean.

    Attributes:
        trim: the paper's beta, the share of values dropped at *each* end.
    """

    name: str = "trimmed-mean"
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2

    def reduce(self, values: Tensor) -> Tensor:
        K = values.shape[0]
        # The product is a float: 0.2 * 15 is a little above 3, which is not meant.
        k = min(ceil(self.trim * K - 1e-9), (K - 1) // 2)
        return values[k : K - k].mean(dim=0)
