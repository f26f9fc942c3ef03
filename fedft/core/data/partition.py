"""Who holds which rows, frozen into two arrays.

A partition in compressed sparse rows: site i holds ``rows[offsets[i]:offsets[i + 1]]``. A million
sites cost 8 bytes each and 4 a row, are written once and memory-mapped by every process. The
fingerprint covers how the partition came about and what it is.

Label skew comes from flwr-datasets' partitioners. An even cut of shuffled rows (its
``IidPartitioner``, whose seed is that of the shuffle before it) and grouping by owner (its
``NaturalIdPartitioner``) are array operations here, since the library makes a data set object for
each site, half a millisecond; the tests hold both against it.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedft.core.data.source import Data, codes
from fedft.core.errors import ConfigError, IntegrityError, MismatchError, SecurityRefusal
from fedft.core.extras import extra
from fedft.core.files import MIB, open_plain, read_plain
from fedft.core.seeds import derive, numpy_generator
from fedft.core.spec import PartitionSpec

FORMAT = 1
MAX_NAME = 100
"""Longest site name: it becomes a file name, with endings of ours behind it."""

_ARRAYS = ("offsets", "rows", "names")


@dataclass(frozen=True, eq=False)
class Manifest:
    """A partition. Sites are numbered from 0; rows are those of the training data.

    Attributes:
        offsets: int64 [clients + 1].
        rows: row numbers of all sites end to end, int32.
        names: of the sites, sorted, as a NumPy text array [clients]; None where they are numbered.
        origin: the partition's table, the seed and the number of rows, as canonical JSON.
        fingerprint: SHA-256 over the origin and the arrays, in hex.
    """

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    names: NDArray[np.str_] | None
    origin: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each site, int64 [clients]."""
        return np.diff(self.offsets)

    def rows_of(self, index: int) -> NDArray[np.int32]:
        """The rows of one site: a copy, apart from the mapped file."""
        self._check(index)
        return np.array(self.rows[self.offsets[index] : self.offsets[index + 1]])

    def name_of(self, index: int) -> str:
        """The name of a site."""
        self._check(index)
        return site_name(index, len(self)) if self.names is None else str(self.names[index])

    def index_of(self, name: str) -> int:
        """The number of a site.

        Raises:
            KeyError: no site has this name.
        """
        if self.names is None:
            index = int(name[5:]) if re.fullmatch(r"site-[0-9]{1,18}", name, re.ASCII) else 0
        else:
            index = min(int(np.searchsorted(self.names, name)), len(self) - 1)
        if index >= len(self) or self.name_of(index) != name:
            raise KeyError(f"no client is called {name[:MAX_NAME]!r}")
        return index

    def save(self, folder: Path) -> None:
        """Writes ``offsets.npy``, ``rows.npy``, ``names.npy`` and, last, ``manifest.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is not None:
                # Not over an existing file: another process may have it mapped.
                np.save(folder / "new.npy", array, allow_pickle=False)
                (folder / "new.npy").replace(folder / f"{name}.npy")
        header = json.loads(self.origin) | {"fingerprint": self.fingerprint}
        (folder / "manifest.json").write_text(json.dumps(header, indent=1), encoding="utf-8")

    def verify(self) -> None:
        """Reads everything again.

        Raises:
            IntegrityError: content and fingerprint do not belong together.
        """
        if _fingerprint(self.origin, self.offsets, self.rows, self.names) != self.fingerprint:
            raise IntegrityError(
                "the partition manifest does not match its fingerprint: its files were changed",
                fix="start the run anew, or restore the folder of the manifest",
            )

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"client {index} of {len(self)}")


def load(folder: Path, fingerprint: str | None = None) -> Manifest:
    """Opens a saved manifest; the arrays are mapped into memory, not read.

    Args:
        folder: where it was saved.
        fingerprint: what it must be; None takes any. The content is compared by
            :meth:`Manifest.verify` alone.

    Raises:
        IntegrityError: files are missing, truncated or do not fit together.
        MismatchError: it has another fingerprint.
    """
    try:
        header: dict[str, Any] = json.loads(
            read_plain(folder / "manifest.json", largest=MIB, within=folder)
        )
        found = str(header.pop("fingerprint"))
        named: bool = header["named"]
        arrays: list[Any] = [
            np.load(_plain(folder / f"{name}.npy"), mmap_mode="r", allow_pickle=False)
            for name in _ARRAYS[: 3 if named else 2]
        ]
        names = arrays[2] if named else None
        manifest = Manifest(arrays[0], arrays[1], names, _canonical(header), found)
        _check_shapes(manifest, header)
    except _UNREADABLE as error:
        raise IntegrityError(
            f"the partition manifest in {folder} cannot be read: {error}",
            fix="start the run anew, or restore the folder",
        ) from error
    if fingerprint is not None and found != fingerprint:
        raise MismatchError(
            f"the partition in {folder} is not the run's: fingerprint {found[:12]}, "
            f"expected {fingerprint[:12]}",
            fix="use the data, the partition table and the seed that the run started with",
        )
    return manifest


_UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError),
)


def _plain(path: Path) -> Path:
    open_plain(path, within=path.parent).close()
    return path


def divided(spec: PartitionSpec, data: Data, clients: int, seed: int) -> Manifest:
    """The training rows of a run's data, divided among its clients; see :func:`build`."""
    return build(
        spec,
        examples=len(data.train),
        clients=clients,
        seed=seed,
        labels=data.strata,
        owners=data.owners,
    )


