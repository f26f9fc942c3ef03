"""Who trains: stock PEFT and the cohort engine on the same rows, and how fast the machine could.

Runs wherever torch, transformers and peft are installed: neither Ray nor Flower is imported.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.turns import spread, take_turns
from fedft.clients.engines.base import Engine
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.engines.stacked import frozen_linear
from fedft.core.checkpoint import HEADS
from fedft.core.data.batches import batches
from fedft.core.examples import Examples, TokenExamples
from fedft.core.models import Base, initial_adapter, linears, weight_shape
from fedft.core.seeds import torch_generator
from fedft.core.spec import LoraSpec, Precision
from fedft.core.types import IGNORED, Batch, LocalTraining, TrainPlan, block_of

MOST_STEPS = 5
"""Steps a site, where the token budget allows them."""

_PLAIN_SITES = 4
"""Sites of the plain loop, one after another: enough for its time to be steady."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Size:
    """How much a contender is given.

    Attributes:
        batch: rows a step of one site.
        cohorts: values of K.
        tokens: a contender's steps are cut so that it trains on about this many, but does one.
        widest: tokens that one pass may hold; a larger K is lowered to it.
    """

    batch: int
    cohorts: Sequence[int]
    tokens: int
    widest: int

    def fitting(self, length: float) -> list[int]:
        """The values of K whose passes are not too wide, for rows of this mean length."""
        most = max(1, int(self.widest / (self.batch * length)))
        return sorted({min(K, most) for K in self.cohorts})

    def steps(self, sites: int, batch: int, length: float) -> int:
        return int(np.clip(self.tokens / (sites * batch * length), 1, MOST_STEPS))


class Contender:
    """A fixed job, and who does it.

    Attributes:
        name: such as ``cohort 8``.
        kind: ``peft``, ``cohort`` or ``one adapter``.
        sites: K; of ``one adapter`` how many sites' rows it has in one batch.
        samples: rows trained on, each as often as it is.
        tokens: real ones among them.
        flop: nominal: 4 a frozen weight and real token (forward pass, and the gradient of the
            input), also for what an engine leaves out, and none for padding.
    """

    def __init__(
        self, kind: str, sites: int, engine: Engine, precision: Precision, own: list[list[Batch]]
    ) -> None:
        self.kind, self.sites = kind, sites
        self.precision: Precision = precision
        self.name = kind if kind == "peft" else f"{kind} {sites}"
        self.engine, self.own = engine, own
        base = engine.base
        adapter = initial_adapter(base.shapes, LoraSpec(), LoraSpec().rank, 0)
        training = LocalTraining()
        self.plans = [
            TrainPlan(start=adapter, training=training, site=str(k)) for k in range(len(own))
        ]
        each = [batch for mine in own for batch in mine]
        self.samples = sum(map(len, each))
        self.tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in each)
        answers = sum(int((batch.labels != IGNORED).sum()) for batch in each)
        blocks, output = weights(base.model)
        self.flop = 4 * (blocks * self.tokens + output * answers)

    def run(self, clock: Clock) -> float:
        """Milliseconds a sample."""
        if self.precision != "bf16":
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        start = clock()
        self.engine.train(self.plans, self.own)
        return (clock() - start) / self.samples * 1e3

    def warm_up(self) -> None:
        """The first step, so that nothing is set up while the clock runs."""
        self.engine.train(self.plans, [mine[:1] for mine in self.own])


def engines(bases: Mapping[Precision, Base]) -> dict[tuple[str, Precision], Engine]:
    """Both engines on every base; PEFT puts its layers into a copy."""
    made: dict[tuple[str, Precision], Engine] = {}
    for precision, base in bases.items():
        made["peft", precision] = PeftEngine(copy.deepcopy(base), LoraSpec())
        made["cohort", precision] = CohortEngine(base, LoraSpec())
    return made


def line_up(
    made: Mapping[tuple[str, Precision], Engine], examples: Examples, size: Size
) -> list[Contender]:
    """The plain loop, the cohorts, and one adapter on as many rows a step as a cohort has."""
    length = float(examples.lengths.mean())

    def work(sites: int, batch: int) -> list[list[Batch]]:
        steps = size.steps(sites, batch, length)
        return [site_batches(examples, k, batch, steps) for k in range(sites)]

    line: list[Contender] = []
    precisions: Iterable[Precision] = dict.fromkeys(p for _, p in made)
    for precision in precisions:
        plain, ours = made["peft", precision], made["cohort", precision]
        several = size.fitting(length)
        line.append(Contender("peft", 1, plain, precision, work(_PLAIN_SITES, size.batch)))
        line += [Contender("cohort", K, ours, precision, work(K, size.batch)) for K in several]
        line += [
            Contender("one adapter", K, plain, precision, work(1, K * size.batch))
            for K in several
            if K > 1
        ]
    return line


