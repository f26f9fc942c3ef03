"""Rules that users wrote with the names of before keep working, and are told the new ones."""

import warnings
from collections.abc import Sequence

import pytest

from fedft.core.types import ClientUpdate, Part, ServerState
from fedft.strategies import RULES, FedAvgLoRA, FedBuff, FedSVD
from fedft.strategies.base import ALL_PARTS, Strategy
from fedft.strategies.renamed import RENAMED


def test_no_rule_of_ours_declares_an_old_name() -> None:
    for rule in (Strategy, *(cls for r in RULES for cls in r.__mro__ if issubclass(cls, Strategy))):
        for old, new in RENAMED.items():
            assert (old in vars(rule)) == (new in vars(rule)), (rule, old)


def test_a_rule_with_old_names_is_read_by_the_new_ones() -> None:
    with pytest.warns(DeprecationWarning) as told:

        class Theirs(FedAvgLoRA):
            @property
            def mean_only(self) -> bool:
                return False

            @property
            def steady(self) -> frozenset[Part]:
                return frozenset({"A"})

            @property
            def buffer(self) -> int | None:
                return 3

            def takes(self, method: str) -> bool:
                return method == "theirs"

    said = sorted(str(one.message) for one in told)
    assert said == sorted(
        f"Theirs.{old} is called {new} now; the old name goes with the next release"
        for old, new in RENAMED.items()
    )
    assert {one.filename for one in told} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule = Theirs()
        assert rule.uses_mean_only is False
        assert rule.comparable == {"A"}
        assert rule.buffer_size == 3
        assert rule.supports("theirs")
        assert not rule.supports("lora")
        assert rule.mean_only is False  # its own, as it wrote it


def test_what_a_rule_of_before_takes_over_by_super_is_what_it_was() -> None:
    with pytest.warns(DeprecationWarning, match="Theirs.steady is called comparable"):

        class Theirs(FedSVD):
            @property
            def steady(self) -> frozenset[Part]:
                return super().steady | {"router"}  # type: ignore[misc]

    with pytest.warns(DeprecationWarning, match="is called comparable now"):
        assert Theirs().comparable == FedSVD().comparable | {"router"}
    assert FedSVD().comparable != ALL_PARTS


def test_rules_of_ours_answer_to_the_old_names_and_say_so() -> None:
    cases: list[tuple[Strategy, str, object]] = [
        (FedAvgLoRA(), "mean_only", True),
        (FedAvgLoRA(), "steady", ALL_PARTS),
        (FedBuff(size=4), "buffer", 4),
        (FedBuff(size=4), "mean_only", False),
    ]
    for rule, old, expected in cases:
        with pytest.warns(DeprecationWarning, match=f"{old} is called {RENAMED[old]}") as told:
            assert getattr(rule, old) == expected
        assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="takes is called supports"):
        assert FedAvgLoRA().takes("lora")  # type: ignore[attr-defined]


def test_a_rule_that_has_both_names_is_for_two_releases_and_hears_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Theirs(Strategy):
            @property
            def buffer(self) -> int | None:
                return 1

            @property
            def buffer_size(self) -> int | None:
                return 2

            def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
                return state

        assert (Theirs().buffer, Theirs().buffer_size) == (1, 2)
        assert Theirs().model_dump() == {"name": ""}
