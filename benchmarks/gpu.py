"""The cohort engine beside stock PEFT on a GPU: wall milliseconds a sample, and memory.

    python -m benchmarks.gpu [--full] [--only 0.1B] [--resume] [--repeats 5]

A section is ``model/length/batch``: a Llama-like language model of 0.1, 0.5 or 1.0 billion random
weights, rows of one length whose second half is the answer, LoRA r = 8 on queries and values. The
contenders are those of :mod:`benchmarks.cohort`, in float32, TF32 and bfloat16.

Needs torch, transformers and peft; neither Ray nor Flower. Peak memory is that of torch's
allocator; beside it stands what :mod:`fedft.core.memory` models for as many sites on one base.
"""

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from benchmarks import contenders
from benchmarks.contenders import Clock, Contender, Size
from benchmarks.record import add_options, measure_sections
from fedft.clients.engines.base import Engine
from fedft.core import memory
from fedft.core.errors import EnvironmentFailure
from fedft.core.memory import Geometry
from fedft.core.models import Base, load_of
from fedft.core.quiet import quiet
from fedft.core.spec import LoraSpec, Precision


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000


MODELS = {
    "0.1B": Shape(12, 768, 2048, 12, 12),
    "0.5B": Shape(24, 1280, 3456, 20, 20),
    "1.0B": Shape(16, 2048, 8192, 32, 8),
}
LORA = LoraSpec(target_modules=("q_proj", "v_proj"))
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
COHORTS = (1, 8, 16, 32, 64)
SIZE = {"tokens": 65_536, "widest": 32_768}
FULL = [f"{model}/{length}/{batch}" for model in MODELS for length in (64, 256) for batch in (8, 1)]
QUICK = [key for key in FULL if "/64/" in key]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    quiet()
    try:
        device = cuda()
    except EnvironmentFailure as error:
        raise SystemExit(str(error)) from None
    measure_sections(
        "gpu", arguments, QUICK, FULL, lambda key: section(key, arguments.repeats, device)
    )


def cuda() -> torch.device:
    """The GPU.

    Raises:
        EnvironmentFailure: there is none.
    """
    if not torch.cuda.is_available():
        raise EnvironmentFailure(
            f"this benchmark needs a GPU, and torch {torch.__version__} finds none",
            fix="Run it where 'python -c \"import torch; print(torch.cuda.is_available())\"' says "
            "True; on a CPU there is 'make bench'.",
        )
    return torch.device("cuda")


def section(
    key: str,
    repeats: int,
    device: torch.device,
    models: Mapping[str, Shape] = MODELS,
    cohorts: Sequence[int] = COHORTS,
) -> dict[str, Any]:
    """Speed of all contenders, and the memory that each takes."""
    model, length, batch = key.split("/")
    shape, clock = models[model], clock_of(device)
    engines, rates = _engines(shape, device)
    examples = contenders.random_rows(shape.vocabulary, int(length), 2048, 0)
    line = contenders.line_up(engines, examples, Size(int(batch), cohorts, **SIZE))
    rows = contenders.table(contenders.measure(line, repeats, clock), rates)
    for row, contender in zip(rows, line, strict=True):
        row["memory_mib"] = {
            "peak": _peak_mib(contender, device),
            "modelled": round(_modelled(shape, contender, int(length), int(batch)) / 2**20),
        }
    contenders.show(rows)
    return {"device": _name(device), "gemm_gflops": rates, "rows": rows}


def clock_of(device: torch.device) -> Clock:
    """Seconds of the wall, once the device has done what it was given."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@lru_cache(maxsize=1)
def _engines(
    shape: Shape, device: torch.device
) -> tuple[dict[tuple[str, Precision], Engine], dict[str, dict[str, float]]]:
    gc.collect()  # the model before this one is in reference cycles, and holds device memory
    bases: dict[Precision, Base] = {p: random_base(shape, p, device) for p in PRECISIONS}
    rates = {str(p): contenders.gemm_gflops(bases[p], p, clock_of(device)) for p in PRECISIONS}
    return contenders.engines(bases), rates


def random_base(shape: Shape, precision: Precision, device: torch.device) -> Base:
    """A frozen language model with random weights, as :func:`fedft.core.models.load_base` has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.requires_grad_(False).eval()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    nn.Module.to(model, device=device, dtype=dtype)
    return Base(model, LORA, "causal-lm")


def _peak_mib(contender: Contender, device: torch.device) -> int | None:
    """Of one step, everything that the engine and this base hold; None without a GPU."""
    if device.type != "cuda":
        return None
    peak = memory.Peak(str(device))
    contender.warm_up()
    own = sum(p.nbytes for p in contender.engine.base.model.parameters())
    return round((peak.bytes() + own) / memory.MIB)


def _modelled(shape: Shape, contender: Contender, length: int, batch: int) -> float:
    """Bytes of one base and as many sites as are in one pass."""
    base = contender.engine.base
    joined = contender.kind == "one adapter"
    sites, rows = (1, contender.sites * batch) if joined else (contender.sites, batch)
    load = load_of(
        base.shapes,
        shape.blocks,
        LORA.rank,
        batch=rows,
        tokens=length,
        scored=length - length // 2,
    )
    one = memory.footprint(geometry(shape, base), load, contender.precision).of()
    return one["base"] + sites * (one["total"] - one["base"])


def geometry(shape: Shape, base: Base) -> Geometry:
    """The sizes that decide about memory."""
    outside = shape.vocabulary * shape.hidden + shape.hidden  # tied embeddings, the last norm
    return Geometry(
        blocks=shape.blocks,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        key_value=shape.hidden,  # attention sees keys and values once for each query head
        gated=True,
        block_parameters=(base.shapes.parameters - outside) // shape.blocks,
        other_parameters=outside,
        vocabulary=shape.vocabulary,
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
