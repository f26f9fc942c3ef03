"""Mixed ranks: sites that do not train change nothing, or the rule says that it forgets.

The function of a model is its base change plus B A, as the server has it and as a site of every rank
is sent it. Cohorts are all mixes of the ranks 1, 2, 4 and 8, in which the largest may be missing.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedft import strategies
from fedft.conformance.federation import distance, function, reply, still
from fedft.core import algebra, meters
from fedft.core.folding import fold
from fedft.core.types import Adapter, ClientUpdate, Factors, ServerState, Site, TrainPlan
from fedft.core.wire import codec
from fedft.core.wire.compress import Bf16
from fedft.strategies import (
    ExactMixedRank,
    FedMomentum,
    FedProx,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Krum,
    MultiKrum,
    NormClip,
    RaFLoRA,
    Strategy,
)
from tests.strategies.test_laws import TABLE

PAGES = Path(strategies.__file__).parents[2] / "docs" / "strategies"
RANKS = (1, 2, 4, 8)
SHAPES = {"layer.0.q": (12, 10), "layer.1.v": (9, 14), "layer.1.narrow": (6, 12)}  # (d_out, d_in)
HEAD = "base_model.model.classifier.weight"
MIXES = [
    mix for K in (1, 2, 3) for mix in itertools.combinations_with_replacement(reversed(RANKS), K)
]
FEW = MIXES[:14]
"""Up to two sites: for what does not depend on how many are like each other."""

RULES: dict[str, Strategy] = {
    **{name: row.rule for name, row in TABLE.items() if row.rule.mixed_ranks},
    "hetlora that prunes": HetLoRA(gamma=0.5),
    "hetlora that prunes, beyond as the server": HetLoRA(gamma=0.5, beyond_rank="server"),
    "krum over raflora": Krum(inner=RaFLoRA()),
    "norm-clip over exact-mixed-rank": NormClip(inner=ExactMixedRank()),
    "fedprox over hetlora": FedProx(inner=HetLoRA(gamma=1.0)),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def first(dtype: torch.dtype = torch.float64) -> Adapter:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    factors = {
        m: Factors(draw(8, d_in), torch.zeros(d_out, 8, dtype=dtype), 2.0)
        for m, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(factors, {HEAD: draw(3, 5)})


def fleet(mix: Sequence[int | None]) -> list[Site]:
    return [Site(f"site-{k}", 3 + 2 * k, rank=rank) for k, rank in enumerate(mix)]


def warm(rule: Strategy, dtype: torch.dtype = torch.float64) -> ServerState:
    """After two rounds in which everybody learned, with nothing left over but the model."""
    state = rule.init(first(dtype))
    for _ in range(2):
        state = rule.aggregate(state, [reply(rule, state, s) for s in fleet((8, 1, 4, 2, 8))])
    return replace(state, slots={})


def idle(rule: Strategy, state: ServerState, mix: Sequence[int | None]) -> list[ClientUpdate]:
    """Sites that return what they were sent."""
    plans = [(site, rule.plan(state, site)) for site in fleet(mix)]
    return [still(s.name, plan, s.examples) for s, plan in plans]


def model(plan: TrainPlan | ServerState) -> dict[str, Tensor]:
    adapter = plan.start if isinstance(plan, TrainPlan) else plan.adapter
    base = {m: f for m, f in plan.delta.items() if m in adapter.factors}
    return function(adapter, base)


def change(rule: Strategy, state: ServerState, mix: Sequence[int | None], rounds: int = 3) -> float:
    """How far idle rounds take the function, the server's and that of a site of any rank."""
    after = state
    for _ in range(rounds):
        after = rule.aggregate(after, idle(rule, after, mix))
    gaps = [distance(model(after), model(state))]
    for rank in RANKS:
        site = Site("new", 1, rank=rank)
        gaps.append(distance(model(rule.plan(after, site)), model(rule.plan(state, site))))
    return max(gaps)


