"""Questions, answers, and answers to other questions: chatterbot-corpus as one file of rows.

pip install --no-deps chatterbot-corpus==1.3.3
python prepare.py
"""

import json
import random
from pathlib import Path

from fedft.core.data.raw import BadRows
from fedft.core.data.readers import read

TARGET = Path("downloads/trainer/pairs.jsonl")


def main() -> None:
    """Write the file. The rejected answer is drawn: it answers another question of the same topic."""
    table = read("wheel:chatterbot-corpus", None, "train", BadRows(True))
    questions, answers, topics = (table.columns[n] for n in ("prompt", "answer", "topic"))
    draw = random.Random(0)
    by_topic: dict[object, list[object]] = {}
    for topic, answer in zip(topics, answers, strict=True):
        by_topic.setdefault(topic, []).append(answer)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with TARGET.open("w", encoding="utf-8") as file:
        for question, answer, topic in zip(questions, answers, topics, strict=True):
            others = [other for other in by_topic[topic] if other != answer]
            if others:
                row = {"question": question, "answer": answer, "rejected": draw.choice(others)}
                file.write(json.dumps({**row, "topic": topic}) + "\n")
    print(TARGET)


if __name__ == "__main__":
    main()
