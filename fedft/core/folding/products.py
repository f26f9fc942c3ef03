"""The mean update of a layer, one client's product at a time."""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedft.core.types import Factors


@dataclass(frozen=True, eq=False)
class _Term:
    """``weight * B A``, [d_out, r] and [r, d_in]."""

    A: Tensor
    B: Tensor
    weight: float

    def merged(self, other: "_Term") -> "_Term | None":
        """The sum of two that share a factor, at no higher rank; None where they do not."""
        if torch.equal(self.A, other.A):
            return _Term(self.A, _sum(self.B, self.weight, other.B, other.weight), 1.0)
        if torch.equal(self.B, other.B):
            return _Term(_sum(self.A, self.weight, other.A, other.weight), self.B, 1.0)
        return None

    def owned(self) -> "_Term":
        """The same, sharing no memory: a view would keep a whole reply alive."""
        return replace(self, A=self.A.clone(), B=self.B.clone())


class MeanUpdate:
    """``dW = sum_k w_k s_k B_k A_k / sum_k w_k`` of one layer, one site at a time.

    Its rank grows with the sites: the products are stacked as they come, not multiplied out, up to
    where the stack would take more numbers than the dense matrix, at rank
    d_in d_out / (d_in + d_out). There it is added to one, by a single matrix product, and a new
    stack begins. Memory is the dense matrix in float64 and one stack, in the dtype that was sent,
    at most.

    A product that shares A, or B, with the one before it is added to that one's other factor: under
    FFA-LoRA or RoLoRA the rank stays r.

    Attributes:
        weight: the sum of the weights.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._terms: list[_Term] = []
        self._rank = 0
        self._dense: Tensor | None = None  # [d_out, d_in] float64, not yet divided by the weight

    def add(self, x: Factors, weight: float) -> None:
        """Fold one site's factors, of a weight above zero."""
        self.weight += weight
        down = x.A if x.R is None else x.R.double() @ x.A.double()
        term = _Term(down, x.B, weight * x.scale)
        both = self._terms[-1].merged(term) if self._terms else None
        if both is not None:
            self._terms[-1] = both
            return
        self._terms.append(term.owned())
        self._rank += x.rank
        d_out, d_in = x.shape
        if self._rank * (d_out + d_in) >= d_out * d_in:
            A, B = self._stacked(1.0)
            self._dense = B @ A if self._dense is None else self._dense.addmm_(B, A)
            self._terms, self._rank = [], 0

    def value(self) -> Factors | Tensor:
        """The mean update in float64: factors of scale 1 while these are smaller, else [d_out, d_in]."""
        if self._dense is not None and not self._terms:
            return self._dense / self.weight
        A, B = self._stacked(1 / self.weight)
        if self._dense is None:
            return Factors(A, B, 1.0)
        return torch.addmm(self._dense, B, A, beta=1 / self.weight)

    def _stacked(self, share: float) -> tuple[Tensor, Tensor]:
        """A [sum_k r_k, d_in] and B [d_out, sum_k r_k] in float64, the weights times ``share`` in A."""
        weights = torch.tensor([share * t.weight for t in self._terms], dtype=torch.float64)
        ranks = torch.tensor([term.A.shape[0] for term in self._terms])
        A = torch.cat([term.A for term in self._terms]).double()
        B = torch.cat([term.B for term in self._terms], dim=1).double()
        return A * weights.repeat_interleave(ranks)[:, None], B


def _sum(x: Tensor, v: float, y: Tensor, w: float) -> Tensor:
    """``v x + w y`` in float64."""
    return (x.double() if v == 1 else v * x.double()).add(y, alpha=w)