def build(
    spec: PartitionSpec,
    *,
    examples: int,
    clients: int,
    seed: int,
    labels: NDArray[np.int64] | None = None,
    owners: Sequence[str] | None = None,
) -> Manifest:
    """Divides the rows among the sites; a function of its arguments alone.

    ``dirichlet`` and ``shards`` skew the classes, or the values of ``column`` where one is named.
    ``shards`` are all of one size, so that up to ``clients * shards_per_client - 1`` rows stay
    unused. ``natural`` gives one site to each value of ``column``, which is its name; ``clients``
    must be their number, so that a configuration says what it runs.

    Args:
        spec: the partition's table.
        examples: number of training rows.
        clients: number of sites.
        seed: of the run.
        labels: class ids, int64 [examples].
        owners: values of ``spec.column``, [examples].

    Raises:
        ConfigError: there is no such partition; the message names one that there is.
        SecurityRefusal: the name of an owner could be taken for a path.
    """
    if examples < 1:
        raise ConfigError("there are no training rows to divide", fix="lower data.test-fraction")
    names = None
    match spec.kind:
        case "bootstrap":
            offsets, rows = _bootstrap(examples, clients, spec.rows_per_client, seed)
        case "iid":
            offsets, rows = _iid(examples, clients, seed)
        case "natural":
            offsets, rows, names = _natural(spec, owners, clients)
        case "dirichlet":
            offsets, rows = _dirichlet(spec, _skewed(spec, labels, owners), clients, seed)
        case "shards":
            offsets, rows = _shards(spec, _skewed(spec, labels, owners), clients, seed)
    origin = {
        "format": FORMAT,
        "partition": spec.model_dump(),
        "seed": seed,
        "examples": examples,
        "named": names is not None,
    }
    text = _canonical(origin)
    return Manifest(offsets, rows, names, text, _fingerprint(text, offsets, rows, names))


def undivided(examples: int, name: str) -> Manifest:
    """All rows at one site, in their order: what a site with data of its own works on."""
    offsets, rows = np.array([0, examples]), np.arange(examples, dtype=np.int32)
    names, text = np.array([name]), _canonical({"format": FORMAT, "site": name})
    return Manifest(offsets, rows, names, text, _fingerprint(text, offsets, rows, names))


