"""The sizes of a model that decide about memory, for the architectures whose memory is known."""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedft.core import sublayers
from fedft.core.checkpoint import (
    empty,
    head_of,
)
from fedft.core.errors import MismatchError
from fedft.core.memory import Geometry, Load
from fedft.core.models.layers import Schema, block_list
from fedft.core.spec import ModelSpec
from fedft.core.sublayers import HALVES, Half, sublayer_of
from fedft.core.tables import output_of, parameters_in_file
from fedft.core.tasks import task_of
from fedft.core.types import block_of


def geometry(spec: ModelSpec, folder: Path) -> Geometry | None:
    """The sizes that decide about memory, from the model's configuration; no weight is loaded.

    None where the memory model does not hold: it knows models of one list of equal blocks with
    attention, not encoder-decoders, hierarchical or convolutional ones, or blocks that share
    weights.
    """
    with torch.device("meta"):
        model: Any = empty(spec, folder, classes=2)
    head = head_of(spec, folder, classes=2)
    config = model.config
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    plain = all(isinstance(getattr(config, name, None), int) for name in needed)
    if not plain or getattr(config, "is_encoder_decoder", False) or not block_list(model):
        return None
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    named = {n: p for n, p in model.named_parameters() if n not in head.parameters}
    inner = sum(p.numel() for n, p in named.items() if block_of(n) is not None)
    blocks = int(config.num_hidden_layers)
    task = task_of(spec.task)
    output = model.get_output_embeddings() if task.words and _plain_output(model) else None
    in_file = parameters_in_file(model, folder, output)
    return Geometry(
        blocks=blocks,
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        heads=heads,
        key_value=heads * int(getattr(config, "head_dim", None) or hidden // heads),
        gated=any(n.endswith(("gate_proj.weight", "weights_in.weight")) for n in named),
        block_parameters=inner // blocks,
        other_parameters=sum(p.numel() for p in named.values()) - inner,
        halves=_halves({n: p.numel() for n, p in named.items()}, blocks)
        if all(map(sublayers.divisible, block_list(model) or [model]))
        else None,
        vocabulary=int(config.vocab_size) if task.words else 0,
        sliced=output is not None,
        in_file={"fp32": in_file.get(torch.float32, 0), "bf16": in_file.get(torch.bfloat16, 0)},
        patches=_patches(config) if task.reads == "image" else 0,
    )


KNOWN = (
    "one list of equal transformer blocks, each with attention and a feed-forward part of its own"
)
"""What the memory model and the pruning of layers know."""


def check_known(found: Geometry | None, spec: ModelSpec) -> Geometry:
    """Refuse to reckon with blocks, or to hold a part of them, where they are of no known make.

    Raises:
        MismatchError: naming the model and what is known.
    """
    if found is None:
        raise MismatchError(
            f"parts of {spec.source!r} cannot be held: memory budgets and pruning know models of {KNOWN}, "
            "and this is none",
            fix="Leave [pruning], model-shares and memory-budgets-mib out, or choose another model.",
        )
    return found


def positions(config: Any) -> int | None:
    """How many tokens a row may have, as a model's configuration says it under various names.

    None where it names no limit. Models that count positions from their padding token take two less.

    Args:
        config: as an object of transformers, or as JSON data.
    """
    told: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    found = (told.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _patches(config: Any) -> int:
    """Tokens of an image: its patches and the token that stands for all of it."""

    def sides(size: Any) -> tuple[int, int]:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    (height, width), (down, across) = sides(config.image_size), sides(config.patch_size)
    return (height // down) * (width // across) + 1


def _plain_output(model: nn.Module) -> bool:
    """Whether :func:`output_of` will find a layer, from a model on the meta device.

    It is asked of a model of the same class and configuration with no block and eight words. One
    that cannot be made that small is taken to make its logits in another way: that needs more.
    """
    config: Any = copy.deepcopy(model.config)
    make: Any = type(model)
    try:
        config.num_hidden_layers, config.vocab_size = 0, 8
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        if getattr(config, "layer_types", None):
            config.layer_types = []
        with torch.random.fork_rng(devices=[]):
            return output_of(make(config).eval()) is not None
    except Exception:  # whatever a model's own code and its configuration's checks raise
        return False


def _halves(sizes: Mapping[str, int], blocks: int) -> tuple[int, int]:
    """Of numbers by path: what falls on a block's attention, and on its feed-forward part."""
    sums: dict[Half, int] = dict.fromkeys(HALVES, 0)
    for path, size in sizes.items():
        if (layer := sublayer_of(path)) is not None:
            sums[layer.half] += size
    return -(-sums["attention"] // blocks), -(-sums["feed-forward"] // blocks)


def load_of(
    shapes: Schema,
    blocks: int,
    rank: int,
    *,
    batch: int,
    tokens: int,
    scored: int,
    checkpointing: bool = False,
) -> Load:
    """A step of training in which every adapted layer and the head learn.

    Args:
        shapes: of the model.
        blocks: over which the adapted layers are spread.
        rank: of the adapter.
        batch: rows a step.
        tokens: of the longest row.
        scored: tokens of a row whose prediction has a loss.
        checkpointing: blocks run again in the backward pass.
    """
    sizes = {module: rank * sum(shape) for module, shape in shapes.modules.items()}
    inner = sum(size for module, size in sizes.items() if block_of(module) is not None)
    outer = sum(sizes.values()) - inner
    outer += sum(math.prod(shape) for shape in (*shapes.head.values(), *shapes.tensors.values()))
    per_half = _halves(sizes, blocks)
    inputs = _inputs_of_halves(shapes) if any(per_half) else None
    return Load(batch, tokens, scored, outer, -(-inner // blocks), per_half, inputs, checkpointing)


def _inputs_of_halves(shapes: Schema) -> tuple[int, int]:
    """Widths of the inputs of a block's adapted layers, by half; layers of one width share theirs.

    So it is: queries, keys and values have one input, gate and up-projection another, and what the
    output projection of attention gets is counted as what attention gives.
    """
    widths: dict[Half, set[int]] = {half: set() for half in HALVES}
    for module, (_, d_in) in shapes.modules.items():
        if (layer := sublayer_of(module)) is not None:
            widths[layer.half].add(d_in)
    return sum(widths["attention"]), sum(widths["feed-forward"])
