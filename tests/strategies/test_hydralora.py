"""HydraLoRA federated: rounds by hand, who belongs where, and heads that have changed places."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedft.core.adapters import hydra
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    ServerState,
    Site,
    factor_name,
    head_name,
    part_of,
)
from fedft.strategies import FedAvgLoRA, FedSALoRA, HydraLoRA, grouping
from fedft.strategies.hydralora import cluster_of

A, ROUTER = factor_name("q", "A"), factor_name("q", "router")
B0, B1 = head_name("q", 0), head_name("q", 1)
HEAD = "base_model.model.classifier.bias"


def adapter(heads: int = 2) -> Adapter:
    """One layer of two inputs and two outputs at rank 1; heads of zero, a router that is not."""
    tensors = hydra.initial(hydra.shapes({"q": (2, 2)}, 1, heads), seed=0)
    return Adapter({}, {**tensors, A: row(1, 0), HEAD: torch.zeros(1)})


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def column(*values: float) -> Tensor:
    return row(*values).T.contiguous()


def reply(
    rule: HydraLoRA, state: ServerState, site: str, examples: int, **changes: Tensor
) -> ClientUpdate:
    """What the plan asks for, with the given changes of A, of the head trained, of the router."""
    plan = rule.plan(state, Site(site, examples))
    own = head_name("q", plan.heads[0]) if plan.heads else B0
    names = {"A": A, "B": own, "router": ROUTER, "head": HEAD}
    tensors = dict(plan.sent())
    for part, change in changes.items():
        tensors[names[part]] = tensors[names[part]] + change
    return ClientUpdate(site, examples, tensors, plan.start)


def first_round(rule: HydraLoRA) -> ServerState:
    """Two sites pull one way, two the other."""
    state = rule.init(adapter())
    right, up = column(1.0, 0.1), column(0.1, 1.0)
    return rule.aggregate(
        state,
        [
            reply(rule, state, "a", 1, B=right, A=row(0, 2)),
            reply(rule, state, "b", 3, B=2 * right),
            reply(rule, state, "c", 1, B=up),
            reply(rule, state, "d", 1, B=3 * up, head=torch.ones(1) * 6),
        ],
    )


def test_a_golden_round() -> None:
    """By hand: A <- (1, 0) + (0, 2) / 6; B_0 <- (1 + 3 * 2) / 4 right; B_1 <- (1 + 3) / 2 up."""
    after = first_round(HydraLoRA()).adapter.head
    assert torch.allclose(after[A], row(1, 1 / 3))
    assert torch.allclose(after[B0], 1.75 * column(1.0, 0.1))
    assert torch.allclose(after[B1], 2.0 * column(0.1, 1.0))
    assert torch.allclose(after[HEAD], torch.ones(1))
    assert torch.equal(after[ROUTER], adapter().head[ROUTER])


def test_each_site_trains_its_own_head_in_the_second_round() -> None:
    """By hand: site c moves B_1 by (0, 1); B_0 has nobody and stays."""
    rule = HydraLoRA()
    state = first_round(rule)
    assert [cluster_of(state, s) for s in "abcd"] == [0, 0, 1, 1]
    assert rule.plan(state, Site("c", 1)).heads == (1,)
    after = rule.aggregate(state, [reply(rule, state, "c", 5, B=column(0, 1))])
    assert torch.allclose(after.adapter.head[B1], column(0.2, 3.0))
    assert torch.equal(after.adapter.head[B0], state.adapter.head[B0])


def test_a_newcomer_starts_between_the_heads_and_joins_the_one_it_moves_to() -> None:
    rule = HydraLoRA()
    state = first_round(rule)
    plan = rule.plan(state, Site("new", 1))
    mean = (state.adapter.head[B0] + state.adapter.head[B1]) / 2
    assert all(torch.allclose(plan.start.head[name], mean) for name in (B0, B1))
    assert plan.heads == (0,)
    assert "router" not in plan.train, "which has no say yet"
    after = rule.aggregate(state, [reply(rule, state, "new", 1, B=column(-0.5, 0.5))])
    assert cluster_of(after, "new") == 1
    assert torch.allclose(after.adapter.head[B1], state.adapter.head[B1] + column(-0.5, 0.5))


def test_a_site_that_has_changed_moves_with_the_next_grouping() -> None:
    """Every second round; site b now agrees with c and d, and keeps what it trained."""
    rule = HydraLoRA(recluster_every=2)
    state = first_round(rule)
    still = [reply(rule, state, s, 1) for s in "abcd"]
    second = rule.aggregate(state, still)
    assert cluster_of(second, "b") == 0
    turn = column(-1.75, 60.0)
    third = rule.aggregate(second, [*still[:1], reply(rule, second, "b", 1, B=turn), *still[2:]])
    assert cluster_of(third, "b") == 1
    old = second.adapter.head
    assert torch.allclose(third.adapter.head[B1], (old[B0] + turn + 2 * old[B1]) / 3, rtol=1e-5)
    assert torch.allclose(third.adapter.head[B0], old[B0])


def test_sites_of_one_kind_are_one_cluster() -> None:
    rule = HydraLoRA()
    state = rule.init(adapter())
    same = [reply(rule, state, s, 1, B=column(1.0, 0.2)) for s in "abcd"]
    after = rule.aggregate(state, same)
    assert {cluster_of(after, s) for s in "abcd"} == {0}
    assert not after.adapter.head[B1].any()


def test_heads_that_changed_places_are_matched_with_their_routers() -> None:
    """Global: a site that hands back its heads in the other order changes nothing."""
    rule = HydraLoRA(mode="global")
    heads = {B0: column(1, 0), B1: column(0, 1)}
    state = rule.init(adapter().replaced(heads))
    plan = rule.plan(state, Site("a", 1))
    sent = plan.sent()
    swapped = {**sent, B0: sent[B1], B1: sent[B0], ROUTER: sent[ROUTER].flip(0)}
    updates = [
        ClientUpdate("a", 1, sent, plan.start),
        ClientUpdate("b", 1, swapped, plan.start),
    ]
    after = rule.aggregate(state, updates)
    assert all(torch.equal(after.adapter.head[n], t) for n, t in sent.items())


def test_a_golden_global_round() -> None:
    """By hand, with weights 1/4 and 3/4: everything is the mean, the router too."""
    rule = HydraLoRA(mode="global")
    state = rule.init(adapter())
    gate = torch.ones(2, 2)
    after = rule.aggregate(
        state,
        [
            reply(rule, state, "a", 1, B=column(4, 0), router=4 * gate),
            reply(rule, state, "b", 3, A=row(0, 4)),
        ],
    ).adapter.head
    assert torch.allclose(after[B0], column(1, 0))
    assert torch.allclose(after[ROUTER], state.adapter.head[ROUTER] + gate)
    assert torch.allclose(after[A], row(1, 3))


def test_one_private_head_is_fedsa_lora() -> None:
    rule, twin = HydraLoRA(mode="private"), FedSALoRA(head="shared")
    plan, other = (r.plan(ServerState(adapter(1)), Site("a", 1)) for r in (rule, twin))
    present = {part_of(name) for name in plan.start.tensors()}
    for what in ("receive", "train", "send", "keep"):
        mine, theirs = getattr(plan, what), getattr(other, what)
        assert mine & present == theirs & present, what


def test_what_the_rules_take() -> None:
    assert HydraLoRA().supports("hydralora") and not HydraLoRA().supports("lora")
    assert FedAvgLoRA().supports("dora") and not FedAvgLoRA().supports("hydralora")


# ── groups ────────────────────────────────────────────────────────────────────────────────────


def bundles(counts: Sequence[int], noise: float = 0.2) -> list[list[Tensor]]:
    """Heads of two layers around as many directions as there are counts."""
    generator = torch.Generator().manual_seed(0)
    centres = [[torch.randn(5, 3, generator=generator) for _ in range(2)] for _ in counts]
    return [
        [c + noise * torch.randn(5, 3, generator=generator) for c in centre]
        for centre, count in zip(centres, counts, strict=True)
        for _ in range(count)
    ]


@pytest.mark.parametrize("counts", [(4, 3), (3, 3, 3), (5, 2, 2, 2)])
def test_the_number_of_groups_is_found(counts: tuple[int, ...]) -> None:
    found = grouping.agglomerated(bundles(counts), largest=6, least_silhouette=0.1)
    assert found.tolist() == [g for g, n in enumerate(counts) for _ in range(n)]


def test_no_more_groups_than_heads_and_none_of_noise() -> None:
    three = bundles((3, 3, 3))
    assert len({*grouping.agglomerated(three, 2, 0.1).tolist()}) == 2
    noise = bundles((1,) * 8)
    assert {*grouping.agglomerated(noise, 3, 0.3).tolist()} == {0}
    assert grouping.agglomerated(three[:2], 2, 0.1).tolist() == [0, 0], "too few to tell"


def test_silhouette_by_hand() -> None:
    """Points 0, 1 and 10 on a line: (9.5 - 1) / 9.5... of the first two, 0 of the lone third."""
    points = np.array([0.0, 1.0, 10.0])
    distance = np.abs(points[:, None] - points[None])
    expected = ((10 - 1) / 10 + (9 - 1) / 9 + 0) / 3
    assert grouping.silhouette(distance, np.array([0, 0, 1])) == pytest.approx(expected)


def test_assignment_keeps_the_order_where_it_is_as_good() -> None:
    assert grouping.assigned(np.zeros((3, 3))) == [0, 1, 2]
    assert grouping.assigned(np.array([[0.1, 0.9, 0.0], [0.8, 0.2, 0.0]])) == [1, 0]


def test_a_router_is_judged_by_what_the_rule_says_of_it() -> None:
    """Global averages it every round; the others never see it."""
    for mode, seen in (("global", True), ("clustered", False), ("private", False)):
        rule = HydraLoRA.model_validate({"mode": mode})
        plan = rule.plan(replace(rule.init(adapter()), round=1), Site("a", 1))
        assert ("router" in plan.send) == ("router" in plan.receive) == seen
        assert ("router" in plan.keep) != seen
