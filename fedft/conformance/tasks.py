"""The laws of tasks that need no model: rows are made up from the task's own columns."""

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedft.conformance.laws import Finding, Law, held, require
from fedft.core.examples import Examples
from fedft.core.metrics import Tally, packed, unpacked
from fedft.core.tasks import Column, RawRows, Task, log_likelihoods
from fedft.core.types import Batch

_WORDS = ["fur", "tail", "paw", "steel", "handle", "blade", "leaf", "root", "seed"]
_CLASSES = ("animal", "tool", "plant")
_ROWS = 7


def _length(row: int) -> int:
    return 2 + row % 4


def _texts(shift: int) -> list[str]:
    """Texts of 2 to 5 words, so that a batch of them is padded."""
    return [
        " ".join(_WORDS[(row + shift + k) % len(_WORDS)] for k in range(_length(row)))
        for row in range(_ROWS)
    ]


def _png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 200, 30)).save(file, "PNG")
    return file.getvalue()


def _values(column: Column, shift: int) -> list[Any] | None:
    """A value a row that the column's own check takes; None where we can think of none."""
    texts = _texts(shift)
    offers: list[list[Any]] = [
        [_png()] * _ROWS if column.files else texts,
        [0.5 * row for row in range(_ROWS)],
        list(range(_ROWS)),
        [text.split() for text in texts],
    ]
    fits = (o for o in offers if all(column.fault(v, Path()) is None for v in o))
    return next(fits, None)


def rows_of(task: Task) -> RawRows | None:
    """Seven rows for a task; None where a column takes nothing that we can think of."""
    values: dict[str, Any] = {}
    labels: Any = None
    for place, column in enumerate(task.columns):
        if column.optional:
            continue
        if column.classes == "one":
            labels = np.arange(_ROWS, dtype=np.int64) % 3
        elif column.classes == "many":  # a label for each word
            labels = [np.arange(_length(row), dtype=np.int64) % 3 for row in range(_ROWS)]
        elif (found := _values(column, place)) is None:
            return None
        else:
            values[column.key] = found
    classes = _CLASSES if task.classes else ()
    return RawRows(values, labels, classes, None, "rows", np.arange(_ROWS), Path())


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[END]", *_WORDS])}
    one = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    one.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=one,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[END]",
    )


def _encoder(task: Task) -> Any:
    if task.reads == "image":
        return lambda image: torch.zeros(3, 8, 8)  # type: ignore[no-any-return]
    return _tokenizer()


def _examples(task: Task) -> Examples:
    rows = rows_of(task)
    assert rows is not None
    return task.encode(rows, _encoder(task), 24).examples


def _whole(task: Task) -> Batch:
    return _examples(task).collate(np.arange(_ROWS))


def _outputs(task: Task, batch: Batch) -> Tensor:
    """Outputs as a model would give them, [b, …] or [b, t, …]."""
    positions, _ = task.targets(batch.labels)
    width = len(_CLASSES) if task.classes else 3 + len(_WORDS) if task.words else 1
    width = width if task.alone else len(batch)
    if task.made_up is not None:
        shape = (len(batch), *task.made_up)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape = (len(batch), width) if positions is None else (*batch.labels.shape, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _lined_up(task: Task, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    if task.refers:
        own = log_likelihoods(task, outputs, batch.labels)
        return task.referred(own, torch.zeros_like(own))
    positions, targets = task.targets(batch.labels)
    return (outputs if positions is None else outputs.flatten(0, 1)[positions]), targets


def _tally(task: Task, outputs: Tensor, batch: Batch) -> Tally:
    return task.judged(outputs, batch.labels, _CLASSES if task.classes else ())


def _known(task: Task) -> bool:
    return rows_of(task) is not None


def every_row_is_an_example(task: Task) -> None:
    """``encode`` gives one example a row, the same ones each time."""
    first, again = _examples(task), _examples(task)
    require(len(first) == _ROWS, f"{_ROWS} rows became {len(first)} examples")
    require(first.fingerprint() == again.fingerprint(), "the same rows became other examples")


def targets_never_leave_padding(task: Task) -> None:
    """Nothing behind the end of a row is scored, and no score changes with it."""
    batch = _whole(task)
    positions, targets = task.targets(batch.labels)
    if positions is None:
        require(len(targets) == len(batch), f"{len(batch)} rows have {len(targets)} targets")
        return
    names = ("decoder_attention_mask", "attention_mask")  # of what is written, of what is read
    real = next(batch.inputs[name] for name in names if name in batch.inputs).bool()
    scored = positions[task.scored(targets)]
    require(len(scored) > 0, "nothing is scored")
    require(bool(real.flatten()[scored].all()), "an output at padding is scored")
    outputs = _outputs(task, batch)
    other = torch.where(real[..., None], outputs, torch.full_like(outputs, 7.0))
    require(
        _tally(task, other, batch) == _tally(task, outputs, batch), "the scores read the padding"
    )


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))


