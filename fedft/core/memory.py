"""How much memory local training takes, from shapes alone.

Counted in bytes above what the process needs before it has any model:

    base         weights of the parts that are held; no tables that stay in their file
    adapter      float32 weights, gradients, AdamW's two moments, and the start: 20 a parameter
    activations  what autograd keeps, and the widest place of the pass

Autograd keeps of a block with frozen weights, for each token: the inputs of its two norms and of
its adapted layers, queries, keys, values and the attention's output, and the input of the
activation function (a gated feed-forward part: three such widths). With gradient checkpointing it
keeps a block's input, and all the rest of one block at a time. A causal language model has a slice
of its logits before the backward pass begins; one that scales or caps them has all of them, three
times over, for the tokens that are scored. benchmarks/memory.py holds all of it against measured
peaks.

Every part is linear in the number of blocks, which is what a budget is solved for. Where halves of
blocks are held one by one, the largest are counted first: whichever are drawn, the budget holds.
"""

import ctypes
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import starmap
from pathlib import Path

import torch

from fedft.core.spec import Precision
from fedft.core.tables import WINDOW
from fedft.core.types import Granularity

MIB = 2**20


@dataclass(frozen=True)
class Geometry:
    """The sizes of a transformer that decide about its memory.

    Attributes:
        blocks: number of transformer blocks.
        hidden: width of the residual stream.
        intermediate: width inside the feed-forward part.
        heads: attention heads.
        key_value: width of keys, and of values, as attention sees them.
        gated: whether the feed-forward part multiplies two branches (SwiGLU and its like).
        block_parameters: of one block.
        other_parameters: outside of all blocks, the task head not counted.
        halves: parameters of a block's attention and of its feed-forward part; None where these
            cannot be told apart.
        vocabulary: outputs per token of a language model; 0 where there is no such head.
        patches: tokens of an image; 0 where the input is text.
        sliced: whether a vocabulary is scored slice by slice, see :mod:`fedft.clients.engines.chunked_loss`.
        in_file: parameters of lookup tables that a site with limited memory leaves in their file,
            by the precision that the file has; see :mod:`fedft.core.tables`.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    key_value: int
    gated: bool
    block_parameters: int
    other_parameters: int
    halves: tuple[int, int] | None = None
    vocabulary: int = 0
    patches: int = 0
    sliced: bool = False
    in_file: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Load:
    """One step of training.

    Attributes:
        batch: rows.
        tokens: of the longest row; patches of an image.
        scored: tokens of a row whose prediction has a loss, of a causal language model.
        trainable: parameters that learn outside of all blocks.
        trainable_per_block: that learn in each block.
        trainable_of_halves: that learn in attention, and in the feed-forward part, of each block.
        inputs_of_halves: widths of the inputs that adapted layers keep there; None takes layers of
            attention alone to be adapted, which have the block's input in common.
        checkpointing: whether blocks run again in the backward pass, see :mod:`fedft.clients.engines.checkpointing`.
        beside: numbers in the records of the plan's terms for each parameter that learns.
    """

    batch: int
    tokens: int
    scored: int
    trainable: int
    trainable_per_block: int
    trainable_of_halves: tuple[int, int] = (0, 0)
    inputs_of_halves: tuple[int, int] | None = None
    checkpointing: bool = False
    beside: float = 0.0


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one site in training, by part: what there is anyway, and what a layer adds.

    Attributes:
        fixed: ``base``, ``adapter`` and ``activations``.
        each: the same of each layer that can be left out, a block or half of one; largest first.
    """

    fixed: Mapping[str, float]
    each: Sequence[Mapping[str, float]]

    @property
    def layers(self) -> int:
        """How many can be left out: the blocks of the whole model, or their halves."""
        return len(self.each)

    def of(self, layers: int | None = None) -> dict[str, float]:
        """The parts and their ``total`` with so many layers, the largest; None takes all."""
        held = self.each[:layers]
        parts = {name: base + sum(one[name] for one in held) for name, base in self.fixed.items()}
        return {**parts, "total": sum(parts.values())}

    def mib(self, layers: int | None = None) -> float:
        """The total in MiB."""
        return self.of(layers)["total"] / MIB

    def affordable(self, budget_mib: float | None) -> int:
        """The most layers that fit into a budget whichever they are, 0 to all; None is unlimited."""
        if budget_mib is None:
            return self.layers
        fitting = [k for k in range(1, self.layers + 1) if self.mib(k) <= budget_mib]
        return max(fitting, default=0)


