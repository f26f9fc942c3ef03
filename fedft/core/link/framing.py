"""Tensors on a stream: a header that says what follows, then chunks of at most 256 KiB.

The receiver knows from its own plan which names, types, shapes and sizes can come. It compares the
header with that before it takes a byte, so that a header that claims terabytes costs nothing.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedft.core.errors import UpdateRejected
from fedft.core.link import link_pb2 as pb
from fedft.core.spec import TaskSpec
from fedft.core.wire.compress import FP32, Compressor

PROTOCOL = 1
"""Version of ``link.proto``. Both ends must speak the same."""

CHUNK_BYTES = 256 * 1024
MAX_MESSAGE_BYTES = 1024 * 1024
"""Largest single message on a stream. A header with its names fits; a chunk does with room to spare."""

MAX_ARRAYS = 20_000
MAX_METRICS = 64
MAX_NUMBERS = 20_000  # of all metrics together; one that is a list is its numbers under one name
MAX_NAME = 512  # characters
MAX_FORMAT = 64  # characters

Shape = tuple[int, ...]
Expected = Mapping[str, Mapping[str, Shape]]
"""Record name → array name → shape. What is not listed may not come."""


@dataclass(frozen=True)
class Ticket:
    """One piece of work. The same ticket twice is the same work, and has the same result.

    Attributes:
        run: id of the run.
        round: which round it belongs to.
        site: who is to do it.
        kind: ``train`` or ``evaluate``.
        base: digest of the adapter, base delta and plan that are worked on.
    """

    run: str
    round: int
    site: str
    kind: str
    base: str

    @classmethod
    def read(cls, message: pb.Ticket) -> "Ticket":
        """From the wire."""
        return cls(message.run, message.round, message.site, message.kind, message.base)

    def message(self) -> pb.Ticket:
        """For the wire."""
        return pb.Ticket(
            run=self.run, round=self.round, site=self.site, kind=self.kind, base=self.base
        )


class Digests:
    """Digests of contents; a record that several messages share is read once."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}
        self._alive: list[ArrayRecord] = []  # an id is unique only while its object lives

    def of(self, content: RecordDict, plan: str) -> str:
        """SHA-256 over the arrays by name, dtype, shape and bytes, and the plan's JSON."""
        digest = hashlib.sha256(plan.encode())
        for name, record in sorted(content.array_records.items()):
            digest.update(f"\n{name}\n".encode())
            digest.update(self._record(record))
        return digest.hexdigest()

    def _record(self, record: ArrayRecord) -> bytes:
        if id(record) not in self._known:
            digest = hashlib.sha256()
            for name, array in record.items():
                digest.update(f"{name} {array.dtype} {list(array.shape)} {array.stype}\n".encode())
                digest.update(array.data)
            self._known[id(record)] = digest.digest()
            self._alive.append(record)
        return self._known[id(record)]


def data_schema(task: TaskSpec, classes: Sequence[str]) -> str:
    """Digest of what two data sets must agree on for one model to be trained on both."""
    text = "\n".join([task.model.task, str(task.data.max_length), *classes])
    return hashlib.sha256(text.encode()).hexdigest()


def describe(content: RecordDict) -> pb.Content:
    """The header of a content: its arrays and its metrics. Configuration does not travel in it."""
    return pb.Content(
        records=[
            pb.Arrays(
                name=name,
                arrays=[
                    pb.ArrayHeader(
                        name=key,
                        dtype=array.dtype,
                        shape=array.shape,
                        format=array.stype,
                        size=len(array.data),
                    )
                    for key, array in record.items()
                ],
            )
            for name, record in content.array_records.items()
        ],
        metrics=[
            _metric(name, number)
            for record in content.metric_records.values()
            for name, value in record.items()
            for number in (value if isinstance(value, list) else [value])
        ],
    )


def _metric(name: str, value: object) -> pb.Metric:
    if isinstance(value, int):
        return pb.Metric(name=name, whole=value)
    if isinstance(value, float):
        return pb.Metric(name=name, real=value)
    raise UpdateRejected("metrics", f"the metric {name!r} is not a number")


def chunks(content: RecordDict) -> Iterator[bytes]:
    """The bytes of all arrays, end to end, in the order of the header; made one at a time."""
    buffer = bytearray()
    for record in content.array_records.values():
        for array in record.values():
            rest = memoryview(array.data)
            while rest:
                taken = rest[: CHUNK_BYTES - len(buffer)]
                buffer += taken
                rest = rest[len(taken) :]
                if len(buffer) == CHUNK_BYTES:
                    yield bytes(buffer)
                    buffer.clear()
    if buffer:
        yield bytes(buffer)


