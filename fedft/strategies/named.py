"""The rule that a `[strategy]` table names: one of ours, or one of somebody else's.

The table below the name is validated by the rule's own class. A rule from outside of fedft is
checked once more, for what a run needs of it: that its values can be written to ``config.toml`` and
come back as they were.
"""

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from types import GenericAlias
from typing import Annotated, Any, cast

import tomli_w
from pydantic import (
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from fedft.core.errors import ConfigError, FedftError
from fedft.core.plugins import Registry, subclass_of, trusted
from fedft.strategies.base import Strategy

_OWN: dict[str, type[Strategy]] = {}

REGISTRY: Registry[type[Strategy]] = Registry(
    "strategies", "rule", _OWN, subclass_of(Strategy, "fedft.strategies.Strategy")
)
"""Every rule's class by name; our own are entered by the package's ``__init__``."""


def enter(*rules: type[Strategy]) -> tuple[type[Strategy], ...]:
    """Make these our own rules, under the names that their classes have."""
    _OWN.update({str(rule.model_fields["name"].default): rule for rule in rules})
    return rules


def _read(table: Any, _: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Strategy:
    """A rule as it is, or the one of a table."""
    if isinstance(table, Strategy):
        return _given(table)
    given: Any = cast(Mapping[str, Any], table).get("name") if isinstance(table, Mapping) else None
    if not isinstance(given, str):
        raise PydanticCustomError(
            "no_name", "a table with the name of a rule, or a rule as an object, is expected"
        )
    try:
        member = REGISTRY.find(given, trusted(info.context))
    except ConfigError as error:
        raise _said("unknown_name", _sentence(error)) from error
    settings = {k: v for k, v in cast(Mapping[str, Any], table).items() if k != "name"}
    rules = _under_its_name(member.value)
    own = member.name in _OWN
    try:
        # As the one value of a table, so that the path of every fault has the name in it.
        rule = rules.validate_python({member.name: settings}, context=info.context)[member.name]
    except (FedftError, ValidationError):
        raise
    except Exception as error:
        if own:
            raise
        said = f"{member.name} raised {type(error).__name__} over this table: {error}"
        raise _said("value_error", said) from error
    if rule.name != member.name:
        rule = rule.model_copy(update={"name": member.name})
    return rule if own else _comes_back(rule)


def _given(rule: Strategy) -> Strategy:
    """An object from Python, under the name that finds its class again."""
    try:
        member = REGISTRY.admit(type(rule))
    except ConfigError as error:
        raise _said("value_error", _sentence(error)) from error
    if rule.name == member.name:
        return rule
    return _comes_back(rule.model_copy(update={"name": member.name}))


def _comes_back(rule: Strategy) -> Strategy:
    """Refuse a rule that a run could not be resumed with.

    Raises:
        ValueError: its values cannot be written as TOML, or are read as others.
    """
    name = rule.name
    try:
        written = tomli_w.dumps(rule.model_dump(mode="json", by_alias=True, exclude_none=True))
        table = {k: v for k, v in tomllib.loads(written).items() if k != "name"}
        again = type(rule).model_validate(table).model_copy(update={"name": name})
    except Exception as error:
        raise _said(
            "value_error",
            f"{name} cannot be written to config.toml, which a run is resumed from: "
            f"{type(error).__name__}: {error}",
        ) from error
    if again != rule:
        names = sorted(k for k, v in dict(rule).items() if getattr(again, k, None) != v)
        raise _said(
            "value_error",
            f"{name}: {', '.join(names)} cannot be written to config.toml, which a run is resumed "
            "from, and read again as it was (TOML has no null)",
        )
    return rule


@lru_cache(maxsize=256)
def _under_its_name(rule: type[Strategy]) -> TypeAdapter[dict[str, Strategy]]:
    one: Any = GenericAlias(dict, (str, rule))
    return TypeAdapter(one)


def _sentence(error: ConfigError) -> str:
    return f"{error.what}; {error.fix[:1].lower()}{error.fix[1:].removesuffix('.')}"


def _said(kind: Any, text: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{said}", {"said": text})


AnyStrategy = Annotated[SerializeAsAny[Strategy], WrapValidator(_read)]
"""Any rule: an object, or a table with its ``name``."""

__all__ = ["REGISTRY", "AnyStrategy", "enter"]
