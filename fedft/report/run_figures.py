"""The figures of a single run: which data they show, and in words what they show."""

from collections.abc import Callable, Mapping
from statistics import median

from fedft.report import by_class, charts, meter_figures
from fedft.report.charts import INK, PALETTE, Style
from fedft.report.figures import (
    Figure,
    cumulative,
    curve,
    five_numbers,
    last,
    legend,
    phases,
    replies,
    score_axis,
    site_scores,
    wheel,
)
from fedft.report.formats import bytes_text, bytes_unit, score, seconds_text
from fedft.report.groups import Metric, further, with_start
from fedft.report.records import Record, clean, number
from fedft.report.submodels import run_submodels
from fedft.report.timing import run_by_time

_DOTS = 1500
"""More dots than this are drawn as bands only: a page must stay small."""

_BLUE = Style(PALETTE[0], "solid", "o", hollow=False)
_RED = Style(PALETTE[1], (0, (4, 2)), "s", hollow=True)
_GREEN = Style(PALETTE[2], (0, (2, 1)), "^", hollow=False)


def of_run(record: Record, metric: Metric) -> list[Figure]:
    """All figures of a single run for which it has data."""
    candidates = (
        run_score(record, metric),
        *(run_score(record, one, f"score-{one.name}") for one in further([record], metric)),
        by_class.confusion(record),
        run_by_time(record, metric, _BLUE),
        run_submodels(record, metric),
        run_loss(record),
        client_losses(record),
        client_examples(record),
        *meter_figures.of_run(record),
        run_bytes(record),
        run_seconds(record),
        site_scores([("all clients", [record])], metric),
        run_failures(record),
    )
    return [figure for figure in candidates if figure is not None]


def run_score(record: Record, metric: Metric, name: str = "score") -> Figure | None:
    """The metric per round, with its best round; from what the run started at, where that is known.

    Args:
        record: of the run.
        metric: to draw.
        name: of the figure, unique on the page.
    """
    values = record.series(*metric.keys)
    if not values:
        return None
    best = (max if metric.higher else min)(values, key=lambda r: values[r])
    top, rounds = score(values[best], metric.percent), list(values)
    alt = (
        f"{metric.title} per round: {score(values[rounds[0]], metric.percent)} at round {rounds[0]}, "
        f"{score(values[rounds[-1]], metric.percent)} at round {rounds[-1]}; best {top} at round {best}."
    )
    with charts.canvas() as (figure, ax):
        charts.plot(ax, [curve(metric.title, _BLUE, with_start(record, metric))])
        late = best > (rounds[0] + rounds[-1]) / 2
        # Nothing lies beyond the best point, so that its name is free there.
        place = {"xytext": (0, 7 if metric.higher else -13), "textcoords": "offset points"}
        ax.margins(y=0.12)
        ax.annotate(f"best {top}", (best, values[best]), ha="right" if late else "left", **place)  # type: ignore[arg-type]
        score_axis(ax, metric)
        return Figure(name, metric.title, "", charts.svg(figure, name, alt))


def run_loss(record: Record) -> Figure | None:
    """Training and test loss per round."""
    train, test = record.series("train", "loss"), record.series("eval", "loss")
    named = [("Training, mean over the clients", _RED, train), ("Test", _BLUE, test)]
    lines = [curve(label, style, values) for label, style, values in named if values]
    if not lines:
        return None
    alt = "Loss per round. " + " ".join(
        f"{ln.label}: {ln.y[0]:.3g} at round {ln.x[0]:g}, {ln.y[-1]:.3g} at round {ln.x[-1]:g}."
        for ln in lines
    )
    with charts.canvas() as (figure, ax):
        charts.plot(ax, lines)
        charts.whole_rounds(ax)
        ax.set_ylabel("Loss")
        legend(figure, ax)
        return Figure("loss", "Loss", "", charts.svg(figure, "loss", alt))


def run_bytes(record: Record) -> Figure | None:
    """Traffic since the start."""
    up, down = (cumulative(record.series("bytes", way)) for way in ("up", "down"))
    if not any([*up.values(), *down.values()]):
        return None
    size, unit = bytes_unit(max([*up.values(), *down.values()]))
    named = [("Up, from the clients", _BLUE, up), ("Down, to the clients", _RED, down)]
    lines = [
        curve(label, style, {r: b / size for r, b in values.items()})
        for label, style, values in named
        if values
    ]
    alt = (
        f"Cumulative traffic per round: {bytes_text(last(up))} up "
        f"and {bytes_text(last(down))} down by the end."
    )
    with charts.canvas() as (figure, ax):
        charts.plot(ax, lines)
        charts.whole_rounds(ax)
        ax.set_ylabel(f"Cumulative traffic ({unit})")
        ax.set_ylim(bottom=0)
        legend(figure, ax)
        return Figure("bytes", "Traffic", "", charts.svg(figure, "bytes", alt))


