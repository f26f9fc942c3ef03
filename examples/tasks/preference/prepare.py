"""Writes preferences between the answer to a question and the answer to another one.

    pip install chatterbot-corpus==1.3.3
    python examples/tasks/preference/prepare.py

Questions and answers are those of chatterbot-corpus. The chosen answer is the one that stands there;
the rejected one is drawn from the other topics. Nobody was asked what they prefer: such pairs teach a
model to answer to the point, and show that the loss does what it should. No question and no answer is
in both files. They land in downloads/preference, which git ignores.
"""

import json
from pathlib import Path

import numpy as np

from fedft.core.data.source import load
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec, PartitionSpec

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "preference"
TEST = 60
LONGEST = 80  # characters of an answer
SEED = 0


def pairs() -> list[tuple[str, str, str]]:
    """(topic, question, answer), each question and each answer once, in the order of the corpus."""
    partition = PartitionSpec(kind="natural", column="topic")
    spec = DataSpec(source="wheel:chatterbot-corpus", test_fraction=0, partition=partition)
    rows = load(spec, "causal-lm").train
    assert rows.owners is not None
    found: list[tuple[str, str, str]] = []
    questions: set[str] = set()
    answers: set[str] = set()
    for topic, question, answer in zip(
        rows.owners, rows.values["prompt"], rows.values["answer"], strict=True
    ):
        asked, told = question.strip().casefold(), answer.strip().casefold()
        if asked in questions or told in answers or len(answer) > LONGEST:
            continue
        questions.add(asked)
        answers.add(told)
        found.append((topic, question, answer))
    return found


def preferences(rows: list[tuple[str, str, str]], rng: np.random.Generator) -> list[dict[str, str]]:
    """Each question with its own answer and one of another topic's, among these rows."""
    found: list[dict[str, str]] = []
    for topic, question, answer in rows:
        others = [other for name, _, other in rows if name != topic]
        rejected = others[int(rng.integers(len(others)))]
        found.append({"topic": topic, "prompt": question, "chosen": answer, "rejected": rejected})
    return found


def main() -> None:
    """Write both files."""
    rows = pairs()
    order = numpy_generator(SEED, "preference", "split").permutation(len(rows)).tolist()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, part in (("test", order[:TEST]), ("train", order[TEST:])):
        rng = numpy_generator(SEED, "preference", file)
        made = preferences([rows[i] for i in sorted(part)], rng)
        with (FOLDER / f"{file}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        print(f"{FOLDER / file}.jsonl: {len(made):,} pairs")


if __name__ == "__main__":
    main()