# ── the law ───────────────────────────────────────────────────────────────────────────────────


def keeps_the_law(rule: Strategy, dtype: torch.dtype) -> bool:
    """Nothing changes at any mix; where a rule says that it forgets, something does at every one."""
    state = warm(rule, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for mix in MIXES if dtype == torch.float64 else FEW:
        moved = change(rule, state, mix)
        if may_lose(rule, mix) and max(mix) == 8 and isinstance(rule, Krum | MultiKrum):
            continue  # it may have chosen the site of rank 8, which was sent all
        if not (moved > 1e-3 if may_lose(rule, mix) else moved < tolerance):
            return False
    return True


def may_lose(rule: Strategy, mix: Sequence[int]) -> bool:
    return rule.forgets and min(mix) < 8


@rules
@dtypes
def test_sites_that_do_not_train_change_nothing_or_the_rule_says_so(
    rule: Strategy, dtype: torch.dtype
) -> None:
    assert keeps_the_law(rule, dtype)


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_a_rule_of_one_rank_has_nothing_to_forget(row: Any) -> None:
    assert row.rule.mixed_ranks or not row.rule.forgets


def test_a_wrong_declaration_is_found_either_way() -> None:
    """Without it, the law above could not fail."""

    class Silent(FlexLoRA):
        @property
        def forgets(self) -> bool:
            return False

    class Modest(RaFLoRA):
        @property
        def forgets(self) -> bool:
            return True

    assert not keeps_the_law(Silent(), torch.float64)
    assert not keeps_the_law(Modest(), torch.float64)


# ── the meter ─────────────────────────────────────────────────────────────────────────────────

PLAIN = {name: rule for name, rule in RULES.items() if "inner" not in type(rule).model_fields}


def decay(rule: Strategy) -> list[tuple[list[float], Any]]:
    """Two idle sites of ranks 2 and 1 and equal size holding diag(1, 1): spectra and bias, 3 rounds."""
    eye = torch.eye(2, dtype=torch.float64)
    state, found = ServerState(Adapter({"m": Factors(eye, eye, 1.0)})), []
    for _ in range(3):
        updates = [replace(u, examples=1) for u in idle(rule, state, (2, 1))]
        after = rule.aggregate(state, updates)
        whole = model(after)["m"] if after.delta else after.adapter.factors["m"].product()
        found.append(
            (torch.linalg.svdvals(whole).tolist(), meters.measure(state, fold(updates), after))
        )
        state = after
    return found


def test_what_idle_sites_lose_is_on_the_page_as_measured() -> None:
    """FlexLoRA halves what one of two sites reaches; HetLoRA shrinks it in both factors."""
    spectra = {
        "flexlora": [0.5, 0.25, 0.125],
        # w = |s_1| / (|s_1| + |s_2|) = sqrt(2) / (sqrt(2) + 1), squared; and so on.
        "hetlora": [0.3431, 0.0906, 0.02275],
    }
    assert spectra.keys() == {r.name for r in PLAIN.values() if r.forgets}  # type: ignore[attr-defined]
    for rule in strategies.RULES:
        name = rule.model_fields["name"].default
        page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert ("and it forgets" in page) == (name in spectra), name
        if name in spectra:
            rounds = decay(rule())
            seconds = [values[1] for values, _ in rounds]
            assert seconds == pytest.approx(spectra[name], rel=2e-3)
            assert all(values[0] == pytest.approx(1.0) for values, _ in rounds)
            assert ", ".join(f"{x:.3g}" for x in seconds) in page
            assert f"{rounds[0][1]['bias']['forgotten']:.3f}" in page


@pytest.mark.parametrize("rule", PLAIN.values(), ids=PLAIN.keys())
def test_the_meter_says_what_two_idle_sites_lose(rule: Strategy) -> None:
    if isinstance(rule, FLoRA):
        return  # its sites start from B = 0: there is no such state
    state = 1.0
    for values, measured in decay(rule):
        lost = state - values[1]
        whole = (1 + state**2) ** 0.5
        assert measured["bias"]["relative"] == pytest.approx(lost / whole, abs=1e-12)
        assert measured["bias"]["forgotten"] == pytest.approx(lost / whole, abs=1e-12)
        assert (lost > 1e-3) == rule.forgets
        state = values[1]


@rules
@dtypes
def test_a_rule_that_loses_nothing_reads_zero(rule: Strategy, dtype: torch.dtype) -> None:
    state = warm(rule, dtype)
    zero = 1e-6 if dtype == torch.float32 else 1e-12
    for mix in FEW:
        updates = idle(rule, state, mix)
        measured = meters.measure(state, fold(updates), rule.aggregate(state, updates))
        values = measured["bias"]
        if isinstance(rule, FLoRA):
            assert values["relative"] is None  # B = 0: nothing was asked for, and nothing held
            continue
        assert values["relative"] is not None
        assert values["forgotten"] is not None
        assert abs(values["forgotten"]) <= values["relative"] * (1 + 1e-9)
        if may_lose(rule, mix) and values["relative"] > zero:
            assert values["forgotten"] > 1e-3
        elif may_lose(rule, mix):
            assert max(mix) == 8
            assert isinstance(rule, Krum | MultiKrum)  # it chose the site that was sent all
        else:
            assert values["relative"] < zero


def test_a_start_that_the_wire_has_rounded_was_not_changed() -> None:
    """On a bfloat16 wire sites start from rounded factors, at one rank or several alike."""
    rule = ExactMixedRank()
    state = warm(rule, torch.float32)
    for mix in ((8, 8), (8, 4, 1), (3, 5)):
        updates = []
        for site in fleet(mix):
            plan = rule.plan(state, site)
            start = codec.on_the_wire(plan.start, Bf16())
            updates.append(ClientUpdate(site.name, 2, start.tensors(plan.send), start))
        after = rule.aggregate(state, updates)
        values = meters.measure(state, fold(updates), after)["bias"]
        assert values["relative"] is not None
        assert values["relative"] < 1e-6
        # Control: the wire did round, and a change of that size elsewhere is seen.
        moved = meters.measure(state, fold(updates), state)["bias"]["relative"]
        assert moved is not None
        assert moved > 1e-4


# ── the exact mixed-rank mean ─────────────────────────────────────────────────────────────────


def asked_for(
    rule: Strategy, state: ServerState, updates: Sequence[ClientUpdate]
) -> dict[str, Tensor]:
    """Dense twin: the server's weights plus the mean of what each site changed in its own."""
    total = sum(u.examples for u in updates)
    weights = model(state)
    for u in updates:
        for name, after in function(u.adapter, {}).items():
            weights[name] = weights[name] + u.examples / total * (
                after - function(u.start, {})[name]
            )
    return weights


@pytest.mark.parametrize("rule", [ExactMixedRank(), FedMomentum()], ids=lambda r: r.name)
@dtypes
def test_changes_are_averaged_exactly_for_any_mix_over_rounds(
    rule: Strategy, dtype: torch.dtype
) -> None:
    state = rule.init(first(dtype))
    for mix in [*MIXES, *MIXES]:  # sixty-eight rounds: the base change is long since full
        updates = [reply(rule, state, site) for site in fleet(mix)]
        expected = asked_for(rule, state, updates)
        after = rule.aggregate(state, updates)
        assert distance(model(after), expected) < (1e-5 if dtype == torch.float32 else 1e-12)
        values = meters.measure(state, fold(updates), after)["bias"]
        assert values["relative"] is not None
        assert values["relative"] < (2e-5 if dtype == torch.float32 else 1e-12)
        state = after
    assert all(f.rank == min(f.shape) for m, f in state.delta.items() if m != "layer.1.narrow")
    assert "layer.1.narrow" not in state.delta  # rank 8 holds all of 6 x 12


@dtypes
def test_every_site_starts_from_the_whole_model(dtype: torch.dtype) -> None:
    rule = ExactMixedRank()
    state = warm(rule, dtype)
    whole = model(state)
    for rank in (*RANKS, 3, None):
        plan = rule.plan(state, Site("s", 1, rank=rank))
        assert plan.start.rank == (8 if rank is None else rank)
        assert distance(model(plan), whole) < (1e-6 if dtype == torch.float32 else 1e-13)
    following = {s.name: rule.plan(state, s) for s in fleet((8, 2, 1))}
    updates = [reply(rule, state, s) for s in fleet((8, 2, 1))]
    after = rule.aggregate(state, updates)
    following = {s.name: rule.plan(after, s) for s in fleet((8, 2, 1))}
    measured = meters.measure(state, fold(updates), after, following=following)
    assert measured["lag"]["function_jump"] is not None
    assert measured["lag"]["function_jump"] < 1e-5
    # Control: FedMomentum's sites resume from less.
    other = FedMomentum()
    following = {s.name: other.plan(after, s) for s in fleet((8, 2, 1))}
    jump = meters.measure(state, fold(updates), after, following=following)["lag"]["function_jump"]
    assert jump is not None
    assert jump > 1e-2


def test_a_site_trains_the_strongest_directions() -> None:
    state = warm(ExactMixedRank())
    for rank in (1, 2, 4):
        plan = ExactMixedRank().plan(state, Site("s", 1, rank=rank))
        for module, f in state.adapter.factors.items():
            values = torch.linalg.svdvals(f.product())
            mine = algebra.norm(plan.start.factors[module])
            assert mine == pytest.approx(float(values[:rank].norm()), rel=1e-10)


def test_at_one_rank_it_is_fedmomentum_bit_for_bit() -> None:
    one, other = ExactMixedRank(), FedMomentum()
    x, y = one.init(first()), other.init(first())
    for _ in range(3):
        sites = fleet((None,) * 4)
        x, y = (r.aggregate(s, [reply(r, s, k) for k in sites]) for r, s in ((one, x), (other, y)))
        for name, tensor in y.adapter.tensors().items():
            assert torch.equal(x.adapter.tensors()[name], tensor)
        assert all(torch.equal(f.product(), y.delta[m].product()) for m, f in x.delta.items())


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────


def pi(r: int) -> int:
    return r * sum(m + n for m, n in SHAPES.values())


@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("mix", [(8, 4, 2, 1), (4, 2, 2), (8, 8, 8), (1,), (2, 1)])
@pytest.mark.parametrize("kind", [ExactMixedRank, FedMomentum])
def test_bytes_on_the_wire_are_the_formula(
    kind: Any, mix: tuple[int, ...], cap: int | None
) -> None:
    """pi(r_k), and down the frozen part at rank min(d, rank of D + R - r_k)."""
    rule, R, head = kind(delta_rank=cap), 8, 3 * 5
    state = rule.init(first(torch.float32))
    for t in range(1, 5):
        for site in fleet(mix):
            r = site.rank or R
            plan = rule.plan(state, site)
            down = 0
            for m, n in SHAPES.values():
                d = min(m, n)
                residual = max(min(d, sum(mix) + R - min(mix)) - R, 0)
                merged = min(d, cap or d, (t - 1) * residual)
                # In round 1 the model is the base: B is zero.
                lacking = R - r if t > 1 and kind is ExactMixedRank else 0
                down += min(d, merged + lacking) * (m + n)
            expected = (4 * (pi(r) + down + head), 4 * (pi(r) + head))
            content = codec.Encoder("task").train(plan)
            sent = codec.reply_content(reply(rule, state, site).tensors, 3, {})
            assert (codec.content_bytes(content), codec.content_bytes(sent)) == expected, f"{t}"
            assert codec.plan_bytes(plan) == expected
        state = rule.aggregate(state, [reply(rule, state, site) for site in fleet(mix)])
