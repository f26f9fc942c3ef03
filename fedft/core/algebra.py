"""LoRA algebra without dense products.

A factored update is ``s B A`` with ``A: [r, d_in]`` and ``B: [d_out, r]``. Everything here works on
the factors: norms and inner products through r x r Gram matrices, sums through stacking, singular
values through thin QR. A ``d_out x d_in`` matrix is formed only where the inner rank is at least
the smaller of the two, since the factors are then the larger object.

Sums run in float64, so that results do not depend on summation order at float32 precision; the
input dtype comes back. (On one core, d = 4096 and 100 sites of rank 16: a thin QR takes 0.9 s in
float64 and 0.5 s in float32. The factor of two buys every identity eight more digits.)
"""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence

import torch
from torch import Tensor

from fedft.core.seeds import torch_generator
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
    grams = column_gram(x.B.double()) * column_gram(x.folded_A().double().T)
    return abs(x.scale) * max(float(grams.sum()), 0.0) ** 0.5


def gram(parts: Sequence[Factors]) -> Tensor:
    """The Frobenius inner products of all pairs, as :func:`inner` gives them. [K, K], float64

    One Gram matrix a side over all factors, [sum r, sum r], summed by blocks: ranks may differ.
    """
    A = torch.cat([p.scale * p.folded_A().double() for p in parts])  # [sum r, d_in]
    B = torch.cat([p.B.double() for p in parts], dim=1)  # [d_out, sum r]
    owners = torch.repeat_interleave(torch.tensor([p.rank for p in parts]))
    members = torch.nn.functional.one_hot(owners, len(parts)).double()  # [sum r, K]
    return members.T @ (column_gram(B) * column_gram(A.T)) @ members


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


def beyond(x: Factors, ranks: Sequence[int], weights: Sequence[float]) -> Factors:
    """``sum_k w_k s B[:, r_k:] A[r_k:]``: what truncation to the ranks leaves out, weighted.

    Row i has the weight of all whose rank does not reach it, so that the rank of the sum is that of
    its widest term, R - min_k r_k; zero where no rank is below R.

    Args:
        x: of rank R, without a core.
        ranks: r_k.
        weights: w_k.
    """
    low = min(ranks, default=x.rank)
    lacking = torch.zeros(max(x.rank - low, 0), dtype=torch.float64)
    for rank, weight in zip(ranks, weights, strict=True):
        lacking[rank - low :] += weight
    A = (lacking[:, None] * x.A[low:].double()).to(x.A.dtype)
    return Factors(A, x.B[:, low:], x.scale)


def thin_svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``s B A`` through its factors.

    QR of B and A^T, then the SVD of the small core R_B R_A^T, whose singular values are exactly
    those of the product.

    Returns:
        U [d_out, q], S [q] descending, V^T [q, d_in] in float64, q = min(d_out, d_in, r).
        The sign is fixed: the entry of largest magnitude in each column of U is positive.
    """
    if x.rank >= min(x.shape):
        return _signed(*torch.linalg.svd(_double(x).product(), full_matrices=False))
    Q_B, R_B = torch.linalg.qr(x.B.double())  # [d_out, r], [r, r]
    Q_A, R_A = torch.linalg.qr(x.folded_A().double().T)  # [d_in, r], [r, r]
    U, S, Vt = torch.linalg.svd(x.scale * (R_B @ R_A.T), full_matrices=False)
    return _signed(Q_B @ U, S, Vt @ Q_A.T)


def singular_values(x: Factors) -> Tensor:
    """Singular values of the product, descending. [min(d_out, d_in, r)], float64"""
    if x.rank >= min(x.shape):
        return torch.linalg.svdvals(_double(x).product())
    R_B = torch.linalg.qr(x.B.double(), mode="r").R
    R_A = torch.linalg.qr(x.folded_A().double().T, mode="r").R
    return torch.linalg.svdvals(x.scale * (R_B @ R_A.T))


def top_svd(x: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of ``s B A``, for a fraction of :func:`thin_svd`.

    Returns:
        U [d_out, k], S [k], V^T [k, d_in] in float64, k = min(rank, d_out, d_in), signs as in
        :func:`thin_svd`. U and V are orthonormal also where fewer than k singular values are
        non-zero: a layer can then still learn along the rows that are idle so far.
    """
    B, A = _narrow(x)
    k = min(rank, *x.shape)
    N = _leading(B, A, k) if k < B.shape[1] else None
    return _completed(_project(B, A, N), k)


