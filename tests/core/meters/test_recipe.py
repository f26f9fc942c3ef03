"""The recipe of ``docs/extending.md`` for a new meter, as it is printed there."""

import re
from pathlib import Path
from typing import Any

import pytest

from fedft.core import meters
from fedft.core.meters import Meter
from fedft.core.types import part_of
from tests.core.meters.federations import CASES, Case
from tests.core.meters.test_laws import read, sum_of

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def head_share() -> type[Meter]:
    section = PAGE.read_text("utf-8").split("## A new meter", 1)[1].split("\n## ", 1)[0]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert code is not None
    namespace: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code[1], str(PAGE), "exec"), namespace)
    return meters.check_foreign(namespace["HeadShare"], "recipe:HeadShare")


def definition(case: Case) -> float | None:
    total = sum(u.examples for u in case.updates)
    head = whole = 0.0
    for name, start in case.before.adapter.tensors().items():
        sent = [u for u in case.updates if name in u.tensors]
        if sent:
            mean = sum(u.examples / total * u.tensors[name] for u in sent)
            square = float((mean - start).square().sum())
            head, whole = head + square * (part_of(name) == "head"), whole + square
    return head / whole if whole else None


@pytest.mark.parametrize(
    "name", ["one rank", "many clients", "one client", "nobody came", "B stays"]
)
def test_the_meter_of_the_page_equals_its_definition(head_share: type[Meter], name: str) -> None:
    case = CASES[name]()
    expected = definition(case)
    found = read(head_share, case)["share"]
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-9))


def test_it_survives_a_secure_sum(head_share: type[Meter]) -> None:
    case = CASES["one rank"]()
    whole = read(head_share, case)["share"]
    assert 0 < whole < 1
    assert read(head_share, sum_of(case))["share"] == pytest.approx(whole, rel=1e-12)


def test_it_says_nothing_false_of_mixed_ranks(head_share: type[Meter]) -> None:
    """Only the head has a mean there."""
    assert read(head_share, CASES["mixed ranks"]())["share"] is None
