"""What is tried once before the first round: do rows of all lengths pass, do both engines agree?

The cohort engine rests on an assumption about the network: that the rows of every linear layer lie
client by client. No list of architectures can say where that holds, so it is measured: two clients
with batches of different size and length take two steps in each engine. Where losses or updates
differ, the plain loop trains.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from fedft.clients.engines.base import Engine, Trained
from fedft.core import models, seeds
from fedft.core.adapters import family_of
from fedft.core.checkpoint import first_sentence, lacks_memory, stamp
from fedft.core.data.packing import best_fit
from fedft.core.data.source import Data
from fedft.core.errors import FedftError, MismatchError
from fedft.core.examples import Examples, TokenExamples
from fedft.core.models import Base
from fedft.core.spec import TaskSpec
from fedft.core.tasks import TASKS, task_of
from fedft.core.trial import Verdict
from fedft.core.types import IGNORED, Adapter, Batch, Factors, LocalTraining, TrainPlan

_SMALL = 400_000_000
"""Parameters up to which the engines are compared on the whole model, in float64."""

_ROUNDING = {torch.float64: (2e-6, 1e-4), torch.float32: (1e-4, 2e-2)}
"""Relative differences of losses and of updates that rounding explains. In float64, too: parts of
many models compute in float32 whatever their weights are in."""

_CHUNK = 4096
"""Rows that are looked through at once."""

_PACKED = 512
"""Rows, the longest ones, out of which packed sequences are tried."""

_TOKENS = 64
"""Longest row of the comparison, where the data have shorter ones."""


class Bench(Protocol):
    """What is asked of a workbench; see :class:`fedft.clients.resident.Workbench`."""

    @property
    def task(self) -> TaskSpec:
        """As the server sent it."""
        ...

    @property
    def data(self) -> Data:
        """Of this machine."""
        ...

    @property
    def engine(self) -> Engine:
        """With the frozen base."""
        ...

    def initial(self, rank: int) -> Adapter:
        """The adapter of the common seed."""
        ...


def check(bench: Bench, batch_size: int) -> Verdict:
    """Try rows of all lengths, and compare the engines where several clients share a pass.

    Args:
        bench: the task, with its data and its engine.
        batch_size: rows of a step.

    Raises:
        MismatchError: these rows cannot be trained on with this model.
    """
    task = bench.task
    _refuse_foreign(bench)
    if task.cohort == 1 and not task.lean:
        try_rows(bench, batch_size)
        return Verdict("loop")
    if not (kind := task_of(task.model.task)).alone:
        why = f"in {kind.name} the loss of an example depends on others"
        if task.lean:
            raise MismatchError(
                f"clients with a memory budget train several examples' losses apart, and {why}",
                fix="Leave memory budgets and [pruning] out.",
            )
        try_rows(bench, batch_size)
        return Verdict("loop", why)
    difference = _difference(bench) if len(bench.data.train) else None
    if difference is not None and task.lean:
        raise MismatchError(
            f"clients with a memory budget train in the cohort engine, which does not hold for this "
            f"model: {difference}",
            fix="Leave memory budgets and [pruning] out.",
        )
    if difference is None:
        try:
            try_rows(bench, batch_size)
        except MismatchError as error:
            if task.lean:
                raise
            difference = error.what  # of the engine, or of the model: the plain loop tells
        else:
            return Verdict("cohort")
    return Verdict("loop", f"the cohort engine does not hold for this model: {difference}")


# ---------------------------------------------------------------------------- rows of all lengths


def try_rows(bench: Bench, batch_size: int) -> None:
    """Steps of training on the shortest and on the longest rows, and test rows of both kinds scored.

    Raises:
        MismatchError: they do not go through the model, or their loss is no number.
    """
    train, test = bench.data.train, bench.data.test
    if not len(train):
        return
    training = LocalTraining(
        steps=1, batch_size=batch_size, lr=0.0, optimizer="sgd", clip_norm=None
    )
    start = _start(bench)
    layers = (0,) if bench.task.lean else None
    plan = TrainPlan(
        start if layers is None else start.narrowed(layers),
        training=training,
        layers=layers,
        site="preflight",
    )
    for name, size, order in (("longest", batch_size, -1), ("shortest", 1, 1)):
        rows = [_extreme(data, size, order) for data in (train, test) if len(data)]
        with _refusing(bench, max(_width(batch) for batch in rows)):
            (result,) = bench.engine.train([plan], [rows[:1]])
            for batch in rows[1:]:
                bench.engine.evaluate(plan.start, {}, [batch], layers)
        if not math.isfinite(loss := result.metrics["loss"]):
            _refuse_infinite(bench.engine.base, bench.task, f"the {name} rows", loss)
    if task_of(bench.task.model.task).causal:
        _refuse_leaks(bench, plan, layers)
    if bench.task.data.packing:
        _try_packed(bench, plan, batch_size)


def _refuse_foreign(bench: Bench) -> None:
    """Refuse rows with tokens that the model has no embedding of.

    A GPU answers such a row with an error from which no process recovers.
    """
    if task_of(bench.task.model.task).reads != "text":
        return
    model: Any = bench.engine.base.model
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters and has no table of words
        return
    rows = getattr(table, "num_embeddings", None)
    if rows is None:
        return
    for data in (bench.data.train, bench.data.test):
        found = max((int(ids.max()) for b in _all(data) for ids in _ids(b)), default=-1)
        if found >= rows:
            raise MismatchError(
                f"the tokenizer of {bench.task.model.source!r} gives the token {found}, and its embedding has "
                f"{rows} rows: they do not belong together",
                fix="Put the tokenizer's files there that this model was trained with.",
            )


def _all(examples: Examples) -> Iterator[Batch]:
    """All rows, those of about one length together."""
    order = np.argsort(examples.lengths, kind="stable")
    for first in range(0, len(order), _CHUNK):
        yield examples.collate(order[first : first + _CHUNK])


def _refuse_infinite(base: Base, task: TaskSpec, where: str, loss: float) -> NoReturn:
    """Say why a loss is no number: weights that are none, or numbers too large for their type."""
    source = repr(task.model.source)
    for name, weight in base.model.named_parameters():
        if weight.device.type != "meta" and not bool(weight.isfinite().all()):
            raise MismatchError(
                f"the loss of {source} on {where} is {loss}, since {name} of the checkpoint is not finite",
                fix="Fetch the checkpoint anew: its weights are damaged.",
            )
    raise MismatchError(
        f"the loss of {source} on {where} is {loss}",
        fix='Set [engine] precision = "fp32", or choose a lower [data] max-length.',
    )


def _start(bench: Bench) -> Adapter:
    """The common adapter; of another method of peft one of small numbers, for its zeros may divide."""
    lora, seed = bench.task.lora, bench.task.seed
    initial = bench.initial(lora.rank)
    if not family_of(lora).draws(lora):
        return initial
    generator = seeds.torch_generator(seed, "preflight")
    return initial.replaced(
        {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in initial.head.items()}
    )


def _refuse_leaks(bench: Bench, plan: TrainPlan, layers: tuple[int, ...] | None) -> None:
    """Refuse a "causal" model whose prediction of a token changes with a token after it.

    An encoder that was made for masked words loads as a language model, and sees the answers.
    """
    refers = task_of(bench.task.model.task).refers
    row = _extreme(bench.data.train, 1, -1)
    ids = row.inputs["input_ids"][:1, :_TOKENS]
    if ids.shape[1] < 3:
        return
    labels = torch.full_like(ids, IGNORED)
    labels[:, 1:-1] = ids[:, 1:-1]
    other = ids.clone()
    other[:, -1] = ids[ids != ids[:, -1:]][:1] if bool((ids != ids[:, -1:]).any()) else 0

    def loss(own: Tensor) -> float:
        batch = Batch({"input_ids": own}, labels)
        if refers:  # such a loss is of two rows, and the same for both where nothing is learnt yet
            return -float(bench.engine.reference(batch))
        return bench.engine.evaluate(plan.start, {}, [batch], layers).loss_sum

    losses = [loss(own) for own in (ids, other)]
    # Earlier tokens see the same numbers in the same kernels; experts may be given other shapes.
    allowed = 5e-2 if bench.task.precision == "bf16" else 1e-4
    if abs(losses[0] - losses[1]) > allowed:
        raise MismatchError(
            f"{bench.task.model.source!r} predicts a token from those after it: it is no causal language "
            "model",
            fix="Use a decoder, or set [model] task to what this model was made for.",
        )


def _try_packed(bench: Bench, plan: TrainPlan, batch_size: int) -> None:
    """A step on packed rows; refuse a model that shows one row of a sequence to another.

    Whether an architecture keeps them apart is measured: the same tokens have the same losses as in
    rows of their own, and whatever stands in the row before them.

    Raises:
        MismatchError: they have not, or packed rows do not go through.
    """
    train, capacity, model = bench.data.train, bench.task.data.max_length, bench.task.model.source
    order = np.argsort(-train.lengths, kind="stable")[:_PACKED]
    bins = best_fit(train.lengths[order], capacity)[:batch_size]
    some = order[-3:]
    apart = f"{model!r} cannot be trained with data.packing"
    try:
        if not isinstance(train, TokenExamples):
            raise MismatchError("its rows are no tokens")
        together = train.packed([some])
        tried = [train.collate(some), together, *_neighbours(together, int(train.lengths[some[0]]))]
        with _refusing(bench, capacity):
            bench.engine.train([plan], [[train.packed([order[own] for own in bins])]])
            losses = [bench.engine.train([plan], [[one]])[0].metrics["loss"] for one in tried]
    except MismatchError as error:
        raise MismatchError(f"{apart}: {error.what}", fix="Leave data.packing out.") from error
    allowed = (2e-2, 5e-3) if bench.task.precision == "bf16" else (2e-5, 2e-6)
    pairs = zip(losses[::2], losses[1::2], allowed, strict=False)
    for one, other, most in pairs:
        if not abs(one - other) <= most * max(1.0, abs(one)):
            raise MismatchError(
                f"{apart}: a row's loss depends on the rows beside it ({one:.7f} and {other:.7f}), as "
                "in models with a recurrent state",
                fix="Leave data.packing out.",
            )


def _neighbours(packed: Batch, first: int) -> list[Batch]:
    """A sequence without targets in its first row, and the same with that row's tokens in reverse."""
    labels = packed.labels.clone()
    labels[:, :first] = IGNORED
    if not bool((labels != IGNORED).any()):
        return []
    ids = packed.inputs["input_ids"]
    other = torch.cat([ids[:, :first].flip(1), ids[:, first:]], 1)
    return [
        replace(packed, inputs={**packed.inputs, "input_ids": own}, labels=labels)
        for own in (ids, other)
    ]


