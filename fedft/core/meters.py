"""What aggregation gets wrong, measured every round: bias, initialisation lag and client drift.

Averaging LoRA factors is not averaging updates. With p_k = n_k / sum_j n_j over the sites that
took part, the mean update that the sites asked for is

    dW = sum_k p_k s_k B_k A_k

and what the server's new state applies in its place, over the base weights the sites started on, is

    M = (delta_new - delta_old) + s B A

    bias      ||dW - M|| / ||dW||,   cos(dW, M),   ||M|| / ||dW||          Frobenius, per layer
    overall   the same, with sums of squares (and of inner products) over the layers

M is a rule's whole answer: for FedAvg-LoRA the product of the averaged factors, for FLoRA and
FedEx-LoRA also what was merged into the base. A rule that weighs sites otherwise (HetLoRA) or steps
(FedAdam) is held to the same dW, so that its deliberate departure reads as bias too.

Precision: ||dW - M||^2 is never computed as ||dW||^2 - 2 <dW, M> + ||M||^2, whose rounding hides
everything below 1e-8. Both products are expressed in one orthonormal basis of their stacked left
factors (a thin QR, in float64) and subtracted there, entry by entry. What is left is the rounding
of the stored factors themselves: 1e-7 for float32.

Cost per layer, with R = sum_k r_k and d the smaller of d_in and d_out: one QR of [d, R] and one
product [min(d, R), R] x [R, d'], in blocks of columns. Where all A_k (or all B_k) agree, as under
FFA-LoRA, R falls to r.

Definitions of lag and drift are this project's own where the papers give none; see
:class:`Lag` and :class:`Drift`.
"""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from fedft.core import algebra, hydra
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Delta,
    Factors,
    Part,
    ServerState,
    TrainPlan,
    module_of,
    part_of,
)

_BLOCK = 2048
"""Columns of the difference held at a time: bounds the memory at [min(d, R), 2048] float64."""

_MATRICES: frozenset[Part] = frozenset({"A", "B", "R"})


class LayerBias(TypedDict):
    """One layer's bias. ``None`` where a norm it divides by is zero."""

    relative: float | None
    cosine: float | None
    norm_ratio: float | None


class Bias(LayerBias):
    """The bias over all layers, and by module path."""

    layers: dict[str, LayerBias]


class Lag(TypedDict):
    """What the round boundary does to the state of training.

    Attributes:
        function_jump: ||W_start(next round) - (W + dW)|| / ||dW||, root-mean-square over the sites
            by p_k: how far the function a site resumes from is off the mean of where sites
            arrived. Equals the relative bias where every site starts from the server's state;
            differs where a site gets a truncation of it.
        dead_start: mean over sites by p_k of ||grad_A|| / ||grad_B|| on the first batch, as they
            report it. Zero where B = 0, since A then has no gradient.
        displacement: ||theta_start(next) - theta_bar|| / ||theta_bar||, theta the factors of all
            layers end to end and theta_bar their mean over the sites. None for mixed ranks, where
            the two have no common coordinates.
    """

    function_jump: float | None
    dead_start: float | None
    displacement: float | None


class Drift(TypedDict):
    """How far the sites moved, in squared Frobenius norm over the factors they sent.

    Attributes:
        total: sum_k p_k ||theta_k - theta_start||^2.
        between: sum_k p_k ||theta_k - theta_bar||^2, the part on which they disagree. The rest of
            the total is their common movement. None for mixed ranks.
    """

    total: float | None
    between: float | None


class Heads(TypedDict):
    """HydraLoRA's heads after the round.

    Attributes:
        used: how many are not zero.
        cosine: mean cosine between every two of these, each taken over all layers; None for one.
    """

    used: int
    cosine: float | None


class Meters(TypedDict):
    """One round's meters: plain numbers, ready for ``rounds.jsonl``."""

    bias: Bias
    lag: Lag
    drift: Drift
    heads: NotRequired[Heads]


