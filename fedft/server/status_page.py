"""The status page: one HTML page that carries everything it needs and can fetch or run nothing.

Whatever text comes from elsewhere (names of sites, reasons, notes) is escaped; the content policy
would keep it from running even if it were not.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedft.core.record.lines import RoundLine
    from fedft.server.identity import Client
    from fedft.server.standing import View

_STYLE = resources.files("fedft.server").joinpath("status.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_RELOAD_S = 10
_LONGEST = 160  # characters of any one text

HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Sent with every answer: no script, no request to anywhere, no style but the page's own."""


def page(view: "View") -> str:
    """How a run stands, as HTML."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{_RELOAD_S}">
<title>{_text(view.run)}: {_text(_progress(view))}</title>
<style>{_STYLE}</style>
<header><h1>{_text(view.run)}</h1>
<p>{_text(view.standing.strategy or "getting ready")}</p></header>
<main>
{_lead(view)}
{_waiting(view)}<h2>Rounds</h2>
{_rounds(view)}
<h2>Clients</h2>
{_clients(view)}
{_turned_away(view)}<h2>Failures</h2>
{_failures(view.standing.failures)}
<h2>Said last</h2>
{_notes(view.standing.notes)}
</main>
<footer>Up for {_duration(view.uptime_s)}. Reloads itself every {_RELOAD_S} seconds.
<a href="/metrics">Metrics</a> for Prometheus.</footer>
</html>
"""


def _text(value: object, longest: int = _LONGEST) -> str:
    """Anything, as HTML text."""
    shown = str(value)
    return escape(shown if len(shown) <= longest else shown[: longest - 1] + "…")


def _progress(view: "View") -> str:
    now = view.standing
    if view.over:
        return f"over, after {now.round} rounds" if now.round else "over"
    return f"round {now.round} of {now.target}" if now.target else "waiting for the first round"


def _lead(view: "View") -> str:
    now = view.standing
    bar = f"<progress max='{now.target}' value='{now.round}'></progress>" if now.target else ""
    drawn = sum(tally.drawn for tally in now.sites.values())
    cards = {
        "progress": _progress(view),
        "clients connected": f"{len(view.connected)} of {len(view.clients)}",
        **{f"test {name}": _number(value) for name, value in now.scores.items() if name != "n"},
        "received": _bytes(now.up),
        "sent": _bytes(now.down),
        "failed replies": f"{sum(now.failures.values())} of {drawn}",
    }
    cells = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in cards.items())
    return f"{bar}<dl>{cells}</dl>"


def _waiting(view: "View") -> str:
    if view.standing.waiting is None or view.over:
        return ""
    line = view.standing.waiting.line(lambda name: view.doing.get(name, ""))
    return f"<p>{_text(line, 3 * _LONGEST)}</p>\n"


def _turned_away(view: "View") -> str:
    if not view.turned_away:
        return ""
    rows = [[name, why] for name, why in view.turned_away.items()]
    return f"<h2>Turned away</h2>\n{_table(['client', 'why'], rows, 3 * _LONGEST)}\n"


def _rounds(view: "View") -> str:
    if not view.standing.recent:
        return "<p>None is complete yet.</p>"
    rows = [_round(record) for record in reversed(view.standing.recent)]
    return _table(["round", "train loss", "test", "sites", "seconds", "received", "failed"], rows)


def _round(line: "RoundLine") -> list[str]:
    scores = line.get("eval") or {}
    # The task's first metric comes first among its metrics.
    score = next((value for name, value in scores.items() if name != "loss"), scores.get("loss"))
    failed = [f"{site} ({why})" for why, sites in line["failures"].items() for site in sites]
    return [
        str(line["round"]),
        _number(line["train"]["loss"]),
        "" if score is None else _number(score),
        str(len(line["cohort"])),
        f"{sum(line['seconds'].values()):.1f}",
        _bytes(line["bytes"]["up"]),
        ", ".join(failed),
    ]


def _clients(view: "View") -> str:
    if not view.clients:
        return "<p>Nobody was invited yet: <code>fedft invite NAME</code>.</p>"
    rows = [_client(client, view) for client in view.clients]
    head = ["client", "state", "examples", "rank", "rounds", "failed", "certificate until", "why"]
    return _table(head, rows)


def _client(client: "Client", view: "View") -> list[str]:
    tally = view.standing.sites.get(client.name)
    return [
        client.name,
        _state(client, view),
        str(client.examples or ""),
        str(client.rank or ""),
        str(tally.drawn if tally else 0),
        str(tally.failed if tally else 0),
        client.expires[:10],
        client.why,
    ]


def _state(client: "Client", view: "View") -> str:
    doing = view.doing.get(client.name, "")
    if client.name in view.connected:
        return f"connected, {doing}" if doing else "connected"
    return doing or ("away" if client.state == "joined" else client.state)


def _failures(failures: Mapping[str, int]) -> str:
    if not failures:
        return "<p>None.</p>"
    return _table(["reason", "replies"], [[why, str(n)] for why, n in sorted(failures.items())])


def _notes(notes: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"<li><time>{_text(at)}</time> {_text(said)}</li>" for at, said in notes)
    return f"<ol>{lines}</ol>" if lines else "<p>Nothing.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], longest: int = _LONGEST) -> str:
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    # On a phone a row becomes a list, and each cell carries its title.
    body = "".join(
        "<tr>"
        + "".join(
            f"<td data-title='{_text(title)}'>{_text(cell, longest)}</td>"
            for title, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"
