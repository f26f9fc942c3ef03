"""The page: one HTML file that carries everything it needs and can fetch or run nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from fedft.core.privacy import WORDS
from fedft.report import by_class, charts, compare_figures, run_figures
from fedft.report.figures import Figure
from fedft.report.formats import EXACT, bias_text, bytes_text, score, seconds_text
from fedft.report.groups import Group, Metric, further, group, metric_of, traffic
from fedft.report.privacy import (
    delta_text,
    epsilon_text,
    epsilon_title,
    promise,
    spent,
    spent_after,
)
from fedft.report.records import Json, Record, clean, flatten, lookup, mapping, number
from fedft.report.tables import Table, tabulate

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""No script, no request: whatever text a run brought along, it stays text."""


def text(value: object, limit: int = 200) -> str:
    """Anything from a run, as HTML text."""
    return escape(clean(value, limit))


def of_run(record: Record) -> str:
    """The page of a single run."""
    metric = metric_of([record])
    title = f"{record.strategy} on {clean(lookup(record.config, 'data', 'source') or 'data', 80)}"
    return _page(
        title,
        _lead(record),
        [
            _unfinished([record], []),
            _cards(record, metric),
            _facts(record),
            "<h2>Measurements</h2>",
            _figures(run_figures.of_run(record, metric)),
            by_class.section(record),
            "<h2>Configuration</h2>",
            f"<p class='small'>As it was run, and as it runs again: "
            f"<code>fedft simulate {text(record.path.name)}/config.toml</code></p>",
            f"<pre class='columns'>{text(record.config_text.strip(), 20_000)}</pre>",
            "<h2>Environment</h2>",
            _environment(record.environment),
        ],
    )


def of_comparison(
    records: Sequence[Record], waiting: Sequence[str], confidence: float | None = None
) -> str:
    """The page of several runs: rules, or other arms, side by side.

    Args:
        records: the runs.
        waiting: names of runs that have not completed a round.
        confidence: level of the intervals, see :func:`~fedft.report.groups.group`.
    """
    metric, groups = metric_of(records), group(records, confidence)
    table = tabulate(records, confidence)
    first = records[0]
    data = clean(lookup(first.config, "data", "source") or "data", 80)
    look = charts.styles(groups)
    return _page(
        f"Aggregation rules compared on {data}",
        f"{len(groups)} arms, {len(records)} runs. {_setting(first)}",
        [
            _unfinished(records, waiting),
            "<h2>Summary</h2>",
            _table(table, look),
            f"<p class='small'>{escape(table.note())} {_exact_note(table)}</p>",
            _pasted(table),
            "<h2>Measurements</h2>",
            _figures(compare_figures.of_comparison(groups, metric)),
            "<h2>Configuration</h2>",
            _differences(records, groups),
            f"<pre class='columns'>{text(first.config_text.strip(), 20_000)}</pre>",
            "<h2>Environment</h2>",
            _environment(first.environment),
        ],
    )


def _page(title: str, lead: str, sections: Iterable[str]) -> str:
    css = resources.files("fedft.report").joinpath("page.css").read_text("utf-8")
    body = "\n".join(section for section in sections if section)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{css}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="lead">{text(lead, 400)}</p>
