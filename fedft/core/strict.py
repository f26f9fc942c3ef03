"""What every table of settings is: frozen, and strict about what it is given."""

import re
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""From 0 to below 1."""

_TOO_LARGE = 10**18


def _types(annotation: Any) -> set[type]:
    """The types that an annotation allows, those of list items not among them."""
    if isinstance(annotation, type):
        return {annotation}
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return {found for arg in get_args(annotation) for found in _types(arg)}


def check_numbers(model: type[BaseModel], table: Any) -> None:
    """Refuse what pydantic would let pass for a number, and what no machine can count to.

    Args:
        model: of a table.
        table: as it was given.

    Raises:
        ValueError: a key of numbers is true or false, or has too many digits.
    """
    if not isinstance(table, dict):
        return
    given = cast(dict[str, Any], table)
    for name, field in model.model_fields.items():
        key = field.alias or name
        value, types = given.get(key, given.get(name)), _types(field.annotation)
        if isinstance(value, bool) and types & {int, float} and bool not in types:
            raise ValueError(f"{key} = {str(value).lower()}: a number is expected")
        if isinstance(value, int) and abs(value) >= _TOO_LARGE and types & {int, float}:
            raise ValueError(f"{key}: a number of less than 19 digits is expected")


def check_pattern(key: str, names: tuple[str, ...] | str) -> None:
    """Refuse a regular expression that is none; a list of names is none."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(
                f"{key} = {names!r} is no regular expression: {error}; names of layers are a list, "
                f"{key} = [{names!r}]"
            ) from error


class Table(BaseModel):
    """One table of the TOML: frozen, strict about unknown keys, kebab-case in the file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        # `model` is a word of the field, not of pydantic.
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, table: Any) -> Any:
        check_numbers(cls, table)
        return table
