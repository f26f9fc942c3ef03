"""A federation without models: adapters of two layers, clients that take a random step.

What a rule does to an adapter is the same whatever trained it, so its laws need no model.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from fedft.core import seeds
from fedft.core.adapters import hydra
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    ServerState,
    Site,
    TrainPlan,
    factor_name,
    part_of,
)
from fedft.strategies import Strategy

RANK, ALPHA = 3, 6.0
SHAPES = {"layer.0.q": (10, 8), "layer.1.v": (6, 12)}
"""Adapted layers: (d_out, d_in)."""

HEAD = {"base_model.model.classifier.weight": (4, 5), "base_model.model.classifier.bias": (4,)}
"""Tensors of the task head."""

EXPERTS = 3
"""B of a layer, where the rule is for HydraLoRA's adapters."""


def first_adapter(dtype: torch.dtype = torch.float64) -> Adapter:
    """A at random, B at zero, and a task head."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    factors = {
        module: Factors(draw(RANK, n), torch.zeros(m, RANK, dtype=dtype), ALPHA / RANK)
        for module, (m, n) in SHAPES.items()
    }
    return Adapter(factors, {name: draw(*shape) for name, shape in HEAD.items()})


def hydra_adapter(plain: Adapter) -> Adapter:
    """HydraLoRA's adapter with the A and the task head of a plain one."""
    shapes = hydra.shapes(SHAPES, RANK, EXPERTS)
    drawn = hydra.initial(shapes, seed=0)
    A = {factor_name(module, "A"): f.A for module, f in plain.factors.items()}
    dtype = next(iter(A.values())).dtype
    tensors = {name: A.get(name, t.to(dtype)) for name, t in drawn.items()}
    return Adapter({}, {**tensors, **plain.head})


def initial(rule: Strategy, dtype: torch.dtype = torch.float64) -> ServerState:
    """The state before the first round."""
    plain = first_adapter(dtype)
    return rule.init(plain if rule.supports("lora") else hydra_adapter(plain))


def fleet(rule: Strategy, count: int = 4) -> list[Site]:
    """Clients of unequal size; of unequal rank where the rule takes that."""
    ranks = itertools.cycle([3, 1, 2, 3])
    return [
        Site(f"site-{k}", examples=5 + 3 * k, rank=rank if rule.mixed_ranks else None)
        for k, rank in zip(range(count), ranks, strict=False)
    ]


def reply(rule: Strategy, state: ServerState, site: Site, noise: str | None = None) -> ClientUpdate:
    """Local training as a seeded random step of whatever the plan lets learn.

    Args:
        rule: that makes the plan.
        state: as it is sent.
        site: who trains.
        noise: what the step is drawn for; None for the client's name.
    """
    return trained(rule.plan(state, site), site, state.round, noise)


def trained(plan: TrainPlan, site: Site, round_: int, noise: str | None = None) -> ClientUpdate:
    """The same for a plan: what it lets learn takes a step, and its records are drawn near two.

    Args:
        plan: what is asked.
        site: who trains.
        round_: as the step is drawn for it, too.
        noise: as for :func:`reply`.
    """
    g = seeds.torch_generator(1, "test", round_, noise or site.name)
    tensors = {
        name: tensor
        + 0.3 * torch.randn(tensor.shape, generator=g, dtype=torch.float64).to(tensor.dtype)
        if part_of(name) in plan.train
        else tensor
        for name, tensor in plan.start.tensors().items()
    }
    sent = {name: tensors[name] for name in plan.sent()}
    records = {
        record: {
            name: 2 + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        for record, shapes in plan.schema("sends").items()
    }
    return ClientUpdate(
        site.name, site.examples, sent, plan.start, _reported(site.examples), records=records
    )


def still(name: str, plan: TrainPlan, examples: int = 4) -> ClientUpdate:
    """The reply of a client that learned nothing."""
    zeros = {
        record: {name: torch.zeros(shape) for name, shape in shapes.items()}
        for record, shapes in plan.schema("sends").items()
    }
    return ClientUpdate(name, examples, plan.sent(), plan.start, _reported(examples), records=zeros)


def _reported(examples: int) -> dict[str, float]:
    """What a client says of its training."""
    return {"loss": 1.0 + 1.0 / max(examples, 1), "steps": 4.0}


def replies(rule: Strategy, state: ServerState, count: int = 4) -> list[ClientUpdate]:
    """The replies of a :func:`fleet`."""
    return [reply(rule, state, site) for site in fleet(rule, count)]


def warm(rule: Strategy, dtype: torch.dtype = torch.float64, rounds: int = 2) -> ServerState:
    """A state in the middle of a run."""
    state = initial(rule, dtype)
    for _ in range(rounds):
        state = rule.aggregate(state, replies(rule, state))
    return state


def tensors_of(state: ServerState) -> dict[str, Tensor]:
    """Every tensor of a state by name."""
    flat = {f"adapter/{name}": t for name, t in state.adapter.tensors().items()}
    for module, f in state.delta.items():
        flat |= {f"delta/{module}/A": f.A, f"delta/{module}/B": f.B}
    return flat | {f"slot/{name}": t for name, t in state.slots.items()}


def same(x: ServerState, y: ServerState) -> bool:
    """Whether two states are equal to the last bit, in the same order."""
    a, b = tensors_of(x), tensors_of(y)
    return (
        x.round == y.round
        and list(a) == list(b)
        and all(torch.equal(a[name], b[name]) for name in a)
        and all(f.scale == y.adapter.factors[m].scale for m, f in x.adapter.factors.items())
    )


def function(adapter: Adapter, base: Mapping[str, Factors]) -> dict[str, Tensor]:
    """What a model computes: the dense change of every adapted weight, and the head."""
    change = {m: f.product().double() for m, f in adapter.factors.items()}
    for module, f in base.items():
        change[module] = change[module] + f.product().double()
    return change | {name: t.double() for name, t in adapter.head.items()}


def distance(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """The largest relative distance between tensors of the same name."""
    return max(float((x[k] - y[k]).norm() / y[k].norm().clamp_min(1e-12)) for k in y)
