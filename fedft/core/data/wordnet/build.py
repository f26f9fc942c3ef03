"""Makes ``definitions.jsonl.gz`` from WordNet 3.0's ``data.noun``; see README.md beside this file.

    python fedft/core/data/wordnet/build.py DATA_NOUN

The result is a function of the input alone: no random generator, no time stamp.
"""

import gzip
import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

# The lexicographer files of nouns, by number from 03 (WordNet manual, lexnames(5)).
# fmt: off
SUPERSENSES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication",
    "event", "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon",
    "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance",
    "time",
)
# fmt: on
FIRST_FILE = 3
CLASSES = 12
PER_CLASS = 600
WORDS = range(3, 31)
"""Shorter definitions say too little to tell the class, longer ones cost tokens."""


def definitions(data_noun: Path) -> dict[str, str]:
    """Definition → supersense, without examples; without what two supersenses share."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for line in data_noun.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        supersense = SUPERSENSES[int(fields.split()[1]) - FIRST_FILE]
        found[gloss.split('; "')[0].strip().rstrip(";")].add(supersense)
    return {text: f"noun.{min(senses)}" for text, senses in found.items() if len(senses) == 1}


def digest(text: str) -> str:
    """Stands in for a seeded shuffle: uniform, and the same in every version of Python."""
    return hashlib.sha256(text.encode()).hexdigest()


def select(labels: dict[str, str]) -> list[tuple[str, str]]:
    """PER_CLASS rows of each of the CLASSES most populated supersenses, in order of digest."""
    by_label: defaultdict[str, list[str]] = defaultdict(list)
    for text, label in labels.items():
        if len(text.split()) in WORDS:
            by_label[label].append(text)
    chosen = sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:CLASSES]
    rows = [
        (text, label)
        for label in chosen
        for text in sorted(by_label[label], key=digest)[:PER_CLASS]
    ]
    return sorted(rows, key=lambda row: digest(row[0]))


def main(data_noun: str) -> None:
    """Writes the file beside this script."""
    rows = select(definitions(Path(data_noun)))
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    packed = gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0)
    Path(__file__).with_name("definitions.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    main(sys.argv[1])
