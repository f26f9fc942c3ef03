"""Seeds, metrics, errors and types."""

import pickle
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedft.core import errors, seeds
from fedft.core.overrides import overridden
from fedft.core.schedules import Schedule
from fedft.core.types import Adapter, Factors, LocalTraining, factor_name, module_of, part_of


def test_a_seed_is_a_function_of_what_it_is_for() -> None:
    base = seeds.derive(0, "batches", 3, "site-1")
    assert base == seeds.derive(0, "batches", 3, "site-1")
    others = [
        seeds.derive(1, "batches", 3, "site-1"),
        seeds.derive(0, "cohort", 3, "site-1"),
        seeds.derive(0, "batches", 4, "site-1"),
        seeds.derive(0, "batches", 3, "site-2"),
        seeds.derive(0, "batches", 31, "site-"),
    ]
    assert len({base, *others}) == 6
    assert all(0 <= s < 2**63 for s in others)


def test_generators_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    torch.rand(3, generator=seeds.torch_generator(0, "x"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "kind",
    [errors.ConfigError, errors.EnvironmentFailure, errors.QuorumFailure, errors.MismatchError,
     errors.IntegrityError, errors.SecurityRefusal, errors.Interrupted],
)  # fmt: skip
def test_errors_cross_process_boundaries(kind: type[errors.FedftError]) -> None:
    """Ray sends them from its workers."""
    back = pickle.loads(pickle.dumps(kind("what", fix="how")))
    assert (type(back), str(back), back.exit_code) == (kind, "what\n  → how", kind.exit_code)
    rejected = pickle.loads(pickle.dumps(errors.UpdateRejected("nan", "site-1: NaN")))
    assert (rejected.reason, rejected.what) == ("nan", "site-1: NaN")


def test_exit_codes_are_those_that_users_rely_on() -> None:
    codes = {c.__name__: c.exit_code for c in errors.FedftError.__subclasses__()}
    assert codes == {
        "ConfigError": 2, "EnvironmentFailure": 3, "QuorumFailure": 4, "MismatchError": 5,
        "IntegrityError": 6, "SecurityRefusal": 7, "Interrupted": 130, "UpdateRejected": 1,
    }  # fmt: skip


@given(st.sampled_from(["A", "B", "R"]), st.sampled_from(["q", "layer.0.attention.query"]))
def test_names_of_factors_can_be_taken_apart(part: str, module: str) -> None:
    name = factor_name(module, part)  # type: ignore[arg-type]
    assert (part_of(name), module_of(name)) == (part, module)
    assert part_of("base_model.model.classifier.weight") == "head"


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="r, d_in"):
        Factors(torch.zeros(2, 5), torch.zeros(4, 3), 1.0)
    with pytest.raises(ValueError, match="R must be"):
        Factors(torch.zeros(2, 5), torch.zeros(4, 2), 1.0, torch.zeros(3, 3))


def test_an_adapter_is_replaced_not_changed() -> None:
    adapter = Adapter(
        {"q": Factors(torch.zeros(2, 5), torch.zeros(4, 2), 1.0)}, {"h": torch.zeros(3)}
    )
    other = adapter.replaced(
        {factor_name("q", "A"): torch.ones(2, 5), "h": torch.ones(3)}, scale=2.0
    )
    assert not adapter.factors["q"].A.any()
    assert other.factors["q"].A.all()
    assert other.factors["q"].scale == 2.0
    with pytest.raises(KeyError):
        adapter.replaced({"x": torch.ones(1)})
    with pytest.raises(TypeError):
        adapter.factors["q"] = other.factors["q"]  # type: ignore[index]


def test_a_rule_overlays_only_what_it_asks_for() -> None:
    table = LocalTraining(lr=0.1, epochs=3)
    assert table.overlaid(LocalTraining(proximal_mu=0.5)) == LocalTraining(
        lr=0.1, epochs=3, proximal_mu=0.5
    )


def test_a_rule_can_ask_for_what_is_the_default() -> None:
    """Every field: the default, asked for, wins over a table that says otherwise."""
    default = LocalTraining()
    other: dict[str, Any] = {
        "epochs": 3,
        "steps": 7,
        "batch_size": 2,
        "lr": 0.1,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 0.1,
        "clip_norm": None,
        "proximal_mu": 0.2,
        "tail_penalty": 0.3,
        "tail_keep": 0.4,
        "dp_noise": 0.5,
        "dp_clip": 0.6,
        "accumulate": 2,
        "options": {"betas": (0.8, 0.9)},
        "schedule": Schedule("linear"),
        "label_smoothing": 0.1,
        "class_weights": {"animal": 2.0},
        "neftune_alpha": 5.0,
    }
    assert other.keys() == {f.name for f in fields(LocalTraining)} - {"asked"}
    table = LocalTraining(**other)
    for name in other:
        got = table.overlaid(default.asking(**{name: getattr(default, name)}))
        assert got == replace(table, **{name: getattr(default, name)}), name
    assert table.overlaid(default) == table, "nothing is asked for"
    both = default.asking(epochs=1).asking(proximal_mu=0.0)
    assert table.overlaid(both) == replace(table, epochs=1, proximal_mu=0.0)
    assert table.overlaid(both).asked == (), "what trains has no rule left in it"


def test_what_a_module_runs_is_put_back_whatever_it_was() -> None:
    layer, x = torch.nn.Identity(), torch.ones(1)
    with overridden(layer, lambda value: value + 1):
        with overridden(layer, lambda value: value + 2):
            assert layer(x) == 3
        assert layer(x) == 2
        with pytest.raises(ZeroDivisionError), overridden(layer, lambda _: 1 / 0):
            layer(x)
        assert layer(x) == 2
    assert layer(x) == 1
    assert "forward" not in vars(layer)
