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

an r x r solve. It minimises the bias itself and fixes the scale of the update. Below 1e-10 a ridge
acts as 1e-10: A A^T is singular where rows of A repeat, and less would be rounding.

``cosine`` (the paper's measure, by descent): 1 - cos(dW, (B + dB) A) + ridge ||dB||_F^2, from
dB = 0, by ``steps`` steps of gradient descent of length ``step_size``. ``cosine-dim = "column"``
takes the mean of the cosines of the input columns, as public forks of the code do, in place of one
cosine of the whole matrices.

The curvature of a cosine grows as B shrinks, with lambda_max(A A^T) / ||X A||_F^2 for X = B + dB,
and a step of fixed length overshoots a small B by any factor: the cosine then improves while the
update grows a hundredfold. A step is therefore no longer than a quarter of the inverse of that
curvature, and is halved for as long as the objective would rise: dB is never worse than none. Where
B is of ordinary size (||X A||_F^2 / lambda_max above four steps) neither comes into play. With X A
or dW at zero there is no direction, and dB = 0.

State: experimental, as neither the paper's full text nor its code could be read.

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

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from fedft.core import algebra
from fedft.core.types import ClientUpdate, ServerState, factor_name
from fedft.strategies.base import Layer, Strategy, layers, mean_of, weighted_sum


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

    name: str = "lora-fair"
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
        if not A.any() or not B.any():
            return B
        if self.cosine_dim == "column":
            return self._descended(B, _Columns(layer, A, B))
        length = algebra.norm(layer.mean_update()) / layer.parts[0].scale
        terms = sum(w * x.B.norm() * x.A.norm() for x, w in zip(layer.parts, layer.p, strict=True))
        if length**2 <= _ROUNDING * float(terms) ** 2:
            return B  # the sites cancel each other, and rounding gives no direction
        return self._descended(B, _Whole(layer, A, B, length))

    def _descended(self, B: Tensor, direction: "_Direction") -> Tensor:
        """B + dB, from dB = 0 down the objective. Coordinates and unit are the direction's."""
        start = direction.start
        # In the unit in which B has the norm 1, a step of the length eta has eta / ||B||^2.
        square = direction.size**2
        ridge = self.ridge * square
        present, at, share = start, direction.at(start, ridge), 1.0
        for _ in range(self.steps):
            most = _TRUST / at.curvature if at.curvature > 0 else 0.0
            step = most if self.step_size >= most * square else self.step_size / square
            down = at.ascent - 2 * ridge * (present - start)
            new, seen = present, at
            while share > _LEAST_SHARE:
                new = present + share * step * down
                seen = direction.at(new, ridge)
                if seen.objective <= at.objective:
                    break
                share /= 2  # for good: what overshot once is close to where it would again
            if share <= _LEAST_SHARE:
                break  # as low as floating point can tell
            present, at = new, seen
        return B + direction.size * direction.matrix(present - start)


@dataclass(frozen=True)
class _Look:
    """What a step of the descent needs to know of where it stands.

    Attributes:
        objective: 1 - cosine + ridge ||dB||^2.
        ascent: the gradient of the cosine, in the coordinates of the descent.
        curvature: a bound on that of the cosine, but for a factor of about one.
    """

    objective: float
    ascent: Tensor
    curvature: float


class _Direction(ABC):
    """dW, A and B of a layer, each at the norm 1, and the cosine of dW with X A for any X.

    Attributes:
        size: ||B||_F.
        start: B / ||B||_F, in the coordinates in which X is held.
    """

    size: float
    start: Tensor

    @abstractmethod
    def at(self, X: Tensor, ridge: float) -> _Look:
        """The objective at X, whose penalty is ``ridge ||X - start||^2``."""

    @abstractmethod
    def matrix(self, X: Tensor) -> Tensor:
        """[d_out, r] of coordinates."""


class _Whole(_Direction):
    """One cosine, on r x r and d_out x r quantities only: <dW, X A> = <dW A^T, X>."""

    def __init__(self, layer: Layer, A: Tensor, B: Tensor, length: float) -> None:
        unit = A / A.norm()
        self.size, self.start = float(B.norm()), B / B.norm()
        self._T = sum_of_products(layer, unit) / length  # [d_out, r]
        self._G = unit @ unit.T  # [r, r]
        self._steepest = float(torch.linalg.eigvalsh(self._G)[-1])

    def at(self, X: Tensor, ridge: float) -> _Look:
        XG = X @ self._G
        square = float((X * XG).sum())
        penalty = ridge * float((X - self.start).square().sum())
        if square <= _ROUNDING * float(X.square().sum()):
            return _Look(1 + penalty, torch.zeros_like(X), 0.0)
        size = square**0.5
        cosine = float((X * self._T).sum()) / size
        ascent = self._T / size - (cosine / square) * XG
        return _Look(1 - cosine + penalty, ascent, self._steepest / square)

    def matrix(self, X: Tensor) -> Tensor:
        return X


class _Columns(_Direction):
    """The mean cosine of the columns, over C with X = S C.

    S holds the sites' B side by side: X stays in their span. Of S only G = S^T S is needed, of
    dW = S M only M: a gradient S (M ...) has the coordinates M ..., so that S itself is multiplied
    once, in the end.
    """

    def __init__(self, layer: Layer, A: Tensor, B: Tensor) -> None:
        self.size, self._A = float(B.norm()), A / A.norm()
        self._S, self._G, M, self.start = _coordinates(layer, B)
        square = algebra.column_squares(self._G, M)  # of the length of each column of dW, [d_in]
        # What is left where the sites cancel each other is rounding, and gives no direction.
        known = square > _ROUNDING * (self._G.diagonal().sqrt() @ M.abs()).square()
        self._M = M * torch.where(known, square, 1.0).rsqrt() * known  # dW's, of length 1 or 0
        self._reach = self._A.square().sum(dim=0)  # [d_in]

    def at(self, X: Tensor, ridge: float) -> _Look:
        A, M = self._A, self._M
        across = X.T @ self._G  # [r, q]
        inner = across @ X  # [r, r]
        square = ((inner @ A) * A).sum(dim=0)  # of the length of each column of X A
        live = square > _ROUNDING * self._reach * inner.trace()
        inverse = torch.where(live, square, 1.0).rsqrt() * live
        cosine = ((across @ M) * A).sum(dim=0) * inverse
        d = X - self.start
        objective = 1 - float(cosine.mean()) + ridge * float((d * (self._G @ d)).sum())
        scaled = A * inverse
        ascent = M @ scaled.T - X @ ((scaled * cosine) @ scaled.T)
        curvature = torch.linalg.matrix_norm(scaled @ scaled.T)  # no less than lambda_max
        return _Look(objective, ascent / A.shape[1], float(curvature) / A.shape[1])

    def matrix(self, X: Tensor) -> Tensor:
        return self._S @ X


_TRUST = 0.25
"""Of the inverse curvature: within such a step the curvature stays below twice what it was."""

_LEAST_SHARE = 2.0**-20
"""Of a step, below which it is halved no more: what rises even then is rounding."""

_ROUNDING = 1e-14
"""Share of a squared length, of what its terms come to, that says nothing: some float64 epsilons."""

_LEAST_RIDGE = 1e-10
"""Relative to the mean squared row norm of A: far above what rounding adds to A A^T."""


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

    Args:
        layer: of the sites.
        A: their mean, [r, d_in], float64.
        ridge: lambda over the mean squared row norm of A; no less than 1e-10 acts.
    """
    G = A @ A.T
    E_At = _folded(layer, [x.A.double() @ A.T - G for x in layer.parts])
    mean = G.trace() / G.shape[0]
    if not mean > 0:  # A = 0: nothing that B could correct
        return torch.zeros_like(E_At)
    regular = G / mean + max(ridge, _LEAST_RIDGE) * torch.eye(G.shape[0], dtype=G.dtype)
    return torch.linalg.solve(regular, E_At.T / mean).T


def _coordinates(layer: Layer, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S [d_out, q], G = S^T S, M [q, d_in] and C [q, r] with dW ~ S M and B / ||B|| = S C.

    q = sum_k r_k, or d_out where that is less: then S is the identity.
    """
    size = B.norm()
    S = torch.cat([x.B for x in layer.parts], dim=1).double() / size
    rows = torch.cat([w * x.A.double() for x, w in zip(layer.parts, layer.p, strict=True)])
    M = rows / rows.abs().max()
    if S.shape[1] >= S.shape[0]:
        identity = torch.eye(S.shape[0], dtype=S.dtype)
        return identity, identity, S @ M, B / size
    each = torch.eye(B.shape[1], dtype=S.dtype)
    return S, algebra.column_gram(S), M, torch.cat([w * each for w in layer.p])
