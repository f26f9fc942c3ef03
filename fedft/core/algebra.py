"""LoRA algebra without dense products.

A factored update is ``s B A`` with ``A: [r, d_in]`` and ``B: [d_out, r]``. Everything here works on
the factors: norms and inner products through r x r Gram matrices, sums through stacking, singular
values through thin QR. No function forms a ``d_out x d_in`` matrix.

Sums run in float64, so that results do not depend on summation order at float32 precision; the
input dtype comes back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedft.core.types import Factors


def inner(x: Factors, y: Factors) -> float:
    """Frobenius inner product ``<s_x B_x A_x, s_y B_y A_y>``.

    tr(A_x^T B_x^T B_y A_y) = sum((B_x^T B_y) * (A_x A_y^T)), an [r_x, r_y] sum.
    """
    gram_b = x.B.double().T @ y.B.double()  # [r_x, r_y]
    gram_a = x.folded_A().double() @ y.folded_A().double().T  # [r_x, r_y]
    return x.scale * y.scale * float((gram_b * gram_a).sum())


def norm(x: Factors) -> float:
    """Frobenius norm of the product."""
    return max(inner(x, x), 0.0) ** 0.5


def stack(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """The exact sum ``sum_k w_k s_k B_k A_k`` as one factor pair of rank ``sum_k r_k``, scale 1.

    The weights and scales multiply A only: on both factors they would be squared (FLoRA, sec. 3).
    """
    weights = [1.0] * len(parts) if weights is None else weights
    dtype = parts[0].A.dtype
    A = torch.cat(
        [(w * p.scale) * p.folded_A().double() for p, w in zip(parts, weights, strict=True)]
    )
    B = torch.cat([p.B for p in parts], dim=1)
    return Factors(A.to(dtype), B, 1.0)  # [sum r, d_in], [d_out, sum r]


def negated(x: Factors) -> Factors:
    """The update with the opposite sign."""
    return Factors(x.A, x.B, -x.scale, x.R)


def pad(x: Factors, rank: int) -> Factors:
    """The same product at a larger rank: zero rows under A, zero columns beside B.

    Raises:
        ValueError: ``rank`` is smaller than the present one.
    """
    if rank < x.rank:
        raise ValueError(f"cannot pad rank {x.rank} down to {rank}; truncate instead")
    extra = rank - x.rank
    A = torch.nn.functional.pad(x.A, (0, 0, 0, extra))
    B = torch.nn.functional.pad(x.B, (0, extra))
    return Factors(A, B, x.scale)


def truncate(x: Factors, rank: int) -> Factors:
    """The first ``rank`` rows of A and columns of B. Idempotent; not a best approximation."""
    return Factors(x.A[:rank], x.B[:, :rank], x.scale)


def thin_svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``s B A`` through its factors.

    QR of B and A^T, then the SVD of the small core R_B R_A^T, whose singular values are exactly
    those of the product. A factor that is wider than it is tall is not worth a QR: the smaller
    side is used.

    Returns:
        U [d_out, q], S [q] descending, V^T [q, d_in] in float64, q = min(d_out, d_in, r).
        The sign is fixed: the entry of largest magnitude in each column of U is positive.
    """
    Q_B, R_B = torch.linalg.qr(x.B.double())  # [d_out, min(d_out, r)], [., r]
    Q_A, R_A = torch.linalg.qr(x.folded_A().double().T)  # [d_in, min(d_in, r)], [., r]
    U, S, Vt = torch.linalg.svd(x.scale * (R_B @ R_A.T), full_matrices=False)
    U, Vt = Q_B @ U, Vt @ Q_A.T
    pivot = U.abs().argmax(dim=0)
    sign = torch.where(U.gather(0, pivot[None]).squeeze(0) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, S, Vt * sign[:, None]


def singular_values(x: Factors) -> Tensor:
    """Singular values of the product, descending. [min(d_out, d_in, r)], float64"""
    R_B = torch.linalg.qr(x.B.double(), mode="r").R
    R_A = torch.linalg.qr(x.folded_A().double().T, mode="r").R
    return torch.linalg.svdvals(x.scale * (R_B @ R_A.T))


def compress(x: Factors, rank: int) -> Factors:
    """The best approximation of rank at most ``rank`` (Eckart-Young), scale 1.

    Lossless to rounding where the product's rank is no larger. The spectrum goes to B:
    A has orthonormal rows.
    """
    U, S, Vt = thin_svd(x)
    q = min(rank, S.numel())
    dtype = x.A.dtype
    return Factors(Vt[:q].to(dtype).contiguous(), (U[:, :q] * S[:q]).to(dtype).contiguous(), 1.0)
