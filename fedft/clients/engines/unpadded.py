"""Rows of uneven length without padding: the blocks see one long row of real tokens.

Between the first and the last transformer block the padded ``[n, t, d]`` becomes ``[1, T, d]`` with
T real tokens; linear layers, norms and activations, which treat tokens alike, then waste nothing.
Only attention looks across tokens: it has the padded form for the time of its call, with the
model's own mask. Where the head reads only the first token of a row, the last block goes on with
those alone once its attention is done. Nothing in transformers is changed: the blocks get hooks, and attention goes
through transformers' registry of attention functions.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Literal, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedft.clients.engines.attention import Grouping, PackedAttention, group_rows
from fedft.clients.engines.stacked import Segments
from fedft.core.models import block_list
from fedft.core.tasks import Task
from fedft.core.types import IGNORED, Batch


@dataclass
class Layout:
    """How the rows of one step lie.

    Attributes:
        rows: n, rows of all sites.
        length: t, tokens of the longest row.
        real: positions of the real tokens within the n·t padded ones, [T] int64, ascending.
        form: of the activations at this point of the pass: ``padded`` [n, t, …], ``packed``
            [1, T, …], or ``first``, one token a row, [1, n, …].
        cache: position embeddings already packed in this step, by identity.
        groupings: rows sorted for attention, by the identity of the model's mask.
    """

    rows: int
    length: int
    real: Tensor
    form: Literal["padded", "packed", "first"] = "padded"
    cache: dict[int, tuple[Tensor, ...]] = field(default_factory=dict[int, tuple[Tensor, ...]])
    groupings: dict[int, Grouping] = field(default_factory=dict[int, Grouping])

    @cached_property
    def firsts(self) -> Tensor:
        """Which of the real tokens are the first of their row."""
        return (self.real % self.length == 0).nonzero().squeeze(1)

    def select(self, values: Tensor) -> Tensor:
        """Of [n·t, …] values those that the present form holds."""
        if self.form == "padded":
            return values
        packed = values[self.real]
        return packed if self.form == "packed" else packed[self.firsts]


@dataclass(frozen=True, eq=False)
class Step:
    """One batch of each of several sites, as one.

    Attributes:
        inputs: keyword arguments of the model, [n, …].
        targets: what is to be predicted, [m, …]: one a row, or one for each of ``answers``.
        answers: where each target is predicted within the n·t positions, [m] int64, ascending;
            None predicts once a row.
        items: of each site what has a loss of its own: its targets, or its examples.
        rows: rows of each site.
        examples: examples of each site, of one row or more.
        lengths: tokens of each site's longest row, its own padding included.
        tokens: tokens of each site that the blocks see: the real ones where packed.
        layout: how to pack; None where there is nothing to gain.
        entering: what the first adapted block gets where those below do not run, in the form of
            the layout; None runs all.
        target_lengths: tokens of each site's longest target, where a decoder reads it; else empty.
        reference: what the base alone gives each row, of a task that refers to it. [n]
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor
    answers: Tensor | None
    items: Segments
    rows: Segments
    examples: Segments
    lengths: Segments
    tokens: Segments
    layout: Layout | None
    entering: Tensor | None = None
    target_lengths: Segments = ()
    reference: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens of the longest."""
        return sum(self.rows), max(self.lengths)

    def to(self, device: torch.device) -> "Step":
        """The same step with its tensors on a device."""
        if device.type == "cpu":
            return self
        layout = self.layout and replace(self.layout, real=self.layout.real.to(device))
        return replace(
            self,
            inputs={name: tensor.to(device) for name, tensor in self.inputs.items()},
            targets=self.targets.to(device),
            answers=None if self.answers is None else self.answers.to(device),
            layout=layout,
        )


def join(
    batches: Sequence[Batch],
    task: Task,
    pad_token: int,
    *,
    packs: bool,
    side: Literal["left", "right"] = "right",
) -> Step:
    """Put the batches of several sites under each other, in order.

    Args:
        batches: one of each site.
        task: whose batches they are.
        pad_token: token id of padding.
        packs: whether padding is to be left out.
        side: where shorter rows get more padding.
    """
    rows = tuple(batch.labels.shape[0] for batch in batches)
    examples = tuple(map(len, batches))
    columns = [dict(batch.inputs) for batch in batches]
    for own in columns:
        if "input_ids" in own and "position_ids" not in own:  # of packed rows these say all
            own.setdefault("attention_mask", torch.ones_like(own["input_ids"]))
    padding = {"input_ids": pad_token, "labels": IGNORED}
    inputs = {
        name: _cat([own[name] for own in columns], padding.get(name, 0), side)
        for name in columns[0]
    }
    labels = _cat([batch.labels for batch in batches], IGNORED)
    lengths = tuple(_length(own) for own in columns)
    mask = inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):
        del inputs["attention_mask"]
        mask = None
    tokens, layout = tuple(n * max(lengths) for n in rows), None
    # Padding on the left is seen by models that read the first column: such rows stay as they are.
    if packs and mask is not None and bool(mask[:, 0].all()):
        tokens = tuple(int(own.sum()) for own in mask.split(rows))
        layout = Layout(*mask.shape, real=mask.flatten().nonzero().squeeze(1))
    answers, targets = task.targets(labels)
    items = rows
    if answers is not None:
        scored = task.scored(targets)
        answers, targets = answers[scored], targets[scored]
        ends = torch.tensor(rows).cumsum(0) * labels.shape[1]
        until = torch.searchsorted(answers, ends).tolist()
        items = tuple(b - a for a, b in pairwise((0, *until)))
    decoded = tuple(own["labels"].shape[1] for own in columns if "labels" in own)
    return Step(
        inputs,
        targets,
        answers,
        examples if task.refers else items,
        rows,
        examples,
        lengths,
        tokens,
        layout,
        target_lengths=decoded,
    )


def _length(inputs: Mapping[str, Tensor]) -> int:
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else 1


def _cat(tensors: Sequence[Tensor], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Under each other; token sequences are padded to the longest."""
    if tensors[0].ndim == 2:
        longest = max(tensor.shape[1] for tensor in tensors)
        for i, tensor in enumerate(tensors := list(tensors)):
            more = longest - tensor.shape[1]
            tensors[i] = F.pad(tensor, (more, 0) if side == "left" else (0, more), value=value)
    return torch.cat(list(tensors))


