"""HetLoRA's regulariser: make the last ranks small, so that they can be pruned.

    Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
    EMNLP 2024, arXiv:2401.06432.

``lambda sum_modules ||B[:, k:]||_F ||A[k:, :]||_F`` is added to the loss, with k = floor(gamma r).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedft.clients.methods.base import Method, Rows, strengths
from fedft.core.parts import factor_name, part_of
from fedft.core.terms import Tail as Term
from fedft.core.types import module_of


class Tail(Method):
    """See :class:`fedft.core.terms.Tail`."""

    term = Term

    def __init__(self, rows: Rows, terms: Sequence[Term | None]) -> None:
        ranks = [plan.start.rank for plan in rows.plans]
        keeps = [1.0 if term is None else term.keep for term in terms]
        self._first = [int(keep * rank) for keep, rank in zip(keeps, ranks, strict=True)]
        self._strength = strengths(rows, terms, "strength")[:, 0]

    def correct(self, rows: Rows, count: int) -> None:
        leaves, first = rows.leaves(count), self._first[:count]

        def norms(name: str) -> Tensor:
            return _norm(rows.beyond(name, leaves[name], first))  # [count]

        modules = [module_of(name) for name in leaves if part_of(name) == "A"]
        modules = [m for m in modules if factor_name(m, "B") in leaves]
        if not modules:
            return
        products = [norms(factor_name(m, "A")) * norms(factor_name(m, "B")) for m in modules]
        penalty = (torch.stack(products).sum(0) * self._strength[:count]).sum()
        rows.add_gradient(penalty, leaves)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each client's, with a gradient of zero where x is zero. [K, …] → [K]"""
    return torch.sqrt(x.square().sum((1, 2)) + torch.finfo(x.dtype).tiny)
