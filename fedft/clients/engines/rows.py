"""What the methods of :mod:`fedft.clients.methods` see of an engine: K clients as rows.

:class:`StackRows` is the cohort engine's stack as it stands. The plain loop has one client, whose
tensors lie in the model: :class:`LoopRows` is a copy of them, brought up to date around every step.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedft.clients.engines.stacked import Stack
from fedft.core.terms import Shapes
from fedft.core.types import TrainPlan, part_of


class StackRows:
    """The clients of a cohort, see :class:`fedft.clients.methods.Rows`."""

    def __init__(self, plans: Sequence[TrainPlan], stack: Stack) -> None:
        self.plans, self._stack = plans, stack
        self.theta, self.grad = stack.theta, stack.grad
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def laid(self, record: str) -> Tensor:
        """See :class:`fedft.clients.methods.Rows`."""
        flat = torch.zeros_like(self.theta)
        for k, plan in enumerate(self.plans):
            for name, tensor in plan.records.get(record, {}).items():
                if self._stack.trains(name):
                    copy_shared(self._stack.own(name, k, flat), tensor)
        return flat

    def leaves(self, count: int) -> dict[str, Tensor]:
        """See :class:`fedft.clients.methods.Rows`; B is [count, r, d_out]."""
        return self._stack.leaves(count)

    def beyond(self, name: str, leaf: Tensor, first: Sequence[int]) -> Tensor:
        """See :class:`fedft.clients.methods.Rows`; pads count too: they are zero."""
        key = tuple(first)
        if key not in self._masks:
            ranks = torch.arange(leaf.shape[1]) >= torch.tensor(key)[:, None]
            self._masks[key] = ranks[..., None].to(leaf)  # [count, r, 1]
        return leaf * self._masks[key]

    def add_gradient(self, term: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """See :class:`fedft.clients.methods.Rows`."""
        self._stack.add_gradient(term, leaves)

    def named(self, flat: Tensor, k: int) -> dict[str, Tensor]:
        """Rows as one client's tensors by PEFT name, without padding. Views"""
        return {
            name: self._stack.own(name, k, flat)
            for name in self.plans[k].start.tensors()
            if self._stack.trains(name)
        }


class StackLosses:
    """The step in hand, see :class:`fedft.clients.methods.Losses`.

    Attributes:
        first: what the first call of :meth:`mean` gave; None without any.
    """

    def __init__(self, means: Callable[[], Tensor]) -> None:
        self._means = means
        self.first: Tensor | None = None

    def mean(self) -> Tensor:
        """See :class:`fedft.clients.methods.Losses`."""
        means = self._means()
        self.first = means if self.first is None else self.first
        return means

    def by_example(self) -> list[Tensor]:
        """No method that asks for it gets this far: see :meth:`CohortEngine.train`."""
        raise NotImplementedError


class LoopRows:
    """The one client of the plain loop, see :class:`fedft.clients.methods.Rows`.

    Args:
        plan: of the client.
        trained: what trains, by PEFT name.
        frozen: the rest of the adapter.
    """

    def __init__(
        self,
        plan: TrainPlan,
        trained: Mapping[str, nn.Parameter],
        frozen: Mapping[str, nn.Parameter],
    ) -> None:
        self.plans = (plan,)
        self._trained, self._frozen = trained, frozen
        self.theta = torch.cat([p.detach().reshape(-1) for p in trained.values()])[None]
        self.grad = torch.zeros_like(self.theta)

    def laid(self, record: str) -> Tensor:
        """See :class:`fedft.clients.methods.Rows`."""
        flat = torch.zeros_like(self.theta)
        views = self.named(flat, 0)
        for name, tensor in self.plans[0].records.get(record, {}).items():
            if name in views:
                copy_shared(views[name], tensor)
        return flat

    def leaves(self, count: int) -> dict[str, Tensor]:
        """See :class:`fedft.clients.methods.Rows`; B is [1, d_out, r]."""
        frozen = {name: p.detach()[None] for name, p in self._frozen.items()}
        return frozen | {n: p.detach()[None].requires_grad_() for n, p in self._trained.items()}

    def beyond(self, name: str, leaf: Tensor, first: Sequence[int]) -> Tensor:
        """See :class:`fedft.clients.methods.Rows`."""
        return leaf[:, :, first[0] :] if part_of(name) == "B" else leaf[:, first[0] :]

    def add_gradient(self, term: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """See :class:`fedft.clients.methods.Rows`."""
        if not term.requires_grad:
            return
        mine = self.named(self.grad, 0)
        found = torch.autograd.grad(term, [leaves[n] for n in mine], allow_unused=True)
        for view, gradient in zip(mine.values(), found, strict=True):
            if gradient is not None:
                view.add_(gradient[0])

    def named(self, flat: Tensor, k: int) -> dict[str, Tensor]:
        """Rows as the client's tensors by PEFT name. Views"""
        parts = flat[k].split([p.numel() for p in self._trained.values()])
        named = zip(self._trained.items(), parts, strict=True)
        return {name: part.view(p.shape) for (name, p), part in named}

    def take(self) -> None:
        """The model's tensors and gradients into the rows; what has no gradient has zero."""
        gradients = self.named(self.grad, 0)
        for (name, view), p in zip(
            self.named(self.theta, 0).items(), self._trained.values(), strict=True
        ):
            view.copy_(p.detach())
            if p.grad is None:
                gradients[name].zero_()
            else:
                gradients[name].copy_(p.grad)

    def give(self) -> None:
        """The rows' gradient into the model; what has none, and got none, is left without."""
        for name, gradient in self.named(self.grad, 0).items():
            p = self._trained[name]
            if p.grad is not None or bool(gradient.any()):
                p.grad = gradient.to(p.dtype, copy=True)

    def put(self) -> None:
        """The rows' tensors into the model."""
        for name, view in self.named(self.theta, 0).items():
            self._trained[name].data.copy_(view)


def copy_shared(target: Tensor, source: Tensor) -> None:
    """Copy as many rows and columns as both have: a record may have been kept at another rank."""
    both = tuple(slice(min(a, b)) for a, b in zip(target.shape, source.shape, strict=True))
    target[both].copy_(source[both])


def records(
    rows: StackRows | LoopRows, k: int, ends: Sequence[Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """What the methods leave of client ``k``, as the schema of its plan has it, on the CPU."""
    plan = rows.plans[k]
    wanted = {**plan.schema("keeps"), **plan.schema("sends")}
    found = {name: flat for end in ends for name, flat in end.items()}
    return {record: _record(rows, k, found[record], shapes) for record, shapes in wanted.items()}


def _record(rows: StackRows | LoopRows, k: int, flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    named = rows.named(flat, k) if flat.shape == rows.theta.shape else {}
    if not shapes.keys() <= named.keys():  # of numbers of its own, end to end
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        parts = flat[k].split(sizes)
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
    return {
        name: named[name].detach().to("cpu", torch.float32, copy=True).contiguous()
        for name in shapes
    }
