"""The meters against their dense twins, the identities of the rules, and their resolution."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedft.core import algebra, meters
from fedft.core.folding import fold
from fedft.core.meters import gaps
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    Part,
    ServerState,
    TrainPlan,
    factor_name,
)
from fedft.strategies.base import weights
from fedft.strategies.fedavg_lora import FedAvgLoRA
from fedft.strategies.ffa_lora import FFALoRA

SHAPES = {"layer.0.query": (24, 20), "layer.0.value": (16, 28)}
AB: frozenset[Part] = frozenset({"A", "B"})


def adapter(seed: int, rank: int = 3, *, scale: float = 2.0, shapes=SHAPES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            m: Factors(
                torch.randn(rank, d_in, generator=g, dtype=dtype),
                torch.randn(d_out, rank, generator=g, dtype=dtype),
                scale,
            )
            for m, (d_out, d_in) in shapes.items()
        }
    )


def update(
    site: str, start: Adapter, end: Adapter, examples: int = 10, parts=AB, **metrics: float
) -> ClientUpdate:
    return ClientUpdate(site, examples, end.tensors(parts), start, metrics)


def near(start: Adapter, seed: int, size: float = 0.1) -> Adapter:
    noise = adapter(seed, start.rank)
    return start.replaced({k: t + size * noise.tensors()[k] for k, t in start.tensors().items()})


def cohort(start: Adapter, k: int = 4, parts=AB, size: float = 0.1) -> list[ClientUpdate]:
    return [
        update(f"s{i}", start, near(start, 100 + i, size), examples=5 + 3 * i, parts=parts)
        for i in range(k)
    ]


many = pytest.mark.parametrize("sites", [3, 60], ids=["factored", "dense"])
"""Fewer sites than make a mean update of rank 3 larger than the matrix, and many more."""


def dense_mean(updates: Sequence[ClientUpdate], module: str) -> Tensor:
    p = weights(updates)
    terms = [u.adapter.factors[module] for u in updates]
    return sum(
        w * f.scale * f.B.double() @ f.folded_A().double() for w, f in zip(p, terms, strict=True)
    )  # type: ignore[return-value]


def dense(factors: Factors) -> Tensor:
    return factors.scale * factors.B.double() @ factors.folded_A().double()


def dense_bias(updates: Sequence[ClientUpdate], applied: dict[str, Tensor]) -> dict[str, float]:
    """The naive twin: every product formed, subtracted and summed."""
    ideal = {m: dense_mean(updates, m) for m in applied}
    error = sum(float((ideal[m] - applied[m]).square().sum()) for m in applied)
    x = sum(float(t.square().sum()) for t in ideal.values())
    y = sum(float(t.square().sum()) for t in applied.values())
    xy = sum(float((ideal[m] * applied[m]).sum()) for m in applied)
    return {
        "relative": (error / x) ** 0.5,
        "cosine": xy / (x * y) ** 0.5,
        "norm_ratio": (y / x) ** 0.5,
    }


@many
def test_bias_of_averaged_factors_equals_the_dense_twin(sites: int) -> None:
    start = adapter(0)
    updates = cohort(start, sites)
    after = FedAvgLoRA().aggregate(ServerState(start), updates)
    measured = meters.measure(ServerState(start), fold(updates), after)["bias"]
    expected = dense_bias(updates, {m: dense(f) for m, f in after.adapter.factors.items()})
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=1e-9)
    for module in SHAPES:
        one = dense_bias(updates, {module: dense(after.adapter.factors[module])})
        one["forgotten"] = 0.0
        assert measured["layers"][module] == pytest.approx(one, rel=1e-9)
    assert measured["relative"] > 1e-3


@many
def test_a_layer_is_read_alike_in_blocks_of_any_size(
    sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = adapter(0)
    updates = cohort(start, sites)
    folded, after = fold(updates), FedAvgLoRA().aggregate(ServerState(start), updates)
    whole = meters.measure(ServerState(start), folded, after)["bias"]
    monkeypatch.setattr(gaps, "_BLOCK", 5)  # leaves a narrower block at the end of most
    parted = meters.measure(ServerState(start), folded, after)["bias"]
    for module in SHAPES:
        assert parted["layers"][module] == pytest.approx(whole["layers"][module], rel=1e-12)


def test_bias_by_hand() -> None:
    """Two sites, one number a factor: B A = 1*1 and 3*3; mean 5, product of the means 2*2 = 4."""
    shapes = {"w": (1, 1)}
    start = adapter(0, 1, scale=1.0, shapes=shapes)

    def at(value: float) -> Adapter:
        return start.replaced({k: torch.full((1, 1), value) for k in start.tensors()})

    updates = [update("a", start, at(1.0)), update("b", start, at(3.0))]
    result = meters.measure(ServerState(start), fold(updates), ServerState(at(2.0)))
    assert result["bias"]["relative"] == pytest.approx(1 / 5)
    assert result["bias"]["norm_ratio"] == pytest.approx(4 / 5)
    assert result["bias"]["cosine"] == pytest.approx(1.0)
    # theta = (2, 2) is the mean of (1, 1) and (3, 3): nothing is displaced, and each is 1 + 1 off.
    assert result["lag"]["displacement"] == 0.0
    assert result["drift"]["between"] == pytest.approx(2.0)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    applied_rank=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_any_shapes_and_mixed_ranks_equal_the_dense_twin(
    ranks: list[int], d_out: int, d_in: int, applied_rank: int, seed: int
) -> None:
    shapes = {"w": (d_out, d_in)}
    updates = []
    for k, rank in enumerate(ranks):
        start = adapter(seed + k, rank, scale=16 / rank, shapes=shapes)
        end = adapter(seed + 50 + k, rank, scale=16 / rank, shapes=shapes)
        updates.append(update(f"s{k}", start, end, examples=k + 1))
    applied = adapter(seed + 99, applied_rank, shapes=shapes).factors["w"]
    measured = gaps.bias(fold(updates), {"w": [applied]})
    expected = dense_bias(updates, {"w": dense(applied)})
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=1e-9, abs=1e-12)


def exact_states(start: Adapter, updates: Sequence[ClientUpdate]) -> dict[str, ServerState]:
    """What exact rules make of a round, in float32: stacked (FLoRA), mean + residual (FedEx)."""
    p = weights(updates)
    sums = {m: algebra.stack([u.adapter.factors[m] for u in updates], p) for m in start.factors}
    fresh = adapter(9, start.rank)
    empty = fresh.replaced(
        {factor_name(m, "B"): torch.zeros_like(f.B) for m, f in fresh.factors.items()}
    )
    mean = FedAvgLoRA().aggregate(ServerState(start), updates).adapter
    residual = {
        m: algebra.stack([sums[m], algebra.negated(mean.factors[m])]) for m in start.factors
    }
    return {
        "flora": ServerState(empty, 1, sums),
        "fedex": ServerState(mean, 1, residual),
        "compressed": ServerState(
            empty, 1, {m: algebra.compress(s, s.rank) for m, s in sums.items()}
        ),
    }


@pytest.mark.parametrize("rule", ["flora", "fedex", "compressed"])
@pytest.mark.parametrize("history", [0, 40], ids=["first-round", "after-many-rounds"])
@many
def test_exact_rules_read_zero_in_float32(rule: str, history: int, sites: int) -> None:
    start = adapter(0)
    updates = cohort(start, sites)
    after = exact_states(start, updates)[rule]
    before = ServerState(start)
    if history:
        # A base delta ten times the round's own update must neither hide nor fake an error.
        old = {m: Factors(f.A, 10 * f.B, 1.0) for m, f in adapter(5, history).factors.items()}
        before = replace(before, delta=old)
        grown = {m: algebra.stack([old[m], d]) for m, d in after.delta.items()}
        after = replace(after, delta=grown)
    measured = meters.measure(before, fold(updates), after)["bias"]
    assert measured["relative"] is not None
    assert measured["relative"] <= 1e-6
    assert measured["cosine"] == pytest.approx(1.0, abs=1e-12)
    # Positive control: without what was merged into the base, the same meter sees the error.
    unmerged = meters.measure(before, fold(updates), replace(after, delta=before.delta))["bias"]
    assert unmerged["relative"] is not None
    assert unmerged["relative"] > 1e-3


def test_a_rewritten_delta_is_subtracted_from_the_old_one() -> None:
    start = adapter(0)
    updates = cohort(start)
    exact = exact_states(start, updates)["flora"]
    old = adapter(5, 6).factors
    merged = {m: algebra.compress(algebra.stack([old[m], exact.delta[m]]), 30) for m in old}
    after = replace(exact, delta=merged)
    measured = meters.measure(ServerState(start, delta=old), fold(updates), after)["bias"]
    assert measured["relative"] is not None
    assert measured["relative"] <= 1e-6


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
@many
def test_a_known_tiny_bias_is_read_right(size: float, sites: int) -> None:
    start = adapter(0)
    updates = cohort(start, sites)
    p = weights(updates)
    applied = {}
    for seed, m in enumerate(SHAPES):
        exact = algebra.stack([u.adapter.factors[m] for u in updates], p)
        off = adapter(70 + seed, 2, dtype=torch.float64).factors[m]
        off = replace(off, scale=off.scale * size * algebra.norm(exact) / algebra.norm(off))
        applied[m] = [exact, off]
    # The float32 stack is itself off by about 1e-7, which sets the tolerance of the smallest.
    measured = gaps.bias(fold(updates), applied)
    assert measured["relative"] == pytest.approx(size, rel=1e-2 if size < 1e-5 else 1e-3)
    for layer in measured["layers"].values():
        assert layer["relative"] == pytest.approx(size, rel=1e-2 if size < 1e-5 else 1e-3)


@pytest.mark.parametrize("k", [6, 40], ids=["factored", "dense"])
def test_float64_factors_are_resolved_far_below_the_naive_formula(k: int) -> None:
    """a - 2b + c stops near 1e-8; the meter reads 1e-11."""
    d, r = 64, 4
    shapes = {"w": (d, d)}
    start = adapter(0, r, shapes=shapes, dtype=torch.float64)
    ends = [adapter(10 + i, r, shapes=shapes, dtype=torch.float64) for i in range(k)]
    updates = [update(f"s{i}", start, end) for i, end in enumerate(ends)]
    p = weights(updates)
    exact = algebra.stack([u.adapter.factors["w"] for u in updates], p)
    off = adapter(70, 1, shapes=shapes, dtype=torch.float64).factors["w"]
    off = replace(off, scale=off.scale * 1e-11 * algebra.norm(exact) / algebra.norm(off))
    assert gaps.bias(fold(updates), {"w": [exact, off]})["relative"] == pytest.approx(
        1e-11, rel=0.01
    )


def test_common_factors_are_exact_and_cheap() -> None:
    """FFA-LoRA at 100 sites: A4 of methods.md, without stacking 100 ranks."""
    shapes = {"w": (512, 512)}
    start = adapter(0, 8, shapes=shapes)
    updates = []
    for i in range(100):
        end = start.replaced({factor_name("w", "B"): adapter(i, 8, shapes=shapes).factors["w"].B})
        updates.append(update(f"s{i:03}", start, end, parts=frozenset({"B"})))
    after = FFALoRA().aggregate(ServerState(start), updates)
    folded = fold(updates)
    ((_, mean),) = folded.mean_updates()
    assert isinstance(mean, Factors)
    assert mean.rank == 8
    measured = meters.measure(ServerState(start), folded, after)
    assert measured["bias"]["relative"] <= 1e-6
    assert measured["bias"]["norm_ratio"] == pytest.approx(1.0, abs=1e-6)


def test_a_core_is_part_of_the_product() -> None:
    base = adapter(0)

    def with_core(seed: int) -> Adapter:
        g = torch.Generator().manual_seed(seed)
        return Adapter(
            {m: replace(f, R=torch.randn(3, 3, generator=g)) for m, f in base.factors.items()}
        )

    start, ends = with_core(1), [with_core(2), with_core(3)]
    updates = [update(f"s{i}", start, e, parts=frozenset({"R"})) for i, e in enumerate(ends)]
    mean = start.replaced(
        {
            factor_name(m, "R"): (ends[0].factors[m].R + ends[1].factors[m].R) / 2  # type: ignore[operator]
            for m in SHAPES
        }
    )
    assert (
        meters.measure(ServerState(start), fold(updates), ServerState(mean))["bias"]["relative"]
        <= 1e-6
    )
    unchanged = meters.measure(ServerState(start), fold(updates), ServerState(start))
    assert unchanged["bias"]["relative"] > 0.5


# ── mixed ranks ───────────────────────────────────────────────────────────────────────────────


def leading(start: Adapter, rank: int) -> Adapter:
    """What a site of a lower rank starts from: the first rows and columns, the scale folded into B."""
    ratio = start.rank / rank
    cut = {m: algebra.truncate(f, rank) for m, f in start.factors.items()}
    return Adapter({m: replace(f, B=f.B / ratio, scale=f.scale * ratio) for m, f in cut.items()})


def dense_forgotten(
    before: Adapter, updates: Sequence[ClientUpdate], applied: dict[str, Tensor]
) -> dict[str, float]:
    """The definition, site by site: what the server had, plus what each changed in what it was sent."""
    ideal, unsent = dict[str, Tensor](), dict[str, Tensor]()
    for m in applied:
        whole = dense(before.factors[m])
        holders = [u for u in updates if any(f".{m}." in f".{name}" for name in u.tensors)]
        p = weights(holders)
        starts = [dense(u.start.factors[m]) for u in holders]
        ends = [dense(u.adapter.factors[m]) for u in holders]
        unsent[m] = sum((w * (whole - x) for w, x in zip(p, starts, strict=True)), 0 * whole)
        ideal[m] = whole + sum(w * (y - x) for w, x, y in zip(p, starts, ends, strict=True))
    error = {m: ideal[m] - applied[m] for m in applied}
    x, e, u = (sum(float(t.square().sum()) for t in d.values()) for d in (ideal, error, unsent))
    along = sum(float((error[m] * unsent[m]).sum()) for m in applied)
    return {"relative": (e / x) ** 0.5, "forgotten": along / (u * x) ** 0.5}


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=40),
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    own=st.booleans(),
    narrow=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_mixed_ranks_are_read_as_they_are_defined(
    ranks: list[int], shape: tuple[int, int], own: bool, narrow: bool, seed: int
) -> None:
    """Few sites and many, of a leading part or of a start of their own, some without a layer."""
    shapes = {"w": shape, "v": (9, 7)}
    before = adapter(seed, 6, shapes=shapes, dtype=torch.float64)
    updates = []
    for k, rank in enumerate(ranks):
        start = leading(before, rank)
        if own and k % 3 == 0:
            start = adapter(seed + 7 + k, rank, scale=1.5, shapes=shapes, dtype=torch.float64)
        noise = adapter(seed + 50 + k, rank, shapes=shapes, dtype=torch.float64).tensors()
        end = start.replaced({n: t + 0.3 * noise[n] for n, t in start.tensors().items()})
        one = update(f"s{k:02}", start, end, examples=k + 1)
        if narrow and k % 2:
            kept = {n: t for n, t in one.tensors.items() if n.startswith("base_model.model.w.")}
            one = replace(one, tensors=kept)
        updates.append(one)
    after = adapter(seed + 99, 6, shapes=shapes, dtype=torch.float64)
    applied = {m: dense(f) for m, f in after.factors.items()}
    measured = meters.measure(ServerState(before), fold(updates), ServerState(after))["bias"]
    for key, value in dense_forgotten(before, updates, applied).items():
        assert measured[key] == pytest.approx(value, rel=1e-8, abs=1e-10)
    for module, expected in applied.items():
        one_layer = dense_forgotten(before, updates, {module: expected})
        for key, value in one_layer.items():
            assert measured["layers"][module][key] == pytest.approx(value, rel=1e-8, abs=1e-10)
    folded = fold(updates)
    told = gaps.bias(folded, {m: [f] for m, f in after.factors.items()}, held=before.factors)
    assert told == measured
    spectra = gaps.spectra(folded, held=before.factors)
    for module in shapes:
        parts = [u for u in updates if any(f".{module}." in f".{n}" for n in u.tensors)]
        p = weights(parts)
        dW = dense(before.factors[module]) + sum(
            w * (dense(u.adapter.factors[module]) - dense(u.start.factors[module]))
            for w, u in zip(p, parts, strict=True)
        )
        values = torch.linalg.svdvals(dW)
        found = torch.tensor(spectra[module], dtype=torch.float64)[: len(values)]
        assert torch.allclose(found, values[: len(found)], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sites", [3, 60], ids=["factored", "dense"])
def test_at_one_rank_nothing_can_be_forgotten_and_no_figure_changes(sites: int) -> None:
    """The same bits, whether or not the meter knows what the server had."""
    start = adapter(0)
    updates = cohort(start, sites)
    after = FedAvgLoRA().aggregate(ServerState(start), updates)
    folded, products = fold(updates), {m: [f] for m, f in after.adapter.factors.items()}
    measured = meters.measure(ServerState(start), folded, after)["bias"]
    assert measured == gaps.bias(folded, products)
    assert measured["forgotten"] == 0.0
    assert {layer["forgotten"] for layer in measured["layers"].values()} == {0.0}
    # Stale sites of an asynchronous rule, too, whose start is not what the server has now.
    newer = ServerState(near(start, 77))
    assert meters.measure(newer, folded, after)["bias"] == measured


def test_the_parts_of_the_bias_by_hand() -> None:
    """The server has diag(3, 4), two idle sites rank 1 and 2; what is applied is diag(3, 2) + 1 aside.

    L = 1/2 diag(0, 4); dW - M = [0 -1; 0 2]; <dW - M, L> / (|L| |dW|) = 4 / (2 * 5).
    """
    eye = torch.eye(2, dtype=torch.float64)
    before = Adapter({"w": Factors(eye, torch.diag(torch.tensor([3.0, 4.0])).double(), 1.0)})
    updates = [update(f"s{r}", x, x) for r in (1, 2) for x in [leading(before, r)]]
    B = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    measured = meters.measure(
        ServerState(before), fold(updates), ServerState(Adapter({"w": Factors(eye, B, 1.0)}))
    )["bias"]
    assert measured["forgotten"] == pytest.approx(0.4)
    assert measured["relative"] == pytest.approx(5**0.5 / 5)


def test_layers_that_few_sites_hold_are_weighted_over_those() -> None:
    """A site that holds no value layer does not dilute that layer's mean."""
    start = adapter(0)
    full, other = near(start, 1), near(start, 2)
    only_query = {
        k: t for k, t in other.tensors().items() if k.startswith("base_model.model.layer.0.query")
    }
    updates = [update("a", start, full), ClientUpdate("b", 30, only_query, start)]
    after = start.replaced(
        {k: t for k, t in full.tensors().items() if ".value." in k}
        | {k: (full.tensors()[k] * 10 + t * 30) / 40 for k, t in only_query.items()}
    )
    measured = meters.measure(ServerState(start), fold(updates), ServerState(after))
    assert measured["bias"]["layers"]["layer.0.value"]["relative"] <= 1e-7
    assert measured["bias"]["layers"]["layer.0.query"]["relative"] > 1e-4
    assert measured["lag"]["displacement"] <= 1e-7


