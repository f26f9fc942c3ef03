"""Every rule with sites that hold different layers: the laws of layer-wise aggregation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from fedft.conformance.federation import trained
from fedft.core import meters
from fedft.core.folding import fold
from fedft.core.sublayers import Layer, Sublayer
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    ServerState,
    Site,
    TrainPlan,
    module_of,
)
from fedft.strategies import RULES, FedAdam, FedAvgM, FedProx, FedYogi, LoRAFAIR, RunFacts, Strategy

RANK, DEPTH = 3, 4
MODULES = {f"net.layer.{b}.{n}": (6 + b, 5) for b in range(DEPTH) for n in ("q", "v")}
HALVED = {f"net.layer.{b}.{n}": (6 + b, 5) for b in range(2) for n in ("attention.q", "mlp.up")}
HEAD = "base_model.model.classifier.weight"
CUSTOM = [FedProx(inner=LoRAFAIR()), FedAvgM(inner=LoRAFAIR()), FedAdam(), FedYogi()]
"""Combinators over something else than their default."""


def _plain(rule: type[Strategy]) -> bool:
    """Rules that pruning composes with: over LoRA factors, without noise on layers nobody held."""
    return rule.model_fields["name"].default not in ("hydralora", "central-dp")


OF_A_RUN = RunFacts(clients=6)
RULES_UNDER_TEST = [
    rule.of_run(OF_A_RUN) for rule in [*(rule() for rule in RULES if _plain(rule)), *CUSTOM]
]
rules = pytest.mark.parametrize(
    "rule",
    RULES_UNDER_TEST,
    ids=lambda r: f"{r.name}-{getattr(getattr(r, 'inner', None), 'name', '')}",
)


def first(modules: Mapping[str, tuple[int, int]] = MODULES) -> Adapter:
    g = torch.Generator().manual_seed(0)
    factors = {
        m: Factors(
            torch.randn(RANK, d_in, generator=g, dtype=torch.float64),
            torch.zeros(d_out, RANK, dtype=torch.float64),
            2.0,
        )
        for m, (d_out, d_in) in modules.items()
    }
    return Adapter(factors, {HEAD: torch.randn(3, 4, generator=g, dtype=torch.float64)})


def reply(
    rule: Strategy, state: ServerState, site: Site, layers: tuple[Layer, ...] | None
) -> ClientUpdate:
    plan = rule.plan(state, site)
    if layers is not None:
        plan = _held(plan, layers)
    return trained(plan, site, state.round)


def _held(plan: TrainPlan, layers: tuple[Layer, ...]) -> TrainPlan:
    return replace(plan, start=plan.start.narrowed(layers), layers=layers)


HOLDINGS = [(2, 1), (0,), None, (1,), (0, 2), None]
"""Of six sites; nobody but the whole ones holds block 3."""


def site(k: int) -> Site:
    return Site(f"site-{k}", 5 + 3 * k)


def updates_of(
    rule: Strategy, state: ServerState, holdings: Sequence[tuple[Layer, ...] | None]
) -> list[ClientUpdate]:
    return [reply(rule, state, site(k), layers) for k, layers in enumerate(holdings)]


def warm(rule: Strategy, modules: Mapping[str, tuple[int, int]] = MODULES) -> ServerState:
    state = rule.init(first(modules))
    for _ in range(2):
        state = rule.aggregate(state, updates_of(rule, state, [None] * 6))
    return state


def function(state: ServerState) -> dict[str, torch.Tensor]:
    found = {m: f.product() for m, f in state.adapter.factors.items()}
    for m, f in state.delta.items():
        found[m] = found[m] + f.product()
    return found


def bits(state: ServerState) -> dict[str, torch.Tensor]:
    flat = dict(state.adapter.tensors())
    for m, f in state.delta.items():
        flat |= {f"delta/{m}/A": f.A, f"delta/{m}/B": f.B}
    return flat | dict(state.slots)


@rules
def test_layers_nobody_held_keep_their_value(rule: Strategy) -> None:
    state = warm(rule)
    holdings: list[tuple[int, ...] | None] = [(2, 1), (0,), (1,), (0, 2), (1,), (0,)]
    after = rule.aggregate(state, updates_of(rule, state, holdings))
    before, now = bits(state), bits(after)
    kept = [n for n in before if "layer.3." in n]
    assert len(kept) >= 4
    assert all(torch.equal(before[n], now[n]) for n in kept)
    learned = {module_of(n) for n in now if n in before and not torch.equal(before[n], now[n])}
    changed = {m for m in MODULES if not torch.equal(function(state)[m], function(after)[m])}
    assert {m for m in learned if m in MODULES} <= {m for m in MODULES if "layer.3." not in m}
    held = {m for m in MODULES if "layer.3." not in m}
    assert changed <= held
    if "B" not in rule.personal and rule.model_dump()["name"] not in ("krum", "multi-krum"):
        assert changed == held  # the server has products, and takes them of every site


@rules
def test_a_first_round_in_which_a_layer_is_held_by_nobody_applies_nothing_to_it(
    rule: Strategy,
) -> None:
    state = rule.init(first())
    after = rule.aggregate(
        state, updates_of(rule, state, [(2, 1), (0,), (1,), (0, 2)] + [(1,)] * 2)
    )
    for module, product in function(after).items():
        if "layer.3." in module:
            assert not product.any()


@rules
def test_mixed_holdings_do_not_depend_on_the_order_and_keep_every_shape(rule: Strategy) -> None:
    state = warm(rule)
    updates = updates_of(rule, state, HOLDINGS)
    after = rule.aggregate(state, updates)
    again = rule.aggregate(state, updates[::-1])
    a, b = bits(after), bits(again)
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert list(after.adapter.tensors()) == list(state.adapter.tensors())
    assert all(t.isfinite().all() for t in a.values() if t.is_floating_point())
    # And the state can be planned from, trained on and aggregated again.
    following = rule.aggregate(after, updates_of(rule, after, HOLDINGS[::-1]))
    assert following.round == state.round + 2
    found = meters.measure(state, fold(updates, rule.personal), after)
    assert found["drift"]["total"] is not None


@pytest.mark.parametrize(
    "rule", [r for r in RULES_UNDER_TEST if r.uses_mean_only], ids=lambda r: r.model_dump()["name"]
)
def test_the_mean_of_mixed_holdings_stands_for_all_replies(rule: Strategy) -> None:
    """Bit for bit, although each tensor is a mean over other sites."""
    state = warm(rule)
    updates = updates_of(rule, state, HOLDINGS)
    mean = fold(updates, rule.personal).mean_update(state.adapter)
    handed = bits(rule.combine(replace(state, round=state.round + 1), [mean]))
    expected = bits(rule.aggregate(state, updates))
    assert list(handed) == list(expected)
    assert all(torch.equal(handed[n], expected[n]) for n in expected)


SELECTING = ("krum", "multi-krum", "norm-clip")
"""What these make of a layer depends on whole updates: who is near whom, how long each is."""


@rules
def test_a_layer_is_the_business_of_those_that_hold_it(rule: Strategy) -> None:
    """As if the others had not been asked: weights are renormalised over the holders."""
    if rule.model_dump()["name"] in SELECTING:
        pytest.skip("weighs clients by all that they sent")
    state = warm(rule)
    updates = updates_of(rule, state, HOLDINGS)
    both = function(rule.aggregate(state, updates))
    for block in range(DEPTH):
        holders = [u for u, h in zip(updates, HOLDINGS, strict=True) if h is None or block in h]
        alone = function(rule.aggregate(state, holders))
        for module in (m for m in MODULES if f"layer.{block}." in m):
            assert torch.allclose(both[module], alone[module], atol=1e-9), module


@rules
def test_halves_of_a_block_are_averaged_each_over_its_own_holders(rule: Strategy) -> None:
    """A site may hold attention of one block and the feed-forward part of another."""
    if rule.model_dump()["name"] in SELECTING:
        pytest.skip("weighs clients by all that they sent")
    state = warm(rule, HALVED)
    holdings = [
        (Sublayer(0, "attention"), Sublayer(1, "feed-forward")),
        (Sublayer(0, "feed-forward"), 1),
        None,
        (Sublayer(0, "attention"), Sublayer(1, "attention")),
    ]
    updates = updates_of(rule, state, holdings)
    assert [sorted(u.start.factors) for u in updates[:2]] == [
        ["net.layer.0.attention.q", "net.layer.1.mlp.up"],
        ["net.layer.0.mlp.up", "net.layer.1.attention.q", "net.layer.1.mlp.up"],
    ]
    both = function(rule.aggregate(state, updates))
    for module in HALVED:
        alone = function(rule.aggregate(state, [u for u in updates if module in u.start.factors]))
        assert torch.allclose(both[module], alone[module], atol=1e-9), module
