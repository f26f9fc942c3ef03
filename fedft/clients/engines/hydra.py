"""Local training of HydraLoRA: one A, several B and a router in every adapted layer."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fedft.clients.engines.loop import LoopEngine
from fedft.core.adapters.scale import scale_of
from fedft.core.models import Base, weight_shape
from fedft.core.overrides import overridden
from fedft.core.spec import LoraSpec
from fedft.core.types import Adapter, TrainPlan, factor_name, head_name


class HydraLinear(nn.Module):
    """``y = W x + s sum_i w_i(x) B_i A x`` with ``w(x) = softmax(W_g x)``, for every token alone.

    The router reads the layer's full input, and its softmax is in float32, as in the authors'
    code. All heads are one product: ``sum_i w_i B_i h`` is ``[B_1 … B_N]`` times ``w ⊗ h``.
    Dropout masks the shared ``A x`` once; the authors' code draws another mask for every head.

    Args:
        linear: the frozen layer.
        rank: r.
        heads: N; one head has no router, and is LoRA as peft computes it.
        scale: s.
        dropout: probability of dropping an input of A.
    """

    def __init__(
        self, linear: nn.Module, rank: int, heads: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        d_out, d_in = weight_shape(linear)
        self.base_layer = linear
        self.scale = scale
        self.lora_A = nn.Parameter(torch.zeros(rank, d_in))
        self.lora_B = nn.ParameterList([torch.zeros(d_out, rank) for _ in range(heads)])
        self.lora_router = nn.Parameter(torch.zeros(heads, d_in)) if heads > 1 else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., d_in] → [..., d_out], in the dtype of the frozen layer."""
        frozen = self.base_layer(x)
        x = x.to(self.lora_A.dtype)
        h = nn.functional.linear(self.dropout(x), self.lora_A)  # [..., r]
        if self.lora_router is None:
            update = nn.functional.linear(h, self.lora_B[0])
        else:
            w = self.weights(x).to(h.dtype)
            gated = (w.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)  # [..., N r]
            update = nn.functional.linear(gated, torch.cat(list(self.lora_B), dim=1))
        return (frozen + update * self.scale).to(frozen.dtype)

    def weights(self, x: Tensor) -> Tensor:
        """The router's w(x), positive and of sum 1. [..., N] float32"""
        if self.lora_router is None:
            return x.new_ones(*x.shape[:-1], 1, dtype=torch.float32)
        return nn.functional.linear(x, self.lora_router).float().softmax(-1)


def install(
    model: nn.Module,
    targets: Iterable[tuple[str, nn.Module]],
    *,
    rank: int,
    heads: int,
    scale: float,
    dropout: float = 0.0,
) -> dict[str, HydraLinear]:
    """Put HydraLoRA around linear layers of a model, in place; path → the new layer."""
    layers: dict[str, HydraLinear] = {}
    for path, linear in targets:
        layer = HydraLinear(linear, rank, heads, scale, dropout)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        layers[path] = layer.to(next(linear.parameters()).device)
    return layers


def fill(layers: dict[str, HydraLinear], adapter: Adapter) -> None:
    """Put an adapter's tensors into the layers; they require no gradient."""
    for name, parameter in named(layers):
        parameter.data = adapter.head[name].to(parameter.device, copy=True)
        parameter.requires_grad_(False)


def named(layers: dict[str, HydraLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors of the layers, by the names that they travel under."""
    for path, layer in layers.items():
        yield factor_name(path, "A"), layer.lora_A
        if layer.lora_router is not None:
            yield factor_name(path, "router"), layer.lora_router
        for i, B in enumerate(layer.lora_B):
            yield head_name(path, i), B


class HydraEngine(LoopEngine):
    """Trains sites' HydraLoRA adapters, one site after another."""

    def __init__(self, base: Base, lora: LoraSpec, *, checkpointing: bool = False) -> None:
        assert lora.heads is not None
        self._layers = install(
            base.model,
            base.adapted.items(),
            rank=lora.rank,
            heads=lora.heads,
            scale=scale_of(lora, lora.rank),
            dropout=lora.dropout,
        )
        super().__init__(base, base.model.eval(), checkpointing=checkpointing)

    def _layers_named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return named(self._layers)

    @contextmanager
    def _off(self) -> Iterator[None]:
        with ExitStack() as undo:
            for layer in self._layers.values():
                undo.enter_context(overridden(layer, layer.base_layer))
            yield

    def _dropouts(self) -> Iterable[nn.Module]:
        return [layer.dropout for layer in self._layers.values()]

    def _load(self, adapter: Adapter, plan: TrainPlan | None) -> None:
        fill(self._layers, adapter)
        for name, parameter in named(self._layers):
            parameter.requires_grad_(plan is not None and plan.trains(name))
            parameter.grad = None
        self._load_head(adapter, plan)


def mixture(base: Base, lora: LoraSpec, adapter: Adapter) -> nn.Module:
    """The base's own model with an adapter's heads and routers in it, for inference."""
    HydraEngine(base, lora)._load(adapter, None)
    return base.model