def test_a_rule_that_keeps_b_at_the_sites_has_no_bias_reading() -> None:
    start = adapter(0)
    updates = cohort(start, parts=frozenset({"A"}))
    after = FedAvgLoRA().aggregate(ServerState(start), updates)
    measured = meters.measure(ServerState(start), fold(updates, {"B", "head"}), after)
    assert measured["bias"] == {
        "relative": None, "cosine": None, "norm_ratio": None, "forgotten": None, "layers": {}
    }  # fmt: skip
    assert measured["lag"]["function_jump"] is None
    assert measured["lag"]["displacement"] == pytest.approx(0.0, abs=1e-6)
    assert measured["drift"]["total"] > 0
    # A personal head hides no factor.
    known = meters.measure(ServerState(start), fold(updates, {"head"}), after)
    assert known["bias"]["relative"] is not None


def test_function_jump_equals_the_bias_where_all_start_from_the_server() -> None:
    start = adapter(0)
    updates = cohort(start)
    after = FedAvgLoRA().aggregate(ServerState(start), updates)
    plans = {u.site: TrainPlan(start=after.adapter) for u in updates}
    alone = meters.measure(ServerState(start), fold(updates), after)
    told = meters.measure(ServerState(start), fold(updates), after, following=plans)
    assert alone["lag"]["function_jump"] == alone["bias"]["relative"]
    assert told["lag"]["function_jump"] == pytest.approx(alone["bias"]["relative"], rel=1e-12)


