"""The end of a run: the exported adapter, in stock peft, gives what the run says it gives.

The same few test rows are scored twice: by the run, in its own workers and with its own engine, and
by stock transformers and peft with what the run wrote to disk. They have to agree as far as the
run's precision goes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedft.core import stock
from fedft.core.checkpoint import Head, first_sentence
from fedft.core.data.batches import eval_batches
from fedft.core.errors import MismatchError
from fedft.core.examples import Examples
from fedft.core.metrics import Tally
from fedft.core.record.lines import Verified
from fedft.core.spec import ModelSpec, Precision
from fedft.core.tasks import Task
from fedft.core.text.special_tokens import SpecialTokens
from fedft.core.types import Batch, EvalPlan, ServerState
from fedft.core.wire import codec
from fedft.server.evaluation import tally_of
from fedft.server.messages import Courier, ask_to_evaluate, replies

ROWS = 4
"""Rows of a slice: few, so that an error cannot hide in a mean."""

SLICES = 8
"""Slices that are scored, at most."""

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}
"""Largest difference of mean losses, relative to 1 + loss, that rounding explains."""


def verify(
    export: Path,
    state: ServerState,
    *,
    grid: Courier,
    task: str,
    model: ModelSpec,
    judged: Task,
    folder: Path,
    classes: Sequence[str],
    head: Head,
    test: Examples,
    precision: Precision,
    special: SpecialTokens | None,
    stop: Callable[[], bool] = lambda: False,
) -> Verified:
    """Compare a run's own scores with those of its exported adapter in stock peft.

    Args:
        export: folder of the adapter.
        state: the global model as the run has it.
        grid: the run's workers.
        task: JSON of the run's task.
        model: the `[model]` table.
        judged: what is fine-tuned, as the run's workers judge it.
        folder: of the base model on this machine.
        classes: names of the classes.
        head: of the base model.
        test: the server's test set; where it is empty the tensors alone are compared.
        precision: of the run.
        special: what pads, and ends, its texts.
        stop: is asked several times a second whether to stop.

    Returns:
        ``rows`` compared and the largest ``difference`` of mean losses, relative to 1 + loss.

    Raises:
        MismatchError: they differ by more than the precision allows; the message names tensors.
    """
    count = max(1, math.ceil(len(test) / ROWS))
    shards = range(min(SLICES, count) if len(test) else 0)
    read = partial(tally_of, task=judged, classes=len(classes))
    own = list(_of_run(grid, task, state, shards, count, read, stop))
    loaded = stock.stock_model(export, model, folder, len(classes), precision, special)
    lost = stock.unlike(loaded, export, head)
    groups = [list(_rows(test, shard, count)) for shard in shards]
    try:
        theirs = list(stock.tallies(loaded, judged, groups, classes))
    except Exception as error:  # whatever a model's own code raises
        raise MismatchError(
            f"stock transformers cannot score the test rows with the exported adapter in {export}: "
            f"{type(error).__name__}: {first_sentence(error)}",
            fix="The run is kept. [engine] verify = false ends it without this check.",
        ) from error
    gaps = [
        abs(_loss(a) - _loss(b)) / (1 + abs(_loss(a))) for a, b in zip(own, theirs, strict=True)
    ]
    worst = max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)
    if lost or worst > TOLERANCE[precision]:
        named = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise MismatchError(
            f"the exported adapter in {export} does not give the run's own scores in stock peft: mean "
            f"losses differ by up to {worst:.2g} of 1 + loss"
            + (f"; not as exported: {named}" if lost else "; every tensor is as exported"),
            fix="The run is kept. Report this with its config.toml; [engine] verify = false ends it "
            "without this check.",
        )
    rows = sum(len(_of_shard(test, shard, count)) for shard in shards)
    return {"rows": rows, "difference": worst}


def _loss(tally: Tally) -> float:
    return tally.loss_sum / max(tally.count, 1)


def _rows(test: Examples, shard: int, count: int) -> Iterator[Batch]:
    """As a worker cuts them."""
    return eval_batches(test, _of_shard(test, shard, count))


def _of_shard(test: Examples, shard: int, count: int) -> NDArray[np.int64]:
    return np.arange(len(test))[shard::count]


def _of_run(
    grid: Courier,
    task: str,
    state: ServerState,
    shards: Sequence[int],
    count: int,
    read: Callable[[RecordDict], Tally | None],
    stop: Callable[[], bool],
) -> Iterator[Tally]:
    encoder = codec.Encoder(task)
    plans = [
        EvalPlan(state.adapter, state.delta, round=state.round, shard=(s, count)) for s in shards
    ]
    contents: list[RecordDict] = [encoder.evaluate(plan) for plan in plans]
    ids = ask_to_evaluate(grid, state.round, contents, [1] * len(contents))
    found = {
        reply.metadata.reply_to_message_id: read(reply.content)
        for reply in replies(grid, ids, None, stop)
        if not reply.has_error()
    }
    for id_ in ids:
        tally = found.get(id_)
        if tally is None:
            raise MismatchError(
                "the run's own scores of the last model could not be had for comparison",
                fix="Go on with the run, or set [engine] verify = false.",
            )
        yield tally
