"""Coordinate-wise median: each entry is the median of what the sites sent for it.

    Yin, Chen, Kannan and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates", ICML 2018, arXiv:1803.01498.

    x[i] <- median_k x_k[i]        the mean of the two middle values where K is even

in place of the ``inner`` rule's mean; unweighted, because an example count is only a claim. It stands
while fewer than half of the sites lie.

In which space. The median is taken of the entries that are sent, that is of the factors. Entries of
A and B are comparable because all sites start the round from the same pair: their bases differ by
one round's drift. A median of the products B_k A_k would not depend on the basis at all, but it has
full rank and would form every d_out x d_in matrix. Over ``ffa-lora`` (the same A everywhere) the
question goes away: B_k -> B_k A is one linear map for all sites, and the factors *are* coordinates
of the product.

Departures from the paper: sites take several local steps, and the median is of the tensors they
arrive at, which is the start plus the median of the changes.

Wire: as the inner rule.
"""

from torch import Tensor

from fedft.strategies.summary import Coordinatewise


class CoordinateMedian(Coordinatewise):
    """The inner rule with the entrywise median in place of the mean."""

    name: str = "coordinate-median"

    def reduce(self, values: Tensor) -> Tensor:
        K = values.shape[0]
        return (values[(K - 1) // 2] + values[K // 2]) / 2