@many
def test_function_jump_of_truncated_starts_is_their_root_mean_square(sites: int) -> None:
    start = adapter(0)
    updates = cohort(start, sites)
    p = weights(updates)
    after = FedAvgLoRA().aggregate(ServerState(start), updates)
    plans = {}
    for i, u in enumerate(updates):
        cut = {m: algebra.truncate(f, 1 + i % 2) for m, f in after.adapter.factors.items()}
        plans[u.site] = TrainPlan(start=Adapter(cut))
    ideal = {m: dense_mean(updates, m) for m in SHAPES}
    error = sum(
        w
        * sum(
            float((dense(plans[u.site].start.factors[m]) - ideal[m]).square().sum()) for m in SHAPES
        )
        for w, u in zip(p, updates, strict=True)
    )
    expected = (error / sum(float(t.square().sum()) for t in ideal.values())) ** 0.5
    measured = meters.measure(ServerState(start), fold(updates), after, following=plans)
    assert measured["lag"]["function_jump"] == pytest.approx(expected, rel=1e-9)
    kept = {site: replace(plan, keep=frozenset({"B"})) for site, plan in plans.items()}
    hidden = meters.measure(ServerState(start), fold(updates), after, following=kept)
    assert hidden["lag"]["function_jump"] is None


def test_displacement_and_drift_equal_their_definitions() -> None:
    start = adapter(0)
    updates = cohort(start)
    p = weights(updates)
    after = ServerState(near(start, 55, 0.5))

    def vector(a: Adapter) -> Tensor:
        return torch.cat([t.double().flatten() for t in a.tensors(AB).values()])

    ends = torch.stack([vector(u.adapter) for u in updates])
    w = torch.tensor(p, dtype=torch.float64)
    mean = w @ ends
    measured = meters.measure(ServerState(start), fold(updates), after)
    displaced = float((vector(after.adapter) - mean).norm() / mean.norm())
    assert measured["lag"]["displacement"] == pytest.approx(displaced, rel=1e-9)
    total = float(w @ (ends - vector(start)).square().sum(1))
    between = float(w @ (ends - mean).square().sum(1))
    assert measured["drift"]["total"] == pytest.approx(total, rel=1e-9)
    assert measured["drift"]["between"] == pytest.approx(between, rel=1e-9)
    # Their difference is the common movement: Huygens.
    common = float((mean - vector(start)).square().sum())
    assert total - between == pytest.approx(common, rel=1e-6)


