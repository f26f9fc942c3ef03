"""How much memory local training takes, from shapes alone.

Counted in bytes above what the process needs before it has any model:

    base         weights of the parts that are held; lookup tables in full
    adapter      float32 weights, gradients, AdamW's two moments, and the start: 20 a parameter
    activations  what autograd keeps, and the widest place of the pass

Autograd keeps of a block with frozen weights, for each token: the inputs of its two norms and of
its adapted layers, queries, keys, values and the attention's output, and the input of the
activation function (a gated feed-forward part: three such widths). A causal language model has its
logits three times over, for the tokens that are scored. benchmarks/memory.py holds all of it
against measured peaks.

Every part is linear in the number of blocks, which is what a budget is solved for.
"""

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedft.core.spec import Precision
from fedft.core.tables import WINDOW

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
        vocabulary: outputs per token of a language model; 0 where there is no such head.
        patches: tokens of an image; 0 where the input is text.
        sliced: whether a vocabulary is scored slice by slice, see :mod:`clients.vocabulary`.
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
    """

    batch: int
    tokens: int
    scored: int
    trainable: int
    trainable_per_block: int


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one site in training, by part: what there is anyway, and what a block adds.

    Attributes:
        fixed, each: ``base``, ``adapter`` and ``activations``.
        blocks: of the whole model.
    """

    fixed: Mapping[str, float]
    each: Mapping[str, float]
    blocks: int

    def of(self, blocks: int | None = None) -> dict[str, float]:
        """The parts and their ``total`` with so many blocks; None takes all."""
        held = self.blocks if blocks is None else blocks
        parts = {name: self.fixed[name] + held * self.each[name] for name in self.fixed}
        return {**parts, "total": sum(parts.values())}

    def mib(self, blocks: int | None = None) -> float:
        """The total in MiB."""
        return self.of(blocks)["total"] / MIB

    def affordable(self, budget_mib: float | None) -> int:
        """The most blocks that fit into a budget, 0 to all; None is unlimited."""
        if budget_mib is None:
            return self.blocks
        fitting = [k for k in range(1, self.blocks + 1) if self.mib(k) <= budget_mib]
        return max(fitting, default=0)


def footprint(geometry: Geometry, load: Load, precision: Precision) -> Footprint:
    """What one site needs that trains alone, in the engine that trains several at once.

    Args:
        geometry: of the model.
        load: of a step.
        precision: of the base.
    """
    width = 2 if precision == "bf16" else 4
    d, f = geometry.hidden, geometry.intermediate
    inner = 3 * f if geometry.gated else f
    kept = 5 * d + 2 * geometry.key_value + inner
    widest = d + 2 * inner
    if precision == "bf16":  # on a CPU attention is eager there, and keeps its weights
        kept += 2 * geometry.heads * load.tokens
    tokens = load.batch * load.tokens
    scored = load.batch * load.scored
    if geometry.sliced:  # logits, and the rows of the output layer; four times a state
        logits = 2 * WINDOW + 4 * 4 * d * scored
    else:
        logits = 3 * 4 * geometry.vocabulary * scored
    in_file = geometry.in_file.get("bf16" if precision == "bf16" else "fp32", 0)
    return Footprint(
        fixed={
            "base": float(width * (geometry.other_parameters - in_file)),
            "adapter": 20.0 * load.trainable,
            "activations": float(tokens * widest * width + logits),
        },
        each={
            "base": float(width * geometry.block_parameters),
            "adapter": 20.0 * load.trainable_per_block,
            "activations": float(tokens * kept * width),
        },
        blocks=geometry.blocks,
    )


# ── this process ──────────────────────────────────────────────────────────────────────────────


def resident_bytes(what: str = "VmRSS") -> int:
    """Memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak. Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return 1024 * int(value.split()[0])
    raise KeyError(what)


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
