"""What private runs promise: an ε never stands without its δ, its sampling and its adjacency."""

from collections.abc import Iterable, Sequence

from fedft.core.privacy import WORDS
from fedft.core.record.lines import Promise, Spent
from fedft.report.formats import significant
from fedft.report.records import Record, clean, number

UNITS = tuple(WORDS)
"""Whom a run can protect, as :mod:`fedft.server.privacy` names them."""


def spent(record: Record) -> dict[str, Spent]:
    """Unit → what the run has spent so far, as ``rounds.jsonl`` has it; empty without a promise."""
    _, promise = _newest(record)
    by_unit = zip(UNITS, (promise.get("site"), promise.get("example")), strict=True)
    return {unit: facts for unit, facts in by_unit if facts is not None}


def spent_after(record: Record) -> int:
    """The round that :func:`spent` is about; 0 without a promise."""
    round_, _ = _newest(record)
    return round_


def largest(records: Iterable[Record]) -> dict[str, float | None]:
    """Unit → the largest ε of some runs, which holds for each of them; None where one has no bound."""
    found: dict[str, list[float | None]] = {}
    for record in records:
        for unit, facts in spent(record).items():
            found.setdefault(unit, []).append(number(facts, "epsilon"))
    return {
        unit: None if None in values else max(v for v in values if v is not None)
        for unit, values in found.items()
    }


def epsilon_text(value: float | None) -> str:
    """``7.98``; infinity, which JSON does not know, is None."""
    return "∞" if value is None else significant(value)


def delta_text(facts: Spent) -> str:
    """``δ = 1e-05``."""
    return f"δ = {_plain(facts['delta'])}"


def promise(facts: Spent) -> str:
    """What has been spent of one unit, whole: ``ε = 7.98 at δ = 1e-05; poisson sampling …``."""
    more = {
        "rate": facts.get("sampling_rate"),
        "noise multiplier": facts["noise_multiplier"],
        "releases": facts.get("releases"),
        "clients": facts.get("sites"),
    }
    shown = "".join(
        f", {name} {_plain(value)}" for name, value in more.items() if value is not None
    )
    middle = number(facts, "median")
    between = f" ({epsilon_text(middle)} in the median)" if middle is not None else ""
    return (
        f"ε = {epsilon_text(number(facts, 'epsilon'))}{between} at {delta_text(facts)}; "
        f"{_sampling(facts)}{shown}; {_adjacency(facts)}"
    )


def terms(records: Sequence[Record]) -> str:
    """What the ε of a table are about; empty where no run promises any."""
    seen: dict[str, dict[str, None]] = {unit: {} for unit in UNITS}
    for record in records:
        for unit, facts in spent(record).items():
            seen[unit][f"{delta_text(facts)}, {_sampling(facts)}, {_adjacency(facts)}"] = None
    about = [
        f"{epsilon_title(unit)}: {' or '.join(found)}" for unit, found in seen.items() if found
    ]
    return f"{'; '.join(about)}; the largest of the runs' accounts." if about else ""


def epsilon_title(unit: str) -> str:
    """``ε of a client``."""
    return "ε of an example" if unit == "example" else f"ε of a {WORDS[unit]}"


def _newest(record: Record) -> tuple[int, Promise]:
    lines = ((line["round"], line.get("privacy")) for line in reversed(record.rounds))
    return next(((round_, found) for round_, found in lines if found), (0, {}))


def _sampling(facts: Spent) -> str:
    return f"{clean(facts['sampling'] or 'unknown', 40).capitalize()} sampling"


def _adjacency(facts: Spent) -> str:
    return f"adjacency: {clean(facts['adjacency'] or 'unknown', 60)}"


def _plain(value: object) -> str:
    number_ = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.3g}" if number_ else clean(value, 20)
