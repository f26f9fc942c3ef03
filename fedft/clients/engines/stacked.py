"""Several sites' adapters side by side, and the layers that apply each to its own rows.

Written for :mod:`fedft.clients.engines.cohort`. The rows of all sites form one matrix; *segments* says how many
of them belong to each site, in order. A product with "each site's own matrix" is then K small
products on K slices, or one batched product where all slices have the same size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedft.core.optimizers import by_number, make
from fedft.core.optimizers import settings as optimizer_settings
from fedft.core.precise import widened, widest
from fedft.core.types import Adapter, Factors, LocalTraining, Part, part_of

Segments = tuple[int, ...]
"""Rows of each site, in order."""


# ----------------------------------------------------------------------- products by site


def _equal(segments: Segments) -> bool:
    return len(set(segments)) == 1


def times_own(x: Tensor, W: Tensor, segments: Segments) -> Tensor:
    """Each site's rows times its own matrix: [n, p] by [K, p, q] gives [n, q]."""
    if _equal(segments):
        return torch.bmm(x.reshape(len(segments), -1, x.shape[1]), W).view(x.shape[0], -1)
    out = x.new_empty(x.shape[0], W.shape[2])
    for x_k, W_k, out_k in zip(x.split(segments), W.unbind(), out.split(segments), strict=True):
        torch.mm(x_k, W_k, out=out_k)
    return out


def add_times_own_(out: Tensor, x: Tensor, W: Tensor, segments: Segments) -> Tensor:
    """``out += times_own(x, W)`` without the intermediate. out: [n, q]"""
    if _equal(segments):
        K = len(segments)
        out.view(K, -1, out.shape[1]).baddbmm_(x.reshape(K, -1, x.shape[1]), W)
        return out
    for out_k, x_k, W_k in zip(out.split(segments), x.split(segments), W.unbind(), strict=True):
        out_k.addmm_(x_k, W_k)
    return out


