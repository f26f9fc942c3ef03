"""Writes pairs of a WordNet definition and a kind of thing: is what is defined of that kind?

    python examples/tasks/text-pair/prepare.py

The kinds are the 12 supersenses of the data that fedft carries. Half of the pairs are right. No
definition is in both files. They land in downloads/text-pair, which git ignores.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fedft.core.data.source import load
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "text-pair"
TEST_SHARE = 0.15  # of the definitions
SEED = 0


def pairs(
    texts: Sequence[str], kinds: Sequence[str], names: Sequence[str], rng: np.random.Generator
) -> Iterator[tuple[str, str, str]]:
    """(definition, kind, yes or no): each definition once, every other one with a wrong kind."""
    for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if i % 2:
            yield text, kind, "yes"
        else:
            yield text, str(rng.choice([name for name in names if name != kind])), "no"


def main() -> None:
    """Write both files."""
    rows = load(DataSpec(test_fraction=TEST_SHARE), "classification", seed=SEED)
    names = [name.removeprefix("noun.") for name in rows.classes]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, part in (("train", rows.train), ("test", rows.test)):
        rng = numpy_generator(SEED, "text-pair", file)
        kinds = [names[label] for label in part.one_label]
        made = list(pairs(part.values["text"], kinds, names, rng))
        with (FOLDER / f"{file}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["definition", "kind", "right"])
            writer.writerows(made)
        print(f"{FOLDER / file}.csv: {len(made):,} pairs")


if __name__ == "__main__":
    main()