def peel(x: Factors, rank: int) -> tuple[tuple[Tensor, Tensor, Tensor], Factors | None]:
    """Split ``s B A`` exactly into its leading triplets and the rest.

    With U an orthonormal basis of B N, the rest (I - U U^T) B A annihilates the k columns of N from
    the right of B. Rotating the inner dimension by the Householder reflectors of N makes these k
    columns zero, and they are dropped: nothing of the size of r x r is multiplied out.

    Returns:
        the triplets of :func:`top_svd`, and the rest at rank r - k with scale 1; None where
        nothing is left.
    """
    B, A = _narrow(x)
    k = min(rank, *x.shape)
    if k >= B.shape[1]:
        return _completed(_project(B, A, None), k), None
    N = _leading(B, A, k)
    U, S, Vt = _project(B, A, N)
    V, T = _reflectors(N)
    outside = torch.addmm(B, U, U.T @ B, alpha=-1)
    rest_B = torch.addmm(outside[:, k:], outside @ (V @ T), V[k:].T, alpha=-1)
    rest_A = torch.addmm(A[k:], V[k:] @ T.T, V.T @ A, alpha=-1)
    dtype = x.A.dtype
    rest = Factors(rest_A.to(dtype).contiguous(), rest_B.to(dtype).contiguous(), 1.0)
    return (U, S, Vt), rest


def compress(x: Factors, rank: int) -> Factors:
    """The best approximation of rank at most ``rank`` (Eckart-Young), scale 1.

    Lossless to rounding where the product's rank is no larger. The spectrum goes to B:
    A has orthonormal rows.
    """
    U, S, Vt = top_svd(x, min(rank, x.rank))
    dtype = x.A.dtype
    return Factors(Vt.to(dtype).contiguous(), (U * S).to(dtype).contiguous(), 1.0)


def capped(x: Factors, rank: int | None = None) -> Factors:
    """The same update in as few numbers as its rank needs.

    Args:
        x: any factors, usually a stack.
        rank: if given, the largest rank of the result; a higher one is cut by the SVD. Without
            it nothing is lost: a stack wider than min(d_out, d_in) is multiplied out, and its
            smaller side becomes the identity.
    """
    if rank is not None and x.rank > rank:
        return compress(x, rank)
    if x.rank <= min(x.shape):
        return x
    B, A = _narrow(x)
    return Factors(A.to(x.A.dtype), B.to(x.A.dtype), 1.0)


def orthonormal_rows(Vt: Tensor, rank: int) -> Tensor:
    """``Vt`` [q, d] with orthonormal rows added up to ``min(rank, d)``, orthogonal to its own."""
    q, d = Vt.shape
    extra = min(rank, d) - q
    if extra <= 0:
        return Vt
    reflectors, tau = torch.geqrf(Vt.T.contiguous())
    unit = torch.zeros(d, extra, dtype=Vt.dtype)
    unit[q : q + extra] = torch.eye(extra, dtype=Vt.dtype)
    return torch.cat([Vt, torch.ormqr(reflectors, tau, unit).T])


