"""Terms: what they say of themselves is one schema, and what comes from others is held to it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fedft.core import parts, terms
from fedft.core.errors import MismatchError
from fedft.core.terms import Shapes, Term
from fedft.core.types import Adapter, Factors, ServerState, TrainPlan
from fedft.core.wire.schema import PlanSchema, fault, numbers
from fedft.server.pruning import narrowed

HEAD = "base_model.model.classifier.weight"


class Pull(Term):
    kind: Literal["pull"] = "pull"
    strength: Annotated[float, Field(ge=0, le=1e30)] = 1.0
    receives: ClassVar[frozenset[str]] = frozenset({"anchor"})
    sends: ClassVar[frozenset[str]] = frozenset({"drift"})
    keeps: ClassVar[frozenset[str]] = frozenset({"own-drift"})


class Count(Term):
    """A record of its own shape, under a name of its own."""

    kind: Literal["count"] = "count"
    sends: ClassVar[frozenset[str]] = frozenset({"count"})

    def shapes(self, record: str, start: Shapes, trained: Any) -> Shapes:
        return {"n": ()}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "TERMS", (Pull, Count))


def adapter(rank: int = 2, blocks: int = 2) -> Adapter:
    factors = {
        f"layer.{i}.q": Factors(torch.ones(rank, 5), torch.zeros(4, rank), 0.5)
        for i in range(blocks)
    }
    return Adapter(factors, {HEAD: torch.ones(3, 4)})


def plan(**changes: Any) -> TrainPlan:
    start = adapter()
    anchor = {name: torch.ones_like(t) for name, t in start.tensors().items()}
    return replace(TrainPlan(start, terms=(Pull(), Count()), records={"anchor": anchor}), **changes)


# ── the table of terms ────────────────────────────────────────────────────────────────────────


def test_terms_come_back_from_their_json() -> None:
    asked = (Pull(strength=0.25), Count())
    assert terms.terms_from(terms.terms_json(asked)) == asked
    assert terms.terms_from([]) == ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([{"kind": "unheard-of"}], "no term of local training"),
        ([{"kind": "os:system"}], "no term of local training"),
        ([{"kind": "pull", "force": 1}], "pull.force"),
        ([{"kind": "pull", "strength": True}], "a number is expected"),
        ([{"kind": "pull", "strength": -1.0}], "at least 0"),
        ([{"kind": "pull", "strength": float("nan")}], "finite"),
        ([{"kind": ["pull"]}], "says its kind"),
        ([{"strength": 1.0}], "says its kind"),
        (["pull"], "says its kind"),
        ("pull", "a list of at most"),
        ([{"kind": "count"}] * 17, "a list of at most"),
    ],
)
def test_what_is_no_term_is_refused(data: Any, says: str) -> None:
    with pytest.raises(MismatchError, match=says):
        terms.terms_from(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "strength", "pull", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_whatever_comes_is_terms_or_refused(data: Any) -> None:
    try:
        found = terms.terms_from(data)
    except MismatchError:
        return
    assert all(isinstance(term, Term) for term in found)


@pytest.mark.parametrize("name", ["arrays", "delta", "metrics", "Own", "a/b", "", "x" * 41])
def test_a_record_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(TypeError, match="cannot name a record"):
        type("Bad", (Term,), {"sends": frozenset({name}), "__annotations__": {}})


def test_a_record_is_not_both_kept_and_received() -> None:
    both = frozenset({"anchor"})
    with pytest.raises(TypeError, match="received and kept"):
        type("Bad", (Term,), {"receives": both, "keeps": both, "__annotations__": {}})


# ── the one schema ────────────────────────────────────────────────────────────────────────────


def test_the_schema_by_hand() -> None:
    schema = PlanSchema.of(plan(train=frozenset({"B", "head"}), send=frozenset({"B"})))
    B = {f"base_model.model.layer.{i}.q.lora_B.weight": (4, 2) for i in range(2)}
    assert schema.down.keys() == {"arrays", "anchor"}
    assert schema.down["anchor"] == {**B, HEAD: (3, 4)}
    assert schema.up == {"arrays": B, "drift": {**B, HEAD: (3, 4)}, "count": {"n": ()}}
    assert schema.kept == {"own-drift": {**B, HEAD: (3, 4)}}
    assert numbers(schema.up) == 16 + 28 + 1
    assert set(schema.state) == {f"own-drift/{name}" for name in (*B, HEAD)}


def test_two_terms_cannot_have_one_record() -> None:
    with pytest.raises(ValueError, match="both have a record"):
        plan(terms=(Pull(), Pull(strength=2.0))).schema("sends")


def test_records_are_cut_with_the_plan() -> None:
    """A frozen head, and a client with one block: of records as of the adapter nothing else travels."""
    frozen = plan().without(frozenset({"head"}))
    assert set(frozen.records["anchor"]) == set(frozen.schema("receives")["anchor"])
    assert HEAD not in frozen.records["anchor"]
    small = narrowed(plan(), (1,))
    names = set(small.records["anchor"])
    assert names == set(small.start.tensors())
    assert not any("layer.0" in name for name in names)


def test_a_record_that_no_term_has_is_not_cut_away() -> None:
    """It is a fault of the rule, and is told where the plan is encoded."""
    wrong = plan(terms=(Count(),)).trimmed()
    assert fault(wrong.records, wrong.schema("receives")).startswith("has a record 'anchor'")


@pytest.mark.parametrize("way", ["missing record", "missing", "extra", "shape", "extra record"])
def test_every_fault_is_found(way: str) -> None:
    wanted = plan().schema("receives")
    records = {record: dict(tensors) for record, tensors in plan().records.items()}
    assert fault(records, wanted) == ""
    match way:
        case "missing record":
            del records["anchor"]
        case "missing":
            del records["anchor"][HEAD]
        case "extra":
            records["anchor"]["more"] = torch.ones(1)
        case "shape":
            records["anchor"][HEAD] = torch.ones(4, 3)
        case _:
            records["more"] = {}
    assert fault(records, wanted)


def test_a_record_in_slots_comes_back() -> None:
    anchor = plan().records["anchor"]
    slots = {**terms.entries("anchor", anchor), "anchor-2/x": torch.ones(1), "m": torch.ones(1)}
    back = ServerState(adapter(), slots=slots).record("anchor")
    assert back.keys() == anchor.keys()
    assert all(back[name] is anchor[name] for name in anchor)
    assert all(map(terms.is_entry, terms.entries("anchor", anchor)))
    assert not any(
        map(terms.is_entry, ["m", "fedavgm/m/base_model.model.q.lora_A.weight", *anchor])
    )


# ── the table of parts ────────────────────────────────────────────────────────────────────────


def test_a_name_belongs_to_the_part_that_made_it() -> None:
    for row in parts.PARTS.values():
        if row.key is not None:
            name = parts.factor_name("layer.0.q", row.name)
            assert (parts.part_of(name), parts.module_of(name)) == (row.name, "layer.0.q")
    assert parts.part_of(HEAD) == "head"
    assert parts.part_of(parts.head_name("layer.0.q", 3)) == "B"
    assert parts.head_of(parts.head_name("layer.0.q", 3)) == 3
    assert frozenset(parts.PARTS) == parts.ALL_PARTS >= parts.MATRICES == {"A", "B", "R"}


def test_a_plan_names_parts_that_there_are() -> None:
    with pytest.raises(ValueError, match="'a' is no part of an adapter"):
        TrainPlan(adapter(), train=frozenset({"a"}))


def test_the_recipe_as_it_is_printed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.split("## A new record of tensors")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    made: dict[str, Any] = {"__name__": __name__}
    exec(code, made)
    term = made["Pull"]()
    asked = plan(terms=(term,))
    schema = PlanSchema.of(asked)
    assert (schema.down.keys(), schema.up.keys(), schema.kept.keys()) == (
        {"arrays", "anchor"},
        {"arrays", "distance"},
        {"own-anchor"},
    )
    assert schema.up["distance"] == schema.up["arrays"]
