"""Which of several sets of matrices belong together: groups of HydraLoRA's heads.

Pure functions of a few small matrices, in float64 and in the order given.
"""

# pyright: standard
# scipy has no types.

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor

Heads = Sequence[Tensor]
"""One up-projection a layer, each [d_out, r], in the order of the model."""


def cosines(left: Sequence[Heads], right: Sequence[Heads]) -> NDArray[np.float64]:
    """Mean over the layers of cos(B_i, B_j). [len(left), len(right)]

    A matrix of zeros has a cosine of 0 with every other.
    """
    layers = [
        _unit([heads[layer] for heads in left]) @ _unit([heads[layer] for heads in right]).T
        for layer in range(len(left[0]))
    ]
    return torch.stack(layers).mean(0).numpy()


def _unit(matrices: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([m.double().flatten() for m in matrices])
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def agglomerated(
    heads: Sequence[Heads], largest: int, least_silhouette: float
) -> NDArray[np.int64]:
    """The group of each set of heads, counted from 0 in the order of their first members.

    Average linkage on the distance 1 - mean_layers cos(B_i, B_j). The number of groups is the one
    from 2 to ``largest`` with the best mean silhouette, or 1 where that is below
    ``least_silhouette``, or where fewer than three are to be grouped.
    """
    count = len(heads)
    alone = np.zeros(count, dtype=np.int64)
    if count < 3:
        return alone
    distance = np.clip(1.0 - cosines(heads, heads), 0.0, 2.0)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    cuts = [fcluster(tree, k, criterion="maxclust") for k in range(2, min(largest, count - 1) + 1)]
    scored = [(silhouette(distance, cut), -len(set(cut)), cut) for cut in cuts]
    best = max(scored, key=lambda s: s[:2], default=(-1.0, 0, alone))
    return _in_order(best[2]) if best[0] >= least_silhouette else alone


def silhouette(distance: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """Mean over the members of (b - a) / max(a, b): Rousseeuw, 1987. 0 for a single group.

    a is the mean distance to the others of the own group, b that to the nearest other group; a
    member that is alone in its group counts 0.
    """
    labels = np.unique(groups)
    if len(labels) < 2:
        return 0.0
    total = 0.0
    for i, own in enumerate(groups):
        mates = (groups == own) & (np.arange(len(groups)) != i)
        if not mates.any():
            continue
        a = float(distance[i, mates].mean())
        b = min(float(distance[i, groups == other].mean()) for other in labels if other != own)
        total += (b - a) / max(a, b) if max(a, b) > 0 else 0.0
    return total / len(groups)


def _in_order(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    seen: dict[int, int] = {}
    return np.array([seen.setdefault(int(g), len(seen)) for g in groups], dtype=np.int64)


def assigned(similarity: NDArray[np.float64]) -> list[int]:
    """The column of each row, all different, with the largest sum (the Hungarian method).

    Where the given order is as good as any other it is kept.

    Args:
        similarity: [rows, columns], no more rows than columns.
    """
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    kept = float(np.trace(similarity))
    if float(similarity[rows, columns].sum()) <= kept:
        return list(range(len(similarity)))
    return [int(column) for column in columns]