def _extreme(examples: Examples, count: int, order: int) -> Batch:
    """The shortest rows, or with ``order`` -1 the longest ones."""
    return examples.collate(np.argsort(order * examples.lengths, kind="stable")[:count])


def _width(batch: Batch) -> int:
    """Tokens of a row, of the longest text where there are several."""
    return max((int(ids.shape[1]) for ids in _ids(batch)), default=0)


def _ids(batch: Batch) -> list[Tensor]:
    """Token ids of whatever a row has the model read or write. [b, t] each"""
    ends = ("input_ids", "labels")
    return [tensor for name, tensor in batch.inputs.items() if name.endswith(ends)]


@contextmanager
def _refusing(bench: Bench, tokens: int) -> Iterator[None]:
    """What a model raises about its rows, in one sentence. ``tokens``: of such a row, at most."""
    try:
        yield
    except FedftError:
        raise
    except Exception as error:  # whatever a model's own code raises
        source = repr(bench.task.model.source)
        said = f"{type(error).__name__}: {first_sentence(error)}"
        config: Any = bench.engine.base.model.config
        positions = models.positions(config)
        if lacks_memory(error):
            raise MismatchError(
                f"there is not enough memory to train {source} on rows of {tokens} tokens ({said})",
                fix="Lower [data] max-length or [training] batch-size, or set [engine] "
                "gradient-checkpointing = true.",
            ) from error
        if positions is not None and tokens > positions - 2:  # some count from the pad token
            raise MismatchError(
                f"a row of {tokens} tokens does not go through {source}, whose config.json gives "
                f"{positions} positions ({said})",
                fix=f"Set [data] max-length to at most {positions - 2}.",
            ) from error
        rows = f"rows of {tokens} tokens" if tokens else "these rows"
        raise MismatchError(
            f"{source} cannot be trained on {rows}: {said}",
            fix='Set [engine] precision = "fp32": parts of this model compute in it whatever is asked.'
            if bench.task.precision == "bf16" and "BFloat16" in str(error)
            else "Check that the tokenizer and the weights belong together, or choose another model."
            if bench.task.model.task in TASKS
            else f"Or the task is at fault, {bench.task.model.task}: it is not fedft's own. Check its "
            "targets and its loss.",
        ) from error


