"""Local training with stock PEFT, one site after another.

This is the readable definition of what a site does; the cohort engine must agree with it. Both take
the loss over a vocabulary from :mod:`fedft.clients.engines.chunked_loss`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedft.clients.engines.accumulation import counted, parts, shares
from fedft.clients.engines.base import Trained
from fedft.clients.engines.by_example import own_gradients, recording
from fedft.clients.engines.checkpointing import recomputable, recomputed, without_cache
from fedft.clients.engines.chunked_loss import Vocabulary
from fedft.clients.engines.copied import Copied, copied
from fedft.clients.engines.neftune import alone, noisy
from fedft.clients.engines.references import References
from fedft.clients.engines.rows import LoopRows, records
from fedft.clients.engines.writing import Writing
from fedft.clients.methods import Method, methods
from fedft.core import optimizers, seeds
from fedft.core.errors import MismatchError
from fedft.core.metrics import Tally
from fedft.core.models import Base, transposes
from fedft.core.precise import widest
from fedft.core.spec import LoraSpec
from fedft.core.sublayers import Layer
from fedft.core.tasks import by_row, log_likelihoods
from fedft.core.tasks.criterion import Criterion
from fedft.core.types import (
    PREFIX,
    Adapter,
    Batch,
    Delta,
    LocalTraining,
    Part,
    TrainPlan,
    factor_name,
    part_of,
)
from fedft.core.types import clone as copy_of

_SLOT = "default"  # PEFT's name of the only adapter


class LoopEngine(ABC):
    """The loop of local training over one resident model, whatever is adapted in it.

    An engine puts its trainable tensors into the model once, under their PEFT names; a site's
    adapter is swapped in, which costs a millisecond where rebuilding costs a hundred.

    Args:
        base: the frozen model, with or without the adapter's layers in it.
        model: what is called with a batch's inputs.
        checkpointing: blocks run again in the backward pass, see :mod:`fedft.clients.engines.checkpointing`.

    Raises:
        MismatchError: ``checkpointing``, and the blocks cannot be told from other layers.
    """

    def __init__(self, base: Base, model: nn.Module, *, checkpointing: bool = False) -> None:
        self.base = base
        self._task = base.kind
        self._model = model
        self._references = References(self.reference)
        self._refers = False  # at this moment
        self._vocabulary = Vocabulary.of(base)
        self._recomputed = recomputable(base) if checkpointing else ()
        self._head = {
            PREFIX + name: base.model.get_parameter(name) for name in base.head.parameters
        }

    @abstractmethod
    def _load(self, adapter: Adapter, plan: TrainPlan | None) -> None:
        """Put an adapter into the model; only what the plan trains requires a gradient."""

    @abstractmethod
    def _layers_named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors of the adapted layers, by PEFT name, in the order of the model."""

    @abstractmethod
    def _off(self) -> AbstractContextManager[object]:
        """For the time of the context, the model runs without its adapter."""

    @abstractmethod
    def _dropouts(self) -> Iterable[nn.Module]:
        """The modules that drop inputs of the adapter while training."""

    def train(
        self, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        """One site after another; see :class:`fedft.clients.engines.base.Engine`."""
        return [self._train(plan, own) for plan, own in zip(plans, batches, strict=True)]

    def _train(self, plan: TrainPlan, batches: Sequence[Batch]) -> Trained:
        self._load(plan.start, plan)
        self._dropout(True)
        with self.base.holding(plan.layers, plan.delta), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(plan.seed, "dropout", plan.round, plan.site))
            noise = noisy(self.base.model, self._unless_referring(alone(plan)))
            with recomputed(self._recomputed), without_cache(self.base.model), noise:
                metrics, left = self._loop(plan, batches)
        self._dropout(False)
        return Trained(self._read(plan.start), metrics, left)

    def frozen(self) -> dict[str, nn.Parameter]:
        """The weights that no plan trains, by their names in the model."""
        own = {id(parameter) for _, parameter in self._named()}
        named = self._model.named_parameters()
        return {name: weight for name, weight in named if id(weight) not in own}

    def copied(self, plan: TrainPlan) -> Copied:
        """The model with a plan's start in it, for others to train: its own, but for what is frozen."""
        self._load(plan.start, plan)
        adapter, present = dict(self._named()), plan.start.tensors()
        return copied(self._model, {n: adapter[n] for n in present}, self.frozen())

    def _loop(
        self, plan: TrainPlan, batches: Sequence[Batch]
    ) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
        """Train in place; the metrics, and what the plan's methods leave behind."""
        present = plan.start.tensors()
        named = {n: p for n, p in self._named() if p.requires_grad}
        trained = list(named.values())
        frozen = {n: p for n, p in self._named() if n not in named and n in present}
        rows = LoopRows(plan, named, frozen)
        applied = methods(rows)
        settings = optimizers.settings(plan.training)
        optimizer = optimizers.make(plan.training, [{"params": trained, **settings}])
        rates = plan.training.rates(plan.round, len(batches))
        loss_sum, examples = 0.0, 0
        first: dict[str, float] = {}
        with recording(self._model) if any(m.by_example for m in applied) else nullcontext():
            for i, batch in enumerate(batches):
                step = self._step(batch, plan.training)
                made, loss = self._gradient(step, rows, trained, applied)
                first = first or self._gradient_norms()
                if plan.training.clip_norm is not None and not made:
                    nn.utils.clip_grad_norm_(trained, plan.training.clip_norm)
                if rates is not None:
                    optimizers.set_rate(optimizer, rates(i))
                optimizer.step()
                loss_sum += loss * len(batch)
                examples += len(batch)
        if applied:
            rows.take()
        left = records(rows, 0, [method.end(rows, [len(batches)]) for method in applied])
        if any(method.silent for method in applied):
            return {"steps": float(len(batches))}, left
        return {"loss": loss_sum / max(examples, 1), "steps": float(len(batches)), **first}, left

    def _step(self, batch: Batch, training: LocalTraining) -> "_Step":
        criterion = Criterion.of(training)
        passes = parts(batch, training)
        amounts = shares(passes, lambda part: counted(part, self._task, criterion))
        return _Step(batch, passes, amounts, criterion)

    def _gradient(
        self,
        step: "_Step",
        rows: LoopRows,
        trained: Sequence[nn.Parameter],
        applied: Sequence[Method],
    ) -> tuple[bool, float]:
        """The gradient of one step, in the parameters; whether a method made it; the mean loss."""
        makers = [method for method in applied if method.makes_gradient]
        losses = _Losses(self, step, rows, trained)
        if makers:
            rows.take()
        made = any(method.gradient(rows, losses) for method in makers)
        if made:
            rows.put()  # as it was, whatever was tried in between
            loss = losses.first
        else:
            for parameter in trained:
                parameter.grad = None
            loss = 0.0
            for value in self.means(step):  # each is let go of before the next one is made
                value.backward()
                loss += float(value.detach())
            if applied:
                rows.take()
        for method in applied:
            method.correct(rows, 1)
        if applied:
            rows.give()
        return made, loss

    def means(self, step: "_Step") -> Iterator[Tensor]:
        """The step's mean loss, a summand for each of its forward passes. Scalars"""
        if len(step.passes) == 1:
            yield self.mean_loss(step.passes[0], step.criterion)
            return
        for part, share in zip(step.passes, step.shares, strict=True):
            if share:  # the mean of no items is no number
                yield share * self.mean_loss(part, step.criterion)

    def mean_loss(self, batch: Batch, criterion: Criterion | None = None) -> Tensor:
        """The task's loss, as clients train with it. Scalar"""
        if self._task.refers:
            return self._task.loss(*self._referred(batch), "mean")
        if self._vocabulary is None:
            return self._mean(self._outputs(batch), batch.labels.to(self.base.device), criterion)
        smoothing = 0.0 if criterion is None else criterion.smoothing
        states, targets = self._scored(batch, self._vocabulary)
        return self._vocabulary.losses(states, targets, smoothing).mean()

    def _mean(self, outputs: Tensor, labels: Tensor, criterion: Criterion | None) -> Tensor:
        lined_up = self._lined_up(outputs, labels)
        if criterion is None:
            return self._task.loss(*lined_up, "mean")
        return self._task.training_loss(*lined_up, criterion, "mean")

    def _lined_up(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [m, …] and what they should be, [m, …], with what is ignored."""
        positions, targets = self._task.targets(labels)
        return outputs if positions is None else outputs.flatten(0, 1)[positions], targets

    def _referred(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs and targets of a task that refers to the base."""
        device = self.base.device
        reference = self._references.of(batch).to(device, widest(device))
        return self._task.referred(self._log_likelihoods(batch), reference)

    def _log_likelihoods(self, batch: Batch) -> Tensor:
        """Of each row's targets. [n]"""
        labels = batch.labels.to(self.base.device)
        if self._vocabulary is None:
            return log_likelihoods(self._task, self._outputs(batch), labels)
        positions, targets = self._task.targets(labels)
        assert positions is not None
        losses = self._vocabulary.losses(*self._scored(batch, self._vocabulary))
        return by_row(losses, positions[self._task.scored(targets)], labels.shape)

    def reference(self, batch: Batch) -> Tensor:
        """See :class:`fedft.clients.engines.base.Engine`."""
        learns = [(p, p.requires_grad) for _, p in self._named()]
        self._refers = True
        # What is kept meets autograd later, which refuses tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad(), self.base.unshifted(), self._off():
            found = self._log_likelihoods(batch).cpu()
        self._refers = False
        for parameter, flag in learns:
            parameter.requires_grad_(flag)  # peft leaves all of an adapter trainable
        return found

    def _unless_referring(
        self, noise: Callable[[Tensor], Tensor] | None
    ) -> Callable[[Tensor], Tensor] | None:
        """Noise for the model that trains, and none for what it is compared with."""
        if noise is None:
            return None
        return lambda embedded: torch.zeros_like(embedded) if self._refers else noise(embedded)

    def _tally(self, batch: Batch) -> Tally:
        if self._task.refers:
            return self._task.tally(*self._referred(batch))
        if self._vocabulary is None:
            labels = batch.labels.to(self.base.device)
            return self._task.judged(self._outputs(batch), labels, self.base.names)
        return self._vocabulary.tally(self._task, *self._scored(batch, self._vocabulary))

    def _scored(self, batch: Batch, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """States [m, d] of the tokens that predict something, and what, [m]."""
        with vocabulary.entered():
            states = self._outputs(batch)
        states, targets = self._lined_up(states, batch.labels.to(self.base.device))
        scored = self._task.scored(targets)
        return states[scored], targets[scored]

    def own_losses(self, batch: Batch, criterion: Criterion | None = None) -> Tensor:
        """The sum of each example's own mean loss, which no other example of the batch changes."""
        if not self._task.alone:
            raise MismatchError(
                f"DP-SGD clips the gradient of each example, and in {self._task.name} the loss of one "
                "depends on others",
                fix="Leave [training] dp out, or choose another task.",
            )
        if self._task.refers:
            return self._task.loss(*self._referred(batch), "none").sum()
        outputs, labels = self._outputs(batch), batch.labels.to(self.base.device)
        rows = zip(outputs.split(1), labels.split(1), strict=True)
        return torch.stack([self._mean(row, label, criterion) for row, label in rows]).sum()

    def evaluate(
        self,
        adapter: Adapter,
        delta: Delta,
        batches: Iterable[Batch],
        layers: tuple[Layer, ...] | None = None,
    ) -> Tally:
        """Score one adapter; see :class:`fedft.clients.engines.base.Engine`."""
        self._load(adapter, None)
        with self.base.holding(layers, delta), torch.inference_mode():
            if self._task.together:
                return self._judged(batches)
            writing = Writing.of(self.base)
            if writing is None:
                return Tally.total(self._tally(batch) for batch in batches)
            return Tally.total(
                self._tally(batch) + writing.tally(batch, whole=layers is None) for batch in batches
            )

    def _judged(self, batches: Iterable[Batch]) -> Tally:
        """The sums of all rows, from all of their outputs at once."""
        found = [(self._outputs(b), b.labels.to(self.base.device)) for b in batches]
        if not found:
            return Tally()
        outputs, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self._task.judged(outputs, labels, self.base.names)

    def bare(self) -> AbstractContextManager[nn.Module]:
        """See :class:`fedft.clients.engines.base.Engine`."""
        raise MismatchError(
            "blocks are compared under plain LoRA only", fix='Set [pruning] selection = "random".'
        )

    def _outputs(self, batch: Batch) -> Tensor:
        inputs = {name: tensor.to(self.base.device) for name, tensor in batch.inputs.items()}
        return self._task.outputs(self._model, inputs)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._layers_named()
        yield from self._head.items()

    def _load_head(self, adapter: Adapter, plan: TrainPlan | None) -> None:
        for name, parameter in self._head.items():
            parameter.data = adapter.head[name].to(parameter.device, copy=True)
            parameter.requires_grad_(plan is not None and plan.trains(name))

    def _parameter(self, tensor: Tensor, trains: bool) -> nn.Parameter:
        return nn.Parameter(tensor.to(self.base.device, copy=True), requires_grad=trains)

    def _read(self, start: Adapter) -> Adapter:
        present = start.tensors()
        return start.replaced({n: copy_of(p) for n, p in self._named() if n in present})

    def _gradient_norms(self) -> dict[str, float]:
        def norm(part: Part) -> float:
            return math.sqrt(
                sum(
                    float(p.grad.square().sum())
                    for name, p in self._layers_named()
                    if p.grad is not None and part_of(name) == part
                )
            )

        return {"grad_A_norm": norm("A"), "grad_B_norm": norm("B")}

    def _dropout(self, active: bool) -> None:
        for module in self._dropouts():
            module.train(active)


class PeftEngine(LoopEngine):
    """Trains sites' LoRA factors through ``peft.get_peft_model``."""

    def __init__(self, base: Base, lora: LoraSpec, *, checkpointing: bool = False) -> None:
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=cast(int, lora.alpha),
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            target_modules=list(base.adapted),
            fan_in_fan_out=transposes(base.adapted.values()),
        )
        model = get_peft_model(cast(PreTrainedModel, base.model), config).eval()
        super().__init__(base, model, checkpointing=checkpointing)
        wrapped = dict(base.model.named_modules())  # PEFT injects its layers in place
        if bare := [path for path in base.adapted if not isinstance(wrapped[path], LoraLayer)]:
            names = sorted({path.rpartition(".")[2] for path in bare})
            raise MismatchError(
                f"peft does not adapt {bare[0]} of this model, nor {len(bare) - 1} other layers: it takes "
                f"{', '.join(names)} for the names of experts' weights",
                fix=f"Set [lora] exclude-modules = {names}.".replace("'", '"'),
            )
        self._wrapped = {path: cast(LoraLayer, wrapped[path]) for path in base.adapted}
        self._layers = self._wrapped  # those that the adapter in hand has

    def _layers_named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, layer in self._layers.items():
            down = layer.lora_A[_SLOT]
            yield factor_name(path, "A"), cast(nn.Parameter, down.weight)  # [r, d_in]
            if isinstance(down, _Cored):
                yield factor_name(path, "R"), down.core
            yield factor_name(path, "B"), cast(nn.Parameter, layer.lora_B[_SLOT].weight)

    def copied(self, plan: TrainPlan) -> Copied:
        """See :meth:`LoopEngine.copied`; what peft says of the adapter is true of it at its rank."""
        own, rank = super().copied(plan), plan.start.rank
        config = cast(LoraConfig, cast(PeftModel, own.model).peft_config[_SLOT])
        for factors in [*plan.start.factors.values()][:1]:
            config.r = rank
            alpha = factors.scale * (math.sqrt(rank) if config.use_rslora else rank)
            config.lora_alpha = cast(int, alpha)
        return own

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """See :class:`fedft.clients.engines.base.Engine`."""
        with cast(PeftModel, self._model).disable_adapter():
            yield self.base.model

    def _off(self) -> AbstractContextManager[object]:
        return self.bare()

    def leave(self) -> None:
        """Take PEFT's layers out of the base, which is then as it came; the engine is done."""
        cast(PeftModel, self._model).unload()

    def _dropouts(self) -> Iterable[nn.Module]:
        return [layer.lora_dropout[_SLOT] for layer in self._layers.values()]

    def _load(self, adapter: Adapter, plan: TrainPlan | None) -> None:
        train: frozenset[Part] = frozenset() if plan is None else plan.train
        self._layers = {path: self._wrapped[path] for path in adapter.factors}
        for path, layer in self._layers.items():
            f = adapter.factors[path]
            layer.scaling[_SLOT] = f.scale
            down = layer.lora_A[_SLOT]
            if f.R is not None and not isinstance(down, _Cored):
                down = layer.lora_A[_SLOT] = _Cored(down)
            down.weight = self._parameter(f.A, "A" in train)
            layer.lora_B[_SLOT].weight = self._parameter(f.B, "B" in train)
            if isinstance(down, _Cored):
                core = torch.eye(f.rank, dtype=f.A.dtype) if f.R is None else f.R
                down.core = self._parameter(core, "R" in train and f.R is not None)
        self._load_head(adapter, plan)


@dataclass(frozen=True, eq=False)
class _Step:
    """One step of a client.

    Attributes:
        batch: its rows.
        passes: the same, as they go through the model.
        shares: what of the step's mean each pass is.
        criterion: of the loss; None where it is the task's own.
    """

    batch: Batch
    passes: Sequence[Batch]
    shares: Sequence[float]
    criterion: Criterion | None


class _Losses:
    """The step in hand, see :class:`fedft.clients.methods.Losses`."""

    def __init__(
        self, engine: LoopEngine, step: _Step, rows: LoopRows, trained: Sequence[nn.Parameter]
    ) -> None:
        self._engine, self._step, self._rows, self._trained = engine, step, rows, trained
        self._first: float | None = None

    @property
    def first(self) -> float:
        """What the first call of :meth:`mean` gave; zero without any."""
        return self._first or 0.0

    def mean(self) -> Tensor:
        """See :class:`fedft.clients.methods.Losses`. [1]"""
        self._rows.put()
        with torch.no_grad():
            loss = torch.stack(list(self._engine.means(self._step))).sum()
        if self._first is None:
            self._first = float(loss)
        return loss[None]

    def by_example(self) -> list[Tensor]:
        """See :class:`fedft.clients.methods.Losses`."""
        engine, (batch, criterion) = self._engine, (self._step.batch, self._step.criterion)
        losses = partial(engine.own_losses, batch, criterion)
        return own_gradients(self._trained, len(batch), losses, batch.each)


class _Cored(nn.Module):
    """``R A x`` in place of ``A x``: the down-projection of LoRA-XS and Fed-SB."""

    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, down.weight)  # [r, d_in]; PEFT reads its dtype
        self.core = nn.Parameter(torch.eye(self.weight.shape[0]))  # [r, r]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.core)
