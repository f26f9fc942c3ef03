"""The two halves of a transformer block: told apart by the names of its children, and left out.

A pre-norm half adds ``f(norm(x))`` to the residual stream x; left out it adds nothing. A post-norm
half (BERT) makes ``norm(x + f(x))`` of it and is left out as a whole, its norm included. What stands
in for it needs no weight, so that those of a half that is left out need not be in memory.
"""

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fedft.core.overrides import overridden

Half = Literal["attention", "feed-forward"]
HALVES: tuple[Half, Half] = ("attention", "feed-forward")
"""In the order in which a block runs them."""


class Sublayer(NamedTuple):
    """One half of a transformer block.

    Attributes:
        block: index of the block.
        half: which of its halves.
    """

    block: int
    half: Half


Layer = int | Sublayer
"""What can be left out of a model: a whole block by its index, or half of one."""


@dataclass(frozen=True)
class _Layout:
    """A family of blocks.

    Attributes:
        attention: names of the children that belong to attention: its norm, itself, and a scale of
            what it gives. Of a post-norm block: the one that holds all of them.
        feed_forward: likewise. The first of them gets the residual stream as attention left it.
        pre_norm: whether the norms stand before.
    """

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    pre_norm: bool = True

    def children(self, half: Half) -> tuple[str, ...]:
        return self.attention if half == "attention" else self.feed_forward


_LAYOUTS = (
    _Layout(("attention",), ("intermediate", "output"), pre_norm=False),  # BERT, RoBERTa, ELECTRA
    _Layout(("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),  # Llama, Qwen
    _Layout(("ln_1", "attn"), ("ln_2", "mlp")),  # GPT-2
    _Layout(("layernorm_before", "attention"), ("layernorm_after", "mlp")),  # ViT
    _Layout(("norm1", "attention", "layer_scale1"), ("norm2", "mlp", "layer_scale2")),  # DINOv2
)
_HALF_OF: Mapping[str, Half] = {
    name: half for layout in _LAYOUTS for half in HALVES for name in layout.children(half)
}


def sublayer_of(path: str) -> Sublayer | None:
    """The half of a block that a module's or tensor's path lies in; None where that cannot be told."""
    found = re.search(r"\.(\d+)\.(\w+)", path)
    half = _HALF_OF.get(found[2]) if found else None
    return None if found is None or half is None else Sublayer(int(found[1]), half)


def divisible(block: nn.Module) -> bool:
    """Whether this block consists of two halves that can be told apart."""
    return _layout(block) is not None


def children(block: nn.Module, half: Half) -> Mapping[str, nn.Module]:
    """The children of a divisible block that belong to one half, by name."""
    return {name: getattr(block, name) for name in _known(block).children(half)}


def between(block: nn.Module) -> nn.Module:
    """The child of a divisible block whose first input is the residual stream after attention."""
    return getattr(block, _known(block).feed_forward[0])


@contextmanager
def without(block: nn.Module, half: Half) -> Generator[None]:
    """For the time of the context, a divisible block of its other half alone."""
    names = _known(block).children(half)
    with ExitStack() as undo:
        for name, forward in zip(names, _stand_ins(_known(block), half), strict=False):
            undo.enter_context(overridden(getattr(block, name), forward))
        yield


def _stand_ins(layout: _Layout, half: Half) -> tuple[Callable[..., Any], ...]:
    if layout.pre_norm:
        core = _attends_to_nothing if half == "attention" else _nothing
        return (pass_on, core, pass_on)
    return (_passes_by,) if half == "attention" else (pass_on, _residual)


def pass_on(*args: Tensor, **options: Tensor) -> Tensor:
    """The input, which is the hidden states."""
    return args[0] if args else options["hidden_states"]


def _nothing(*args: Tensor, **options: Tensor) -> Tensor:
    """A zero without axes: adding it costs nothing, and changes nothing."""
    return pass_on(*args, **options).new_zeros(())


def _attends_to_nothing(*args: Tensor, **options: Tensor) -> tuple[Tensor, None]:
    return _nothing(*args, **options), None  # in place of the attention weights


def _passes_by(*args: Tensor, **options: Tensor) -> tuple[Tensor, None]:
    return pass_on(*args, **options), None


def _residual(_: Tensor, residual: Tensor) -> Tensor:
    return residual


def _known(block: nn.Module) -> _Layout:
    layout = _layout(block)
    assert layout is not None, "the halves of this block cannot be told apart"
    return layout


def _layout(block: nn.Module) -> _Layout | None:
    """The layout whose children hold all parameters of the block; None where there is none."""
    present = dict(block.named_children())
    own = {name for name, child in present.items() if list(child.parameters())}
    for layout in _LAYOUTS:
        named = {*layout.attention, *layout.feed_forward}
        if own <= named <= present.keys() and not list(block.parameters(recurse=False)):
            return layout
    return None
