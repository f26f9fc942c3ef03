"""`[evaluation]`: what a run is measured by."""

from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, PositiveInt, ValidationInfo

from fedft.core.errors import ConfigError
from fedft.core.meters import DEFAULT, REGISTRY, Meter, chosen
from fedft.core.plugins import trusted
from fedft.core.spec import NEW_TOKENS, Table


def _named(given: Any) -> Any:
    """Meters that Python gave as classes, by the names that find them again."""
    if not isinstance(given, list | tuple):
        return given
    items = cast(Sequence[object], given)
    return [REGISTRY.admit(item).name if isinstance(item, type) else item for item in items]


def _known(names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    try:
        chosen(names, trusted(info.context))
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error
    return names


class EvaluationSpec(Table):
    """`[evaluation]`: what every round is measured by. It changes no result.

    Attributes:
        meters: names of meters, see :data:`fedft.core.meters.METERS`, registered ones, or
            ``package.module:Class``; from Python also the classes. An empty list measures nothing.
            ``spectrum`` is also asked for by ``[rounds] spectrum = true``.
        max_new_tokens: of a text that is generated, where a metric judges texts: at most so many, the
            likeliest each time, until the model ends the text.
    """

    meters: Annotated[tuple[str, ...], BeforeValidator(_named), AfterValidator(_known)] = DEFAULT
    max_new_tokens: PositiveInt = NEW_TOKENS

    @property
    def kinds(self) -> tuple[type[Meter], ...]:
        """The meters, in the order given."""
        return chosen(self.meters)

    def described(self) -> dict[str, Any]:
        """How meters that reports may not know are drawn, for ``environment.json``; empty of none."""
        later = [kind for kind in self.kinds if not kind.top]
        rows = [{"key": kind.key, "plots": [p.to_json() for p in kind.plots]} for kind in later]
        return {"meters": rows} if rows else {}