def measure(
    before: ServerState,
    updates: Sequence[ClientUpdate],
    after: ServerState,
    *,
    personal: Iterable[Part] = (),
    following: Mapping[str, TrainPlan] | None = None,
) -> Meters:
    """All meters of one round. Reads its arguments only; sites without examples are left out.

    Args:
        before: the state the sites were sent.
        updates: what came back, in any order.
        after: what the rule made of it.
        personal: the parts that stay at the sites (``strategy.personal``). Where a factor does
            (FedSA-LoRA keeps B), the server never learns the products B_k A_k: bias and function
            jump are then None, not a guess; displacement and drift cover the parts that were sent.
        following: what the same sites would be sent next, by site name. Needed only where a site
            starts from something else than ``after`` (mixed ranks). None takes ``after`` for all.
    """
    usable = sorted((u for u in updates if u.examples > 0), key=lambda u: u.site)
    hidden = frozenset(personal) & _MATRICES
    bias_, jump = _empty_bias(), None
    if usable and not hidden:
        plans = _distinct(usable, following or {})
        starts = [(plan.start, plan.delta) for plan, _ in plans]
        first, *others = _gaps(
            _mean_updates(usable, _weights(usable)),
            [_applied(before.delta, *new) for new in [(after.adapter, after.delta), *starts]],
        )
        bias_ = _read(first)
        jump = _function_jump(others, plans) if plans else bias_["relative"]
    lag = Lag(
        function_jump=jump,
        dead_start=_dead_start(usable),
        displacement=_displacement(usable, after.adapter, hidden),
    )
    measured = Meters(bias=bias_, lag=lag, drift=_drift(usable))
    if hydra.head_count(after.adapter) > 1:
        measured["heads"] = _separation(after.adapter)
    return measured


def bias(
    updates: Sequence[ClientUpdate], p: Sequence[float], applied: Mapping[str, Sequence[Factors]]
) -> Bias:
    """The bias of any applied update against ``sum_k p_k s_k B_k A_k``.

    Args:
        updates: what the sites returned; all of their factors must be known to the server.
        p: their weights; renormalised in each layer over the sites that sent it.
        applied: module path → terms whose sum takes the place of the mean update. Modules that
            no site sent are ignored; one that is missing here counts as an applied zero.
    """
    (gaps,) = _gaps(_mean_updates(updates, p), [applied])
    return _read(gaps)


def spectrum(
    updates: Sequence[ClientUpdate], personal: Iterable[Part] = ()
) -> dict[str, list[float]]:
    """Singular values of dW by module path, descending; at most sum_k r_k of them are not zero.

    Empty where a factor stays at the sites (``personal``): the server never knows dW then.
    """
    if frozenset(personal) & _MATRICES:
        return {}
    usable = [u for u in updates if u.examples > 0]
    return {
        module: algebra.singular_values(factors).tolist()
        for module, factors in _mean_updates(usable, _weights(usable))
    }


# ── bias ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Gap:
    """Squared norms and the inner product of an ideal and an applied update; they add up."""

    ideal: float = 0.0
    applied: float = 0.0
    inner: float = 0.0
    error: float = 0.0

    def __add__(self, other: "_Gap") -> "_Gap":
        return _Gap(
            self.ideal + other.ideal,
            self.applied + other.applied,
            self.inner + other.inner,
            self.error + other.error,
        )

    def ratios(self) -> LayerBias:
        return LayerBias(
            relative=_ratio(self.error, self.ideal),
            cosine=_cosine(self.inner, self.ideal, self.applied),
            norm_ratio=_ratio(self.applied, self.ideal),
        )


def _ratio(numerator: float, denominator: float) -> float | None:
    """Root of a quotient of squared norms; None where it has no finite value."""
    return sqrt(numerator / denominator) if denominator > 0 and isfinite(numerator) else None


def _cosine(inner: float, x: float, y: float) -> float | None:
    defined = x > 0 and y > 0 and isfinite(inner)
    return min(1.0, max(-1.0, inner / sqrt(x) / sqrt(y))) if defined else None


def _empty_bias() -> Bias:
    return Bias(relative=None, cosine=None, norm_ratio=None, layers={})


def _read(gaps: Mapping[str, _Gap]) -> Bias:
    layers = {module: gap.ratios() for module, gap in gaps.items()}
    return Bias(**sum(gaps.values(), _Gap()).ratios(), layers=layers)


def _gaps(
    ideal: Iterable[tuple[str, Factors]], targets: Sequence[Mapping[str, Sequence[Factors]]]
) -> list[dict[str, _Gap]]:
    """For each target, module path → its gap. One layer in float64 at a time: that is the memory."""
    gaps: list[dict[str, _Gap]] = [{} for _ in targets]
    for module, x in ideal:
        for found, target in zip(gaps, targets, strict=True):
            found[module] = _gap(x, _sum(target.get(module, ()), x))
    return gaps


