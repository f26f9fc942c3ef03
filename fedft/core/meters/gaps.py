"""The mean update that the clients asked for, beside what was applied in its place.

With p_k = n_k / sum_j n_j over the sites that took part, the mean update that the sites asked for is

    dW = sum_k p_k s_k B_k A_k

and what the server's new state applies in its place, over the base weights the sites started on, is

    M = (delta_new - delta_old) + s B A

At mixed ranks a site gets a part of the server's s B A, and what it returns stands for that part
alone. What the sites asked for is then what the server had, plus the mean of the changes that they
made to what they were sent, s_k B0_k A0_k:

    dW = s B A + sum_k p_k (s_k B_k A_k - s_k B0_k A0_k) = sum_k p_k s_k B_k A_k + L
    L  = sum_k p_k (s B A - s_k B0_k A0_k)                                 what sites were not sent

A site of the server's own rank was sent all: L is zero at one rank, and dW as above, bit for bit.

Precision: ||dW - M||^2 is never computed as ||dW||^2 - 2 <dW, M> + ||M||^2, whose rounding hides
everything below 1e-8. Few sites leave dW as a stack of factors: both products are then expressed in
one orthonormal basis of their stacked left factors (a thin QR, in float64) and subtracted there,
entry by entry. Many sites leave it as a dense matrix, from which M is subtracted as it is multiplied
out. What is left is the rounding of the stored factors themselves: 1e-7 for float32.

Cost per layer, with R the ranks of dW and M together and d the smaller of d_in and d_out: one QR of
[d, R] and one product [min(d, R), R] x [R, d'], in blocks of columns; where dW is dense, M's own
product and one pass over the matrix, in blocks of rows. Where all A_k (or all B_k) agree, as under
FFA-LoRA, R falls to r.
"""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Protocol

import torch
from torch import Tensor

from fedft.core import algebra
from fedft.core.means import squared_distance
from fedft.core.meters.base import Round
from fedft.core.meters.readings import LayerBias, OverallBias
from fedft.core.types import Adapter, Delta, Factors

_BLOCK = 2048
"""Columns (rows, of a dense matrix) of the difference held at a time: bounds the memory."""


class Updates(Protocol):
    """What is known of the mean of the products; see :class:`~fedft.core.folding.Folded`."""

    def mean_updates(self) -> Iterator[tuple[str, Factors | Tensor]]:
        """(module, the mean of s_k B_k A_k) in the order of the model."""
        ...

    def starts(self) -> dict[str, list[tuple[Factors, float]]]:
        """Module → what the sites that sent it started from, and the share of each."""
        ...


# ── gaps ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Gap:
    """Squared norms and inner products of an ideal and an applied update; they add up.

    Attributes:
        ideal, applied: ||dW||^2 and ||M||^2.
        inner: <dW, M>.
        error: ||dW - M||^2.
        unsent: ||L||^2, of what sites were not sent.
        lost: <dW - M, L>.
    """

    ideal: float = 0.0
    applied: float = 0.0
    inner: float = 0.0
    error: float = 0.0
    unsent: float = 0.0
    lost: float = 0.0

    def __add__(self, other: "Gap") -> "Gap":
        return Gap(
            self.ideal + other.ideal,
            self.applied + other.applied,
            self.inner + other.inner,
            self.error + other.error,
            self.unsent + other.unsent,
            self.lost + other.lost,
        )

    def ratios(self) -> LayerBias:
        """The bias that the sums stand for."""
        return LayerBias(
            relative=ratio(self.error, self.ideal),
            cosine=_cosine(self.inner, self.ideal, self.applied),
            norm_ratio=ratio(self.applied, self.ideal),
            forgotten=self._forgotten(),
        )

    def _forgotten(self) -> float | None:
        if not (self.ideal > 0 and isfinite(self.error)):
            return None
        return self.lost / sqrt(self.unsent) / sqrt(self.ideal) if self.unsent > 0 else 0.0


def ratio(numerator: float, denominator: float) -> float | None:
    """Root of a quotient of squared norms; None where it has no finite value."""
    return sqrt(numerator / denominator) if denominator > 0 and isfinite(numerator) else None


def _cosine(inner: float, x: float, y: float) -> float | None:
    defined = x > 0 and y > 0 and isfinite(inner)
    return min(1.0, max(-1.0, inner / sqrt(x) / sqrt(y))) if defined else None


def no_bias() -> OverallBias:
    """Where nothing is known."""
    return OverallBias(relative=None, cosine=None, norm_ratio=None, forgotten=None, layers={})