def footprint(
    geometry: Geometry, load: Load, precision: Precision, granularity: Granularity = "block"
) -> Footprint:
    """What one site needs that trains alone, in the engine that trains several at once.

    Args:
        geometry: of the model.
        load: of a step.
        precision: of the base.
        granularity: what can be left out. ``sublayer`` needs ``geometry.halves``.
    """
    width = 2 if precision == "bf16" else 4
    d, f = geometry.hidden, geometry.intermediate
    inner = 3 * f if geometry.gated else f
    attention_inputs, feed_forward_inputs = load.inputs_of_halves or (d, 0)
    attended = 3 * d + 2 * geometry.key_value + attention_inputs
    fed = d + inner + feed_forward_inputs
    widest = d + 2 * inner
    if precision == "bf16":  # on a CPU attention is eager there, and keeps its weights
        attended += 2 * geometry.heads * load.tokens
    tokens = load.batch * load.tokens
    learning = 20.0 + 4 * load.beside  # bytes a parameter that learns

    def layer(parameters: int, trainable: int, kept: int) -> dict[str, float]:
        return {
            "base": float(width * parameters),
            "adapter": learning * trainable,
            "activations": float(tokens * (d if load.checkpointing else kept) * width),
        }

    if granularity == "block":
        units = [layer(geometry.block_parameters, load.trainable_per_block, attended + fed)]
    else:
        assert geometry.halves is not None, "the halves of these blocks cannot be told apart"
        halves = zip(geometry.halves, load.trainable_of_halves, (attended, fed), strict=True)
        units = sorted(starmap(layer, halves), key=lambda one: -sum(one.values()))
    inside = tokens * (widest + (attended + fed if load.checkpointing else 0)) * width
    in_file = geometry.in_file.get("bf16" if precision == "bf16" else "fp32", 0)
    return Footprint(
        fixed={
            "base": float(width * (geometry.other_parameters - in_file)),
            "adapter": learning * load.trainable,
            "activations": float(_widest(geometry, load, inside)),
        },
        each=[one for one in units for _ in range(geometry.blocks)],
    )


def _widest(geometry: Geometry, load: Load, inside: int) -> int:
    """Bytes that come and go, ``inside`` of them in a block, above what is kept for long."""
    scored = load.batch * load.scored
    if geometry.sliced:  # a slice of the logits and of the output layer; four times a state
        return max(inside, 2 * WINDOW + 16 * geometry.hidden * scored)
    return inside + 3 * 4 * geometry.vocabulary * scored


# ── this process ──────────────────────────────────────────────────────────────────────────────


def resident_bytes(what: str = "VmRSS") -> int:
    """Memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak. Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return 1024 * int(value.split()[0])
    raise KeyError(what)


@cache
def framework_bytes() -> int | None:
    """Memory that this process takes without a model, measured at the first call; None off Linux.

    What training needs is imported by then, and no model is loaded: a footprint comes on top of it.
    """
    for library in ("transformers", "peft"):
        importlib.import_module(library)
    try:
        return resident_bytes()
    except OSError:
        return None


class Peak:
    """Peak memory above what was taken when this was made: resident memory, or a device's tensors.

    Args:
        device: torch device. Resident memory is read on Linux, where the peak can be set back.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = resident_bytes()
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak since then."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return resident_bytes("VmHWM") - self._before


_M_MMAP_THRESHOLD = -3
_RETURNED_FROM = 2**17


def return_what_is_freed() -> None:
    """Make the C library give every freed tensor of 128 KiB or more back to the system at once.

    glibc raises that bound as tensors are freed, and what it keeps after that is scattered: a third
    of the peak in the runs of benchmarks/memory.py. Elsewhere than under glibc nothing is done.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _RETURNED_FROM)
        library.malloc_trim(0)  # and what it holds already
