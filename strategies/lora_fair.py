"""LoRA-FAIR: average the factors, then correct B for what the average lost.

    Bian, Wang, Zhang and Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and
    Initialization Refinement", ICCV 2025, pp. 3737-3746, arXiv:2411.14961.

Sites train as in FedAvg-LoRA. With the means A, B over the sites and the mean update
dW = sum_k p_k B_k A_k, the server looks for a residual dB and sends out (A, B + dB):

    dB = argmin  S(dW, (B + dB) A) + lambda ||dB||

S is called a similarity in the paper, and cosine similarity in its experiments. Two objectives are
offered here.

``frobenius-ridge`` (default; ours, not the paper's): S = ||dW - (B + dB) A||_F^2 and the squared
penalty have the closed form

    dB = E A^T (A A^T + lambda I)^-1        E A^T = sum_k p_k B_k (A_k - A) A^T
    lambda = ridge * tr(A A^T) / r

an r x r solve. It minimises the bias itself and fixes the scale of the update.

``cosine`` (the paper's measure, by descent): 1 - cos(dW, (B + dB) A) + ridge ||dB||_F^2, from
dB = 0, by ``steps`` steps of gradient descent of length ``step_size``. ``cosine-dim = "column"``
takes the mean of the cosines of the input columns, as public forks of the code do, in place of one
cosine of the whole matrices.

Departures from the paper, whose code could not be read. As printed, the objective would minimise
the similarity: 1 - cos is meant. The printed norm is not squared; started from dB = 0 it has a dead
zone in which the rule silently is FedAvg-LoRA, so the square is used, as forks do. Some forks start
from Xavier noise, most of which survives the descent at lambda = 0.01; zero is the start here. The
paper also corrects only B in its best variant, which is the one implemented. A common limit: no dB
can reach the part of dW outside the row space of A.

Wire: as FedAvg-LoRA. pi(r) numbers down and as many up, plus the head both ways.
"""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from fedft.core import algebra
from fedft.core.types import ClientUpdate, ServerState, factor_name
from strategies.base import Layer, Strategy, layers, mean_of, weighted_sum


class LoRAFAIR(Strategy):
    """FedAvg-LoRA with a server-side correction of B.

    Attributes:
        objective: what dB minimises; see above.
        ridge: lambda. Relative to the mean squared row norm of A for ``frobenius-ridge``,
            absolute for ``cosine``.
        cosine_dim: one cosine of the whole update, or the mean over its input columns.
        steps: of gradient descent, for ``cosine``.
        step_size: of gradient descent, for ``cosine``.
    """

    name: Literal["lora-fair"] = "lora-fair"
    objective: Literal["frobenius-ridge", "cosine"] = "frobenius-ridge"
    ridge: PositiveFloat = 0.01
    cosine_dim: Literal["whole", "column"] = "whole"
    steps: PositiveInt = 1000
    step_size: PositiveFloat = 0.01

    @model_validator(mode="after")
    def _descent_converges(self) -> "LoRAFAIR":
        if self.objective == "cosine" and self.step_size * self.ridge >= 1:
            raise ValueError(
                f"step-size * ridge = {self.step_size * self.ridge:g}: gradient descent on "
                "ridge * ||dB||^2 diverges from 1 on; lower either of them"
            )
        return self

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        mean = mean_of(updates)
        for layer in layers(updates):
            name = factor_name(layer.module, "B")
            mean[name] = self._corrected(layer).to(mean[name].dtype)
        return replace(state, adapter=state.adapter.replaced(mean))

    def _corrected(self, layer: Layer) -> Tensor:
        """B + dB, [d_out, r], float64. The scale is common to all sites and drops out."""
        A = weighted_sum([x.A for x in layer.parts], layer.p)
        B = weighted_sum([x.B for x in layer.parts], layer.p)
        if self.objective == "frobenius-ridge":
            return B + ridge_residual(layer, A, self.ridge)
        if self.cosine_dim == "whole":
            return self._descend_whole(layer, A, B)
        return self._descend_columns(layer, A, B)

    def _descend_whole(self, layer: Layer, A: Tensor, B: Tensor) -> Tensor:
        """On r x r and d_out x r quantities only: <dW, X A> = <dW A^T, X>."""
        T = sum_of_products(layer, A)  # dW A^T, [d_out, r]
        G = A @ A.T  # [r, r]
        length = algebra.norm(layer.mean_update()) / layer.parts[0].scale
        terms = sum(w * x.B.norm() * x.A.norm() for x, w in zip(layer.parts, layer.p, strict=True))
        if length**2 <= _ROUNDING * float(terms) ** 2:
            return B  # the sites cancel each other, and rounding gives no direction
        X = B.clone()
        for _ in range(self.steps):
            XG = X @ G
            size = (X * XG).sum().clamp_min(0).sqrt()
            unit = (length * size).clamp_min(_TINY)
            cosine = (X * T).sum() / unit
            ascent = T / unit - cosine * XG / size.square().clamp_min(_TINY)
            X.add_(ascent - 2 * self.ridge * (X - B), alpha=self.step_size)
        return X

    def _descend_columns(self, layer: Layer, A: Tensor, B: Tensor) -> Tensor:
        """Over C with X = S C, where S holds the sites' B side by side: X stays in their span.

        Of S only G = S^T S is needed, of dW = S M only M: a gradient S (M ...) has the coordinates
        M ..., so that S itself is multiplied once, in the end.
        """
        S, G, M, start = _coordinates(layer, B)  # [d_out, q], [q, q], [q, d_in], [q, r]
        square = algebra.column_squares(G, M)  # of the length of each column of dW, [d_in]
        # What is left where the sites cancel each other is rounding, and gives no direction.
        scale = (G.diagonal().sqrt() @ M.abs()).square()
        length = torch.where(square > _ROUNDING * scale, square, 0.0).sqrt()
        known = (length > 0).to(A.dtype)
        C = start.clone()
        for _ in range(self.steps):
            across = C.T @ G  # [r, q]
            size = ((across @ C @ A) * A).sum(dim=0).clamp_min(0).sqrt()  # of each column of X A
            unit = (length * size).clamp_min(_TINY)
            cosine = known * ((across @ M) * A).sum(dim=0) / unit
            pull = M @ (A * (known / unit)).T
            pull -= C @ ((A * (cosine / size.square().clamp_min(_TINY))) @ A.T)
            C.add_(pull / A.shape[1] - 2 * self.ridge * (C - start), alpha=self.step_size)
        return B + S @ (C - start)


