"""What a client does beside plain steps, for K clients at once; the plain loop is K = 1.

An engine trains K clients as rows: what trains of client k, end to end, is row k of ``theta``, and its
gradient is row k of ``grad``. A method looks at the rows before the first step, may make the
gradient itself, corrects every gradient before it is clipped, and says in the end which records of
tensors travel back or stay. It never mixes rows: mathematically every client trains alone.

To add a method, write a term in :mod:`fedft.core.terms`, one file here with a subclass of
:class:`Method`, and a row in :data:`fedft.clients.methods.METHODS`; ``tests/clients/methods`` holds every
row to the same laws.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedft.core.terms import Term
from fedft.core.types import TrainPlan


class Rows(Protocol):
    """The clients in training, as an engine lays them out.

    Attributes:
        plans: one a client, those with most steps first.
        theta: what trains, [K, n]. Where ranks differ, the lower ones are padded with zeros.
        grad: the gradient of the step in hand, [K, n]; zero in the padding.
    """

    @property
    def plans(self) -> Sequence[TrainPlan]: ...
    @property
    def theta(self) -> Tensor: ...
    @property
    def grad(self) -> Tensor: ...

    def laid(self, record: str) -> Tensor:
        """A record of the plans as rows, zero where a client has none of it. [K, n]

        A tensor that was kept at another rank counts as far as it goes.
        """
        ...

    def leaves(self, count: int) -> dict[str, Tensor]:
        """The first ``count`` clients' tensors by PEFT name; those that train require a gradient.

        Each is [count, *shape] in the engine's own layout: see :meth:`beyond`.
        """
        ...

    def beyond(self, name: str, leaf: Tensor, first: Sequence[int]) -> Tensor:
        """What of a factor A or B lies beyond a rank. [count, …]

        Args:
            name: of the factor.
            leaf: as :meth:`leaves` has it.
            first: the first rank of each client that counts; what lies before it is zero, or left out.
        """
        ...

    def add_gradient(self, term: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Add the gradient of a term that depends on the weights alone to :attr:`grad`.

        Args:
            term: a scalar; the sum over the clients.
            leaves: that it was computed from.
        """
        ...


class Losses(Protocol):
    """The step in hand, for a method that makes the gradient itself."""

    def mean(self) -> Tensor:
        """Each client's mean loss at the present ``theta``, without gradients. [count]

        What the first call gives is what the client reports as the loss of this step.
        """
        ...

    def by_example(self) -> list[Tensor]:
        """The gradient of each example's own loss: [examples, *shape] for each tensor that trains.

        In the order of ``theta``; one client at a time, and for methods that are ``by_example`` only.

        Raises:
            MismatchError: a tensor trains in a layer whose gradients cannot be told by example.
        """
        ...


class Method:
    """Base of every method. What it does not override is plain local training.

    Args:
        rows: the clients, before the first step.
        terms: what each of them is asked for; None where a client is not asked for this method.

    Attributes:
        term: what a plan asks for it with.
        makes_gradient: it may take the place of the backward pass, see :meth:`gradient`.
        by_example: it needs gradients example by example, which only the plain loop has.
        silent: a client reports nothing but the number of its steps.
    """

    term: ClassVar[type[Term]]
    makes_gradient: ClassVar[bool] = False
    by_example: ClassVar[bool] = False
    silent: ClassVar[bool] = False

    def __init__(self, rows: Rows, terms: Sequence[Any]) -> None:
        """Look at the rows before the first step."""

    def gradient(self, rows: Rows, losses: Losses) -> bool:
        """Make the step's gradient, in place of a backward pass; False leaves it to the engine.

        A method that says True has written ``rows.grad``, which is not clipped then, and left
        ``rows.theta`` as it was. At most one method of a plan may.
        """
        return False

    def correct(self, rows: Rows, count: int) -> None:
        """Change ``rows.grad`` of the first ``count`` clients in place, before it is clipped."""

    def end(self, rows: Rows, steps: Sequence[int]) -> Mapping[str, Tensor]:
        """After the last step: record → its rows, [K, n].

        Args:
            rows: the clients.
            steps: how many each of them took; may be zero.

        Returns:
            The records that the term sends or keeps. What a record of other shapes than those that
            train consists of is said by its term, and its rows are [K, numbers] in that order.
        """
        return {}


def column(rows: Rows, values: Sequence[float]) -> Tensor:
    """One number a client, to multiply rows by. [K, 1]"""
    return torch.tensor(values, dtype=rows.theta.dtype, device=rows.theta.device)[:, None]


def strengths(rows: Rows, terms: Sequence[Term | None], name: str) -> Tensor:
    """A field of the terms as :func:`column`; zero where a client has no such term. [K, 1]"""
    return column(rows, [0.0 if t is None else float(getattr(t, name)) for t in terms])