</header>
<main>
{body}
</main>
<footer>Made by fedft from the run directories alone; every number can be recomputed from
<code>rounds.jsonl</code> and <code>clients.jsonl</code>.</footer>
</body>
</html>
"""


# ── what ran ──────────────────────────────────────────────────────────────────────────────────


def _lead(record: Record) -> str:
    return f"{_setting(record)} Seed {record.seed}."


def _setting(record: Record) -> str:
    """``100 clients, 10 a round, 20 rounds. Dirichlet 0.3.``"""
    config, done = record.config, len(record.rounds)
    clients, per = lookup(config, "fleet", "clients"), lookup(config, "rounds", "per-round")
    parts = [f"{clients} clients"] if clients is not None else []
    parts += [f"{per} a round"] if per is not None else []
    parts += [_count(done, "round")]
    return f"{', '.join(parts)}. Partition: {_partition(config)}."


def _partition(config: Json) -> str:
    table = dict(mapping(lookup(config, "data", "partition")))
    kind = clean(table.pop("kind", "not recorded"))
    relevant = {"dirichlet": "alpha", "shards": "shards-per-client", "natural": "column"}
    key = relevant.get(kind, "")
    return f"{kind}, {key} {clean(table[key])}" if key in table else kind


def _unfinished(records: Sequence[Record], waiting: Sequence[str]) -> str:
    open_ = [r for r in records if r.summary is None]
    if not open_ and not waiting:
        return ""
    parts = []
    if open_:
        names = ", ".join(f"{text(r.path.name)} (round {len(r.rounds)})" for r in open_[:8])
        more = f" and {len(open_) - 8} more" if len(open_) > 8 else ""
        parts.append(f"Unfinished: {names}{more}.")
    if waiting:
        names = ", ".join(text(name) for name in waiting[:8])
        more = f" and {len(waiting) - 8} more" if len(waiting) > 8 else ""
        parts.append(f"No completed round yet, left out: {names}{more}.")
    return f"<p class='notice'>{' '.join(parts)} What follows is what has been recorded so far.</p>"


def _cards(record: Record, metric: Metric) -> str:
    values = record.series(*metric.keys)
    best = (max if metric.higher else min)(values, key=lambda r: values[r]) if values else None
    failed = sum(len(sites) for line in record.rounds for sites in line["failures"].values())
    asked = sum(len(line["cohort"]) for line in record.rounds)
    sites = record.final(*metric.of_sites)
    up, down = (_stated(record, way) for way in ("up", "down"))
    forgotten = record.mean("bias", "forgotten") or 0.0
    elapsed, busy = record.final("clock", "elapsed"), record.total("clock", "device_seconds")
    cards = [
        (metric.title, score(record.final(*metric.keys), metric.percent), f"after round {max(values)}{_from(record, metric)}" if values else ""),
        *((m.title, score(record.final(*m.keys), m.percent), "") for m in further([record], metric)),
        ("Best round", score(values[best], metric.percent) if best is not None else "—", f"round {best}" if best is not None else ""),
        (f"Clients' own {metric.word}", score(sites, metric.percent), "mean over clients") if sites is not None else None,
        ("Relative bias", bias_text(record.mean("bias", "relative")), "mean over rounds"),
        ("Forgotten", bias_text(forgotten), "of the bias: not sent to low ranks, and lost") if forgotten > EXACT else None,
        ("Traffic", bytes_text(traffic(record)), f"{bytes_text(up)} up, {bytes_text(down)} down"),
        ("Time", seconds_text(record.seconds()), f"{len(record.rounds)} rounds"),
        ("Simulated time", seconds_text(elapsed), f"{seconds_text(busy)} of all devices") if elapsed is not None else None,
        ("Unusable replies", str(failed), f"of {asked} asked"),
        *_privacy_cards(record),
    ]  # fmt: skip
    return "<dl class='cards'>{}</dl>".format(
        "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
            for name, value, more in (card for card in cards if card)
        )
    )


def _from(record: Record, metric: Metric) -> str:
    start = record.final(*metric.of_start) if metric.keys[0] == "eval" else None
    return "" if start is None else f", from {score(start, metric.percent)}"


def _privacy_cards(record: Record) -> list[tuple[str, str, str]]:
    after = f"after round {spent_after(record)}"
    return [
        (
            epsilon_title(unit),
            epsilon_text(number(facts, "epsilon")),
            f"{delta_text(facts)}, {after}",
        )
        for unit, facts in spent(record).items()
    ]


def _stated(record: Record, way: str) -> float:
    stated = number(record.summary or {}, "bytes", way)
    return record.total("bytes", way) if stated is None else stated


def _facts(record: Record) -> str:
    config = record.config
    rank, alpha = lookup(config, "lora", "rank"), lookup(config, "lora", "alpha")
    ranks = lookup(config, "fleet", "ranks")
    targets = lookup(config, "lora", "target-modules")
    modules = ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    options = {k: v for k, v in mapping(config.get("strategy")).items() if k != "name"}
    local = mapping(config.get("training"))
    length = (
        _count(local["steps"], "step")
        if local.get("steps")
        else _count(local.get("epochs"), "epoch")
    )
    facts = [
        ("Rule", record.strategy + "".join(f", {k} {v}" for k, v in flatten(options).items())),
        ("Model", lookup(config, "model", "source")),
        ("Task", lookup(config, "model", "task")),
        ("Data", lookup(config, "data", "source")),
        ("Partition", _partition(config)),
        ("Adapter", f"rank {ranks or rank}, alpha {alpha}, on {modules}"),
        ("Local training", f"{length}, batch {local.get('batch-size', '—')}, {local.get('optimizer', '—')}, lr {local.get('lr', '—')}"),
        *((f"Privacy by {WORDS[unit]}", promise(facts)) for unit, facts in spent(record).items()),
        ("Seed", record.seed),
        ("Status", lookup(record.summary or {}, "status") or "unfinished"),
        ("Adapter sha256", lookup(record.summary or {}, "adapter_sha256")),
        ("Run", record.path.name),
    ]  # fmt: skip
    return "<dl class='facts'>{}</dl>".format(
        "".join(
            f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>"
            for name, value in facts
            if value is not None
        )
    )


def _count(value: object, noun: str) -> str:
    return f"{'—' if value is None else value} {noun}{'' if value == 1 else 's'}"


def _environment(environment: Json) -> str:
    """Versions and hashes. The command line stays out: it names this machine's folders."""
    hidden = ("argv", "meters", "metrics")
    flat = {k: v for k, v in flatten(environment).items() if k not in hidden and v is not None}
    if not flat:
        return "<p class='small'>Not recorded.</p>"
    return "<dl class='facts'>{}</dl>".format(
        "".join(
            f"<div><dt>{text(key, 60)}</dt><dd>{text(_plain(value))}</dd></div>"
            for key, value in flat.items()
        )
    )


