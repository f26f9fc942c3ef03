"""Heat maps: a quantity by layer, beside each other for rounds or rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fedft.report import charts
from fedft.report.figures import Figure
from fedft.report.formats import EXACT, bias_text
from fedft.report.records import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_CELLS = 3000
"""A heat map of more cells is embedded as an image."""


def _place(module: str) -> list[int]:
    """The numbers in a module's path: of its block, if it is in one."""
    return [int(part) for part in module.split(".") if part.isdigit()]


def short_names(modules: Sequence[str]) -> list[str]:
    """Module paths without the components that all of them share: ``layer.0.query`` → ``0.query``."""
    paths = [module.split(".") for module in modules]
    if len(paths) < 2 or len({len(path) for path in paths}) > 1:
        return list(modules)
    varying = [k for k in range(len(paths[0])) if len({path[k] for path in paths}) > 1]
    return [".".join(path[k] for k in varying) for path in paths]


@dataclass(frozen=True)
class Shades:
    """What the cells of a heat map stand for.

    Attributes:
        quantity: in words.
        floor: a value up to here is exact, and stays white: the shades are left for what differs.
            None shades every value.
        show: a value in words.
    """

    quantity: str = "Relative bias"
    floor: float | None = EXACT
    show: Callable[[float], str] = bias_text

    def cell(self, value: float | None) -> float | None:
        """The value, where it has a shade."""
        return None if value is None or (self.floor is not None and value <= self.floor) else value


def heat(
    columns: Mapping[str, Mapping[str, float]],
    *,
    name: str,
    title: str,
    xlabel: str,
    slanted: bool,
    shades: Shades = Shades(),
) -> Figure | None:
    """A quantity as darkness: layers from the first at the top, columns side by side.

    Args:
        columns: name of a column → module path → value.
        name: of the figure, unique on the page.
        title: of the figure.
        xlabel: what the columns are.
        slanted: whether their names are, as those of rules; a column is then a mean.
        shades: what the cells stand for.
    """
    seen = dict.fromkeys(module for column in columns.values() for module in column)
    # Rounds in which nobody held the first blocks come first where sites hold some blocks only.
    modules = sorted(seen, key=_place)
    values = [v for column in columns.values() for v in column.values()]
    dark = [v for v in values if shades.cell(v) is not None]
    if not dark:
        return None
    means = {m: fmean(c[m] for c in columns.values() if m in c) for m in modules}
    worst = max(means, key=lambda m: means[m])
    alt = (
        f"{title}: {shades.quantity.lower()} of {len(modules)} layers in {len(columns)} columns, "
        f"between {shades.show(min(values))} and {shades.show(max(values))}; in the mean largest in "
        f"{worst}."
    )
    caption = ["Darker is more."] + ["White: exact."] * (len(dark) < len(values))
    caption += ["Blank: nobody trained it." if shades.floor is not None else "Blank: no value."] * (
        len(values) < len(modules) * len(columns)
    )
    caption += ["Mean over rounds and seeds."] * slanted
    with charts.canvas(4.7, min(7.5, max(3.4, 1.3 + 0.19 * len(modules)))) as (figure, ax):
        grid = [[shades.cell(c.get(m)) for c in columns.values()] for m in modules]
        _draw(figure, ax, grid, shades.quantity)
        every = -(-len(modules) // 36)
        rows, short = range(0, len(modules), every), short_names(modules)
        ax.set_yticks([k + 0.5 for k in rows], [clean(short[k], 34) for k in rows], fontsize=7.5)
        columns_shown = range(0, len(columns), 1 if slanted else -(-len(columns) // 10))
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        names = [clean(list(columns)[k], 36) for k in columns_shown]
        ax.set_xticks([k + 0.5 for k in columns_shown], names, **turn)  # type: ignore[arg-type]
        ax.set_xlabel(xlabel)
        drawing = charts.svg(figure, name, alt)
        return Figure(name, title, " ".join(caption), drawing)


def _draw(
    figure: "Canvas", ax: "Axes", grid: Sequence[Sequence[float | None]], quantity: str
) -> None:
    """The cells of a heat map and its scale: logarithmic where the values span a decade."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    shown = [v for row in grid for v in row if v is not None]
    low, high = min(shown), max(shown)
    wide = low > 0 and high > 10 * low
    nan = float("nan")
    cells = [[nan if v is None else v for v in row] for row in grid]
    mesh = ax.pcolormesh(
        range(len(grid[0]) + 1),
        range(len(grid) + 1),
        cells,
        norm=LogNorm(low, high) if wide else Normalize(min(low, 0), max(high, 0)),
        cmap=matplotlib.colormaps["YlGnBu"],
        edgecolors="white",
        linewidth=0.4,
        rasterized=len(grid) * len(grid[0]) > _CELLS,
    )
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.grid(visible=False)
    if wide:
        charts.logarithmic(bar.ax, "y", None, quantity)
    else:
        bar.ax.set_ylabel(quantity)
