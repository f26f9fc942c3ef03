"""When sites can be reached: a trace of windows on the simulated clock.

The file is CSV with a header; lines that begin with ``#`` are comments. A row is one window, from
``start_s`` up to, not including, ``end_s``, in seconds since the beginning of the run:

    site,start_s,end_s          windows of registered sites; every site must have one
    profile,start_s,end_s       windows of profiles (time zones, say), dealt out by seed

Rows of one name must not overlap. Under `[fleet] period-s` the trace repeats for ever, and no
window may reach beyond the period; otherwise nobody can be reached after the last window.
"""

import bisect
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from pathlib import Path

from fedft.core.data.partition import Manifest
from fedft.core.errors import ConfigError
from fedft.core.seeds import derive
from fedft.server.fleet import csv_rows, match_sites

Window = tuple[float, float]
"""Start and end in seconds."""

_DIGITS = 6
"""Of a second: windows, and what is left of a period, are rounded to them. A window is then open at
the very time at which it is said to open, whatever floating point makes of a period's multiples."""


@dataclass(frozen=True, eq=False)
class Availability:
    """The windows of all sites.

    Attributes:
        windows: site or profile → its windows in order, none touching another.
        by_site: whether the names are those of sites; otherwise of profiles.
        period_s: after which the windows repeat; None never.
        seed: of the run.
        fingerprint: SHA-256 of the file.
    """

    windows: Mapping[str, Sequence[Window]]
    by_site: bool
    period_s: float | None = None
    seed: int = 0
    fingerprint: str = ""

    def until(self, site: str, at: float) -> float | None:
        """End of the window in which a site can be reached at a time; None where it cannot be."""
        phase, turn = self._phase(at)
        windows = self.windows[self._key(site)]
        here = bisect.bisect_right(windows, phase, key=lambda window: window[0]) - 1
        if here < 0 or phase >= windows[here][1]:
            return None
        start, end = windows[here]
        if end != self.period_s or windows[0][0] > 0:
            return turn + end
        return inf if start == 0 else turn + end + windows[0][1]  # goes on in the next period

    def next_opening(self, at: float) -> float | None:
        """The first time after ``at`` at which a window of any site opens; None where none does."""
        phase, turn = self._phase(at)
        index = bisect.bisect_right(self._openings, phase)
        if index < len(self._openings):
            return turn + self._openings[index]
        return None if self.period_s is None else turn + self.period_s + self._openings[0]

    def anybody(self, at: float) -> bool:
        """Whether the window of any site, or profile, is open."""
        phase, _ = self._phase(at)
        return any(start <= phase < end for own in self.windows.values() for start, end in own)

    def check(self, manifest: Manifest) -> None:
        """Refuse windows by site that are not about the registered sites.

        Raises:
            MismatchError: see :func:`~fedft.server.fleet.match_sites`.
        """
        if self.by_site:
            match_sites(list(self.windows), manifest, "[fleet] availability")

    @cached_property
    def _openings(self) -> list[float]:
        return sorted({start for own in self.windows.values() for start, _ in own})

    @cached_property
    def _profiles(self) -> list[str]:
        return sorted(self.windows)

    def _key(self, site: str) -> str:
        if self.by_site:
            return site
        return self._profiles[derive(self.seed, "profile", site) % len(self._profiles)]

    def _phase(self, at: float) -> tuple[float, float]:
        """Time since the period began, and when that was."""
        if self.period_s is None:
            return at, 0.0
        turns, phase = divmod(at, self.period_s)
        phase = round(phase, _DIGITS)
        if phase >= self.period_s:  # a rounding below the next period
            turns, phase = turns + 1, 0.0
        return phase, turns * self.period_s


def read_availability(path: Path, period_s: float | None = None, seed: int = 0) -> Availability:
    """Read a trace.

    Args:
        path: the CSV.
        period_s: after which it repeats.
        seed: by which profiles are dealt out.

    Raises:
        ConfigError: naming the file, the line and the rule.
    """
    found: dict[str, list[tuple[Window, int]]] = {}
    names = set[str]()
    known = ("site", "profile", "start_s", "end_s")
    for line, row in csv_rows(path, known=known, required=("start_s", "end_s")):
        names |= row.keys() & {"site", "profile"}
        if len(names) != 1:
            raise ConfigError(
                f"{path} needs a column 'site' or a column 'profile', and has {len(names)} of them",
                fix="Give every window the name of a client, or of a profile that is dealt out.",
            )
        name = row[next(iter(names))]
        if not name:
            raise ConfigError(f"{path}, line {line}: whose window is it?", fix="Fill in the name.")
        window = _window(row, f"{path}, line {line}", period_s)
        found.setdefault(name, []).append((window, line))
    return Availability(
        windows={name: _joined(own, name, path) for name, own in found.items()},
        by_site="site" in names,
        period_s=period_s,
        seed=seed,
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _window(row: Mapping[str, str], where: str, period_s: float | None) -> Window:
    try:
        start, end = (round(float(row[column]), _DIGITS) for column in ("start_s", "end_s"))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}", fix="Times are numbers of seconds.") from None
    if not (0 <= start < end and isfinite(end)):
        raise ConfigError(
            f"{where}: a window from {start:g} to {end:g} s", fix="It needs 0 <= start_s < end_s."
        )
    if period_s is not None and end > period_s:
        raise ConfigError(
            f"{where}: a window ends at {end:g} s, after the period of {period_s:g} s",
            fix="Cut it in two at the end of the period, or raise [fleet] period-s.",
        )
    return start, end


def _joined(own: Sequence[tuple[Window, int]], name: str, path: Path) -> tuple[Window, ...]:
    """The windows of one name in order; those that touch are one."""
    ordered = sorted(own)
    for ((_, end), first), ((start, _), second) in itertools.pairwise(ordered):
        if start < end:
            raise ConfigError(
                f"{path}, lines {first} and {second}: windows of {name!r} overlap at {start:g} s",
                fix="Join them into one.",
            )
    joined: list[Window] = []
    for (start, end), _ in ordered:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return tuple(joined)