def check(header: pb.Content, expected: Expected, compressor: Compressor = FP32) -> int:
    """Compare a header with what can come, before any of it is taken.

    Args:
        header: as it was received.
        expected: what can come.
        compressor: in which it can come.

    Returns:
        The bytes that will follow.

    Raises:
        UpdateRejected: with the reason ``schema``, ``keys``, ``dtype``, ``shape``, ``format``,
            ``size`` or ``metrics``.
    """
    metrics = {m.name for m in header.metrics}
    many = len(metrics) > MAX_METRICS or len(header.metrics) > MAX_NUMBERS
    if many or any(len(name) > MAX_NAME for name in metrics):
        what = f"{len(metrics)} metrics of {len(header.metrics)} numbers"
        raise UpdateRejected("metrics", f"{what}, or a name too long")
    names = [record.name for record in header.records]
    if len(set(names)) != len(names) or not set(names) <= set(expected):
        raise UpdateRejected("schema", f"records {_shown(names)}, not {sorted(expected)}")
    return sum(
        _check_record(record, expected[record.name], compressor) for record in header.records
    )


def _check_record(record: pb.Arrays, expected: Mapping[str, Shape], compressor: Compressor) -> int:
    names = {header.name for header in record.arrays}
    if len(names) != len(record.arrays) or len(record.arrays) > MAX_ARRAYS:
        raise UpdateRejected("keys", f"{record.name}: a tensor comes twice, or too many come")
    if unknown := names - expected.keys():
        raise UpdateRejected("keys", f"{record.name}: {len(unknown)} tensors not asked for")
    return sum(_check_array(header, expected[header.name], compressor) for header in record.arrays)


def _check_array(header: pb.ArrayHeader, shape: Shape, compressor: Compressor) -> int:
    if tuple(header.shape) != shape:
        raise UpdateRejected("shape", f"{header.name} is {_shown(header.shape)}, not {shape}")
    if len(header.format) > MAX_FORMAT:
        raise UpdateRejected("format", f"{header.name} is in no known serialisation format")
    compressor.admit(header.name, header.dtype, header.format, shape, header.size)
    return header.size


def _shown(values: Sequence[object]) -> str:
    return str([str(value)[:40] for value in values[:8]])


@dataclass
class Assembly:
    """A content on its way in.

    Args:
        header: as it was received.
        expected: what can come.
        compressor: in which it can come.

    Raises:
        UpdateRejected: see :func:`check`; and from :meth:`feed` when more comes than was declared.
    """

    header: pb.Content
    expected: Expected
    compressor: Compressor = FP32
    declared: int = field(init=False)
    """Bytes in all."""
    missing: int = field(init=False)
    """Bytes still to come."""

    def __post_init__(self) -> None:
        self.declared = self.missing = check(self.header, self.expected, self.compressor)
        self._pieces: list[bytes] = []

    @property
    def complete(self) -> bool:
        """Whether everything declared is here."""
        return self.missing == 0

    def feed(self, data: bytes) -> None:
        """Take one chunk."""
        if not data or len(data) > self.missing:
            raise UpdateRejected("size", "the bytes sent are not those declared")
        self.missing -= len(data)
        self._pieces.append(data)

    def content(self) -> RecordDict:
        """What was sent. Arrays keep the order of the header."""
        cut = _Cutter(self._pieces)
        records: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {
            record.name: ArrayRecord({h.name: _array(h, cut.take(h.size)) for h in record.arrays})
            for record in self.header.records
        }
        if self.header.metrics:
            records["metrics"] = MetricRecord(_numbers(self.header.metrics))
        return RecordDict(records)


def _numbers(metrics: Iterable[pb.Metric]) -> dict[str, Any]:
    """Name → number, or a list of those that came under one name."""
    found: dict[str, list[int | float]] = {}
    for m in metrics:
        found.setdefault(m.name, []).append(m.whole if m.HasField("whole") else m.real)
    # A record's list is of one kind of number.
    return {
        name: numbers[0]
        if len(numbers) == 1
        else list(map(float, numbers))
        if any(isinstance(x, float) for x in numbers)
        else numbers
        for name, numbers in found.items()
    }


def _array(header: pb.ArrayHeader, data: bytes) -> Array:
    return Array(header.dtype, tuple(header.shape), header.format, data)


class _Cutter:
    """Cuts pieces into other pieces, and lets go of each as soon as it is used up."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces[::-1]
        self._rest = memoryview(b"")

    def take(self, size: int) -> bytes:
        parts: list[memoryview] = []
        while size:
            if not self._rest:
                self._rest = memoryview(self._pieces.pop())
            part = self._rest[:size]
            self._rest = self._rest[len(part) :]
            size -= len(part)
            parts.append(part)
        return b"".join(parts)
