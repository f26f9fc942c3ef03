"""The laws of trackers: a run is told to one, killed, and told again."""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from fedft.conformance.laws import Finding, Law, held, require
from fedft.core.record.lines import RoundLine, Summary
from fedft.trackers import Start, Tracker

_SUMMARY = cast(
    Summary,
    {
        "status": "finished",
        "rounds": 4,
        "final": {"loss": 0.1},
        "best": None,
        "seconds": 1.0,
        "bytes": {"up": 1, "down": 2},
        "adapter_sha256": "ab",
    },
)


def _line(round_: int) -> RoundLine:
    """With what lines have, and with what is not known or not finite."""
    line: dict[str, Any] = {
        "round": round_,
        "cohort": ["site-0", "site-1"],
        "failures": {"timeout": ["site-1"]} if round_ % 2 else {},
        "train": {"loss": [0.5, float("nan"), None, 1e300][round_ % 4]},
        "bytes": {"up": 2**40, "down": 7},
        "bias": {"relative": 0.25, "cosine": None, "layers": {"a.0.b": {"relative": 1.0}}},
        "seconds": {"train": 0.1, "commit": 1 / 3},
        "meters": {"of-another": {"deep": {"down": 1.5}, "said": "text"}},
    }
    if round_ % 2:
        line["eval"] = {"loss": 0.5, "accuracy": 0.75}
    return cast(RoundLine, line)


def _told(kind: type[Tracker], run: Path, first: int, last: int, end: bool) -> None:
    """One process: it begins after ``first`` rounds, and ends after ``last``."""
    lines = [_line(r) for r in range(1, last + 1)]
    before = copy.deepcopy(lines)
    tracker = kind()
    tracker.started(Start(run, run / "trackers", {"seed": 0}, lines[:first]))
    for line in lines[first:]:
        tracker.round(line, [])
    tracker.note("a note")
    if end:
        tracker.finished(copy.deepcopy(_SUMMARY))
    tracker.close()
    require(repr(lines) == repr(before), "it wrote to a line that it was told")


def _in_a_folder(kind: type[Tracker], *parts: tuple[int, int, bool]) -> list[str]:
    """The files of a run that was told to it in parts: (rounds before, rounds after, the end)."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "config.toml").write_text("seed = 0\n")
        for first, last, end in parts:
            _told(kind, run, first, last, end)
        require((run / "config.toml").read_text() == "seed = 0\n", "it changed config.toml")
        return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


def it_hears_a_whole_run(kind: type[Tracker]) -> None:
    """Made without arguments, it hears a run from its start to its end."""
    _in_a_folder(kind, (0, 4, True))


def it_goes_on_after_a_kill(kind: type[Tracker]) -> None:
    """A run that was killed goes on behind what is committed, which may be less than was told."""
    _in_a_folder(kind, (0, 3, False), (2, 4, True), (4, 4, True))


def its_files_are_its_own(kind: type[Tracker]) -> None:
    """It writes into a folder of its own below ``start.folder`` alone."""
    files = _in_a_folder(kind, (0, 4, True))
    astray = [f for f in files if f != "config.toml" and len(Path(f).parts) < 3]
    require(
        not astray and all(f.startswith(("config.toml", "trackers/")) for f in files),
        f"it wrote {', '.join(astray or files)}",
    )


LAWS = (
    Law("It hears a whole run, and writes to no line", it_hears_a_whole_run),
    Law("It goes on after a kill", it_goes_on_after_a_kill),
    Law("Its files are in a folder of its own", its_files_are_its_own),
)


def examine(name: str, kind: type[Tracker]) -> Iterator[Finding]:
    """What came of holding a tracker to every law."""
    yield from held("trackers", name, kind, LAWS)
