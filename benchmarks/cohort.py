"""The cohort engine beside stock PEFT: CPU milliseconds a sample, on real text.

    python -m benchmarks.cohort [--repeats 5] [--cohorts 1 8 16] [--batches 8 1]

MiniLM with LoRA r = 8 on query and value, WordNet definitions of uneven length (batches drawn and
bucketed as in a run), five steps a site. One thread, and CPU time, so that other work on the
machine disturbs little; all contenders take turns within each repeat, and medians are compared.

* ``peft``: the plain loop of :mod:`clients.train`, one site after another. In bf16 with eager
  attention, which is how PEFT is fast there.
* ``cohort K``: K sites in one pass.
* ``one adapter K b``: PEFT trains a single adapter on batches of K·b rows: what a large batch costs
  where nobody has an adapter of their own.
* ``gemm``: measured rate of the kernel that the engine uses at the model's own shapes, and the
  share of it over a whole step. Nominal: it counts 4 FLOP a weight and real token, also for what
  the engine leaves out (most of the last block), and none for padding.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.record import save
from clients.cohort import CohortEngine
from clients.engine import Engine
from clients.stacked import frozen_linear
from clients.train import PeftEngine
from fedft.core.batches import batches
from fedft.core.data import prepare
from fedft.core.examples import Examples
from fedft.core.models import (
    Base,
    Precision,
    initial_adapter,
    load_base,
    load_tokenizer,
    resolve,
)
from fedft.core.quiet import quiet
from fedft.core.seeds import torch_generator
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from fedft.core.types import Batch, LocalTraining, TrainPlan

MODEL, LORA = ModelSpec(), LoraSpec()
STEPS, ROWS = 5, 60
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    data = prepare(DataSpec(), "classification", load_tokenizer(resolve(MODEL)))
    classes = len(data.classes)
    bases: dict[Precision, Base] = {
        p: load_base(MODEL, LORA, classes, precision=p) for p in PRECISIONS
    }
    peft: dict[Precision, PeftEngine] = {
        p: PeftEngine(copy.deepcopy(base), LORA) for p, base in bases.items()
    }
    ours: dict[Precision, CohortEngine] = {p: CohortEngine(base, LORA) for p, base in bases.items()}
    rates: dict[Precision, float] = {p: gemm_rate(p) for p in PRECISIONS}
    rows: list[dict[str, Any]] = []
    for batch_size in arguments.batches:
        contenders = line_up(peft, ours, data.train, batch_size, arguments.cohorts)
        samples = take_turns(contenders, arguments.repeats)
        rows += table(batch_size, contenders, samples, rates)
        show(rows[-len(contenders) :])
    path = save("cohort", {"gemm_gflops": rates, "rows": rows})
    print(f"→ {path}")


class Contender:
    """A job of a given number of samples and real tokens, and who does it."""

    def __init__(
        self, name: str, precision: Precision, engine: Engine, own: Sequence[Sequence[Batch]]
    ) -> None:
        self.name, self.engine, self.own = name, engine, own
        self.precision: Precision = precision
        adapter = initial_adapter(engine.base.shapes, LORA, LORA.rank, 0)
        training = LocalTraining()
        self.plans = [
            TrainPlan(start=adapter, training=training, site=str(k)) for k in range(len(own))
        ]
        each = [batch for mine in own for batch in mine]
        self.samples = sum(map(len, each))
        self.tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in each)

    def run(self) -> float:
        """CPU milliseconds a sample."""
        start = time.process_time()
        self.engine.train(self.plans, self.own)
        return (time.process_time() - start) / self.samples * 1e3


def line_up(
    peft: dict[Precision, PeftEngine],
    ours: dict[Precision, CohortEngine],
    examples: Examples,
    batch_size: int,
    cohorts: Sequence[int],
) -> list[Contender]:
    def work(sites: int, size: int) -> list[list[Batch]]:
        return [site_batches(examples, k, size) for k in range(sites)]

    contenders: list[Contender] = []
    for p in PRECISIONS:
        contenders.append(Contender("peft", p, peft[p], work(4, batch_size)))
        contenders += [Contender(f"cohort {K}", p, ours[p], work(K, batch_size)) for K in cohorts]
        contenders += [
            Contender(f"one adapter {K}·{batch_size}", p, peft[p], work(1, K * batch_size))
            for K in cohorts
            if K > 1
        ]
    return contenders


def site_batches(examples: Examples, site: int, batch_size: int) -> list[Batch]:
    """``STEPS`` batches of one site, as a run draws them."""
    generator = torch_generator(0, "benchmark", site, batch_size)
    held = max(ROWS, STEPS * batch_size)
    rows = torch.randperm(len(examples), generator=generator)[:held].numpy()
    return list(batches(examples, rows, batch_size, steps=STEPS, generator=generator))


def take_turns(contenders: Sequence[Contender], repeats: int) -> list[list[float]]:
    for contender in contenders:
        contender.run()
    measured: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for own, contender in zip(measured, contenders, strict=True):
            own.append(contender.run())
    return measured


def gemm_rate(precision: Precision) -> float:
    """GFLOP/s of the best exact kernel over a block's linear layers, 1,024 tokens."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    layers = [
        (torch.randn(1024, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype))
        for d_out, d_in in shapes
    ]
    seconds = best_of(20, lambda: [frozen_linear(x, weight, None) for x, weight in layers])
    return sum(2 * 1024 * d_out * d_in for d_out, d_in in shapes) / seconds / 1e9


def best_of(repeats: int, call: Callable[[], Any]) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def table(
    batch_size: int,
    contenders: Sequence[Contender],
    samples: Sequence[Sequence[float]],
    rates: dict[Precision, float],
) -> list[dict[str, Any]]:
    medians = {
        (c.name, c.precision): statistics.median(own)
        for c, own in zip(contenders, samples, strict=True)
    }
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    rows: list[dict[str, Any]] = []
    for c, own in zip(contenders, samples, strict=True):
        mine = medians[c.name, c.precision]
        gflop = 4 * weights * c.tokens / c.samples / 1e9
        row = {
            "batch": batch_size,
            "contender": c.name,
            "precision": c.precision,
            "tokens_a_sample": round(c.tokens / c.samples, 1),
            "cpu_ms_a_sample": round(mine, 3),
            "spread_ms": [round(min(own), 3), round(max(own), 3)],
            "over_peft_fp32": round(medians["peft", "fp32"] / mine, 2),
            "over_peft_same_precision": round(medians["peft", c.precision] / mine, 2),
            "share_of_gemm_rate": round(gflop / (mine / 1e3) / rates[c.precision], 3),
        }
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"\nbatch {rows[0]['batch']}")
    for row in rows:
        print(
            f"  {row['precision']}  {row['contender']:18}{row['cpu_ms_a_sample']:8.2f} ms"
            f"{row['over_peft_fp32']:8.2f}x peft fp32{row['over_peft_same_precision']:8.2f}x peft"
            f"{row['share_of_gemm_rate']:8.0%} of GEMM"
        )


if __name__ == "__main__":
    main()
