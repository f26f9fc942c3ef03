"""Writes pairs of texts that belong together: the two halves of a WordNet definition.

    python examples/tasks/sentence-embeddings/prepare.py

Of the definitions that fedft carries those are taken that say a second thing behind a semicolon:
"a hard disk that can be removed from the disk drive; removal prevents unauthorized use". They land in
downloads/sentence-embeddings, which git ignores.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from fedft.core.data.source import load
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "sentence-embeddings"
TEST = 200
SHORTEST = 3  # words of a half
SEED = 0


def halves() -> Iterator[tuple[str, str, str]]:
    """(first half, second half, kind of thing)."""
    rows = load(DataSpec(test_fraction=0.0), "classification", seed=SEED).train
    for text, label in zip(rows.values["text"], rows.one_label, strict=True):
        first, _, second = text.partition("; ")
        if min(len(first.split()), len(second.split())) >= SHORTEST:
            yield first, second, rows.classes[label].removeprefix("noun.")


def main() -> None:
    """Write both files."""
    pairs = list(halves())
    order = numpy_generator(SEED, "sentence-embeddings").permutation(len(pairs)).tolist()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, rows in (("test", order[:TEST]), ("train", order[TEST:])):
        with (FOLDER / f"{file}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["definition", "more", "kind"])
            writer.writerows(pairs[i] for i in rows)
        print(f"{FOLDER / file}.csv: {len(rows):,} pairs")


if __name__ == "__main__":
    main()