_TINY = 1e-30
"""Keeps a zero update at a cosine of zero instead of NaN."""

_ROUNDING = 1e-14
"""Share of a squared length, of what its terms come to, that says nothing: some float64 epsilons."""


def sum_of_products(layer: Layer, A: Tensor) -> Tensor:
    """``sum_k p_k B_k A_k A^T`` without scales, [d_out, r], float64."""
    return _folded(layer, [x.A.double() @ A.T for x in layer.parts])


def _folded(layer: Layer, cores: Sequence[Tensor]) -> Tensor:
    """``sum_k p_k B_k C_k`` for cores C_k [r, r], [d_out, r], float64."""
    total = torch.zeros(layer.parts[0].B.shape, dtype=torch.float64)
    for x, core, weight in zip(layer.parts, cores, layer.p, strict=True):
        total.addmm_(x.B.double(), core, alpha=weight)
    return total


def ridge_residual(layer: Layer, A: Tensor, ridge: float) -> Tensor:
    """``dB = E A^T (A A^T + lambda I)^-1``, [d_out, r], float64.

    E A^T = sum_k p_k B_k (A_k A^T - A A^T): the deviations of A alone, since those of B add
    nothing to a sum in which the others cancel. Every term vanishes where the A_k agree.
    """
    G = A @ A.T
    E_At = _folded(layer, [x.A.double() @ A.T - G for x in layer.parts])
    strength = ridge * float(G.trace()) / G.shape[0]
    if strength == 0:  # A = 0: nothing that B could correct
        return E_At
    regular = G + strength * torch.eye(G.shape[0], dtype=G.dtype)
    return torch.linalg.solve(regular, E_At.T).T


def _coordinates(layer: Layer, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S [d_out, q], G = S^T S, M [q, d_in] and C [q, r] with dW = S M and B = S C, without scales.

    q = sum_k r_k, or d_out where that is less: then S is the identity.
    """
    S = torch.cat([x.B for x in layer.parts], dim=1).double()
    M = torch.cat([w * x.A.double() for x, w in zip(layer.parts, layer.p, strict=True)])
    if S.shape[1] >= S.shape[0]:
        identity = torch.eye(S.shape[0], dtype=S.dtype)
        return identity, identity, S @ M, B
    each = torch.eye(B.shape[1], dtype=S.dtype)
    return S, algebra.column_gram(S), M, torch.cat([w * each for w in layer.p])
