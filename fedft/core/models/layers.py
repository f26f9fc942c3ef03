"""What of a model is adapted, in which shapes, and from where the adapter starts."""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedft.core import seeds
from fedft.core.adapters import family_of
from fedft.core.adapters.scale import scale_of
from fedft.core.adapters.tuners import chosen, norms, tuner_of
from fedft.core.algebra import uniform_rows
from fedft.core.checkpoint import (
    Head,
    empty,
    head_of,
)
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.models.source import resolve
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import PREFIX, Adapter, Factors, block_of


@dataclass(frozen=True)
class Schema:
    """Shapes of what is fine-tuned, in the order of the model.

    Attributes:
        modules: path of each adapted linear layer → (d_out, d_in).
        head: PEFT name of each head tensor → shape.
        names: what ``target-modules`` comes to in this model.
        saved: of the head, what peft has to be told of it; see :class:`~fedft.core.checkpoint.Head`.
        separable: whether a block can be left out: there is one list of them, each of which gives the
            hidden states alone.
        transposed: whether adapted layers hold their weights as [d_in, d_out], as GPT-2's do.
        parameters: all parameters of the frozen base, head not counted.
        blocks: number of transformer blocks.
        tensors: PEFT name of each tensor of the adapted layers → shape, where the method is not
            plain LoRA; empty where it is, since ``modules`` and a rank say it all.
    """

    modules: Mapping[str, tuple[int, int]]
    head: Mapping[str, tuple[int, ...]]
    parameters: int
    blocks: int
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    names: tuple[str, ...] | str = "all-linear"
    saved: Head = field(default_factory=Head)
    transposed: bool = False
    separable: bool = True


def schema(spec: ModelSpec, lora: LoraSpec, classes: int) -> Schema:
    """Read the schema from the model's configuration; no weight is loaded."""
    folder = resolve(spec)
    with torch.device("meta"):
        model = empty(spec, folder, classes)
    return schema_of(model, lora, head_of(spec, folder, classes))


def schema_of(model: nn.Module, lora: LoraSpec, head: Head | None = None) -> Schema:
    """The schema of a model in memory, whose head, unless told, is known by its name."""
    head = Head.by_name(model) if head is None else head
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    heads = {PREFIX + name: named[name] for name in head.parameters}
    adapted = targets(model, lora, head)
    modules = {path: weight_shape(m) for path, m in adapted.items()}
    size = sum(math.prod(shape) for name, shape in named.items() if PREFIX + name not in heads)
    indices = [i for path, _ in linears(model) if (i := block_of(path)) is not None]
    family = family_of(lora)
    family.check(lora)
    tensors = family.shapes(model, lora, modules)
    blocks = max(indices, default=-1) + 1
    names = target_names(model, lora, _adaptable(model, lora, head))
    transposed = transposes(adapted.values())
    listed = list(block_list(model) or ())
    separable = bool(listed) and all(map(gives_a_tensor, listed))
    return Schema(modules, heads, size, blocks, tensors, names, head, transposed, separable)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that LoRA can adapt: ``nn.Linear`` and GPT-2's transposed ``Conv1D``.

    A router that inherits from ``nn.Linear`` and gives more than a product, as PhiMoE's, is none.
    """
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and _maps(module)):
            yield path, module


def _maps(linear: nn.Linear) -> bool:
    """Whether a layer, with a forward pass of a model's own, still maps vectors to vectors."""
    kind = type(linear)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers.models"):
        return True
    weight = linear.weight
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a router may draw
        given = linear(weight.new_zeros(1, linear.in_features))
    return isinstance(given, Tensor) and given.shape == (1, linear.out_features)


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, also where the weight is stored transposed."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features  # a quantised weight is packed
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if weight.ndim == 1:  # a norm: one number a channel
        return len(weight), 1
    rows, columns = weight.shape
    return columns, rows


_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1")
"""Kinds of models whose ``out_proj`` runs inside a fused kernel, past an adapter: peft refuses it."""


