"""The cohort engine: several sites in one forward and backward pass.

A simulated client is a small job on a frozen base, too small to use a machine well. Here the rows
of K sites go through the base together, and only the adapted layers and the head know which rows
are whose: they multiply each site's rows with that site's own factors. Losses are means over a
site's own rows and are summed, so gradients do not mix; clipping, optimiser state, step count,
learning rate and scale belong to one site each. Mathematically every site trains alone:
:mod:`fedft.clients.engines.loop` is the readable twin and the oracle of the tests.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedft.clients.engines.accumulation import passes
from fedft.clients.engines.base import Trained
from fedft.clients.engines.checkpointing import (
    Surroundings,
    recomputable,
    recomputed,
    without_cache,
)
from fedft.clients.engines.chunked_loss import Vocabulary
from fedft.clients.engines.dropping import masks
from fedft.clients.engines.frozen_blocks import Kept, Prefix
from fedft.clients.engines.grouping import groups
from fedft.clients.engines.item_losses import ItemLosses, per_item
from fedft.clients.engines.neftune import Noise, noisy, together
from fedft.clients.engines.passes import (
    Pass,
    RowsMismatch,
    of_each,
    one_client,
    rewind,
    scale_of_rows,
    segments_of,
    total,
)
from fedft.clients.engines.references import References
from fedft.clients.engines.rows import StackLosses, StackRows, records
from fedft.clients.engines.stacked import (
    AdaptedLinear,
    Branch,
    Stack,
    StackOptimizer,
    frozen,
    weight_of,
)
from fedft.clients.engines.unpadded import Packing, Step, here, join
from fedft.clients.engines.writing import Writing
from fedft.clients.methods import Method, asked, methods
from fedft.core import seeds
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.metrics import Tally
from fedft.core.models import Base, linears
from fedft.core.overrides import overridden
from fedft.core.precise import widened, widest
from fedft.core.spec import LoraSpec
from fedft.core.sublayers import Layer
from fedft.core.tasks import rows_of
from fedft.core.tasks.criterion import Criterion
from fedft.core.terms import kind_of
from fedft.core.text.special_tokens import reads_last
from fedft.core.types import (
    PREFIX,
    Adapter,
    Batch,
    Delta,
    LocalTraining,
    TrainPlan,
    factor_name,
)


class CohortEngine:
    """Trains several sites at once on one resident base; see :class:`fedft.clients.engines.base.Engine`.

    Args:
        base: the frozen model. PEFT must not have put its layers into it.
        lora: whose ``dropout`` is applied while training. A site's masks come from its own
            generator, so they do not depend on the cohort it is in.
        packed: run the blocks on real tokens only, without padding. None does so on a CPU, where
            time follows the number of tokens; a GPU prefers few large kernels.
        checkpointing: blocks run again in the backward pass, see :mod:`fedft.clients.engines.checkpointing`.

    Raises:
        MismatchError: another library has replaced layers of the base; or ``checkpointing``, and
            its blocks cannot be told from other layers.
    """

    def __init__(
        self,
        base: Base,
        lora: LoraSpec,
        *,
        packed: bool | None = None,
        checkpointing: bool = False,
    ) -> None:
        for path, linear in base.adapted.items():
            if base.model.get_submodule(path) is not linear:
                raise MismatchError(
                    f"layer {path!r} of the base model has been replaced by another library",
                    fix="Give the cohort engine a base of its own.",
                )
        self.base = base
        self._task = base.kind
        self._keep = 1.0 - lora.dropout
        self._vocabulary = Vocabulary.of(base)
        self._items = ItemLosses(self._task, self._vocabulary)
        self._recomputed = recomputable(base) if checkpointing else ()
        self._packing = Packing(base.model)
        wanted = base.device.type == "cpu" if packed is None else packed
        self._packs = wanted and self._packing.possible
        config: Any = base.model.config
        self._pad_token = int(getattr(config, "pad_token_id", None) or 0)
        self._side: Literal["left", "right"] = "left" if reads_last(config) else "right"
        self._prefix = Prefix(base, self._packing, self._joined)
        self._references = References(self._reference)
        wide = any(p.dtype == torch.float64 for p in base.model.parameters())
        self._dtype = torch.float64 if wide else torch.float32
        self._now: Pass | None = None

    # ---------------------------------------------------------------------------- training

    def train(
        self, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        """Train all plans that can share a pass together, one group after another.

        Plans share a pass where they train the same parts of the same layers on the same base
        weights with the same kind of optimiser. Ranks, scales, learning rates, decay, clipping,
        proximal terms, and the number and size of batches may differ.

        Raises:
            ConfigError: a plan trains nothing, or asks for gradients example by example (DP-SGD).
            MismatchError: a plan asks for a method that is not known here.
        """
        for method in {method for plan in plans for method in asked(plan) if method.by_example}:
            raise ConfigError(
                f"{kind_of(method.term) or method.__name__} takes gradients example by example, and a cohort's are taken "
                "client by client",
                fix="Set [engine] cohort = 1.",
            )
        results: dict[int, Trained] = {}
        for members in groups(plans):
            shared = plans[members[0]]
            # Sites with most steps first: those that have finished leave from the end.
            members = sorted(members, key=lambda k: -len(batches[k]))
            with self.base.holding(shared.layers, shared.delta):
                trained = self._train([plans[k] for k in members], [batches[k] for k in members])
            results.update(zip(members, trained, strict=True))
        return [results[k] for k in range(len(plans))]

    def _train(
        self, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        stack = self._stack([plan.start for plan in plans], plans[0])
        settings = [plan.training for plan in plans]
        rates = [
            own.rates(p.round, len(b)) for own, p, b in zip(settings, plans, batches, strict=True)
        ]
        optimizer = StackOptimizer(stack, settings, rates)
        criteria = [Criterion.of(own) for own in settings]
        noises = [Noise(plan) for plan in plans] if any(s.neftune_alpha for s in settings) else []
        rows = StackRows(plans, stack)
        applied = methods(rows)
        scales = tuple(_scale(plan.start) for plan in plans)
        generators = self._generators(plans)
        device = self.base.device
        losses = torch.zeros(len(plans), dtype=widest(device), device=device)
        norms: dict[str, list[float]] = {}
        leaves: Mapping[str, Tensor] = {}
        count, seen = 0, [0] * len(plans)
        noise = noisy(self.base.model, self._noise if noises else None)
        with self._wired(stack), noise, recomputed(self._recomputed, self._surroundings):
            whole = plans[0].layers is None and not noises  # what is kept has come without noise
            kept = self._prefix.for_training(batches) if whole else None
            for i in range(len(batches[0])):
                own = [mine[i] for mine in batches if len(mine) > i]
                for k, batch in enumerate(own):
                    seen[k] += len(batch)
                if count != len(own):
                    count = len(own)
                    leaves = stack.leaves(count)
                make = partial(
                    Pass,
                    leaves=leaves,
                    scales=scales[:count],
                    generators=generators[:count],
                    criteria=criteria[:count],
                    noises=noises[:count],
                )
                run = partial(self._passes, own, settings, kept, make)
                made, found = self._gradient(run, stack, rows, applied)
                losses[:count] += found * torch.tensor([len(batch) for batch in own], device=device)
                for method in applied:
                    method.correct(rows, count)
                norms = norms or {
                    "grad_A_norm": stack.gradient_norms("A").tolist(),
                    "grad_B_norm": stack.gradient_norms("B").tolist(),
                }
                optimizer.step(count, i, clip=not made)
        ends = [method.end(rows, [len(mine) for mine in batches]) for method in applied]
        return [
            Trained(
                stack.read(k),
                _metrics(float(losses[k]), seen[k], len(mine), norms, k),
                records(rows, k, ends),
            )
            for k, mine in enumerate(batches)
        ]

    def _passes(
        self,
        batches: Sequence[Batch],
        settings: Sequence[LocalTraining],
        kept: Mapping[str, Kept] | None,
        make: Callable[..., Pass],
    ) -> Iterator[Pass]:
        """The forward passes of one step, each made when the last one is done."""
        for own, shares in passes(batches, settings, self._task):
            yield make(self._step(own, kept), shares=shares)

    def _gradient(
        self,
        passes: Callable[[], Iterator[Pass]],
        stack: Stack,
        rows: StackRows,
        applied: Sequence[Method],
    ) -> tuple[bool, Tensor]:
        """The gradient of one step; whether a method made it; each site's mean loss, [K]."""
        makers = [method for method in applied if method.makes_gradient]
        if makers:
            losses = StackLosses(lambda: total(self._means(now) for now in passes()))
            if any(method.gradient(rows, losses) for method in makers):
                found = torch.zeros(()) if losses.first is None else widened(losses.first)
                return True, found.to(self.base.device)
        return False, total(self._backward(now, stack, i > 0) for i, now in enumerate(passes()))

    def _means(self, now: Pass) -> Tensor:
        """What this pass is of each site's mean loss, without gradients. [K]"""
        with torch.no_grad():
            each, weight = self._losses(now)
        return torch.stack([own.sum() for own in (each * weight).split(now.step.items)])

    def _backward(self, now: Pass, stack: Stack, further: bool) -> Tensor:
        """Forward and backward of one pass; what it is of each site's mean loss, [K]."""
        each, weight = self._losses(now)
        (stack.add_gradient if further else stack.backward)(each @ weight, now.leaves)
        per_site = widened(each.detach() * weight).split(now.step.items)
        return torch.stack([own.sum() for own in per_site])

    def _losses(self, now: Pass) -> tuple[Tensor, Tensor]:
        """Of each of the pass's targets, and what of its site's mean each counts. Both [m]"""
        if now.step.reference is not None:
            each = self._task.loss(*self._referred(now, now.step.reference), "none")
            return each, per_item(each, now.step.items, now.shares, now.step.items)
        answers, step = self._answers(now), now.step
        return self._items.losses(answers, step.targets, step.items, now.criteria, now.shares)

    def _noise(self, embedded: Tensor) -> Tensor:
        """NEFTune's, where embeddings are looked up once a pass, of the rows that the engine knows."""
        now = self._current()
        if now.bare:
            return torch.zeros_like(embedded)
        step = now.step
        if now.noised or embedded.shape[:-1] != (sum(step.rows), max(step.lengths)):
            raise RowsMismatch(
                f"embeddings {list(embedded.shape)} are looked up beside those of {sum(step.rows)} rows, and "
                "noise on them cannot be told by client",
                fix="Set [engine] cohort = 1.",
            )
        now.noised = True
        return together(now.noises, step.rows, step.lengths, embedded, self._side)

    def _surroundings(self) -> Surroundings:
        """What the layers have to find again where a block runs for the second time."""
        now = self._current()
        return nullcontext(), self._again(now, here(), [g.get_state() for g in now.generators])

    @contextmanager
    def _again(
        self, now: Pass, place: AbstractContextManager[None], drawn: Sequence[Tensor]
    ) -> Iterator[None]:
        left, self._now = self._now, now
        after = [generator.get_state() for generator in now.generators]
        rewind(now.generators, drawn)
        try:
            with place:
                yield
        finally:
            rewind(now.generators, after)
            self._now = left

    def _generators(self, plans: Sequence[TrainPlan]) -> list[torch.Generator]:
        if self._keep == 1.0:
            return []
        return [seeds.torch_generator(p.seed, "dropout", p.round, p.site) for p in plans]

    # -------------------------------------------------------------------------- evaluation

    def evaluate(
        self,
        adapter: Adapter,
        delta: Delta,
        batches: Iterable[Batch],
        layers: tuple[Layer, ...] | None = None,
    ) -> Tally:
        """Score one adapter; see :class:`fedft.clients.engines.base.Engine`."""
        stack = self._stack([adapter], None)
        leaves, scales = stack.leaves(1), (_scale(adapter),)

        def scored(batch: Batch) -> Tally:
            kept = None if layers else self._prefix.for_evaluation(batch)
            return self._tally(Pass(self._step([batch], kept), leaves, scales))

        with self.base.holding(layers, delta), torch.inference_mode():
            writing = Writing.of(self.base)
            if writing is None:
                with self._wired(stack):
                    return Tally.total(map(scored, batches))
            total = Tally()
            for batch in batches:
                with self._wired(stack):
                    total += scored(batch)
                with self._writing(Pass(one_client(len(batch)), leaves, scales), stack):
                    total += writing.tally(batch, whole=layers is None)
            return total

    @contextmanager
    def _writing(self, now: Pass, stack: Stack) -> Iterator[None]:
        """The adapter in the base's layers while it generates: rows of one client, of any length."""
        self._now = now
        try:
            with ExitStack() as undo:
                for layer, forward in self._forwards(stack.adapters[0].head):
                    undo.enter_context(overridden(layer, forward))
                yield
        finally:
            self._now = None

    def reference(self, batch: Batch) -> Tensor:
        """See :class:`fedft.clients.engines.base.Engine`."""
        with self.base.unshifted(), self.base.holding(None), self._wired(None):
            return self._reference(batch)

    def _reference(self, batch: Batch) -> Tensor:
        """Likewise, where our layers are in the base. What is kept meets autograd later."""
        with torch.inference_mode(False), torch.no_grad(), self.base.unshifted():
            now = Pass(self._joined([batch]), {}, (), bare=True)
            return self._items.of_rows(self._answers(now), now.step).cpu()

    def _referred(self, now: Pass, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets of a task that refers to the base."""
        return self._task.referred(self._items.of_rows(self._answers(now), now.step), reference)

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """See :class:`fedft.clients.engines.base.Engine`."""
        yield self.base.model

    def _tally(self, now: Pass) -> Tally:
        if now.step.reference is not None:
            return self._task.tally(*self._referred(now, now.step.reference))
        answers, targets = self._answers(now), now.step.targets
        if self._vocabulary is not None:
            return self._vocabulary.tally(self._task, answers, targets)
        rows = rows_of(now.step.answers, max(now.step.lengths))
        return self._task.tally(answers, targets, rows=rows, names=self.base.names)

    # ------------------------------------------------------------------------ forward pass

    def _stack(self, adapters: Sequence[Adapter], plan: TrainPlan | None) -> Stack:
        train = frozenset[Any]() if plan is None else plan.train
        return Stack(adapters, train, self._dtype, self.base.device)

    def _step(self, batches: Sequence[Batch], kept: Mapping[str, Kept] | None) -> Step:
        """The sites' batches as one; with what is kept of their rows, where it is."""
        if kept is None:
            step = self._joined(batches)
        else:
            step = self._joined([self._prefix.unopened(batch) for batch in batches])
            step = replace(step, entering=self._prefix.entering(batches, step, kept))
        if not self._task.refers:
            return step
        known, device = torch.cat(list(map(self._references.of, batches))), self.base.device
        return replace(step, reference=known.to(device, widest(device)))

    def _joined(self, batches: Sequence[Batch]) -> Step:
        step = join(batches, self._task, self._pad_token, packs=self._packs, side=self._side)
        return step.to(self.base.device)

    def _answers(self, now: Pass) -> Tensor:
        """Outputs for the step's targets, [m, …]; with a vocabulary its states, [m, d]."""
        self._now, now.encoded = now, None
        step = now.step
        with self._packing.using(step.layout), self._prefix.skipped(step.entering):
            answers = self._task.outputs(self.base.model, step.inputs)
        self._now = None
        if now.step.answers is None:
            return answers
        flat = answers.flatten(0, 1)
        chosen = flat.shape[0] == len(now.step.targets)  # the output layer saw answers only
        return flat if chosen else flat[now.step.answers]

    @contextmanager
    def _wired(self, stack: Stack | None) -> Iterator[None]:
        """Put our arithmetic into the base's layers, and take it out again."""
        own = frozenset[str]() if stack is None else stack.adapters[0].head
        with ExitStack() as undo:
            for layer, forward in self._forwards(own):
                undo.enter_context(overridden(layer, forward))
            if (output := self._output_layer()) is not None:
                undo.callback(output.register_forward_pre_hook(self._answers_only).remove)
            if self._vocabulary is not None:
                undo.enter_context(self._vocabulary.entered())
            if getattr(self.base.model.config, "is_encoder_decoder", False):
                encoder = cast(Any, self.base.model).get_encoder()
                undo.callback(encoder.register_forward_hook(self._note_encoded).remove)
            undo.enter_context(without_cache(self.base.model))
            undo.enter_context(self._packing.installed())
            yield

    def _forwards(
        self, tensors: Iterable[str]
    ) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        adapted = set(map(id, self.base.adapted.values()))
        for path, linear in linears(self.base.model):
            if id(linear) in adapted:
                yield linear, partial(self._adapted, path, linear, weight_of(linear))
            elif not self.base.head.holds(path):
                yield linear, partial(frozen, linear, weight_of(linear))
        for path in self.base.head.modules:
            head = self.base.model.get_submodule(path)
            own = [n for n in tensors if n.startswith(f"{PREFIX}{path}.")]
            if own:
                yield head, partial(self._head, copy.copy(head), path, own)

    def _adapted(self, path: str, linear: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        now = self._current()
        if now.bare:
            return frozen(linear, weight, x)
        segments = segments_of(now, x)
        mask = self._dropped(x) if now.generators else None
        A, B = now.leaves[factor_name(path, "A")], now.leaves[factor_name(path, "B")]
        R = now.leaves.get(factor_name(path, "R"))
        flat = x.reshape(-1, x.shape[-1])
        if now.wide is None or now.wide[0] is not x:
            now.wide = (x, flat.detach().to(A.dtype))
        branch = Branch(segments, scale_of_rows(now, segments), now.wide[1], mask)
        y: Any = AdaptedLinear.apply(flat, weight, linear.bias, A, B, R, branch)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _head(self, head: nn.Module, path: str, names: Sequence[str], x: Tensor) -> Tensor:
        now = self._current()
        own = {n.removeprefix(f"{PREFIX}{path}."): now.leaves[n] for n in names}
        return of_each(head, own, now.step.rows, x.to(self._dtype))

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout's mask over ``x``, see :func:`~fedft.clients.engines.dropping.masks`."""
        now = self._current()
        step = now.step
        # A decoder's layers read its own rows, but for what the encoder gave them.
        decoding = now.encoded is not None and x is not now.encoded
        lengths = (decoding and step.target_lengths) or step.lengths
        return masks(x, step, lengths, now.generators, self._keep, self._dtype)

    def _note_encoded(self, _: nn.Module, __: Any, answer: Any) -> None:
        self._current().encoded = answer[0]

    def _answers_only(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The vocabulary is the widest layer: it sees only tokens whose target is scored."""
        answers = self._current().step.answers
        return None if answers is None else (args[0].flatten(0, 1)[answers][None],)

    def _output_layer(self) -> nn.Module | None:
        model: Any = self.base.model
        return model.get_output_embeddings() if self._task.words else None

    def _current(self) -> Pass:
        assert self._now is not None, "the base runs under our layers outside of a pass"
        return self._now


def _scale(adapter: Adapter) -> float:
    return next((f.scale for f in adapter.factors.values()), 1.0)


def _metrics(
    loss_sum: float, examples: int, steps: int, norms: Mapping[str, list[float]], k: int
) -> dict[str, float]:
    first = {name: values[k] for name, values in norms.items()} if steps else {}
    return {"loss": loss_sum / max(examples, 1), "steps": float(steps), **first}
