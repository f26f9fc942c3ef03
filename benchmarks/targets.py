"""What was asked of the engine, beside what the results say.

python -m benchmarks.targets
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.record import RESULTS

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """A bound on a measured figure.

    Attributes:
        what: is bounded.
        bound: the figure that was asked for.
        sense: which side of it is good.
        measured: None where the benchmark has not run.
        unit: behind the figures.
    """

    what: str
    bound: float
    sense: Literal["≥", "≤"]
    measured: float | None
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.sense == "≥" else self.measured <= self.bound

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def targets(folder: Path = RESULTS) -> list[Target]:
    """All of them, from the committed results."""
    return [
        *_cohort(sections("cohort", folder)),
        *_engines(sections("engines", folder)),
        *_federation(sections("federation", folder)),
        *_registered(sections("registered", folder)),
        *_memory(sections("memory", folder)),
    ]


def sections(name: str, folder: Path = RESULTS) -> Sections:
    """The sections of a benchmark; none where it has not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["sections"] if path.exists() else {}


def _cohort(found: Sections) -> Iterator[Target]:
    bounds = {"8": ((3.5, "bf16", "peft fp32"), (2.0, "bf16", "peft"), (1.2, "fp32", "peft"))}
    bounds["1"] = ((4.0, "bf16", "peft fp32"), (3.0, "bf16", "peft"), (1.8, "fp32", "peft"))
    for batch, wanted in bounds.items():
        rows = found.get(f"minilm/qv/real/{batch}", {}).get("rows", [])
        for bound, precision, peer in wanted:
            own = [r["over"][peer] for r in _large(rows) if r["precision"] == precision]
            name = peer if peer != "peft" else f"peft {precision}"
            what = f"cohort {precision} over {name}, batch {batch}, real text"
            yield Target(what, bound, "≥", max(own, default=None))
        for precision in ("fp32", "bf16"):
            own = [r["over"]["one adapter"] for r in _large(rows) if r["precision"] == precision]
            what = f"cohort {precision} over one adapter at batch K·{batch}, the worse K"
            yield Target(what, 0.95, "≥", min(own, default=None))
    shares = [
        row["share_of_gemm"]["peak"]
        for section in found.values()
        for row in section["rows"]
        if row["contender"].startswith("cohort")
    ]
    best = max(shares, default=None)
    yield Target("moonshot: share of the GEMM peak, the best row", 0.5, "≥", best, "")


def _large(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (r for r in rows if r["contender"] in ("cohort 8", "cohort 16"))


def _engines(found: Sections) -> Iterator[Target]:
    """The faster of Ray's workers and forked ones, at the largest round."""
    rows = largest(found).get("rows", [])
    ways = ("fedft, bf16", "fedft, forked, bf16")
    for batch, bound, aim in ((8, 4.5, 6.0), (1, 5.0, 8.0)):
        own = [r["over"]["flower"] for r in rows if r["way"] in ways and r["batch"] == batch]
        measured = max(own, default=None)
        yield Target(f"fedft bf16 over Flower's engine, batch {batch}", bound, "≥", measured)
        yield Target(f"the same, aim, batch {batch}", aim, "≥", measured)


def largest(found: Sections) -> Mapping[str, Any]:
    """The section with most sites a round."""
    return max(found.values(), key=lambda section: section["sites"], default={})


def _federation(found: Sections) -> Iterator[Target]:
    for backend, batch in itertools.product(("processes", "ray"), ("8", "1")):
        own = found.get(f"{backend}-{batch}", {})
        ratio = own.get("over_loop", {}).get("worker + driver", {})
        what = f"CPU seconds of a round at K = 1 over the plain loop, {backend}, batch {batch}"
        yield Target(what, 1.02, "≤", ratio.get("median"))


def _memory(found: Sections) -> Iterator[Target]:
    """A quarter of the blocks, rounded down: one of six, seven of thirty, three of twelve."""
    whole = {n: own["rows"] for n, own in found.items() if "blocks" in own["rows"][0]}
    plain = [rows for name, rows in whole.items() if not name.endswith("-checkpointing")]
    by_batch = [[r for r in rows if r["batch"] == n] for rows in plain for n in batches(rows)]
    worst = max((share for rows in by_batch if (share := smallest_share(rows))), default=None)
    what = "memory of a client with a quarter of the blocks over the whole, the worst"
    yield Target(what, 0.35, "≤", worst)
    yield Target("the same memory, aim", 0.25, "≤", worst)
    errors = [abs(row["error"]) for rows in whole.values() for row in rows]
    what = "largest error of the memory predicted"
    yield Target(what, 0.15, "≤", max(errors, default=None), "")


def batches(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The batch sizes of a section, in order."""
    return list(dict.fromkeys(row["batch"] for row in rows))


def smallest_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Measured peak of the fewest blocks over that of all; None where halves are held."""
    peaks = {row["blocks"]: row["measured_mib"] for row in rows if "blocks" in row}
    return peaks[min(peaks)] / peaks[max(peaks)] if peaks else None


def _registered(found: Sections) -> Iterator[Target]:
    ten = found.get("10", {}).get("fleets", {})
    for name, bound, unit in (("start_s", 2.0, " s"), ("peak_mib", 150.0, " MiB")):
        few, many = (
            ten.get(fleet, {}).get(name, {}).get("median") for fleet in ("1000", "1000000")
        )
        extra = None if few is None or many is None else many - few
        word = "start-up" if name == "start_s" else "memory"
        yield Target(f"{word} of a million registered over a thousand", bound, "≤", extra, unit)


def main() -> None:
    for target in targets():
        measured = "" if target.measured is None else f"{target.measured:.2f}{target.unit}"
        asked = f"{target.sense} {target.bound:g}{target.unit}"
        print(f"{target.verdict:13}{measured:>10}  {asked:>10}  {target.what}")


if __name__ == "__main__":
    main()
