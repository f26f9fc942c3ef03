"""The laws that hold for every meter. A new one gets a row in ``federations.py`` and is held to them."""

import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedft.core import algebra, meters
from fedft.core.folding import Folded, fold
from fedft.core.meters import METERS, Curve, Meter, Panel, Plot, Round
from fedft.core.meters.panel import plain
from fedft.core.types import ClientUpdate
from tests.core.held import held
from tests.core.meters.federations import CASES, DEGREES, TWINS, Case, adapter, draw, reply

every_meter = pytest.mark.parametrize("kind", METERS, ids=[kind.key for kind in METERS])
every_case = pytest.mark.parametrize("name", CASES)


def folded_for(case: Case, *kinds: type[Meter]) -> tuple[Panel, Folded]:
    """What a round does: the fold gathers what the meters need, and no more."""
    panel = Panel(kinds)
    folded = Folded(case.personal, products=panel.needs("products"), squares=panel.needs("each"))
    for update in case.updates:
        folded.add(update)
        panel.add(update)
    return panel, folded


def read(kind: type[Meter], case: Case) -> Any:
    """The reading of one meter alone; None where it has nothing to say."""
    panel, folded = folded_for(case, kind)
    line = panel.line(case.before, folded, case.after)
    assert "meter_errors" not in line, line["meter_errors"]
    return line.get(kind.key) if kind.top else line.get("meters", {}).get(kind.key)


def assert_alike(found: Any, expected: Any, rel: float = 1e-8, tiny: float = 1e-10) -> None:
    """Nested readings are equal up to rounding. Of lists, one may go on with zeros."""
    if isinstance(expected, Mapping):
        assert isinstance(found, Mapping)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_alike(found[key], value, rel, tiny)
    elif isinstance(expected, Sequence):
        longest = max(len(found), len(expected))
        pair = [[*x, *[0.0] * (longest - len(x))] for x in (found, expected)]
        assert pair[0] == pytest.approx(pair[1], rel=rel, abs=1e-8)
    elif expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=rel, abs=tiny)


def test_every_meter_has_its_rows() -> None:
    keys = [kind.key for kind in METERS]
    assert keys == list(dict.fromkeys(keys))
    assert keys == list(TWINS) == list(DEGREES)


@every_meter
@every_case
def test_it_equals_its_definition(kind: type[Meter], name: str) -> None:
    case = CASES[name]()
    expected = TWINS[kind.key](case)
    if kind.key == "heads" and expected is None:
        assert read(kind, case) is None
    else:
        assert_alike(read(kind, case), expected)


@every_meter
@every_case
def test_the_order_of_the_clients_does_not_matter(kind: type[Meter], name: str) -> None:
    case = CASES[name]()
    turned = replace(case, updates=case.updates[1::2][::-1] + case.updates[::2])
    assert_alike(read(kind, turned), read(kind, case))


@every_meter
@every_case
def test_the_scale_of_the_counts_and_clients_without_examples_change_nothing(
    kind: type[Meter], name: str
) -> None:
    case = CASES[name]()
    more = tuple(replace(u, examples=7 * u.examples) for u in case.updates)
    start = case.before.adapter
    empty = replace(reply(99, start, 5.0), site="nobody", examples=0)
    reference = read(kind, case)
    assert read(kind, replace(case, updates=(empty, *case.updates, empty))) == reference
    assert_alike(read(kind, replace(case, updates=more)), reference, rel=1e-12)


@every_meter
@every_case
def test_it_scales_as_it_says(kind: type[Meter], name: str) -> None:
    case = CASES[name]()
    once, twice = read(kind, case), read(kind, case.scaled(2.0))
    if once is None:
        assert twice is None
        return
    for key, value in once.items():
        factor = 2.0 ** DEGREES[kind.key].get(key, 0)
        assert_alike(_times(factor, value), twice[key])


