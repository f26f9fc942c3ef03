"""Every example of a task, as its README says: prepare, simulate, and better than what needs no model."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedft.api import Run
from fedft.core.data.source import load
from fedft.core.tasks import RawRows, task_of
from fedft.server.config_file import load_config

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tasks"
Baseline = Callable[[RawRows, RawRows], float]
"""(training rows, test rows) → the score of whoever looks at no text, or at single words."""


def by_share(train: RawRows, test: RawRows) -> float:
    """Perplexity of a target whose tokens, and whose end, are drawn by how often training has them."""
    end = "</s>"
    seen = Counter(t for text in train.values["target"] for t in [*text.split(), end])
    total = sum(seen.values()) + len(seen)
    wanted = [t for text in test.values["target"] for t in [*text.split(), end]]
    return float(np.exp(np.mean([-np.log((seen[t] + 1) / total) for t in wanted])))


def at_random(_: RawRows, test: RawRows) -> float:
    """The mean of 1 / rank where every rank is as likely."""
    return float(np.mean(1 / np.arange(1, len(test) + 1)))


def either(_: RawRows, __: RawRows) -> float:
    """Accuracy of guessing which of two answers was chosen."""
    return 0.5


def always(_: RawRows, test: RawRows) -> float:
    """Micro F1 of every label for every row."""
    assert test.labels is not None
    share = sum(map(len, test.labels)) / (len(test) * len(test.classes))
    return 2 * share / (1 + share)


def median(train: RawRows, test: RawRows) -> float:
    """Mean distance from the median of the training targets, of which none is smaller."""
    learnt, wanted = (np.array(part.values["target"], float) for part in (train, test))
    return float(np.abs(wanted - np.median(learnt)).mean())


def by_word(train: RawRows, test: RawRows) -> float:
    """Entity F1 of each word's most frequent tag, and O for unknown words."""
    from seqeval.metrics import f1_score

    def tags(rows: RawRows) -> list[list[str]]:
        assert rows.labels is not None
        return [[rows.classes[i] for i in own] for own in rows.labels]

    seen: dict[str, Counter[str]] = {}
    for words, own in zip(train.values["tokens"], tags(train), strict=True):
        for word, tag in zip(words, own, strict=True):
            seen.setdefault(word, Counter())[tag] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    guessed = [[usual.get(word, "O") for word in words] for words in test.values["tokens"]]
    return float(f1_score(tags(test), guessed))


EXAMPLES: dict[str, tuple[str, Baseline]] = {
    "seq2seq": ("perplexity", by_share),
    "sentence-embeddings": ("mrr", at_random),
    "multi-label": ("label-micro-f1", always),
    "regression": ("mae", median),
    "token-classification": ("entity-f1", by_word),
    "preference": ("accuracy", either),
}
"""Name of an example → the metric that it is judged by, and the score without a model."""


def test_every_example_is_a_configuration_of_its_task() -> None:
    for name, (metric, _) in EXAMPLES.items():
        config = load_config(FOLDER / name / "config.toml")
        assert config.model.task == name
        assert task_of(name).metrics[0].name == metric


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_beats_what_needs_no_model(name: str, tmp_path: Path) -> None:
    examples = tmp_path / "examples" / "tasks" / name
    examples.mkdir(parents=True)
    for file in ("prepare.py", "config.toml"):
        (examples / file).write_bytes((FOLDER / name / file).read_bytes())
    _run([sys.executable, str(examples / "prepare.py")], tmp_path)
    command = ["simulate", str(examples / "config.toml"), "--run-dir", str(tmp_path / "run")]
    _run([sys.executable, "-m", "fedft", *command], tmp_path)
    metric, baseline = EXAMPLES[name]
    folder = tmp_path / "run"
    score = Run(folder).metrics["best"][metric]
    trivial = _trivial(examples / "config.toml", name, baseline, tmp_path)
    print(json.dumps({"example": name, "score": score, "trivial": trivial}))
    declared = Run(folder).declared[0]
    assert declared.name == metric
    assert declared.better({metric: score}, {metric: trivial})


def _trivial(config: Path, name: str, baseline: Baseline, folder: Path) -> float:
    before = Path.cwd()
    os.chdir(folder)
    try:
        data = load(load_config(config).data, name)
    finally:
        os.chdir(before)
    return baseline(data.train, data.test)


def _run(command: Sequence[str], folder: Path) -> None:
    done: Any = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
