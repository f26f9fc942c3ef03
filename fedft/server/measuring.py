"""`[evaluation]`: what a run is measured by."""

from typing import Annotated, Any

from pydantic import AfterValidator

from fedft.core.errors import ConfigError
from fedft.core.meters import DEFAULT, Meter, chosen
from fedft.core.spec import Table


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        chosen(names)
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error
    return names


class EvaluationSpec(Table):
    """`[evaluation]`: what every round is measured by. It changes no result.

    Attributes:
        meters: names of meters, see :data:`fedft.core.meters.METERS`; an empty list measures nothing.
            ``spectrum`` is also asked for by ``[rounds] spectrum = true``.
    """

    meters: Annotated[tuple[str, ...], AfterValidator(_known)] = DEFAULT

    @property
    def kinds(self) -> tuple[type[Meter], ...]:
        """The meters, in the order given."""
        return chosen(self.meters)

    def described(self) -> dict[str, Any]:
        """How meters that reports may not know are drawn, for ``environment.json``; empty of none."""
        later = [kind for kind in self.kinds if not kind.top]
        rows = [{"key": kind.key, "plots": [p.to_json() for p in kind.plots]} for kind in later]
        return {"meters": rows} if rows else {}
