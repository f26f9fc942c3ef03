"""What clients of a run will do in a round, worked out before anything runs."""

import math
from dataclasses import replace
from typing import Any

from fedft.core.data.batches import steps_of
from fedft.core.schedules import Schedule
from fedft.core.tasks import task_of
from fedft.server.config import RunConfig

TRAINS = {"cohort": "several clients in one pass", "loop": "one client after the other"}
"""Engine → how it trains, in words."""


def forecast_training(config: RunConfig, rows: int) -> dict[str, Any]:
    """Steps and learning rates of a client of mean size.

    Args:
        config: resolved.
        rows: of all clients together.

    Returns:
        JSON data: ``rows`` of the client, ``steps`` a round and ``steps_in_all``, if it is in every
        round; ``step_rows``, examples of a step, in ``passes`` forward passes; ``optimizer``; ``lr``
        {start, peak, end} over the run, or over each round where the schedule goes over rounds;
        ``schedule``, None where the rate is constant; ``engine``, ``cohort`` where several clients
        are trained in one pass, else ``loop``.
    """
    training = config.training.local(config.rounds.count)
    own = _rows(config, rows)
    steps = steps_of(own, training)
    schedule = training.schedule
    rates = [training.lr] if schedule is None else _rates(training.lr, schedule, steps)
    alone = config.engine.cohort == 1 or not task_of(config.model.task).alone
    return {
        "rows": own,
        "steps": steps,
        "steps_in_all": steps * config.rounds.count,
        "step_rows": training.step_rows,
        "passes": training.accumulate,
        "optimizer": training.optimizer,
        "lr": {"start": rates[0], "peak": max(rates), "end": rates[-1]},
        "schedule": None if schedule is None else schedule.name,
        "over": None if schedule is None else schedule.over,
        "engine": "loop" if alone else "cohort",
    }


_LOOKED_AT = 1000
"""Steps at which the learning rate is looked at, about."""


def _rates(lr: float, schedule: Schedule, steps: int) -> list[float]:
    """The learning rate from the first step to the last, and where the warm-up ends."""
    total = steps * (schedule.rounds if schedule.over == "run" else 1)
    rate = replace(schedule, over="round").rates(lr, 1, total)
    top = schedule.warmup_steps or math.ceil(total * schedule.warmup_ratio)
    every = range(0, total, max(1, total // _LOOKED_AT))
    return [rate(at) for at in sorted({*every, min(top, total - 1), total - 1})]


def _rows(config: RunConfig, rows: int) -> int:
    """Training rows of a client of mean size."""
    partition = config.data.partition
    if partition.kind == "bootstrap":
        whole = float(partition.rows_per_client)
    else:
        whole = rows / config.fleet.clients
    return max(1, round(whole * (1 - config.data.holdout)))


def training_lines(found: dict[str, Any], *, tried: bool = False) -> list[str]:
    """The same for reading; where the model was ``tried``, its engine is told elsewhere."""
    lr, passes = found["lr"], found["passes"]
    parts = f" in {passes} passes" if passes > 1 else ""
    rate = f"learning rate {lr['start']:.3g}"
    if found["schedule"] is not None:
        whole = "a run" if found["over"] == "run" else "each round"
        rate += (
            f" at the start, {lr['peak']:.3g} at its peak, {lr['end']:.3g} at the last step "
            f"({found['schedule']} over {whole})"
        )
    steps, engine = found["steps"], "" if tried else f"; {TRAINS[found['engine']]}"
    return [
        f"a client's round      {steps:,} step{'s' * (steps != 1)} of {found['step_rows']:,} examples{parts} "
        f"on {found['rows']:,} rows, a client of mean size; {found['steps_in_all']:,} in all",
        f"optimiser             {found['optimizer']}, {rate}{engine}",
    ]
