"""Every law of rules is broken by a rule that breaks it, and by no other: the controls of the laws."""

import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from fedft import cli, conformance
from fedft.conformance import rules
from fedft.conformance.laws import Law, held
from fedft.core.errors import ConfigError
from fedft.core.types import Adapter, ClientUpdate, Factors, ServerState, Site, TrainPlan
from fedft.strategies import RULES, FedAvgLoRA, FlexLoRA, Strategy
from fedft.strategies.base import mean_of

HERE = "tests.conformance.test_rules"


class Listed(FedAvgLoRA):
    """FedAvg that asks for all replies, so that one law less is about it."""

    @property
    def uses_mean_only(self) -> bool:
        return False


class FirstComesFirst(Listed):
    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        usable = [u for u in updates if u.examples]
        following = replace(state, round=state.round + 1)
        if not usable:
            return following
        return replace(following, adapter=state.adapter.replaced(usable[0].tensors))


class Counting(Listed):
    """Weights by counts, not by shares."""

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        total = sum(u.examples for u in updates)
        w = total / (1 + total)
        mean = mean_of(updates)
        old = state.adapter.tensors()
        moved = {n: (old[n].double().lerp(t.double(), w)).to(t.dtype) for n, t in mean.items()}
        return replace(state, adapter=state.adapter.replaced(moved))


class CountsTheEmpty(Listed):
    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        loud = [replace(u, examples=max(1, u.examples)) for u in updates]
        return super().aggregate(state, loud)


class Shrinking(Listed):
    """A round of nobody shrinks the model."""

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().aggregate(state, updates)
        if any(u.examples for u in updates):
            return after
        return replace(after, adapter=after.adapter.replaced(_halved(after.adapter)))


class Writing(Listed):
    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().combine(state, updates)
        for tensor in updates[0].tensors.values():
            tensor.mul_(2)
        return after


class Rounding(Listed):
    """Gives back another dtype."""

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().combine(state, updates)
        bf16 = {name: t.to(torch.bfloat16) for name, t in after.adapter.head.items()}
        return replace(after, adapter=Adapter(after.adapter.factors, bf16))


class Turning(Listed):
    """Gives back a view that no checkpoint stores."""

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().combine(state, updates)
        slots = {"turned": next(iter(after.adapter.factors.values())).A.T}
        return replace(after, slots=slots)


class Remembering(Listed):
    seen: ClassVar[Any] = itertools.count()

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        slots = {"seen": torch.tensor([float(next(self.seen))])}
        return replace(super().combine(state, updates), slots=slots)


class Drawing(Listed):
    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        slots = {"drawn": torch.tensor([random.SystemRandom().random()])}
        return replace(super().combine(state, updates), slots=slots)


class Halving(Listed):
    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().combine(state, updates)
        return replace(after, adapter=after.adapter.replaced(_halved(after.adapter)))


class SaysMeanOnly(FlexLoRA):
    @property
    def mixed_ranks(self) -> bool:
        return False

    @property
    def uses_mean_only(self) -> bool:
        return True


class KeepsInSecret(Listed):
    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        plan = super().plan(state, site)
        return replace(plan, keep=frozenset({"A"}), send=plan.send - {"A"})


class AsksForTheFrozen(Listed):
    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        plan = super().plan(state, site)
        return replace(plan, train=plan.train - {"B"})


class StartsAnew(Listed):
    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        plan = super().plan(state, site)
        return replace(plan, start=plan.start.replaced({}))


class SaysMixedRanks(Listed):
    @property
    def mixed_ranks(self) -> bool:
        return True


class FailsAtZero(Listed):
    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().combine(state, updates)
        factors = {
            module: Factors(f.A, f.B / f.B.norm() * 2.0, f.scale)
            if not state.adapter.factors[module].B.any()
            else f
            for module, f in after.adapter.factors.items()
        }
        if len(updates) == 1 and state.round == 1:
            raise ZeroDivisionError("one client has no variance")
        return replace(after, adapter=Adapter(factors, after.adapter.head))


def _halved(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: t / 2 for name, t in adapter.tensors().items()}