def test_mixed_ranks_leave_only_what_has_common_coordinates() -> None:
    updates = []
    for i, rank in enumerate((2, 3)):
        start = adapter(i, rank)
        updates.append(update(f"s{i}", start, near(start, 40 + i)))
    measured = meters.measure(ServerState(adapter(0)), fold(updates), ServerState(adapter(8)))
    assert measured["bias"]["relative"] > 0
    assert measured["lag"]["displacement"] is None
    assert measured["drift"]["between"] is None
    assert measured["drift"]["total"] > 0


def test_dead_start_is_the_mean_ratio_of_those_who_report_it() -> None:
    start = adapter(0)
    end = near(start, 1)
    updates = [
        update("a", start, end, 10, grad_A_norm=1.0, grad_B_norm=2.0),
        update("b", start, end, 30, grad_A_norm=0.0, grad_B_norm=2.0),
        update("c", start, end, 99, loss=1.0),
        update("d", start, end, 99, grad_A_norm=1.0, grad_B_norm=0.0),
    ]
    measured = meters.measure(ServerState(start), fold(updates), ServerState(end))
    assert measured["lag"]["dead_start"] == pytest.approx(0.5 * 10 / 40)
    silent = meters.measure(ServerState(start), fold(updates[2:]), ServerState(end))
    assert silent["lag"]["dead_start"] is None