_current: ContextVar[Layout | None] = ContextVar("fedft_layout", default=None)


class _Pack(torch.autograd.Function):
    """[n·t, …] → the real tokens [T, …]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, real: Tensor) -> Tensor:
        ctx.real, ctx.size = real, padded.shape[0]
        return padded.index_select(0, real)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter(grads[0], ctx.real, ctx.size), None


class _Unpack(torch.autograd.Function):
    """[T, …] → [n·t, …] with zeros at the padding."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, real: Tensor, size: int) -> Tensor:
        ctx.real = real
        return _scatter(packed, real, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.real), None, None


def _scatter(packed: Tensor, real: Tensor, size: int) -> Tensor:
    return packed.new_zeros(size, *packed.shape[1:]).index_copy_(0, real, packed)


def pack(padded: Tensor, layout: Layout) -> Tensor:
    """[n, t, …] → [1, T, …]."""
    packed = cast(Tensor, _Pack.apply(padded.flatten(0, 1), layout.real))
    return packed[None]


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    """[1, T, …] → [n, t, …]."""
    padded = _Unpack.apply(packed[0], layout.real, layout.rows * layout.length)
    return cast(Tensor, padded).unflatten(0, (layout.rows, layout.length))


# ------------------------------------------------------------------------------- attention


