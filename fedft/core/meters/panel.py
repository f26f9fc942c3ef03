"""The meters of one round: fed as the replies come, read when the rule is done.

A meter only looks on. One that raises, or says something that is no plain data, costs its reading and
never the round: a federation of days is not lost to an instrument, ours or a stranger's. It is not
passed over in silence either: the round's line names it under ``meter_errors`` with what it raised,
and the log says so once.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any, cast, get_args

from fedft.core.meters.base import Meter, Needs, Replies, Round

if TYPE_CHECKING:
    from fedft.core.folding import Folded
    from fedft.core.types import ClientUpdate, ServerState, TrainPlan

logger = logging.getLogger(__name__)

_LONGEST = 200


class Panel:
    """Some meters, made anew for one round.

    Args:
        kinds: the meters; none twice.
    """

    def __init__(self, kinds: Iterable[type[Meter]]) -> None:
        self._kinds = tuple(kinds)
        self._meters: dict[str, Meter] = {}
        self._errors: dict[str, str] = {}
        for kind in self._kinds:
            try:
                self._meters[kind.key] = kind()
            except Exception as error:
                self._failed(kind.key, error)

    def needs(self, what: Needs) -> bool:
        """Whether any of the meters needs it."""
        return any(kind.needs == what for kind in self._kinds)

    def add(self, update: "ClientUpdate") -> None:
        """Show one reply to the meters that need each. That of a client without examples is none."""
        if update.examples <= 0:
            return
        for key, meter in list(self._meters.items()):
            if meter.needs == "each":
                try:
                    meter.add(update)
                except Exception as error:
                    self._failed(key, error)

    def line(
        self,
        before: "ServerState",
        folded: "Folded",
        after: "ServerState",
        *,
        following: "Mapping[str, TrainPlan] | None" = None,
        evaluated: bool = True,
    ) -> dict[str, Any]:
        """What the meters add to the round's line: the first ones by their keys, others in ``meters``.

        Args:
            before: the state the clients were sent.
            folded: the replies.
            after: what the rule made of them.
            following: what the same clients would be sent next, by name. Needed only where one
                starts from something else than ``after`` (mixed ranks).
            evaluated: whether the model is evaluated after this round.
        """
        rounds: dict[Needs, Round] = {
            needs: Round(before, after, Replies(folded, needs), following or {})
            for needs in get_args(Needs)
        }
        line, others = dict[str, Any](), dict[str, Any]()
        for key, meter in list(self._meters.items()):
            if meter.when == "evaluation" and not evaluated:
                continue
            try:
                reading = meter.value(rounds[meter.needs])
                if reading is not None:
                    (line if meter.top else others)[key] = plain(reading)
            except Exception as error:
                self._failed(key, error)
        if others:
            line["meters"] = others
        if self._errors:
            line["meter_errors"] = dict(self._errors)
        return line

    def _failed(self, key: str, error: Exception) -> None:
        self._meters.pop(key, None)
        self._errors[key] = f"{type(error).__name__}: {error}"[:_LONGEST]
        _say(key, self._errors[key])


@lru_cache(maxsize=256)
def _say(key: str, error: str) -> None:
    """Once for every mistake, not once a round."""
    logger.warning("the meter %s failed, and its reading is left out: %s", key, error)


def plain(value: object) -> Any:
    """A reading as JSON data: what is not finite becomes None, as :mod:`json` would not read it back.

    Raises:
        TypeError: it is no number, text, list or mapping.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    if isinstance(value, Mapping):
        entries = cast("Mapping[object, object]", value)
        return {str(key): plain(entry) for key, entry in entries.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in cast("list[object]", value)]
    raise TypeError(
        f"a reading holds a {type(value).__name__}: give numbers, text, lists and mappings of them "
        "(float(x), x.tolist())"
    )