def transposes(layers: Iterable[nn.Module]) -> bool:
    """Whether peft has to be told of ``fan_in_fan_out``."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(layer, Conv1D) for layer in layers)


def _of_rank_one(layer: nn.Module) -> bool:
    """A gate or a score: its update has rank 1 at most."""
    return isinstance(layer, nn.Linear) and min(weight_shape(layer)) == 1


def targets(model: nn.Module, lora: LoraSpec, head: Head | None = None) -> dict[str, nn.Module]:
    """The adapted layers by path; none of the head's.

    Raises:
        ConfigError: a name in ``target-modules`` or ``exclude-modules`` or an index in ``layers``
            matches nothing, or nothing is left.
    """
    candidates = _adaptable(model, lora, Head.by_name(model) if head is None else head)
    if not candidates:
        raise MismatchError(
            f"no layer of {type(model).__name__} can be adapted: it has no "
            f"{tuner_of(lora.method).layers} layer",
            fix="Choose a model of another kind.",
        )
    names = target_names(model, lora, candidates)
    wanted = chosen("target-modules", names, candidates, lora.method)
    if names == "all-linear":  # peft's spares the output layer, too
        output: Any = getattr(model, "get_output_embeddings", lambda: None)()
        kind = getattr(getattr(model, "config", None), "model_type", "")
        wanted -= {
            path
            for path, module in candidates.items()
            if module is output
            or _of_rank_one(module)
            or (kind in _STATE_SPACE and path.endswith("out_proj"))
        }
    spared = chosen("exclude-modules", lora.exclude_modules, dict.fromkeys(wanted), lora.method)
    candidates = {p: m for p, m in candidates.items() if p in wanted and p not in spared}
    if not candidates:
        raise ConfigError(
            f"[lora] exclude-modules = {lora.exclude_modules!r} leaves no layer to adapt",
            fix="Exclude fewer.",
        )
    if lora.layers is None:
        return candidates
    blocks = {block_of(path) for path in candidates}
    if absent := set(lora.layers) - blocks:
        known = sorted(b for b in blocks if b is not None)
        raise ConfigError(
            f"[lora] layers: this model has no block {sorted(absent)}",
            fix=f"Blocks with adaptable layers: {known[0]} to {known[-1]}." if known else "",
        )
    return {p: m for p, m in candidates.items() if block_of(p) in lora.layers}


def _adaptable(model: nn.Module, lora: LoraSpec, head: Head) -> dict[str, nn.Module]:
    """Layers by path that this method can adapt, but for the head's."""
    pool = norms(model) if tuner_of(lora.method).layers == "norm" else linears(model)
    return {path: module for path, module in pool if not head.holds(path)}


def target_names(
    model: nn.Module, lora: LoraSpec, candidates: Iterable[str]
) -> tuple[str, ...] | str:
    """``target-modules`` without ``auto``.

    Args:
        model: its kind decides what ``auto`` is.
        lora: the `[lora]` table.
        candidates: paths of the layers that could be adapted.
    """
    if lora.target_modules != "auto":
        return lora.target_modules
    from peft.utils import constants

    norm = tuner_of(lora.method).layers == "norm"
    known = (
        constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
        if norm
        else constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    paths = list(candidates)
    names = [
        name
        for name in known.get(getattr(getattr(model, "config", None), "model_type", ""), ())
        if any(path == name or path.endswith(f".{name}") for path in paths)
    ]
    return tuple(names) or (".*" if norm else "all-linear")


def initial_adapter(shapes: Schema, lora: LoraSpec, rank: int, seed: int) -> Adapter:
    """The adapter that training starts from: the same at the server and at every site.

    A is uniform in ±1/sqrt(d_in) (Kaiming with a = sqrt(5), as peft), B is zero, and a head's
    weights are normal with standard deviation 0.02, its biases zero and its norms' scales one. The rows of A at a smaller
    rank are the first rows of A at a larger one.

    The tensors of another peft method are zeros of the right shape here: they are drawn by peft
    at the server (:func:`fedft.core.models.start.drawn`), and all of them travel.
    """
    if shapes.tensors:
        whole = family_of(lora).initial(shapes.tensors, seed)
        return Adapter({}, whole | _initial_head(shapes, seed))
    factors = {
        module: Factors(
            A=uniform_rows(rank, d_in, seeds.derive(seed, "lora_A", module)),
            B=torch.zeros(d_out, rank),
            scale=scale_of(lora, rank),
        )
        for module, (d_out, d_in) in shapes.modules.items()
    }
    return Adapter(factors, _initial_head(shapes, seed))


def _initial_head(shapes: Schema, seed: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=seeds.torch_generator(seed, "head", name)) * 0.02
        if len(shape) > 1
        else torch.full(shape, float(name.endswith(".weight")))  # of one dimension: a norm's scale
        for name, shape in shapes.head.items()
    }


def gives_a_tensor(block: nn.Module) -> bool:
    """Whether a block says of itself that it maps hidden states to hidden states alone."""
    return inspect.signature(type(block).forward).return_annotation in (Tensor, "torch.Tensor")


def block_list(model: nn.Module) -> nn.ModuleList | None:
    """The one list of as many blocks as the configuration counts; None where there is none."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return None  # two lists, and a block of the second reads what the first gives
    depth = getattr(config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None