def orthonormal_basis(
    seed: int, module: str, shape: tuple[int, int], rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A [r, d_in] with orthonormal rows and B [d_out, r] with orthonormal columns, from a seed.

    Uniform (Haar) over all such matrices. The same on every machine up to rounding.

    Args:
        seed: of the basis.
        module: path of the layer; each has its own.
        shape: (d_out, d_in).
        rank: at most the smaller of the two.
        dtype: of the result.
    """
    d_out, d_in = shape
    generator = torch_generator(seed, "basis", module)
    A = _haar(torch.randn(d_in, rank, generator=generator, dtype=torch.float64))
    B = _haar(torch.randn(d_out, rank, generator=generator, dtype=torch.float64))
    return A.T.to(dtype).contiguous(), B.to(dtype).contiguous()


def uniform_rows(rows: int, columns: int, seed: int) -> Tensor:
    """A matrix uniform in ±1/sqrt(columns): Kaiming with a = sqrt(5), as peft draws A.

    The rows of a smaller matrix are the first rows of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = columns**-0.5
    return torch.rand(rows, columns, generator=generator) * (2 * bound) - bound


def _haar(gaussian: Tensor) -> Tensor:
    """Q of a QR with a positive diagonal of R, which makes it unique."""
    Q, R = torch.linalg.qr(gaussian)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def _double(x: Factors) -> Factors:
    return Factors(x.folded_A().double(), x.B.double(), x.scale)


def _narrow(x: Factors) -> tuple[Tensor, Tensor]:
    """B, A in float64 with B A = x and an inner dimension of at most min(d_out, d_in)."""
    d_out, d_in = x.shape
    x = _double(x)
    if x.rank <= min(d_out, d_in):
        return x.B, x.scale * x.A
    if d_out <= d_in:
        return torch.eye(d_out, dtype=torch.float64), x.product()
    return x.product(), torch.eye(d_in, dtype=torch.float64)


def _leading(B: Tensor, A: Tensor, k: int) -> Tensor:
    """N [r, k] such that B N spans the k leading left singular vectors of B A.

    With A = L Q^T, the product B A has the singular values of B L, whose squares are the
    eigenvalues of L^T (B^T B) L, [r, r]. Squaring costs accuracy only in *which* directions are
    taken, and only among those below 1e-8 of the largest: the caller projects on what is taken.
    """
    L = _root(column_gram(A.T))
    W = torch.linalg.eigh(L.T @ column_gram(B) @ L).eigenvectors  # ascending
    return (L @ W[:, -k:]).contiguous()


def _reflectors(N: Tensor) -> tuple[Tensor, Tensor]:
    """V [r, k] and T [k, k] with Q = I - V T V^T the product of N's Householder reflectors.

    The compact WY form (Schreiber and Van Loan, 1989): Q is applied by thin matrix products, many
    times faster than one reflector after another. T^-1 + T^-T = V^T V gives T.
    """
    packed, tau = torch.geqrf(N)
    unit = torch.eye(*N.shape, dtype=N.dtype)
    V = (packed.tril(-1) + unit) * (tau != 0)  # tau = 0 reflects nothing
    inverse = (V.T @ V).triu(1) + torch.diag(1 / torch.where(tau == 0, 1.0, tau))
    identity = torch.eye(len(tau), dtype=N.dtype)
    return V, torch.linalg.solve_triangular(inverse, identity, upper=True)


def column_gram(X: Tensor) -> Tensor:
    """``X^T X``, multiplying out little more than one triangle of it."""
    half = X.shape[1] // 2
    if half < 128:
        return X.T @ X
    left, right = X[:, :half], X[:, half:]
    off = left.T @ right
    top = torch.cat([column_gram(left), off], dim=1)
    return torch.cat([top, torch.cat([off.T, column_gram(right)], dim=1)])


def column_squares(G: Tensor, M: Tensor) -> Tensor:
    """Squared lengths of the columns of X M from G = X^T X, [n], using one triangle of G.

    x^T G x = x_1^T G_11 x_1 + x_2^T G_22 x_2 + 2 x_1^T G_12 x_2 for either half of x.
    """
    half = len(G) // 2
    if half < 128:
        return (M * (G @ M)).sum(dim=0)
    off = (M[:half] * (G[:half, half:] @ M[half:])).sum(dim=0)
    upper, lower = column_squares(G[:half, :half], M[:half]), G[half:, half:]
    return upper + column_squares(lower, M[half:]) + 2 * off


def _root(gram: Tensor) -> Tensor:
    """L with L L^T = gram: Cholesky, or by eigenvalues where gram is singular (equal sites)."""
    L, info = torch.linalg.cholesky_ex(gram)
    if not info.item():
        return L
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()


def _project(B: Tensor, A: Tensor, N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of U U^T B A with U an orthonormal basis of B N (of B itself without N)."""
    U = torch.linalg.qr(B if N is None else B @ N).Q  # [d_out, k]
    Q, R = torch.linalg.qr(((U.T @ B) @ A).T)  # [d_in, k], [k, k]
    W, S, Zt = torch.linalg.svd(R.T)
    return _signed(U @ W, S, Zt @ Q.T)


def _completed(triplets: tuple[Tensor, Tensor, Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets with zero singular values added up to ``k``."""
    U, S, Vt = triplets
    padded = torch.nn.functional.pad(S, (0, k - S.numel()))
    return orthonormal_rows(U.T, k).T, padded, orthonormal_rows(Vt, k)


def _signed(U: Tensor, S: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pivot = U.abs().argmax(dim=0)
    sign = torch.where(U.gather(0, pivot[None]).squeeze(0) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, S, Vt * sign[:, None]