def outer_own(u: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Each site's ``u^T v``: [n, p] and [n, q] give [K, p, q]."""
    if _equal(segments):
        K = len(segments)
        return torch.bmm(u.reshape(K, -1, u.shape[1]).mT, v.reshape(K, -1, v.shape[1]))
    out = u.new_empty(len(segments), u.shape[1], v.shape[1])
    for u_k, v_k, out_k in zip(u.split(segments), v.split(segments), out.unbind(), strict=True):
        torch.mm(u_k.T, v_k, out=out_k)
    return out


# ------------------------------------------------------------------------- frozen weights

_onednn = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` in the fastest exact kernel. x: [n, p], weight: [q, p].

    float32 on a CPU goes to oneDNN, which runs at full vector width on every vendor's CPU; the
    default BLAS of torch reached 43 % of it on an AMD EPYC. Both compute in float32 throughout.
    """
    if _onednn is not None and x.dtype == torch.float32 and x.device.type == "cpu":
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class FrozenLinear(torch.autograd.Function):
    """:func:`frozen_linear` with a gradient for ``x`` only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return frozen_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return frozen_linear(grads[0], ctx.weight.T, None), None, None


@dataclass(frozen=True)
class Branch:
    """How the low-rank branch of one call is laid out.

    Attributes:
        segments: rows of each site.
        scale: LoRA's s: a number where all sites share it, else one for each row, [n, 1].
        wide: the input in the factors' dtype, [n, d_in].
        mask: dropout's mask times 1 / (1 - p), [n, d_in]; None without dropout.
    """

    segments: Segments
    scale: float | Tensor
    wide: Tensor
    mask: Tensor | None = None


class AdaptedLinear(torch.autograd.Function):
    """``y = x W^T + b + s ((x * mask) A_k^T R_k^T) B_k^T`` on the rows of site k.

    x: [n, d_in], W: [d_out, d_in] frozen, A: [K, r, d_in], Bt: [K, r, d_out] (B transposed, for
    the kernels' sake), R: [K, r, r] or None. The branch's gradient with respect to ``x`` is added into the base's in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        R: Tensor | None,
        branch: Branch,
    ) -> Tensor:
        y = frozen_linear(x, weight, bias)
        dropped = branch.wide if branch.mask is None else branch.wide * branch.mask
        h = times_own(dropped, A.mT, branch.segments)  # [n, r]
        c = h if R is None else times_own(h, R.mT, branch.segments)  # [n, r]
        c = c * branch.scale
        if y.dtype == c.dtype:
            add_times_own_(y, c, Bt, branch.segments)
        else:
            y += times_own(c, Bt, branch.segments)
        # All that is large goes through autograd, which can let go of it and make it again.
        ctx.save_for_backward(dropped, h if R is not None else None, c, A, Bt, R, branch.mask)
        ctx.weight, ctx.segments, ctx.scale = weight, branch.segments, branch.scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dropped, h, c, A, Bt, R, mask = ctx.saved_tensors
        segments, (need_x, _, _, need_A, need_B, need_R, _) = ctx.segments, ctx.needs_input_grad
        gy, gx, gA, gBt, gR = grads[0], None, None, None, None
        wide = gy.to(A.dtype)
        if need_B:
            gBt = outer_own(c, wide, segments)
        if need_A or need_R or need_x:
            gh = times_own(wide, Bt.mT, segments) * ctx.scale  # [n, r]
            if R is not None:
                gR = outer_own(gh, h, segments) if need_R else None
                gh = times_own(gh, R, segments)
            gA = outer_own(gh, dropped, segments) if need_A else None
            if need_x:
                gx = _input_gradient(gy, gh, ctx.weight, A, segments, mask)
        return gx, None, None, gA, gBt, gR, None


def _input_gradient(
    gy: Tensor, gh: Tensor, weight: Tensor, A: Tensor, segments: Segments, mask: Tensor | None
) -> Tensor:
    gx = frozen_linear(gy, weight.T, None)
    if mask is None and gx.dtype == A.dtype:
        return add_times_own_(gx, gh, A, segments)
    through = times_own(gh, A, segments)
    gx += through if mask is None else through * mask
    return gx


# ------------------------------------------------------------------------------- the stack


@dataclass(frozen=True)
class _Slot:
    """Where one tensor of every site lies in the flat buffer."""

    trains: bool
    offset: int
    shape: tuple[int, ...]


class Stack:
    """K adapters of one schema in two flat buffers: what trains, and what is frozen.

    One row a site, so that a norm, a proximal term and an optimiser step are single operations.
    B is held transposed, [r, d_out]: products with few columns are slow.
    Lower ranks are padded with zeros: zero rows under A, zero columns beside B. Their gradients are
    exactly zero (each is a product with the other pad), so the pads stay zero without a mask, under
    weight decay too.

    Args:
        adapters: one a site.
        train: the parts that learn.
        dtype: of the factors and of their optimiser state.
        device: where they live.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        train: frozenset[Part],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.adapters = adapters
        self.device = device
        self._slots = _slots(adapters, train)
        K = len(adapters)
        self.theta = torch.zeros(K, _width(self._slots, True), dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.theta)
        self._frozen = torch.zeros(K, _width(self._slots, False), dtype=dtype, device=device)
        for k, adapter in enumerate(adapters):
            for name, tensor in adapter.tensors().items():
                self._own(name, k, tensor.shape).copy_(tensor)

    def leaves(self, count: int) -> dict[str, Tensor]:
        """The first ``count`` sites' tensors by PEFT name, [count, *shape]; B is [count, r, d_out].

        What trains requires a gradient, see :meth:`backward`.
        """
        return {
            name: self._view(name)[:count].detach().requires_grad_(slot.trains)
            for name, slot in self._slots.items()
        }

    def backward(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Put the gradient of ``loss`` with respect to what trains into :attr:`grad`."""
        trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(
            loss, list(trained.values()), allow_unused=True, materialize_grads=True
        )
        for (name, leaf), gradient in zip(trained.items(), gradients, strict=True):
            self._view(name, self.grad)[: len(leaf)].copy_(gradient)

    def add_gradient(self, term: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Add the gradient of a scalar to :attr:`grad`, as far as it depends on what trains."""
        if not term.requires_grad:
            return
        trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(term, list(trained.values()), allow_unused=True)
        for (name, leaf), gradient in zip(trained.items(), gradients, strict=True):
            if gradient is not None:
                self._view(name, self.grad)[: len(leaf)].add_(gradient)

    def trains(self, name: str) -> bool:
        """Whether a tensor of this PEFT name is in :attr:`theta`."""
        return name in self._slots and self._slots[name].trains

    def own(self, name: str, k: int, flat: Tensor) -> Tensor:
        """One site's tensor in a buffer laid out as :attr:`theta`, without its padding. A view."""
        return self._own(name, k, self.adapters[k].tensors()[name].shape, flat)

    def gradient_norms(self, part: Part) -> Tensor:
        """Norm of the present gradient over one part of every site, [K], float64 if the device has it."""
        squares = torch.zeros(len(self.adapters), dtype=widest(self.device), device=self.device)
        for name, slot in self._slots.items():
            if slot.trains and part_of(name) == part:
                squares += widened(self._view(name, self.grad)).flatten(1).square().sum(1)
        return squares.sqrt()

    def read(self, k: int) -> Adapter:
        """Site k's adapter, unpadded, in the dtype that it came in, on the CPU."""
        start = self.adapters[k]
        trained = {
            name: self._own(name, k, tensor.shape).to("cpu", tensor.dtype, copy=True)
            for name, tensor in start.tensors().items()
        }
        return start.replaced({name: tensor.contiguous() for name, tensor in trained.items()})

    def _own(self, name: str, k: int, shape: Sequence[int], buffer: Tensor | None = None) -> Tensor:
        """One site's tensor without its padding, as adapters shape it. A view."""
        own = self._view(name, buffer)[k]
        own = own.T if part_of(name) == "B" else own
        return own[tuple(slice(size) for size in shape)]

    def _view(self, name: str, buffer: Tensor | None = None) -> Tensor:
        slot = self._slots[name]
        flat = (self.theta if slot.trains else self._frozen) if buffer is None else buffer
        size = torch.Size(slot.shape).numel()
        return flat[:, slot.offset : slot.offset + size].unflatten(1, slot.shape)


def _slots(adapters: Sequence[Adapter], train: frozenset[Part]) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    offsets = {True: 0, False: 0}
    named = [adapter.tensors() for adapter in adapters]
    for name in named[0]:
        shape = tuple(max(sizes) for sizes in zip(*(own[name].shape for own in named), strict=True))
        shape = shape[::-1] if part_of(name) == "B" else shape
        trains = part_of(name) in train
        slots[name] = _Slot(trains, offsets[trains], shape)
        offsets[trains] += torch.Size(shape).numel()
    return slots


def _width(slots: dict[str, _Slot], trains: bool) -> int:
    return sum(torch.Size(s.shape).numel() for s in slots.values() if s.trains == trains)


def same_layout(a: Adapter, b: Adapter) -> bool:
    """Whether two adapters can be stacked: the same tensors, apart from their ranks."""

    def layout(f: Factors) -> tuple[object, ...]:
        return (*f.shape, f.R is None)

    def sizes(adapter: Adapter) -> object:
        factors = {path: layout(f) for path, f in adapter.factors.items()}
        return factors, {name: tensor.shape for name, tensor in adapter.head.items()}

    return sizes(a) == sizes(b)


# --------------------------------------------------------------------------- optimisation


class StackOptimizer:
    """One optimiser for K sites, each with its own settings, as torch would run K of them.

    Where every number is stepped by itself, a site's trained tensors are one row of the stack, one
    parameter of the optimiser; else each of its tensors is one, without padding.

    Args:
        stack: whose rows learn.
        settings: one a site, all of the same ``optimizer``.
        rates: of each site: its learning rate by step; None where it is constant.
    """

    def __init__(
        self,
        stack: Stack,
        settings: Sequence[LocalTraining],
        rates: Sequence[Callable[[int], float] | None] | None = None,
    ) -> None:
        self._stack = stack
        self._joined = by_number(settings[0].optimizer)
        self._parameters = [
            [tensor.detach().requires_grad_() for tensor in self._of(k, stack.theta)]
            for k in range(len(settings))
        ]
        keys: list[
            Any
        ] = []  # what a group has in common: its settings, or the rate of its one site
        groups: list[dict[str, Any]] = []
        own_rates = [None] * len(settings) if rates is None else rates
        for own, mine, rate in zip(settings, self._parameters, own_rates, strict=True):
            options = optimizer_settings(own)
            key = options if rate is None else rate
            if key not in keys:
                keys.append(key)
                groups.append({"params": [], **options})
            groups[keys.index(key)]["params"] += mine
        self._optimizer = make(settings[0], groups, foreach=True)
        made = zip(keys, self._optimizer.param_groups, strict=True)
        self._scheduled = [(key, group) for key, group in made if callable(key)]
        device, dtype = stack.device, stack.theta.dtype
        clips = [float("inf") if s.clip_norm is None else s.clip_norm for s in settings]
        self._clip = torch.tensor(clips, dtype=dtype, device=device)
        self._clips = any(s.clip_norm is not None for s in settings)

    def step(self, count: int, at: int = 0, *, clip: bool = True) -> None:
        """Clip each site's gradient by its own norm and step the first ``count`` sites.

        Args:
            count: sites that have a gradient.
            at: number of the step in the round, from 0 on.
            clip: whether to clip.
        """
        grad = self._stack.grad[:count]
        if self._clips and clip:  # as torch.nn.utils.clip_grad_norm_
            norm = torch.linalg.vector_norm(grad, dim=1)
            grad.mul_((self._clip[:count] / (norm + 1e-6)).clamp_(max=1.0)[:, None])
        for k, mine in enumerate(self._parameters):
            gradients = self._of(k, self._stack.grad) if k < count else [None] * len(mine)
            for parameter, gradient in zip(mine, gradients, strict=True):
                parameter.grad = gradient
        for rate, group in self._scheduled:
            group["lr"] = rate(at)
        self._optimizer.step()

    def _of(self, k: int, flat: Tensor) -> list[Tensor]:
        """One site's numbers as the optimiser sees them: its row, or its tensors. Views"""
        if self._joined:
            return [flat[k]]
        names = self._stack.adapters[k].tensors()
        return [self._stack.own(name, k, flat) for name in names if self._stack.trains(name)]


def frozen(linear: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """A frozen layer with its weight as :func:`weight_of` has it. [..., d_in] → [..., d_out]"""
    y: Any = FrozenLinear.apply(x.reshape(-1, x.shape[-1]), weight, linear.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as [d_out, d_in]; a view, so that a shift of the base is seen."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.T