# ------------------------------------------------------------------------- the two engines


_known: dict[tuple[object, ...], str | None] = {}
"""Comparisons made in this process: tables, checkpoint and number of classes → what was found."""


def _difference(bench: Bench) -> str | None:
    """Where the engines differ on this model, in words; None where they do not."""
    task, classes = bench.task, len(bench.data.classes)
    tables = task.model_dump_json(include={"model", "lora", "precision", "device", "lean"})
    key = tables, stamp(models.resolve(task.model)), classes
    if key not in _known:
        _known[key] = _found(bench)
    return _known[key]


def _found(bench: Bench) -> str | None:
    small = bench.engine.base.shapes.parameters <= _SMALL and bench.task.device == "cpu"
    for dtype in (torch.float64, torch.float32) if small else (torch.float32,):
        batches = _batches(bench.data.train, dtype)
        try:
            with _refusing(bench, max(_width(batch) for own in batches for batch in own)):
                return _compared(_fresh(bench, dtype), bench.task, batches)
        except MismatchError:
            if dtype == torch.float32:
                raise
    raise AssertionError("float32 always has an answer")


def _fresh(bench: Bench, dtype: torch.dtype) -> Base:
    """A base of its own, in full precision, with attention as the run computes it."""
    task, names = bench.task, bench.data.classes
    classes = len(names)
    lora = task.lora.model_copy(update={"dropout": 0.0})
    eager = task.precision == "bf16" and task.device == "cpu"
    whole = bench.engine.base
    if task.lean or (whole.shapes.parameters > _SMALL and whole.blocks):
        blocks = min(2, len(whole.blocks))
        base = models.load_first(
            task.model, lora, classes, blocks, device=task.device, eager=eager, names=names
        )
    else:
        base = models.load_base(
            task.model, lora, classes, device=task.device, eager=eager, names=names
        )
    base.model.to(dtype)
    return base


