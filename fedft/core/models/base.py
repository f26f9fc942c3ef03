"""The frozen network itself, resident in a worker or at a client, whole or in part."""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fedft.core import sublayers
from fedft.core.checkpoint import (
    Head,
)
from fedft.core.errors import MismatchError
from fedft.core.models.layers import block_list, gives_a_tensor, schema_of, targets
from fedft.core.overrides import overridden
from fedft.core.spec import NEW_TOKENS, LoraSpec
from fedft.core.sublayers import HALVES, Half, Layer, Sublayer
from fedft.core.tables import Output, output_of
from fedft.core.tasks import Task, task_of
from fedft.core.types import Delta, in_blocks


class Base:
    """A frozen pretrained model, resident in one process.

    Attributes:
        model: in evaluation mode; no parameter requires a gradient.
        shapes: its schema.
        task: as in :class:`~fedft.core.spec.ModelSpec`.
        kind: the task itself, with the metrics of the run and the numbers of its loss.
        head: what of the model is new: an adapter brings it.
        output: of a model of words, the layer that gives its logits; None where they are made
            otherwise.
        names: of the classes, for the metrics that read them; empty where there are none.
        new_tokens: that are generated for a text, at most.

    Args:
        model: as above.
        lora: which of its layers are adapted.
        task: as above.
        head: as above; known by its name where None.
        load: gives a model of some blocks, or halves of blocks, alone. Where set, ``model`` came
            without the weights of its blocks: they are on the meta device, and only those that
            :meth:`holding` names are ever in memory.
        output: as above, where ``load`` is set: found before the blocks were taken away.
        names: as above.
        encoder: gives the model's tokenizer, as :func:`~fedft.core.models.source.input_encoder` does:
            where texts are generated.
        kind: as above; None is the task as it is without any setting.

    The layers listed by :attr:`adapted` are the same objects for as long as the base lives, also
    after an engine has wrapped them: :meth:`shift` changes their weights in place.
    """

    def __init__(
        self,
        model: nn.Module,
        lora: LoraSpec,
        task: str,
        *,
        head: Head | None = None,
        load: Callable[[Sequence[Layer]], nn.Module] | None = None,
        output: Output | None = None,
        names: Sequence[str] = (),
        encoder: Callable[[], Any] | None = None,
        kind: Task | None = None,
    ) -> None:
        self.model = model
        self.names = tuple(names)
        self.new_tokens = NEW_TOKENS
        self._encoder = encoder
        self.task = task
        self.kind = task_of(task) if kind is None else kind
        self.head = Head.by_name(model) if head is None else head
        words = self.kind.words
        if words and load is None and (layer := output_of(model)) is not None:
            output = Output(layer)
        self.output = output
        self.shapes = schema_of(model, lora, self.head)
        self.adapted = targets(model, lora, self.head)
        self._load = load
        self._held: frozenset[Layer] = frozenset()
        self._pristine: dict[str, Tensor] = {}
        self._shifted_by: Delta | None = None

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def encoder(self) -> Any:
        """The model's tokenizer, read when it is first asked for."""
        assert self._encoder is not None, "this base came without a tokenizer"
        return self._encoder()

    @property
    def lean(self) -> bool:
        """Whether this base holds only the layers that it was last asked for."""
        return self._load is not None

    def shift(self, delta: Delta) -> None:
        """Make the weights ``W_0 + delta``; an empty delta restores ``W_0`` exactly.

        The untouched weights of shifted layers are kept, so that no rounding accumulates.

        Raises:
            MismatchError: the weights are quantised.
        """
        if delta is self._shifted_by or (not delta and not self._shifted_by):
            return
        if getattr(self.model, "is_quantized", False):
            raise MismatchError(
                "this rule changes the base weights, and [model] load-in holds them in few bits",
                fix="Leave load-in out, or choose a rule such as fedavg-lora.",
            )
        with torch.no_grad():
            for path, pristine in self._pristine.items():
                self._weight(path).copy_(pristine)
            for path, factors in delta.items():
                weight = self._weight(path)
                self._pristine.setdefault(path, weight.detach().clone())
                dense = factors.product().to(weight)
                weight.add_(dense if isinstance(self.adapted[path], nn.Linear) else dense.T)
        self._shifted_by = delta or None

    @contextmanager
    def unshifted(self) -> Iterator[None]:
        """For the time of the context, the weights are ``W_0``."""
        before = self._shifted_by
        self.shift({})
        try:
            yield
        finally:
            self.shift(before or {})

    def _weight(self, path: str) -> Tensor:
        weight = self.adapted[path].weight
        assert isinstance(weight, Tensor)
        return weight

    @cached_property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in order; empty where they cannot be told from other layers."""
        return list(block_list(self.model) or ())

    @contextmanager
    def holding(self, layers: Sequence[Layer] | None, delta: Delta | None = None) -> Iterator[None]:
        """For the time of the context, a model of these layers alone, on weights ``W_0 + delta``.

        A block that is not held passes its input on, and so does the half of one; position
        embeddings, masks and the head are untouched, and so is the order of the others. None is
        the whole model.

        Raises:
            MismatchError: this model has no such block, or none that can be left out or divided.
        """
        self._check(layers)
        held = frozenset(range(len(self.blocks))) if layers is None else _united(layers)
        if self._load is not None:
            self._hold(held)
        self.shift(delta or {})
        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):
                if index in held:
                    continue
                lost: list[Half] = [h for h in HALVES if Sublayer(index, h) not in held]
                if len(lost) == 1:
                    undo.enter_context(sublayers.without(block, lost[0]))
                else:
                    undo.enter_context(overridden(block, sublayers.pass_on))
            yield

    @contextmanager
    def streaming(self, delta: Delta) -> Iterator[None]:
        """For the time of the context, the whole model on weights ``W_0 + delta``.

        A lean base loads a block when it is reached and lets go of the one before: no two of them
        are in memory at once. For one pass without gradients.
        """
        self._check_blocks()
        if self._load is None:
            with self.holding(None, delta):
                yield
            return

        def reached(index: int) -> None:
            # The pass may run in inference mode, and what is loaded here is trained on later.
            with torch.inference_mode(False):
                self._hold(frozenset({index}))
                self.shift({m: f for m, f in delta.items() if in_blocks(m, {index})})

        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):
                hook = partial(_call, reached, index)
                undo.callback(block.register_forward_pre_hook(hook).remove)
            yield

    def _check(self, layers: Sequence[Layer] | None) -> None:
        if layers is None:
            return
        self._check_blocks()
        name = type(self.model).__name__
        if any(isinstance(layer, Sublayer) for layer in layers):
            self.check_divisible()
        if absent := sorted(
            {block_index(layer) for layer in layers} - set(range(len(self.blocks)))
        ):
            raise MismatchError(
                f"a plan names the blocks {absent}, and {name} has none of them",
                fix=f"Blocks are counted from 0 to {len(self.blocks) - 1}.",
            )
        if not layers:
            raise MismatchError("a plan holds no block at all", fix="Name at least one.")

    def _check_blocks(self) -> None:
        if not self.blocks or not all(map(gives_a_tensor, self.blocks)):
            raise MismatchError(
                f"no block of {type(self.model).__name__} can be left out: it is not one list of "
                "blocks that give a tensor",
                fix='Train the whole model: [pruning] selection = "none".',
            )

    def check_divisible(self) -> None:
        """Refuse halves of blocks where they cannot be told apart.

        Raises:
            MismatchError: the blocks are not of a kind that :mod:`fedft.core.sublayers` knows.
        """
        if not all(map(sublayers.divisible, self.blocks)):
            raise MismatchError(
                f"attention and feed-forward part of the blocks of {type(self.model).__name__} "
                "cannot be told apart",
                fix='Set [pruning] granularity = "block".',
            )

    def _hold(self, wanted: frozenset[Layer]) -> None:
        """Load the layers that are wanted and let go of the others."""
        assert self._load is not None
        if wanted == self._held:
            return
        self.shift({})
        for layer in self._held - wanted:
            for module in _modules(self.blocks[block_index(layer)], layer):
                module.to("meta")
        missing = sorted(wanted - self._held, key=block_index)  # of a block, itself or one half
        for layer, loaded in zip(missing, block_list(self._load(missing)) or (), strict=True):
            block = self.blocks[block_index(layer)]
            for source, target in zip(_modules(loaded, layer), _modules(block, layer), strict=True):
                _transplant(source, target)
        self._pristine = {p: t for p, t in self._pristine.items() if in_blocks(p, wanted)}
        self._held = wanted


def _call(reached: Callable[[int], None], index: int, *_: object) -> None:
    reached(index)


def block_index(layer: Layer) -> int:
    """Index of the block that a layer is, or is half of."""
    return layer if isinstance(layer, int) else layer.block


def _united(layers: Sequence[Layer]) -> frozenset[Layer]:
    """The same layers; of which both halves are named, or a half beside the whole, as a block."""
    named = set(layers)
    whole = {b for b in map(block_index, layers) if b in named or named >= {(b, h) for h in HALVES}}
    return frozenset(whole | {layer for layer in layers if block_index(layer) not in whole})


def _modules(block: nn.Module, layer: Layer) -> Sequence[nn.Module]:
    """What of a block belongs to a layer: all of it, or the children of one half."""
    if isinstance(layer, int):
        return [block]
    return list(sublayers.children(block, layer.half).values())


def _transplant(source: nn.Module, target: nn.Module) -> None:
    """Make ``target`` hold the very tensors of ``source``, a module of the same making."""
    for a, b in zip(source.modules(), target.modules(), strict=True):
        b._parameters.update(a._parameters)
        b._buffers.update(a._buffers)
