"""The results as ``docs/performance.md`` shows them: figures, tables, targets.

    python -m benchmarks.page

Rewrites what stands between the page's markers, and the figures beside it. No number there is
typed by hand.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import PEERS
from benchmarks.record import RESULTS
from benchmarks.targets import Sections, batches, largest, sections, smallest_share, targets
from fedft.report import charts
from fedft.report.charts import INK, MUTED, PALETTE

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- results: python -m benchmarks.page -->", "<!-- end of results -->"

_BATCHES = {8: PALETTE[0], 1: PALETTE[5]}
"""Colours of the two batch sizes, in every figure."""


def main() -> None:
    figures, text = page(RESULTS)
    for name, svg in figures.items():
        path = DOCS / "figures" / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(svg, encoding="utf-8")
    target = DOCS / "performance.md"
    target.write_text(filled(target.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(f"→ {target}")


def page(folder: Path) -> tuple[dict[str, str], str]:
    """The figures as SVG by name, and the generated part of the page as Markdown."""
    cohort, engines = sections("cohort", folder), sections("engines", folder)
    registered = sections("registered", folder)
    figures: dict[str, str] = {}
    parts: list[str] = ["## Targets\n", _targets(folder)]
    for name, title, draw, table, found in (
        ("engines", "Whole engines", _draw_engines, _engine_rows, engines),
        ("cohort", "The cohort engine", _draw_cohort, _cohort_rows, cohort),
        ("registered", "Registered clients", _draw_registered, _registered_rows, registered),
    ):
        if found:
            figures[name], alt = draw(found)
            parts += [f"## {title}\n", f"![{alt}](figures/{name}.svg)\n", table(found)]
    if federation := sections("federation", folder):
        parts += ["## The federation around the training\n", _federation_rows(federation)]
    if tasks := sections("tasks", folder):
        parts += ["## Every task in the cohort engine\n", _task_rows(tasks)]
    if memory := sections("memory", folder):
        parts += ["## Memory of local training\n", _memory_rows(memory)]
    if (folder / "aggregation.json").exists():
        parts += ["## Aggregation\n", _aggregation_rows(folder / "aggregation.json")]
    return figures, "\n".join(parts)


def filled(text: str, generated: str) -> str:
    """The page with its generated part replaced.

    Raises:
        ValueError: the markers are not there.
    """
    head, found, rest = text.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the page needs a line {BEGIN!r} and a line {END!r}")
    return f"{head}{BEGIN}\n{generated}\n{END}{tail}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows)) + "\n"


def _targets(folder: Path) -> str:
    rows = [
        [
            t.what,
            f"{t.sense} {t.bound:g}{t.unit}",
            "–" if t.measured is None else f"{t.measured:.2f}{t.unit}",
            t.verdict,
        ]
        for t in targets(folder)
    ]
    return _markdown(["", "asked", "measured", ""], rows)


# ------------------------------------------------------------------------------ the engines


def _draw_engines(found: Sections) -> tuple[str, str]:
    section = largest(found)
    bars = {(r["way"], r["batch"]): r["ms_a_sample"] for r in section["rows"]}
    alt = f"Wall milliseconds a sample, {section['sites']} sites a round on two cores."
    return _bars("engines", bars, "Milliseconds a sample, steady rounds", alt), alt


def _engine_rows(found: Sections) -> str:
    rows = [
        [
            f"{row['way']}, batch {row['batch']}",
            section,
            _spread(row["ms_a_sample"]),
            *(f"{row['over'][peer]:.2f}×" if peer in row["over"] else "–" for peer in PEERS),
        ]
        for section, own in found.items()
        for row in sorted(own["rows"], key=lambda row: -row["batch"])
    ]
    return _markdown(["engine", "round", "ms a sample", *PEERS], rows)


# ------------------------------------------------------------------------------- the cohort


def _draw_cohort(found: Sections) -> tuple[str, str]:
    bars = {
        (f"{row['contender']}, {row['precision']}", batch): row["ms_a_sample"]
        for batch in _BATCHES
        for row in found.get(f"minilm/qv/real/{batch}", {"rows": []})["rows"]
    }
    alt = "CPU milliseconds a sample on one thread: MiniLM, WordNet definitions."
    return _bars("cohort", bars, "CPU milliseconds a sample", alt), alt


def _cohort_rows(found: Sections) -> str:
    rows: list[list[str]] = []
    for key, section in found.items():
        for row in section["rows"]:
            twin = row["over"].get("one adapter")
            rows.append(
                [
                    key,
                    f"{row['contender']}, {row['precision']}",
                    _spread(row["ms_a_sample"]),
                    f"{row['over']['peft fp32']:.2f}×",
                    f"{row['over']['peft']:.2f}×",
                    f"{twin:.2f}×" if twin else "",
                    f"{row['share_of_gemm']['peak']:.0%}",
                ]
            )
    head = ["section", "who", "CPU ms a sample", "peft fp32", "peft", "one adapter", "GEMM peak"]
    return _markdown(head, rows)


# --------------------------------------------------------------------------- the federation


def _federation_rows(found: Sections) -> str:
    rows = [
        [
            key.replace("-", ", batch "),
            _spread(own["loop_cpu_s"]),
            *(_spread(own["round_cpu_s"][part]) for part in ("worker", "driver", "ray")),
            *(f"{own['over_loop'][n]['median']:.3f}" for n in ("worker", "worker + driver")),
        ]
        for key, own in found.items()
    ]
    head = [
        "CPU s a round",
        "plain loop",
        "worker",
        "driver",
        "Ray",
        "worker / loop",
        "both / loop",
    ]
    return _markdown(head, rows)


def _draw_registered(found: Sections) -> tuple[str, str]:
    fleets = list(next(iter(found.values()))["fleets"])
    keys = sorted((key for key in found), key=int)
    each = [int(key) for key in keys]
    with charts.canvas(6.0, 3.2) as (figure, ax):
        right = ax.twinx()
        for fleet, filled_ in zip(fleets, (True, False), strict=False):
            for axes, name, color in ((ax, "round_s", PALETTE[0]), (right, "peak_mib", PALETTE[1])):
                values = [found[key]["fleets"][fleet][name]["median"] for key in keys]
                face = color if filled_ else "white"
                look: dict[str, Any] = {"marker": "o", "markerfacecolor": face, "color": color}
                axes.plot(each, values, linestyle="-" if filled_ else "--", **look)
        for axes in (ax, right):
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        right.grid(visible=False)
        ax.set_xscale("log")
        ax.set_xticks(each, [f"{n:,}" for n in each])
        ax.minorticks_off()
        ax.set_xlabel("Clients a round; filled: 1,000 registered, hollow: 1,000,000")
        ax.set_ylabel("Seconds a round", color=PALETTE[0])
        right.set_ylabel("Peak memory of the driver, MiB", color=PALETTE[1])
        alt = "Seconds and peak memory of a round, for a thousand and a million registered clients."
        return _standing(figure, "registered", alt), alt


def _registered_rows(found: Sections) -> str:
    rows = [
        [
            f"{int(key):,} of {int(fleet):,}",
            *(_spread(own[name]) for name in ("start_s", "round_s", "peak_mib")),
        ]
        for key in sorted(found, key=int)
        for fleet, own in found[key]["fleets"].items()
    ]
    return _markdown(["clients a round", "start-up s", "s a round", "peak MiB"], rows)


def _task_rows(found: Sections) -> str:
    """A row a task: eight clients one after the other, and together."""
    rows = [
        [
            f"`{own['task']}`",
            own["model"].partition(":")[2] or own["model"],
            str(own["batch"]),
            *(f"{own[engine]['median']:.1f}" for engine in ("loop", "cohort")),
            f"{own['gain']['median']:.2f} ({own['gain']['low']:.2f}–{own['gain']['high']:.2f})",
            f"{own['difference']:.0e}",
        ]
        for own in found.values()
    ]
    about = (
        "Eight clients of two steps each on the data of `examples/tasks`, one thread, float32, SGD; CPU "
        "milliseconds a row, medians of five turns. The last column is the largest difference between the "
        "adapters of both engines.\n"
    )
    head = ["task", "model", "batch", "plain loop", "cohort of 8", "gain", "difference"]
    return about + "\n" + _markdown(head, rows)


def _memory_rows(found: Sections) -> str:
    """A row a batch size, its depths (or halves of blocks) beside each other."""
    rows: list[list[str]] = []
    for name, section in found.items():
        for batch in batches(section["rows"]):
            own = [row for row in section["rows"] if row["batch"] == batch]
            rows.append(
                [
                    name,
                    str(batch),
                    " / ".join(str(row.get("held", row.get("blocks"))) for row in own),
                    *(
                        " / ".join(f"{row[key]:.0f}" for row in own)
                        for key in ("predicted_mib", "measured_mib")
                    ),
                    f"{max((row['error'] for row in own), key=abs):+.0%}",
                    f"{share:.2f}" if (share := smallest_share(own)) is not None else "–",
                ]
            )
    about = (
        "MiB above what a process takes without a model: MiniLM with 128 tokens a row, SmolLM2-135M "
        "with 64 of which half are scored, ViT-S with 17 patches; float32, rank 8."
    )
    head = [
        "model",
        "batch",
        "held",
        "predicted",
        "measured",
        "largest error",
        "smallest over whole",
    ]
    return f"{about}\n\n{_markdown(head, rows)}"


def _aggregation_rows(path: Path) -> str:
    """Of the largest number of clients; a rule without a product has no dense twin."""
    found = json.loads(path.read_text(encoding="utf-8"))
    most = max(row["clients"] for row in found["rows"])
    rows = [
        [
            row["rule"],
            f"{row['seconds']:.3f}",
            f"{row['peak_mib']:.0f}",
            *(
                (f"{row['dense_seconds']:.2f}", f"{row['dense_peak_mib']:.0f}")
                if "faster" in row
                else ("–", "–")
            ),
            f"{row['faster']:.1f}×" if "faster" in row else "–",
        ]
        for row in found["rows"]
        if row["clients"] == most
    ]
    setting = found["setting"]
    about = (
        f"One layer of {setting['d']} × {setting['d']} at rank {setting['rank']}, {most} clients"
    )
    head = ["rule", "seconds", "peak MiB", "dense seconds", "dense peak MiB", "faster"]
    return f"{about}, float32, one thread.\n\n{_markdown(head, rows)}"


# -------------------------------------------------------------------------------- drawing


def _bars(
    name: str, bars: Mapping[tuple[str, int], Mapping[str, float]], axis: str, alt: str
) -> str:
    """Two bars a label, one for each batch size, with the range of the repeats."""
    labels = list(dict.fromkeys(label for label, _ in bars))
    with charts.canvas(6.4, 0.8 + 0.34 * len(labels)) as (figure, ax):
        for (batch, color), offset in zip(_BATCHES.items(), (-0.19, 0.19), strict=True):
            drawn = [
                (i, bars[label, batch]) for i, label in enumerate(labels) if (label, batch) in bars
            ]
            if not drawn:
                continue
            rows = [i + offset for i, _ in drawn]
            middle = [own["median"] for _, own in drawn]
            ax.barh(rows, middle, height=0.36, color=color, label=f"batch {batch}")
            for row, (_, own) in zip(rows, drawn, strict=True):
                ax.plot([own["low"], own["high"]], [row, row], color=INK, linewidth=0.8)
                at = max(own["high"], own["median"])
                ax.annotate(
                    f"{own['median']:.1f}",
                    (at, row),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color=MUTED,
                )
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.grid(visible=True, axis="x")
        ax.margins(x=0.08)
        ax.set_xlabel(axis)
        ax.legend(loc="lower right")
        return _standing(figure, name, alt)


def _standing(figure: Any, name: str, alt: str) -> str:
    """An SVG that stands alone: with a ground of its own, whatever page shows it."""
    drawn = charts.svg(figure, name, alt)
    head, mark, rest = drawn.partition(">")
    family = 'font-family="Helvetica, Arial, sans-serif"'
    return f'{head} {family}{mark}<rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'


def _spread(own: Mapping[str, float]) -> str:
    median, low, high = (
        f"{own[name]:.3g}" if own[name] < 1000 else f"{own[name]:.0f}"
        for name in ("median", "low", "high")
    )
    return f"{median} ({low}–{high})"


if __name__ == "__main__":
    main()
