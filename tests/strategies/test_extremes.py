"""Every rule with numbers of any size: a state that can be sent, or an error that says which cannot."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedft.conformance.federation import fleet, initial, reply, tensors_of
from fedft.core.errors import ConfigError
from fedft.core.types import (
    LARGEST_SENT,
    Adapter,
    ClientUpdate,
    Factors,
    Part,
    ServerState,
    part_of,
)
from fedft.core.wire import codec
from fedft.core.wire.compress import Bf16, Cast, Fp32
from fedft.strategies import (
    FedAdam,
    FedAvgLoRA,
    FedAvgM,
    FedProx,
    FlexLoRA,
    FLoRA,
    NormClip,
    Strategy,
)
from fedft.strategies.sendable import check_sendable
from tests.strategies.test_laws import Row, rows

WIRES = (Fp32(), Bf16())

SIZES = {
    "all tiny": {"A": 1e-30, "B": 1e-30, "R": 1e-30, "router": 1e-30, "head": 1e-30},
    "all of zero": {"A": 0.0, "B": 0.0, "R": 0.0, "router": 0.0, "head": 0.0},
    "all huge": {"A": 1e30, "B": 1e30, "R": 1e30, "router": 1e30, "head": 1e30},
    "A tiny, B huge": {"A": 1e-30, "B": 1e30},
    "A huge, B tiny": {"A": 1e30, "B": 1e-30},
    "A of zero": {"A": 0.0},
    "B of zero": {"B": 0.0, "R": 0.0},
    "B tiny": {"B": 1e-30, "R": 1e-30},
    "at the edge": {"B": 1e37, "A": 1e37, "head": 1e37},
}
"""Part → what every site's reply is multiplied by."""


def scaled(update: ClientUpdate, by: dict[str, float]) -> ClientUpdate:
    def one(name: str, t: Tensor) -> Tensor:
        return (t.double() * by.get(part_of(name), 1.0)).to(t.dtype)

    return replace(update, tensors={name: one(name, t) for name, t in update.tensors.items()})


def flattened(update: ClientUpdate) -> ClientUpdate:
    """With every row of a matrix the same: rank one, whatever it was."""
    return replace(
        update,
        tensors={n: t[:1].expand_as(t).contiguous() for n, t in update.tensors.items()},
    )


def replies(
    rule: Strategy, state: ServerState, by: dict[str, float], kind: str
) -> list[ClientUpdate]:
    """All sites at one size; or each at another; or of rank one; or all but one idle."""
    sites = fleet(rule)
    updates = [reply(rule, state, site) for site in sites]
    if kind == "each another":
        return [scaled(u, by) if k % 2 else u for k, u in enumerate(updates)]
    if kind == "rank one":
        return [scaled(flattened(u), by) for u in updates]
    if kind == "mostly idle":
        idle = [
            replace(u, tensors=rule.plan(state, s).sent())
            for u, s in zip(updates, sites, strict=True)
        ]
        return [scaled(updates[0], by), *idle[1:]]
    return [scaled(u, by) for u in updates]


def assert_sendable(state: ServerState) -> None:
    """By the codec itself, in both of its formats."""
    for tensor in tensors_of(state).values():
        assert tensor.isfinite().all()
    for wire in WIRES:
        for tensors in (state.adapter.tensors(), codec.delta_tensors(state.delta)):
            for name, t in codec.tensors_from(codec.arrays_from(tensors, wire)).items():
                assert t.isfinite().all(), (wire, name)


SMALL = {"all tiny", "all of zero", "A of zero", "B of zero", "B tiny"}
"""Zero and next to it are ordinary, and never refused: the first round has B = 0."""


@rows
@pytest.mark.parametrize("size", SIZES)
def test_what_a_rule_makes_of_any_size_can_be_sent_or_is_refused(row: Row, size: str) -> None:
    """Rounds from the first, until one is refused. A refusal names rule, tensor and remedy.

    Where a decomposition itself has no answer, there is no tensor to name.
    """
    rule = row.rule
    made = r"made (the base change |its own )?\S+ (NaN|infinite|as large as)"
    told = rf"round \d: {rule.label} ({made}|has no result in numbers of this size)"
    for kind in ("all", "each another", "rank one", "mostly idle"):
        state = initial(rule, torch.float32)
        for _ in range(2):
            updates = replies(rule, state, SIZES[size], kind)
            if not all(t.isfinite().all() for u in updates for t in u.tensors.values()):
                break  # a server would not have taken such a reply
            try:
                state = rule.aggregate(state, updates)
            except ConfigError as refused:
                assert size not in SMALL
                assert re.match(told, refused.what)
                assert "max-update-norm" in refused.fix
                break
            assert_sendable(state)


OVERFLOWING = {
    "spectrum on B": (FlexLoRA(), {"A": 1e25, "B": 1e25}, "lora_B"),
    "base change": (FLoRA(delta_rank=2), {"A": 1e25, "B": 1e25}, "the base change"),
    "momentum": (FedAvgM(lr=1e39), {}, "lora_A"),
    "over another": (FedProx(inner=FedAvgM(lr=1e39)), {}, "fedprox over fedavgm over fedavg-lora"),
}


