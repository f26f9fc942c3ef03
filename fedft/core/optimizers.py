"""The optimisers of torch, by their names and with their options."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fedft.core.names import hint


class Settings(Protocol):
    """What is read of :class:`~fedft.core.training.LocalTraining`."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


_REFUSED = {
    "lbfgs": "it evaluates the loss several times a step",
    "sparseadam": "it takes sparse gradients, and an adapter's are dense",
}

_WHOLE = frozenset({"adafactor", "muon"})
"""Optimisers whose step of one number depends on the rest of its tensor."""

_OURS = frozenset({"params", "lr", "foreach", "fused", "maximize", "capturable", "differentiable"})
"""Arguments that say how a step is computed, or what stands elsewhere in the configuration."""


@cache
def _classes() -> Mapping[str, type[torch.optim.Optimizer]]:
    found = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return {
        name.lower(): kind
        for name, kind in sorted(found.items())
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }


def names() -> list[str]:
    """The optimisers that local training can use, in lower case."""
    return [name for name in _classes() if name not in _REFUSED]


def name_of(given: str) -> str:
    """An optimiser's name as plans write it, from the name of its class in any case.

    Raises:
        ValueError: torch has no such optimiser, or local training cannot use it.
    """
    name = given.lower()
    if why := _REFUSED.get(name):
        raise ValueError(f"torch's {given[:100]!r} cannot be used: {why}")
    if name not in _classes():
        raise ValueError(f"torch.optim has no {given[:100]!r}; {hint(name, names())}")
    return name


def takes(name: str) -> list[str]:
    """The options of an optimiser, by torch's names."""
    return [key for key in inspect.signature(_classes()[name]).parameters if key not in _OURS]


def by_number(name: str) -> bool:
    """Whether every number is stepped by itself, so that a tensor may be cut or joined to others."""
    return name not in _WHOLE


def check(training: Settings) -> None:
    """Refuse an optimiser or options that torch does not take.

    Raises:
        ValueError: naming the key.
    """
    name = training.optimizer
    if name != name_of(name):
        raise ValueError(f"optimizer = {name!r} is not in lower case")
    known = takes(name)
    for key in training.options:
        if key not in known:
            raise ValueError(f"optimizer {name}: no option {key!r}; it has {', '.join(known)}")
    for key, value in (("momentum", training.momentum), ("weight_decay", training.weight_decay)):
        if value and key in training.options:
            word = key.replace("_", "-")
            raise ValueError(f"{word} stands in [training] and among the optimiser's options")
        if value and key not in known:
            raise ValueError(f"{key.replace('_', '-')} = {value:g}: {name} has none; leave it out")
    make(training, [{"params": [torch.zeros(2, 2, requires_grad=True)], **settings(training)}])


def settings(training: Settings) -> dict[str, Any]:
    """Arguments of the optimiser's class but for its parameters, as a group of parameters has them."""
    known, given = takes(training.optimizer), dict(training.options)
    own: dict[str, Any] = {"lr": training.lr}
    tuples = {k: tuple(cast(list[Any], v)) for k, v in given.items() if isinstance(v, list)}
    if "weight_decay" in known:
        own["weight_decay"] = training.weight_decay
    if "momentum" in known and (training.momentum or training.optimizer == "sgd"):
        own["momentum"] = training.momentum
    return {**own, **given, **tuples}


def make(
    training: Settings, groups: Sequence[dict[str, Any]], *, foreach: bool | None = None
) -> torch.optim.Optimizer:
    """A fresh optimiser over groups of parameters that have their settings with them.

    Args:
        training: whose optimiser it is.
        groups: as torch takes them.
        foreach: of SGD: whether all parameters are stepped in one call.

    Raises:
        ValueError: torch does not take these settings, or not for these tensors.
    """
    name = training.optimizer
    if name == "adamw":
        how: dict[str, Any] = {"fused": True}
    else:
        how = {"foreach": foreach} if name == "sgd" and foreach else {}
    made: Any = _classes()[name]
    try:
        # The arguments are those of the groups, and checked as the class checks its own.
        first = {k: v for k, v in groups[0].items() if k != "params"}
        return made(list(groups), **first, **how)
    except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
        where = "; momentum is a key of [training]" if "momentum" in str(error).lower() else ""
        raise ValueError(f"optimizer {name}: {error}{where}") from error


def check_shapes(training: Settings, shapes: Sequence[Sequence[int]]) -> None:
    """Refuse an optimiser that takes no tensors of some of these shapes.

    Raises:
        ValueError: as torch says it.
    """
    if not by_number(training.optimizer):
        tensors = [torch.empty(*shape, requires_grad=True) for shape in shapes]
        make(training, [{"params": tensors, **settings(training)}])


def numbers_kept(training: Settings) -> int:
    """Numbers of state that the optimiser keeps for each one that learns, tried out on a tensor."""
    probe = torch.zeros(4, 4, requires_grad=True)
    optimizer = make(training, [{"params": [probe], **settings(training)}])
    probe.grad = torch.ones_like(probe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    kept = [x for x in optimizer.state[probe].values() if isinstance(x, Tensor) and x.ndim]
    return -(-sum(x.numel() for x in kept) // probe.numel())


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
