"""How a meter is drawn, as plain data: reports draw any meter from it, and import none.

A report reads run directories that other machines made, maybe with meters that this one has not
installed. A run that measures more than the first meters therefore writes the descriptions into its
``environment.json``, and :func:`plot_from` reads them with the distrust that a stranger's file
deserves.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, cast, get_args

Axis = Literal["linear", "ratio", "log", "share"]
"""What an axis is like.

* ``linear``: within the limits; means over seeds are arithmetic. Also ``share``, in percent.
* ``ratio``: numbers that are compared by factors, down to :data:`ROUNDING`, which reads as zero;
  linear from zero where they span less than a decade. Means over seeds are geometric.
* ``log``: the same without a floor; what is not above zero is left out.
"""

Better = Literal["higher", "lower"]

ROUNDING = 1e-6
"""A ratio up to here is the rounding of float32 factors."""

_LONGEST = 400
_MOST_CURVES = 8


@dataclass(frozen=True)
class Curve:
    """One number of a meter, round by round.

    Attributes:
        keys: where it stands in the meter's reading, such as ``("relative",)``.
        label: its name in the legend of a single run's figure.
        above: a single run's figure has the curve only if some value lies above this.
        part: whether it is a part of the first curve ("of it", in words).
        note: added to the caption where the curve is drawn.
        name: the quantity and its unit, as the axis of a comparison says it; empty: comparisons do
            not draw it.
        title: of that figure.
        caption: of that figure: how to read it.
        leading: whether it stands among the scores there, not after them.
        column: title of a column in the table of a comparison, which shows the mean over the
            rounds; empty: none.
    """

    keys: tuple[str, ...]
    label: str
    above: float | None = None
    part: bool = False
    note: str = ""
    name: str = ""
    title: str = ""
    caption: str = ""
    leading: bool = False
    column: str = ""


@dataclass(frozen=True)
class Heat:
    """A number by layer: a heat map, of layers and rounds or of layers and rules.

    Attributes:
        keys: where the layers stand in the reading: module path → their numbers.
        value: where the number stands in a layer's; empty where it is the layer's entry itself.
        title: of the figure; ``and round`` is added for a single run.
        quantity: what the shades stand for.
    """

    keys: tuple[str, ...]
    value: tuple[str, ...]
    title: str
    quantity: str


@dataclass(frozen=True)
class Plot:
    """One figure of a meter.

    Attributes:
        title: what it is about.
        quantity: what the y axis stands for, with its unit.
        curves: the numbers, round by round; the first is the main one.
        axis: what the y axis is like.
        low, high: limits of a linear axis; None leaves them to the data.
        better: which way is better, where one is.
        caption: how to read it.
        quoted: numbers whose mean over the rounds the caption of a single run gives: label → keys.
        heat: a second figure, by layer.
    """

    title: str
    quantity: str
    curves: tuple[Curve, ...]
    axis: Axis = "linear"
    low: float | None = None
    high: float | None = None
    better: Better | None = None
    caption: str = ""
    quoted: tuple[tuple[str, tuple[str, ...]], ...] = ()
    heat: Heat | None = None

    def __post_init__(self) -> None:
        for key, value, known in (
            ("axis", self.axis, get_args(Axis)),
            ("better", self.better, (*get_args(Better), None)),
        ):
            if value not in known:
                said = ", ".join(str(one) for one in known if one is not None)
                raise ValueError(f"a plot has {key} = {value!r}; choose one of {said}")

    def to_json(self) -> dict[str, Any]:
        """Plain data; :func:`plot_from` gives the plot again."""
        return asdict(self)


def plot_from(data: object) -> Plot | None:
    """The plot that plain data describe; None where they describe none.

    Nothing in them is trusted: text is cut, and a value of another type makes the whole unreadable.
    """
    try:
        return _plot(cast("Mapping[str, Any]", data))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _plot(data: Mapping[str, Any]) -> Plot:
    curves = tuple(_curve(one) for one in _items(data["curves"])[:_MOST_CURVES])
    if not curves:
        raise ValueError("a plot without a curve")
    heat = data.get("heat")
    return Plot(
        title=_text(data["title"]),
        quantity=_text(data["quantity"]),
        curves=curves,
        axis=_one_of(data.get("axis", "linear"), get_args(Axis)),
        low=_number(data.get("low")),
        high=_number(data.get("high")),
        better=None if (b := data.get("better")) is None else _one_of(b, get_args(Better)),
        caption=_text(data.get("caption", "")),
        quoted=tuple((_text(label), _keys(keys)) for label, keys in _items(data.get("quoted", ()))),
        heat=None if heat is None else _heat(heat),
    )


def _curve(data: Mapping[str, Any]) -> Curve:
    texts = ("note", "name", "title", "caption", "column")
    return Curve(
        keys=_keys(data["keys"]),
        label=_text(data["label"]),
        above=_number(data.get("above")),
        part=bool(data.get("part", False)),
        leading=bool(data.get("leading", False)),
        **{key: _text(data.get(key, "")) for key in texts},
    )


def _heat(data: Mapping[str, Any]) -> Heat:
    value = tuple(_text(key) for key in _items(data["value"]))
    return Heat(_keys(data["keys"]), value, _text(data["title"]), _text(data["quantity"]))


def _items(value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError("a list is needed")
    return list(cast("list[Any]", value))


def _keys(value: object) -> tuple[str, ...]:
    keys = tuple(_text(key) for key in _items(value))
    if not keys:
        raise ValueError("no key")
    return keys


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text is needed")
    return value[:_LONGEST]


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise TypeError("a finite number is needed")
    return float(value)


def _one_of(value: object, names: tuple[str, ...]) -> Any:
    if value not in names:
        raise ValueError(f"{value!r} is none of {names}")
    return value