def test_order_scale_of_counts_and_empty_sites_change_nothing() -> None:
    start = adapter(0)
    updates = cohort(start)
    after = ServerState(near(start, 55))
    reference = meters.measure(ServerState(start), fold(updates), after)
    empty = update("z", start, near(start, 77), examples=0)
    doubled = [replace(u, examples=2 * u.examples) for u in reversed(updates)]
    assert meters.measure(ServerState(start), fold([empty, *doubled]), after) == reference


@pytest.mark.parametrize("diverged", [float("nan"), float("inf")])
def test_every_reading_is_json(diverged: float) -> None:
    start = adapter(0)
    updates = cohort(start)
    broken = start.replaced({k: torch.full_like(t, diverged) for k, t in start.tensors().items()})
    nothing: list[ClientUpdate] = []
    for after, sites in ((start, updates), (broken, updates), (start, nothing)):
        measured = meters.measure(ServerState(start), fold(sites), ServerState(after))
        assert json.loads(json.dumps(measured, allow_nan=False)) == measured
        if after is broken:
            assert measured["bias"]["relative"] is None


def test_zero_update_has_no_relative_bias() -> None:
    start = adapter(0)
    zero = start.replaced({k: torch.zeros_like(t) for k, t in start.tensors().items()})
    measured = meters.measure(ServerState(zero), fold([update("a", zero, zero)]), ServerState(zero))
    assert measured["bias"]["relative"] is None
    assert measured["bias"]["cosine"] is None


@many
def test_spectrum_is_that_of_the_dense_mean(sites: int) -> None:
    updates = cohort(adapter(0), sites)
    for module, values in gaps.spectra(fold(updates)).items():
        expected = torch.linalg.svdvals(dense_mean(updates, module))
        got = torch.tensor(values, dtype=torch.float64)
        q = min(len(values), len(expected))
        assert torch.allclose(got[:q], expected[:q], rtol=1e-9, atol=1e-9)
        assert float(expected[q:].sum()) < 1e-9


def test_nothing_is_mutated() -> None:
    start = adapter(0)
    updates = cohort(start)
    after = ServerState(near(start, 55), delta=adapter(5).factors)
    copies = [t.clone() for u in updates for t in u.tensors.values()]
    meters.measure(ServerState(start), fold(updates), after)
    tensors = [t for u in updates for t in u.tensors.values()]
    assert all(torch.equal(x, y) for x, y in zip(copies, tensors, strict=True))
