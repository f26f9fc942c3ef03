"""What a run is given to work on, read and checked before anything starts: also what a plan looks at."""

from typing import Any

import numpy as np

from fedft.core import models
from fedft.core.adapters import family_of
from fedft.core.data.batches import eval_batches
from fedft.core.data.source import Data, check_test, prepare
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.metrics import MOST_GATHERED
from fedft.core.optimizers import by_number, check_shapes
from fedft.core.tasks import task_of
from fedft.core.tasks.criterion import check_names
from fedft.core.text.special_tokens import SpecialTokens
from fedft.server.config import RunConfig
from fedft.strategies.beside import first_plan


def data_of(config: RunConfig, encoder: Any) -> Data:
    """The data of a run, encoded.

    Args:
        config: of the run.
        encoder: of its model, see :func:`fedft.core.models.input_encoder`.

    Raises:
        ConfigError, MismatchError: see :func:`fedft.core.data.source.prepare`; or nothing is left to test on.
    """
    data = prepare(
        config.data,
        config.model.task,
        encoder,
        seed=config.seed,
        most_test_rows=config.evaluation.max_rows,
    )
    check_test(config.data, len(data.test), len(data.train) + len(data.test))
    _check_gathered(config, len(data.test), len(data.classes))
    _check_asked(config, data)
    return data


def _check_asked(config: RunConfig, data: Data) -> None:
    """Refuse metrics over texts where no test row has anything before what is learnt to go on from.

    Raises:
        ConfigError: naming the metrics.
    """
    task = config.judged
    names = [metric.name for metric in task.metrics if metric.needs_texts]
    batches = eval_batches(data.test, np.arange(len(data.test))) if names else ()
    if names and not any(task.asked(batch, 0).wanted for batch in batches):
        raise ConfigError(
            f"[evaluation] {', '.join(names)}: the model is to go on from a prompt, and no test row has one",
            fix="Leave such metrics out, or give rows that have a prompt and an answer.",
        )


def _check_gathered(config: RunConfig, rows: int, classes: int) -> None:
    """Refuse a metric that would have to keep too much of every test row: there is no exact value then.

    Raises:
        ConfigError: naming the metric.
    """
    total = 0
    for metric in config.judged.metrics:
        own = rows * sum(width(classes) for width in metric.gathers.values())
        total += own
        if total > MOST_GATHERED:
            most = int(MOST_GATHERED / total * rows)
            raise ConfigError(
                f"the metric {metric.name} keeps numbers of every test row, and of {rows:,} rows these "
                f"are {own:,}; all metrics together keep {MOST_GATHERED:,}",
                fix=f"Set [evaluation] max-rows to at most {most}, or leave the metric out.",
            )


def remarks(config: RunConfig, data: Data, special: SpecialTokens | None = None) -> list[str]:
    """What whoever watches a run should know of its data, a sentence each."""
    skipped = ", ".join(f"{reason} {n:,}" for reason, n in sorted(data.skipped.items()))
    left_out = f"{sum(data.skipped.values()):,} bad rows of the data are left out ({skipped})"
    words = task_of(config.model.task).words
    endless = words and special is not None and special.end is None
    return [
        *data.notes,
        *([left_out] if skipped else []),
        *_judged(config, data),
        *_cut(config, data),
        *([_ENDLESS] if endless else []),
        *_own_seed(config),
    ]


def _judged(config: RunConfig, data: Data) -> list[str]:
    """What scores leave out: test rows, and metrics of the clients' own rows."""
    told: list[str] = []
    if len(data.test) < data.every_test:
        told.append(
            f"scores are of {len(data.test):,} of {data.every_test:,} test rows, the same ones in every "
            "round ([evaluation] max-rows)"
        )
    apart = [metric.name for metric in config.judged.metrics if metric.gathers]
    if apart and config.data.holdout:
        told.append(
            f"{', '.join(apart)}: of the test set alone; it needs scores of single rows, and those of a "
            "client's own rows stay there"
        )
    return told


_ENDLESS = "the tokenizer has no end-of-text token: the model does not learn where to stop"


def _own_seed(config: RunConfig) -> list[str]:
    """That a rule draws from a seed of its own, which is not the run's."""
    seed = getattr(config.strategy, "seed", None)
    if seed is None or seed == config.seed:
        return []
    return [
        f"[strategy] seed = {seed}: {config.strategy.name} draws from it and not from seed = "
        f"{config.seed}; leave the key out to follow the run"
    ]


def _cut(config: RunConfig, data: Data) -> list[str]:
    """How many rows are longer than the configuration allows."""
    rows = {"train": ("training", len(data.train)), "test": ("test", len(data.test))}
    told = [
        f"{data.cut[split]:,} of {count:,} {word} rows"
        for split, (word, count) in rows.items()
        if data.cut.get(split)
    ]
    limit = f"longer than data.max-length = {config.data.max_length}, and cut there"
    return [f"{' and '.join(told)} are {limit}"] if told else []


def check_training(config: RunConfig, data: Data, shapes: models.Schema) -> None:
    """Refuse settings of local training that do not go with the run's classes or adapter.

    Raises:
        ConfigError: naming the key.
    """
    training = config.training.local()
    try:
        check_names(training, data.classes)
    except MismatchError as error:
        raise ConfigError(error.what, fix=error.fix) from error
    if by_number(training.optimizer):
        return
    rule = config.rule(len(data.classes))
    adapter = models.initial_adapter(shapes, config.lora, config.rank, config.seed)
    trained = adapter.tensors(first_plan(rule).without(config.frozen).train)
    try:
        check_shapes(training, [tensor.shape for tensor in trained.values()])
    except ValueError as error:
        raise ConfigError(
            f"[training] {error}",
            fix='Choose another optimiser, or leave such tensors out: [lora] head = "frozen".',
        ) from error


def check_rank(config: RunConfig, shapes: models.Schema) -> None:
    """Refuse a rank that a layer does not have; a method of peft bounds its own, if it is one.

    Raises:
        ConfigError: naming the layer.
    """
    if not family_of(config.lora).bounded:
        return
    for module, (d_out, d_in) in shapes.modules.items():
        if config.rank > min(d_out, d_in):
            raise ConfigError(
                f"[lora] rank = {config.rank} is more than layer {module} allows: "
                f"it is {d_out} x {d_in}",
                fix=f"Choose a rank of at most {min(d_out, d_in)}.",
            )
