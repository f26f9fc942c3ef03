"""Results as data: one JSON file a benchmark, of sections that are measured one by one.

A section says on which machine and with which versions it was measured, so that a file may be
completed in several sittings. ``environments`` holds each such description once, by its digest.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedft.core.files import write_file
from fedft.core.record.environment import surroundings

RESULTS = Path(__file__).parent / "results"


class Results:
    """The sections of one benchmark, written to ``results/<name>.json`` as they come in."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.json"
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.environments: dict[str, Any] = known.get("environments", {})
        self.sections: dict[str, dict[str, Any]] = known.get("sections", {})

    def add(self, key: str, section: Mapping[str, Any]) -> None:
        """Put a section in place of an older one, and write the file."""
        about = environment()
        digest = _digest(about)
        self.environments[digest] = about
        load = os.getloadavg()[0]
        self.sections[key] = {**section, "environment": digest, "load_after": round(load, 2)}
        used = {own["environment"] for own in self.sections.values()}
        content = {
            "environments": {k: v for k, v in sorted(self.environments.items()) if k in used},
            "sections": dict(sorted(self.sections.items())),
        }
        self.path.parent.mkdir(exist_ok=True)
        write_file(self.path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    def measured_here(self, key: str) -> bool:
        """Whether a section is there, of this machine and these versions (of any revision)."""
        return key in self.sections and _same_place(
            self.environments[self.sections[key]["environment"]], environment()
        )


def environment() -> dict[str, Any]:
    """Versions, processor and revision; no time, so that equal ones are equal."""
    around = surroundings()
    return {key: around[key] for key in ("python", "versions", "platform", "cpu", "git")}


def _same_place(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("python", "versions", "platform", "cpu"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark made of sections has."""
    parser.add_argument("--full", action="store_true", help="every section, not the quick ones")
    parser.add_argument("--only", nargs="+", help="sections whose name contains one of these")
    parser.add_argument("--resume", action="store_true", help="leave out what is measured already")


def measure_sections(
    name: str,
    arguments: argparse.Namespace,
    quick: Sequence[str],
    full: Sequence[str],
    measure: Callable[[str], Mapping[str, Any]],
) -> None:
    """Measure the chosen sections one after another; each is on disk before the next begins."""
    results = Results(name)
    for key in chosen(quick, full, arguments.full, arguments.only):
        if arguments.resume and results.measured_here(key):
            print(f"{name} {key}: measured already", flush=True)
            continue
        print(f"── {name} {key}", flush=True)
        results.add(key, measure(key))
    print(f"→ {results.path}", flush=True)


def chosen(
    quick: Sequence[str], full: Sequence[str], everything: bool, only: Iterable[str] | None
) -> list[str]:
    """Which sections to measure; ``only`` looks among all of them.

    Raises:
        SystemExit: nothing is called so.
    """
    if only is None:
        return list(full if everything else quick)
    found = [key for key in full if any(part in key for part in only)]
    if not found:
        raise SystemExit(f"no section is called so; there are: {', '.join(full)}")
    return found