def _times(factor: float, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _times(factor, entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [factor * entry for entry in value]
    return None if value is None else factor * value


@every_meter
@every_case
def test_it_says_the_same_when_more_is_gathered_than_it_needs(kind: type[Meter], name: str) -> None:
    """Beside all other meters, to the last bit: what it is not given it did not read."""
    case = CASES[name]()
    panel, folded = folded_for(case, *METERS)
    line = panel.line(case.before, folded, case.after)
    beside = line.get(kind.key) if kind.top else line.get("meters", {}).get(kind.key)
    assert beside == read(kind, case)


@every_meter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_read_as_json(kind: type[Meter], value: float) -> None:
    for case in (CASES["one rank"](), CASES["experts"]()):
        broken = case.after.adapter.replaced(
            {n: torch.full_like(t, value) for n, t in case.after.adapter.tensors().items()}
        )
        found = read(kind, replace(case, after=replace(case.after, adapter=broken)))
        assert json.loads(json.dumps(found, allow_nan=False)) == found


@every_meter
@every_case
def test_it_changes_nothing_that_it_is_shown(kind: type[Meter], name: str) -> None:
    case = CASES[name]()

    def tensors() -> list[Tensor]:
        states = (case.before, case.after)
        found = [
            t for u in case.updates for a in (u.tensors, u.start.tensors()) for t in a.values()
        ]
        found += [t for s in states for t in s.adapter.tensors().values()]
        return found + [x for s in states for f in s.delta.values() for x in (f.A, f.B)]

    copies = [t.clone() for t in tensors()]
    read(kind, case)
    assert all(torch.equal(x, y) for x, y in zip(copies, tensors(), strict=True))


# ── what it needs of the replies ──────────────────────────────────────────────────────────────


def sum_of(case: Case) -> Case:
    """The one reply that a secure sum over the clients makes of all of them."""
    folded = fold(case.updates, case.personal)
    mean = folded.mean_update(case.before.adapter)
    told = {"loss": folded.loss, "grad_A_norm": folded.dead_start, "grad_B_norm": 1.0}
    numbers = {key: value for key, value in told.items() if value is not None}
    return replace(case, updates=(replace(mean, metrics=numbers),))


ONE_RANK = [n for n in CASES if n not in ("nobody came", "mixed ranks", "layer-pruned")]
"""Where the replies have a sum, of tensors that all clients sent."""


class Mean(Meter):
    """Needs a sum, and reads all that one gives."""

    key = "mean_of_replies"

    def value(self, round_: Round) -> dict[str, Any]:
        replies = round_.replies
        factors = {
            n: None if t is None else t.flatten().tolist()
            for n, t in replies.mean_factors().items()
        }
        sent = {name: tensor.flatten().tolist() for name, tensor in replies.mean().items()}
        told = {"loss": replies.loss, "dead_start": replies.dead_start}
        return {"factors": factors, "sent": sent, "examples": replies.examples, **told}


class Spread(Meter):
    """Says that it needs each, and does: the positive control."""

    key = "spread_of_replies"
    needs = "each"

    def value(self, round_: Round) -> dict[str, Any]:
        return {"spread": round_.replies.spread}


SUMS = [Mean, *(kind for kind in METERS if kind.needs == "sum")]


@pytest.mark.parametrize("kind", SUMS, ids=[kind.key for kind in SUMS])
@pytest.mark.parametrize("name", ONE_RANK)
def test_what_needs_a_sum_says_the_same_of_the_sum(kind: type[Meter], name: str) -> None:
    case = CASES[name]()
    assert_alike(read(kind, sum_of(case)), read(kind, case), rel=1e-12)


def test_what_needs_each_does_not_say_the_same_of_the_sum() -> None:
    case = CASES["one rank"]()
    assert read(Spread, sum_of(case)) != read(Spread, case)


@pytest.mark.parametrize("name", ["one rank", "many clients", "one client", "merged into the base"])
def test_what_needs_products_says_the_same_of_their_mean(name: str) -> None:
    """One reply of the stacked rank, whose product is the mean of the products."""
    case = CASES[name]()
    shares = [u.examples / sum(v.examples for v in case.updates) for u in case.updates]
    modules = case.before.adapter.factors
    stacked = case.before.adapter.map_factors(
        {m: algebra.stack([u.adapter.factors[m] for u in case.updates], shares) for m in modules}
    )
    examples = sum(u.examples for u in case.updates)
    one = ClientUpdate("all", examples, stacked.tensors(), stacked)
    assert [kind.key for kind in METERS if kind.needs == "products"] == ["bias", "lag", "spectrum"]
    alone = replace(case, updates=(one,))
    for kind in METERS:
        if kind.needs == "products":
            found, expected = read(kind, alone), read(kind, case)
            if kind.key == "lag":  # its other numbers are of sums
                found, expected = ({"jump": x["function_jump"]} for x in (found, expected))
            assert_alike(found, expected)


READS = {
    "clients": ("products", "each"),
    "mean_updates": ("products",),
    "starts": ("products",),
    "moved": ("each",),
    "spread": ("each",),
}


@pytest.mark.parametrize("needs", ["sum", "products", "each"])
@pytest.mark.parametrize("what", READS)
def test_a_meter_is_given_what_it_declares_and_no_more(needs: Any, what: str) -> None:
    class Curious(Meter):
        key = "curious"

        def value(self, round_: Round) -> dict[str, Any]:
            found = getattr(round_.replies, what)
            if callable(found):
                found()
            return {"read": True}

    Curious.needs = needs
    case = CASES["one rank"]()
    panel, folded = folded_for(case, Curious)
    line = panel.line(case.before, folded, case.after)
    if needs in READS[what]:
        assert line == {"meters": {"curious": {"read": True}}}
    else:
        assert f"not given {what}" in line["meter_errors"]["curious"]
        assert repr(READS[what][0]) in line["meter_errors"]["curious"]


def test_only_a_meter_that_needs_each_sees_replies() -> None:
    seen: list[tuple[str, str]] = []

    class Sees(Meter):
        def add(self, update: ClientUpdate) -> None:
            seen.append((self.key, update.site))

        def value(self, round_: Round) -> None:
            return None

    kinds = [type(f"Sees{n}", (Sees,), {"key": n, "needs": n}) for n in ("sum", "products", "each")]
    case = CASES["one rank"]()
    folded_for(case, *kinds)
    assert seen == [("each", u.site) for u in case.updates]


class Hoards(Meter):
    """Keeps every reply: the positive control of the law of memory."""

    key = "hoards"
    needs = "each"

    def __init__(self) -> None:
        self.replies: list[ClientUpdate] = []

    def add(self, update: ClientUpdate) -> None:
        self.replies.append(update)

    def value(self, round_: Round) -> None:
        return None


@pytest.mark.parametrize("kind", [*METERS, Hoards], ids=lambda kind: kind.key)
def test_its_memory_does_not_grow_with_the_clients(kind: type[Meter]) -> None:
    start = adapter(0)
    panel, sizes, gone = Panel([kind]), list[int](), list[weakref.ref[Tensor]]()
    for k in range(120):
        update = reply(k % 50, start)
        gone += [weakref.ref(t) for t in update.tensors.values()]
        panel.add(update)
        del update
        sizes.append(held(panel))
    bounded = max(sizes[60:]) <= max(sizes[:60]) and all(ref() is None for ref in gone)
    assert bounded == (kind is not Hoards)


# ── a meter that fails ────────────────────────────────────────────────────────────────────────


class Fails(Meter):
    key = "fails"
    needs = "each"
    where = "value"
    plots = (Plot("t", "q", (Curve(("x",), "x"),)),)

    def __init__(self) -> None:
        self.fail("init")

    def fail(self, where: str) -> None:
        if where == self.where:
            raise ZeroDivisionError(f"in {where}")

    def add(self, update: ClientUpdate) -> None:
        self.fail("add")

    def value(self, round_: Round) -> Any:
        self.fail("value")
        return {"tensor": draw(0, 2)}


@pytest.mark.parametrize("where", ["init", "add", "value", "nowhere"])
def test_a_meter_that_fails_costs_its_reading_alone_and_is_named(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    case, kind = (
        CASES["one rank"](),
        type("Fails", (Fails,), {"where": where, "key": f"in-{where}"}),
    )
    panel, folded = folded_for(case, *METERS)
    alone = panel.line(case.before, folded, case.after)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            panel, folded = folded_for(case, kind, *METERS)
            line = panel.line(case.before, folded, case.after)
            error = line.pop("meter_errors")
            assert line == alone
            expected = (
                "TypeError: a reading holds a Tensor" if where == "nowhere" else f"in {where}"
            )
            assert list(error) == [kind.key]
            assert expected in error[kind.key]
    told = [r for r in caplog.records if kind.key in r.getMessage()]
    assert len(told) == 1  # not once a round


def test_a_reading_is_plain_data() -> None:
    value = {"a": [1, 2.5, None, True, "x"], 3: (float("nan"), float("-inf"))}
    assert plain(value) == {"a": [1, 2.5, None, True, "x"], "3": [None, None]}
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(RecursionError):
        plain(endless)
    for bad in (object(), draw(0, 1), {1, 2}, b"x", lambda: 0):
        with pytest.raises(TypeError, match="a reading holds a"):
            plain({"x": bad})


def test_no_import_of_a_meter_loads_torch() -> None:
    """Reports read how meters are drawn."""
    import subprocess
    import sys

    code = "import sys, fedft.core.meters, fedft.report.page; sys.exit('torch' in sys.modules)"
    root = Path(meters.__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
