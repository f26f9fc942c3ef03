"""Invariants of CKA (T4.1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedft.core.similarity import block_influence, from_upper, linear_cka, upper


def draw(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def rotation(seed: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(draw(seed, d, d)).Q


@given(st.integers(0, 10**6), st.integers(4, 30), st.integers(1, 8), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_cka_is_a_similarity_without_a_basis_or_a_scale(
    seed: int, n: int, d: int, scale: float
) -> None:
    X, Y = draw(seed, n, d), draw(seed + 1, n, d + 2)
    shifted = scale * X @ rotation(seed, d) + draw(seed + 2, d)  # centring takes shifts out
    S = linear_cka([X, Y, shifted])
    assert torch.equal(S, S.T)
    assert torch.equal(S.diagonal(), torch.ones(3, dtype=torch.float64))
    assert bool((S >= 0).all())
    assert bool((S <= 1).all())
    assert S[0, 2] == pytest.approx(1, abs=1e-6)
    assert S[1, 0] == pytest.approx(float(S[1, 2]), abs=1e-6)


def test_cka_sees_a_general_linear_map() -> None:
    X = draw(0, 20, 5)
    stretched = X * torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0])
    assert linear_cka([X, stretched])[0, 1] < 0.9


def test_the_estimate_is_unbiased_where_the_plain_one_is_not() -> None:
    """Independent features of many dimensions: plain CKA is near one, the unbiased one near zero."""
    values = [
        float(linear_cka([draw(2 * s, 16, 200), draw(2 * s + 1, 16, 200)])[0, 1]) for s in range(40)
    ]
    assert sum(values) / len(values) < 0.1


def test_it_is_the_u_statistic_of_the_paper() -> None:
    """Song et al.'s formula with traces, on the off-diagonal Gram matrices."""
    X, Y = draw(3, 9, 4), draw(4, 9, 4) + draw(3, 9, 4)

    def hsic(K: torch.Tensor, L: torch.Tensor) -> float:
        n = len(K)
        K, L = K - K.diag().diag(), L - L.diag().diag()
        total = (K @ L).trace() + K.sum() * L.sum() / ((n - 1) * (n - 2))
        return float((total - 2 / (n - 2) * (K @ L).sum()) / (n * (n - 3)))

    K, L = X @ X.T, Y @ Y.T
    expected = hsic(K, L) / (hsic(K, K) * hsic(L, L)) ** 0.5
    assert float(linear_cka([X, Y])[0, 1]) == pytest.approx(expected, abs=1e-12)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="4 rows, and there are 3"):
        linear_cka([draw(0, 3, 2)])


def test_features_without_any_difference_are_like_nothing() -> None:
    S = linear_cka([torch.ones(6, 3), draw(0, 6, 3)])
    assert S.tolist() == [[1, 0], [0, 1]]


def test_the_triangle_carries_the_matrix() -> None:
    S = linear_cka([draw(s, 12, 3) for s in range(5)])
    assert len(upper(S)) == 10
    assert torch.equal(from_upper(upper(S), 5), S)


def test_influence_is_the_turn_of_a_token() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert block_influence(before, after).tolist() == pytest.approx([0, 1, 2])