def bias_from(gaps: Mapping[str, Gap]) -> OverallBias:
    """Of each layer, and of all of them: sums of squares and of inner products over the layers."""
    layers = {module: gap.ratios() for module, gap in gaps.items()}
    return OverallBias(**sum(gaps.values(), Gap()).ratios(), layers=layers)


def compared(
    updates: Updates,
    held: Mapping[str, Factors],
    targets: Sequence[Mapping[str, Sequence[Factors]]],
) -> list[dict[str, Gap]]:
    """For each target, module path → its gap. One layer in float64 at a time: that is the memory."""
    gaps: list[dict[str, Gap]] = [{} for _ in targets]
    for module, x, unsent in _asked(updates, held):
        for found, target in zip(gaps, targets, strict=True):
            y = summed(target.get(module, ()), unsent.shape)
            found[module] = (
                _dense_gap(x, unsent, y) if isinstance(x, Tensor) else _gap(x, unsent, y)
            )
    return gaps


def _asked(
    updates: Updates, held: Mapping[str, Factors]
) -> Iterator[tuple[str, Factors | Tensor, Factors]]:
    """(module, the mean of what the sites sent, what they were not sent): dW is the sum."""
    starts = updates.starts()
    for module, x in updates.mean_updates():
        unsent = _unsent(held.get(module), starts.get(module, ()))
        yield module, x, summed(unsent, (x.shape[0], x.shape[1]))


