"""Keys of `[training]` that are a name, or a table with a name and options of that name."""

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, ValidationError

from fedft.core import optimizers
from fedft.core.complaints import complaints
from fedft.core.schedules import Over, Schedule
from fedft.core.strict import Table

Value = bool | int | float | str | list[float] | None
"""Of an option of an optimiser or a schedule."""

Named = str | dict[str, Value]
"""A name, or a table with its ``name`` and options."""


class _Warmup(Table):
    """The keys of a schedule that are ours; all others are transformers' own."""

    name: str
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    over: Over = "run"


_OWN = {field.alias: name for name, field in _Warmup.model_fields.items()}


def _spelled(given: object) -> object:
    """Options by their names in Python, where the table has them in kebab-case."""
    if not isinstance(given, dict):
        return given
    table = cast(dict[object, object], given)
    spelled = {str(key).replace("-", "_"): value for key, value in table.items()}
    if len(spelled) < len(table):
        raise ValueError("an option is spelled both with - and with _; leave one of them out")
    if not isinstance(spelled.get("name"), str):
        raise ValueError('a table needs its name: { name = "…" }')
    return {"name": spelled.pop("name"), **spelled}


def _known_optimizer(given: Named) -> Named:
    name, options = optimizer_of(given)
    return {"name": name, **options} if options else name


def _known_schedule(given: Named | None) -> Named | None:
    schedule_of(given)
    return given


OptimizerKey = Annotated[Named, BeforeValidator(_spelled), AfterValidator(_known_optimizer)]
"""``[training] optimizer``; a table without options is the name."""

ScheduleKey = Annotated[Named | None, BeforeValidator(_spelled), AfterValidator(_known_schedule)]
"""``[training] schedule``."""


def optimizer_of(given: Named) -> tuple[str, dict[str, Any]]:
    """Name and options of an optimiser.

    Raises:
        ValueError: torch has none of that name.
    """
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    name = options.pop("name", given)
    return optimizers.name_of(cast(str, name)), options


def schedule_of(given: Named | None, rounds: PositiveInt = 1) -> Schedule | None:
    """A schedule as plain data.

    Raises:
        ValueError: a key of ours has no such value.
    """
    if given is None:
        return None
    table: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"name": given}
    own = {key: table.pop(key) for key in _OWN.values() if key in table}
    try:
        known = _Warmup.model_validate(own)
    except ValidationError as error:
        fault = complaints(error)[0]
        where = ".".join(fault.path)
        raise ValueError(f"schedule: {where} = {fault.shown}: {fault.rule}") from None
    return Schedule(
        known.name.replace("-", "_").lower(),
        known.warmup_steps,
        known.warmup_ratio,
        known.over,
        table,
        rounds,
    )