def slices_add_up(task: Task) -> None:
    """The sums of parts of the rows add up to those of the whole."""
    examples, whole = _examples(task), _whole(task)
    outputs = _outputs(task, whole)
    expected = _tally(task, outputs, whole)
    parts: list[Tally] = []
    for rows in np.array_split(np.arange(_ROWS), 3):
        batch = examples.collate(rows)
        own = outputs.unflatten(0, (_ROWS, task.each))[rows].flatten(0, 1)
        own = own if outputs.ndim == 2 else own[:, : batch.labels.shape[1]]
        parts.append(_tally(task, own, batch))
    total = Tally.total(parts)
    require(total.count == expected.count, f"{total.count} items in parts, {expected.count} in one")
    require(
        _near(total.loss_sum, expected.loss_sum),
        f"a loss of {total.loss_sum} in parts, {expected.loss_sum} in one",
    )
    for name, value in expected.sums.items():
        same = np.allclose(np.asarray(total.sums[name]), np.asarray(value), rtol=1e-9, atol=1e-12)
        require(bool(same), f"{name}: {total.sums[name]} in parts, {value} in one")


def the_mean_is_of_the_losses(task: Task) -> None:
    """``loss`` with "mean" is the mean of the losses that count."""
    batch = _whole(task)
    outputs, targets = _lined_up(task, _outputs(task, batch), batch)
    each = task.loss(outputs, targets, "none")
    require(len(each) == len(targets), f"{len(targets)} targets have {len(each)} losses")
    scored = task.scored(targets)
    require(not bool(each[~scored].any()), "an ignored target has a loss")
    mean, expected = float(task.loss(outputs, targets, "mean")), float(each[scored].mean())
    require(_near(mean, expected), f"the mean is {mean}, and that of the losses {expected}")


def metrics_are_scored_and_travel(task: Task) -> None:
    """Every metric has a finite value, and what it is made of crosses the wire."""
    batch = _whole(task)
    found = _tally(task, _outputs(task, batch), batch)
    scores = task.scores(found)
    require(list(scores) == ["loss", *(m.name for m in task.metrics)], f"it scores {list(scores)}")
    bad = [name for name, value in scores.items() if not np.isfinite(value)]
    require(not bad, f"not finite: {', '.join(bad)}")
    classes = len(_CLASSES) if task.classes else 0
    back = unpacked(packed(found, task.sums), task.sums, classes)
    require(back == found, f"{found} came over the wire as {back}")


LAWS = (
    Law("Every row is an example, the same each time", every_row_is_an_example, _known),
    Law("Targets never leave padding", targets_never_leave_padding, _known),
    Law("Sums over slices add up", slices_add_up, lambda task: task.alone and _known(task)),
    Law("The mean loss is the mean of the losses", the_mean_is_of_the_losses, _known),
    Law("Every metric is scored, and its sums travel", metrics_are_scored_and_travel, _known),
)


def examine(name: str, task: Task) -> Iterator[Finding]:
    """What came of holding a task to every law."""
    yield from held("tasks", name, task, LAWS)