def _attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The model's own attention, on the padded form.

    Args:
        original: ``sdpa`` or ``eager``.
        module: the attention layer.
        query: [1, heads, T, d_head] where packed.
        key: likewise.
        value: likewise.
        attention_mask: the model's, in the padded form.
        options: whatever else the layer says to its kernel.

    Returns:
        [1, T, heads, d_head] where packed, and the kernel's second answer.
    """
    kernel = _kernel(original, module)
    layout = _current.get()
    if layout is None or layout.form == "padded":
        return kernel(module, query, key, value, attention_mask, **options)
    if _plain(attention_mask, options) and layout.length <= _LONGEST:
        return _grouped(layout, query, key, value, attention_mask, options), None
    q, k, v = (unpack(x.transpose(1, 2), layout).transpose(1, 2) for x in (query, key, value))
    out, weights = kernel(module, q, k, v, attention_mask, **options)  # [n, t, heads, d_head]
    return pack(out, layout), weights


_LONGEST = 512
"""Beyond this many tokens the score matrix outweighs what grouping saves."""

_HARMLESS = {"is_causal", "position_ids", "scaling", "sliding_window", "use_cache"}
"""Options that say nothing beyond the mask; ``dropout`` is zero in evaluation mode."""


def _plain(mask: Tensor | None, options: Mapping[str, Any]) -> TypeGuard[Tensor]:
    """Whether this is attention as in the paper, with all its structure in the mask."""
    return mask is not None and not any(
        value is not None and value is not False and value != 0.0
        for name, value in options.items()
        if name not in _HARMLESS
    )


def _grouped(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: Mapping[str, Any],
) -> Tensor:
    heads, width = query.shape[1], query.shape[-1]
    if id(mask) not in layout.groupings:
        layout.groupings[id(mask)] = group_rows(
            layout.real, layout.length, mask, heads, key.shape[1], query.dtype
        )
    scaling = options.get("scaling")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = width**-0.5 if scaling is None else scaling
    return cast(Tensor, PackedAttention.apply(q, k, v, scaling, layout.groupings[id(mask)]))[None]


def _kernel(original: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    if original == "eager":  # each model file has its own
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS[original]


_PACKED = {name: f"fedft_packed_{name}" for name in ("sdpa", "eager")}
"""The model's attention implementation → ours around it, in transformers' registry."""

for _original, _ours in _PACKED.items():
    AttentionInterface.register(_ours, partial(_attend, _original))
    AttentionMaskInterface.register(_ours, ALL_MASK_ATTENTION_FUNCTIONS[_original])


# ---------------------------------------------------------------------------------- blocks


class Packing:
    """Runs a model's blocks on packed tokens.

    Args:
        model: any encoder or decoder of transformers with one list of blocks, whose attention goes
            through transformers' attention interface. Others are run on padded rows.

    Attributes:
        blocks: in order; empty where the model is not of this kind.
    """

    def __init__(self, model: nn.Module) -> None:
        self._config: Any = getattr(model, "config", None)
        self.blocks = _blocks(model)
        self._after_attention: nn.Module | None = None
        if self.blocks and type(model).__name__ in _READS_FIRST:
            self._after_attention = self.blocks[-1].get_submodule("attention.output")

    @property
    def possible(self) -> bool:
        """Whether this model can be run on packed tokens."""
        return bool(self.blocks)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks on the blocks and our attention in the registry, for the time of the context."""
        if not self.blocks:
            yield
            return
        original = self._config._attn_implementation
        with ExitStack() as undo:
            for block in self.blocks:
                hook = block.register_forward_pre_hook(_pack_positions, with_kwargs=True)
                undo.callback(hook.remove)
            undo.callback(self.blocks[0].register_forward_pre_hook(_enter).remove)
            undo.callback(self.blocks[-1].register_forward_hook(_leave).remove)
            if (after := self._after_attention) is not None:
                undo.callback(after.register_forward_pre_hook(_keep_first).remove)
            undo.callback(setattr, self._config, "_attn_implementation", original)
            self._config._attn_implementation = _PACKED[original]
            yield

    @contextmanager
    def using(self, layout: Layout | None) -> Iterator[None]:
        """Run forward passes with this layout; None runs them as they are."""
        token = _current.set(layout)
        try:
            yield
        finally:
            _current.reset(token)


def _blocks(model: nn.Module) -> list[nn.Module]:
    if not (isinstance(model, PreTrainedModel) and model._supports_attention_backend):
        return []
    if model.config._attn_implementation not in _PACKED:
        return []
    return list(block_list(model) or ())


_READS_FIRST = {
    f"{family}ForSequenceClassification"
    for family in ("Bert", "Camembert", "Electra", "Roberta", "XLMRoberta")
}
"""Models whose head reads the first token only, and whose blocks have an ``attention.output`` that
takes what attention found and what it started from."""


def here() -> AbstractContextManager[None]:
    """A context in which blocks run again as at this point of the pass."""
    layout = _current.get()
    return _at(layout, form_now())


@contextmanager
def _at(layout: Layout | None, form: Literal["padded", "packed", "first"]) -> Iterator[None]:
    token, left = _current.set(layout), None if layout is None else layout.form
    if layout is not None:
        layout.form = form
    try:
        yield
    finally:
        if layout is not None and left is not None:
            layout.form = left
        _current.reset(token)


def form_now() -> Literal["padded", "packed", "first"]:
    """The form of the activations at this point of the forward pass."""
    layout = _current.get()
    return "padded" if layout is None else layout.form


def _enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    layout = _current.get()
    if layout is None:
        return None
    layout.form = "packed"
    return pack(args[0], layout), *args[1:]


def _leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    layout = _current.get()
    if layout is None:
        return None
    states = output[0] if isinstance(output, tuple) else output
    # After _keep_first the head finds in column 0 all that it reads.
    states = states[0][:, None] if layout.form == "first" else unpack(states, layout)
    layout.form = "padded"
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _keep_first(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    layout = _current.get()
    if layout is None:
        return None
    layout.form = "first"
    return tuple(cast(Tensor, _Pack.apply(x[0], layout.firsts))[None] for x in args)


def _pack_positions(
    _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Rotary position embeddings, [1 or n, t, d], follow the tokens."""
    layout, rotary = _current.get(), options.get("position_embeddings")
    if layout is None or rotary is None:
        return None
    if id(rotary) not in layout.cache:
        layout.cache[id(rotary)] = tuple(
            pack(x.expand(layout.rows, -1, -1), layout) for x in rotary
        )
    return args, {**options, "position_embeddings": layout.cache[id(rotary)]}