def split_holdout(
    rows: NDArray[np.int32], fraction: float, seed: int, site: str
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """A site's own division: (rows to train on, rows held out for judging its model).

    A row that a site holds more than once (``bootstrap``) is on one side only; so at least
    ``int(len(rows) * fraction)`` rows are held out, unless nothing would be left to train on.
    """
    held = int(len(rows) * fraction)
    if not held:
        return rows, rows[:0]
    distinct, group = np.unique(rows, return_inverse=True)
    shuffled = numpy_generator(seed, "holdout", site).permutation(len(distinct))[group]
    order = np.argsort(shuffled, kind="stable")
    last = shuffled[order[held - 1]]
    train, holdout = rows[shuffled > last], rows[shuffled <= last]
    return (train, holdout) if len(train) else (rows[held:], rows[:0])


def site_name(index: int, clients: int) -> str:
    """``site-00042``, as wide as the number of clients."""
    return f"site-{index:0{len(str(clients))}d}"


def safe_name(value: str) -> str:
    """An owner's value as a site name of ``A-Z a-z 0-9 . _ -``; other bytes become ``_`` and hex.

    Raises:
        SecurityRefusal: it has a slash, a backslash or NUL, starts with a dot, or is too long.
    """
    name = "".join(
        chr(byte) if chr(byte) in _ALLOWED else f"_{byte:02x}"
        for byte in value[: MAX_NAME + 1].encode(errors="surrogatepass")
    )
    if re.search(r"[/\\\0]", value) or value.startswith(".") or not 0 < len(name) <= MAX_NAME:
        raise SecurityRefusal(
            f"{value[:40]!r} cannot name a client: it could be taken for a path, or is too long",
            fix=f"use owners without '/', '\\' and NUL, not starting with '.', up to {MAX_NAME} bytes",
        )
    return name


_ALLOWED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")

Parts = tuple[NDArray[np.int64], NDArray[np.int32]]


def _bootstrap(examples: int, clients: int, each: int, seed: int) -> Parts:
    if clients * each >= 2**31:
        raise ConfigError(
            f"{clients:,} clients with {each:,} rows each are more than a manifest can number",
            fix="lower data.partition.rows-per-client or fleet.clients",
        )
    rng = numpy_generator(seed, "partition")
    rows = rng.integers(0, examples, clients * each, np.int32)
    return np.arange(clients + 1, dtype=np.int64) * each, rows


def _iid(examples: int, clients: int, seed: int) -> Parts:
    _check_enough(examples, clients, 1, "iid")
    rows = numpy_generator(seed, "partition").permutation(examples).astype(np.int32)
    each, extra = divmod(examples, clients)
    sizes = np.full(clients, each, np.int64)
    sizes[:extra] += 1
    return _offsets(sizes), rows


def _natural(
    spec: PartitionSpec, owners: Sequence[str] | None, clients: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.str_]]:
    if owners is None:
        raise ConfigError(
            "a natural partition needs the column that names the owner of each row",
            fix="set data.partition.column",
        )
    by_name: dict[str, str] = {}
    for owner in sorted(set(owners)):
        twin = by_name.setdefault(safe_name(owner), owner)
        if twin != owner:
            raise ConfigError(
                f"the owners {twin!r} and {owner!r} give the same client name",
                fix=f"rename one of them in the column {spec.column!r}",
            )
    if len(by_name) != clients:
        raise ConfigError(
            f"the column {spec.column!r} has {len(by_name)} distinct values, fleet.clients = {clients}",
            fix=f"set fleet.clients = {len(by_name)}",
        )
    named = {owner: name for name, owner in by_name.items()}
    order = codes([named[owner] for owner in owners])
    assert order is not None
    rows = np.argsort(order, kind="stable").astype(np.int32)
    return _offsets(np.bincount(order)), rows, np.array(sorted(by_name))


def _dirichlet(spec: PartitionSpec, skewed: NDArray[np.int64], clients: int, seed: int) -> Parts:
    """Without self-balancing: the sizes are skewed as well as the classes, as in most papers."""
    _check_enough(len(skewed), clients, spec.min_rows, "dirichlet")
    parts = _try_dirichlet(skewed, clients, spec.alpha, spec.min_rows, seed)
    if parts is not None:
        return parts
    raise ConfigError(
        f"no Dirichlet partition of {len(skewed)} rows among {clients} clients with "
        f"alpha = {spec.alpha} was found that leaves each at least min-rows = {spec.min_rows}",
        fix=_feasible(spec, skewed, clients, seed),
    )


