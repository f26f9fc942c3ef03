"""What FedAsync and FedBuff share: the weight of a stale update, and moving it to the present.

An update is stale by tau when the server has made tau updates since the version that the site
started from; tau = 0 is what a synchronous round consists of. Its weight s(tau) is one of

    constant     1
    polynomial   (1 + tau)^-a
    hinge        1 where tau <= b, else 1 / (1 + a (tau - b))

    Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019, arXiv:1903.03934.

Both rules add a change, entry by entry, to a state that the site has not seen. That means something
only where entries keep their meaning from version to version and all sites have one rank; over
other rules they are refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor

from fedft.core.parts import ALL_PARTS
from fedft.core.types import Adapter, ClientUpdate
from fedft.strategies.base import Strategy


class Staleness(BaseModel):
    """How the weight of an update falls with its staleness.

    Attributes:
        kind: ``constant``, ``polynomial`` or ``hinge``.
        a: exponent of ``polynomial``, slope of ``hinge``.
        b: server updates that ``hinge`` forgives.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["constant", "polynomial", "hinge"] = "polynomial"
    a: PositiveFloat = 0.5
    b: Annotated[int, Field(ge=0)] = 4

    def weight(self, tau: int) -> float:
        """s(tau), in (0, 1]."""
        if self.kind == "polynomial":
            return float((1 + tau) ** -self.a)
        if self.kind == "hinge" and tau > self.b:
            return 1 / (1 + self.a * (tau - self.b))
        return 1.0


def refreshed(
    updates: Sequence[ClientUpdate],
    present: Adapter,
    move: Callable[[ClientUpdate, Tensor, Tensor, Tensor], Tensor],
) -> list[ClientUpdate]:
    """The updates as if their sites had started from the present state.

    Args:
        updates: each with its staleness.
        present: the global adapter.
        move: (update, x, x_start, y) → what takes the place of y, in float64: x is the present
            tensor, x_start the one the site started from, y the one it sent.
    """
    x = present.tensors()
    moved: list[ClientUpdate] = []
    for u in updates:
        then = u.start.tensors()
        tensors = {
            name: move(u, x[name].double(), then[name].double(), y.double()).to(y.dtype)
            for name, y in u.tensors.items()
        }
        moved.append(replace(u, tensors=tensors, start=present, staleness=0))
    return moved


def check_inner(name: str, inner: Strategy) -> None:
    """Refuse rules under which a stale change means nothing.

    Raises:
        ValueError: ``inner`` re-draws tensors, takes mixed ranks, or is asynchronous itself.
    """
    if inner.buffer_size is not None:
        raise ValueError(f"{name} goes over a synchronous rule: its inner rule is asynchronous")
    if inner.comparable != ALL_PARTS or inner.mixed_ranks:
        raise ValueError(
            f"{name} adds stale changes entry by entry, and its inner rule re-draws factors or mixes "
            "ranks; choose one that does not, such as fedavg-lora, ffa-lora, lora-fair or fedex-lora"
        )
