"""Every meter against its definition on federations that nobody chose."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedft.core import algebra
from fedft.core.meters import METERS, Meter
from fedft.core.types import Factors, ServerState
from tests.core.meters.federations import TWINS, Case, adapter, leading, reply
from tests.core.meters.test_laws import assert_alike, read

client = st.tuples(
    st.integers(1, 4),  # rank
    st.sampled_from([None, "layer.0.query", "layer.1.value"]),  # what it holds
    st.integers(0, 50),  # examples
    st.sampled_from([0.0, 1e-3, 0.3, 3.0]),  # how far it moves
)


@st.composite
def federations(draw: Any) -> Case:
    clients = draw(st.lists(client, min_size=0, max_size=12))
    one_rank, seed = draw(st.booleans()), draw(st.integers(0, 2**20))
    whole = adapter(seed, 4)
    updates = []
    for k, (rank, only, examples, size) in enumerate(clients):
        start = whole if one_rank else leading(whole, rank)
        updates.append(replace(reply(seed + k, start, size, only), site=f"c{k}", examples=examples))
    after = ServerState(adapter(seed + 90, 4), 1)
    before = ServerState(whole)
    if draw(st.booleans()):
        old = {m: Factors(f.A, 0.3 * f.B, 1.0) for m, f in adapter(seed + 31, 5).factors.items()}
        grown = draw(st.booleans())
        more = adapter(seed + 32, 2).factors
        new = {m: algebra.stack([old[m], f] if grown else [f]) for m, f in more.items()}
        before, after = replace(before, delta=old), replace(after, delta=new)
    return Case(before, tuple(updates), after)


@pytest.mark.parametrize("kind", METERS, ids=[kind.key for kind in METERS])
@settings(max_examples=25, deadline=None)
@given(case=federations())
def test_it_equals_its_definition_on_any_federation(kind: type[Meter], case: Case) -> None:
    counted = replace(case, updates=tuple(u for u in case.updates if u.examples > 0))
    expected = TWINS[kind.key](counted)
    assert_alike(read(kind, case), expected, rel=1e-7, tiny=1e-9)
