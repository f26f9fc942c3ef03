"""What a task is: everything that the rest of the package has to know of what is fine-tuned.

A task says which columns it reads, how they are encoded, which outputs are scored against what,
by which loss and metrics, and by what a skewed partition goes. Nothing else in the package asks a
task for its name: it asks for one of the properties below.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import Declared, Metric, Predictions, Sum, Tally
from fedft.core.precise import widened
from fedft.core.tasks.asked import Asked
from fedft.core.tasks.columns import Column
from fedft.core.tasks.criterion import Criterion
from fedft.core.tasks.formats import Format
from fedft.core.tasks.pooling import EmbeddingSpec
from fedft.core.tasks.rows import RawRows, joined
from fedft.core.training import LocalTraining
from fedft.core.types import IGNORED, Batch

Reduction = Literal["none", "mean"]


class Task(ABC):
    """One kind of fine-tuning. Tasks have no state: one object serves all runs of a process.

    A run that names metrics of its own has a copy with these in place of the task's, see
    :meth:`with_metrics`.

    Attributes:
        name: of ``[model] task``.
        auto: the class of transformers that loads its model.
        peft: peft's ``task_type``; None where it has none.
        columns: what is read; their keys are those of ``[data]``, or of ``[data.columns]``.
        formats: other ways in which rows may come, each with columns of its own; ``columns`` are
            then those of one of them.
        metrics: what is reported; the first one decides about *best* and patience.
        also: metrics whose sums travel and are in no report.
        reads: what the model is given: a tokenizer or an image processor encodes it.
        head: whether the model gets a new head, which an adapter brings.
        pools: whether that head reads one token of a row, which padding must not be taken for.
        words: whether the outputs are logits of the tokenizer's words. The loss of a frozen output
            layer is then taken over slices of the vocabulary, and only where a target is.
        causal: whether an output may depend on what stands before it alone.
        one_table: whether all words enter the model through one table of embeddings.
        writes: whether the model can be asked for a text: metrics over texts need it.
        packs: whether several rows may be put into one sequence, where a token sees its own row alone.
        alone: whether the loss of an example depends on that example alone. Otherwise clients are
            trained one after the other, and DP-SGD, which clips by example, is refused.
        together: whether an evaluation is scored from the outputs of all its rows at once, so that it
            does not depend on how they are put into batches.
        reads_model: keys of ``[model]`` that say something to this task, and to others nothing.
        made_up: shape of an output of one row, where the laws of tasks make outputs up and it is
            neither a number a class nor one a word.
        each: rows of the model that an example has, see :class:`~fedft.core.types.Batch`.
        refers: whether rows are weighed as wholes against what the base gives them without an
            adapter: the engines hand both to :meth:`referred`, and ``loss`` gets what that makes
            of them. Needs ``words``.
        usage: a line of Markdown for the card of an adapter: how a row is put into the model, where
            that is more than a call of the tokenizer.
    """

    name: ClassVar[str]
    auto: ClassVar[str]
    peft: ClassVar[str | None] = None
    columns: ClassVar[tuple[Column, ...]]
    formats: ClassVar[tuple[Format, ...]] = ()
    metrics: tuple[Metric, ...]
    also: tuple[Metric, ...] = ()
    reads: ClassVar[Literal["text", "image"]] = "text"
    head: ClassVar[bool] = True
    pools: ClassVar[bool] = False
    words: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    one_table: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    alone: ClassVar[bool] = True
    together: ClassVar[bool] = False
    reads_model: ClassVar[frozenset[str]] = frozenset()
    made_up: ClassVar[tuple[int, ...] | None] = None
    each: ClassVar[int] = 1
    refers: ClassVar[bool] = False
    usage: ClassVar[str] = ""

    def with_objective(self, table: Mapping[str, Any]) -> "Task":
        """The same task with the numbers of its loss as ``[model] objective`` has them.

        Raises:
            ValueError: its loss has no such number, or not of this size.
        """
        if table:
            raise ValueError(f"objective: the loss of {self.name} has nothing to be set")
        return self

    # ------------------------------------------------------------------------------- data

    @abstractmethod
    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        """Rows as examples, one a row.

        Args:
            rows: checked.
            encoder: of the model: a :class:`~fedft.core.text.special_tokens.TextEncoder` (or a
                tokenizer), or a function from an RGB image to pixel values [c, h, w].
            max_length: longest row in tokens.
        """

    def fault(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """What is wrong between the columns of a row: the column's key and the reason.

        Each value has passed its own column's check.

        Args:
            row: value by key; classes by name.
        """
        return None

    def strata(self, rows: RawRows) -> NDArray[np.int64] | None:
        """By what skewed partitions and stratified splits go, a number a row; None: by nothing.

        Default: the class of a row, where it has one.
        """
        return rows.labels if isinstance(rows.labels, np.ndarray) else None

    def counts(self, rows: RawRows) -> NDArray[np.int64]:
        """How often each class is a label. [classes]"""
        several = () if rows.labels is None else rows.labels
        flat = several if isinstance(several, np.ndarray) else joined(several)
        return np.bincount(flat, minlength=len(rows.classes))

    def remarks(self, rows: RawRows) -> Sequence[str]:
        """What a reader should know of how these rows are read, a sentence each."""
        return ()

    @property
    def classes(self) -> bool:
        """Whether the data name classes, and the outputs are one for each."""
        return any(column.classes for column in self.columns)

    # ------------------------------------------------------------------------------ model

    def options(self, classes: int) -> dict[str, Any]:
        """What transformers is told of the model beside its checkpoint."""
        return {"num_labels": classes} if self.head else {}

    def settle(self, model: nn.Module, embedding: EmbeddingSpec | None, folder: Path) -> None:
        """Make a model that was just loaded, or made empty, fit the task, in place. Default: it does.

        Args:
            model: of transformers, without any adapter.
            embedding: the table `[model] embedding`.
            folder: where the model's files are.
        """
        return

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """What is scored of a forward pass: [b, …], or [b, t, …] where targets have positions."""
        return model(**inputs).logits

    # ------------------------------------------------------------------------------- loss

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Where the outputs of a batch are scored, and against what.

        Args:
            labels: of a :class:`~fedft.core.types.Batch`.

        Returns:
            Positions among the b·t outputs, [m] int64, and targets, [m]; whole numbers that are
            ``IGNORED`` are not scored. Positions None: an output a row, [b], and targets [b, …].
        """
        return None, labels

    def referred(self, own: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Of a task that ``refers``: outputs [b, …] and targets [b, …] of its loss and metrics.

        Args:
            own: log-probability of each row's targets, [b * each].
            reference: the same by the base without an adapter.
        """
        raise NotImplementedError(f"{type(self).__name__} refers, and does not say to what end")

    def scored(self, targets: Tensor) -> Tensor:
        """Which targets count. bool [m]"""
        if targets.is_floating_point():
            return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        found = targets != IGNORED
        return found if found.ndim == 1 else found.flatten(1).any(1)

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        """The loss of each item, [m], zero where it is ignored; or the mean of those that are not.

        Default: cross-entropy in float32 or float64.
        """
        return F.cross_entropy(wide(outputs), targets, ignore_index=IGNORED, reduction=reduction)

    @property
    def cross_entropy(self) -> bool:
        """Whether the loss is the cross-entropy of one class an item, which can be smoothed and weighed.

        Default: whether a task leaves :meth:`loss` as it is.
        """
        return type(self).loss is Task.loss

    def training_loss(
        self, outputs: Tensor, targets: Tensor, criterion: Criterion, reduction: Reduction
    ) -> Tensor:
        """:meth:`loss` as clients train with it where they are asked for smoothing or weights.

        Of a task whose loss is a ``cross_entropy``; evaluation never comes here.
        """
        logits = wide(outputs)
        return F.cross_entropy(
            logits,
            targets,
            weight=criterion.weigh(logits),
            ignore_index=IGNORED,
            reduction=reduction,
            label_smoothing=criterion.smoothing,
        )

    def against(self, training: LocalTraining) -> str | None:
        """Why clients cannot be trained so, with the key of `[training]`; None where they can."""
        if training.label_smoothing and not self.cross_entropy:
            return (
                f"label-smoothing = {training.label_smoothing:g}: the loss of {self.name} is no "
                "cross-entropy of classes; leave it out"
            )
        if training.class_weights is not None and not (self.cross_entropy and self.classes):
            return f"class-weights: {self.name} has no classes to weigh; leave them out"
        if training.neftune_alpha and self.reads != "text":
            return (
                f"neftune-alpha = {training.neftune_alpha:g}: {self.name} reads no text, and NEFTune is "
                "noise on the embeddings of words"
            )
        if training.neftune_alpha and not self.one_table:
            return (
                f"neftune-alpha = {training.neftune_alpha:g}: models of {self.name} look words up in an "
                "encoder and a decoder, and NEFTune is for one table of embeddings; leave it out"
            )
        return None

    # ----------------------------------------------------------------------------- scores

    def predicted(self, outputs: Tensor) -> Tensor:
        """What the model says of each item, comparable to its target. Default: the likeliest class."""
        return outputs.argmax(-1)

    def tally(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        rows: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> Tally:
        """The sums of one batch; they add up over batches, slices and clients.

        Args:
            outputs: lined up with the targets, [m, …].
            targets: [m, …].
            rows: of which row of the batch each is, [m], see :func:`rows_of`; None where each is one.
            names: of the classes.
        """
        losses, scored = self.loss(outputs, targets, "none"), self.scored(targets)
        found = Predictions(
            losses[scored],
            self.predicted(outputs)[scored],
            targets[scored],
            outputs.shape[-1],
            outputs[scored] if self.needs_outputs else None,
            None if rows is None else rows[scored],
            names,
        )
        return self.counted(found, float(widened(losses).sum()))

    def judged(
        self,
        outputs: Tensor,
        labels: Tensor,
        names: Sequence[str] = (),
        reference: Tensor | None = None,
    ) -> Tally:
        """The sums of one batch from all of its outputs.

        Args:
            outputs: of :meth:`outputs`, [b, …] or [b, t, …].
            labels: of the batch.
            names: of the classes.
            reference: of a task that ``refers``, as :meth:`referred` takes it; None is nothing at all.
        """
        if self.refers:
            own = log_likelihoods(self, outputs, labels)
            known = torch.zeros_like(own) if reference is None else reference
            return self.tally(*self.referred(own, known), names=names)
        positions, targets = self.targets(labels)
        if positions is None:
            return self.tally(outputs, targets, names=names)
        flat, rows = outputs.flatten(0, 1)[positions], rows_of(positions, outputs.shape[1])
        return self.tally(flat, targets, rows=rows, names=names)

    def counted(self, found: Predictions, loss_sum: float) -> Tally:
        """The sums of items whose losses and predictions are known."""
        own = [metric for metric in self._summing if not metric.needs_texts]
        sums = {name: s for metric in own for name, s in metric.tally(found).items()}
        columns = {name: [c] for metric in own for name, c in metric.gather(found).items()}
        return Tally(loss_sum, len(found.targets), sums, columns)

    def asked(self, batch: Batch, pad: int) -> Asked:
        """What the model is to go on from, and the text that is wanted; where the task ``writes``.

        Args:
            batch: of an evaluation, on the CPU.
            pad: token id of padding.
        """
        raise NotImplementedError(f"{self.name} asks for no text")

    def read(self, texts: Sequence[tuple[str, str]]) -> Tally:
        """The sums of metrics over texts: (what the model says, what is wanted) of each row."""
        nothing = torch.zeros(0)
        found = Predictions(nothing, nothing, nothing, 0, texts=texts)
        own = (metric for metric in self._summing if metric.needs_texts)
        return Tally(sums={name: s for metric in own for name, s in metric.tally(found).items()})

    def scores(self, tally: Tally) -> dict[str, float]:
        """``loss`` and every metric, in the order of ``metrics``; empty where nothing was scored.

        A metric is left out where the columns that it gathers were not handed over.
        """
        if not tally.count:
            return {}
        loss = tally.loss_sum / tally.count
        able = [metric for metric in self.metrics if metric.gathers.keys() <= tally.columns.keys()]
        return {"loss": loss, **{metric.name: metric.value(tally) for metric in able}}

    def better(self, scores: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
        """Whether ``scores`` are better than the best ones so far, by the first metric."""
        return self.metrics[0].declared.better(scores, best)

    @property
    def predicts(self) -> frozenset[str]:
        """Kinds of predictions that metrics are made for.

        ``class``: one class an item; ``labels``: any number of them a row; ``tags``: one for each word
        of a row; ``number``: a number a row; ``word``: a word of the vocabulary, token by token;
        ``rank``: how high the right one stands among all, in the outputs; ``pair``: two rewards a row,
        that of the chosen one first, in the outputs.
        Default: as the columns with classes say.
        """
        if self.words:
            return frozenset({"word"})
        kinds = {column.classes for column in self.columns}
        if kinds & {"one", "many"}:
            return frozenset({"class"}) if "one" in kinds else frozenset({"labels"})
        return frozenset({"number"})

    def can_be_judged_by(self, metric: Metric) -> bool:
        """Whether a metric can judge what the model says."""
        if metric in (*self.metrics, *self.also):
            return True
        if metric.needs_texts:
            return self.writes
        return not metric.judges or bool(metric.judges & self.predicts)

    def with_metrics(self, metrics: Sequence[Metric], also: Sequence[Metric] = ()) -> "Task":
        """The same task, judged by other metrics.

        Args:
            metrics: in place of the task's own; the first one decides.
            also: in addition to the task's own: their sums travel, and they are in no report.
        """
        found = copy.copy(self)
        found.metrics, found.also = tuple(metrics), (*self.also, *also)
        return found

    @property
    def declared(self) -> tuple[Declared, ...]:
        """The metrics as records and reports know them."""
        return tuple(metric.declared for metric in self.metrics)

    @property
    def sums(self) -> Mapping[str, Sum]:
        """What a tally holds beside loss and count, by name, in the order of the wire."""
        return {name: one for metric in self._summing for name, one in metric.sums.items()}

    @property
    def gathers(self) -> Mapping[str, Callable[[int], int]]:
        """Columns that the metrics need of every item: name → numbers, from the number of classes."""
        return {n: width for metric in self._summing for n, width in metric.gathers.items()}

    @property
    def needs_outputs(self) -> bool:
        """Whether a metric reads the outputs themselves."""
        return any(metric.needs_outputs for metric in self._summing)

    @property
    def needs_texts(self) -> bool:
        """Whether a metric judges texts, so that an evaluation has to generate them."""
        return any(metric.needs_texts for metric in self._summing)

    @property
    def _summing(self) -> tuple[Metric, ...]:
        return (*self.metrics, *self.also)


def rows_of(positions: Tensor | None, length: int) -> Tensor | None:
    """Of which row of a batch each position is, [m]; None where an output is a row.

    Args:
        positions: among the b·t outputs, as :meth:`Task.targets` has them.
        length: t.
    """
    return None if positions is None else positions // length


def log_likelihoods(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each row's targets, from logits. [n]

    Args:
        task: whose outputs are logits of words.
        outputs: [n, t, V].
        labels: of a :class:`~fedft.core.types.Batch`, [n, t].
    """
    positions, targets = task.targets(labels)
    assert positions is not None, "a row as a whole is made of its tokens"
    scored = task.scored(targets)
    at, wanted = positions[scored], targets[scored]
    losses = F.cross_entropy(wide(outputs.flatten(0, 1)[at]), wanted, reduction="none")
    return by_row(losses, at, labels.shape)


def by_row(losses: Tensor, at: Tensor, shape: Sequence[int]) -> Tensor:
    """Losses of tokens as the log-probability of their rows: minus their sums. [rows]

    In float64: two sums of hundreds are subtracted, and their difference is what is learnt from.

    Args:
        losses: [m].
        at: where each is predicted within the rows' positions end to end, [m].
        shape: of the labels, [n, t].
    """
    each = widened(losses)
    # Laid out and summed, not added up where they fall: a GPU would do that in any order.
    return -each.new_zeros(shape[0] * shape[1]).index_copy(0, at, each).view(*shape).sum(1)


def wide(outputs: Tensor) -> Tensor:
    """Outputs in float64 where they are, else in float32: what losses are taken in."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()
