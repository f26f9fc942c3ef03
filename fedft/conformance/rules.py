"""The laws of aggregation rules that hold for any rule, whoever wrote it.

Each is a function of a rule and a dtype; :data:`LAWS` lists them in their order here. The table of
our own rules in ``tests/strategies/test_laws.py`` holds each of its rows to all of them, and to laws
that need facts about a rule that only its author knows (its bytes, whether it is exact).
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedft.conformance.federation import (
    distance,
    fleet,
    function,
    initial,
    replies,
    reply,
    same,
    still,
    tensors_of,
    warm,
)
from fedft.conformance.laws import Finding, Law, first_line, held, require
from fedft.core.errors import ConfigError
from fedft.core.folding import fold
from fedft.core.types import ServerState, Site, part_of
from fedft.core.wire import codec
from fedft.strategies import REGISTRY, AnyStrategy, Strategy

_ANY: TypeAdapter[Strategy] = TypeAdapter(AnyStrategy)

DTYPES = (torch.float32, torch.float64)

Check = Callable[[Strategy, torch.dtype], None]

_laws: list[Law[Strategy]] = []


def _law(of: Callable[[Strategy], bool] = lambda _: True) -> Callable[[Check], Check]:
    """Enter a function among the laws; what it says is the first line of its docstring."""

    def enter(check: Check) -> Check:
        def both(rule: Strategy) -> None:
            for dtype in DTYPES:
                check(rule, dtype)

        says = (check.__doc__ or "").partition(".")[0]
        _laws.append(Law(says, both, of))
        return check

    return enter


@_law()
def the_order_of_arrival_changes_nothing(rule: Strategy, dtype: torch.dtype) -> None:
    """The order of arrival changes no bit."""
    state = warm(rule, dtype)
    updates = replies(rule, state)
    expected = rule.aggregate(state, updates)
    for seed in range(3):
        random.Random(seed).shuffle(updates)
        require(same(rule.aggregate(state, updates), expected), "another order, another state")


@_law()
def the_scale_of_the_example_counts_changes_nothing(rule: Strategy, dtype: torch.dtype) -> None:
    """Only shares of the examples count."""
    state = warm(rule, dtype)
    updates = replies(rule, state)
    scaled = [replace(u, examples=7 * u.examples) for u in updates]
    require(
        same(rule.aggregate(state, scaled), rule.aggregate(state, updates)),
        "seven times as many examples everywhere give another state: weigh by shares of the sum",
    )


@_law()
def a_client_without_examples_changes_nothing(rule: Strategy, dtype: torch.dtype) -> None:
    """A client without examples changes no bit."""
    state = warm(rule, dtype)
    updates = replies(rule, state)
    empty = replace(reply(rule, state, Site("site-9", 1)), examples=0)
    require(
        same(rule.aggregate(state, [*updates, empty]), rule.aggregate(state, updates)),
        "a reply of no examples changed the state",
    )


@_law()
def a_round_without_updates_only_counts(rule: Strategy, dtype: torch.dtype) -> None:
    """A round without updates changes no tensor."""
    state = warm(rule, dtype)
    none = replace(reply(rule, state, Site("site-0", 1)), examples=0)
    for updates in ([], [none]):
        require(
            same(rule.aggregate(state, updates), replace(state, round=state.round + 1)),
            "a round in which nobody trained changed more than the round's number",
        )


@_law()
def replies_and_state_are_left_as_they_were(rule: Strategy, dtype: torch.dtype) -> None:
    """Arguments are not written to."""
    state = warm(rule, dtype)
    updates = replies(rule, state)
    before = copy.deepcopy((state, updates))
    rule.aggregate(state, updates)
    require(same(state, before[0]), "the state that was handed over is another one afterwards")
    for update, old in zip(updates, before[1], strict=True):
        for mine, theirs in (
            (update.tensors, old.tensors),
            (update.start.tensors(), old.start.tensors()),
        ):
            changed = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
            require(not changed, f"a reply was written to: {', '.join(changed)}")


@_law()
def keys_shapes_and_dtypes_stay(rule: Strategy, dtype: torch.dtype) -> None:
    """The new state has the tensors of the old one."""
    state = warm(rule, dtype)
    after = rule.aggregate(state, replies(rule, state))
    require(isinstance(after, ServerState), f"combine gave a {type(after).__name__}")
    require(after.round == state.round + 1, f"round {state.round} was followed by {after.round}")
    # Of the first state: what a rule changed in the rounds before is not what it was given.
    old, new = initial(rule, dtype).adapter.tensors(), after.adapter.tensors()
    require(new.keys() == state.adapter.tensors().keys(), "other tensors than the round before")
    # A rule of cores puts them between the factors in its first round.
    new = {name: t for name, t in new.items() if name in old or part_of(name) != "R"}
    require(new.keys() == old.keys(), f"other tensors: {sorted(new.keys() ^ old.keys())}")
    for name, tensor in old.items():
        require(
            (new[name].shape, new[name].dtype) == (tensor.shape, tensor.dtype),
            f"{name} was {_form(tensor)} and is {_form(new[name])}",
        )
    require(
        all(f.A.dtype == f.B.dtype == dtype for f in after.delta.values()),
        "the base change is in another dtype than the adapter",
    )
    require(after.delta.keys() == state.delta.keys(), "the base change is of other layers")
    require(
        all(f.scale == 1.0 for f in after.delta.values()),
        "the base change has a scale other than 1, and could not grow by stacking",
    )
    for name, tensor in tensors_of(after).items():
        require(bool(tensor.isfinite().all()), f"{name} is not finite")
        require(tensor.is_contiguous(), f"{name} is not contiguous, and no checkpoint stores that")


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@_law()
def the_same_inputs_give_the_same_bytes(rule: Strategy, dtype: torch.dtype) -> None:
    """The same inputs give the same bytes."""
    first = warm(rule, dtype)
    why = "the same two rounds gave two states: something is kept in the rule, or drawn without a seed"
    require(same(first, warm(rule, dtype)), why)
    require(same(first, warm(copy.deepcopy(rule), dtype)), why)


@_law()
def clients_that_learned_nothing_change_nothing(rule: Strategy, dtype: torch.dtype) -> None:
    """Clients that learned nothing leave the model where it is.

    At full rank, and with nothing left over from before.
    """
    state = replace(warm(rule, dtype), slots={})
    plans = {f"site-{k}": rule.plan(state, Site(f"site-{k}", 1)) for k in range(3)}
    updates = [still(name, plan) for name, plan in plans.items()]
    after = rule.aggregate(state, updates)
    moved = distance(function(after.adapter, after.delta), function(state.adapter, state.delta))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    require(moved < tolerance, f"all sent what they were sent, and the model moved by {moved:.2g}")


@_law(lambda rule: rule.uses_mean_only)
def the_mean_may_stand_for_the_replies(rule: Strategy, dtype: torch.dtype) -> None:
    """The mean of the replies gives the same bits as they do.

    The server folds the replies as they come, and hands over their mean. Rules that put one summary
    (a median, a noisy mean) in its place rely on it too.
    """
    for count in (1, 2, 40):
        state = warm(rule, dtype)
        for _ in range(2):  # both rounds of an alternation
            updates = replies(rule, state, count)
            mean = fold(updates, rule.personal).mean_update(state.adapter)
            whole = rule.aggregate(state, updates)
            require(
                same(rule.combine(replace(state, round=state.round + 1), [mean]), whole),
                f"uses_mean_only, and the mean of {count} replies gives another state than they do",
            )
            state = whole


@_law()
def plans_are_consistent(rule: Strategy, dtype: torch.dtype) -> None:
    """Plans are consistent."""
    state = warm(rule, dtype)
    for site in fleet(rule):
        plan = rule.plan(state, site)
        present = {part_of(name) for name in plan.start.tensors()}
        require(
            plan.send <= present | {"head"},
            f"it asks for {_said(plan.send - present)}, which the start does not have",
        )
        require(
            plan.send & present <= plan.train & present,
            f"it asks for {_said((plan.send - plan.train) & present)}, which nobody trains",
        )
        require(
            plan.keep == rule.personal,
            f"it keeps {_said(plan.keep)} at the client, and personal says {_said(rule.personal)}",
        )
        require(not plan.keep & plan.send, f"it keeps and sends {_said(plan.keep & plan.send)}")
        if site.rank is not None:
            require(
                plan.start.rank == site.rank,
                f"a client of rank {site.rank} is sent an adapter of rank {plan.start.rank}",
            )
        once = "is made anew for each client: it would be encoded for each, and no two share a pass"
        require(rule.plan(state, site).start is plan.start, f"the start {once}")
        new, newer = (rule.plan(state, replace(site, name=name)) for name in ("new", "newer"))
        require(newer.start is new.start, f"the start {once}")
        require(newer.delta is new.delta, f"the base change {once}")


def _said(parts: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(parts)) or "nothing"


@_law()
def plans_and_replies_can_be_sent(rule: Strategy, dtype: torch.dtype) -> None:
    """Plans and replies can be sent."""
    state = warm(rule, dtype)
    for site in fleet(rule):
        plan = rule.plan(state, site)
        codec.Encoder("task").train(plan)
        codec.reply_content(reply(rule, state, site).tensors, site.examples, {})


@_law(lambda rule: rule.mixed_ranks)
def a_rank_that_it_does_not_take_is_never_asked_for(rule: Strategy, dtype: torch.dtype) -> None:
    """Every rank up to the global one is served, and none above it."""
    state = warm(rule, dtype)
    top = state.adapter.rank
    for rank in range(1, top + 1):
        got = rule.plan(state, Site("some", 5, rank=rank)).start.rank
        require(got == rank, f"a client of rank {rank} is sent an adapter of rank {got}")
    try:
        rule.plan(state, Site("big", 5, rank=top + 1))
    except ConfigError:
        return
    require(False, f"a client of rank {top + 1} is served by an adapter of rank {top}")


@_law()
def the_first_round_works(rule: Strategy, dtype: torch.dtype) -> None:
    """A first round works, of one client and of four."""
    for count in (1, 4):
        state = initial(rule, dtype)
        after = rule.aggregate(state, replies(rule, state, count))
        for name, tensor in tensors_of(after).items():
            require(
                bool(tensor.isfinite().all()), f"{name} is not finite after one round of {count}"
            )


LAWS: Sequence[Law[Strategy]] = tuple(_laws)
"""The laws that every rule is held to, at float32 and float64."""


def the_table_is_the_rule(rule: Strategy) -> None:
    """Its values can be written to a configuration and read again, and unknown keys are refused."""
    table = rule.model_dump(mode="json", by_alias=True)
    table["name"] = REGISTRY.admit(type(rule)).name
    again = _ANY.validate_python(table)
    require(dict(again) == dict(rule) | {"name": again.name}, f"{dict(rule)} came back as {again}")
    try:
        _ANY.validate_python({**table, "no-such-key": 1})
    except ValidationError as error:
        require(error.errors()[0]["type"] == "extra_forbidden", f"an unknown key: {error}")
    else:
        require(False, "an unknown key of its table is not refused")
    require(bool(rule.model_config.get("frozen")), "its values can be changed after validation")


def examine(name: str, rule: type[Strategy]) -> Iterator[Finding]:
    """What came of holding a rule, with the defaults of its table, to every law.

    Args:
        name: it is called by.
        rule: its class.
    """
    made = "It can be made with the defaults of its table"
    try:
        one = rule()
    except Exception as error:
        yield Finding("strategies", name, made, "broken", first_line(error))
        return
    yield Finding("strategies", name, made, "held")
    table = Law("The table is the rule", the_table_is_the_rule)
    yield from held("strategies", name, one, (table, *LAWS))