def run_seconds(record: Record) -> Figure | None:
    """Seconds by phase, stacked."""
    series = {phase: record.series("seconds", phase) for phase in phases([record])}
    return _stacked(
        record,
        {clean(phase, 24): values for phase, values in series.items() if values},
        name="seconds",
        title="Time by phase",
        ylabel="Seconds a round",
        show=seconds_text,
        caption="",
    )


def run_failures(record: Record) -> Figure | None:
    """Replies that could not be used, by reason, stacked."""
    reasons: dict[str, dict[int, float]] = {}
    for line in record.rounds:
        for reason, sites in line["failures"].items():
            if sites:
                counts = reasons.setdefault(clean(reason, 24), {})
                counts[line["round"]] = float(len(sites))
    return _stacked(
        record,
        reasons,
        name="failures",
        title="Failures by reason",
        ylabel="Clients a round",
        whole=True,
        show=lambda count: f"{count:g}",
        caption="Clients that were asked and gave no usable reply.",
    )


def client_losses(record: Record) -> Figure | None:
    """How training loss is spread over the sites of each round."""
    by_round = replies(record, "train", "loss")
    if not by_round:
        return None
    x = sorted(by_round)
    bands = {r: five_numbers(by_round[r]) for r in x}
    first, last = (by_round[r] for r in (x[0], x[-1]))
    alt = (
        f"Training loss of each client per round: median {median(first):.3g} in round {x[0]} "
        f"(from {min(first):.3g} to {max(first):.3g}), {median(last):.3g} in round {x[-1]} "
        f"(from {min(last):.3g} to {max(last):.3g})."
    )
    with charts.canvas() as (figure, ax):
        for low, high, alpha in ((0, 4, 0.12), (1, 3, 0.22)):
            lows, highs = ([bands[r][k] for r in x] for k in (low, high))
            ax.fill_between(x, lows, highs, color=PALETTE[0], alpha=alpha, linewidth=0)
        if sum(map(len, by_round.values())) <= _DOTS:
            dots = [(r, value) for r in x for value in by_round[r]]
            ax.plot(*zip(*dots, strict=True), ".", color=PALETTE[0], alpha=0.5, markersize=3.0)
        ax.plot(x, [bands[r][2] for r in x], color=INK)
        charts.whole_rounds(ax)
        ax.set_ylabel("Training loss of a client")
        return Figure(
            "client-losses",
            "Training loss of the clients",
            "Line: median. Bands: middle half and 5th to 95th percentile of the clients in a round.",
            charts.svg(figure, "client-losses", alt),
        )


def client_examples(record: Record) -> Figure | None:
    """How many examples the sites that took part hold."""
    held: dict[str, float] = {}
    for line in record.clients:
        examples = number(line, "examples")
        if examples is not None and line["kind"] == "train":
            held[line["site"]] = examples
    if len(held) < 2:
        return None
    counts = sorted(held.values(), reverse=True)
    alt = (
        f"Examples of the {len(counts)} clients that took part, in descending order: "
        f"from {counts[0]:g} to {counts[-1]:g}, median {median(counts):g}."
    )
    with charts.canvas() as (figure, ax):
        edges = [k + 0.5 for k in range(len(counts) + 1)]
        ax.stairs(counts, edges, fill=True, color=PALETTE[0], alpha=0.75)
        ax.axhline(median(counts), color=INK, linewidth=1.0)
        ax.annotate(
            f"median {median(counts):g}",
            (1.0, median(counts)),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 4),
            textcoords="offset points",
            ha="right",
        )
        ax.set_xlabel("Clients that took part, by size")
        ax.set_ylabel("Examples")
        ax.margins(x=0.01)
        return Figure("examples", "Examples a client", "", charts.svg(figure, "examples", alt))


def _stacked(
    record: Record,
    parts: Mapping[str, Mapping[int, float]],
    *,
    name: str,
    title: str,
    ylabel: str,
    whole: bool = False,
    show: Callable[[float], str],
    caption: str,
) -> Figure | None:
    """Parts of a whole per round, as stairs on one another."""
    if not parts:
        return None
    rounds = [line["round"] for line in record.rounds]
    totals = {part: sum(values.values()) for part, values in parts.items()}
    alt = f"{title}, in total: " + ", ".join(f"{part} {show(t)}" for part, t in totals.items())
    with charts.canvas() as (figure, ax):
        edges = [rounds[0] - 0.5, *(r + 0.5 for r in rounds)]
        base = [0.0] * len(rounds)
        for (part, values), color in zip(parts.items(), wheel(len(parts)), strict=True):
            top = [b + values.get(r, 0.0) for b, r in zip(base, rounds, strict=True)]
            ax.stairs(top, edges, baseline=base, fill=True, color=color, label=part)
            base = top
        charts.whole_rounds(ax)
        ax.set_ylabel(ylabel)
        ax.yaxis.get_major_locator().set_params(min_n_ticks=1, integer=whole)  # type: ignore[call-arg]
        ax.set_ylim(bottom=0)
        ax.margins(x=0.01)
        legend(figure, ax)
        return Figure(name, title, caption, charts.svg(figure, name, f"{alt}."))
