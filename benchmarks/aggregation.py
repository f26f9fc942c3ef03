"""Seconds and peak memory of one aggregation: every rule, factored beside dense.

Seconds are those of the processor, on one thread: on an idle machine, seconds of the clock.

    python benchmarks/aggregation.py [--clients 10 100] [--rules flexlora lora-fair ...]

The setting: d_out = d_in = 4096, r = 16, float32 adapters, one thread. A model of 64 such layers with 100
clients holds 3.4 GB of updates and is folded layer by layer, so one layer is measured, in a fresh
process each, and ``seconds_64`` is 64 times that. Peak memory is what the aggregation takes on top
of the updates, of which one layer at a time is in work.

The dense twin is the rule's equation with every product formed: what one writes first. It runs in
float32, with ``torch.linalg.svd`` where the rule has an SVD. ``difference`` is the relative one of
the two results, measured on eight random vectors; a float32 SVD is itself good to 2e-6. Averaging
rules form no product and have no such twin.

Descents run 20 steps on both sides. ``lora-fair, cosine`` at its default of 1000 steps stands in a
row of its own, without the twin.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedft.core.types import Adapter, ClientUpdate, Factors, Part, ServerState
from fedft.strategies import (
    FedAdam,
    FedAvgLoRA,
    FedExLoRA,
    FedMomentum,
    FedRotLoRA,
    FedSALoRA,
    FedSB,
    FedSVD,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    LoRAFAIR,
    RaFLoRA,
    RoLoRA,
    Strategy,
)

D, RANK, LAYERS, STEPS = 4096, 16, 64, 20
RESULTS = Path(__file__).parent / "results" / "aggregation.json"

AB: frozenset[Part] = frozenset({"A", "B"})
B_ONLY: frozenset[Part] = frozenset({"B"})
A_ONLY: frozenset[Part] = frozenset({"A"})

Dense = Callable[[list[Factors], list[float]], Tensor]


def mean_product(parts: list[Factors], p: list[float]) -> Tensor:
    total = torch.zeros(D, D)
    for w, x in zip(p, parts, strict=True):
        total.addmm_(x.B, x.A, alpha=w * x.scale)
    return total


def mean_factors(parts: list[Factors], p: list[float]) -> tuple[Tensor, Tensor]:
    A = sum(w * x.A for w, x in zip(p, parts, strict=True))
    B = sum(w * x.B for w, x in zip(p, parts, strict=True))
    return A, B  # type: ignore[return-value]


def dense_best(parts: list[Factors], p: list[float]) -> Tensor:
    U, S, Vt = torch.linalg.svd(mean_product(parts, p), full_matrices=False)
    return (U[:, :RANK] * S[:RANK]) @ Vt[:RANK]


def dense_total(parts: list[Factors], p: list[float]) -> Tensor:
    """FedMomentum: what stays and what is merged."""
    dW = mean_product(parts, p)
    U, S, Vt = torch.linalg.svd(dW, full_matrices=False)
    kept = (U[:, :RANK] * S[:RANK]) @ Vt[:RANK]
    return kept + (dW - kept)


def dense_residual(parts: list[Factors], p: list[float]) -> Tensor:
    """FedEx-LoRA: the mean product and what is merged."""
    A, B = mean_factors(parts, p)
    E = mean_product(parts, p) - parts[0].scale * B @ A
    return E + parts[0].scale * B @ A


def dense_ridge(parts: list[Factors], p: list[float]) -> Tensor:
    A, B = mean_factors(parts, p)
    s, G = parts[0].scale, A @ A.T
    E = mean_product(parts, p) / s - B @ A
    regular = G + 0.01 * G.trace() / RANK * torch.eye(RANK)
    return s * (B + torch.linalg.solve(regular, A @ E.T).T) @ A


def dense_cosine(dim: str) -> Dense:
    def descend(parts: list[Factors], p: list[float]) -> Tensor:
        A, B = mean_factors(parts, p)
        s, dW = parts[0].scale, mean_product(parts, p)
        dB = torch.zeros_like(B, requires_grad=True)
        for _ in range(STEPS):
            product = (B + dB) @ A
            if dim == "whole":
                cosine = torch.cosine_similarity(dW.flatten(), product.flatten(), dim=0)
            else:
                cosine = torch.cosine_similarity(dW, product, dim=0).mean()
            (gradient,) = torch.autograd.grad(1 - cosine + 0.01 * dB.square().sum(), dB)
            dB = (dB - 0.01 * gradient).detach().requires_grad_()
        return (s * (B + dB) @ A).detach()

    return descend


def dense_het(parts: list[Factors], p: list[float]) -> Tensor:
    norms = [x.product().norm() for x in parts]
    w = [float(n / sum(norms)) for n in norms]
    A, B = mean_factors(parts, w)
    return parts[0].scale * B @ A


def dense_svd_of_product(parts: list[Factors], p: list[float]) -> Tensor:
    """FedSVD: A is common."""
    _, B = mean_factors(parts, p)
    U, S, Vt = torch.linalg.svd(parts[0].scale * B @ parts[0].A, full_matrices=False)
    return (U[:, :RANK] * S[:RANK]) @ Vt[:RANK]


CASES: dict[str, tuple[Strategy, frozenset[Part], Dense | None]] = {
    "fedavg-lora": (FedAvgLoRA(), AB, None),
    "ffa-lora": (FFALoRA(), B_ONLY, None),
    "rolora": (RoLoRA(), B_ONLY, None),
    "fedsa-lora": (FedSALoRA(), A_ONLY, None),
    "fedrot-lora": (FedRotLoRA(), AB, None),
    "fedadam": (FedAdam(), AB, None),
    "fed-sb, cores": (FedSB(basis="seeded"), frozenset({"R"}), None),
    "hetlora": (HetLoRA(gamma=1.0), AB, dense_het),
    "lora-fair": (LoRAFAIR(), AB, dense_ridge),
    "lora-fair, cosine": (LoRAFAIR(objective="cosine", steps=STEPS), AB, dense_cosine("whole")),
    "lora-fair, cosine, 1000 steps": (LoRAFAIR(objective="cosine"), AB, None),
    "lora-fair, cosine by column": (
        LoRAFAIR(objective="cosine", cosine_dim="column", steps=STEPS),
        AB,
        dense_cosine("column"),
    ),
    "flora": (FLoRA(), AB, mean_product),
    "flora, delta-rank 64": (FLoRA(delta_rank=64), AB, None),
    "fedex-lora": (FedExLoRA(), AB, dense_residual),
    "fedmomentum": (FedMomentum(), AB, dense_total),
    "flexlora": (FlexLoRA(), AB, dense_best),
    "raflora": (RaFLoRA(), AB, dense_best),
    "fed-sb, first round": (FedSB(), AB, dense_best),
    "fedsvd": (FedSVD(), B_ONLY, dense_svd_of_product),
}


def inputs(
    rule: Strategy, parts: frozenset[Part], clients: int
) -> tuple[ServerState, list[ClientUpdate]]:
    g = torch.Generator().manual_seed(0)
    f = Factors(torch.randn(RANK, D, generator=g) / D**0.5, torch.randn(D, RANK, generator=g), 2.0)
    state = rule.init(Adapter({"m": f}))
    updates: list[ClientUpdate] = []
    for k in range(clients):
        moved = {
            name: t + 0.3 * torch.randn(t.shape, generator=g) / D**0.5
            for name, t in state.adapter.tensors(parts).items()
        }
        updates.append(ClientUpdate(f"site-{k:03d}", 10 + k % 7, moved, state.adapter))
    return state, updates


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024


def measure(name: str, side: str, clients: int) -> dict[str, Any]:
    """One case in this process; its result goes to a file, for comparison with the other side."""
    torch.set_num_threads(1)
    rule, parts, dense = CASES[name]
    state, updates = inputs(rule, parts, clients)
    torch.linalg.svd(torch.eye(8))  # load the library before the clock starts
    before, seconds = peak_mib(), []
    answer: Tensor | ServerState | None = None
    for _ in range(20):  # the least of some: other programs only ever add
        answer = None  # its memory is not the next one's
        start = time.process_time()
        if side == "factored":
            answer = rule.aggregate(state, updates)
        else:
            assert dense is not None
            total = sum(u.examples for u in updates)
            p = [u.examples / total for u in updates]
            answer = dense([u.adapter.factors["m"] for u in updates], p)
        seconds.append(time.process_time() - start)
        if sum(seconds) > 5:
            break
    peak = peak_mib() - before
    # A fixed sketch of the result: comparing two of them needs no 4096 x 4096 file.
    probe = torch.randn(D, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if isinstance(answer, ServerState):
        f = answer.adapter.factors["m"]
        sketch = f.scale * f.B.double() @ (f.folded_A().double() @ probe)
        if "m" in answer.delta:
            delta = answer.delta["m"]
            sketch += delta.scale * delta.B.double() @ (delta.A.double() @ probe)
    else:
        assert answer is not None
        sketch = answer.double() @ probe
    return {"seconds": min(seconds), "peak_mib": peak, "sketch": sketch.flatten().tolist()}


def in_a_fresh_process(name: str, side: str, clients: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, side, str(clients)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(name: str, clients: int) -> dict[str, Any]:
    """Both sides of one rule."""
    ours = in_a_fresh_process(name, "factored", clients)
    row: dict[str, Any] = {
        "rule": name,
        "clients": clients,
        "seconds": ours["seconds"],
        "seconds_64": LAYERS * ours["seconds"],
        "peak_mib": ours["peak_mib"],
    }
    if CASES[name][2] is not None:
        theirs = in_a_fresh_process(name, "dense", clients)
        x = torch.tensor(ours["sketch"], dtype=torch.float64)
        y = torch.tensor(theirs["sketch"], dtype=torch.float64)
        row |= {
            "dense_seconds": theirs["seconds"],
            "dense_peak_mib": theirs["peak_mib"],
            "faster": theirs["seconds"] / ours["seconds"],
            "difference": float((x - y).norm() / y.norm()),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rules", nargs="+", default=list(CASES))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, side, clients = arguments.one
        print(json.dumps(measure(name, side, int(clients))))
        return
    rows: list[dict[str, Any]] = []
    for clients in arguments.clients:
        for name in arguments.rules:
            rows.append(compare(name, clients))
            print(
                " ".join(
                    f"{k}={v:.4g}" if isinstance(v, float) else f"{v}" for k, v in rows[-1].items()
                ),
                flush=True,
            )
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """Add rows to the results, in place of older ones of the same case."""
    old = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    cases = {(row["rule"], row["clients"]): row for row in [*old, *rows]}
    result = {
        "setting": {"d": D, "rank": RANK, "layers": LAYERS, "threads": 1, "steps": STEPS},
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": list(cases.values()),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
