"""A `[strategy]` table that names somebody else's class is validated by that class."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import Field, PositiveFloat, TypeAdapter, field_validator

from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.plugins import USER, reference_of
from fedft.core.types import Adapter, ClientUpdate, ServerState
from fedft.server.config import RunConfig
from fedft.server.config_file import configured, parse_config, parse_toml
from fedft.strategies import REGISTRY, RULES, AnyStrategy, FedAvgLoRA, FedProx, FedSB, Strategy
from fedft.strategies.combinator import Combinator

ANY = TypeAdapter(AnyStrategy)
HERE = "tests.strategies.test_named"


class Damped(FedAvgLoRA):
    """With values of many kinds."""

    step: PositiveFloat = 0.5
    layer_weights: dict[str, float] = {}
    bound: float | None = None

    @field_validator("step")
    @classmethod
    def _below_ten(cls, step: float) -> float:
        if step == 7:
            raise ZeroDivisionError("a mistake of its author")
        if step > 10:
            raise ValueError("must be at most 10, says its author")
        return step


class Over(Combinator):
    """A stranger's rule over any other."""

    strength: PositiveFloat = 1.0


class Needy(FedAvgLoRA):
    """It cannot be made of its defaults."""

    steps: int = Field()


class Forgetful(FedAvgLoRA):
    """None is not its default, and TOML has no null."""

    bound: float | None = 1.0


class Opaque(FedAvgLoRA):
    """It holds what no file can."""

    what: Any = None


class Unfinished(Strategy):
    """It says nothing of combine."""


def read(table: dict[str, Any]) -> RunConfig:
    return configured(RunConfig(), {"strategy": table})


def test_a_table_is_validated_by_its_class_and_comes_back_from_toml() -> None:
    table = {"name": f"{HERE}:Damped", "step": 0.25, "layer-weights": {"q": 2.0}}
    config = read(table)
    rule = config.strategy
    assert isinstance(rule, Damped)
    assert (rule.step, rule.layer_weights, rule.name) == (0.25, {"q": 2.0}, f"{HERE}:Damped")
    assert parse_toml(config.to_toml(), "x") == config


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"stp": 1}, "[strategy] stp: unknown key; did you mean 'step'?"),
        ({"step": -1}, "[strategy] step = -1: must be greater than 0"),
        ({"step": "x"}, "[strategy] step = 'x': a number is expected"),
        ({"step": True}, "[strategy] step = true: a number is expected"),
        ({"step": 11}, "[strategy] step = 11: must be at most 10, says its author"),
        ({"layer-weights": {"q": "x"}}, "[strategy.layer-weights] q = 'x': a number is expected"),
        ({"step": 7}, "Damped raised ZeroDivisionError over this table: a mistake of its author"),
        ({"inner": {}}, "[strategy] inner: unknown key"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_its_faults_are_told_in_the_same_sentences(
    table: dict[str, Any], said: str, inside: bool
) -> None:
    table = {"name": f"{HERE}:Damped", **table}
    if inside:
        table = {"name": "fedprox", "inner": {"name": f"{HERE}:Over", "inner": table}}
        said = said.replace("[strategy", "[strategy.inner.inner")
    with pytest.raises(ConfigError) as caught:
        read(table)
    assert said in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_strangers_over_ours_over_strangers() -> None:
    inner = {"name": "fedprox", "mu": 0.1, "inner": {"name": f"{HERE}:Damped", "step": 2.0}}
    config = read({"name": f"{HERE}:Over", "strength": 3.0, "inner": inner})
    assert isinstance(config.strategy, Over)
    assert isinstance(config.strategy.inner, FedProx)
    assert config.strategy.inner.inner == Damped(name=f"{HERE}:Damped", step=2.0)
    assert parse_toml(config.to_toml(), "x") == config
    assert config.strategy.label == f"{HERE}:Over over fedprox over {HERE}:Damped"


def test_an_object_is_recorded_under_the_name_that_finds_it() -> None:
    config = RunConfig(strategy=Damped(step=3.0))
    assert config.strategy.name == f"{HERE}:Damped"
    assert parse_toml(config.to_toml(), "x") == config
    assert configured(config, {"seed": 4}).strategy == config.strategy
    assert RunConfig(strategy=FedProx(mu=0.3)).strategy == FedProx(mu=0.3)
    with pytest.raises(ConfigError, match="cannot be run"):
        configured(RunConfig(), {"strategy": Damped})  # a class is no rule yet


def test_a_class_of_a_function_is_found_while_the_process_lives() -> None:
    class Local(Damped):
        pass

    config = RunConfig(strategy=Local(step=3.0))
    assert isinstance(configured(config, {"seed": 4}).strategy, Local)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Forgetful(bound=None), "bound cannot be written to config.toml"),
        (Opaque(what=object()), "cannot be written to config.toml"),
        (Opaque(what=[None]), "cannot be written to config.toml"),
        (Opaque(what={1, 2}), "what cannot be written to config.toml"),
    ],
)
def test_an_object_that_no_run_could_be_resumed_with_is_refused(rule: Strategy, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(RunConfig(), {"strategy": rule})
    assert said in str(caught.value)
    configured(RunConfig(), {"strategy": Forgetful(bound=2.0)})  # the control


def test_what_cannot_be_made_or_is_unfinished_is_told() -> None:
    with pytest.raises(ConfigError, match=r"\[strategy\] steps is missing"):
        read({"name": f"{HERE}:Needy"})
    with pytest.raises(ConfigError, match="Unfinished is no rule: it does not define combine"):
        read({"name": f"{HERE}:Unfinished"})


def test_a_run_directorys_word_is_not_enough_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "_known", {})
    table = {"name": "fedprox", "inner": {"name": f"{HERE}:Damped"}}
    text = 'seed = 1\n[strategy]\nname = "fedprox"\n[strategy.inner]\n' + f'name = "{HERE}:Damped"'
    for read_it in (
        lambda: parse_config({"strategy": table}),
        lambda: parse_toml(text, "x"),
        lambda: RunConfig.model_validate({"strategy": table}),
        lambda: ANY.validate_python(table),
    ):
        with pytest.raises(SecurityRefusal, match="--allow"):
            read_it()
    assert parse_config({"strategy": table}, trust=USER).strategy.label.endswith("Damped")