def _gap(x: Factors, y: Factors) -> _Gap:
    """Norms of two products and of their difference, without their squares cancelling.

    For an orthonormal Q that spans the stacked left factors, ||Q^T X|| = ||X||, and Q^T [B_x B_y]
    is the triangle of a QR. The narrower side is taken as the left one; a stack at least as wide
    as that side spans it already, and needs no QR.
    """
    if x.shape[0] > x.shape[1]:
        x, y = _transposed(x), _transposed(y)
    left = _isometric(torch.cat([x.scale * x.B, y.scale * y.B], dim=1))
    total = _Gap()
    for start in range(0, x.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        X = left[:, : x.rank] @ x.A[:, block]  # [min(d, r_x + r_y), block]
        Y = left[:, x.rank :] @ y.A[:, block]
        total += _Gap(_square(X), _square(Y), float((X * Y).sum()), _square(X - Y))
    return total


def _isometric(x: Tensor) -> Tensor:
    """``Q^T x`` for an orthonormal Q that spans the columns of x [d, q]. [min(d, q), q]"""
    return torch.linalg.qr(x, mode="r").R if x.shape[1] < x.shape[0] else x


def _square(x: Tensor) -> float:
    return float(x.square().sum())


def _transposed(x: Factors) -> Factors:
    return Factors(x.B.T, x.A.T, x.scale)


def _double(x: Factors) -> Factors:
    """Without a core and in float64."""
    folded = Factors(x.A.double(), x.B.double(), x.scale, None if x.R is None else x.R.double())
    return folded.folded()


def _sum(terms: Sequence[Factors], like: Factors) -> Factors:
    """The exact sum in float64; an empty one is a product of rank 0 with the shape of ``like``."""
    if terms:
        return algebra.stack([_double(term) for term in terms])
    d_out, d_in = like.shape
    return Factors(like.A.new_zeros(0, d_in), like.B.new_zeros(d_out, 0), 1.0)


# ── what the sites asked for, and what they get ───────────────────────────────────────────────


def _weights(updates: Sequence[ClientUpdate]) -> list[float]:
    total = sum(u.examples for u in updates)
    return [u.examples / total for u in updates]


def _senders(updates: Sequence[ClientUpdate]) -> dict[str, list[int]]:
    """Module path → the indices of the updates that bring a factor of it, in the model's order."""
    sent = [{module_of(name) for name in u.tensors if part_of(name) != "head"} for u in updates]
    modules = dict.fromkeys(module for u in updates for module in u.start.factors)
    held = {module: [k for k, names in enumerate(sent) if module in names] for module in modules}
    return {module: indices for module, indices in held.items() if indices}


def _mean_updates(
    updates: Sequence[ClientUpdate], p: Sequence[float]
) -> Iterator[tuple[str, Factors]]:
    """(module, its mean update in float64), weights renormalised over the senders of the layer."""
    adapters = [u.adapter for u in updates]
    for module, indices in _senders(updates).items():
        total = sum(p[k] for k in indices)
        parts = [_double(adapters[k].factors[module]) for k in indices]
        yield module, _weighted_sum(parts, [p[k] / total for k in indices])


def _weighted_sum(parts: Sequence[Factors], p: Sequence[float]) -> Factors:
    """``sum_k p_k s_k B_k A_k``, stacked, or added up where one factor is common to all."""
    w = [p_k * part.scale for p_k, part in zip(p, parts, strict=True)]
    first = parts[0]
    if all(torch.equal(part.A, first.A) for part in parts):
        B = sum((w_k * part.B for w_k, part in zip(w, parts, strict=True)), first.B.new_zeros(()))
        return Factors(first.A, B, 1.0)
    if all(torch.equal(part.B, first.B) for part in parts):
        A = sum((w_k * part.A for w_k, part in zip(w, parts, strict=True)), first.A.new_zeros(()))
        return Factors(A, first.B, 1.0)
    return algebra.stack(parts, p)


def _applied(before: Delta, adapter: Adapter, after: Delta) -> dict[str, list[Factors]]:
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


# ── initialisation lag ────────────────────────────────────────────────────────────────────────


def _function_jump(
    gaps: Sequence[Mapping[str, _Gap]], plans: Sequence[tuple[TrainPlan, float]]
) -> float | None:
    """Root-mean-square over the sites of the relative distance of their next start from W + dW.

    Only layers that a site holds count: of the others it has no function.
    """
    if any(plan.keep & _MATRICES for plan, _ in plans):
        return None
    held = [
        (weight, gap)
        for found, (plan, weight) in zip(gaps, plans, strict=True)
        for module, gap in found.items()
        if module in plan.start.factors
    ]
    return _ratio(sum(w * gap.error for w, gap in held), sum(w * gap.ideal for w, gap in held))


def _distinct(
    updates: Sequence[ClientUpdate], following: Mapping[str, TrainPlan]
) -> list[tuple[TrainPlan, float]]:
    """Plans that start alike, once each, with the weight of their sites: they cost a QR apiece."""
    groups: list[tuple[TrainPlan, float]] = []
    known = [u for u in updates if u.site in following]
    for update, p in zip(known, _weights(known), strict=True):
        plan = following[update.site]
        for index, (seen, weight) in enumerate(groups):
            if _same_start(plan, seen):
                groups[index] = (seen, weight + p)
                break
        else:
            groups.append((plan, p))
    return groups


def _same_start(x: TrainPlan, y: TrainPlan) -> bool:
    return _same(x.start.factors, y.start.factors) and _same(x.delta, y.delta)


def _same(x: Delta, y: Delta) -> bool:
    if x is y:
        return True
    return x.keys() == y.keys() and all(
        f is y[module]
        or (
            f.scale == y[module].scale
            and torch.equal(f.B, y[module].B)
            and torch.equal(f.folded_A(), y[module].folded_A())
        )
        for module, f in x.items()
    )


def _dead_start(updates: Sequence[ClientUpdate]) -> float | None:
    """Mean of ||grad_A|| / ||grad_B|| over the sites that report both and have a gradient in B."""
    pairs = [
        (u.examples, u.metrics["grad_A_norm"], u.metrics["grad_B_norm"])
        for u in updates
        if u.metrics.keys() >= {"grad_A_norm", "grad_B_norm"}
    ]
    ratios = [(n, a / b) for n, a, b in pairs if b > 0 and isfinite(a / b)]
    total = sum(n for n, _ in ratios)
    return sum(n * ratio for n, ratio in ratios) / total if ratios else None


def _displacement(
    updates: Sequence[ClientUpdate], start: Adapter, hidden: frozenset[Part]
) -> float | None:
    """Relative distance of the server's new factors from the mean of those that came back."""
    parts = _MATRICES - hidden
    adapters = [u.adapter.tensors(parts) for u in updates]
    following = start.tensors(parts)
    p = _weights(updates)
    moved = length = 0.0
    for name, holders in _holders(updates, parts).items():
        tensors = [adapters[k][name] for k in holders]
        target = following.get(name)
        if target is None or any(t.shape != target.shape for t in tensors):
            return None
        mean = _mean(tensors, [p[k] for k in holders])
        moved += _square(target.double() - mean)
        length += _square(mean)
    return _ratio(moved, length)


def _holders(updates: Sequence[ClientUpdate], parts: Iterable[Part]) -> dict[str, list[int]]:
    """Tensor name → the updates whose site holds that layer, for the chosen parts."""
    senders = _senders(updates)
    names = dict.fromkeys(name for u in updates for name in u.start.tensors(parts))
    return {name: senders[module_of(name)] for name in names if module_of(name) in senders}


def _mean(tensors: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """Mean in float64 by weights that need not add up to one."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, p, strict=True):
        total.add_(tensor, alpha=weight / sum(p))
    return total


# ── client drift ──────────────────────────────────────────────────────────────────────────────


def _drift(updates: Sequence[ClientUpdate]) -> Drift:
    """Squared movement of the factors that were sent; tensors that did not travel have none."""
    p = _weights(updates)
    names = dict.fromkeys(n for u in updates for n in u.tensors if part_of(n) != "head")
    if not names:
        return Drift(total=None, between=None)
    total, between = 0.0, 0.0
    comparable = True
    for name in names:
        holders = [k for k, u in enumerate(updates) if name in u.tensors]
        tensors = [updates[k].tensors[name] for k in holders]
        starts = [updates[k].start.tensors()[name] for k in holders]
        w = [p[k] for k in holders]
        total += sum(
            w_k * _square(t.double() - s.double())
            for w_k, t, s in zip(w, tensors, starts, strict=True)
        )
        comparable = comparable and len({t.shape for t in tensors}) == 1
        if comparable:
            mean = _mean(tensors, w)
            between += sum(
                w_k * _square(t.double() - mean) for w_k, t in zip(w, tensors, strict=True)
            )
    return Drift(total=total, between=between if comparable else None)


# ── HydraLoRA ─────────────────────────────────────────────────────────────────────────────────


def _separation(adapter: Adapter) -> Heads:
    cosine = hydra.cosines(adapter)
    used = [i for i in range(len(cosine)) if cosine[i, i] > 0]
    pairs = [float(cosine[i, j]) for i in used for j in used if i < j]
    return Heads(used=len(used), cosine=sum(pairs) / len(pairs) if pairs else None)
