"""HydraLoRA's adapter: one A, several B and a router in every adapted layer.

    y = W x + s sum_i w_i(x) B_i A x        w(x) = softmax(W_g x)        A [r, d_in], B_i [d_out, r],
                                                                         W_g [N, d_in]

    Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
    NeurIPS 2024, arXiv:2404.19245.

An adapter of this kind carries its tensors whole, under the names ``….lora_A.weight``,
``….lora_B.<i>.weight`` and ``….lora_router.weight``. With one head the softmax is 1 whatever the
router says, so there is none, and the method is plain LoRA.
"""

# pyright: standard
# safetensors is typed in part.
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedft.core import seeds
from fedft.core.adapters.base import Export, Family, Modules, Shapes
from fedft.core.adapters.files import UNREADABLE, read_json, read_tensors, save_adapter
from fedft.core.adapters.scale import scale_of
from fedft.core.algebra import uniform_rows
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.files import write_file
from fedft.core.spec import LoraSpec
from fedft.core.types import (
    Adapter,
    Factors,
    factor_name,
    head_name,
    head_of,
    module_of,
    part_of,
)


def shapes(
    modules: Mapping[str, tuple[int, int]], rank: int, heads: int
) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor; ``modules`` maps a path to (d_out, d_in)."""
    found: dict[str, tuple[int, ...]] = {}
    for module, (d_out, d_in) in modules.items():
        found[factor_name(module, "A")] = (rank, d_in)
        if heads > 1:
            found[factor_name(module, "router")] = (heads, d_in)
        found |= {head_name(module, i): (d_out, rank) for i in range(heads)}
    return found


def initial(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """What training starts from, a function of the seed.

    A and the router are uniform in ±1/sqrt(d_in) (Kaiming with a = sqrt(5)), every B is zero, as
    in the authors' code. The heads differ through the router alone: with a router of zeros they
    would stay equal for ever.
    """

    def start(name: str, shape: tuple[int, ...]) -> Tensor:
        if (part := part_of(name)) == "B":
            return torch.zeros(shape)
        rows, columns = shape
        return uniform_rows(rows, columns, seeds.derive(seed, f"lora_{part}", module_of(name)))

    return {name: start(name, shape) for name, shape in shapes.items()}


def modules(adapter: Adapter) -> list[str]:
    """The adapted layers, in the order of the model."""
    return [module_of(name) for name in adapter.head if part_of(name) == "A"]


def head_count(adapter: Adapter) -> int:
    """N; 0 where this is no such adapter."""
    return 1 + max((i for name in adapter.head if (i := head_of(name)) is not None), default=-1)


def heads_of(adapter: Adapter, module: str) -> list[Tensor]:
    """B_1 … B_N of one layer, each [d_out, r]."""
    return [adapter.head[head_name(module, i)] for i in range(head_count(adapter))]


def mixed(adapter: Adapter, scale: float, weights: Sequence[float]) -> Adapter:
    """Plain LoRA with B = sum_i w_i B_i: what a layer does to inputs that the router gives w.

    Args:
        adapter: of HydraLoRA.
        scale: LoRA's s.
        weights: one a head. Equal ones that sum to 1 are the uniform merge; a one among zeros is
            a single head.
    """

    def merged(module: str) -> Tensor:
        chosen = [(w, B) for w, B in zip(weights, heads_of(adapter, module), strict=True) if w]
        if len(chosen) == 1 and chosen[0][0] == 1:
            return chosen[0][1]
        total = torch.zeros_like(chosen[0][1], dtype=torch.float64)
        for w, B in chosen:
            total.add_(B, alpha=w)
        return total.to(chosen[0][1].dtype)

    factors = {
        module: Factors(adapter.head[factor_name(module, "A")], merged(module), scale)
        for module in modules(adapter)
    }
    return Adapter(factors, {n: t for n, t in adapter.head.items() if part_of(n) == "head"})


def cosines(adapter: Adapter) -> Tensor:
    """Cosine between every two heads, each taken over all layers, in float64. [N, N]

    A head that is still zero has a cosine of 0 with every head, itself too.
    """
    count = head_count(adapter)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for module in modules(adapter):
        rows = torch.stack([B.double().flatten() for B in heads_of(adapter, module)])
        gram += rows @ rows.T
    norms = gram.diagonal().sqrt()
    return gram / torch.outer(norms, norms).clamp_min(torch.finfo(torch.float64).tiny)


# ── the family ────────────────────────────────────────────────────────────────────────────────

MIXTURE = "mixture"
"""File name, without its ending, of all heads and routers of a HydraLoRA adapter."""


class HydraLoRA(Family):
    """See the module."""

    name = "hydralora"
    stock = False  # no LoRA adapter can hold gates that depend on the input
    note = (
        "What PEFT loads is the mean of the heads; "
        "`fedft.load_mixture(FOLDER)` gives the whole mixture."
    )

    def check(self, lora: LoraSpec) -> None:
        """It needs the number of its heads, and has no options of peft.

        Raises:
            ConfigError: naming the key.
        """
        if lora.heads is None:
            raise ConfigError(
                "[lora] method = 'hydralora' needs the number of its heads",
                fix="Set it, such as heads = 4.",
            )
        if lora.options:
            raise ConfigError(
                "[lora] options are those of a peft method, not of 'hydralora'",
                fix="Leave them out.",
            )

    def shapes(self, model: nn.Module, lora: LoraSpec, modules: Modules) -> Shapes:
        """A, the router and every B of each layer."""
        return shapes(modules, lora.rank, _heads(lora))

    def initial(self, shapes: Shapes, seed: int) -> dict[str, Tensor]:
        """See :func:`initial`."""
        return initial(shapes, seed)

    def save(self, folder: Path, export: Export) -> None:
        """Write what stock peft can load of it, and all of it.

        ``folder`` itself is a LoRA adapter with the uniform mean of the heads, ``head-<i>`` one with
        head i alone; ``mixture.safetensors`` and ``mixture.json`` hold every head and the routers,
        for :func:`fedft.load_mixture`.
        """
        adapter, model = export.adapter, export.model
        scale, count = scale_of(export.lora, adapter.rank), head_count(adapter)
        about: dict[str, Any] = {
            "task": model.task,
            "base": model.source,
            "revision": model.revision,
        }
        extra: dict[str, Any] = {"head": export.head, "beside": export.beside}
        save_adapter(folder, mixed(adapter, scale, [1 / count] * count), {}, **about, **extra)
        for i in range(count):
            alone = mixed(adapter, scale, [float(i == j) for j in range(count)])
            save_adapter(folder / f"head-{i}", alone, {}, **about, **extra)
        sizes = {"heads": count, "rank": adapter.rank, "scale": scale, "classes": export.classes}
        tensors = {name: t.contiguous() for name, t in adapter.head.items()}
        write_file(folder / f"{MIXTURE}.safetensors", save(tensors, {"format": "pt"}))
        text = json.dumps(about | sizes, indent=2)
        write_file(folder / f"{MIXTURE}.json", text.encode() + b"\n")


def _heads(lora: LoraSpec) -> int:
    assert lora.heads is not None, "checked with the table"
    return lora.heads


def load_mixture(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read what :meth:`HydraLoRA.save` wrote: the adapter, and ``task, base, revision, heads, rank, scale, classes``.

    Raises:
        MismatchError: it is no folder of a HydraLoRA adapter.
    """
    try:
        config = read_json(folder / f"{MIXTURE}.json")
        adapter = Adapter({}, read_tensors(folder / f"{MIXTURE}.safetensors"))
        scaled = float(config["scale"]) > 0 and head_count(adapter) == config["heads"] > 0
    except UNREADABLE as error:
        raise MismatchError(
            f"{folder} holds no readable HydraLoRA mixture: {error}",
            fix="Export it from a run with [lora] method = 'hydralora'.",
        ) from error
    if not scaled:
        raise MismatchError(f"{folder}: mixture.json does not describe mixture.safetensors")
    return adapter, config