def test_our_own_rules_come_back_under_their_names_and_first() -> None:
    for rule in RULES:
        one = rule()
        assert next(iter(one.model_dump())) == "name"
        assert REGISTRY.find(one.name).value is rule
        assert REGISTRY.find(reference_of(rule)).name == one.name


def test_a_rule_that_gives_back_nothing_is_named() -> None:
    class Nothing(FedAvgLoRA):
        def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
            return None  # type: ignore[return-value]

    from fedft.conformance.federation import initial, replies

    rule = Nothing(name="nothing")
    state = initial(rule)
    with pytest.raises(ConfigError, match="nothing gave back a NoneType"):
        rule.aggregate(state, replies(rule, state))


def other_head(adapter: Adapter) -> Adapter:
    return replace(adapter, head=dict(list(adapter.head.items())[1:]))


def other_shape(adapter: Adapter) -> Adapter:
    head = {name: t.repeat(2, *[1] * (t.ndim - 1)) for name, t in adapter.head.items()}
    return replace(adapter, head=head)


def no_cores(adapter: Adapter) -> Adapter:
    return adapter.map_factors({m: replace(f, R=None) for m, f in adapter.factors.items()})


@pytest.mark.parametrize(
    ("honest", "other"),
    [(FedAvgLoRA, other_head), (FedAvgLoRA, other_shape), (FedSB, no_cores)],
)
def test_a_rule_that_gives_back_other_tensors_is_named(
    honest: type[Strategy], other: Callable[[Adapter], Adapter]
) -> None:
    class Careless(honest):  # type: ignore[misc,valid-type]
        def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
            after = super().combine(state, updates)
            return replace(after, adapter=other(after.adapter))

    from fedft.conformance.federation import replies, warm

    state = warm(honest())
    updates = replies(honest(), state)
    assert honest().aggregate(state, updates).round == state.round + 1
    with pytest.raises(ConfigError, match="other tensors than it was given"):
        Careless().aggregate(state, updates)
