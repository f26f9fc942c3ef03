"""What each site's device can do: listed, drawn from a distribution, or read from a file of devices.

Every value is a function of (run seed, what it is, site name): no site costs anything until it is
asked for, and a million registered ones cost nothing.

The file of devices is CSV with a header; lines that begin with ``#`` are comments. Its columns, all
of them optional:

    site            the registered site that a row describes; then every site has its row.
                    Without this column rows are classes of devices, dealt out by seed
    name            of the class, for the reader
    share           how often a class occurs, relative to the others; 1 where absent
    rank            LoRA rank it trains
    memory_mib      memory it grants to training, in MiB
    samples_per_s   examples it trains on in a second
    up_mbps         its upload, in megabits (10^6) a second
    down_mbps       its download, likewise

An empty cell leaves the value open: the run's own rank, unlimited memory, and no time at all for
what has no rate.
"""

import bisect
import csv
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Discriminator,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from fedft.core import names, seeds
from fedft.core.complaints import complaints
from fedft.core.data.partition import Manifest
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.files import read_text
from fedft.core.spec import Table

T = TypeVar("T")


class Distribution(Table):
    """A number for each site, drawn by seed.

    Attributes:
        kind: ``uniform`` or ``log-uniform`` between the bounds; ``log-normal`` with its median at
            their geometric mean, cut off at them.
        low, high: bounds.
        sigma: standard deviation of the logarithm, of ``log-normal``.
    """

    kind: Literal["uniform", "log-uniform", "log-normal"]
    low: PositiveFloat
    high: PositiveFloat
    sigma: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> "Distribution":
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        return self

    def draw(self, seed: int, what: str, name: str) -> float:
        """The number of one site."""
        generator = seeds.numpy_generator(seed, what, name)
        if self.kind == "uniform":
            return float(generator.uniform(self.low, self.high))
        low, high = math.log(self.low), math.log(self.high)
        if self.kind == "log-uniform":
            return math.exp(generator.uniform(low, high))
        value = math.exp(generator.normal((low + high) / 2, self.sigma))
        return min(max(value, self.low), self.high)


def _is_table(value: Any) -> str:
    return "distribution" if isinstance(value, Mapping | Distribution) else "list"


Numbers = Annotated[
    Annotated[tuple[PositiveFloat, ...], Tag("list")]
    | Annotated[Distribution, Tag("distribution")],
    Discriminator(_is_table),
]
"""A list that is dealt out by seed, or a distribution that is drawn from by seed."""

WholeNumbers = Annotated[
    Annotated[tuple[PositiveInt, ...], Tag("list")] | Annotated[Distribution, Tag("distribution")],
    Discriminator(_is_table),
]
"""The same for whole numbers; what is drawn is rounded."""


class Device(Table):
    """One device, or one class of devices: a row of the file.

    Attributes:
        site: the one client that has it; None where devices are dealt out by ``share``.
        name: of the class of devices, for reading alone.
        share: weight of the class in the deal, relative to the others.
        rank: LoRA rank; None is the run's.
        memory_mib: what it grants to training; None is no limit.
        samples_per_s: examples that it trains on in a second; None takes no time.
        up_mbps, down_mbps: bandwidth in megabits a second; None takes no time.
    """

    site: str | None = None
    name: str | None = None
    share: PositiveFloat = 1.0
    rank: PositiveInt | None = None
    memory_mib: PositiveFloat | None = None
    samples_per_s: PositiveFloat | None = None
    up_mbps: PositiveFloat | None = None
    down_mbps: PositiveFloat | None = None


def check_devices(devices: Sequence[Device]) -> None:
    """Refuse rows that contradict each other.

    Raises:
        ValueError: some rows name a site, or a rank, and others do not; or two name the same site.
    """
    for column in ("site", "rank"):
        missing = sum(getattr(device, column) is None for device in devices)
        if 0 < missing < len(devices):
            raise ValueError(f"{missing} of {len(devices)} devices have no {column}")
    sites = [device.site for device in devices if device.site is not None]
    if twice := next((a for a, b in itertools.pairwise(sorted(sites)) if a == b), None):
        raise ValueError(f"client {twice!r} has two devices")