def _gap(x: Factors, unsent: Factors, y: Factors) -> Gap:
    """How far ``x + unsent`` is from ``y``, products of scale 1: squares that do not cancel.

    For an orthonormal Q that spans the stacked left factors, ||Q^T X|| = ||X||, and Q^T [B_x B_y]
    is the triangle of a QR. The narrower side is taken as the left one; a stack at least as wide
    as that side spans it already, and needs no QR.
    """
    if x.shape[0] > x.shape[1]:
        x, unsent, y = _transposed(x), _transposed(unsent), _transposed(y)
    left = _isometric(torch.cat([x.B, unsent.B, y.B], dim=1))
    sent = x.rank + unsent.rank
    total = Gap()
    for start in range(0, x.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        X = left[:, : x.rank] @ x.A[:, block]  # [min(d, r_x + r_unsent + r_y), block]
        L = left[:, x.rank : sent] @ unsent.A[:, block] if unsent.rank else None
        total += _pair(X, L, left[:, sent:] @ y.A[:, block])
    return total


def _dense_gap(x: Tensor, unsent: Factors, y: Factors) -> Gap:
    """The same for a mean update that is known entry by entry, [d_out, d_in]."""
    total = Gap()
    for start in range(0, x.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        L = unsent.B[rows] @ unsent.A if unsent.rank else None
        total += _pair(x[rows], L, y.B[rows] @ y.A)
    return total


def _pair(X: Tensor, L: Tensor | None, Y: Tensor) -> Gap:
    """Of ``X + L`` and ``Y``; L is None where sites were sent all."""
    x, y = (X if L is None else X + L).reshape(-1), Y.reshape(-1)
    gap = Gap(square(x), square(y), float(x.dot(y)), squared_distance(x, y))
    if L is None:
        return gap
    lacking = L.reshape(-1)
    return replace(gap, unsent=square(lacking), lost=float((x - y).dot(lacking)))


def _isometric(x: Tensor) -> Tensor:
    """``Q^T x`` for an orthonormal Q that spans the columns of x [d, q]. [min(d, q), q]"""
    return torch.linalg.qr(x, mode="r").R if x.shape[1] < x.shape[0] else x


def square(x: Tensor) -> float:
    """``||x||^2`` of a vector."""
    return float(x.dot(x))


def _transposed(x: Factors) -> Factors:
    return Factors(x.B.T, x.A.T, x.scale)


def _double(x: Factors) -> Factors:
    """Without a core and in float64."""
    folded = Factors(x.A.double(), x.B.double(), x.scale, None if x.R is None else x.R.double())
    return folded.folded()


def summed(terms: Sequence[Factors], shape: tuple[int, int]) -> Factors:
    """The exact sum in float64; an empty one is a product of rank 0 of ``shape`` (d_out, d_in)."""
    if terms:
        return algebra.stack([_double(term) for term in terms])
    A, B = torch.zeros(0, shape[1]), torch.zeros(shape[0], 0)
    return _double(Factors(A, B, 1.0))


# ── what is read from them ──────────────────────────────────────────────────────────────────


def to_after(round_: Round) -> dict[str, Gap]:
    """Module path → the gap between what the sites asked for and what the rule made of it.

    Several meters read it: ask for it by :meth:`~fedft.core.meters.base.Round.once`.
    """
    before, after = round_.before, round_.after
    applied = applied_terms(before.delta, after.adapter, after.delta)
    (found,) = compared(round_.replies, before.adapter.factors, [applied])
    return found


def bias(
    updates: Updates,
    applied: Mapping[str, Sequence[Factors]],
    *,
    held: Mapping[str, Factors] | None = None,
) -> OverallBias:
    """The bias of any applied update against ``sum_k p_k s_k B_k A_k``, plus what sites were not sent.

    Args:
        updates: what the sites returned; all of their factors must be known to the server.
        applied: module path → terms whose sum takes the place of the mean update. Modules that
            no site sent are ignored; one that is missing here counts as an applied zero.
        held: module path → what the server had. None takes it that the sites were sent all of it.
    """
    (found,) = compared(updates, held or {}, [applied])
    return bias_from(found)


def spectra(
    updates: Updates, *, held: Mapping[str, Factors] | None = None
) -> dict[str, list[float]]:
    """Singular values of dW by module path, descending; at one rank at most sum_k r_k are not zero.

    Empty where a factor stays at the sites: the server never knows dW then.

    Args:
        updates: what the sites returned.
        held: as for :func:`bias`.
    """
    return {
        module: _singular_values(x, unsent).tolist()
        for module, x, unsent in _asked(updates, held or {})
    }


def _singular_values(x: Factors | Tensor, unsent: Factors) -> Tensor:
    if isinstance(x, Tensor):
        return torch.linalg.svdvals(x + unsent.product() if unsent.rank else x)
    return algebra.singular_values(algebra.stack([x, unsent]) if unsent.rank else x)


# ── what the sites get ────────────────────────────────────────────────────────────────────────

_ROUNDING = 2.0**-8
"""Of an entry on a bfloat16 wire, with room: what it makes of a start is no change of it."""


def _unsent(whole: Factors | None, starts: Iterable[tuple[Factors, float]]) -> list[Factors]:
    """Terms of ``sum_k p_k (whole - start_k)``, over the sites that start from less than its rank.

    Where the start is the leading part of the whole, as the wire has rounded it, the difference is
    the rows beyond its rank. Any other start is subtracted as it is.
    """
    if whole is None:
        return []
    less = [(start, share) for start, share in starts if start.rank < whole.rank]
    if not less:
        return []
    ranks = [start.rank if _leads(start, whole) else 0 for start, _ in less]
    tails = algebra.beyond(_double(whole), ranks, [share for _, share in less])
    others = [pair for pair, rank in zip(less, ranks, strict=True) if rank == 0]
    return [tails, *(replace(start, scale=-share * start.scale) for start, share in others)]


def _leads(start: Factors, whole: Factors) -> bool:
    """Whether a start is the first rows and columns of the whole, up to the rounding of the wire."""
    r = start.rank
    pairs = (
        (start.folded_A(), whole.folded_A()[:r]),
        (start.scale * start.B, whole.scale * whole.B[:, :r]),
    )
    return all(torch.allclose(x, y, rtol=_ROUNDING, atol=0.0) for x, y in pairs)


def applied_terms(before: Delta, adapter: Adapter, after: Delta) -> dict[str, list[Factors]]:
    """The terms of M by module path: what was merged into the base, and the new product."""
    modules = dict.fromkeys([*adapter.factors, *after, *before])
    return {
        module: _change(before.get(module), after.get(module))
        + ([adapter.factors[module]] if module in adapter.factors else [])
        for module in modules
    }


def _change(before: Factors | None, after: Factors | None) -> list[Factors]:
    """Terms of ``after - before``. A delta that grew by stacking leaves only what was added."""
    if before is None or after is None:
        return ([] if after is None else [after]) + (
            [] if before is None else [algebra.negated(before)]
        )
    r = before.rank
    grew = (
        before.R is None
        and after.R is None
        and before.scale == after.scale
        and torch.equal(after.A[:r], before.A)
        and torch.equal(after.B[:, :r], before.B)
    )
    if grew:
        return [Factors(after.A[r:], after.B[:, r:], after.scale)] if after.rank > r else []
    return [after, algebra.negated(before)]
