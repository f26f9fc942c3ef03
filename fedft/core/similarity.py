"""How alike the blocks of a network are, and how much each of them does: what pruning goes by.

    Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited",
    ICML 2019, arXiv:1905.00414 (centred kernel alignment, CKA).
    Song et al., "Feature Selection via Dependence Maximization", JMLR 13, 2012 (the unbiased HSIC).
    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    2024, arXiv:2403.03853 (block influence).

With X_l [n, d] what block l gives for n rows, K_l = X_l X_l^T without its diagonal, and ~ the
centring that makes HSIC unbiased,

    HSIC(K, L) = <~K, ~L> / (n (n - 3))        CKA(i, j) = HSIC(K_i, K_j) / sqrt(HSIC_ii HSIC_jj)

so that CKA is the cosine of two centred Gram matrices. It does not change when X is rotated or
scaled; it does under a general linear map. An unbiased estimate may fall below zero where blocks
have nothing in common: it is cut off there.
"""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence

import torch
from torch import Tensor

from fedft.core.precise import widened

FEWEST_ROWS = 4
"""The unbiased estimate divides by n - 3."""


def linear_cka(features: Sequence[Tensor]) -> Tensor:
    """Unbiased linear CKA of every pair, [L, L] float64 on the CPU, symmetric, ones on the diagonal.

    Args:
        features: X_l of each block, [n, d_l], of the same n rows.

    Raises:
        ValueError: fewer than :data:`FEWEST_ROWS` rows.
    """
    if features[0].shape[0] < FEWEST_ROWS:
        raise ValueError(f"CKA needs {FEWEST_ROWS} rows, and there are {features[0].shape[0]}")
    units = torch.stack([_unit(_centred(widened(x) @ widened(x).T)) for x in features])
    similarity = (units @ units.T).clamp(0, 1)  # [L, L]
    return from_upper(upper(similarity), len(features))  # symmetric to the last bit


def _centred(gram: Tensor) -> Tensor:
    """A Gram matrix [n, n] without its diagonal, centred so that inner products are unbiased."""
    n = gram.shape[0]
    K = gram - torch.diag(gram.diagonal())
    rows = K.sum(0) / (n - 2)  # [n]
    centred = K - rows[:, None] - rows[None, :] + K.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


def _unit(x: Tensor) -> Tensor:
    """As a vector of length one; zero where a block gives the same for every row."""
    flat = x.flatten()
    return flat / flat.norm().clamp_min(torch.finfo(flat.dtype).tiny)


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """``1 - cos(h_in, h_out)`` of each token, [T]: zero where a block changes no direction.

    Args:
        before: what enters the block, [T, d].
        after: what leaves it, [T, d].
    """
    return 1 - torch.nn.functional.cosine_similarity(widened(before), widened(after), dim=-1)


def upper(similarity: Tensor) -> Tensor:
    """The L (L - 1) / 2 numbers above the diagonal, row by row: all that needs to travel."""
    L = similarity.shape[0]
    i, j = torch.triu_indices(L, L, offset=1)
    return similarity[i, j]


def from_upper(values: Tensor, blocks: int) -> Tensor:
    """The symmetric matrix [L, L] float64 with ones on its diagonal; the inverse of :func:`upper`."""
    similarity = torch.eye(blocks, dtype=torch.float64)
    i, j = torch.triu_indices(blocks, blocks, offset=1)
    similarity[i, j] = similarity[j, i] = values.cpu().double()
    return similarity
