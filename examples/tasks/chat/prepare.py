"""Writes conversations of several turns by topic, out of the questions and answers of chatterbot-corpus.

    pip install chatterbot-corpus==1.3.3
    python examples/tasks/chat/prepare.py

An exchange is what is said and what is answered. Conversations of the corpus with several exchanges
stay as they are; single ones of a topic are put together by threes. A system message says what it is
about. No conversation is in both files. They land in downloads/chat, which git ignores.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from fedft.core.seeds import numpy_generator

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "chat"
TEST_SHARE = 0.04  # of the conversations: a score is half of the run's time
TOGETHER = 3  # exchanges
LONGEST = 8  # exchanges
SEED = 0

Exchange = tuple[str, str]


def topics() -> Iterator[tuple[str, list[list[Exchange]]]]:
    """Each topic, and its conversations as lists of exchanges."""
    spec = find_spec("chatterbot_corpus")  # found, never imported
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install chatterbot-corpus==1.3.3")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "english"
    for path in sorted(folder.glob("*.yml")):
        table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        found: list[list[Exchange]] = []
        for said in table["conversations"]:
            texts = [str(text).strip() for text in said]
            pairs = list(zip(texts[::2], texts[1::2], strict=False))[:LONGEST]
            if pairs and all(all(pair) for pair in pairs):
                found.append(pairs)
        yield path.stem.replace("_", " "), found


def conversations(found: list[list[Exchange]]) -> Iterator[list[Exchange]]:
    """Those of several exchanges, and the others by threes."""
    yield from (pairs for pairs in found if len(pairs) > 1)
    single = [pairs[0] for pairs in found if len(pairs) == 1]
    yield from (single[i : i + TOGETHER] for i in range(0, len(single), TOGETHER))


def row(topic: str, pairs: list[Exchange]) -> dict[str, Any]:
    """A line of the data."""
    messages = [{"role": "system", "content": f"Talk about {topic}."}]
    for asked, answered in pairs:
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    return {"topic": topic, "messages": messages}


def main() -> None:
    """Write both files."""
    rng = numpy_generator(SEED, "chat")
    files: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for topic, found in topics():
        rows = [row(topic, pairs) for pairs in conversations(found)]
        held = set(rng.permutation(len(rows))[: round(TEST_SHARE * len(rows))].tolist())
        for i, one in enumerate(rows):
            files["test" if i in held else "train"].append(one)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
        answers = sum(len(one["messages"]) // 2 for one in rows)
        print(f"{FOLDER / name}.jsonl: {len(rows):,} conversations, {answers:,} answers")


if __name__ == "__main__":
    main()