@pytest.mark.parametrize(("rule", "by", "told"), OVERFLOWING.values(), ids=OVERFLOWING.keys())
def test_an_overflow_is_told(rule: Strategy, by: dict[str, float], told: str) -> None:
    """And without the check it would have been the new state."""
    state = initial(rule, torch.float32)
    updates = [scaled(reply(rule, state, site), by) for site in fleet(rule)]
    assert all(t.isfinite().all() for u in updates for t in u.tensors.values())
    with pytest.raises(ConfigError, match=told) as caught:
        rule.aggregate(state, updates)
    assert rule.name in caught.value.what  # type: ignore[attr-defined]
    assert "layer.0.q" in caught.value.what
    usable = sorted(updates, key=lambda u: u.site)
    after = rule.combine(replace(state, round=1), usable)
    assert not all(t.isfinite().all() for t in tensors_of(after).values())


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38])
@pytest.mark.parametrize("part", ["A", "B", "head"])
def test_one_number_is_enough(entry: float, part: Part) -> None:
    """What no reply holds, but a rule might make: in any tensor, in any place."""
    before = initial(FedAvgLoRA(), torch.float32)
    name = list(before.adapter.tensors({part}))[-1]
    spoilt = before.adapter.tensors()[name].clone()
    spoilt.view(-1)[-1] = entry
    after = replace(before, adapter=before.adapter.replaced({name: spoilt}), round=1)
    with pytest.raises(ConfigError, match="round 1: some-rule made ") as caught:
        check_sendable("some-rule", before, after)
    assert name in caught.value.what
    check_sendable("some-rule", before, before)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), 3.4e38])
def test_a_base_change_and_slots_are_looked_at_too(entry: float) -> None:
    before = initial(FedAvgLoRA(), torch.float32)
    spoilt = torch.full((2, 3), entry)
    change = Factors(spoilt, torch.ones(4, 2), 1.0)
    with pytest.raises(ConfigError, match=r"the base change base_model\.model\.m\.lora_A"):
        check_sendable("some-rule", before, replace(before, delta={"m": change}))
    slots = {"fedadam/v/x": spoilt, "members": torch.tensor([[2**62, 1]])}
    if entry == 3.4e38:  # a slot stays at the server
        check_sendable("some-rule", before, replace(before, slots=slots))
    else:
        with pytest.raises(ConfigError, match="its own fedadam/v/x"):
            check_sendable("some-rule", before, replace(before, slots=slots))


def test_a_decomposition_that_fails_is_told_as_an_overflow_is() -> None:
    """LAPACK refuses what is not finite with an error of its own."""

    class Careless(FedAvgLoRA):
        def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
            torch.linalg.svd(torch.full((2, 2), float("nan")))
            return state

    state = initial(FedAvgLoRA(), torch.float32)
    updates = [reply(FedAvgLoRA(), state, site) for site in fleet(FedAvgLoRA())]
    with pytest.raises(ConfigError, match="round 1: fedavg-lora has no result") as caught:
        Careless().aggregate(state, updates)
    assert "max-update-norm" in caught.value.fix


def test_empty_tensors_are_sound() -> None:
    before = ServerState(Adapter({}))
    nothing = Factors(torch.zeros(0, 3), torch.zeros(4, 0), 1.0)
    check_sendable("some-rule", before, replace(before, delta={"m": nothing}))


@pytest.mark.parametrize("wire", WIRES)
def test_the_range_is_that_of_the_narrowest_format(wire: Cast) -> None:
    """The largest number passes every format as a number; what is a little larger fails one."""
    largest = torch.tensor([LARGEST_SENT, -LARGEST_SENT])
    (sent,) = codec.tensors_from(codec.arrays_from({"x": largest}, wire)).values()
    assert torch.equal(sent, largest)
    above = torch.tensor([3.4e38])
    (sent,) = codec.tensors_from(codec.arrays_from({"x": above}, wire)).values()
    assert bool(sent.isfinite().all()) == wire.exact


class TestNormClipIsNotFrozen:
    """A run of which most sites return their start still learns from the others."""

    @pytest.mark.parametrize("inner", [FedAvgLoRA(), FlexLoRA(), FedAdam()])
    @pytest.mark.parametrize("idle", [1, 5, 20])
    def test_the_mover_moves_the_model(self, inner: Strategy, idle: int) -> None:
        rule = NormClip(inner=inner)  # type: ignore[arg-type]
        state = initial(rule, torch.float32)
        sites = fleet(rule, idle + 1)
        mover, *others = (reply(rule, state, site) for site in sites)
        start = {s.name: rule.plan(state, s).sent() for s in sites}
        updates = [mover, *(replace(u, tensors=start[u.site]) for u in others)]
        x, y = (r.aggregate(state, updates).adapter.tensors() for r in (rule, inner))
        assert any(not torch.equal(x[n], t) for n, t in state.adapter.tensors().items())
        assert all(torch.equal(x[n], t) for n, t in y.items()), "nobody to be compared with"

    def test_the_bound_is_still_one(self) -> None:
        """A liar among those who move is brought down to the honest, however many are idle."""
        rule, plain = NormClip(), FedAvgLoRA()
        state = initial(rule, torch.float64)
        updates = [reply(rule, state, site) for site in fleet(rule, 12)]
        idle = rule.plan(state, fleet(rule)[0]).sent()
        updates = [u if k < 3 else replace(u, tensors=idle) for k, u in enumerate(updates)]
        start = state.adapter.tensors()
        lie = {n: start[n] + 1e6 * (t - start[n]) for n, t in updates[0].tensors.items()}
        lied = [replace(updates[0], tensors=lie), *updates[1:]]

        def moved(rule: Strategy, replies: list[ClientUpdate]) -> float:
            after = rule.aggregate(state, replies).adapter.tensors()
            return sum(float((after[n] - t).square().sum()) for n, t in start.items()) ** 0.5

        assert moved(plain, lied) > 1e4 * moved(plain, updates)
        assert moved(rule, lied) < 2 * moved(rule, updates)
