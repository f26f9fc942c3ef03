"""Every clever function beside its dense twin."""

import math

import pytest
import torch

from fedft.core import algebra
from fedft.core.types import Factors

SHAPES = [
    (7, 9, 3),  # the usual: narrower than both sides
    (9, 7, 3),
    (6, 6, 6),  # square
    (4, 9, 6),  # wider than d_out
    (9, 4, 6),  # wider than d_in
    (4, 5, 11),  # wider than both
]


def factors(d_out, d_in, r, dtype=torch.float32, scale=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(r, d_in, generator=g, dtype=torch.float64)
    B = torch.randn(d_out, r, generator=g, dtype=torch.float64)
    return Factors(A.to(dtype), B.to(dtype), scale)


def dense(x):
    return x.scale * x.B.double() @ x.folded_A().double()


def gap(x, y):
    return float((x - y).norm() / y.norm())


def tail(S, k):
    return float(S[k:].square().sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstDense:
    def test_inner_and_norm(self, shape, dtype):
        x, y = factors(*shape, dtype), factors(*shape, dtype, scale=0.5, seed=1)
        assert algebra.inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), rel=1e-12)
        assert algebra.norm(x) == pytest.approx(float(dense(x).norm()), rel=1e-12)

    def test_gram_is_the_inner_product_of_all_pairs(self, shape, dtype):
        d_out, d_in, r = shape
        parts = [factors(d_out, d_in, r + i, dtype, scale=1.0 + i, seed=i) for i in range(3)]
        expected = [[algebra.inner(x, y) for y in parts] for x in parts]
        assert torch.allclose(
            algebra.gram(parts), torch.tensor(expected, dtype=torch.float64), rtol=1e-12
        )

    def test_stack_is_the_weighted_sum(self, shape, dtype):
        parts = [factors(*shape, dtype, scale=s, seed=i) for i, s in enumerate((1.0, 2.0, 0.5))]
        p = [0.5, 0.3, 0.2]
        stacked = algebra.stack(parts, p)
        expected = sum(w * dense(x) for w, x in zip(p, parts, strict=True))
        assert stacked.rank == 3 * shape[2]
        assert gap(dense(stacked), expected) < 1e-6

    def test_thin_svd(self, shape, dtype):
        x = factors(*shape, dtype)
        U, S, Vt = algebra.thin_svd(x)
        q = min(shape)
        assert (U.shape, S.shape, Vt.shape) == ((shape[0], q), (q,), (q, shape[1]))
        assert gap((U * S) @ Vt, dense(x)) < 1e-12
        assert torch.allclose(S, torch.linalg.svdvals(dense(x))[:q], rtol=1e-10)
        assert torch.allclose(S, algebra.singular_values(x), rtol=1e-10)
        assert all(U[U[:, j].abs().argmax(), j] > 0 for j in range(q))

    @pytest.mark.parametrize("k", [1, 2, 4, 20])
    def test_top_svd_is_the_head_of_the_dense_one(self, shape, dtype, k):
        x = factors(*shape, dtype)
        U, S, Vt = algebra.top_svd(x, k)
        W = dense(x)
        values = torch.linalg.svdvals(W)
        k = min(k, *shape[:2])
        assert S.shape == (k,)
        assert torch.allclose(S, values[:k], atol=1e-9 * float(values[0]))
        assert torch.allclose(U.T @ U, torch.eye(k, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(Vt @ Vt.T, torch.eye(k, dtype=torch.float64), atol=1e-12)
        # Eckart-Young: the error is the tail of the spectrum.
        error = float((W - (U * S) @ Vt).norm())
        assert error == pytest.approx(tail(values, k), rel=1e-9, abs=1e-9 * float(values[0]))

    @pytest.mark.parametrize("k", [1, 2, 4, 20])
    def test_peel_loses_nothing(self, shape, dtype, k):
        x = factors(*shape, dtype)
        (U, S, Vt), rest = algebra.peel(x, k)
        whole = (U * S) @ Vt
        if rest is not None:
            assert rest.rank == min(shape) - k
            assert rest.A.dtype == rest.B.dtype == dtype
            whole = whole + dense(rest)
        assert (rest is None) == (k >= min(shape))
        assert gap(whole, dense(x)) < (1e-6 if dtype == torch.float32 else 1e-12)

    def test_compress_and_capped(self, shape, dtype):
        x = factors(*shape, dtype)
        values = torch.linalg.svdvals(dense(x))
        small = algebra.compress(x, 2)
        assert (small.rank, small.scale, small.A.dtype) == (2, 1.0, dtype)
        error = float((dense(x) - dense(small)).norm())
        assert error == pytest.approx(tail(values, 2), rel=1e-5, abs=1e-6 * float(values[0]))
        assert gap(dense(algebra.compress(x, 50)), dense(x)) < 1e-6
        assert algebra.capped(x, 2).rank == 2
        free = algebra.capped(x)
        assert free.rank == min(shape)
        assert gap(dense(free), dense(x)) < 1e-6


class TestDegenerate:
    def test_zero_product(self):
        x = Factors(torch.randn(3, 6), torch.zeros(5, 3), 2.0)
        for U, S, Vt in (algebra.top_svd(x, 2), algebra.peel(x, 2)[0]):
            assert S.abs().max() == 0
            assert torch.allclose(U.T @ U, torch.eye(2, dtype=torch.float64), atol=1e-12)
            assert torch.allclose(Vt @ Vt.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
        _, rest = algebra.peel(x, 2)
        assert rest is not None
        assert float(dense(rest).norm()) == 0

    @pytest.mark.parametrize("d", [12, 200])
    def test_identical_parts_keep_their_rank(self, d):
        """A stack of equal sites has a singular Gram matrix; the product has rank 3."""
        x = factors(d, d + 4, 3)
        stacked = algebra.stack([x] * 4, [0.25] * 4)
        assert gap(dense(algebra.compress(stacked, 3)), dense(x)) < 1e-6
        (U, S, Vt), rest = algebra.peel(stacked, 5)
        assert rest is not None
        assert float(dense(rest).norm()) < 1e-6 * float(dense(x).norm())
        assert gap((U * S) @ Vt, dense(x)) < 1e-6

    def test_graded_spectrum(self):
        """Singular values from 1 down to 1e-6 come out in order, and the split stays exact."""
        g = torch.Generator().manual_seed(3)
        Q = torch.linalg.qr(torch.randn(40, 12, generator=g, dtype=torch.float64)).Q
        P = torch.linalg.qr(torch.randn(30, 12, generator=g, dtype=torch.float64)).Q
        values = torch.logspace(0, -6, 12, dtype=torch.float64)
        x = Factors((P * values.sqrt()).T.contiguous(), Q * values.sqrt(), 1.0)
        (U, S, Vt), rest = algebra.peel(x, 5)
        assert torch.allclose(S, values[:5], rtol=1e-9)
        assert rest is not None
        assert gap((U * S) @ Vt + dense(rest), dense(x)) < 1e-12
        assert float(dense(rest).norm()) == pytest.approx(tail(values, 5), rel=1e-7)

    def test_a_core_is_folded(self):
        R = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        x = Factors(torch.eye(2, 3), torch.eye(4, 2), 3.0, R)
        assert algebra.singular_values(x).tolist() == pytest.approx([6.0, 3.0])
        assert algebra.top_svd(x, 1)[1].tolist() == pytest.approx([6.0])
        assert algebra.norm(x) == pytest.approx(math.sqrt(45))


def test_pad_and_truncate():
    x = factors(4, 5, 2)
    padded = algebra.pad(x, 4)
    assert padded.rank == 4
    assert torch.equal(padded.product(), x.product())
    assert algebra.norm(padded) == pytest.approx(algebra.norm(x))
    once = algebra.truncate(padded, 2)
    assert torch.equal(once.A, x.A)
    assert torch.equal(algebra.truncate(once, 2).B, x.B)
    assert torch.equal(algebra.negated(x).product(), -x.product())
    with pytest.raises(ValueError, match="cannot pad rank 2 down to 1"):
        algebra.pad(x, 1)


def test_wide_gram_agrees_with_the_plain_one():
    """Wide enough for the recursion over blocks."""
    x = factors(700, 900, 600, torch.float64)
    U, S, Vt = algebra.top_svd(x, 4)
    assert torch.allclose(S, algebra.singular_values(x)[:4], rtol=1e-10)
    assert gap(U.T @ dense(x) @ Vt.T, torch.diag(S)) < 1e-10


class TestBasis:
    def test_orthonormal_and_reproducible(self):
        A, B = algebra.orthonormal_basis(7, "layer.0.q", (9, 12), 3)
        assert (A.shape, B.shape, A.dtype) == ((3, 12), (9, 3), torch.float32)
        assert torch.allclose(A @ A.T, torch.eye(3), atol=1e-6)
        assert torch.allclose(B.T @ B, torch.eye(3), atol=1e-6)
        again = algebra.orthonormal_basis(7, "layer.0.q", (9, 12), 3)
        assert torch.equal(A, again[0])
        assert torch.equal(B, again[1])
        other = algebra.orthonormal_basis(7, "layer.1.q", (9, 12), 3)
        assert not torch.allclose(A, other[0])

    def test_rows_are_completed(self):
        A, _ = algebra.orthonormal_basis(0, "m", (9, 6), 2, torch.float64)
        rows = algebra.orthonormal_rows(A, 5)
        assert torch.equal(rows[:2], A)
        assert torch.allclose(rows @ rows.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
        assert algebra.orthonormal_rows(A, 9).shape == (6, 6)
        assert algebra.orthonormal_rows(A, 1) is A


@pytest.mark.parametrize("width", [5, 300])  # 300 is split
def test_column_squares_are_those_of_the_product(width):
    X = torch.randn(40, width, dtype=torch.float64)
    M = torch.randn(width, 7, dtype=torch.float64)
    found = algebra.column_squares(algebra.column_gram(X), M)
    torch.testing.assert_close(found, (X @ M).square().sum(dim=0))


@pytest.mark.parametrize("ranks", [(4, 1, 2), (4, 4), (1,), (0, 3), ()])
def test_what_truncation_leaves_out(ranks: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 7), (6, 4)))
    x, w = Factors(A, B, 1.5), [0.5 + k for k in range(len(ranks))]
    cut = [x.product() - algebra.truncate(x, r).product() for r in ranks]
    expected = sum((v * t for v, t in zip(w, cut, strict=True)), torch.zeros(6, 7).double())
    left = algebra.beyond(x, ranks, w)
    assert torch.allclose(left.product(), expected, rtol=1e-13, atol=1e-14)
    assert left.rank == (4 - min(ranks) if ranks else 0)
