"""The replies of one round, folded one by one: the server never needs to hold them all.

What rules and meters ask of the replies of a round are sums over the sites. Each is brought up to
date by one reply, which can then be dropped:

    mean       x_bar += (w / W) (x - x_bar), W the weight so far with w in it (West, 1979): exact
               where all replies are equal, and as accurate as the two-pass formula
    between    M_2 += w (W - w) / W ||x - x_bar||^2, with x_bar as it was before (West, 1979)
    dW         sum_k n_k s_k B_k A_k / sum_k n_k of every layer: its rank grows with the sites, so it
               is stacked while that is smaller than the dense matrix; see :class:`MeanUpdate`

Memory, whatever the number of sites: three times one reply, in float64, and of every adapted layer
at most the dense matrix and as much again.

Everything is taken in float64. The order of the replies decides the last bits: whoever folds keeps
to one that has nothing to do with when they arrive.

D. H. D. West, Updating mean and variance estimates: an improved method, Communications of the ACM
22(9), 1979.
"""

from fedft.core.folding.folded import Folded, fold
from fedft.core.folding.products import MeanUpdate
from fedft.core.means import Flat, RunningMean, squared_distance

__all__ = [
    "Flat",
    "Folded",
    "MeanUpdate",
    "RunningMean",
    "fold",
    "squared_distance",
]