def read_devices(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of devices, as they stand in a resolved configuration.

    Raises:
        ConfigError: naming the file, the line, the column and the rule.
    """
    keys = {name: field.alias or name for name, field in Device.model_fields.items()}
    rows: list[dict[str, Any]] = []
    for line, row in csv_rows(path, known=keys):
        given = {keys[column]: cell for column, cell in row.items() if cell}
        try:
            device = Device.model_validate(given)
        except ValidationError as error:
            first = complaints(error)[0]
            column = first.path[0].replace("-", "_")
            raise ConfigError(
                f"{path}, line {line}: {column} = {first.shown}: {first.rule}",
                fix="Leave a cell empty where a value is not known.",
            ) from error
        rows.append(device.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    return rows


def csv_rows(
    path: Path, *, known: Iterable[str], required: Iterable[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a small CSV with a header, each with its line number; ``#`` begins a comment.

    Raises:
        ConfigError: the file cannot be read or is empty, a column is unknown, missing or named
            twice, or a row has more or fewer cells than there are columns.
    """
    known = tuple(known)
    lines = [
        (number, _cells(line, f"{path}, line {number}"))
        for number, line in enumerate(read_text(path).splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if len(lines) < 2:
        raise ConfigError(f"{path} has no rows", fix=f"Its columns are {', '.join(known)}.")
    header = lines[0][1]
    for column in header:
        if column not in known:
            raise ConfigError(
                f"{path}: unknown column {column[:40]!r}; {names.hint(column, known)}",
                fix="Rename it.",
            )
    wrong = [c for c in required if c not in header] or [c for c in header if header.count(c) > 1]
    if wrong:
        raise ConfigError(
            f"{path} needs exactly one column {wrong[0]!r}", fix="Correct its header."
        )
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise ConfigError(
                f"{path}, line {number}: {len(cells)} cells under {len(header)} columns",
                fix="Give every row a cell, if an empty one, for every column.",
            )
        yield number, dict(zip(header, cells, strict=True))


def _cells(line: str, where: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line]))]
    except csv.Error as error:
        raise ConfigError(f"{where}: malformed CSV: {error}", fix="Correct the line.") from error


def match_sites(named: Sequence[str], manifest: Manifest, what: str) -> None:
    """Refuse a file by site that does not name exactly the registered ones.

    Raises:
        MismatchError: an unknown site is named, or a registered one is not.
    """
    for name in named:
        try:
            manifest.index_of(name)
        except KeyError:
            raise MismatchError(
                f"{what} names {name!r}, and no registered client is called so",
                fix=f"The registered clients are {manifest.name_of(0)} … {manifest.name_of(len(manifest) - 1)}.",
            ) from None
    if len(named) < len(manifest):
        given = set(named)
        missing = next(n for i in range(len(manifest)) if (n := manifest.name_of(i)) not in given)
        raise MismatchError(
            f"{what} leaves out {len(manifest) - len(given)} of {len(manifest)} registered clients, "
            f"{missing!r} for one",
            fix="Give every client its rows, or leave the column of clients out: rows are then dealt out.",
        )


@dataclass(frozen=True)
class Fleet:
    """The devices of all sites.

    Attributes:
        seed: of the run.
        ranks, memory_mib: dealt out by seed, or drawn.
        samples_per_s, up_mbps, down_mbps: likewise; empty takes no time.
        devices: whole devices, by site or dealt out by share; in place of all of the above.
    """

    seed: int = 0
    ranks: tuple[int, ...] | Distribution = ()
    memory_mib: tuple[float, ...] | Distribution = ()
    samples_per_s: tuple[float, ...] | Distribution = ()
    up_mbps: tuple[float, ...] | Distribution = ()
    down_mbps: tuple[float, ...] | Distribution = ()
    devices: tuple[Device, ...] = ()

    def device(self, name: str) -> Device:
        """What the device of a site can do."""
        if self._by_site:
            return self._by_site[name]
        if self.devices:
            return self.devices[self._dealt_class(name)]
        rank = self._one("rank", name, self.ranks)
        return Device.model_construct(
            site=name,
            rank=None if rank is None else round(rank),
            memory_mib=self._one("memory", name, self.memory_mib),
            samples_per_s=self._one("speed", name, self.samples_per_s),
            up_mbps=self._one("up", name, self.up_mbps),
            down_mbps=self._one("down", name, self.down_mbps),
        )

    def check(self, manifest: Manifest) -> None:
        """Refuse a file of devices by site that is not about the registered sites.

        Raises:
            MismatchError: see :func:`match_sites`.
        """
        if self._by_site:
            match_sites(list(self._by_site), manifest, "[fleet] devices")

    @cached_property
    def _by_site(self) -> dict[str, Device]:
        return {device.site: device for device in self.devices if device.site is not None}

    @cached_property
    def _bounds(self) -> list[float]:
        return list(itertools.accumulate(device.share for device in self.devices))

    def _dealt_class(self, name: str) -> int:
        point = seeds.derive(self.seed, "device", name) / 2**63 * self._bounds[-1]
        return min(bisect.bisect_right(self._bounds, point), len(self.devices) - 1)

    def _one(self, what: str, name: str, hand: tuple[float, ...] | Distribution) -> float | None:
        if isinstance(hand, Distribution):
            return hand.draw(self.seed, what, name)
        return dealt(self.seed, what, name, hand)


def dealt(seed: int, what: str, name: str, hand: Sequence[T]) -> T | None:
    """A site's card of a hand that is dealt out by seed; None where the hand is empty."""
    return hand[seeds.derive(seed, what, name) % len(hand)] if hand else None


def whole(numbers: tuple[int, ...] | Distribution) -> tuple[int, ...]:
    """All values that a list or a distribution of whole numbers can give."""
    if isinstance(numbers, Distribution):
        return tuple(range(round(numbers.low), round(numbers.high) + 1))
    return numbers
