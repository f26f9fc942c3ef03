"""The laws of metrics: predictions of every kind are made up, and judged whole and in parts."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import torch

from fedft.conformance.laws import Finding, Law, held, require
from fedft.core.metrics import Metric, Predictions, Tally, packed, unpacked
from fedft.core.tasks import TASKS, Task

_ITEMS = 24
_NAMES = ("O", "B-PER", "I-PER")
_TEXTS = [("the cat sat", "the cat sat down"), ("a dog", "a dog"), ("", "two words")] * 8


def _of_classes(seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(_ITEMS, 3, generator=generator, dtype=torch.float64)
    right = torch.randint(3, (_ITEMS,), generator=generator)
    losses = torch.rand(_ITEMS, generator=generator, dtype=torch.float64)
    return Predictions(losses, outputs.argmax(-1), right, 3, outputs)


def _made(kind: str, seed: int = 0) -> Predictions:
    """Predictions of a kind; see :attr:`fedft.core.tasks.Task.predicts`."""
    found = _of_classes(seed)
    assert found.outputs is not None
    match kind:
        case "tags":
            rows = torch.arange(_ITEMS) // 4
            return replace(found, rows=rows, names=_NAMES)
        case "labels":
            on = (found.outputs > 0).float()
            return replace(found, predicted=on, targets=on.roll(1, 0))
        case "number":
            said = found.outputs[:, 0]
            return replace(found, predicted=said, targets=said + found.losses, classes=1)
        case "texts":
            nothing = torch.zeros(0)
            return Predictions(nothing, nothing, nothing, 0, texts=_TEXTS)
        case _:
            return replace(found, names=_NAMES)


def kind_of(metric: Metric) -> str:
    """A kind of predictions that a metric judges."""
    return "texts" if metric.needs_texts else min(metric.judges, default="class")


def _cut(found: Predictions, a: int, b: int) -> Predictions:
    if found.texts is not None:
        return replace(found, texts=found.texts[a:b])
    own = {
        name: None if whole is None else whole[a:b]
        for name, whole in vars(found).items()
        if name in ("losses", "predicted", "targets", "outputs", "rows")
    }
    return replace(found, **own)  # type: ignore[arg-type]


def _tally(metric: Metric, found: Predictions) -> Tally:
    items = len(found.targets) if found.texts is None else len(found.texts)
    columns = {name: [column] for name, column in metric.gather(found).items()}
    return Tally(float(found.losses.sum()), items, metric.tally(found), columns)


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 1e-9 * max(1.0, abs(a))


def its_sums_are_declared(metric: Metric) -> None:
    """``tally`` and ``gather`` give what ``sums`` and ``gathers`` say, no more and no less."""
    found = _made(kind_of(metric))
    tally = _tally(metric, found)
    said, given = sorted(metric.sums), sorted(tally.sums)
    require(said == given, f"sums declares {said}, and tally gives {given}")
    said, given = sorted(metric.gathers), sorted(tally.columns)
    require(said == given, f"gathers declares {said}, and gather gives {given}")
    for name, width in metric.gathers.items():
        shape, wanted = tally.column(name).shape, (tally.count, width(found.classes))
        require(shape == wanted, f"the column {name} is {shape}, and {wanted} is declared")


def it_is_the_same_in_parts(metric: Metric) -> None:
    """The value of parts, rows of a text kept together, is that of the whole."""
    for seed in range(3):
        found = _made(kind_of(metric), seed)
        whole = metric.value(_tally(metric, found))
        require(isinstance(whole, float | int), f"its value is a {type(whole).__name__}")
        for cuts in ((0, 8, _ITEMS), (0, 0, 4, 20, _ITEMS, _ITEMS)):
            parts = [_tally(metric, _cut(found, a, b)) for a, b in pairwise(cuts)]
            value = metric.value(Tally.total(parts))
            require(_same(value, whole), f"it is {whole} of all items, and {value} in parts")


def its_sums_travel(metric: Metric) -> None:
    """What it adds up is what a server takes from a client."""
    found = _made(kind_of(metric))
    tally = replace(_tally(metric, found), columns={})
    back = unpacked(packed(tally, metric.sums), metric.sums, found.classes)
    require(back == tally, f"{tally} came over the wire as {back}")


def it_changes_nothing(metric: Metric) -> None:
    """It does not write to what it is given."""
    found, before = _made(kind_of(metric)), _made(kind_of(metric))
    metric.value(_tally(metric, found))
    for name in ("losses", "predicted", "targets", "outputs"):
        mine, theirs = getattr(found, name), getattr(before, name)
        require(mine is None or bool(torch.equal(mine, theirs)), f"it changed the {name}")


def a_task_can_have_it(metric: Metric) -> None:
    """One of fedft's tasks predicts what it judges, or it says of no kind that it judges it."""
    able = [task.name for task in TASKS.values() if task.can_be_judged_by(metric)]
    kinds: Mapping[str, Task] = {kind: t for t in TASKS.values() for kind in t.predicts}
    require(bool(able), f"it judges {sorted(metric.judges)}, and there are {sorted(kinds)}")


LAWS = (
    Law("Its sums and columns are those that it declares", its_sums_are_declared),
    Law("It is the same in parts", it_is_the_same_in_parts),
    Law("Its sums travel", its_sums_travel),
    Law("It changes nothing", it_changes_nothing),
    Law("A task can have it", a_task_can_have_it),
)


def examine(name: str, metric: Metric) -> Iterator[Finding]:
    """What came of holding a metric to every law."""
    yield from held("metrics", name, metric, LAWS)