def _plain(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


# ── tables and figures ────────────────────────────────────────────────────────────────────────


def _table(table: Table, look: Mapping[str, charts.Style]) -> str:
    head = "".join(f"<th scope='col'>{escape(title)}</th>" for title in table.header())
    rows = []
    for row, cells in zip(table.rows, table.cells(), strict=True):
        style = look[row.label]
        kind = "key hollow" if style.hollow else "key"
        key = f"<span class='{kind}' style='color:{style.color}'></span>"
        values = "".join(f"<td>{text(cell)}</td>" for cell in cells[1:])
        rows.append(f"<tr><td>{key}{text(cells[0])}</td>{values}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _exact_note(table: Table) -> str:
    notes = []
    if any(row.bias and row.bias.mean <= 1e-6 for row in table.rows):
        notes.append("“exact”: a relative bias of 10⁻⁶ or less, the rounding of float32.")
    if any(row.bias is None for row in table.rows) and any(row.bias for row in table.rows):
        notes.append("A bias of “—” cannot be known: the rule keeps a factor at the clients.")
    return " ".join(notes)


def _pasted(table: Table) -> str:
    forms = (("Markdown", table.markdown()), ("LaTeX (booktabs)", table.latex()))
    return "".join(
        f"<details class='screen'><summary>As {name}, to copy</summary>"
        f"<pre class='copy'>{text(form, 50_000)}</pre></details>"
        for name, form in forms
    )


def _figures(figures: Sequence[Figure]) -> str:
    return f"<div class='figures'>{''.join(map(_figure, figures))}</div>"


def _figure(figure: Figure) -> str:
    shape = " class='wide'" if figure.wide else ""
    both = f"<div class='room'>{figure.wide}</div><div class='narrow'>{figure.svg}</div>"
    caption = f"<figcaption>{text(figure.caption, 500)}</figcaption>" if figure.caption else ""
    drawing = both if figure.wide else figure.svg
    return f"<figure{shape} id='{figure.name}'><h3>{text(figure.title)}</h3>{drawing}{caption}</figure>"


def _differences(records: Sequence[Record], groups: Sequence[Group]) -> str:
    """What the shown configuration stands for, and in which keys the others depart from it."""
    flats = [flatten(record.config) for record in records]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    seen = {key: list(dict.fromkeys(clean(f.get(key, "—"), 40) for f in flats)) for key in keys}
    varying = {key: values for key, values in seen.items() if len(values) > 1}
    intro = (
        f"<p class='small'>That of {text(groups[0].label)}, seed {records[0].seed}. "
        "The runs differ in these keys only:</p>"
    )
    rows = "".join(
        f"<div><dt>{text(key, 60)}</dt><dd>{text(', '.join(values))}</dd></div>"
        for key, values in varying.items()
    )
    return f"{intro}<dl class='facts'>{rows}</dl>" if rows else ""
