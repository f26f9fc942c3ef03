"""Rounds of every kind that a meter may meet, in float64, and the naive twins of our meters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import exp
from typing import Any

import torch
from torch import Tensor

from fedft.core import algebra
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    ServerState,
    factor_name,
    head_name,
    module_of,
    part_of,
)

SHAPES = {"layer.0.query": (14, 10), "layer.1.value": (9, 12)}
HEAD = "base_model.model.classifier.weight"


@dataclass(frozen=True, eq=False)
class Case:
    """One round: what the clients were sent, what they replied, and what came of it."""

    before: ServerState
    updates: tuple[ClientUpdate, ...]
    after: ServerState
    personal: frozenset[Any] = frozenset()

    def scaled(self, c: float) -> "Case":
        """All tensors times c, and so all products times c²."""

        def adapter(x: Adapter) -> Adapter:
            return x.replaced({name: c * t for name, t in x.tensors().items()})

        def state(x: ServerState) -> ServerState:
            delta = {m: replace(f, scale=c * c * f.scale) for m, f in x.delta.items()}
            return replace(x, adapter=adapter(x.adapter), delta=delta)

        updates = (
            replace(u, start=adapter(u.start), tensors={n: c * t for n, t in u.tensors.items()})
            for u in self.updates
        )
        return Case(state(self.before), tuple(updates), state(self.after), self.personal)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def adapter(seed: int, rank: int = 3, scale: float = 1.5) -> Adapter:
    factors = {
        m: Factors(draw(seed + 7 * i, rank, d_in), draw(seed + 7 * i + 1, d_out, rank), scale)
        for i, (m, (d_out, d_in)) in enumerate(SHAPES.items())
    }
    return Adapter(factors, {HEAD: draw(seed + 50, 3, 4)})


def leading(whole: Adapter, rank: int) -> Adapter:
    """What a client of a lower rank is sent: first rows and columns, the scale folded into B."""
    ratio = whole.rank / rank
    cut = {m: algebra.truncate(f, rank) for m, f in whole.factors.items()}
    return whole.map_factors(
        {m: replace(f, B=f.B / ratio, scale=f.scale * ratio) for m, f in cut.items()}
    )


def reply(k: int, start: Adapter, size: float = 0.3, only: str | None = None) -> ClientUpdate:
    moved = {
        n: t + size * draw(1000 + 31 * k + i, *t.shape)
        for i, (n, t) in enumerate(start.tensors().items())
        if only is None or n == HEAD or module_of(n) == only
    }
    told = {"loss": 1.0 + k, "grad_A_norm": 0.5 * (k % 3), "grad_B_norm": 1.0 + k % 2}
    return ClientUpdate(f"client-{k:03}", 3 + 2 * k, moved, start, told)


def hydra(seed: int, experts: int = 3, rank: int = 2) -> Adapter:
    tensors: dict[str, Tensor] = {}
    for i, (m, (d_out, d_in)) in enumerate(SHAPES.items()):
        tensors[factor_name(m, "A")] = draw(seed + 9 * i, rank, d_in)
        for e in range(experts):
            tensors[head_name(m, e)] = draw(seed + 9 * i + e + 1, d_out, rank)
    return Adapter({}, tensors)


def _plain(count: int = 4, size: float = 0.3) -> Case:
    start = adapter(0)
    updates = tuple(reply(k, start, size) for k in range(count))
    return Case(ServerState(start), updates, ServerState(adapter(90), 1))


def _merged() -> Case:
    case = _plain()
    old = {m: Factors(f.A, 3 * f.B, 1.0) for m, f in adapter(31, 5).factors.items()}
    new = {m: algebra.stack([old[m], f]) for m, f in adapter(32, 2).factors.items()}
    return replace(
        case, before=replace(case.before, delta=old), after=replace(case.after, delta=new)
    )


def _mixed() -> Case:
    whole = adapter(0, 4)
    updates = tuple(reply(k, leading(whole, r)) for k, r in enumerate((4, 1, 2, 4, 1)))
    return Case(ServerState(whole), updates, ServerState(adapter(91, 4), 1))


def _lower() -> Case:
    whole = adapter(0, 4)
    updates = tuple(reply(k, leading(whole, 2)) for k in range(3))
    return Case(ServerState(whole), updates, ServerState(adapter(93, 4), 1))


def _pruned() -> Case:
    start = adapter(0)
    held = (None, "layer.0.query", "layer.1.value", "layer.0.query")
    updates = tuple(reply(k, start, only=only) for k, only in enumerate(held))
    return Case(ServerState(start), updates, ServerState(adapter(92), 1))


def _kept() -> Case:
    """FedSA-LoRA: B stays at the clients."""
    case = _plain()
    sent = tuple(
        replace(u, tensors={n: t for n, t in u.tensors.items() if part_of(n) == "A"})
        for u in case.updates
    )
    return replace(case, updates=sent, personal=frozenset({"B", "head"}))


def _experts() -> Case:
    start = hydra(0)
    return Case(
        ServerState(start), tuple(reply(k, start) for k in range(3)), ServerState(hydra(80), 1)
    )


CASES: dict[str, Callable[[], Case]] = {
    "one rank": _plain,
    "many clients": lambda: _plain(40),
    "one client": lambda: _plain(1),
    "nobody moved": lambda: _plain(3, 0.0),
    "nobody came": lambda: _plain(0),
    "merged into the base": _merged,
    "mixed ranks": _mixed,
    "all of one lower rank": _lower,
    "layer-pruned": _pruned,
    "B stays": _kept,
    "experts": _experts,
}


# ── the definitions ───────────────────────────────────────────────────────────────────────────


def dense(x: Factors) -> Tensor:
    return x.scale * x.B @ x.A


def _shares(updates: Sequence[ClientUpdate]) -> list[float]:
    total = sum(u.examples for u in updates)
    return [u.examples / total for u in updates]


def _holders(case: Case, module: str) -> list[ClientUpdate]:
    return [
        u
        for u in case.updates
        if any(part_of(n) != "head" and module_of(n) == module for n in u.tensors)
    ]


def _asked(case: Case, module: str) -> tuple[Tensor, Tensor]:
    """(dW, what clients were not sent), product by product."""
    whole = dense(case.before.adapter.factors[module])
    dW, unsent = torch.zeros_like(whole), torch.zeros_like(whole)
    holders = _holders(case, module)
    for p, u in zip(_shares(holders), holders, strict=True):
        start = dense(u.start.factors[module])
        less = u.start.factors[module].rank < case.before.adapter.factors[module].rank
        dW += p * dense(u.adapter.factors[module])
        if less:
            unsent += p * (whole - start)
    return dW + unsent, unsent


def _applied(case: Case, module: str) -> Tensor:
    M = dense(case.after.adapter.factors[module])
    if module in case.after.delta:
        M = M + dense(case.after.delta[module])
    if module in case.before.delta:
        M = M - dense(case.before.delta[module])
    return M


def _held(case: Case) -> list[str]:
    known = case.before.adapter.factors if not case.personal & {"A", "B", "R"} else ()
    return [m for m in known if _holders(case, m)]


def _ratios(pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float | None]:
    x = sum(float(dW.square().sum()) for dW, _, _ in pairs)
    if x == 0:
        return dict.fromkeys(("relative", "cosine", "norm_ratio", "forgotten"))
    y = sum(float(M.square().sum()) for _, M, _ in pairs)
    e = sum(float((dW - M).square().sum()) for dW, M, _ in pairs)
    u = sum(float(L.square().sum()) for _, _, L in pairs)
    xy = sum(float((dW * M).sum()) for dW, M, _ in pairs)
    lost = sum(float(((dW - M) * L).sum()) for dW, M, L in pairs)
    return {
        "relative": (e / x) ** 0.5,
        "cosine": xy / (x * y) ** 0.5 if y else None,
        "norm_ratio": (y / x) ** 0.5,
        "forgotten": lost / (u * x) ** 0.5 if u else 0.0,
    }


def bias(case: Case) -> dict[str, Any]:
    layers = {m: (*_asked(case, m), _applied(case, m)) for m in _held(case)}
    pairs = {m: (dW, M, L) for m, (dW, L, M) in layers.items()}
    return {**_ratios(list(pairs.values())), "layers": {m: _ratios([p]) for m, p in pairs.items()}}


def lag(case: Case) -> dict[str, Any]:
    told = [(u.examples, u.metrics["grad_A_norm"] / u.metrics["grad_B_norm"]) for u in case.updates]
    total = sum(n for n, _ in told)
    return {
        "function_jump": bias(case)["relative"],
        "dead_start": sum(n * x for n, x in told) / total if told else None,
        "displacement": _displacement(case),
    }


def _displacement(case: Case) -> float | None:
    moved = length = 0.0
    for m, factors in case.after.adapter.factors.items():
        holders = _holders(case, m)
        for part, new in (("A", factors.A), ("B", factors.B)):
            if not holders or part in case.personal:
                continue
            own = [getattr(u.adapter.factors[m], part) for u in holders]
            if {x.shape for x in own} != {new.shape}:  # of lower ranks, all of them or some
                return None
            mean = sum((p * x for p, x in zip(_shares(holders), own, strict=True)), 0 * new)
            moved += float((new - mean).square().sum())
            length += float(mean.square().sum())
    return (moved / length) ** 0.5 if length else None


def _sent(u: ClientUpdate) -> dict[str, Tensor]:
    return {n: t for n, t in u.tensors.items() if part_of(n) != "head"}


def drift(case: Case) -> dict[str, Any]:
    if not any(_sent(u) for u in case.updates):
        return {"total": None, "between": None}
    total = sum(
        p * sum(float((t - u.start.tensors()[n]).square().sum()) for n, t in _sent(u).items())
        for p, u in zip(_shares(case.updates), case.updates, strict=True)
    )
    between, everybody = 0.0, sum(u.examples for u in case.updates)
    for name in dict.fromkeys(n for u in case.updates for n in _sent(u)):
        own = [u for u in case.updates if name in u.tensors]
        if len({u.tensors[name].shape for u in own}) > 1:
            return {"total": total, "between": None}
        mean = sum(p * u.tensors[name] for p, u in zip(_shares(own), own, strict=True))
        between += sum(
            u.examples / everybody * float((u.tensors[name] - mean).square().sum()) for u in own
        )
    return {"total": total, "between": between}


def heads(case: Case) -> dict[str, Any] | None:
    tensors = case.after.adapter.head
    experts = [
        torch.cat([tensors[head_name(m, e)].flatten() for m in SHAPES])
        for e in range(3)
        if head_name("layer.0.query", e) in tensors
    ]
    if not experts:
        return None
    pairs = [float(x @ y / x.norm() / y.norm()) for x, y in combinations(experts, 2)]
    return {"used": len(experts), "cosine": sum(pairs) / len(pairs)}


def spectrum(case: Case) -> dict[str, Any]:
    return {m: torch.linalg.svdvals(_asked(case, m)[0]).tolist() for m in _held(case)}


def effective_rank(case: Case) -> dict[str, Any]:
    layers = dict[str, float]()
    for m, factors in case.after.adapter.factors.items():
        W = dense(factors) + (dense(case.after.delta[m]) if m in case.after.delta else 0)
        q = torch.linalg.svdvals(W) / torch.linalg.svdvals(W).sum()
        layers[m] = exp(-sum(float(x) * float(x.log()) for x in q if x > 0))
    mean = sum(layers.values()) / len(layers) if layers else None
    return {"mean": mean, "layers": layers}


def agreement(case: Case) -> dict[str, Any]:
    moves: list[Mapping[str, Tensor]] = [
        {n: t - u.start.tensors()[n] for n, t in _sent(u).items()} for u in case.updates
    ]
    moves = [m for m in moves if any(bool(x.any()) for x in m.values())]
    lengths = [sum(float(x.square().sum()) for x in m.values()) ** 0.5 for m in moves]
    shapes = {n: {m[n].shape for m in moves if n in m} for m_ in moves for n in m_}
    if len(moves) < 2 or any(len(s) > 1 for s in shapes.values()):
        return {"cosine": None, "clients": len(moves)}
    pairs = [
        sum(float((x * moves[j][n]).sum()) for n, x in moves[i].items() if n in moves[j])
        / (lengths[i] * lengths[j])
        for i, j in combinations(range(len(moves)), 2)
    ]
    return {"cosine": sum(pairs) / len(pairs), "clients": len(moves)}


TWINS: dict[str, Callable[[Case], Mapping[str, Any] | None]] = {
    "bias": bias,
    "lag": lag,
    "drift": drift,
    "heads": heads,
    "spectrum": spectrum,
    "effective_rank": effective_rank,
    "agreement": agreement,
}
"""Every meter's definition. A new meter gets a row here."""

DEGREES: dict[str, Mapping[str, int]] = {
    "bias": {},
    "lag": {},
    "drift": {"total": 2, "between": 2},
    "heads": {},
    "spectrum": dict.fromkeys(SHAPES, 2),
    "effective_rank": {},
    "agreement": {},
}
"""What becomes of a reading where every tensor is twice as large: the power of two; 0 if not named."""
