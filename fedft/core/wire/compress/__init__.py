"""How tensors are compressed on the wire: a table of compressors, one file each.

``[engine] compressor`` names one, or is a table with its ``name`` and its settings. A new one is a
file here and a row in :data:`COMPRESSORS`.
"""

from typing import Annotated, Any, Final, cast

from pydantic import PlainSerializer, PlainValidator, ValidationError, ValidationInfo

from fedft.core.complaints import complaints, shown
from fedft.core.errors import ConfigError
from fedft.core.plugins import Registry, Trust, subclass_of, trusted
from fedft.core.wire.compress.base import Compressor, Key
from fedft.core.wire.compress.casts import Bf16, Cast, Fp32
from fedft.core.wire.compress.int8 import Int8

COMPRESSORS: Final[tuple[type[Compressor], ...]] = (Fp32, Bf16, Int8)
"""Every compressor, in the order in which they are listed to users."""

FP32: Final = Fp32()
"""What everything travels in unless a run says otherwise."""


def names() -> list[str]:
    """The name of every compressor."""
    return [str(one.model_fields["name"].default) for one in COMPRESSORS]


REGISTRY: Registry[type[Compressor]] = Registry(
    "compressors",
    "compressor",
    dict(zip(names(), COMPRESSORS, strict=True)),
    subclass_of(Compressor, "fedft.core.wire.compress.Compressor"),
)
"""Every compressor's class by name."""


def find(name: str, trust: Trust | None = None) -> type[Compressor]:
    """The compressor of a name.

    Args:
        name: one of ours, a registered one, or ``package.module:Class``.
        trust: what may be imported for it; None for what the process trusts.

    Raises:
        ConfigError: there is none of that name.
        SecurityRefusal: it would have to be imported, and nobody trusted asked for it.
    """
    return REGISTRY.find(name, trust).value


def compressor_of(given: object, trust: Trust | None = None) -> Compressor:
    """The compressor that a name, or a table with a name and settings, stands for.

    Args:
        given: as a configuration or the task of a run has it.
        trust: as for :func:`find`.

    Raises:
        ConfigError: it is neither, or one of its settings cannot be.
    """
    if isinstance(given, Compressor):
        REGISTRY.admit(type(given))
        return given
    table: dict[str, Any] = {"name": given}
    if isinstance(given, dict):
        given = cast(dict[str, Any], given)
        table = dict(given)
    name = table.get("name")
    if not isinstance(name, str):
        raise ConfigError(
            f"{shown(given)} is no compressor: a name is expected, or a table with a name",
            fix=f"Choose one of {', '.join(names())}.",
        )
    chosen = find(name, trust)
    if (
        chosen not in REGISTRY.own.values()
    ):  # which is called by the name that finds it, whatever it says
        del table["name"]
    try:
        return chosen.model_validate(table)
    except ValidationError as error:
        fault = complaints(error)[0]
        place = " ".join(fault.path) or "its settings"
        raise ConfigError(
            f"{name}: {place[:100]} = {fault.shown}: {fault.rule}",
            fix=f"Its settings are: {', '.join(_settings(chosen)) or 'none'}.",
        ) from error


def spelled(one: Compressor) -> str | dict[str, Any]:
    """A compressor as a configuration writes it: its name, or a table where settings are not the defaults."""
    changed = one.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude_none=True)
    name = REGISTRY.admit(type(one)).name
    settings = {key: value for key, value in changed.items() if key != "name"}
    return {"name": name, **settings} if settings else name


def downward(one: Compressor) -> Compressor:
    """What the server sends in where clients send in this: the same cast, else float32."""
    return one if one.cast else FP32


def _settings(chosen: type[Compressor]) -> list[str]:
    return [f.alias or key for key, f in chosen.model_fields.items() if key != "name"]


def _read(given: object, info: ValidationInfo) -> Compressor:
    try:
        return compressor_of(given, trusted(info.context))
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error


AnyCompressor = Annotated[Compressor, PlainValidator(_read), PlainSerializer(spelled)]
"""A compressor in a table of the configuration: an object, a name, or a table with a name."""

__all__ = [
    "COMPRESSORS",
    "FP32",
    "REGISTRY",
    "AnyCompressor",
    "Bf16",
    "Cast",
    "Compressor",
    "Fp32",
    "Int8",
    "Key",
    "compressor_of",
    "downward",
    "find",
    "names",
    "spelled",
]