def _compared(base: Base, task: TaskSpec, batches: Sequence[Sequence[Batch]]) -> str | None:
    from fedft.clients.engines.cohort import CohortEngine
    from fedft.clients.engines.loop import PeftEngine

    lora = task.lora.model_copy(update={"dropout": 0.0, "layers": None})
    dtype = next(base.model.parameters()).dtype
    plans = [_plan(base, task, k, dtype) for k in range(len(batches))]
    loop = PeftEngine(base, lora)
    oracle = loop.train(plans, batches)
    scored = loop.evaluate(plans[1].start, {}, batches[1])
    loop.leave()
    for k, trained in enumerate(oracle):
        if not math.isfinite(trained.metrics["loss"]):
            _refuse_infinite(base, task, f"the first rows of client {k}", trained.metrics["loss"])
    try:
        cohort = CohortEngine(base, lora)
        found = cohort.train(plans, batches)
        again = cohort.evaluate(plans[1].start, {}, batches[1])
    except Exception as error:  # whatever shapes a model's own code runs into
        return f"it raises {type(error).__name__} ({first_sentence(error)})"
    for mine, theirs, plan in zip(found, oracle, plans, strict=True):
        if (told := _apart(mine, theirs, plan.start, dtype)) is not None:
            return told
    a, b = again.loss_sum / max(again.count, 1), scored.loss_sum / max(scored.count, 1)
    return None if _close(a, b, dtype) else f"it scores {a:.6f} where the plain loop scores {b:.6f}"


def _close(a: float, b: float, dtype: torch.dtype) -> bool:
    return abs(a - b) <= _ROUNDING[dtype][0] * max(1.0, abs(b))


def _apart(mine: Trained, theirs: Trained, start: Adapter, dtype: torch.dtype) -> str | None:
    """How two results of one plan differ; None where they do not."""
    a, b = mine.metrics["loss"], theirs.metrics["loss"]
    if not _close(a, b, dtype):
        return f"its loss is {a:.6f} where the plain loop's is {b:.6f}"
    before, after, wanted = start.tensors(), mine.adapter.tensors(), theirs.adapter.tensors()
    largest = max(float((wanted[n] - before[n]).norm()) for n in before)
    for name, old in before.items():
        gap = float((after[name] - wanted[name]).norm())
        size = float((wanted[name] - old).norm())
        if gap > _ROUNDING[dtype][1] * max(size, 1e-3 * largest):
            return f"its update of {name} is {gap / max(size, 1e-30):.1e} off"
    return None


def _plan(base: Base, task: TaskSpec, client: int, dtype: torch.dtype) -> TrainPlan:
    """A client's plan: an adapter of its own, so that a row under another's would be seen."""
    initial = models.initial_adapter(base.shapes, task.lora, task.lora.rank, task.seed)
    generator = seeds.torch_generator(task.seed, "preflight", client)

    def noise(shape: Sequence[int], scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) * scale

    def own(f: Factors) -> Factors:
        spread = 0.5 / math.sqrt(f.rank * f.B.shape[0])
        return replace(f, A=f.A.to(dtype), B=noise(f.B.shape, spread))

    start = initial.map_factors({m: own(f) for m, f in initial.factors.items()})
    start = start.replaced({n: t.to(dtype) + noise(t.shape, 0.02) for n, t in initial.head.items()})
    training = LocalTraining(lr=0.05, optimizer="sgd", clip_norm=None)
    return TrainPlan(start, training=training, site=f"preflight-{client}", seed=task.seed)


def _batches(train: Examples, dtype: torch.dtype) -> list[list[Batch]]:
    """Two clients: one batch of the shortest rows, and two of longer ones, of another size."""
    order = np.argsort(train.lengths, kind="stable")
    order = order[: max(9, int(np.searchsorted(train.lengths[order], _TOKENS, side="right")))]
    n = len(order)
    at = [[0, 1], [n - 1, n // 2, n - 2], [n // 3, (2 * n) // 3, n - 1]]
    first, second, third = (
        _in_dtype(train.collate(order[np.array(rows).clip(0, n - 1)]), dtype) for rows in at
    )
    return [[first], [second, third]]


def _in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Images in the numbers of the model that sees them."""
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.inputs.items()}
    return replace(batch, inputs=inputs)
