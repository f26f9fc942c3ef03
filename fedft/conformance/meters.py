"""The laws of meters that hold for any meter, whoever wrote it."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from fedft.conformance.federation import replies, same, warm
from fedft.conformance.laws import Finding, Law, held, require
from fedft.core.folding import Folded
from fedft.core.meters import Meter, Panel, plot_from
from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies import FedAvgLoRA, FedExLoRA, FedSALoRA, FlexLoRA, HydraLoRA, Strategy


@dataclass(frozen=True, eq=False)
class Case:
    """A round: the state before it, the replies, and the state after it."""

    rule: Strategy
    before: ServerState
    updates: tuple[ClientUpdate, ...]

    @property
    def after(self) -> ServerState:
        """What the rule makes of the replies."""
        return self.rule.aggregate(self.before, self.updates)


def _cases() -> dict[str, Case]:
    """Rounds of equal ranks, mixed ranks, one client, a base change, and parts that stay."""
    rules = {"equal ranks": FedAvgLoRA(), "mixed ranks": FlexLoRA()}
    rules |= {"a base change": FedExLoRA(), "parts that stay at the clients": FedSALoRA()}
    rules["several B a layer"] = HydraLoRA()
    found = {name: _case(rule, 4) for name, rule in rules.items()}
    still = found["equal ranks"]
    starts = tuple(replace(u, tensors=u.start.tensors()) for u in still.updates)
    return {
        **found,
        "one client": _case(FedAvgLoRA(), 1),
        "clients that did not move": replace(still, updates=starts),
    }


def _case(rule: Strategy, count: int) -> Case:
    state = warm(rule)
    return Case(rule, state, tuple(replies(rule, state, count)))


def reading(kind: type[Meter], case: Case, updates: Sequence[ClientUpdate] | None = None) -> Any:
    """What a meter says of a round, shown as much as it declares; None where it says nothing."""
    panel = Panel([kind])
    personal = case.rule.personal
    folded = Folded(personal, products=panel.needs("products"), squares=panel.needs("each"))
    for update in case.updates if updates is None else updates:
        folded.add(update)
        panel.add(update)
    line = panel.line(case.before, folded, case.after)
    require("meter_errors" not in line, f"it raised {line.get('meter_errors')}")
    return line.get(kind.key) if kind.top else line.get("meters", {}).get(kind.key)


def it_says_plain_data_of_every_round(kind: type[Meter]) -> None:
    """It says plain data of every kind of round."""
    for name, case in _cases().items():
        said = reading(kind, case)
        require(said is None or isinstance(said, Mapping), f"of {name}: {said!r}")
        json.dumps(said, allow_nan=False)


def the_order_of_the_clients_changes_nothing(kind: type[Meter]) -> None:
    """The order of the clients changes nothing."""
    for name, case in _cases().items():
        turned = case.updates[1::2][::-1] + case.updates[::2]
        _alike(reading(kind, case, turned), reading(kind, case), f"of {name}, in another order")


def only_shares_of_the_examples_count(kind: type[Meter]) -> None:
    """Only shares of the examples count, and clients without any change nothing."""
    for name, case in _cases().items():
        more = [replace(u, examples=7 * u.examples) for u in case.updates]
        _alike(
            reading(kind, case, more), reading(kind, case), f"of {name}, seven times the examples"
        )
        empty = replace(case.updates[0], site="nobody", examples=0)
        said = reading(kind, case, [empty, *case.updates])
        _alike(said, reading(kind, case), f"of {name}, with a client of no examples")


def what_it_is_shown_stays_as_it_was(kind: type[Meter]) -> None:
    """What it is shown is not written to."""
    for name, case in _cases().items():
        before, updates = copy.deepcopy((case.before, case.updates))
        reading(kind, case)
        require(same(before, case.before), f"of {name}: the state is another one afterwards")
        for mine, old in zip(case.updates, updates, strict=True):
            changed = [n for n, t in old.tensors.items() if not t.equal(mine.tensors[n])]
            require(not changed, f"of {name}: a reply was written to: {', '.join(changed)}")


def it_is_made_anew_each_round(kind: type[Meter]) -> None:
    """Nothing is left over from one round to the next."""
    cases = _cases()
    first = reading(kind, cases["equal ranks"])
    for case in cases.values():
        reading(kind, case)
    _alike(reading(kind, cases["equal ranks"]), first, "a second time")


def its_figures_draw_what_it_says(kind: type[Meter]) -> None:
    """Its figures draw what it says."""
    said = [r for case in _cases().values() if (r := reading(kind, case)) is not None]
    for plot in kind.plots:
        described = plot.to_json()
        json.dumps(described, allow_nan=False)
        require(plot_from(described) is not None, f"{plot.title}: a report cannot read it")
        for curve in getattr(plot, "curves", ()):
            found = any(_there(one, curve.keys) for one in said)
            where = "/".join(curve.keys)
            require(found, f"{plot.title}: no reading has {where}, which {curve.label!r} draws")


def _there(said: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(said, Mapping) or key not in said:
            return False
        said = said[key]
    return True


def _alike(found: Any, expected: Any, when: str) -> None:
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        require(list(found) == list(expected), f"{when} it says {list(found)}")
        for key, value in expected.items():
            _alike(found[key], value, f"{when}, {key}")
    elif isinstance(expected, list) and isinstance(found, list):
        require(len(found) == len(expected), f"{when} it says {found} for {expected}")
        for x, y in zip(found, expected, strict=True):
            _alike(x, y, when)
    elif isinstance(expected, float) and isinstance(found, float):
        close = isclose(found, expected, rel_tol=1e-6, abs_tol=1e-8)
        require(close, f"{when} it says {found:g} for {expected:g}")
    else:
        require(found == expected, f"{when} it says {found} for {expected}")


LAWS: Sequence[Law[type[Meter]]] = tuple(
    Law((check.__doc__ or "").removesuffix("."), check)
    for check in (
        it_says_plain_data_of_every_round,
        the_order_of_the_clients_changes_nothing,
        only_shares_of_the_examples_count,
        what_it_is_shown_stays_as_it_was,
        it_is_made_anew_each_round,
        its_figures_draw_what_it_says,
    )
)
"""The laws that every meter is held to."""


def examine(name: str, kind: type[Meter]) -> Iterator[Finding]:
    """What came of holding a meter to every law.

    Args:
        name: it is called by.
        kind: its class.
    """
    yield from held("meters", name, kind, LAWS)
