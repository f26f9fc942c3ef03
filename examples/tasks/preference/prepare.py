"""Writes preferences between an answer as it stands and the same one told badly, out of chatterbot-corpus.

    pip install chatterbot-corpus==1.3.3
    python examples/tasks/preference/prepare.py

The preferences are synthetic: nobody was asked. The chosen answer is the one of the corpus; the
rejected one is it in capitals, or said twice, each in half of the pairs. No question and no answer
is in both files. They land in downloads/preference, which git ignores.
"""

import json
from pathlib import Path

from fedft.core.data.source import load
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec, PartitionSpec

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "preference"
TEST = 100
LONGEST = 80  # characters of a question, and of an answer
SEED = 0

Said = tuple[str, str, str]
"""(topic, question, answer)"""


def answers() -> list[Said]:
    """Each question and each answer once, in the order of the corpus."""
    partition = PartitionSpec(kind="natural", column="topic")
    spec = DataSpec(source="wheel:chatterbot-corpus", test_fraction=0, partition=partition)
    rows = load(spec, "causal-lm").train
    assert rows.owners is not None
    found: list[Said] = []
    seen: tuple[set[str], set[str]] = (set(), set())
    columns = (rows.owners, rows.values["prompt"], rows.values["answer"])
    for topic, question, answer in zip(*columns, strict=True):
        asked, told = question.strip(), answer.strip()
        if max(len(asked), len(told)) > LONGEST or told == told.upper():
            continue
        keys = (asked.casefold(), told.casefold())
        if any(key in known for key, known in zip(keys, seen, strict=True)):
            continue
        for key, known in zip(keys, seen, strict=True):
            known.add(key)
        found.append((topic, asked, told))
    return found


def pair(said: Said, flaw: int) -> dict[str, str]:
    """A line of the data."""
    topic, question, answer = said
    rejected = answer.upper() if flaw else f"{answer} {answer}"
    return {"topic": topic, "prompt": question, "chosen": answer, "rejected": rejected}


def main() -> None:
    """Write both files."""
    found = answers()
    order = numpy_generator(SEED, "preference").permutation(len(found)).tolist()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", order[:TEST]), ("train", order[TEST:])):
        pairs = [pair(found[i], at % 2) for at, i in enumerate(part)]
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in pairs)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{FOLDER / name}.jsonl: {len(pairs):,} pairs")


if __name__ == "__main__":
    main()
