"""Writes rows of several WordNet definitions: which kinds of things are defined there?

    python examples/tasks/multi-label/prepare.py

The definitions are those of five kinds that fedft carries. A row has one to three of them, drawn at
random. Four kinds are classes; a row of artifacts alone has none. No definition is in both files.
They land in downloads/multi-label, which git ignores.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedft.core.data.source import load
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "multi-label"
TEST_SHARE = 0.15  # of the definitions
CLASSES = ("animal", "food", "person", "plant")
KINDS = (*CLASSES, "artifact")
SEED = 0


def rows(defined: list[tuple[str, str]], rng: np.random.Generator) -> Iterator[dict[str, object]]:
    """One to three definitions a row, and the classes among their kinds; each definition once.

    Args:
        defined: kinds and definitions.
        rng: draws.
    """
    order = rng.permutation(len(defined)).tolist()
    while order:
        own, order = order[: (count := int(rng.integers(1, 4)))], order[count:]
        kinds, texts = zip(*(defined[i] for i in own), strict=True)
        yield {"text": "; ".join(texts), "labels": sorted({*kinds} & {*CLASSES})}


def main() -> None:
    """Write both files."""
    data = load(DataSpec(test_fraction=TEST_SHARE), "classification", seed=SEED)
    names = [name.removeprefix("noun.") for name in data.classes]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, part in (("train", data.train), ("test", data.test)):
        rng = numpy_generator(SEED, "multi-label", file)
        kinds = [names[label] for label in part.one_label]
        known = zip(kinds, part.values["text"], strict=True)
        made = list(rows([(kind, text) for kind, text in known if kind in KINDS], rng))
        with (FOLDER / f"{file}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in made)
        labels = sum(len(row["labels"]) for row in made)  # type: ignore[arg-type]
        print(f"{FOLDER / file}.jsonl: {len(made):,} rows with {labels:,} labels")


if __name__ == "__main__":
    main()