def _try_dirichlet(
    skewed: NDArray[np.int64], clients: int, alpha: float, min_rows: int, seed: int
) -> Parts | None:
    """The library draws eleven times before it gives up: None then."""
    with _library("dirichlet"):
        from flwr_datasets.partitioner import (  # pyright: ignore[reportMissingTypeStubs]
            DirichletPartitioner,
        )

    partitioner = DirichletPartitioner(
        clients, "skewed", float(alpha), min_rows, seed=derive(seed, "partition")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each draw; the result says it all
        try:
            return _drained(partitioner, skewed, clients)
        except ValueError:
            return None


def _feasible(spec: PartitionSpec, skewed: NDArray[np.int64], clients: int, seed: int) -> str:
    """A change that was tried and works, as advice."""

    def works(alpha: float, count: int) -> bool:
        return _try_dirichlet(skewed, count, alpha, spec.min_rows, seed) is not None

    unbounded = _try_dirichlet(skewed, clients, spec.alpha, 0, seed)
    smallest = 0 if unbounded is None else int(np.diff(unbounded[0]).min())
    if smallest:
        return f"set data.partition.min-rows = {smallest}"
    alphas: Iterator[float] = (spec.alpha * 2**i for i in range(1, 12))
    if alpha := next((a for a in alphas if works(a, clients)), None):
        return f"set data.partition.alpha = {alpha:g}"
    fewer = next((clients >> i for i in range(1, 32) if works(spec.alpha, clients >> i)), 1)
    return f"set fleet.clients = {fewer}"


def _shards(spec: PartitionSpec, skewed: NDArray[np.int64], clients: int, seed: int) -> Parts:
    with _library("shards"):
        from flwr_datasets.partitioner import (  # pyright: ignore[reportMissingTypeStubs]
            ShardPartitioner,
        )

    _check_enough(len(skewed), clients, spec.shards_per_client, "shards")
    partitioner = ShardPartitioner(
        clients, "skewed", spec.shards_per_client, seed=derive(seed, "partition")
    )
    with warnings.catch_warnings():
        # datasets sorts with an argument that pyarrow 25 deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        return _drained(partitioner, skewed, clients)


def _library(kind: str) -> AbstractContextManager[None]:
    return extra("simulation", f"[data] partition = {{ kind = {kind!r} }} needs it")


def _drained(partitioner: Any, skewed: NDArray[np.int64], clients: int) -> Parts:
    """All parts of a flwr-datasets partitioner, through its public interface."""
    with extra("data", "a partition by flwr-datasets needs it"):
        import datasets  # pyright: ignore[reportMissingTypeStubs]

    columns = {"row": np.arange(len(skewed), dtype=np.int32), "skewed": skewed}
    table: Any = datasets.Dataset
    partitioner.dataset = table.from_dict(columns)
    parts = [np.array(partitioner.load_partition(i)["row"][:], np.int32) for i in range(clients)]
    return _offsets(np.array([len(part) for part in parts], np.int64)), np.concatenate(parts)


def _skewed(
    spec: PartitionSpec, labels: NDArray[np.int64] | None, owners: Sequence[str] | None
) -> NDArray[np.int64]:
    values = labels if spec.column is None else codes(owners)
    if values is None:
        raise ConfigError(
            f"a {spec.kind} partition needs one class a row, and this task has none",
            fix='set data.partition.column to the column to skew by, or data.partition.kind = "iid"',
        )
    return values


def _check_enough(examples: int, clients: int, each: int, kind: str) -> None:
    if clients * each <= examples:
        return
    most = examples // each
    options = [*([f"fleet.clients = {most}"] if most else []), 'data.partition.kind = "bootstrap"']
    raise ConfigError(
        f"{clients} clients with at least {each} of the rows each need {clients * each} rows, and the "
        f"training data have {examples} (data.partition.kind = {kind!r})",
        fix=f"set {' or '.join(options)}",
    )


def _offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _canonical(origin: dict[str, Any]) -> str:
    return json.dumps(origin, sort_keys=True, separators=(",", ":"))


def _fingerprint(
    origin: str,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int32],
    names: NDArray[np.str_] | None,
) -> str:
    digest = hashlib.sha256(origin.encode())
    digest.update(np.ascontiguousarray(offsets).data)
    digest.update(np.ascontiguousarray(rows).data)
    if names is not None:
        digest.update("\n".join(names.tolist()).encode())
    return digest.hexdigest()


def _check_shapes(manifest: Manifest, header: dict[str, Any]) -> None:
    """Cheap checks at opening: what would otherwise show as an index far away."""
    offsets, rows, names = manifest.offsets, manifest.rows, manifest.names
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
    if offsets.dtype != np.int64 or rows.dtype != np.int32 or offsets.ndim != 1 or rows.ndim != 1:
        raise ValueError("offsets must be int64 [clients + 1] and rows int32 [n]")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(rows):
        raise ValueError("offsets and rows do not fit together")
    if names is not None and (names.dtype.kind != "U" or names.shape != (len(manifest),)):
        raise ValueError("there must be one name a client")
