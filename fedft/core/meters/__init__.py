"""What a round is measured by: one file a meter, one row in :data:`METERS`.

See :mod:`fedft.core.meters.base` for what a meter is, and how to add one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedft.core.errors import ConfigError
from fedft.core.meters.agreement import Agreement
from fedft.core.meters.base import Meter, Needs, Replies, Round, check_meter
from fedft.core.meters.bias import Bias
from fedft.core.meters.drift import Drift
from fedft.core.meters.effective_rank import EffectiveRank
from fedft.core.meters.heads import Heads
from fedft.core.meters.lag import Lag
from fedft.core.meters.panel import Panel
from fedft.core.meters.plots import Curve, Heat, Plot, plot_from
from fedft.core.meters.spectrum import Spectrum
from fedft.core.plugins import Registry, Trust, reference_of

if TYPE_CHECKING:
    from fedft.core.folding import Folded
    from fedft.core.types import ServerState, TrainPlan

METERS: tuple[type[Meter], ...] = (Bias, Lag, Drift, Heads, Spectrum, EffectiveRank, Agreement)
"""Every meter of ours, in the order in which a round's line has them."""

DEFAULT: tuple[str, ...] = ("bias", "lag", "drift", "heads")
"""The meters of a run that names none."""


def check_foreign(kind: object, name: str) -> type[Meter]:
    """The class, if it is a meter that others may bring along.

    Args:
        kind: what a name led to.
        name: as the user wrote it, for the error.

    Raises:
        ConfigError: it is no meter, or takes a place that is not free.
    """
    meter = check_meter(kind, name)
    if meter.key in {own.key for own in METERS}:
        raise ConfigError(
            f"the meter {name} has key = {meter.key!r}, which is the key of one of fedft's own",
            fix="Give the class another key.",
        )
    if meter.top:
        raise ConfigError(
            f"the meter {name} has top = True: only fedft's first meters stand in the line itself",
            fix="Leave it out; the reading stands under meters.",
        )
    return meter


def _accept(found: object) -> type[Meter]:
    return check_foreign(found, reference_of(found))


REGISTRY: Registry[type[Meter]] = Registry(
    "meters", "meter", {kind.key: kind for kind in METERS}, _accept
)
"""Every meter's class by name."""


def find(name: str, trust: Trust | None = None) -> type[Meter]:
    """The meter of a name, as ``[evaluation] meters`` has it.

    Args:
        name: a key of ours, a registered name, or ``package.module:Class``.
        trust: what may be imported for it; None for what the process trusts.

    Raises:
        ConfigError: there is none.
        SecurityRefusal: it would have to be imported, and nobody trusted asked for it.
    """
    return REGISTRY.find(name, trust).value


def chosen(names: Sequence[str], trust: Trust | None = None) -> tuple[type[Meter], ...]:
    """The meters of some names, in the order given; ``trust`` as for :func:`find`.

    Raises:
        ConfigError: there is none of a name, or two have one key.
    """
    kinds = tuple(find(name, trust) for name in names)
    keys = [kind.key for kind in kinds]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"the meter {twice!r} is named twice", fix="Name it once, or give one another key."
        )
    return kinds


def measure(
    before: "ServerState",
    folded: "Folded",
    after: "ServerState",
    *,
    following: "Mapping[str, TrainPlan] | None" = None,
    kinds: Sequence[type[Meter]] | None = None,
) -> dict[str, Any]:
    """Meters of a round whose replies have been folded already; reads its arguments only.

    For meters that are not shown each reply; a run feeds a :class:`Panel` as the replies come.

    Args:
        before: the state the clients were sent.
        folded: what came back.
        after: what the rule made of it.
        following: as for :meth:`Panel.line`.
        kinds: the meters; None takes :data:`DEFAULT`.
    """
    panel = Panel(chosen(DEFAULT) if kinds is None else kinds)
    return panel.line(before, folded, after, following=following)


__all__ = [
    "DEFAULT",
    "METERS",
    "REGISTRY",
    "Curve",
    "Heat",
    "Meter",
    "Needs",
    "Panel",
    "Plot",
    "Replies",
    "Round",
    "Spectrum",
    "check_foreign",
    "check_meter",
    "chosen",
    "find",
    "measure",
    "plot_from",
]