BROKEN: dict[type[Strategy], set[str]] = {
    FirstComesFirst: {"The order of arrival changes no bit"},
    Counting: {"Only shares of the examples count"},
    CountsTheEmpty: {
        "A client without examples changes no bit",
        "A round without updates changes no tensor",
    },
    Shrinking: {"A round without updates changes no tensor"},
    Writing: {"Arguments are not written to"},
    Rounding: {"The new state has the tensors of the old one"},
    Turning: {"The new state has the tensors of the old one"},
    Remembering: {"The same inputs give the same bytes"},
    Drawing: {"The same inputs give the same bytes"},
    Halving: {"Clients that learned nothing leave the model where it is"},
    SaysMeanOnly: {"The mean of the replies gives the same bits as they do"},
    KeepsInSecret: {"Plans are consistent"},
    AsksForTheFrozen: {"Plans are consistent"},
    StartsAnew: {"Plans are consistent"},
    SaysMixedRanks: {"Every rank up to the global one is served, and none above it"},
    FailsAtZero: {"A first round works, of one client and of four"},
}
"""A rule → the laws that it must be found to break; breaking one may well break others."""


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_rule_that_breaks_a_law_is_found(rule: type[Strategy]) -> None:
    found = {f.law: f.why for f in rules.examine("x", rule) if f.outcome == "broken"}
    assert BROKEN[rule] <= found.keys()
    assert all(found.values()), "each says what was seen"


def test_every_law_has_a_rule_that_breaks_it() -> None:
    laws = {law.says for law in rules.LAWS}
    controls = set().union(*BROKEN.values())
    assert laws - controls == {"Plans and replies can be sent"}  # the next test
    assert controls <= laws


def test_a_reply_that_no_message_carries_is_found() -> None:
    class Odd(Listed):
        def plan(self, state: ServerState, site: Site) -> TrainPlan:
            plan = super().plan(state, site)
            head = {name: t.to(torch.complex64) for name, t in plan.start.head.items()}
            return replace(plan, start=Adapter(plan.start.factors, head))

    law = next(law for law in rules.LAWS if law.says == "Plans and replies can be sent")
    assert next(held("strategies", "odd", Odd(), [law])).outcome == "broken"
    assert next(held("strategies", "even", Listed(), [law])).outcome == "held"


@pytest.mark.parametrize("rule", [FedAvgLoRA, FlexLoRA])
def test_rules_of_our_own_are_found_sound(rule: type[Strategy]) -> None:
    assert rule in RULES
    assert {f.outcome for f in rules.examine("x", rule)} <= {"held", "not asked"}


def test_a_rule_that_cannot_be_made_or_read_is_found() -> None:
    class Needy(Listed):
        steps: int

    class Lax(Listed, extra="ignore"):
        pass

    class Fluid(Listed, frozen=False):
        pass

    (finding,) = rules.examine("needy", Needy)
    assert (finding.law, finding.outcome) == (
        "It can be made with the defaults of its table",
        "broken",
    )
    for rule, why in ((Lax, "an unknown key"), (Fluid, "can be changed")):
        found = {f.law: f.why for f in rules.examine("x", rule) if f.outcome == "broken"}
        assert why in found["The table is the rule"]


def test_whatever_a_member_raises_is_a_finding() -> None:
    def fail(_: object) -> None:
        raise KeyError("of its own")

    law = Law[object]("It works", fail)
    (finding,) = held("things", "x", object(), [law])
    assert (finding.outcome, finding.why) == ("broken", "KeyError: 'of its own'")
    (skipped,) = held("things", "x", object(), [replace(law, of=lambda _: False)])
    assert skipped.outcome == "not asked"


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("no-such-package", "registers anything"),
        (f"{HERE}:mean_of", "no rule, as it is a function"),
        (f"{HERE}:NoSuch", "has no NoSuch"),
        ("no_such_module:X", "there is no module"),
    ],
)
def test_what_cannot_be_checked_is_told(package: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(conformance.check(package))


def test_the_command_fails_on_a_broken_rule_and_not_on_a_sound_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedft", "check-plugin", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        return int(ended.value.code or 0), capsys.readouterr().out

    code, out = run(f"{HERE}:Halving")
    assert code == 1
    assert "1 broken" in out and "the model moved by" in out
    code, out = run(f"{HERE}:Listed", "--json")
    assert code == 0
    assert {finding["outcome"] for finding in json.loads(out)} == {"held", "not asked"}