def site_batches(examples: Examples, site: int, batch: int, steps: int) -> list[Batch]:
    """Batches of one site, drawn and bucketed by length as in a run."""
    generator = torch_generator(0, "benchmark", site, batch)
    held = min(len(examples), max(60, steps * batch))
    rows = torch.randperm(len(examples), generator=generator)[:held].numpy()
    return list(batches(examples, rows, batch, steps=steps, generator=generator))


def random_rows(vocabulary: int, length: int, count: int, classes: int) -> TokenExamples:
    """Rows of one length. With no classes, of a language model: the second half is the answer."""
    drawn = np.random.default_rng(0)
    ids = drawn.integers(5, vocabulary, count * length).astype(np.int32)
    offsets = np.arange(0, count * length + 1, length, dtype=np.int64)
    if classes:
        return TokenExamples(ids, offsets, 0, labels=drawn.integers(0, classes, count))
    return TokenExamples(ids, offsets, 0, answers=np.full(count, length // 2, np.int32))


# --------------------------------------------------------------------------- what could be


def weights(model: nn.Module) -> tuple[int, int]:
    """Frozen numbers in the linear layers of the blocks, and of a language model's output layer."""
    blocks = output = 0
    for path, linear in linears(model):
        d_out, d_in = weight_shape(linear)
        if ".lora_" in path:  # PEFT has put its layers in
            continue
        if block_of(path) is not None:
            blocks += d_out * d_in
        elif path.split(".")[0] not in HEADS and "pooler" not in path:
            output += d_out * d_in
    return blocks, output


def gemm_gflops(base: Base, precision: Precision, clock: Clock) -> dict[str, float]:
    """What the machine multiplies at, GFLOP/s, the best of several tries.

    ``peak``: the fastest of some large square products, the physical limit. ``model``: the linear
    layers of the model's first block on 1,024 tokens, in the kernel that the engine uses.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=base.device).to(dtype)

    squares = (1024, 2048) if base.device.type == "cpu" else (4096, 8192)
    shapes = [weight_shape(m) for path, m in linears(base.model) if block_of(path) == 0]
    layers = [(random(1024, d_in), random(d_out, d_in)) for d_out, d_in in shapes]
    peak = max(_rate(2 * n**3, _products([(random(n, n), random(n, n))]), clock) for n in squares)
    work = sum(2 * 1024 * d_out * d_in for d_out, d_in in shapes)
    own = _rate(work, _products(layers), clock)
    return {"peak": round(peak, 1), "model": round(own, 1)}


def _products(layers: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
    return lambda: [frozen_linear(x, weight, None) for x, weight in layers]


def _rate(flop: float, call: Callable[[], Any], clock: Clock, tries: int = 10) -> float:
    best = float("inf")
    for _ in range(tries):
        start = clock()
        call()
        best = min(best, clock() - start)
    return flop / best / 1e9


# ------------------------------------------------------------------------------- a section

Measured = tuple[Contender, list[float]]


def measure(line: Sequence[Contender], repeats: int, clock: Clock) -> list[Measured]:
    """All contenders by turns; one row each."""
    for contender in line:
        contender.warm_up()
    jobs = {f"{c.name}, {c.precision}": lambda c=c: c.run(clock) for c in line}
    return list(zip(line, take_turns(jobs, repeats).values(), strict=True))


def table(
    measured: Sequence[Measured],
    rates: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Figures and ratios; ``over`` says how many times as fast as what."""
    ms = {(c.kind, c.sites, c.precision): spread(own)["median"] for c, own in measured}
    first = measured[0][0].precision
    rows: list[dict[str, Any]] = []
    for c, own in measured:
        mine = ms[c.kind, c.sites, c.precision]
        gflops = c.flop / c.samples / mine / 1e6
        twin = ms.get(("one adapter", c.sites, c.precision)) if c.kind == "cohort" else None
        over = {
            f"peft {first}": ms["peft", 1, first] / mine,
            "peft": ms["peft", 1, c.precision] / mine,
            **({"one adapter": twin / mine} if twin else {}),
        }
        rates_here = rates[c.precision].items()
        rows.append(
            {
                "contender": c.name,
                "precision": c.precision,
                "samples": c.samples,
                "tokens_a_sample": round(c.tokens / c.samples, 1),
                "ms_a_sample": spread(own),
                "over": {name: round(ratio, 3) for name, ratio in over.items()},
                "share_of_gemm": {name: round(gflops / rate, 3) for name, rate in rates_here},
            }
        )
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of a section."""
    for row in rows:
        ratios = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in row["over"].items())
        print(
            f"  {row['precision']}  {row['contender']:15}{row['ms_a_sample']['median']:9.3f} ms  "
            f"{ratios}  {row['share_of_gemm']['peak']:.0%} of peak",
            flush=True,
        )
