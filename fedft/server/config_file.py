"""From a TOML file and settings by dotted key to a validated configuration."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, cast

from pydantic import (
    ValidationError,
)

from fedft.core.complaints import complaints
from fedft.core.errors import ConfigError
from fedft.core.plugins import RECORD, USER, Trust, is_reference
from fedft.core.toml import read_toml, toml_table
from fedft.server.config import RunConfig
from fedft.server.fleet import (
    read_devices,
)
from fedft.server.sentences import place, sentence
from fedft.strategies import FedAvgLoRA, Strategy


def load_config(
    path: Path,
    settings: Iterable[str] = (),
    rules: Sequence[str] = (),
    trust: Trust = USER,
) -> RunConfig:
    """Read and validate a TOML file.

    Args:
        path: the file.
        settings: overrides such as ``training.lr=1e-3``; values are TOML, bare words are strings.
        rules: as for :func:`configured`.
        trust: what may be imported because the file or the settings name it.

    Raises:
        ConfigError: naming the key, the rule and the nearest valid name.
        SecurityRefusal: it names code from outside that is not trusted.
    """
    return configured(path, dict(_setting(text) for text in settings), rules, trust)


def repeated(settings: Iterable[str], allowed: Iterable[object] = ()) -> Trust:
    """What may be imported for a run directory: the names that its user repeats.

    Args:
        settings: of the command line, as for :func:`load_config`; who writes a name there means it.
        allowed: names, or classes from Python, as for :meth:`~fedft.core.plugins.Trust.also`.
    """
    values = [value for _, value in map(_setting, settings)]
    return RECORD.also([*allowed, *_named_in(values)])


def _named_in(value: object) -> Iterator[str]:
    """The ``module:Class`` names among settings: who writes one down means it."""
    if isinstance(value, str):
        yield from [value] if is_reference(value) else []
    elif isinstance(value, Mapping):
        for inner in cast(Mapping[object, object], value).values():
            yield from _named_in(inner)
    elif isinstance(value, list):
        for inner in cast(list[object], value):
            yield from _named_in(inner)


def configured(
    source: "str | Path | RunConfig",
    overrides: Mapping[str, Any],
    rules: Sequence[str | Strategy] = (),
    trust: Trust = USER,
) -> RunConfig:
    """A configuration with other values at some dotted keys.

    Args:
        source: a TOML file, or a validated configuration.
        overrides: such as ``{"training.lr": 1e-3, "strategy": {"name": "ffa-lora"}}``.
        rules: the aggregation rules that are to be run in place of the configuration's. Where its
            own is none of them the first takes its place: what nobody runs need not fit the rest.
        trust: what of it may be imported.

    Raises:
        ConfigError: as for :func:`load_config`.
    """
    if isinstance(source, RunConfig):
        table, where = tomllib.loads(source.to_toml()), "the configuration"
    else:
        table, where = _read(Path(source)), str(source)
    for key, value in overrides.items():
        _override(table, key, value)
    if rules and _rule(table) not in rules:
        first = rules[0]
        table["strategy"] = {"name": first} if isinstance(first, str) else first
    return parse_config(table, where, trust)


def _rule(table: Mapping[str, Any]) -> Any:
    """The rule that an unchecked table names; the default where it names none."""
    given: Any = table.get("strategy", {})
    return (
        cast(Mapping[str, Any], given).get("name", FedAvgLoRA().name)
        if isinstance(given, Mapping)
        else given
    )


def _read(path: Path) -> dict[str, Any]:
    table = read_toml(path)
    _anchor(table, path.parent)
    return table


def parse_toml(text: str, where: str, trust: Trust = RECORD) -> RunConfig:
    """Read a resolved configuration, as :meth:`RunConfig.to_toml` wrote it."""
    return parse_config(toml_table(text, where), where, trust)


def parse_config(
    table: Mapping[str, Any], where: str = "the configuration", trust: Trust = RECORD
) -> RunConfig:
    """Validate a configuration that is already a table; errors as in :func:`load_config`."""
    try:
        return RunConfig.model_validate(_with_devices(table), context=trust)
    except ValidationError as error:
        faults = [f"  {sentence(complaint, RunConfig)}" for complaint in complaints(error)]
        raise ConfigError(
            "\n".join([f"{where} cannot be run:", *faults]),
            fix=f"Correct {'it' if len(faults) == 1 else 'them'} there or with --set; "
            "`fedft plan` checks a configuration without running it.",
        ) from error


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line for each key whose value differs, as ``[table] key: old → new``."""

    def flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
        if isinstance(value, dict):
            pairs = cast(dict[str, Any], value).items()
            return {k: v for key, sub in pairs for k, v in flat(sub, (*path, key)).items()}
        return {path: value}

    a, b = (flat(c.model_dump(mode="json", by_alias=True)) for c in (old, new))
    changed = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
    return [f"{place(key)}: {a.get(key)} → {b.get(key)}" for key in sorted(changed)]


def _setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of the command line; the value is TOML, a bare word is a string."""
    key, separator, value = text.partition("=")
    if text.encode(errors="replace").decode() != text:
        raise ConfigError(f"--set {text!r} is not UTF-8", fix="Check the encoding of the terminal.")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {text!r} is not KEY=VALUE", fix="Example: --set training.lr=1e-3")
    try:
        read = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        read = {}
    # More than one line of TOML is no value of one key.
    return key.strip(), read["value"] if read.keys() == {"value"} else value.strip()


def _override(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    try:
        inner = reduce(lambda t, name: t.setdefault(name, {}), parents, table)
        if key == "strategy.name" and inner.get("name") != value:
            inner.clear()  # another rule has other hyperparameters
        inner[last] = value
    except (AttributeError, TypeError):
        raise ConfigError(
            f"{'.'.join(parents)} is a value, not a table", fix=f"Check {key!r}."
        ) from None


_PATHS = (
    *(("model", "source"), ("data", "source"), ("data", "test-source")),
    *(("fleet", "devices"), ("fleet", "availability")),
)


def _with_devices(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rows of a file of devices in place of its name: they belong to the configuration."""
    fleet = table.get("fleet")
    if not isinstance(fleet, Mapping) or not isinstance(fleet.get("devices"), str):
        return table
    return {**table, "fleet": {**fleet, "devices": read_devices(Path(fleet["devices"]))}}


def _anchor(table: dict[str, Any], folder: Path) -> None:
    """Make relative paths of a configuration relative to its file, so that it runs from anywhere."""
    for section, key in _PATHS:
        inner = table.get(section)
        value = inner.get(key) if isinstance(inner, dict) else None
        if not isinstance(value, str) or ":" in value:
            continue
        with suppress(OSError, ValueError):  # no path of any file; whoever opens it will say so
            if (folder / value).exists():
                cast(dict[str, Any], inner)[key] = str((folder / value).resolve())
